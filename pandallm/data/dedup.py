"""Duplicates over all sources: exact ones by a hash of their content, near ones by sketches of their characters.

A sketch is a MinHash of the n-grams of each quarter of a record. Quarters, because a copy is told from a sibling (the
same instruction with another answer, the same answer to another question) by where the changes are: a copy's are spread
over the text, a sibling's fill a stretch of it. The n-grams with digits are sketched once more by themselves: records
that agree in all but their numbers are other exercises, or the report of another day.

Records that share a band, four neighbouring values of a quarter, fall into one bucket (locality-sensitive hashing). Of
a bucket each is compared with the first and with the one before it, so that the work grows with the records and not
with their pairs.

N = records of all parts, in their order; K = bytes of a sketch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from pandallm.config import Config
from pandallm.data.ngrams import Units
from pandallm.prompt import Dialogue, Example

QUARTERS = 4
SLOTS = 60  # values of a quarter
DIGIT_SLOTS = 16
K = QUARTERS * SLOTS + DIGIT_SLOTS
BAND = 4  # values that make a band: 32 bits, few of which agree by chance even among 1e7 records
BANDS = QUARTERS * SLOTS // BAND
SHORT_LINE = 100  # characters of a line that may be a question on a passage
SHORTEST = 32  # characters that count; of less, a few changes make another record, so it is never dropped

# Share of the n-grams in common, by which a later record is dropped. One character in ten changed at random leaves 0.65
# of the pairs of characters (2-grams).
ALIKE = 0.55  # over all of the record
HALF_ALIKE = 0.4  # in the half that agrees less
QUARTER_ALIKE = 0.22  # in the quarter that agrees least
DIGITS_ALIKE = 0.2  # of those with a digit

HAN_N, LATIN_N = 2, 4  # letters are few: pairs of them are in every text
ROUNDS = 6  # times an n-gram is put into a slot, while slots are empty
_EMPTY = np.uint32(0xFFFFFFFF)

SORTED = 1 << 20  # hashes sorted at once; with more records, several times by range of the hash
HELD = 1 << 25  # band hashes held at once
COMPARED = 1 << 15  # pairs of sketches compared at once


class Dedup(Config):
    """Which records are left out as duplicates; the first one in the config's order stays."""

    exact: bool = True  # the same text, white space aside
    near: bool = False  # nearly the same text


def text_of(examples: list[Example]) -> str:
    """What of a record is compared: its text, or all turns of its talks."""
    texts: list[str] = []
    for example in examples:
        texts += [text for _, text in example.messages] if isinstance(example, Dialogue) else [example.text]
    return "\n".join(texts)


def compared(examples: list[Example]) -> str:
    """What of a record is sketched: its text. Where question and answer are short beside the passage they are on, each
    fills a quarter of its own besides: there alone the records on one passage differ."""
    text = text_of(examples)
    turns = [turn for example in examples if isinstance(example, Dialogue) for turn in example.messages]
    lines = [line for role, said in turns if role != "assistant" for line in said.split("\n")]
    asked = _counted("".join(line for line in lines if len(line) <= SHORT_LINE))
    answered = _counted("".join(said for role, said in turns if role == "assistant"))
    size = len(_counted(text)) // 2
    if not answered or 3 * (len(asked) + len(answered)) > 2 * size:
        return text
    asked = asked or answered
    return "\n".join([text, (asked * (size // len(asked) + 1))[:size], (answered * (size // len(answered) + 1))[:size]])


def _counted(text: str) -> str:
    return "".join(filter(str.isalnum, text))


def key(examples: list[Example]) -> bytes:
    """Hash (16 bytes) of a record's content, white space aside: equal for exact duplicates, in whatever layout they
    came."""
    h = blake3()
    for example in examples:
        turns = example.messages if isinstance(example, Dialogue) else (("text", example.text),)
        for role, content in turns:
            h.update(f"{role}\0{' '.join(content.split())}\0".encode())
    # NumPy strips trailing zero bytes of S16; a key never ends in one.
    return h.digest(15) + b"\1"


def sketches(units: Units, texts: int) -> NDArray[np.uint8]:
    """Sketches of a batch of texts [texts, K]; all zeros for a text that is too short to judge."""
    pairs, at = units.hashes(HAN_N)
    longer, at_longer = units.hashes(LATIN_N)
    han, latin = units.han_in(at, HAN_N) > 0, units.han_in(at_longer, LATIN_N) == 0
    hashes, start = np.concatenate([pairs[han], longer[latin]]), np.concatenate([at[han], at_longer[latin]])
    quarter = np.arange(0, QUARTERS * len(units.codes), QUARTERS)  # of each character
    quarter -= np.repeat((np.cumsum(units.size) - units.size) * QUARTERS, units.size)
    quarter //= np.repeat(units.size, units.size)
    quarter += units.text * np.int64(QUARTERS)
    body = _minhash(quarter[start], hashes, texts * QUARTERS, SLOTS).reshape(texts, QUARTERS * SLOTS)
    is_digit = units.codes - np.uint32(ord("0")) < 10
    with_digit = is_digit[at] | is_digit[at + 1]
    digits = _minhash(units.text[at[with_digit]].astype(np.int64), pairs[with_digit], texts, DIGIT_SLOTS)
    made = np.concatenate([body, digits], axis=1)
    made[(units.size < SHORTEST) | (body == 0).any(axis=1)] = 0
    return made


def _minhash(row: NDArray[np.int64], hashes: NDArray[np.uint64], rows: int, slots: int) -> NDArray[np.uint8]:
    """Values 1 to 255 [rows, slots] of sets: hash i is in set `row[i]`. An empty set's values are 0.

    Every hash falls into one slot, whose smallest is kept. Slots that stay empty are filled by more rounds of the same
    hashes, differently mixed (a round's values come before those of the next, so that a set with one hash more fills
    the rest alike), and at last from the slot before."""
    table = np.full(rows * slots, _EMPTY)
    row = row * slots
    for number in range(ROUNDS):
        mixed = hashes * np.uint64((0x9E3779B97F4A7C15 * (2 * number + 1)) % (1 << 64))
        slot = ((mixed >> np.uint64(48)) * np.uint64(slots) >> np.uint64(16)).astype(np.int64)
        value = (mixed >> np.uint64(19)).astype(np.uint32) >> np.uint32(3) | np.uint32(number << 29)
        np.minimum.at(table, row + slot, value)
        if number in (0, ROUNDS // 2):  # long texts are done
            unfilled = np.repeat((table.reshape(rows, slots) == _EMPTY).any(axis=1), slots)[row]
            row, hashes = row[unfilled], hashes[unfilled]
    values = ((table * np.uint32(0x9E3779B1) >> np.uint32(16)) * np.uint32(255) >> np.uint32(16)).astype(np.uint8)
    values += 1
    values *= table != _EMPTY
    values = values.reshape(rows, slots)
    for bit in range((slots - 1).bit_length()):  # empty slots take the nearest value before them, round the end
        values += np.roll(values, 1 << bit, axis=1) * (values == 0)
    return values


def alike(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether sketches [P, K] are of nearly the same text [P]."""
    same = a == b
    quarters = _jaccard(same[:, : QUARTERS * SLOTS].reshape(-1, QUARTERS, SLOTS))
    halves = quarters.reshape(-1, 2, QUARTERS // 2).mean(axis=2)
    digits = _jaccard(same[:, QUARTERS * SLOTS :])
    enough: NDArray[np.bool_] = (
        (quarters.mean(axis=1) >= ALIKE)
        & (halves.min(axis=1) >= HALF_ALIKE)
        & (quarters.min(axis=1) >= QUARTER_ALIKE)
        & (digits >= DIGITS_ALIKE)
    )
    return enough


def _jaccard(same: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The share of n-grams in common that equal values [..., slots] speak for: one in 255 is equal by chance."""
    chance = np.float32(1 / 255)
    share: NDArray[np.float32] = (same.mean(axis=-1, dtype=np.float32) - chance) / (1 - chance)
    return share


def exact(keys: Sequence[NDArray[np.bytes_]]) -> NDArray[np.bool_]:
    """Which records are the first of their content [N]. `keys`: those of each part, read once for every SORTED records
    (give memory-mapped ones). Besides the result, memory doesn't grow with N."""
    counts = [len(part) for part in keys]
    keep = np.ones(sum(counts), bool)
    passes = -(-len(keep) // SORTED)
    for number in range(passes):
        halves, places, first = [np.empty((0, 2), np.uint64)], [np.empty(0, np.int64)], 0
        for part, count in zip(keys, counts, strict=True):
            both = np.ascontiguousarray(part, "S16").view("<u8").reshape(-1, 2)
            # The keys are hashes: a few bits of them cut all records into ranges of nearly one size.
            mine = np.flatnonzero((both[:, 0] & np.uint64(0xFFFFFFFF)) * np.uint64(passes) >> np.uint64(32) == number)
            halves.append(both[mine])
            places.append(mine + first)
            first += count
        keep[_repeated(np.concatenate(halves), np.concatenate(places))] = False
    return keep


def _repeated(halves: NDArray[np.uint64], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The places of keys [n, 2] that another one with a lower place is equal to."""
    order = np.argsort(halves[:, 0])
    same = halves[order[1:], 0] == halves[order[:-1], 0]
    alone = np.ones(len(order), bool)
    alone[1:] = ~same
    alone[:-1] &= ~same
    some = order[~alone]  # their first halves agree: few, so these are sorted by all of the key
    halves, places = halves[some], places[some]
    order = np.lexsort((places, halves[:, 1], halves[:, 0]))
    again = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
    return places[order[1:][again]]


def near(parts: Sequence[Path], counts: Sequence[int], keep: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each record the number of the earlier one that stays and that it nearly repeats, or -1 [N].

    `parts`: files of the parts' sketches; `counts`: records of each; `keep` [N]: records still in the game. Memory: 13
    bytes a record (the result is 8 of them), 8 bytes for each pair of alike records that was seen, and some 250 MB.
    """
    assert len(keep) < 1 << 32, "more records than their packed numbers can tell"
    files = _Sketches(parts, counts)
    pairs = np.empty(0, np.uint64)  # (later << 32 | earlier), sorted, each once
    for hashes in files.bands():
        hashes[~keep] = 0
        for candidates in _candidates(hashes):
            known = np.searchsorted(pairs, candidates)
            seen = known < len(pairs)
            seen[seen] = pairs[known[seen]] == candidates[seen]
            found = files.alike(candidates[~seen])
            if len(found):
                pairs = np.union1d(pairs, found)
    like = np.full(len(keep), -1, np.int64)
    for at in range(0, len(pairs), COMPARED):
        later, earlier = _unpack(pairs[at : at + COMPARED])
        # In order, so that the earlier one's own fate is known. A record like one that is dropped itself may stay.
        for i, j in zip(later.tolist(), earlier.tolist(), strict=True):
            if like[i] < 0 and like[j] < 0:
                like[i] = j
    return like


def _unpack(pairs: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _candidates(hashes: NDArray[np.uint32]) -> Iterator[NDArray[np.uint64]]:
    """Packed pairs (later << 32 | earlier), sorted, of records that share a band's hash [N], by ranges of the hash."""
    passes = -(-len(hashes) // SORTED)
    for number in range(passes):
        low, high = (-(-(i << 32) // passes) for i in (number, number + 1))
        mine = np.flatnonzero((hashes >= max(low, 1)) & (hashes <= high - 1))  # 0: no sketch
        packed = hashes[mine].astype(np.uint64) << np.uint64(32) | mine.astype(np.uint64)
        packed.sort()
        value = packed >> np.uint64(32)
        start = np.append(True, value[1:] != value[:-1])[: len(value)]
        place = np.arange(len(value))
        first = np.maximum.accumulate(np.where(start, place, 0))
        others = place[~start]
        record = packed & np.uint64(0xFFFFFFFF)
        pairs = [record[others] << np.uint64(32) | record[earlier] for earlier in (first[others], others - 1)]
        yield np.unique(np.concatenate(pairs))


class _Sketches:
    """The sketches of all parts, which stay on disk."""

    def __init__(self, parts: Sequence[Path], counts: Sequence[int]) -> None:
        self.parts = parts
        self.ends = np.cumsum([0, *counts])

    def bands(self) -> Iterator[NDArray[np.uint32]]:
        """The hash of each record [N], band by band; as many bands at a reading of the files as may be held."""
        total = int(self.ends[-1])
        step = min(BANDS, max(1, HELD // max(total, 1)))
        for band in range(0, BANDS, step):
            columns = slice(band, min(band + step, BANDS))
            hashes = np.empty((columns.stop - band, total), np.uint32)
            for i, part in enumerate(self.parts):
                for first in range(int(self.ends[i]), int(self.ends[i + 1]), COMPARED):
                    last = min(first + COMPARED, int(self.ends[i + 1]))
                    offset = (first - int(self.ends[i])) * K
                    rows = np.fromfile(part, "<u4", (last - first) * K // 4, offset=offset)
                    hashes[:, first:last] = rows.reshape(-1, K // 4)[:, columns].T
            yield from hashes

    def alike(self, pairs: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Those of the packed pairs whose sketches are alike."""
        found = [pairs[:0]]
        for at in range(0, len(pairs), COMPARED):
            some = pairs[at : at + COMPARED]
            records, where = np.unique(np.concatenate(_unpack(some)), return_inverse=True)
            rows = self._rows(records)
            later, earlier = where[: len(some)], where[len(some) :]
            found.append(some[alike(rows[later], rows[earlier])])
        return np.concatenate(found)

    def _rows(self, records: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Sketches [n, K] of records [n], which are in order."""
        rows = np.empty((len(records), K), np.uint8)
        borders = np.searchsorted(records, self.ends)
        for i in np.flatnonzero(np.diff(borders)).tolist():  # one file open at a time: there may be thousands
            mine = slice(int(borders[i]), int(borders[i + 1]))
            rows[mine] = np.memmap(self.parts[i], np.uint8, "r").reshape(-1, K)[records[mine] - self.ends[i]]
        return rows
