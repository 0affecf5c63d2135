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
from pandallm.evaluate.report import Row

FOLDER = "unfinished"


class Unfinished:
    """OUT/unfinished: the arguments, and a file of rows for each part (task, protocol, wording) that is done."""

    def __init__(self, out: Path, arguments: dict[str, Any]) -> None:
        self.folder = out / FOLDER
        if log.rank() == 0:
            self._open(out, json.loads(json.dumps(arguments)))  # as it comes back

    def _open(self, out: Path, wanted: dict[str, Any]) -> None:
        about = self.folder / "arguments.json"
        if about.exists() and files.read_json(about) == wanted:
            log.say(f"{out}: goes on where it was stopped")
        else:  # another evaluation's, which has no results to lose
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
