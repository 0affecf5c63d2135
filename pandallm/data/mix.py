"""How often each source is seen: `epochs` says so outright, `weight` asks for a share of the trained tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pandallm.config import UserError


def epochs_for(trained: Sequence[int], weights: Sequence[float | None], epochs: Sequence[float | None]) -> list[float]:
    """Passes over each source, from its trained tokens and its weight or epochs (one of them given).

    Sources with epochs count as they are; those with weights are scaled to their share of the whole. Where all have
    weights, the whole keeps the size of all sources seen once. Raises UserError where a share can't be had.
    """
    shares = sum(w for w in weights if w is not None)
    fixed = sum(t * e for t, e in zip(trained, epochs, strict=True) if e is not None)
    all_weighted = all(w is not None for w in weights)
    if shares and not all_weighted and not fixed:
        raise UserError("sources: weights are shares beside the sources with epochs; those hold nothing to train on")
    whole = sum(trained) / shares if all_weighted else fixed / (1 - shares)
    return [
        float(e) if e is not None else (whole * w / t if w and t else 0.0)
        for t, w, e in zip(trained, weights, epochs, strict=True)
    ]


def repeats(trained: NDArray[np.integer], epochs: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """How often each of a source's records is used [N], from their trained tokens [N]: all of them the whole epochs;
    for the rest random ones once more, until those tokens come nearest to what is asked."""
    counts = np.full(len(trained), int(epochs), dtype=np.int64)
    wanted = (epochs - int(epochs)) * int(trained.sum())
    order = rng.permutation(len(trained))
    sums = np.cumsum([0, *trained[order].tolist()])
    counts[order[: int(np.abs(sums - wanted).argmin())]] += 1
    return counts


def sample(
    groups: NDArray[np.unsignedinteger], size: int, cap: int | None, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Which records of a source are drawn [N], from the group of each [N]: `size` of them, from each group in
    proportion to its records, of which `cap` count at most (examples-proportional mixing: Raffel et al. 2019,
    arXiv 1910.10683, section 3.5.2; RECIPE section 1). All of a group are drawn before any other gives more."""
    names, group, counts = np.unique(groups, return_inverse=True, return_counts=True)
    quota = _quotas(counts, np.minimum(counts, cap or counts.max(initial=1)), min(size, len(groups)))
    order = rng.permutation(len(groups))
    order = order[np.argsort(group[order], kind="stable")]  # group by group, each shuffled
    place = np.arange(len(groups)) - np.repeat(np.cumsum(counts) - counts, counts)
    drawn = np.zeros(len(groups), bool)
    drawn[order[place < np.repeat(quota, counts)]] = True
    return drawn


def _quotas(counts: NDArray[np.int64], weights: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """`size` shared out by `weights` [groups], no group giving more than it has; what is left over by rounding goes to
    the largest remainders."""
    quota = np.zeros(len(counts), np.int64)
    while (left := size - int(quota.sum())) > 0:
        room = quota < counts
        wanted = left * np.where(room, weights, 0) / weights[room].sum()
        given = np.minimum(wanted.astype(np.int64), counts - quota)
        if not given.any():
            most = np.argsort(-np.where(room, wanted, -1), kind="stable")[:left]
            given[most[room[most]]] = 1
        quota += given
    return quota
