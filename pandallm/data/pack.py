"""Best-fit packing: whole documents into rows of seq_len tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def best_fit(lengths: NDArray[np.integer], seq_len: int) -> list[list[int]]:
    """Packs documents of `lengths` [N] (each 1..seq_len) into rows; returns the indices of each row's documents.

    Best-fit decreasing: the longest first, each into the fullest row that still has room. Equal lengths keep the given
    order, so the caller's shuffle decides which of them meet. Source: Johnson et al. 1974; for language models
    Ding et al. 2024 (arXiv 2404.10830).
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # free tokens -> rows that have just that much
    free_sizes = 0  # bit s is set where with_room[s] isn't empty: finding the best fit is one shift
    for index in order.tolist():
        length = int(lengths[index])
        fitting = free_sizes >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1  # the least free space >= length
            row = with_room[free].pop()
            if not with_room[free]:
                free_sizes ^= 1 << free
            rows[row].append(index)
        else:
            free, row = seq_len, len(rows)
            rows.append([index])
        if left := free - length:
            with_room[left].append(row)
            free_sizes |= 1 << left
    return rows
