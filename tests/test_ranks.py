"""ranks.py: several processes started by a launcher: their places, work shared among them, the death of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_equalities import panda

from pandallm import demo, files, ranks

EVAL = ["--task", "c3-m,logiqa-v2", "--data", str(demo.ROOT / "eval"), "--split", "dev", "--limit", "6"]
EVAL += ["--protocol", "generate,choice,cloze", "--wordings", "original,zh-bare", "--precision", "fp32"]


def test_evaluation_on_two_ranks_is_one(tmp_path: Path) -> None:
    """Batches of few tokens, so that both ranks have some of each part: the same bytes as one process's."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "山高水长" * n}) + "\n" for n in range(1, 9)))
    found = []
    for count in (1, 2):
        out = tmp_path / str(count)
        arguments = [*EVAL, "--text", str(text), "--batch-tokens", "600", "--out", str(out), "--json"]
        done = subprocess.run([*panda("eval", ranks=count), "--model", "tiny", *arguments], stdout=subprocess.PIPE)
        assert done.returncode == 0
        results = json.loads(done.stdout)  # printed once
        assert results["ranks"] == count and sorted(p.name for p in out.iterdir()) == [
            "predictions.jsonl",
            "results.json",
        ]
        found.append((results["bits_per_character"], (out / "predictions.jsonl").read_bytes()))
    assert found[0] == found[1]


SHARING = """
import json, os, sys
from pandallm import ranks
from pandallm.config import UserError

def work(batch):
    if batch == 4:
        raise UserError("four")
    return {batch: (batch * 10, os.environ["RANK"])}

with ranks.group():
    found = ranks.share([1, 2, 3], work), ranks.from_first(lambda: os.environ["RANK"])
    for wrong in (lambda: ranks.share([1, 2, 3, 4], work), lambda: ranks.from_first(lambda: work(4))):
        try:
            wrong()
        except UserError as e:
            found += (str(e),)
with open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w") as file:  # lines of two processes can end up in one
    json.dump(found, file)
"""


def test_share(tmp_path: Path) -> None:
    script = tmp_path / "sharing.py"
    script.write_text(SHARING)
    launcher = panda("", ranks=2)
    launcher = launcher[: launcher.index("pandallm.cli") - 1]
    subprocess.run([*launcher, str(script), str(tmp_path)], check=True)
    expected = [{"1": [10, "0"], "2": [20, "1"], "3": [30, "0"]}, "0", "four", "four"]
    assert [files.read_json(tmp_path / f"{rank}.json") for rank in range(2)] == [expected, expected]
    with ranks.group():  # no launcher
        assert ranks.world() == 1 and ranks.share([1, 2], lambda n: {n: n}) == {1: 1, 2: 2}


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    """All ranks read the same wrong line; where one alone is wrong, that one tells."""
    conf = tmp_path / "bad.yaml"
    conf.write_text("max_stepz: 3\n")
    done = subprocess.run(panda("train", str(conf), ranks=2), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("max_stepz") == 1 and "panda: rank" not in done.stderr
    (tmp_path / "alone.py").write_text(ALONE)
    launcher = panda("", ranks=2)
    launcher = launcher[: launcher.index("pandallm.cli") - 1]
    done = subprocess.run([*launcher, str(tmp_path / "alone.py"), "chat", "tiny"], capture_output=True, text=True)
    assert done.returncode == 1 and "panda: rank 1: no such disk" in done.stderr and "rank 0:" not in done.stderr


# `panda` whose rank 1 lacks something that rank 0 has, which goes on.
ALONE = """
import os, time
from pandallm import cli
from pandallm.config import UserError
def app():
    if os.environ["RANK"] == "1":
        raise UserError("no such disk")
    time.sleep(60)
cli.app = app
cli.main()
"""


DYING = """
import os, sys, time
import torch
from pandallm import ranks
ranks.BEAT, ranks.SILENCE = 0.2, 1.5
torch.distributed.init_process_group("gloo")
ranks.Heartbeat()
torch.distributed.barrier()
rank = int(os.environ["RANK"])
if rank == {dead}:
    os.kill(os.getpid(), 19)  # stopped: its connections stay open, as those of a machine that hangs
time.sleep(60)
"""


@pytest.mark.parametrize("dead", [0, 2])
def test_a_dead_rank_ends_the_others(dead: int, tmp_path: Path) -> None:
    """Started one by one, as srun does it: nobody else would end them."""
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(dead=dead))
    port = panda("", ranks=2)[panda("", ranks=2).index("--master-port") + 1]
    began = time.monotonic()
    started = [
        subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in range(3)
    ]
    codes = [rank.wait(timeout=50) for i, rank in enumerate(started) if i != dead]
    said = "".join(rank.stdout.read() for i, rank in enumerate(started) if i != dead and rank.stdout)
    started[dead].kill()
    started[dead].wait()
    assert codes == [1, 1] and time.monotonic() - began < 50
    assert f"rank {dead} has been silent" in said or "does not answer" in said


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("a,b", "a"),
        ("n1", "n1"),
        ("r[1-2]-x,y", "r1-x"),
        ("r[1-2]n[3-4],z", "r1n3"),
        ("", "127.0.0.1"),
    ],
)
def test_first_host_of_slurm(nodes: str, first: str) -> None:
    assert ranks.first_host(nodes) == first


def test_srun_environment(monkeypatch: Any) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is unset again after the test
        monkeypatch.delenv(name)
    slurm = {"PROCID": "3", "STEP_NUM_TASKS": "4", "LOCALID": "1", "STEP_NODELIST": "n[7-8]", "JOB_ID": "12"}
    for key, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    ranks.environment()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["3", "4", "1", "n7", "20012"]
