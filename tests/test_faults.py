"""A user's mistakes and a machine's faults in training: one clear line, exit 2, nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteYaml
from safetensors.torch import load_file, save_file
from test_equalities import config, metrics

from pandallm import files, log
from pandallm.config import UserError
from pandallm.model import checkpoint, load
from pandallm.train import faults, loop
from pandallm.train import run as train


def panda(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pandallm.cli", *args], capture_output=True, text=True)


def one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit 2, one line on standard error that has all the parts, no traceback."""
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


def test_unknown_key(tmp_path: Path, write_yaml: WriteYaml) -> None:
    conf = write_yaml("train.yaml", model="tiny", data="x", out=str(tmp_path / "run"), max_steps=1, lerning_rate=1e-5)
    one_line(panda("train", str(conf)), "train.yaml:", "lerning_rate", "did you mean 'learning_rate'?")
    assert not (tmp_path / "run").exists()


def test_missing_file(tmp_path: Path) -> None:
    one_line(panda("train", str(tmp_path / "no.yaml")), "no.yaml", "no such file")


def test_missing_shards(tmp_path: Path, write_yaml: WriteYaml) -> None:
    conf = config(write_yaml, tmp_path / "no-shards", tmp_path / "run")
    one_line(panda("train", conf), "no-shards", "panda data prepare")
    assert not (tmp_path / "run").exists()


def test_missing_model(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    conf = config(write_yaml, demo_shards, tmp_path / "run", model="no-such-model")
    one_line(panda("train", conf), "no-such-model", "no such folder")
    assert not (tmp_path / "run").exists()


def test_other_tokenizer(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    """Shards of another tokenizer are refused, and nothing is left behind."""
    folder = tmp_path / "model"
    shutil.copytree(load.resolve("tiny"), folder)
    words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    words["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    conf = config(write_yaml, demo_shards, tmp_path / "run", model=str(folder))
    with pytest.raises(UserError, match="another tokenizer"):
        train.run(conf, [])
    assert not (tmp_path / "run").exists()


def test_no_eos(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    folder = tmp_path / "model"
    shutil.copytree(load.resolve("tiny"), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="eos"):
        train.run(config(write_yaml, demo_shards, tmp_path / "run", model=str(folder)), [])


def test_unsupported_architecture(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    folder = tmp_path / "model"
    shutil.copytree(load.resolve("tiny"), folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "gpt2"}))
    with pytest.raises(UserError, match="gpt2"):
        train.run(config(write_yaml, demo_shards, tmp_path / "run", model=str(folder)), [])


def test_rows_longer_than_the_window(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    folder = tmp_path / "model"
    shutil.copytree(load.resolve("tiny"), folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 128}))
    with pytest.raises(UserError, match="rows of 256 tokens and the model reads 128"):
        train.run(config(write_yaml, demo_shards, tmp_path / "run", model=str(folder)), [])


def test_ranks_without_deepspeed(
    demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="engine=deepspeed"):
        train.run(config(write_yaml, demo_shards, tmp_path / "run"), [])


def test_finished_run_is_left_alone(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    conf = config(write_yaml, demo_shards, tmp_path / "run", max_steps=2)
    train.run(conf, [])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    train.run(conf, ["micro_batch_size=1"])  # how it's computed may change, what may not
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="learning_rate 0.002, not 0.1"):
        train.run(conf, ["learning_rate=0.1"])


def test_foreign_folder_is_refused(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="isn't a run"):
        train.run(config(write_yaml, demo_shards, tmp_path / "run"), [])


def damage(folder: Path, how: str) -> None:
    target = folder / "state-00000.safetensors"
    if how == "truncated":
        with open(target, "r+b") as f:
            f.truncate(target.stat().st_size // 2)
    elif how == "flipped":
        data = bytearray(target.read_bytes())
        data[len(data) // 2] ^= 1
        target.write_bytes(bytes(data))
    elif how == "missing":
        (folder / "model" / "model.safetensors").unlink()
    else:
        (folder / checkpoint.COMPLETE).write_text('{"step": 12, "fi')


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "unfinished"])
def test_damaged_checkpoint(
    how: str, demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The checkpoint before a damaged one is used, with a warning, and the result is the undisturbed run's."""
    conf = config(write_yaml, demo_shards, tmp_path / "whole", max_steps=15)
    train.run(conf, [])
    # A run that dies at step 14: with checkpoints of steps 6 and 12.
    real_step = loop.factor
    out = tmp_path / "damaged"

    def dying(schedule: Any, step: int, *rest: Any) -> float:
        for thread in threading.enumerate():
            if step == 13 and thread.name == "checkpoint":  # writes step 12's beside the steps
                thread.join()
        if step == 14:
            raise ZeroDivisionError
        return real_step(schedule, step, *rest)

    monkeypatch.setattr(loop, "factor", dying)
    with pytest.raises(ZeroDivisionError):
        train.run(conf, [f"out={out}"])
    monkeypatch.setattr(loop, "factor", real_step)
    assert checkpoint.steps(out) == [12, 6]
    damage(checkpoint.folder_of(out, 12), how)
    capsys.readouterr()
    train.run(conf, [f"out={out}"])
    said = capsys.readouterr().err
    assert "warning" in said and "step-00000012" in said and "goes on from step 6" in said
    assert metrics(out) == metrics(tmp_path / "whole")


def test_non_finite_loss_names_step_and_rows(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    folder = tmp_path / "model"
    shutil.copytree(load.resolve("tiny"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "run"
    for _ in range(2):  # the same command replays the step
        with pytest.raises(UserError, match=r"step 1: the loss is nan; its rows: \[\d+"):
            train.run(config(write_yaml, demo_shards, out, model=str(folder)), [])
        assert checkpoint.steps(out) == [0]
        report = files.read_json(out / faults.REPORT)
        assert report["step"] == 1 and report["losses of rank 0's micro batches"] == ["nan"]
        documents = report["rows and their documents (source, file:line)"]
        assert len(documents) == 4 and all(":" in place for places in documents.values() for place in places)
    assert not (out / "model").exists()


def test_keep_last(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    train.run(config(write_yaml, demo_shards, tmp_path / "run", save_every=2, keep_last=2, max_steps=9), [])
    assert checkpoint.steps(tmp_path / "run") == [8, 6]


def test_from_scratch(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    """init instead of model: the same seed gives the same run."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    init = {"config": {**shape, "num_key_value_heads": 2, "model_type": "llama"}, "tokenizer": "tiny"}
    for name in ("a", "b"):
        train.run(config(write_yaml, demo_shards, tmp_path / name, model=None, init=init, max_steps=3), [])
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert load.load(tmp_path / "a" / "model", torch.float32).config.num_hidden_layers == 1


def test_run_leaves_what_it_promises(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    out = tmp_path / "run"
    record = train.run(config(write_yaml, demo_shards, out, max_steps=3), [])
    assert {p.name for p in out.iterdir()} == {
        *("heldout.jsonl", "loss.png", "metrics.jsonl", "model", "run.html", "run.json", "tensorboard")
    }
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert record["versions"]["torch"] and record["settings"]["data_hash"]
    for line in log.read_metrics(out / "metrics.jsonl"):
        assert line.keys() >= {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "mfu"}
