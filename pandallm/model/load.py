"""Base models: loaded from a Hugging Face folder, drawn from a seed, fitted to a tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from pandallm.config import UserError
from pandallm.model.names import resolve as resolve

hf_logging.disable_progress_bar()  # our own lines say what goes on
if not torch.cuda.is_available():
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # Transformers loads deepspeed where it is installed, which would ask

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")  # model_type of configurations that the tests cover


def load(folder: Path, dtype: torch.dtype, attention: str = "sdpa", trust_remote_code: bool = False) -> PreTrainedModel:
    """Loads a causal LM from a local folder (safetensors only).

    `attention` is an implementation registered with Transformers; training uses `attention.PACKED`.
    Raises UserError for an architecture outside SUPPORTED or files that don't load.
    """
    config = read_config(folder, trust_remote_code)
    if config.model_type not in SUPPORTED and not trust_remote_code:
        raise UserError(
            f"{folder}: model_type '{config.model_type}' is not supported; supported: {', '.join(SUPPORTED)}"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{folder}: the model does not load: {str(e).strip().splitlines()[0]}") from None
    return model


def inference_dtype(device: str) -> torch.dtype:
    """bf16 where `device` (cuda or cpu) computes in it; elsewhere it would be emulated, slower than fp32."""
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = any(getattr(torch.cpu, name, bool)() for name in checks)
    return torch.bfloat16 if fast else torch.float32


def from_scratch(config: dict[str, Any] | str, vocab_size: int, seed: int, attention: str) -> PreTrainedModel:
    """A model with random fp32 weights drawn from `seed`. `config`: a mapping, or a folder with config.json."""
    if isinstance(config, str):
        built = read_config(Path(config))
    else:
        values = {"vocab_size": vocab_size, **config}
        model_type = values.pop("model_type", "llama")
        if model_type not in SUPPORTED:
            raise UserError(f"init.config.model_type: '{model_type}' is not one of {', '.join(SUPPORTED)}")
        try:
            built = AutoConfig.for_model(model_type, **values)
        except (StrictDataclassError, TypeError, ValueError) as e:
            raise UserError(f"init.config: {str(e).splitlines()[-1].strip()}") from None
    if built.vocab_size < vocab_size:
        raise UserError(f"init.config.vocab_size: {built.vocab_size} is less than the tokenizer's {vocab_size}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(built, dtype=torch.float32, attn_implementation=attention)


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """A model folder's config.json. UserError if it doesn't load."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as e:
        raise UserError(f"{folder}: config.json does not load: {str(e).splitlines()[0]}") from None


def generation_config(folder: Path) -> GenerationConfig | None:
    """A model folder's generation_config.json, None where it has none."""
    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").exists() else None


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Grows the embeddings to the tokenizer's size; returns the rows added (0 where there is room already).

    A new row starts as the mean of the old ones: the distribution's own mean, and no random number needed.
    """
    rows = int(cast(torch.Tensor, model.get_input_embeddings().weight).shape[0])
    added = len(tokenizer) - rows
    if added <= 0:
        return 0
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight = cast(torch.Tensor, module.weight)  # tied: the same one twice, which does no harm
            weight[rows:] = weight[:rows].float().mean(0).to(weight.dtype)
    return added


def use_liger(model: PreTrainedModel) -> None:
    """Puts Liger's kernels in place of a model's norms, rotary positions and MLPs; the loss stays ours. UserError where
    that can't be done."""
    if not torch.cuda.is_available():
        raise UserError("liger: its kernels need a GPU")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        raise UserError("liger: Liger is not installed: pip install liger-kernel") from None
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
