"""evaluate/statistics.py and report.py: figures from predictions."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from pandallm.evaluate import report, statistics
from pandallm.evaluate.report import Row


def test_questions_needed_is_mcnemars_sample_size() -> None:
    # 25 % of the questions are only B's, 15 % only A's: Connor's formula by hand.
    differences = [1.0] * 25 + [-1.0] * 15 + [0.0] * 60
    psi, delta = 0.40, 0.10
    by_hand = (1.959964 * math.sqrt(psi) + 0.841621 * math.sqrt(psi - delta**2)) ** 2 / delta**2
    assert statistics.questions_needed(differences) == math.ceil(by_hand)
    assert statistics.questions_needed([-d for d in differences]) == math.ceil(by_hand)
    assert statistics.questions_needed([1.0, -1.0, 0.0]) is None and statistics.questions_needed([0.0]) is None
    halves = [d / 2 for d in differences]  # means over wordings: only the ratio counts
    assert statistics.questions_needed(halves) == math.ceil(by_hand)


def test_questions_needed_gives_the_power_it_promises() -> None:
    differences = [1.0] * 25 + [-1.0] * 15 + [0.0] * 60
    n = statistics.questions_needed(differences) or 0
    draws = np.random.default_rng(3).multinomial(n, [0.15, 0.25, 0.6], size=4000)
    z = (draws[:, 1] - draws[:, 0]) / np.sqrt(draws[:, 0] + draws[:, 1])
    assert (np.abs(z) > 1.959964).mean() == pytest.approx(0.8, abs=0.03)


def test_position_bias() -> None:
    even = [(4, place, place) for place in range(4)] * 5
    assert statistics.position_bias(even)["total_variation"] == 0.0
    assert statistics.position_bias(even)["accuracy_spread"] == 0.0
    always_a = [(4, place, 0) for place in range(4)] * 5
    found = statistics.position_bias(always_a)
    assert found["total_variation"] == pytest.approx(0.75) and found["accuracy_spread"] == 1.0
    assert found["by_options"]["4"] == {
        "rows": 20, "answered": [1, 0, 0, 0], "gold": [0.25] * 4, "accuracy": [1, 0, 0, 0]
    }  # fmt: skip
    # Kept apart by the number of options, weighed by rows; a C to two options is none of them.
    mixed = statistics.position_bias([*always_a, (2, 0, 2), (2, 0, None), (2, 0, 0), (2, 0, 0)])
    assert mixed["by_options"]["2"] == {"rows": 4, "answered": [1, 0], "gold": [1, 0], "accuracy": [0.5, None]}
    assert mixed["total_variation"] == pytest.approx(0.75 * 20 / 24)
    silent = statistics.position_bias([(2, 0, None), (2, 1, None)])
    assert silent["total_variation"] == 0.0 and silent["by_options"]["2"]["answered"] == [0, 0]


def row(**changes: Any) -> Row:
    usual = {"task": "t", "id": "1", "wording": "original", "protocol": "choice", "prompt": "p", "output": "o"}
    found = usual | {"pred": "A", "gold": "A", "truncated": False} | changes
    return {"correct": found["pred"] == found["gold"]} | found


def test_summary_weighs_questions_not_orders() -> None:
    orders = [[0, 1], [1, 0]]
    rows = [row(id="two", order=order, gold="AB"[order.index(0)], pred="A") for order in orders]
    rows += [row(id="four", order=order, gold="D", pred="D") for order in ([0, 1, 2, 3], [1, 2, 0, 3], [2, 1, 0, 3])]
    figures = report.summary(rows, "choice")
    assert figures["n"] == 2 and figures["accuracy"] == pytest.approx((0.5 + 1) / 2)
    assert figures["accuracy_as_given"] == 1.0 and figures["chance"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert figures["ci95"] == list(statistics.wilson(1.5, 2))
    assert figures["position_bias"]["by_options"]["2"]["answered"] == [1, 0]
    assert figures["position_bias"]["by_options"]["2"]["gold"] == [0.5, 0.5]


def test_summary_of_what_the_rows_hold() -> None:
    rows = [row(id=str(i), pred_strict=[None, "A", "B", "A"][i], flagged=i < 2, subject="ab"[i > 0]) for i in range(4)]
    rows[0] |= {"pred": "B", "correct": False}
    figures = report.summary(rows, "generate")
    assert figures["accuracy"] == 0.75 and figures["accuracy_strict"] == 0.5 and figures["no_letter_strict"] == 1
    assert figures["flagged"] == 2 and figures["accuracy_unflagged"] == 1.0
    assert figures["ci95_unflagged"] == list(statistics.wilson(2, 2))
    assert figures["subjects"] == {"a": 0.0, "b": 1.0} and figures["subjects_mean"] == 0.5
    plain = report.summary([row()], "generate")
    for key in ("accuracy_strict", "accuracy_norm", "flagged", "position_bias", "subjects", "accuracy_as_given"):
        assert key not in plain
    everything = report.summary([row(flagged=True, pred_norm="B")], "cloze")
    assert everything["accuracy_unflagged"] is None and everything["accuracy_norm"] == 0.0
    shown = report.table({"tasks": {"t": everything}, "bits_per_character": {}})
    assert "without flagged" in shown and "by length" in shown and "strict parse" not in shown


def test_best_and_worst_wording() -> None:
    rows = [row(id=str(i), wording=w, pred="A" if i < n else "B") for w, n in (("x", 1), ("y", 4)) for i in range(4)]
    figures = report.summary(rows, "choice")
    assert (figures["accuracy_worst"], figures["accuracy_best"]) == (0.25, 1.0)
    assert "sd 53.03, 25.00 … 100.00" in report.table({"tasks": {"t": figures}, "bits_per_character": {}})


def pair(only_a: int, only_b: int, same: int) -> dict[str, Any]:
    kinds = [(True, False)] * only_a + [(False, True)] * only_b + [(True, True)] * same
    a, b = ([row(id=str(i), correct=kind[side]) for i, kind in enumerate(kinds)] for side in (0, 1))
    return report.compare(a, b)


def test_verdicts() -> None:
    assert pair(5, 40, 55)["verdict"].startswith("B is better than A by 35.0 points (95 % interval 2")
    better = pair(40, 5, 55)
    assert better["verdict"].startswith("A is better than B by 35.0 points (95 % interval 2")
    assert better["ci95"][1] < 0
    few = pair(15, 25, 60)
    assert few["questions_needed"] == 312
    assert few["verdict"] == (
        "no difference shown: about 312 questions (212 more) would show a difference of this size (+10.0 points)"
    )
    assert pair(7, 7, 3)["verdict"] == "no difference shown: both are right equally often"
    assert pair(0, 0, 3)["questions_needed"] is None
    # All right against all wrong, but too few: the interval alone would call it better.
    assert pair(0, 3, 0)["questions_needed"] == 6 and pair(0, 5, 5)["questions_needed"] == 14
    assert pair(0, 5, 0)["ci95"] == [1.0, 1.0] and "no difference shown" in pair(0, 5, 0)["verdict"]
    assert "B is better" in pair(0, 6, 0)["verdict"]
    close = pair(15, 25, 60) | {"mcnemar_p": 0.04, "questions_needed": 90}
    assert "nearly (95 % interval -2.0 … +22.0, McNemar p 0.040)" in report.verdict(close)


def test_no_verdict_where_mean_and_questions_disagree() -> None:
    """Ten wordings: B gains one of them on 60 questions and loses nine on 20."""
    a = [row(id=str(i), wording=str(w), correct=i >= 60) for i in range(80) for w in range(10)]
    b = [row(id=str(i), wording=str(w), correct=w == 0) for i in range(80) for w in range(10)]
    found = report.compare(a, b)
    assert found["difference"] == pytest.approx(-0.15) and found["mcnemar_p"] < 1e-4 and found["only_b"] == 60
    assert found["verdict"].startswith("no verdict: over wordings and orders A is right more often, but B does better")


def test_a_verdict_is_rarely_wrong_where_there_is_no_difference() -> None:
    chance = random.Random(5)
    claims = 0
    for _ in range(60):
        only_a = sum(chance.random() < 0.5 for _ in range(30))
        claims += "is better" in pair(only_a, 30 - only_a, 70)["verdict"]
    assert claims <= 8  # 3 are expected at most


def test_wilson() -> None:
    assert statistics.wilson(15, 50) == pytest.approx((0.19103, 0.43750), abs=1e-5)  # Newcombe 1998's kind of example
    assert statistics.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert statistics.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)  # the same
    assert statistics.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)  # the same
    assert statistics.wilson(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=1e-4)


def test_mcnemar() -> None:
    assert statistics.mcnemar(0, 0) == 1.0 and statistics.mcnemar(5, 5) == 1.0
    assert statistics.mcnemar(1, 9) == statistics.mcnemar(9, 1) == pytest.approx(22 / 1024)
    assert 0 <= statistics.mcnemar(900, 1100) < 1e-5


def test_bootstrap() -> None:
    differences = [1.0] * 30 + [-1.0] * 10 + [0.0] * 60
    low, high = statistics.bootstrap(differences)
    assert (low, high) == statistics.bootstrap(differences)
    drawn = np.random.default_rng(7).choice(differences, size=(10_000, 100)).mean(1)
    assert (low, high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.011)
    assert statistics.bootstrap([0.0] * 5) == (0.0, 0.0)


def test_summary_over_wordings() -> None:
    rows = [
        {"id": str(i), "wording": w, "correct": i < n, "pred": "A", "gold": "A"}
        | ({"truncated": True} if i == 9 else {})
        for w, n in (("original", 4), ("other", 6))
        for i in range(10)
    ]
    rows[0]["pred"] = None
    figures = report.summary(rows, "generate")
    assert figures["accuracy"] == 0.5 and figures["n"] == 10 and figures["no_letter"] == 1 and figures["truncated"] == 2
    assert figures["accuracy_std"] == pytest.approx(math.sqrt(0.02))
    assert figures["ci95"] == list(statistics.wilson(5, 10))
    assert figures["wordings"] == [{"wording": "original", "accuracy": 0.4}, {"wording": "other", "accuracy": 0.6}]
    assert report.summary(rows[:10], "generate")["accuracy_std"] == 0.0
