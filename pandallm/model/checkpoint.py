"""Checkpoints that appear whole: OUT/checkpoints/step-00000250/{model/, state files, complete.json}."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pandallm import files, log

COMPLETE = "complete.json"  # written last: sizes and hashes of all other files, and the trainer's state


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A plain Transformers folder: safetensors, config, tokenizer with its chat template."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def folder_of(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def steps(out: Path) -> list[int]:
    """Steps that have a checkpoint folder, newest first; whether each is whole is for `newest` to say."""
    names = (out / "checkpoints").glob("step-*") if (out / "checkpoints").is_dir() else ()
    found = [re.fullmatch(r"step-(\d{8})", path.name) for path in names]
    return sorted((int(m[1]) for m in found if m), reverse=True)


def save(
    out: Path, step: int, state: dict[str, Any], write: Callable[[Path], None], chief: bool, barrier: Callable[[], None]
) -> None:
    """Writes a checkpoint. Every rank calls this; `write(folder)` puts that rank's files into a folder all share.

    `chief` (rank 0) prepares the folder before the others write and publishes it when all have.
    """
    final = folder_of(out, step)
    tmp = final.with_name(final.name + files.TEMPORARY)
    if chief:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    barrier()
    write(tmp)
    barrier()
    if chief:
        listing = {
            str(path.relative_to(tmp)): {"bytes": path.stat().st_size, "blake3": files.hash_file(path)}
            for path in sorted(tmp.rglob("*"))
            if path.is_file() and path.stat().st_size
        }
        files.write_json(tmp / COMPLETE, {"step": step, "state": state, "files": listing})
        files.publish_dir(tmp, final)
    barrier()


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        listing = files.read_json(folder / COMPLETE)["files"]
    except (OSError, ValueError, KeyError):
        return f"{COMPLETE} is missing or broken"
    for name, known in listing.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != known["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {known['bytes']}"
        if files.hash_file(path) != known["blake3"]:
            return f"{name} is damaged: its content changed since it was written"
    return None


def newest(out: Path) -> Path | None:
    """The newest checkpoint that is whole, every byte checked; a damaged one is passed over with a warning."""
    for step in steps(out):
        folder = folder_of(out, step)
        fault = _fault(folder)
        if fault is None:
            return folder
        log.warn(f"{folder}: {fault}; going back to the checkpoint before it")
    return None


def prune(out: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what killed runs left."""
    for step in steps(out)[keep:]:
        shutil.rmtree(folder_of(out, step))
    for path in (out / "checkpoints").glob(f"*{files.TEMPORARY}"):
        shutil.rmtree(path, ignore_errors=True)
