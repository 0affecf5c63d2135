"""evaluate/vllm.py: what is asked of vLLM, with a stand-in for it, and (slow) that the real one gives our answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pandallm import demo
from pandallm.config import UserError
from pandallm.evaluate import run as evaluation
from pandallm.model import load

TASKS = ["c3-m", "logiqa-v2"]
PROTOCOLS = ["generate", "choice", "cloze"]


def evaluate(out: Path, model: str = "tiny", backend: str = "torch", **more: Any) -> list[dict[str, Any]]:
    """Lines of predictions.jsonl."""
    data, limit = demo.ROOT / "eval", 6
    evaluation.run(model, TASKS, data, "dev", PROTOCOLS, limit, out, precision="fp32", backend=backend, **more)
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], tolerance: float) -> None:
    assert len(ours) == len(theirs) == len(PROTOCOLS) * 12
    for a, b in zip(ours, theirs, strict=True):
        assert b["output"].startswith(a["output"])  # ours ends where a letter has decided
        assert a.get("log_likelihoods") == pytest.approx(b.get("log_likelihoods"), abs=tolerance)
        for key in set(a) - {"output", "log_likelihoods"}:
            assert a[key] == b[key]


class StandIn:
    """vllm.LLM, as far as it is asked here: one request after another, by Transformers."""

    window = 1 << 20

    def __init__(self, model: str, dtype: str, tensor_parallel_size: int, **_: Any) -> None:
        assert dtype == "float32" and tensor_parallel_size == 1
        self.model = load.load(Path(model), torch.float32).eval()
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=self.window))

    def generate(self, requests: list[dict[str, Any]], parameters: list[SimpleNamespace]) -> list[Any]:
        return [self.one(r["prompt_token_ids"], p) for r, p in zip(requests, parameters, strict=True)]

    @torch.inference_mode()
    def one(self, ids: list[int], how: SimpleNamespace) -> Any:
        assert how.temperature == 0 and how.ignore_eos
        values = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)  # [T, V]

        def only(i: int, tokens: list[int]) -> dict[int, Any]:
            return {token: SimpleNamespace(logprob=float(values[i, token])) for token in tokens}

        before = [None, *(only(i, [token]) for i, token in enumerate(ids[1:]))]
        written: list[int] = []
        while len(written) < how.max_tokens and (not written or written[-1] not in getattr(how, "stop_token_ids", [])):
            written.append(int(self.model(torch.tensor([ids + written])).logits[0, -1].argmax()))
        output = SimpleNamespace(token_ids=written, logprobs=[only(-1, getattr(how, "logprob_token_ids", []))])
        return SimpleNamespace(prompt_logprobs=before if hasattr(how, "prompt_logprobs") else None, outputs=[output])


def test_answers_are_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(LLM=StandIn, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    same(evaluate(tmp_path / "ours"), evaluate(tmp_path / "theirs", backend="vllm"), 1e-4)
    monkeypatch.setattr(StandIn, "window", 400)  # of tokens: what fits into its memory
    assert any(line["truncated"] for line in evaluate(tmp_path / "narrow", backend="vllm"))
    with pytest.raises(UserError, match="another backend \\(torch, now vllm\\)"):
        evaluate(tmp_path / "ours", backend="vllm")


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it fails
    with pytest.raises(UserError, match="pip install vllm"):
        evaluate(tmp_path, backend="vllm")
    with pytest.raises(UserError, match="backend 'vlm': unknown; known: torch, vllm"):
        evaluate(tmp_path, backend="vlm")
    with pytest.raises(UserError, match="leave it out for bits per character"):
        evaluate(tmp_path, backend="vllm", texts=[tmp_path / "a.txt"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without a launcher"):
        evaluate(tmp_path, backend="vllm")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_real_one_gives_our_answers(tmp_path: Path) -> None:
    """On the real model: its CPU kernels have no head of the tiny one's size."""
    python = os.environ.get("PANDALLM_VLLM")
    if not python:
        pytest.skip("PANDALLM_VLLM doesn't name a Python that has vllm and pandallm's dependencies")
    ours = evaluate(tmp_path / "ours", "smollm2-135m")
    command = [python, "-m", "pandallm.cli", "eval", "--model", "smollm2-135m", "--task", ",".join(TASKS)]
    command += ["--data", str(demo.ROOT / "eval"), "--split", "dev", "--protocol", ",".join(PROTOCOLS), "--limit", "6"]
    command += ["--precision", "fp32", "--backend", "vllm", "--out", str(tmp_path / "theirs")]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "theirs" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    same(ours, [json.loads(line) for line in lines], 1e-3)
