"""Experiment trackers that a config asks for: Weights & Biases, SwanLab, Trackio.

What they show, the run's own files hold as well: a tracker that fails is dropped with a warning, and training goes on.
Each library is the user's to set up (its login, its environment variables) and is imported only if it is asked for.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pandallm import files, log
from pandallm.config import UserError

# The known ones, and what tells each that a run broke off.
FAILED: dict[str, dict[str, Any]] = {
    "wandb": {"exit_code": 1},
    "swanlab": {"state": "crashed", "error": "training broke off"},
    "trackio": {},
}


@dataclass
class Tracker:
    """A tracker's run; nothing happens any more once it has failed."""

    name: str
    run: Any  # the library's own; None after a failure

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """Values that aren't finite numbers are left out."""
        finite = {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
        if finite:
            self._try(lambda run: run.log(finite, step=step))

    def finish(self, failed: bool = False) -> None:
        """Ends the run, as one that broke off if `failed`; may wait for what isn't sent yet."""
        self._try(lambda run: run.finish(**(FAILED[self.name] if failed else {})))
        self.run = None

    def _try(self, call: Callable[[Any], object]) -> None:
        if self.run is None:
            return
        try:
            with redirect_stdout(sys.stderr):  # standard output is for results
                call(self.run)
        except Exception as e:
            self.run = None
            _warn(self.name, e)


def start(names: list[str], project: str, name: str, settings: dict[str, Any], folder: Path) -> list[Tracker]:
    """Starts the named trackers, or goes on with their runs where `folder` holds them; rank 0 calls it.

    UserError: a name that isn't known, or a library that isn't installed.
    """
    libraries = {tracker: _import(tracker, folder) for tracker in dict.fromkeys(names)}
    if not libraries:
        return []
    # Kept in the folder, not made of the name: a run removed and started anew must not go on with the old one's.
    known = (folder / "id").exists()
    if not known:
        files.write_text(folder / "id", uuid.uuid4().hex[:21])
    run_id = (folder / "id").read_text(encoding="utf-8")
    started = []
    for tracker, library in libraries.items():
        try:
            with redirect_stdout(sys.stderr):
                run = library.init(
                    project=project, name=name, config=settings, **_arguments(tracker, folder, run_id, known)
                )
        except Exception as e:
            _warn(tracker, e)
        else:
            started.append(Tracker(tracker, run))
    return started


def _import(tracker: str, folder: Path) -> Any:
    if tracker not in FAILED:
        raise UserError(f"trackers: {tracker} isn't known; there are {', '.join(FAILED)}")
    if tracker == "trackio":  # reads it when it is imported
        os.environ.setdefault("TRACKIO_DIR", str((folder / tracker).resolve()))
    try:
        return importlib.import_module(tracker)
    except ImportError as e:
        raise UserError(f"trackers: {tracker} can't be imported ({e}); pip install 'pandallm[{tracker}]'") from None


def _arguments(tracker: str, folder: Path, run_id: str, known: bool) -> dict[str, Any]:
    """What tells each library where its files go and which run to go on with."""
    if tracker == "wandb":
        return {"dir": str(folder), "id": run_id, "resume": "allow"}  # makes a folder wandb in it
    if tracker == "swanlab":
        return {"log_dir": str(folder / tracker), "id": run_id, "resume": "allow"}
    return {"resume": "allow" if known else "never", "embed": False}  # trackio finds a run by its name


def _warn(tracker: str, error: Exception) -> None:
    reason = " ".join(str(error).split()) or type(error).__name__
    log.warn(f"{tracker} failed and is left out from here on: {reason}")
