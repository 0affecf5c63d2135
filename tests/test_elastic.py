"""A run goes on with another number of ranks, another ZeRO stage, another engine: the same rows, the same losses."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WriteYaml
from test_equalities import config, metrics, panda, same

from pandallm.model import checkpoint
from pandallm.train import run as train

FROZEN = ["model.embed_tokens", "model.layers.0."]


@pytest.fixture(scope="module", params=[[], FROZEN], ids=["all", "part_frozen"])
def frozen(request: pytest.FixtureRequest) -> list[str]:
    return list(request.param)


@pytest.fixture(scope="module")
def whole(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory, frozen: list[str]) -> Path:
    """18 steps on one device by plain torch, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")

    def write(name: str, **keys: Any) -> Path:
        import yaml

        (folder / name).write_text(yaml.safe_dump(keys), encoding="utf-8")
        return folder / name

    train.run(config(write, demo_shards, folder / "run", max_steps=18, freeze=frozen), [])
    return folder / "run"


# `panda` that is sent SIGTERM as the step before STOP ends, and so stops after STOP.
STOPPING = """
import os, signal
from pandallm import cli
from pandallm.train import loop
factor = loop.factor
def at(schedule, step, *rest):
    if step == int(os.environ["STOP"]) - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return factor(schedule, step, *rest)
loop.factor = at
cli.main()
"""


def go(conf: str, stage: int | None, ranks: int, folder: Path, stop: int = 0) -> None:
    """`panda train` by plain torch (stage None) or with ZeRO; `stop`: the step after which SIGTERM ends it."""
    (folder / "stopping.py").write_text(STOPPING)
    engine = [] if stage is None else ["engine=deepspeed", f"deepspeed.zero_optimization.stage={stage}"]
    command = panda("train", conf, *engine, ranks=ranks)
    at = len(command) - 1 - command[::-1].index("-m")
    command[at : at + 2] = [str(folder / "stopping.py")]
    env = os.environ | {"STOP": str(stop)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)
    wanted = 0 if not stop else 1 if ranks > 1 else 143  # torchrun's own code for a rank that failed is 1
    assert done.returncode == wanted, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("way", [(None, 1, 1, 2), (3, 2, None, 1), (1, 2, 3, 2)], ids=str)
def test_goes_on_elsewhere_in_bf16(
    way: tuple[int | None, int, int | None, int], demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml
) -> None:
    """fp32 masters and moments move too. Those of the run's first half are carried over exactly: the next loss shows
    bf16's rounding alone."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    before, ranks_before, after, ranks_after = way
    out, whole = tmp_path / "run", tmp_path / "whole"
    keys = {"max_steps": 18, "micro_batch_size": 1, "precision": "bf16"}
    train.run(config(write_yaml, demo_shards, whole, **keys), [])
    conf = config(write_yaml, demo_shards, out, **keys)
    go(conf, before, ranks_before, tmp_path, stop=9)
    go(conf, after, ranks_after, tmp_path)
    np.testing.assert_allclose([m[1] for m in metrics(out)], [m[1] for m in metrics(whole)], rtol=2e-3)
    np.testing.assert_allclose([m[3] for m in metrics(out)], [m[3] for m in metrics(whole)], rtol=3e-2)


FAST = [(None, 1, 3, 2)]  # stage and ranks before, stage and ranks after: plain torch -> ZeRO-3 on two
SLOW = [(3, 2, None, 1), (1, 2, 3, 2), (1, 2, 2, 1), (2, 1, 1, 2), (0, 2, 1, 4), (3, 4, 0, 2)]


@pytest.mark.parametrize("way", [*FAST, *(pytest.param(w, marks=pytest.mark.slow) for w in SLOW)], ids=str)
def test_goes_on_elsewhere(
    way: tuple[int | None, int, int | None, int],
    frozen: list[str],
    demo_shards: Path,
    whole: Path,
    tmp_path: Path,
    write_yaml: WriteYaml,
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    before, ranks_before, after, ranks_after = way
    out = tmp_path / "run"
    conf = config(write_yaml, demo_shards, out, max_steps=18, freeze=frozen, micro_batch_size=1)
    go(conf, before, ranks_before, tmp_path, stop=9)
    assert checkpoint.steps(out) == [9, 6] and len(metrics(out)) == 9 and not (out / "model").exists()
    go(conf, after, ranks_after, tmp_path)
    same(out, whole)
