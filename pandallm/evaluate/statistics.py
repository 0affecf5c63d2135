"""The numbers behind the tables: intervals, tests, how many questions it takes, and how a model leans to positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution
POWER = 0.8  # chance that a difference that is there is shown
LEAST = 6  # questions that only one model got right, all of them the same one: 2 / 2^6 is the first p below 0.05
RESAMPLES, SEED = 10_000, 0


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


def questions_needed(differences: Sequence[float]) -> int | None:
    """Questions at which a test at the 5 % level shows a mean difference like this one with a power of 80 %.

    For answers that are right or wrong this is the sample size of McNemar's test (Connor 1987), the mean square being
    the share of questions that only one model got right; but no fewer than have LEAST of those, without which the exact
    test shows nothing. None: the mean is 0, which no number tells from nothing.
    """
    n = len(differences)
    mean, square = math.fsum(differences) / n, math.fsum(d * d for d in differences) / n
    if abs(mean) < 1e-12:
        return None
    spread = math.sqrt(max(square - mean * mean, 0.0))
    root = (Z95 * math.sqrt(square) + NormalDist().inv_cdf(POWER) * spread) / mean
    apart = sum(d != 0 for d in differences)
    return max(math.ceil(root * root - 1e-9), -(-LEAST * n // apart))


Shown = tuple[int, int, int | None]  # options of a question, positions of the right one and of the answer


def position_bias(shown: Sequence[Shown]) -> dict[str, Any]:
    """How far answers lean to a position, whatever stands there, kept apart by the number of options.

    `total_variation`: half the sum of |share of answers - share of right options| over positions, 0 to 1: the least
    share of answers that would have to move for the model to say each position as often as it is right. A mean over the
    numbers of options, weighed by rows. An answer that is none of the options counts for no position.
    `accuracy_spread`: accuracy where the right option stands best for the model, less where it stands worst; the same
    mean.
    `by_options`: for each number of options the rows, `answered` and `gold` (shares by position), `accuracy` by the
    position of the right option (None where it never stood).
    """
    found, distances, spreads, weights = {}, [], [], []
    for options in sorted({n for n, _, _ in shown}):
        rows = [(gold, pred) for n, gold, pred in shown if n == options]
        places = range(options)
        at = [[pred == gold for gold, pred in rows if gold == place] for place in places]
        said = [sum(pred == place for _, pred in rows) for place in places]
        gold = [len(right) / len(rows) for right in at]
        answered = [count / max(sum(said), 1) for count in said]
        accuracy = [sum(right) / len(right) if right else None for right in at]
        known = [a for a in accuracy if a is not None]
        found[str(options)] = {"rows": len(rows), "answered": answered, "gold": gold, "accuracy": accuracy}
        distances.append(sum(abs(a - g) for a, g in zip(answered, gold, strict=True)) / 2 if any(said) else 0.0)
        spreads.append(max(known) - min(known))
        weights.append(len(rows))
    return {
        "total_variation": float(np.average(distances, weights=weights)),
        "accuracy_spread": float(np.average(spreads, weights=weights)),
        "by_options": found,
    }
