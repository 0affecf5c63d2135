"""Packing: every document once, no row too long, and rows as full as they can be."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pandallm.data import mix, pack


def first_fit(lengths: list[int], seq_len: int) -> list[list[int]]:
    """The simplest packing: each document, as it comes, into the first row with room."""
    rows: list[list[int]] = []
    free: list[int] = []
    for i, length in enumerate(lengths):
        row = next((r for r, room in enumerate(free) if room >= length), None)
        if row is None:
            rows.append([i])
            free.append(seq_len - length)
        else:
            rows[row].append(i)
            free[row] -= length
    return rows


def best_fit_slowly(lengths: list[int], seq_len: int) -> list[int]:
    """Best-fit decreasing by its definition; what is free in each row."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in free if room >= length]
        if fitting:
            free[free.index(min(fitting))] -= length
        else:
            free.append(seq_len - length)
    return sorted(free)


def check(lengths: list[int], seq_len: int) -> list[list[int]]:
    row_of = pack.best_fit(np.array(lengths, "<u4"), seq_len)
    rows = [np.flatnonzero(row_of == row).tolist() for row in range(row_of.max(initial=-1) + 1)]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths))), "every document just once"
    assert all(row for row in rows)
    assert all(sum(lengths[i] for i in row) <= seq_len for row in rows)
    return rows


@pytest.mark.parametrize("seed", range(60))
def test_property(seed: int) -> None:
    rng = random.Random(seed)
    seq_len = rng.choice([1, 2, 8, 100, 256, 2048])
    count = rng.choice([0, 1, 2, 3, 10, 100, 400])
    draw = rng.choice(
        [
            lambda: rng.randint(1, seq_len),
            lambda: rng.randint(1, max(1, seq_len // 8)),
            lambda: rng.randint(seq_len // 2 + 1, seq_len),
            lambda: max(1, min(seq_len, int(rng.lognormvariate(4, 1.5)))),
            lambda: rng.choice([1, seq_len, max(1, seq_len // 2), max(1, seq_len // 3)]),
        ]
    )
    lengths = [draw() for _ in range(count)]
    rows = check(lengths, seq_len)
    assert len(rows) >= -(-sum(lengths) // seq_len)
    assert len(rows) <= len(first_fit(lengths, seq_len))
    assert sorted(seq_len - sum(lengths[i] for i in row) for row in rows) == best_fit_slowly(lengths, seq_len)


def test_utilisation() -> None:
    """Documents like a corpus's: rows are full but for the last, where first fit wastes some."""
    rng = random.Random(7)
    lengths = [max(8, min(2048, int(rng.lognormvariate(6, 1)))) for _ in range(3000)]
    rows = check(lengths, 2048)
    naive = first_fit(lengths, 2048)
    assert sum(lengths) / (2048 * len(rows)) > 0.999
    assert len(rows) < len(naive)


def test_edges() -> None:
    assert check([], 8) == []
    assert check([8], 8) == [[0]]
    assert check([1], 8) == [[0]]
    assert check([8] * 5, 8) == [[0], [1], [2], [3], [4]]
    assert check([1] * 16, 8) == [list(range(8)), list(range(8, 16))]
    assert check([4, 8, 4], 8) == [[1], [0, 2]]
    assert check([5, 5, 3, 3], 8) == [[0, 3], [1, 2]]
    assert len(check([2**16, 1], 2**16)) == 2


def test_epochs_and_weights() -> None:
    """A weight is the share of the trained tokens, beside the sources with epochs, or among weights alone."""
    assert mix.epochs_for([100, 50], [None, None], [1.0, 2.5]) == [1.0, 2.5]
    (one, other) = mix.epochs_for([300, 50], [None, 0.25], [1.0, None])
    assert one == 1.0 and other * 50 == pytest.approx(0.25 * (300 + other * 50))
    three = mix.epochs_for([300, 50, 20], [None, 0.25, 0.5], [2.0, None, None])
    tokens = np.array(three) * [300, 50, 20]
    assert tokens / tokens.sum() == pytest.approx([0.25, 0.25, 0.5]) and tokens[0] == 600
    alone = np.array(mix.epochs_for([300, 100], [0.5, 0.25], [None, None])) * [300, 100]
    assert alone.sum() == pytest.approx(400) and alone[0] == pytest.approx(2 * alone[1])


@pytest.mark.parametrize("epochs", [0.0, 0.3, 1.0, 2.5, 7.999])
def test_repeats(epochs: float) -> None:
    """Each record the whole epochs and some once more, nearest to the trained tokens asked for."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        trained = rng.integers(1, 200, size=rng.integers(1, 300))
        counts = mix.repeats(trained, epochs, rng)
        assert set(counts.tolist()) <= {int(epochs), int(epochs) + 1}
        assert abs(int((counts * trained).sum()) - epochs * trained.sum()) <= trained.max() / 2
    assert mix.repeats(np.zeros(0, np.int64), epochs, np.random.default_rng(0)).tolist() == []
    assert mix.repeats(np.array([5] * 10), 2.5, np.random.default_rng(0)).sum() == 25


def test_repeats_are_drawn_from_all() -> None:
    trained = np.full(1000, 10)
    counts = mix.repeats(trained, 0.5, np.random.default_rng(0))
    assert counts.sum() == 500 and 200 < counts[:500].sum() < 300


def test_samples_are_drawn_in_proportion() -> None:
    """Examples-proportional: a group's share is that of its records, of which `cap` count at most."""
    groups = np.repeat([7, 3, 9, 4], [1000, 100, 10, 2]).astype("<u8")
    rng = np.random.default_rng(0)
    drawn = mix.sample(groups, 222, 100, rng)
    assert {g: int(drawn[groups == g].sum()) for g in (7, 3, 9, 4)} == {7: 110, 3: 100, 9: 10, 4: 2}
    drawn = mix.sample(groups, 111, 100, rng)
    sizes = [int(drawn[groups == g].sum()) for g in (7, 3, 9, 4)]
    assert sum(sizes) == 111 and all(abs(n - w / 212 * 111) < 1 for n, w in zip(sizes, (100, 100, 10, 2), strict=True))
    assert mix.sample(groups, 10_000, 5, rng).all()
    uncapped = mix.sample(groups, 556, None, rng)
    assert int(uncapped.sum()) == 556 and abs(int(uncapped[groups == 7].sum()) - 500) <= 1


def test_samples_are_drawn_by_the_seed() -> None:
    groups = np.zeros(1000, "<u8")
    first, again, other = (mix.sample(groups, 100, None, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.sum() == again.sum() == other.sum() == 100
    assert (first == again).all() and (first != other).any()
    assert np.flatnonzero(first).max() > 800, "from all over the corpus"
