"""Figures from predictions: what a task's entry in results.json holds, tables of it, and a comparison of two runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from pandallm.evaluate import statistics

Row = dict[str, Any]  # a line of predictions.jsonl
Entry = dict[str, Any]  # the figures of a task under a protocol
ALPHA = 0.05


def options_of(row: Row) -> int | None:
    """How many options a row's question has; None where the row doesn't tell."""
    for key in ("order", "log_likelihoods"):
        if row.get(key):
            return len(row[key])
    return row.get("options")


def by_question(rows: Iterable[Row], right: Callable[[Row], bool]) -> dict[str, float]:
    """id -> share of a question's rows that are right, over its wordings and orders."""
    found: dict[str, list[bool]] = {}
    for row in rows:
        found.setdefault(row["id"], []).append(right(row))
    return {key: sum(some) / len(some) for key, some in found.items()}


def _correct(row: Row) -> bool:
    return bool(row["correct"])


def _by(key: str) -> Callable[[Row], bool]:
    """Whether the answer under another key is right."""
    return lambda row: row[key] == row["gold"]


def _by_wording(rows: Iterable[Row], right: Callable[[Row], bool]) -> dict[str, float]:
    """Accuracy by wording. Every question counts once, however many orders of its options were asked."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["wording"], []).append(row)
    shares = {wording: by_question(some, right) for wording, some in groups.items()}
    return {wording: math.fsum(some.values()) / len(some) for wording, some in shares.items()}


def _accuracy(rows: Sequence[Row], suffix: str = "", right: Callable[[Row], bool] = _correct) -> Entry:
    """Mean accuracy over wordings, and the interval of the questions drawn."""
    wordings = _by_wording(rows, right)
    mean = math.fsum(wordings.values()) / len(wordings)
    n = len({row["id"] for row in rows})
    return {f"accuracy{suffix}": mean, f"ci95{suffix}": list(statistics.wilson(mean * n, n))}


def summary(rows: Sequence[Row], protocol: str) -> Entry:
    """The figures of one task under one protocol, from its predictions: a row a question, wording and order of options.

    The accuracy is the mean over wordings, `accuracy_std` their sample standard deviation. The interval is that of the
    questions drawn; it says nothing of other wordings. Further figures are there where the rows hold what they need:
    `accuracy_strict` and `accuracy_norm` (of pred_strict, pred_norm), `accuracy_as_given` (of the options in their own
    order, where others were asked too), `flagged` and `accuracy_unflagged`, `chance`, `position_bias`, `subjects`.
    """
    wordings = _by_wording(rows, _correct)
    values = np.array(list(wordings.values()))
    entry: Entry = _accuracy(rows) | {
        "n": len({row["id"] for row in rows}),
        "protocol": protocol,
        "wordings": [{"wording": name, "accuracy": value} for name, value in wordings.items()],
        "accuracy_std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        "accuracy_best": float(values.max()),
        "accuracy_worst": float(values.min()),
        "no_letter": sum(row["pred"] is None for row in rows),
        "truncated": sum(bool(row.get("truncated")) for row in rows),
    }
    for kind in ("strict", "norm"):
        key = f"pred_{kind}"
        if all(key in row for row in rows):
            entry |= _accuracy(rows, f"_{kind}", _by(key))
            if kind == "strict":
                entry["no_letter_strict"] = sum(row[key] is None for row in rows)
    return entry | _of_orders(rows, protocol) | _of_flags(rows) | _of_subjects(rows)


def _of_orders(rows: Sequence[Row], protocol: str) -> Entry:
    entry: Entry = {}
    if any(row.get("order") for row in rows):
        given = [row for row in rows if not row.get("order") or row["order"] == sorted(row["order"])]
        entry |= _accuracy(given, "_as_given") if given else {}
    counts = [(row, count) for row in rows if (count := options_of(row))]
    if len(counts) == len(rows):  # rows of an older version don't tell
        odds = {row["id"]: 1 / count for row, count in counts}
        entry["chance"] = math.fsum(odds.values()) / len(odds)
    if len(counts) == len(rows) and protocol != "cloze":  # which shows no options
        shown = [(count, _place(row["gold"]), _place(row["pred"])) for row, count in counts]
        entry["position_bias"] = statistics.position_bias(shown)
    return entry


def _place(letter: Any) -> Any:
    return letter and ord(letter) - ord("A")


def _of_flags(rows: Sequence[Row]) -> Entry:
    """How many questions were seen in training, and the accuracy on the others; None where no other is left."""
    if not any("flagged" in row for row in rows):
        return {}
    clean = [row for row in rows if not row.get("flagged")]
    flagged = len({row["id"] for row in rows} - {row["id"] for row in clean})
    nothing: Entry = {"accuracy_unflagged": None, "ci95_unflagged": None}
    return {"flagged": flagged} | (_accuracy(clean, "_unflagged") if clean else nothing)


def _of_subjects(rows: Sequence[Row]) -> Entry:
    """Accuracy by subject, and the mean over subjects, which suites such as CMMLU report."""
    subjects: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("subject"):
            subjects.setdefault(row["subject"], []).append(row)
    if not subjects:
        return {}
    means = {name: _accuracy(some)["accuracy"] for name, some in subjects.items()}
    return {"subjects": means, "subjects_mean": math.fsum(means.values()) / len(means)}


def entries(results: dict[str, Any]) -> dict[tuple[str, str], Entry]:
    """The figures in a results.json by (task, protocol); further protocols lie inside their task's entry."""
    found = {}
    for task, entry in results["tasks"].items():
        for part in (entry, *entry.get("protocols", {}).values()):
            found[task, part["protocol"]] = part
    return found


Cells = list[list[str]]  # the first row is the head


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _wordings(entry: Entry) -> str:
    if len(entry["wordings"]) < 2:
        return ""
    worst, best = percent(entry["accuracy_worst"]), percent(entry["accuracy_best"])
    return f"{len(entry['wordings'])}: sd {percent(entry['accuracy_std'])}, {worst} … {best}"


# Head, and what of an entry stands below; a column that is empty throughout is left out.
COLUMNS: dict[str, Callable[[Entry], str]] = {
    "n": lambda e: str(e["n"]),
    "accuracy %": lambda e: percent(e["accuracy"]),
    "95 % interval": lambda e: interval(e["ci95"], ".2f"),
    "wordings: sd, worst … best": _wordings,
    "options as given": lambda e: percent(e["accuracy_as_given"]) if "accuracy_as_given" in e else "",
    "strict parse": lambda e: percent(e["accuracy_strict"]) if "accuracy_strict" in e else "",
    "by length": lambda e: percent(e["accuracy_norm"]) if "accuracy_norm" in e else "",
    "mean of subjects": lambda e: percent(e["subjects_mean"]) if "subjects_mean" in e else "",
    "chance": lambda e: percent(e["chance"]) if "chance" in e else "",
    "position bias": lambda e: percent(e["position_bias"]["total_variation"]) if "position_bias" in e else "",
    "no letter": lambda e: str(e["no_letter"]),
    "truncated": lambda e: str(e["truncated"]),
    "flagged": lambda e: str(e["flagged"]) if "flagged" in e else "",
    "without flagged": lambda e: percent(e["accuracy_unflagged"]) if "accuracy_unflagged" in e else "",
}


def cells(results: dict[str, Any]) -> Cells:
    """The figures of every task and protocol of a results.json."""
    found = entries(results)
    lines = {key: [show(entry) for show in COLUMNS.values()] for key, entry in found.items()}
    used = [i for i in range(len(COLUMNS)) if any(line[i] for line in lines.values())]
    heads = list(COLUMNS)
    return [
        ["task", "protocol", *(heads[i] for i in used)],
        *([*key, *(line[i] for i in used)] for key, line in lines.items()),
    ]


def table(results: dict[str, Any]) -> str:
    """A results.json as plain text."""
    blocks = [_columns(cells(results))] if results["tasks"] else []
    texts = [("text", "bits per character", "characters", "tokens")]
    for name, e in results["bits_per_character"].items():
        texts.append((name, f"{e['bits_per_character']:.4f}", str(e["characters"]), str(e["tokens"])))
    blocks += [_columns(texts)] if len(texts) > 1 else []
    return "\n\n".join(blocks)


def compare(a: Iterable[Row], b: Iterable[Row]) -> Entry:
    """Model b against model a on the same questions, one task and protocol.

    Several wordings and orders of a question count as one: its difference is the mean over them. `questions_needed`:
    see statistics; `verdict`: the figures as a sentence.
    """
    means_a, means_b = by_question(a, _correct), by_question(b, _correct)
    differences = [means_b[key] - mean for key, mean in means_a.items()]
    only_a, only_b = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    n = len(differences)
    entry = {
        "n": n,
        "accuracy_a": math.fsum(means_a.values()) / n,
        "accuracy_b": math.fsum(means_b.values()) / n,
        "difference": math.fsum(differences) / n,
        "ci95": list(statistics.bootstrap(differences)),
        "only_a": only_a,
        "only_b": only_b,
        "mcnemar_p": statistics.mcnemar(only_a, only_b),
        "questions_needed": statistics.questions_needed(differences),
    }
    return entry | {"verdict": verdict(entry)}


def verdict(entry: Entry) -> str:
    """One model is called better where the interval of the difference and McNemar's test both say so."""
    low, high = entry["ci95"]
    b, a = low > 0 and entry["only_b"] > entry["only_a"], high < 0 and entry["only_a"] > entry["only_b"]
    if (a or b) and entry["mcnemar_p"] < ALPHA:
        better, worse, bounds = ("B", "A", (low, high)) if b else ("A", "B", (-high, -low))
        points = f"{100 * abs(entry['difference']):.1f} points"
        return f"{better} is better than {worse} by {points} (95 % interval {interval(bounds, '.1f')})"
    needed = entry["questions_needed"]
    if needed is None:
        return "no difference shown: both are right equally often"
    if entry["mcnemar_p"] < ALPHA and (entry["only_b"] - entry["only_a"]) * entry["difference"] < 0:
        mean, more = ("B", "A") if entry["difference"] > 0 else ("A", "B")
        return (
            f"no verdict: over wordings and orders {mean} is right more often, but {more} does better on more questions"
        )
    if needed <= entry["n"]:
        tests = f"95 % interval {interval(entry['ci95'], '+.1f')}, McNemar p {entry['mcnemar_p']:.3f}"
        return f"no difference shown, but nearly ({tests}): ask more questions"
    size, more = f"{100 * entry['difference']:+.1f} points", f"{needed - entry['n']:,} more"
    return f"no difference shown: about {needed:,} questions ({more}) would show a difference of this size ({size})"


def comparison_cells(comparison: dict[str, Any]) -> Cells:
    lines = [["task", "protocol", "n", "A %", "B %", "B - A", "95 % interval", "only A", "only B", "McNemar p"]]
    for (task, protocol), e in entries(comparison).items():
        shares = (percent(e["accuracy_a"]), percent(e["accuracy_b"]), f"{100 * e['difference']:+.2f}")
        tests = (str(e["only_a"]), str(e["only_b"]), f"{e['mcnemar_p']:.4f}")
        lines.append([task, protocol, str(e["n"]), *shares, interval(e["ci95"], "+.2f"), *tests])
    return lines


def verdicts(comparison: dict[str, Any]) -> list[str]:
    """A line each; what else than the model differs between the runs stands behind it."""
    lines = []
    for (task, protocol), entry in entries(comparison).items():
        other = [f"{name.replace('_', ' ')} {a} and {b}" for name, (a, b) in entry.get("asked_otherwise", {}).items()]
        lines.append(
            f"{task}, {protocol}: {entry['verdict']}" + (f"; asked otherwise: {', '.join(other)}" * bool(other))
        )
    return lines


def comparison_table(comparison: dict[str, Any]) -> str:
    """What `runs.compare` returns as plain text."""
    names = f"A: {comparison['a']}\nB: {comparison['b']}"
    return "\n\n".join([names, _columns(comparison_cells(comparison)), "\n".join(verdicts(comparison))])


def interval(bounds: Sequence[float], form: str) -> str:
    return f"{100 * bounds[0]:{form}} … {100 * bounds[1]:{form}}"


def _columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)
