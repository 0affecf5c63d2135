"""Figures from predictions: accuracy and its interval, tables, and the statistics of a comparison of two runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution
RESAMPLES, SEED = 10_000, 0

Row = dict[str, Any]  # a line of predictions.jsonl


def wilson(correct: float, n: int) -> tuple[float, float]:
    """The Wilson 95 % interval of a share of `correct` among `n` (Wilson 1927); unlike p ± 2 sd, right near 0 and 1."""
    p, z2 = correct / n, Z95 * Z95
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of a difference this large by chance, from the questions that only one model got right."""
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def bootstrap(differences: Sequence[float]) -> tuple[float, float]:
    """Percentile 95 % interval of the mean of paired differences over resampled questions; the same for every call.

    Questions with the same difference are alike, so a resample is a multinomial draw over the distinct values.
    """
    values, counts = np.unique(np.asarray(differences, dtype=float), return_counts=True)
    n = len(differences)
    means = np.random.default_rng(SEED).multinomial(n, counts / n, size=RESAMPLES) @ values / n
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summary(rows: Sequence[Row], protocol: str) -> dict[str, Any]:
    """The figures of one task under one protocol, from its predictions: a row a question and wording.

    The accuracy is the mean over wordings, `accuracy_std` their sample standard deviation. The interval is that of the
    questions drawn; it says nothing of other wordings.
    """
    by_wording: dict[str, list[bool]] = {}
    for row in rows:
        by_wording.setdefault(row["wording"], []).append(row["correct"])
    wordings = [{"wording": name, "accuracy": sum(c) / len(c)} for name, c in by_wording.items()]
    accuracies = np.array([w["accuracy"] for w in wordings])
    n = len(rows) // len(wordings)
    accuracy = float(accuracies.mean())
    return {
        "accuracy": accuracy,
        "ci95": list(wilson(accuracy * n, n)),
        "n": n,
        "protocol": protocol,
        "wordings": wordings,
        "accuracy_std": float(accuracies.std(ddof=1)) if len(wordings) > 1 else 0.0,
        "no_letter": sum(row["pred"] is None for row in rows),
        "truncated": sum(bool(row.get("truncated")) for row in rows),
    }


def entries(results: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The figures in a results.json by (task, protocol); further protocols lie inside their task's entry."""
    found = {}
    for task, entry in results["tasks"].items():
        for part in (entry, *entry.get("protocols", {}).values()):
            found[task, part["protocol"]] = part
    return found


def table(results: dict[str, Any]) -> str:
    """A results.json as plain text."""
    lines = [("task", "protocol", "n", "accuracy %", "95 % interval", "no letter", "truncated")]
    for (task, protocol), e in entries(results).items():
        figures = (str(e["n"]), f"{100 * e['accuracy']:.2f}", _interval(e["ci95"], ".2f"))
        lines.append((task, protocol, *figures, str(e["no_letter"]), str(e["truncated"])))
    blocks = [_columns(lines)] if len(lines) > 1 else []
    texts = [("text", "bits per character", "characters", "tokens")]
    for name, e in results["bits_per_character"].items():
        texts.append((name, f"{e['bits_per_character']:.4f}", str(e["characters"]), str(e["tokens"])))
    blocks += [_columns(texts)] if len(texts) > 1 else []
    return "\n\n".join(blocks)


def compare(a: Iterable[Row], b: Iterable[Row]) -> dict[str, Any]:
    """Model b against model a on the same questions, one task and protocol: a row a question and wording in each.

    Several wordings of a question count as one: its difference is the mean over them.
    """
    right: list[dict[str, list[bool]]] = [{}, {}]
    for rows, by_id in zip((a, b), right, strict=True):
        for row in rows:
            by_id.setdefault(row["id"], []).append(row["correct"])
    means_a, means_b = ({key: sum(c) / len(c) for key, c in by_id.items()} for by_id in right)
    differences = [means_b[key] - mean for key, mean in means_a.items()]
    only_a, only_b = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    n = len(differences)
    return {
        "n": n,
        "accuracy_a": math.fsum(means_a.values()) / n,
        "accuracy_b": math.fsum(means_b.values()) / n,
        "difference": math.fsum(differences) / n,
        "ci95": list(bootstrap(differences)),
        "only_a": only_a,
        "only_b": only_b,
        "mcnemar_p": mcnemar(only_a, only_b),
    }


def comparison_table(comparison: dict[str, Any]) -> str:
    """What `run.compare` returns as plain text."""
    lines = [("task", "protocol", "n", "A %", "B %", "B - A", "95 % interval", "McNemar p")]
    for (task, protocol), e in entries(comparison).items():
        shares = (f"{100 * e['accuracy_a']:.2f}", f"{100 * e['accuracy_b']:.2f}", f"{100 * e['difference']:+.2f}")
        lines.append((task, protocol, str(e["n"]), *shares, _interval(e["ci95"], "+.2f"), f"{e['mcnemar_p']:.4f}"))
    return _columns(lines)


def _interval(bounds: Sequence[float], form: str) -> str:
    return f"{100 * bounds[0]:{form}} … {100 * bounds[1]:{form}}"


def _columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)
