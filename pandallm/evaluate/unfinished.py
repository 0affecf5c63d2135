"""What an evaluation has answered before its end, so that the same command goes on after a kill."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pandallm import files, log, ranks
from pandallm.config import UserError
from pandallm.evaluate.report import Row

FOLDER, ARGUMENTS = "unfinished", "arguments.json"
SURROUNDINGS = ("code", "versions")  # what results depend on and nobody chooses


def check(out: Path, arguments: dict[str, Any]) -> None:
    """Raises UserError where OUT holds another evaluation's answers, or what is no evaluation's."""
    wanted, before = _as_read(arguments), _before(out)
    there = [path.name for path in (out / FOLDER).glob("*") if not path.name.endswith(files.TEMPORARY)]
    if before is None and (there or (out / "predictions.jsonl").exists()):
        name = f"{FOLDER}/{there[0]}" if there else "predictions.jsonl and no results.json"
        raise UserError(f"{out}: holds {name}; remove what you don't need, or choose another --out")
    if before is not None and len(there) > 1:
        for key, value in _choices(wanted).items():
            if _choices(before).get(key) != value:
                raise UserError(
                    f"{out}: holds an unfinished evaluation with another {key}; end that with its own command, choose"
                    f" another --out, or delete {out / FOLDER}"
                )


def _choices(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are somebody's choice: of code, libraries and tasks, the versions are not."""
    return {k: v for k, v in arguments.items() if k not in SURROUNDINGS} | {"tasks": list(arguments.get("tasks", ()))}


def _before(out: Path) -> dict[str, Any] | None:
    about = out / FOLDER / ARGUMENTS
    return files.read_json(about) if about.exists() else None


def _as_read(arguments: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(json.dumps(arguments))
    return read


class Unfinished:
    """OUT/unfinished: the arguments, and a file of rows for each part (task, protocol, wording) that is done.

    `before`: seconds that the parts took which are there already.
    """

    def __init__(self, out: Path, arguments: dict[str, Any]) -> None:
        self.folder = out / FOLDER
        self.before = 0.0
        if log.rank() == 0:
            self._open(out, _as_read(arguments | {"code": log.code(), "versions": log.versions()}))

    def _open(self, out: Path, wanted: dict[str, Any]) -> None:
        before = _before(out)
        if before == wanted:
            log.say(f"{out}: goes on where it was stopped")
            return
        if before is not None and any(self.folder.glob("*.json")):
            log.warn(f"{out}: was begun with another version of the toolkit or a library: begins again")
        clear(out)
        self.folder.mkdir(parents=True)
        files.write_json(self.folder / ARGUMENTS, wanted)

    def rows(self, part: tuple[str, ...], answer: Callable[[], list[Row]]) -> tuple[list[Row], float]:
        """A part's rows and the seconds they took: those on disk, or `answer`'s, which then are on disk."""
        path = self.folder / f"{files.hash_json(list(part))[:16]}.json"
        made = not ranks.from_first(path.exists)
        if made:
            began = time.monotonic()
            found = answer()
            if log.rank() == 0:
                files.write_json(path, {"part": part, "seconds": time.monotonic() - began, "rows": found})
        kept = ranks.from_first(partial(files.read_json, path))
        self.before += 0.0 if made else kept["seconds"]
        return kept["rows"], kept["seconds"]


def clear(out: Path) -> None:
    shutil.rmtree(out / FOLDER, ignore_errors=True)
