"""A run that goes on is the run that was never stopped: where it was killed before its first checkpoint, between its
best model and a checkpoint, at its last measurement; and with models that are loaded otherwise than they were made."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteYaml
from test_equalities import config, metrics
from test_heldout import lines_of, section

from pandallm import files, log
from pandallm.model import attention, checkpoint, load
from pandallm.train import loop, selftest
from pandallm.train import run as train
from pandallm.train.objectives import CausalLM, HeadLoss


class Killed(Exception):
    pass


def dying(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The next runs die in that step."""
    real = loop.factor

    def factor(schedule: Any, step: int, *rest: Any) -> float:
        if step == at:
            raise Killed
        return real(schedule, step, *rest)

    monkeypatch.setattr(loop, "factor", factor)


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def test_killed_before_the_first_checkpoint(
    demo_shards: Path,
    texts: Path,
    tmp_path: Path,
    write_yaml: WriteYaml,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = section(texts, every=2)
    conf = config(write_yaml, demo_shards, tmp_path / "whole", max_steps=5, heldout=held)
    train.run(conf, [])
    with monkeypatch.context() as m, pytest.raises(Killed):
        dying(m, 2)
        train.run(conf, [f"out={tmp_path / 'run'}"])
    assert files.read_json(tmp_path / "run" / "run.json")["stopped"].startswith("Killed")
    train.run(conf, [f"out={tmp_path / 'run'}"])
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [0, 2, 4, 5]
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")


def test_stopped_in_the_step_that_ends_the_run(
    demo_shards: Path,
    texts: Path,
    tmp_path: Path,
    write_yaml: WriteYaml,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = section(texts, every=2, patience=1)
    keys = {"learning_rate": 0.5, "schedule": "constant", "max_steps": 40, "heldout": held}
    conf = config(write_yaml, demo_shards, tmp_path / "whole", **keys)
    ended = train.run(conf, [])
    assert ended["steps"] < 40 and "no better held-out mean" in ended["stopped"]
    real = loop.factor

    def factor(schedule: Any, step: int, *rest: Any) -> float:
        if step == ended["steps"] - 1:  # seen at the next step's end
            os.kill(os.getpid(), signal.SIGTERM)
        return real(schedule, step, *rest)

    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(loop, "factor", factor)
        train.run(conf, [f"out={tmp_path / 'run'}"])
    again = train.run(conf, [f"out={tmp_path / 'run'}"])
    assert (again["steps"], again["stopped"]) == (ended["steps"], ended["stopped"])
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_steps_best_model_is_there_before_its_checkpoint(
    demo_shards: Path,
    texts: Path,
    tmp_path: Path,
    write_yaml: WriteYaml,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long it takes to write: what goes on from the checkpoint doesn't write it again."""
    published: list[str] = []
    write, publish = checkpoint.Writer._write, checkpoint.Writer._publish

    def slow(self: checkpoint.Writer, tmp: Path, *rest: Any) -> None:
        time.sleep(0.5 if tmp.name.startswith("best") else 0)
        write(self, tmp, *rest)

    def noted(self: checkpoint.Writer) -> None:
        published.append(self._final.name)
        publish(self)

    monkeypatch.setattr(checkpoint.Writer, "_write", slow)
    monkeypatch.setattr(checkpoint.Writer, "_publish", noted)
    held = section(texts, every=4, keep_best=True)
    train.run(config(write_yaml, demo_shards, tmp_path / "run", max_steps=9, save_every=4, heldout=held), [])
    assert published == ["best", "step-00000004", "best", "step-00000008", "best", "model"]


def test_what_is_newer_than_the_run_is_removed(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        checkpoint.folder_of(tmp_path, step).mkdir(parents=True)
    checkpoint.prune(tmp_path, 2, newest=6)  # 8 was damaged, and the run went back
    assert checkpoint.steps(tmp_path) == [6, 4]


SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
INIT = {"config": {**SHAPE, "num_key_value_heads": 2, "model_type": "llama"}, "tokenizer": "tiny"}


def tiny_with(folder: Path, **config: Any) -> Path:
    """The tiny model with other values in its config.json."""
    shutil.copytree(load.resolve("tiny"), folder)
    files.write_json(folder / "config.json", files.read_json(folder / "config.json") | config)
    return folder


@pytest.mark.parametrize("kind", ["from_scratch", "pad_in_the_data"])
def test_a_reloaded_model_computes_the_same(
    kind: str, demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"max_steps": 6, "save_every": 3, "precision": "bf16"}
    if kind == "from_scratch":  # its positions' frequencies were rounded to bf16, until it was loaded again
        keys |= {"model": None, "init": INIT}
    else:  # that token's embedding was trained, until it was loaded again
        keys |= {"model": str(tiny_with(tmp_path / "model", pad_token_id=1)), "precision": "fp32"}
    conf = config(write_yaml, demo_shards, tmp_path / "whole", **keys)
    train.run(conf, [])
    with monkeypatch.context() as m, pytest.raises(Killed):
        dying(m, 6)
        train.run(conf, [f"out={tmp_path / 'run'}", "save_every=2"])
    train.run(conf, [f"out={tmp_path / 'run'}"])
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_dropout_is_no_crossed_border(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    model = tiny_with(tmp_path / "model", attention_dropout=0.1)
    assert train.run(config(write_yaml, demo_shards, tmp_path / "run", model=str(model), max_steps=2), [])["finished"]


def test_the_check_leaves_the_mode_as_it_was(demo_shards: Path) -> None:
    from pandallm.data.shards import Shards

    attention.register()
    for mode in (True, False):
        module = CausalLM(load.load(load.resolve("tiny"), torch.float32, attention.PACKED)).train(mode)
        selftest.check(module, Shards(demo_shards), torch.device("cpu"))
        assert module.training is mode and module.model.training is mode


def test_measuring_makes_no_gradient(demo_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pandallm.data.loader import collate
    from pandallm.data.shards import Shards

    asked = []
    real = HeadLoss.apply
    monkeypatch.setattr(HeadLoss, "apply", lambda *args: asked.append(args[1].requires_grad) or real(*args))
    attention.register()
    module = CausalLM(load.load(load.resolve("tiny"), torch.float32, attention.PACKED))
    batch = collate([Shards(demo_shards).document(0)], rows=[0])
    with torch.no_grad():
        module(batch)
    module(batch)
    assert asked == [False, True]


# `panda train` whose third backward pass leaves a gradient that is no number.
POISONED = """
import sys, torch
from pandallm import cli
from pandallm.train import engine
real, calls = engine.DeepSpeedEngine.backward, []
def backward(self, *args, **keys):
    real(self, *args, **keys)
    calls.append(1)
    if len(calls) == 3:
        self.named[0][1].grad.fill_(float("nan"))
engine.DeepSpeedEngine.backward = backward
cli.main()
"""


@pytest.mark.slow
def test_a_bad_gradient_under_stage_0(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    stage_0 = {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 0}}}
    conf = config(write_yaml, demo_shards, tmp_path / "run", max_steps=5, **stage_0)
    (tmp_path / "poisoned.py").write_text(POISONED)
    command = [sys.executable, str(tmp_path / "poisoned.py"), "train", conf]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "step 3: the gradient's norm is nan" in done.stderr
    train.run(conf, ["engine=torch"])
    train.run(conf, ["engine=torch", f"out={tmp_path / 'whole'}"])
    ours, whole = (log.read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "whole"))
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in whole], rel=1e-4)
