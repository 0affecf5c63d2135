"""Trackers: what their libraries are called with, and that their failures cost no more than themselves.

Modules that write down their calls stand in for the libraries.
"""

from __future__ import annotations

import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from pandallm.config import UserError
from pandallm.train import trackers

SETTINGS = {"learning_rate": 1e-5, "deepspeed": {"zero_optimization": {"stage": 1}}}


class Run:
    """A library's run. Raises from step `broken` on."""

    def __init__(self, broken: float = math.inf) -> None:
        self.broken, self.logged, self.finished = broken, [], []  # type: ignore[var-annotated]

    def log(self, values: dict[str, float], step: int) -> None:
        print("a library talks")
        if step >= self.broken:
            raise ConnectionError("no network\nat all")
        self.logged.append((step, values))

    def finish(self, **how: Any) -> None:
        self.finished.append(how)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """library(name, run or exception) -> the list of what its init is called with."""
    monkeypatch.setenv("TRACKIO_DIR", "")  # so that it is put back
    monkeypatch.delenv("TRACKIO_DIR")
    monkeypatch.delenv("RANK", raising=False)

    def make(name: str, result: Run | Exception) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def init(**arguments: Any) -> Run:
            calls.append(arguments)
            if isinstance(result, Exception):
                raise result
            return result

        module = types.ModuleType(name)
        module.init = init  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    return make


def start(names: list[str], folder: Path) -> list[trackers.Tracker]:
    return trackers.start(names, "panda", "pretrain", SETTINGS, folder)


def test_nothing_asked_for_does_nothing(tmp_path: Path) -> None:
    assert start([], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_each_library_is_called_with_its_own_words(tmp_path: Path, library: Any) -> None:
    calls = {name: library(name, Run()) for name in trackers.FAILED}
    assert [t.name for t in start(["wandb", "swanlab", "trackio"], tmp_path)] == ["wandb", "swanlab", "trackio"]
    number = (tmp_path / "id").read_text()
    assert number.isalnum() and len(number) == 21  # the length that SwanLab asks for
    common = {"project": "panda", "name": "pretrain", "config": SETTINGS}
    assert calls["wandb"] == [common | {"id": number, "resume": "allow", "dir": str(tmp_path)}]
    assert calls["swanlab"] == [common | {"id": number, "resume": "allow", "log_dir": str(tmp_path / "swanlab")}]
    assert calls["trackio"] == [common | {"resume": "never", "embed": False}]
    assert os.environ["TRACKIO_DIR"] == str(tmp_path / "trackio")


def test_a_second_start_goes_on_with_the_same_run_and_a_removed_one_does_not(tmp_path: Path, library: Any) -> None:
    wandb, trackio = library("wandb", Run()), library("trackio", Run())
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        start(["wandb", "trackio"], folder)
    first, again, other = (call["id"] for call in wandb)
    assert first == again != other
    assert [call["resume"] for call in trackio] == ["never", "allow", "never"]


def test_the_users_own_trackio_folder_is_kept(tmp_path: Path, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library("trackio", Run())
    monkeypatch.setenv("TRACKIO_DIR", "/elsewhere")
    start(["trackio"], tmp_path)
    assert os.environ["TRACKIO_DIR"] == "/elsewhere"


def test_finite_values_are_logged(tmp_path: Path, library: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run()
    library("wandb", run)
    (tracker,) = start(["wandb"], tmp_path)
    tracker.log({"loss": 2.5, "mfu": None, "grad_norm": math.nan}, 1)
    tracker.log({"mfu": None}, 2)
    tracker.log({"loss": 2.25, "lr": 1e-5}, 3)
    assert run.logged == [(1, {"loss": 2.5}), (3, {"loss": 2.25, "lr": 1e-5})]
    assert capsys.readouterr().out == ""  # standard output is for results


@pytest.mark.parametrize("name", trackers.FAILED)
def test_the_end_is_told_once(name: str, tmp_path: Path, library: Any) -> None:
    good, bad = Run(), Run()
    for run, failed in ((good, False), (bad, True)):
        library(name, run)
        (tracker,) = start([name], tmp_path)
        tracker.finish(failed)
        tracker.finish()
        tracker.log({"loss": 1.0}, 1)
    assert good.finished == [{}]
    assert bad.finished == [trackers.FAILED[name]]
    assert good.logged == bad.logged == []


def test_one_that_fails_is_dropped_with_one_warning(
    tmp_path: Path, library: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, sound = Run(broken=2), Run()
    library("wandb", broken)
    library("swanlab", sound)
    both = start(["wandb", "swanlab"], tmp_path)
    for step in (1, 2, 3):
        for tracker in both:
            tracker.log({"loss": 1.0}, step)
    for tracker in both:
        tracker.finish()
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: wandb failed and is left out from here on: no network at all"]
    assert [step for step, _ in broken.logged] == [1]
    assert [step for step, _ in sound.logged] == [1, 2, 3]
    assert (broken.finished, sound.finished) == ([], [{}])


def test_one_that_can_not_start_is_left_out(tmp_path: Path, library: Any, capsys: pytest.CaptureFixture[str]) -> None:
    library("wandb", RuntimeError("not logged in"))
    library("trackio", Run())
    assert [t.name for t in start(["wandb", "trackio"], tmp_path)] == ["trackio"]
    assert capsys.readouterr().err == "warning: wandb failed and is left out from here on: not logged in\n"


@pytest.mark.parametrize("name", trackers.FAILED)
def test_a_missing_library_is_one_line(
    name: str, tmp_path: Path, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as caught:
        start([name], tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(f"pip install 'pandallm[{name}]'")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mlflow isn't known; there are wandb, swanlab, trackio"):
        start(["mlflow"], tmp_path)
