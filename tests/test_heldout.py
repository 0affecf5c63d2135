"""Held-out measurements: the figures of `panda eval --text`, the guard, the best model, early stopping, samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteYaml
from pydantic import ValidationError
from test_equalities import config, metrics

from pandallm import log
from pandallm import tokenizer as tokenizers
from pandallm.config import UserError
from pandallm.evaluate import score
from pandallm.model import load
from pandallm.train import heldout
from pandallm.train import run as train
from pandallm.train.settings import HeldOut


def section(path: Path, **more: Any) -> dict[str, Any]:
    return {"every": 4, "sources": [{"name": "news", "path": str(path)}], **more}


def lines_of(out: Path) -> list[dict[str, Any]]:
    return log.read_metrics(out / "heldout.jsonl")


def test_bits_are_those_of_panda_eval(demo_shards: Path, texts: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    out = tmp_path / "run"
    conf = config(write_yaml, demo_shards, out, max_steps=6, heldout=section(texts))
    train.run(conf, [])
    lines = lines_of(out)
    assert [line["step"] for line in lines] == [0, 4, 6]
    words = [json.loads(line)["text"] for line in texts.read_text(encoding="utf-8").splitlines()]
    for line, folder in ((lines[0], load.resolve("tiny")), (lines[-1], out / "model")):
        model = load.load(Path(folder), torch.float32).eval()
        wanted = score.bits_per_character(model, tokenizers.load(Path(folder)), words)["bits_per_character"]
        assert line["bits_per_character"]["news"] == pytest.approx(wanted, rel=1e-4)
        assert line["mean"] == line["bits_per_character"]["news"]


def test_measuring_changes_nothing(demo_shards: Path, texts: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    plain = config(write_yaml, demo_shards, tmp_path / "plain", max_steps=6)
    train.run(plain, [])
    held = config(write_yaml, demo_shards, tmp_path / "held", max_steps=6, heldout=section(texts, prompts=["你好"]))
    train.run(held, [])
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "held")
    for line in lines_of(tmp_path / "held"):
        (sample,) = line["samples"]
        assert sample["prompt"] == "你好" and isinstance(sample["text"], str)


def test_best_model_is_kept(demo_shards: Path, texts: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    """OUT/best gives the lowest mean that was measured."""
    out = tmp_path / "run"
    keys = {"learning_rate": 0.05, "schedule": "constant", "max_steps": 16}  # soon too much: the best is not the last
    train.run(config(write_yaml, demo_shards, out, heldout=section(texts, every=2, keep_best=True), **keys), [])
    lines = lines_of(out)
    best = lines[1:][heldout.best_so_far(lines[1:])]
    words = [json.loads(line)["text"] for line in texts.read_text(encoding="utf-8").splitlines()]
    model = load.load(out / "best", torch.float32).eval()
    got = score.bits_per_character(model, tokenizers.load(out / "best"), words)["bits_per_character"]
    assert best["mean"] < lines[0]["mean"] and got == pytest.approx(best["mean"], rel=1e-4)


def test_patience_stops(demo_shards: Path, texts: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    out = tmp_path / "run"
    keys = {"learning_rate": 0.5, "schedule": "constant", "max_steps": 60}
    record = train.run(config(write_yaml, demo_shards, out, heldout=section(texts, every=2, patience=2), **keys), [])
    lines = lines_of(out)
    assert record["finished"] and record["stopped"].startswith("no better held-out mean in 2 measurements")
    assert record["steps"] == lines[-1]["step"] < 60
    assert len(lines) - 1 - heldout.best_so_far(lines) == 2 and (out / "model").exists()


@pytest.mark.parametrize("on_rise", ["warn", "stop"])
def test_forgetting_guard(
    on_rise: str, demo_shards: Path, texts: Path, tmp_path: Path, write_yaml: WriteYaml, capsys: Any
) -> None:
    """A probe of random letters, which training makes worse, warns or stops."""
    probe, out = tmp_path / "probe.txt", tmp_path / "run"
    probe.write_text("QZXJK VWQPF ZZXQJ KKVWX " * 4, encoding="utf-8")
    sources = [{"name": "news", "path": str(texts)}, {"name": "probe", "path": str(probe), "max_rise": 0.01}]
    held = {"every": 2, "sources": sources, "on_rise": on_rise}
    keys = {"learning_rate": 0.02, "schedule": "constant", "max_steps": 20}
    record = train.run(config(write_yaml, demo_shards, out, heldout=held, **keys), [])
    lines = lines_of(out)
    rises = [line["bits_per_character"]["probe"] - lines[0]["bits_per_character"]["probe"] for line in lines]
    assert max(rises) > 0.01, "the probe must have got worse for this test to say anything"
    assert [bool(line["warnings"]) for line in lines] == [rise > 0.01 for rise in rises]
    assert "probe rose by" in capsys.readouterr().err
    assert (record["steps"] == 20) == (on_rise == "warn")
    assert "mean" in lines[0] and lines[0]["mean"] == lines[0]["bits_per_character"]["news"]


def test_resumed_measurements_are_the_same(
    demo_shards: Path, texts: Path, tmp_path: Path, write_yaml: WriteYaml, monkeypatch: Any
) -> None:
    from pandallm.train import loop

    conf = config(write_yaml, demo_shards, tmp_path / "whole", max_steps=14, heldout=section(texts, keep_best=True))
    train.run(conf, [])
    real, out = loop.factor, tmp_path / "run"
    monkeypatch.setattr(loop, "factor", lambda s, step, *a: 1 / 0 if step == 11 else real(s, step, *a))
    with pytest.raises(ZeroDivisionError):
        train.run(conf, [f"out={out}"])
    monkeypatch.undo()
    train.run(conf, [f"out={out}"])
    assert lines_of(out) == lines_of(tmp_path / "whole")


def test_a_source_that_cannot_be_read(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    with pytest.raises(UserError, match="heldout.sources: news: .*nowhere.jsonl: no such file"):
        train.run(config(write_yaml, demo_shards, tmp_path / "a", heldout=section(tmp_path / "nowhere.jsonl")), [])
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"no": 1}\n', encoding="utf-8")
    with pytest.raises(UserError, match="has no record that can be read"):
        train.run(config(write_yaml, demo_shards, tmp_path / "b", heldout=section(empty)), [])


def test_sections_that_make_no_sense() -> None:
    with pytest.raises(ValidationError, match="two have the same name"):
        HeldOut(sources=[{"name": "a", "path": "x"}, {"name": "a", "path": "y"}])  # type: ignore[list-item]
    with pytest.raises(ValidationError, match="need a source without max_rise"):
        HeldOut(sources=[{"name": "a", "path": "x", "max_rise": 1}], patience=1)  # type: ignore[list-item]
