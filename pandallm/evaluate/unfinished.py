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
SURROUNDINGS = ("code", "versions")  # arguments that are nobody's choice, and last, so that a choice is told before


class Unfinished:
    """OUT/unfinished: the arguments, and a file of rows for each part (task, protocol, wording) that is done."""

    def __init__(self, out: Path, arguments: dict[str, Any]) -> None:
        self.folder = out / FOLDER
        ranks.from_first(partial(self._open, out, json.loads(json.dumps(arguments))))  # as it comes back

    def _open(self, out: Path, wanted: dict[str, Any]) -> None:
        """Raises UserError where OUT holds another evaluation's answers, or what is no evaluation's."""
        about = self.folder / ARGUMENTS
        before = files.read_json(about) if about.exists() else None
        if before == wanted:
            log.say(f"{out}: goes on where it was stopped")
            return
        there = [path.name for path in self.folder.glob("*") if not path.name.endswith(files.TEMPORARY)]
        if before is None and (there or (out / "predictions.jsonl").exists()):
            name = f"{FOLDER}/{there[0]}" if there else "predictions.jsonl"
            raise UserError(f"{out}: holds a {name} that is no evaluation's of ours; choose another --out")
        if before is not None and len(there) > 1:
            key = next((key for key in wanted if before.get(key) != wanted[key]), SURROUNDINGS[0])
            if key not in SURROUNDINGS:
                raise UserError(
                    f"{out}: holds an unfinished evaluation with another {key}; end that with its own command, choose"
                    f" another --out, or delete {self.folder}"
                )
            log.warn(f"{out}: was begun with other {key}: begins again")
        clear(out)
        self.folder.mkdir(parents=True)
        files.write_json(about, wanted)

    def rows(self, part: tuple[str, ...], answer: Callable[[], list[Row]]) -> tuple[list[Row], float]:
        """A part's rows and the seconds they took: those on disk, or `answer`'s, which then are on disk."""
        path = self.folder / f"{files.hash_json(list(part))[:16]}.json"
        if not ranks.from_first(path.exists):
            began = time.monotonic()
            found = answer()
            if log.rank() == 0:
                files.write_json(path, {"part": part, "seconds": time.monotonic() - began, "rows": found})
        kept = ranks.from_first(partial(files.read_json, path))
        return kept["rows"], kept["seconds"]


def clear(out: Path) -> None:
    shutil.rmtree(out / FOLDER, ignore_errors=True)
