"""The optional backend: vLLM computes what the protocols ask of a model, in batches of its own.

Beginnings that prompts share are kept in its prefix cache. In bf16 it rounds logits to bf16, as most programs do, so
that letters tie more often than with ours (score._head). Offline it can't be told that a letter has decided an answer:
texts go on to their end.
"""

from __future__ import annotations

import os
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from pandallm.config import UserError
from pandallm.model.load import read_config


class Vllm:
    """A model that vLLM runs, on all GPUs that this process sees. UserError: no vLLM here, or several ranks."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("backend vllm starts its own processes: start panda eval without a launcher of several")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # what is printed is the result
        try:
            import vllm  # type: ignore[import-not-found]
        except ImportError:
            raise UserError("backend: vllm is not installed: pip install vllm (0.30 or later)") from None
        self.config = read_config(folder)
        has_own = (folder / "generation_config.json").exists()
        self.generation_config = GenerationConfig.from_pretrained(folder) if has_own else None
        self._vllm: Any = vllm
        self._engine = vllm.LLM(
            model=str(folder),
            dtype=str(dtype).removeprefix("torch."),
            tensor_parallel_size=max(1, torch.cuda.device_count()),
            max_model_len=-1,  # what fits into memory
            enable_prefix_caching=True,
            seed=0,
        )
        window = int(self._engine.llm_engine.model_config.max_model_len)
        self.config.max_position_embeddings = min(window, int(self.config.max_position_embeddings))

    def _ask(self, prompts: Sequence[Sequence[int]], parameters: Sequence[dict[str, Any]]) -> list[Any]:
        requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
        how = [self._vllm.SamplingParams(temperature=0, detokenize=False, **p) for p in parameters]
        answers: list[Any] = self._engine.generate(requests, how)
        return answers

    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_ids: Set[int]) -> list[list[int]]:
        """As generate.greedy_batch."""
        how = {"max_tokens": max_new_tokens, "stop_token_ids": sorted(eos_ids), "ignore_eos": True}
        written = [list(answer.outputs[0].token_ids) for answer in self._ask(prompts, [how] * len(prompts))]
        return [ids[:-1] if ids and ids[-1] in eos_ids else ids for ids in written]

    def log_likelihoods(
        self, inputs: Sequence[Sequence[int]], wanted: Sequence[Sequence[tuple[int, int]]]
    ) -> list[list[float]]:
        """As score.log_likelihoods, for tokens that are the input's own next ones, or come after its end."""
        how = []
        for ids, pairs in zip(inputs, wanted, strict=True):
            after = sorted({token for position, token in pairs if position == len(ids) - 1})
            within = {} if all(position == len(ids) - 1 for position, _ in pairs) else {"prompt_logprobs": 0}
            how.append({"max_tokens": 1, "ignore_eos": True, "logprob_token_ids": after, **within})
        found = []
        for ids, pairs, answer in zip(inputs, wanted, self._ask(inputs, how), strict=True):
            # [position]: log-probabilities of tokens at that position, the first of which follows nothing
            places = [*(answer.prompt_logprobs or [None] * len(ids)), answer.outputs[0].logprobs[0]]
            found.append([places[position + 1][token].logprob for position, token in pairs])
        return found
