"""The models of a training run, in the order of their steps."""

from __future__ import annotations

from pathlib import Path

from pandallm import files
from pandallm.config import UserError
from pandallm.model import checkpoint


def models_of(run: Path) -> dict[str, Path]:
    """step-XXXXXXXX -> model folder, of every whole checkpoint of a run and of the model it ended with.

    UserError: no training run, or one that has no model yet.
    """
    path = run / "run.json"
    if not path.exists():
        raise UserError(f"{run}: no training run (it has no run.json); name the folder that `panda train` wrote")
    try:
        record = files.read_json(path)
        finished = int(record["steps"]) if record["finished"] else None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged: it doesn't say whether the run has finished") from None
    folders = {step: checkpoint.folder_of(run, step) for step in reversed(checkpoint.steps(run))}
    found = {step: folder / "model" for step, folder in folders.items() if (folder / checkpoint.COMPLETE).exists()}
    if finished and (run / "model").is_dir():
        found.setdefault(finished, run / "model")
    if not found:
        raise UserError(f"{run}: has no checkpoint yet")
    return {f"step-{step:08d}": found[step] for step in sorted(found)}
