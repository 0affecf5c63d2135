"""Learning-rate schedules, point by point."""

from __future__ import annotations

import pytest

from pandallm.train.schedule import factor


def curve(name: str, total: int = 100, warmup: float = 0.1) -> list[float]:
    return [factor(name, step, total, warmup) for step in range(1, total + 1)]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["warmup_decay", "cosine", "wsd", "constant"])
def test_warms_up_linearly_to_the_peak(name: str) -> None:
    assert curve(name)[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert max(curve(name)) == 1.0


def test_warmup_decay_is_linear_to_zero() -> None:
    """After the peak at step 10 it falls by 1/91 a step and would be 0 at step 101."""
    assert curve("warmup_decay")[9:] == pytest.approx([1 - i / 91 for i in range(91)])


def test_others() -> None:
    assert curve("constant")[10:] == [1.0] * 90
    assert curve("wsd")[10:90] == pytest.approx([1.0] * 80) and curve("wsd")[-1] == pytest.approx(1 / 11)
    cosine = curve("cosine", warmup=0)
    assert cosine[50] == pytest.approx(0.5, abs=0.02) and 0 < cosine[-1] < 0.001
    assert all(a > b for a, b in zip(cosine[1:], cosine[2:], strict=False))


@pytest.mark.parametrize("name", ["warmup_decay", "cosine", "wsd", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_runs_learn_in_every_step(name: str, total: int) -> None:
    assert all(0 < f <= 1 for f in curve(name, total, 0.01))
