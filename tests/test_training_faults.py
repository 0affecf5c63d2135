"""What goes wrong while training: full disks, kills in a save, dead ranks, bad gradients, crossed borders."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WriteYaml
from test_equalities import config, metrics

from pandallm import files, log
from pandallm.config import UserError
from pandallm.data.shards import Shards
from pandallm.model import attention, checkpoint, load
from pandallm.train import faults, objectives, selftest
from pandallm.train import run as train
from pandallm.train.settings import TrainConfig


@pytest.mark.parametrize("what", ["state", "model", "listing"])
def test_full_disk_in_a_save(
    what: str, demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml, capsys: Any, monkeypatch: Any
) -> None:
    """The save of step 12 fails as on a full disk: a warning, the checkpoint before it stays, the run ends as ever."""
    conf = config(write_yaml, demo_shards, tmp_path / "whole", max_steps=20)
    train.run(conf, [])
    real_save, real_json = checkpoint.save_file, files.write_json

    def full(path: Path) -> bool:
        return "step-00000012" in str(path) and (what in path.name or what == "model" and "model" in str(path))

    def save(tensors: Any, path: Path, **keys: Any) -> None:
        if full(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real_save(tensors, path, **keys)

    def write_json(path: Path, data: Any) -> None:
        if full(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real_json(path, data)

    monkeypatch.setattr(checkpoint, "save_file", save)
    monkeypatch.setattr(files, "write_json", write_json)
    out = tmp_path / "run"
    train.run(conf, [f"out={out}"])
    said = capsys.readouterr().err
    assert "step-00000012 could not be written" in said and "No space left" in said
    assert checkpoint.steps(out) == [18, 6]
    assert not list((out / "checkpoints").glob("*.partial"))
    assert metrics(out) == metrics(tmp_path / "whole")


def test_full_disk_in_the_metrics(tmp_path: Path) -> None:
    """Lines that could not be written come with the next one."""
    metrics_file = log.Metrics(tmp_path / "metrics.jsonl", 0)
    place = metrics_file._file.fileno()
    metrics_file.write(step=1)
    os.dup2(os.open("/dev/full", os.O_WRONLY), place)
    with pytest.raises(OSError, match="No space"):
        metrics_file.write(step=2)
    os.dup2(os.open(tmp_path / "metrics.jsonl", os.O_WRONLY | os.O_APPEND), place)
    metrics_file.write(step=3)
    metrics_file.close()
    assert [line["step"] for line in log.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_mistake_in_a_save_publishes_nothing(
    demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml, capsys: Any, monkeypatch: Any
) -> None:
    """Whatever goes wrong in the writing thread, a folder that isn't whole never gets its name."""
    real = checkpoint.save_config

    def save_config(model: Any, tokenizer: Any, folder: Path) -> None:
        if "step-00000006" in str(folder):
            raise TypeError("ours")
        real(model, tokenizer, folder)

    monkeypatch.setattr(checkpoint, "save_config", save_config)
    train.run(config(write_yaml, demo_shards, tmp_path / "run", max_steps=14), [])
    assert checkpoint.steps(tmp_path / "run") == [12]
    assert "step-00000006 could not be written (TypeError: ours)" in capsys.readouterr().err


def test_stage_one_where_only_offload_is_given() -> None:
    keys = {"model": "tiny", "data": "", "out": "", "max_steps": 1}
    assert TrainConfig(**keys).zero_optimization == {"stage": 1}
    offload = {"offload_optimizer": {"device": "cpu"}}
    given = TrainConfig(**keys, deepspeed={"zero_optimization": offload})
    assert given.zero_optimization == {"stage": 1, **offload}
    recomputed = [
        TrainConfig(**keys, activation_checkpointing=how).recompute_every for how in ("none", "full", "every-3")
    ]
    assert recomputed == [0, 1, 3]


SLOW_SAVE = """
import time
from pandallm import cli
from pandallm.model import checkpoint
real = checkpoint.save_file
def save(tensors, path, **keys):
    time.sleep(0.15)
    real(tensors, path, **keys)
checkpoint.save_file = save
cli.main()
"""


def test_killed_in_a_save(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    """kill -9 while a checkpoint is being written: the one before it is used, the metrics are the undisturbed run's."""
    conf = config(write_yaml, demo_shards, tmp_path / "whole", max_steps=30, save_every=5)
    train.run(conf, [])
    script, out = tmp_path / "slow_save.py", tmp_path / "run"
    script.write_text(SLOW_SAVE)
    command = [sys.executable, str(script), "train", conf, f"out={out}"]
    killed = 0
    for wanted in (5, 15):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        tmp = checkpoint.folder_of(out, wanted)
        tmp = tmp.with_name(tmp.name + files.TEMPORARY)
        deadline = time.monotonic() + 120
        while not tmp.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += tmp.exists()
    assert killed == 2  # both times in the save
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert metrics(out) == metrics(tmp_path / "whole")
    names = "model/model.safetensors"
    assert (out / names).read_bytes() == (tmp_path / "whole" / names).read_bytes()


def test_saving_goes_on_beside_training(
    demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml, monkeypatch: Any
) -> None:
    """Steps are made while a checkpoint is being written."""
    made: list[int] = []
    out = tmp_path / "run"
    real = checkpoint.save_file

    def save(tensors: Any, path: Path, **keys: Any) -> None:
        if "step-00000006" in str(path) and "state" in path.name:
            deadline = time.monotonic() + 60
            while len(log.read_metrics(out / "metrics.jsonl")) < 9 and time.monotonic() < deadline:
                time.sleep(0.01)
            made.append(len(log.read_metrics(out / "metrics.jsonl")))
        real(tensors, path, **keys)

    monkeypatch.setattr(checkpoint, "save_file", save)
    train.run(config(write_yaml, demo_shards, out, max_steps=11), [])
    assert made and made[0] >= 9


def test_gradient_that_is_no_number(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml, monkeypatch: Any) -> None:
    """The weights with a bad gradient are named, and the state before the step is kept."""
    real = objectives.HeadLoss.backward
    calls = []

    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        calls.append(1)
        hidden, weight, none = real(ctx, *grads)
        return (hidden * (float("nan") if len(calls) == 3 else 1), weight, none)

    monkeypatch.setattr(objectives.HeadLoss, "backward", staticmethod(backward))
    out = tmp_path / "run"
    with pytest.raises(UserError, match="step 3: the gradient's norm is nan"):
        train.run(config(write_yaml, demo_shards, out, max_steps=5), [])
    report = files.read_json(out / faults.REPORT)
    assert "model.norm.weight" in report["weights whose gradient isn't finite"]
    assert checkpoint.steps(out) == [2]
    monkeypatch.undo()
    train.run(config(write_yaml, demo_shards, out, max_steps=5), [])  # the fault is gone: it goes on from there
    train.run(config(write_yaml, demo_shards, tmp_path / "whole", max_steps=5), [])
    assert metrics(out) == metrics(tmp_path / "whole")


def test_crossed_borders_are_found(demo_shards: Path, monkeypatch: Any) -> None:
    """Attention that looks across documents stops the run before its first step."""
    attention.register()
    model = load.load(load.resolve("tiny"), torch.float32, attention.PACKED)
    module, device = objectives.CausalLM(model), torch.device("cpu")
    selftest.check(module, Shards(demo_shards), device)
    real = attention._by_document
    monkeypatch.setattr(attention, "_by_document", lambda q, k, v, cu, *rest: real(q, k, v, [0, cu[-1]], *rest))
    with pytest.raises(selftest.Contaminated, match="attention crosses their borders"):
        selftest.check(module, Shards(demo_shards), device)


def test_advice_when_memory_runs_out() -> None:
    model = load.load(load.resolve("tiny"), torch.bfloat16)
    keys = {"model": "tiny", "data": "", "out": "", "max_steps": 1}
    conf = TrainConfig(**keys, micro_batch_size=8, activation_checkpointing="none")
    wanted = "micro_batch_size=4.*activation_checkpointing=full"
    with pytest.raises(UserError, match=wanted), faults.out_of_memory(model, conf, 2048):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
    size = sum(p.numel() for p in model.parameters())
    assert faults.estimate(model, conf, 2048)["optimizer"] == 12 * size


def test_freeze_names_nothing(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    with pytest.raises(UserError, match="freeze: no weight's name begins with 'layers.0'"):
        train.run(config(write_yaml, demo_shards, tmp_path / "run", freeze=["layers.0"]), [])


def test_frozen_weights_stay(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    frozen = ("model.embed_tokens", "model.layers.0.")
    conf = config(write_yaml, demo_shards, tmp_path / "run", freeze=list(frozen), max_steps=3)
    train.run(conf, ["activation_checkpointing=full"])
    before, after = load.load(load.resolve("tiny"), torch.float32), load.load(tmp_path / "run/model", torch.float32)
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, after.get_parameter(name)) == name.startswith(frozen), name


def test_model_in_several_files(tmp_path: Path, monkeypatch: Any) -> None:
    """A large model's files are what Transformers reads, whoever wrote which."""
    model, tokenizer = load.load(load.resolve("tiny"), torch.float32), None
    layout = checkpoint.model_files(model, most=100_000)
    assert len(layout) > 2 and sorted(n for names in layout.values() for n in names) == sorted(
        name for name, _ in model.named_parameters()
    )
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(checkpoint.model_files, "__defaults__", (100_000,))
    from pandallm import tokenizer as tokenizers

    tokenizer = tokenizers.load(load.resolve("tiny"))
    parameters = dict(model.named_parameters())
    for file, names in checkpoint.model_files(model).items():
        (tmp_path / "m").mkdir(exist_ok=True)
        tensors = {name: parameters[name].detach() for name in names}
        checkpoint.save_file(tensors, tmp_path / "m" / file, metadata={"format": "pt"})
    checkpoint.save_config(model, tokenizer, tmp_path / "m")
    again = load.load(tmp_path / "m", torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))


def test_pieces_of_any_ranks(tmp_path: Path) -> None:
    """State written in uneven pieces is read over any stretch; a gap is an error."""
    values = torch.arange(100, dtype=torch.float32)
    cuts = [(0, 33), (33, 60), (60, 100)]
    for rank, (a, b) in enumerate(cuts):
        checkpoint.save_file({f"exp_avg.w@{a}": values[a:b].clone()}, tmp_path / f"state-{rank:05d}.safetensors")
    pieces = checkpoint.Pieces(tmp_path)
    rng = np.random.default_rng(0)
    for a, b in np.sort(rng.integers(0, 100, (50, 2)), axis=1):
        out = torch.zeros(int(b - a))
        pieces.fill("exp_avg.w", int(a), out)
        assert torch.equal(out, values[a:b])
    (tmp_path / "state-00001.safetensors").unlink()
    with pytest.raises(UserError, match="holds no state of exp_avg.w"):
        checkpoint.Pieces(tmp_path).fill("exp_avg.w", 30, torch.zeros(10))
