"""Character n-grams of many texts at once, as 64-bit hashes: what deduplication and decontamination compare.

Words don't serve for Chinese, which has no blanks. A text is reduced to its letters, digits and Chinese characters,
lower-cased and in half-width form; what stands between them (punctuation, blanks, marks) is left out.

C = characters that count of all texts together, P = n-grams.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

_BASE = 0x9E3779B97F4A7C15  # odd, so that its powers have inverses modulo 2^64
_PLANES = 0x33400  # no letter or ideograph lies above


@dataclass(frozen=True)
class Units:
    """The characters that count of a batch of texts."""

    codes: NDArray[np.uint32]  # [C] folded code points, all texts end to end
    text: NDArray[np.int32]  # [C] number of the text that each belongs to
    size: NDArray[np.int64]  # [texts] characters that count in each
    han: NDArray[np.int32]  # [C + 1] how many of the characters before are Chinese

    def hashes(self, n: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """(hash [P], start [P]) of every n-gram that lies within one text; `start` indexes `codes`."""
        count = len(self.codes) - n + 1
        if count <= 0:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        powers, inverses = _powers(1 << len(self.codes).bit_length())
        sums = np.zeros(len(self.codes) + 1, np.uint64)
        np.cumsum((self.codes + np.uint64(1)) * powers[: len(self.codes)], out=sums[1:])
        start = np.flatnonzero(self.text[:count] == self.text[n - 1 :])
        h = (sums[n:] - sums[:count])[start] * inverses[start]  # sum of code * base^place in the n-gram
        h ^= h >> np.uint64(32)  # spread: neighbours differ in few bits
        h *= np.uint64(0xD6E8FEB86659FD93)
        h ^= h >> np.uint64(32)
        h *= np.uint64(0xD6E8FEB86659FD93)
        h ^= h >> np.uint64(32)
        return h, start

    def han_in(self, start: NDArray[np.int64], n: int) -> NDArray[np.int32]:
        """Chinese characters in the n-grams that begin at `start` [P]."""
        counted: NDArray[np.int32] = self.han[start + n] - self.han[start]
        return counted


def units(texts: Sequence[str]) -> Units:
    """The characters that count of `texts`."""
    joined = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    fold, han = _tables()
    codes = fold[np.minimum(joined, _PLANES)]
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    kept = codes != 0
    text = np.repeat(np.arange(len(texts), dtype=np.int32), lengths)[kept]
    codes = codes[kept]
    before = np.zeros(len(codes) + 1, np.int32)
    np.cumsum(han[codes], out=before[1:])
    return Units(codes, text, np.bincount(text, minlength=len(texts)), before)


@cache
def _tables() -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """(what a code point counts as, 0 for nothing; whether it is a Chinese character) [code points]."""
    fold = np.zeros(_PLANES + 1, np.uint32)
    for code in range(_PLANES):
        char = chr(code)
        if char.isalnum():
            folded = unicodedata.normalize("NFKC", char).lower()
            fold[code] = ord(folded) if len(folded) == 1 else code
    han = np.zeros(_PLANES + 1, bool)
    for first, last in ((0x3005, 0x3007), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)):
        han[first : last + 1] = True
    return fold, han


@cache
def _powers(size: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Powers of the base and of its inverse, modulo 2^64 [size]."""
    both = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        row = np.full(size, base, np.uint64)
        row[0] = 1
        both.append(np.multiply.accumulate(row))
    return both[0], both[1]
