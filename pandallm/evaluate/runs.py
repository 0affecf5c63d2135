"""Finished evaluations, read back: their figures, their predictions, and what two of them say together."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from pandallm import log
from pandallm.config import UserError, parse_json, read_text
from pandallm.evaluate import report
from pandallm.evaluate.report import Row

NEEDED = ("task", "id", "wording", "protocol", "pred", "gold", "correct")  # of a line of predictions.jsonl
FIGURES = ("protocol", "n", "accuracy", "ci95", "wordings", "accuracy_std")  # of an entry of results.json


def results(out: Path) -> dict[str, Any]:
    """OUT/results.json. UserError where there is none, or it is something else."""
    path = out / "results.json"
    found = parse_json(read_text(path), path)
    if not isinstance(found, dict) or not isinstance(found.get("tasks"), dict):
        raise UserError(f"{path}: is not the record of an evaluation")
    for task, entry in found["tasks"].items():
        others = entry.get("protocols", {}) if isinstance(entry, dict) else {}
        for part in (entry, *(others.values() if isinstance(others, dict) else [None])):
            if not isinstance(part, dict) or any(key not in part for key in FIGURES):
                raise UserError(f"{path}: the figures of {task} aren't whole; evaluate again, into another --out")
    return found


def predictions(out: Path) -> dict[tuple[str, str], list[Row]]:
    """The lines of OUT/predictions.jsonl by (task, protocol). UserError for a line that is none."""
    path = out / "predictions.jsonl"
    rows: dict[tuple[str, str], list[Row]] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line:
            continue
        row = parse_json(line, path, number)
        lacking = [key for key in NEEDED if not isinstance(row, dict) or key not in row]
        if lacking:
            raise UserError(f"{path}:{number}: is no prediction: '{lacking[0]}' is missing")
        odd = [key for key in NEEDED if not _sound(key, row[key])]
        if odd:
            raise UserError(f"{path}:{number}: is no prediction: '{odd[0]}' is {row[odd[0]]!r}")
        rows.setdefault((row["task"], row["protocol"]), []).append(row)
    return rows


def _sound(key: str, value: Any) -> bool:
    if key == "correct":
        return isinstance(value, bool)
    if key in ("pred", "gold"):
        return (value is None and key == "pred") or (isinstance(value, str) and value in tuple(string.ascii_uppercase))
    return isinstance(value, str)


def compare(run_a: Path, run_b: Path) -> dict[str, Any]:
    """How much better the run in `run_b` did than the one in `run_a`, question by question.

    Returns {"a", "b", "tasks": {task: figures of report.compare and "protocol", further ones below "protocols"}}.
    Raises UserError: not a finished run, no task and protocol in common, other questions. What only one of the runs has
    is left out with a warning.
    """
    both = [results(path) for path in (run_a, run_b)]
    have_a, have_b = (report.entries(r) for r in both)
    common = [key for key in have_a if key in have_b]
    if not common:
        a, b = (", ".join(map(" by ".join, have)) or "no task" for have in (have_a, have_b))
        raise UserError(f"nothing to compare: {run_a} has {a}; {run_b} has {b}")
    for task, protocol in sorted(set(have_a) ^ set(have_b)):
        log.warn(f"{task} by {protocol} is in one of the runs only: left out")
    rows_a, rows_b = predictions(run_a), predictions(run_b)
    found: dict[str, dict[str, Any]] = {}
    for key in common:
        for run, rows in ((run_a, rows_a), (run_b, rows_b)):
            if key not in rows:
                raise UserError(f"{run / 'predictions.jsonl'}: has no line of {' by '.join(key)}; evaluate again")
        _same_questions(key[0], rows_a[key], rows_b[key], run_a, run_b)
        if have_a[key].get("data") != have_b[key].get("data"):
            raise UserError(
                f"{key[0]}: {run_a} and {run_b} were asked from different files (their hashes differ): evaluate both"
                " on the same"
            )
        entry = {"protocol": key[1], **report.compare(rows_a[key], rows_b[key])}
        if other := {name: told for name, told in _how(both, have_a[key], have_b[key]).items() if told[0] != told[1]}:
            entry["asked_otherwise"] = other
        if key[0] in found:
            found[key[0]].setdefault("protocols", {})[key[1]] = entry
        else:
            found[key[0]] = entry
    return {"a": both[0]["model"], "b": both[1]["model"], "tasks": found}


def _how(both: list[Any], a: Row, b: Row) -> dict[str, list[Any]]:
    """What may differ between two runs besides the model, with both values."""
    names = ["chat_format", "shots", *(["examples"] if a.get("shots") == b.get("shots") else [])]
    told = {name: [entry.get(name) for entry in (a, b)] for name in names}
    return told | {"precision": [results.get("precision") for results in both]}


def _same_questions(task: str, a: list[Row], b: list[Row], run_a: Path, run_b: Path) -> None:
    """Raises UserError unless both runs answered the same questions in the same wordings and orders."""
    asked_a, asked_b = (
        {(row["id"], row["wording"], row["gold"], tuple(row.get("order") or ())) for row in rows} for rows in (a, b)
    )
    odd = sorted(asked_a ^ asked_b)
    if odd:
        where = run_a if odd[0] in asked_a else run_b
        raise UserError(
            f"{task}: {run_a} and {run_b} have other questions ({odd[0][0]} in wording {odd[0][1]} with the answer"
            f" {odd[0][2]} is only in {where}): evaluate both on the same file, split, wordings and limit"
        )
