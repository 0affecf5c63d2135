"""A build of an operator that is killed midway holds nobody up afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils import cpp_extension

# A compiler that tells when it starts; the first waits to be killed in the middle.
COMPILER = """#!/bin/sh
case "$*" in *" -c "*)
  echo built >> "$BUILDS"
  if [ "$(wc -l < "$BUILDS")" = 1 ] && [ -n "$STALL" ]; then exec sleep 600; fi
esac
exec c++ "$@"
"""

LOAD = """
import sys
from torch.utils import cpp_extension
from pandallm.train import builds
builds.end_with_their_process()
cpp_extension.load(name="op", sources=[sys.argv[1]], build_directory=sys.argv[2], is_python_module=False)
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that builds and loads a small operator under tmp_path / "build"."""
    if not shutil.which("c++") or not cpp_extension.is_ninja_available():
        pytest.skip("needs a C++ compiler and ninja")
    (tmp_path / "build").mkdir()
    (tmp_path / "op.cpp").write_text("int op() { return 1; }\n")
    (tmp_path / "compiler").write_text(COMPILER)
    (tmp_path / "compiler").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "compiler"))
    monkeypatch.setenv("BUILDS", str(tmp_path / "builds"))
    monkeypatch.delenv("STALL", raising=False)
    return [sys.executable, "-c", LOAD, str(tmp_path / "op.cpp"), str(tmp_path / "build")]


def built(folder: Path) -> int:
    """How many compilations have begun."""
    return (folder / "builds").read_text().count("built") if (folder / "builds").exists() else 0


def test_a_lock_left_behind_is_taken(load: list[str], tmp_path: Path) -> None:
    (tmp_path / "build" / "lock").touch()  # as torch's own leaves it when its process is killed
    subprocess.run(load, check=True, timeout=120)
    assert built(tmp_path) == 1
    assert not (tmp_path / "build" / "lock").exists()  # torch's own would wait for it for ever


def test_processes_take_turns_and_one_builds(load: list[str], tmp_path: Path) -> None:
    processes = [subprocess.Popen(load) for _ in range(3)]
    assert [p.wait(timeout=120) for p in processes] == [0, 0, 0]
    assert built(tmp_path) == 1


def test_a_killed_build_is_finished_by_the_next(load: list[str], tmp_path: Path) -> None:
    first = subprocess.Popen(load, env=os.environ | {"STALL": "1"}, start_new_session=True)
    deadline = time.monotonic() + 120
    while built(tmp_path) == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    waiting = subprocess.Popen(load)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert waiting.wait(timeout=120) == 0
    assert built(tmp_path) == 2
    assert (tmp_path / "build" / "op.so").exists()
