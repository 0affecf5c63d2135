"""Keeps evaluation items out of training data: what share of an item is in a text, and of a text in an item?

A single shared n-gram is mostly a quotation, a statute or a stock phrase; a text is contaminated where it holds a good
part of an item, or is itself a good part of one. What merely touches an item is named to the caller and stays.

Chinese is compared by 13 characters, of which 11 must be Chinese: 13 letters of Latin script are two words, so that
items without enough Chinese are compared by 40 characters instead.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from pandallm import files as disk
from pandallm import log
from pandallm.config import UserError
from pandallm.data import ngrams, read, sources
from pandallm.prompt import Text

SHARE = 0.5  # of an item's n-grams in the text, or of the text's in the item: contaminated
RUN = 8  # n-grams an item must share for that (20 characters in a row), or all it has; a part with so many tells it
TEXT_RUN = 50  # … and a text: shorter ones are stock phrases and single paragraphs of a law
COMMON = 25  # an n-gram that more items hold is the set's own phrasing and tells none of them
PASSAGE = 200  # n-grams of that kind in one item are no phrasing: so many questions are asked on one passage

ARTICLE = 5000  # n-grams of one item from which it looks as if a file's layout wasn't recognised

CHINESE, HAN = 13, 11  # characters of an n-gram; Chinese ones it has at least
OTHER = 40  # characters of an n-gram of any script

FORMAT = 1
RULES = (FORMAT, SHARE, RUN, TEXT_RUN, COMMON, PASSAGE)  # what an index and its verdicts depend on
_BATCH_CHARS = 1 << 20
_BIT = np.uint8(1) << np.arange(8, dtype=np.uint8)
_BITS_A_HASH = 32  # of the bitmap: one unknown n-gram in 32 is looked up in vain


class Hit(NamedTuple):
    """What a text shares with the evaluation item that it shares most with."""

    contaminated: bool
    item: str  # file:record
    item_share: float  # of the item's n-grams, those that the text holds
    text_share: float  # of the text's n-grams, those that the item holds


def build(files: Sequence[str], out: Path, where: str) -> str:
    """Writes the index of the items of evaluation `files` to `out` and returns its hash.

    The files may have any layout that can be trained on, or that of C3, LogiQA, C-Eval, CMMLU, MMLU and their like.
    UserError, which begins with `where`: a file that is missing, damaged, or holds no item that could be recognised.
    """
    names = _short_names(list(dict.fromkeys(files)))
    hashes, items, widths = [], [], []
    places: list[tuple[int, int]] = []  # (number of the file, line) of each item
    for number, file in enumerate(names):
        before = len(places)
        for batch in _batches(_items_of(file, where)):
            grams, owner, width = _grams([parts for _, parts in batch])
            hashes.append(grams)
            items.append(owner + len(places))
            widths.append(np.unique(width))
            places += [(number, line) for line, _ in batch]
        if len(places) == before:
            raise UserError(f"{where}: {file}: holds no evaluation items; leave it out or mend it")
        if len(places) - before == 1 and len(hashes[-1]) > ARTICLE:
            log.warn(f"{where}: {file}: was read as one text; if it is a table or a list, give it as JSON lines")
    index = _index(np.concatenate(hashes), np.concatenate(items), np.array(places, np.uint32))
    told = len(index["sizes"])
    if not told:
        raise UserError(f"{where}: no item of {', '.join(names.values())} is long enough to be recognised in a text")
    short = len(places) - len(np.unique(np.concatenate(items)))
    log.say(f"{where}: {len(places)} evaluation items; {short} of them are too short to be recognised in a text")
    index["widths"] = np.unique(np.concatenate(widths)).astype(np.uint32)
    index["files"] = np.frombuffer(orjson.dumps(list(names.values())), np.uint8)
    lengths = np.array([FORMAT, *(len(index[name]) for name in _ARRAYS)], np.int64)
    with disk.atomic_file(out) as tmp, open(tmp, "wb") as f:
        for array in (lengths, *(index[name] for name in _ARRAYS)):
            f.write(array.tobytes())
    return disk.hash_file(out)


# The arrays of an index file, after their lengths. Wide ones first, so that each is aligned.
_ARRAYS: dict[str, type[np.generic]] = {
    "hashes": np.uint64,  # [P] of n-grams, ascending; of several items: as often
    "items": np.uint32,  # [P] the item that each belongs to
    "sizes": np.uint32,  # [items] n-grams of each
    "file": np.uint32,  # [items] where each was read
    "line": np.uint32,  # [items]
    "widths": np.uint32,  # of the n-grams that occur: CHINESE, OTHER
    "bitmap": np.uint8,  # packed; bit h >> shift is set for every hash h
    "files": np.uint8,  # JSON list of names
}


class Items:
    """The index of evaluation items; its memory is the file's, shared by all processes that open it."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._arrays = arrays
        self._files: list[str] = orjson.loads(arrays["files"].tobytes())

    @classmethod
    def open(cls, path: Path) -> Items:
        """UserError where the file is none that this version wrote."""
        with open(path, "rb") as f:
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        head = np.frombuffer(mapped, np.int64, min(len(_ARRAYS) + 1, len(mapped) // 8))
        if len(head) <= len(_ARRAYS) or head[0] != FORMAT:
            raise UserError(f"{path}: no index that this version wrote; remove it, and it is made again")
        arrays, at = {}, head.nbytes
        for (name, dtype), length in zip(_ARRAYS.items(), head[1:], strict=True):
            arrays[name] = np.frombuffer(mapped, dtype, int(length), at)
            at += arrays[name].nbytes
        return cls(arrays)

    @classmethod
    def of(cls, items: Sequence[Sequence[str]]) -> tuple[Items, list[list[int]]]:
        """An index in memory of items given as their parts, the most telling first, and what each item in it stands
        for: the numbers of those that have the same n-grams, such as the questions on one passage."""
        hashes, owners, widths, done = [], [], [], 0
        for batch in _batches((number, list(parts)) for number, parts in enumerate(items)):
            grams, owner, width = _grams([parts for _, parts in batch])
            hashes.append(grams)
            owners.append(owner + done)
            widths.append(np.unique(width))
            done += len(batch)
        grams, owner = np.concatenate(hashes), np.concatenate(owners)
        arrays = _index(grams, owner, np.array([(0, number) for number in range(done)], np.uint32))
        arrays["widths"] = np.unique(np.concatenate(widths)).astype(np.uint32)
        arrays["files"] = np.frombuffer(orjson.dumps([""]), np.uint8)
        order = np.lexsort((grams, owner))
        grams, owner = grams[order], owner[order]
        fresh = np.append(True, (grams[1:] != grams[:-1]) | (owner[1:] != owner[:-1]))[: len(grams)]
        alike: dict[int, list[int]] = {}
        for number, first in enumerate(_first_of_its_kind(grams[fresh], owner[fresh], done).tolist()):
            alike.setdefault(first, []).append(number)
        return cls(arrays), [alike[first] for first in arrays["line"].tolist()]

    def check(self, units: ngrams.Units, texts: int) -> list[Hit | None]:
        """For each of the `texts` that `units` was made of: the item it shares most with, None if it shares nothing."""
        hits: list[Hit | None] = [None] * texts
        for text, _, hit in self.matches(units):
            best = hits[text]
            if best is None or (hit.contaminated, *hit[2:]) > (best.contaminated, *best[2:]):
                hits[text] = hit
        return hits

    def matches(self, units: ngrams.Units) -> Iterator[tuple[int, int, Hit]]:
        """(number of the text, of the item, what they share) for every text and item that share anything."""
        for text, item, shared, times in zip(*(a.tolist() for a in self._shared(units)), strict=True):
            size = int(self._arrays["sizes"][item])
            n_grams = max(int(units.size[text]) - CHINESE + 1, 1)
            item_share, text_share = shared / size, min(times / n_grams, 1.0)
            holds_item = item_share >= SHARE and shared >= min(RUN, size)
            is_item = text_share >= SHARE and n_grams >= TEXT_RUN
            yield text, item, Hit(holds_item or is_item, self._name(item), item_share, text_share)

    def _name(self, item: int) -> str:
        return f"{self._files[self._arrays['file'][item]]}:{self._arrays['line'][item]}"

    def _shared(self, units: ngrams.Units) -> tuple[NDArray[np.int64], ...]:
        """(text, item, different n-grams they share, how often the text has them) [pairs], by text and item."""
        hashes, items = self._arrays["hashes"], self._arrays["items"]
        found = [self._found(units, int(width)) for width in self._arrays["widths"]]
        text, first = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        # One of each n-gram and text, then one for each item that has the n-gram.
        text_and_first, times = np.unique(text * len(hashes) + first, return_counts=True)
        text, first = np.divmod(text_and_first, len(hashes))
        count = np.searchsorted(hashes, hashes[first], "right") - first
        place = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())
        number = len(self._arrays["sizes"])
        pair, which, shared = np.unique(
            np.repeat(text, count) * number + items[place], return_inverse=True, return_counts=True
        )
        often = np.bincount(which, np.repeat(times, count), len(pair)).astype(np.int64)
        return *np.divmod(pair, number), shared, often

    def _found(self, units: ngrams.Units, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(text, first place in `hashes`) of every n-gram of the texts that an item has too."""
        hashes, bitmap = self._arrays["hashes"], self._arrays["bitmap"]
        h, start = units.hashes(width)
        bit = (h >> np.uint64(_shift(bitmap))).view(np.int64)
        maybe = np.flatnonzero(bitmap.take(bit >> 3) & _BIT.take(bit & 7))
        maybe = maybe[np.argsort(h[maybe])]  # neighbours are looked up in the same pages: several times faster
        h = h[maybe]
        first = np.searchsorted(hashes, h)
        known = hashes[np.minimum(first, len(hashes) - 1)] == h
        return units.text[start[maybe[known]]].astype(np.int64), first[known]


def _shift(bitmap: NDArray[np.uint8]) -> int:
    return 64 - (8 * len(bitmap) - 1).bit_length()


def _index(hashes: NDArray[np.uint64], items: NDArray[np.int64], places: NDArray[np.uint32]) -> dict[str, Any]:
    """The arrays of an index but `files`, from n-grams and the items that have them [P] and the items' places."""
    order = np.lexsort((items, hashes))
    hashes, items = hashes[order], items[order]
    fresh = np.ones(len(hashes), bool)
    fresh[1:] = (hashes[1:] != hashes[:-1]) | (items[1:] != items[:-1])
    hashes, items = hashes[fresh], items[fresh]
    first = _first_of_its_kind(hashes, items, len(places))[items] == items
    hashes, items = hashes[first], items[first]
    _, which, count = np.unique(hashes, return_inverse=True, return_counts=True)
    common = count[which] > COMMON
    told = ~common | (np.bincount(items[common], minlength=len(places)) >= PASSAGE)[items]
    hashes, items = hashes[told], items[told]
    used, items = np.unique(items, return_inverse=True)
    bitmap = np.zeros(1 << max((_BITS_A_HASH * len(hashes) - 1).bit_length(), 6) >> 3, np.uint8)
    bit = (hashes >> np.uint64(_shift(bitmap))).view(np.int64)
    np.bitwise_or.at(bitmap, bit >> 3, _BIT[bit & 7])
    return {
        "hashes": hashes,
        "items": items.astype(np.uint32),
        "sizes": np.bincount(items, minlength=len(used)).astype(np.uint32),
        "file": places[used, 0],
        "line": places[used, 1],
        "bitmap": bitmap,
    }


def _first_of_its_kind(hashes: NDArray[np.uint64], items: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """For each item the first that has the same n-grams [number]: many questions on one passage are one item."""
    sums = np.zeros(number, np.uint64)
    np.add.at(sums, items, hashes)
    _, first, which = np.unique(sums, return_index=True, return_inverse=True)
    same: NDArray[np.int64] = first[which]
    return same


def _grams(items: Sequence[Sequence[str]]) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """(hash, item, width) [P] of the n-grams by which items are told, given the parts of each, the most telling first.

    A part counts where those before it have fewer than RUN n-grams. One that is not Chinese for the most part, such as
    an English passage below a Chinese instruction or a formula, is cut into the longer n-grams.
    """
    units = ngrams.units([*chain.from_iterable(items)])
    owner = np.repeat(np.arange(len(items)), [len(parts) for parts in items])
    chinese, start = units.hashes(CHINESE)
    counts = units.han_in(start, CHINESE) >= HAN
    chinese, part = chinese[counts], units.text[start[counts]]
    mostly = 2 * np.bincount(part, minlength=len(owner)) >= units.size - CHINESE + 1
    mostly |= units.size < OTHER
    chinese, part = chinese[mostly[part]], part[mostly[part]]
    other, start = units.hashes(OTHER)
    counts = ~mostly[units.text[start]]
    grams = np.concatenate([chinese, other[counts]])
    part = np.concatenate([part, units.text[start[counts]]])
    width = np.repeat([CHINESE, OTHER], [len(chinese), len(grams) - len(chinese)])
    before = np.zeros(len(owner) + 1, np.int64)
    np.cumsum(np.bincount(part, minlength=len(owner)), out=before[1:])
    first_part = np.searchsorted(owner, owner)
    used = (before[:-1] - before[first_part] < RUN)[part]
    return grams[used], owner[part[used]], width[used]


def _short_names(files: Sequence[str]) -> dict[str, str]:
    """file -> the shortest end of its path that no other has: its name, mostly."""
    names: dict[str, str] = {}
    depth = 1
    while len(names) < len(files):
        ends = {file: "/".join(Path(file).parts[-depth:]) for file in files}
        alone = Counter(ends.values())
        names |= {file: end for file, end in ends.items() if file not in names and alone[end] == 1}
        depth += 1
    return {file: names[file] for file in files}


Item = tuple[int, list[str]]  # line, parts


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    chars = 0
    for item in items:
        batch.append(item)
        chars += sum(map(len, item[1]))
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _items_of(file: str, where: str) -> Iterator[Item]:
    """The items of one file. UserError for what can't be read: an item left out would be left in the training data."""
    try:
        spans = read.spans_of(Path(file), "auto", 1 << 62)
        before: Counter[str] = Counter()  # lines of earlier spans of the same file
        for span in spans:
            for record in read.records(span, "auto"):
                line = before[span.name] + record.line
                if isinstance(record, read.Bad):
                    raise UserError(f"{where}: {span.name}:{line}: {record.cause}: {record.detail}; mend the file")
                for parts in _parts_of(record.value):
                    yield line, parts
            if len(spans) > 1:
                before[span.name] += read.lines_in(span)
    except OSError as e:
        raise UserError(f"{where}: {file}: can't be read: {e.strerror}") from None


_PASSAGE = ("passage", "context", "article", "text", "content", "background")
_QUESTION = ("question", "Question", "questions", "query", "stem", "prompt")
_OPTIONS = ("options", "choices", "choice", "endings", *"ABCDEFGHIJ")


def _parts_of(record: Any) -> list[list[str]]:
    """The items of one record, each as parts, the most telling first.

    Of a question on a passage the question itself is left out: thousands ask what the passage says, in the same words.
    """
    if isinstance(record, list) and record and all(isinstance(cell, str) for cell in record):  # CSV without a header
        return [record]
    if sources.recognise(record) == "c3":
        return [
            ["\n".join(_strings(record[0])), *_strings([q.get("choice") for q in record[1] if isinstance(q, Mapping)])]
        ]
    if isinstance(record, Mapping) and (options := _values(record, _OPTIONS)):
        return [[*(_values(record, _PASSAGE) or _values(record, _QUESTION)), *options]]
    try:
        examples = sources.examples_of(record, sources.Reading(instruction=("",)))
    except sources.Drop:  # a question without its answer, or a layout of its own
        return [_strings(record)]
    return [
        [example.text]
        if isinstance(example, Text)
        else [text for role in ("user", "assistant") for who, text in example.messages if who == role]
        for example in examples
    ]


def _values(record: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [text for key in keys for text in _strings(record.get(key)) if text.strip()]


def _strings(value: Any) -> list[str]:
    """All strings in a JSON value, in its order."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [text for part in inner for text in _strings(part)]
