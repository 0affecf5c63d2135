"""How often each source is seen: `epochs` says so outright, `weight` asks for a share of the trained tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pandallm.config import UserError


def epochs_for(trained: Sequence[int], weights: Sequence[float | None], epochs: Sequence[float | None]) -> list[float]:
    """Passes over each source, from its trained tokens and its weight or epochs (one of them given).

    Sources with epochs count as they are; those with weights are scaled to their share of the whole. Where all have
    weights, the whole keeps the size of all sources seen once.
    """
    shares = sum(w for w in weights if w is not None)
    fixed = sum(t * e for t, e in zip(trained, epochs, strict=True) if e is not None)
    all_weighted = all(w is not None for w in weights)
    if shares >= 1 and not all_weighted:
        raise UserError("sources: the weights add up to 1 or more, which leaves nothing for the sources with epochs")
    whole = sum(trained) / shares if all_weighted and shares else fixed / (1 - shares) if shares < 1 else 0.0
    return [
        float(e) if e is not None else (whole * w / t if w and t else 0.0)
        for t, w, e in zip(trained, weights, epochs, strict=True)
    ]


def repeats(n_records: int, epochs: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """How often each of a source's records is used [n_records]: all the whole epochs, and a random part once more."""
    counts = np.full(n_records, int(epochs), dtype=np.int64)
    extra = round((epochs - int(epochs)) * n_records)
    counts[rng.permutation(n_records)[:extra]] += 1
    return counts
