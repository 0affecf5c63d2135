"""Best-fit packing: whole documents into rows of seq_len tokens."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray


def best_fit(lengths: NDArray[np.integer], seq_len: int) -> NDArray[np.int64]:
    """Packs documents of `lengths` [N] (each 1..seq_len) into rows; returns the row of each document [N].

    Best-fit decreasing: the longest first, each into the fullest row that still has room. Equal lengths keep the given
    order, so the caller's shuffle decides which of them meet. Numbers of rows and documents are held as plain arrays:
    some 20 bytes a document. Source: Johnson et al. 1974; for language models Ding et al. 2024 (arXiv 2404.10830).
    """
    order = np.argsort(-lengths.astype(np.int32), kind="stable")
    row_of = np.empty(len(lengths), np.int64)
    with_room = [array("I") for _ in range(seq_len + 1)]  # free tokens -> rows that have just that much
    free_sizes = rows = 0  # bit s is set where with_room[s] isn't empty: finding the best fit is one shift
    for first in range(0, len(order), 1 << 16):
        block = order[first : first + (1 << 16)]
        placed = array("I")
        for length in lengths[block].tolist():
            fitting = free_sizes >> length
            if fitting:
                free = length + (fitting & -fitting).bit_length() - 1  # the least free space >= length
                row = with_room[free].pop()
                if not with_room[free]:
                    free_sizes ^= 1 << free
            else:
                free, row = seq_len, rows
                rows += 1
            placed.append(row)
            if left := free - length:
                with_room[left].append(row)
                free_sizes |= 1 << left
        row_of[block] = placed
    return row_of
