"""Corpus files -> one part of the shards: read, clean, check, render, cut, write; whole or not at all.

A part is a function of its Job alone, whichever process or machine makes it, so the shards' bytes don't depend on the
number of workers. Nothing here holds more than a batch of records, and nothing loads torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pandallm import files
from pandallm import tokenizer as tokenizers
from pandallm.data import cut, dedup, ngrams, read, shards, sources
from pandallm.data.clean import Clean, Cleaner
from pandallm.data.decontaminate import Items
from pandallm.prompt import Example, Rendered, Text

RULES = 2  # grows whenever the same records would give other parts
BATCH_RECORDS = 512  # records looked at and rendered at once; fewer where they are long
BATCH_CHARS = 1 << 17
SHOWN = 5  # dropped records kept as samples, of a part and cause
SAMPLE_CHARS = 300
HITS = 1000  # records of a part that are listed as touching evaluation items
PART_BYTES = (
    4 << 20,
    64 << 20,
)  # of corpora, at least and at most: small files make a part together, large ones are cut
PARTS = 64  # of a source, between these bounds: work for many processes, little to do again after a kill
KINDS = ("tokens", "mask", "documents", "records")


@dataclass(frozen=True)
class Job:
    """All that a part is made from; `fingerprint` names the result."""

    name: str
    source: str
    spans: tuple[read.Span, ...]  # of one large file, or many small files
    reading: sources.Reading
    clean: Clean
    near: bool  # sketches for near-duplicates too
    items_hash: str  # of the evaluation items to keep out; "" for none
    tokenizer_hash: str
    eos: str  # chosen in the tokenizer's settings, which its hash doesn't cover
    vocab_size: int
    seq_len: int
    out: str

    def kinds(self) -> tuple[str, ...]:
        return (*KINDS, "sketches") if self.near else KINDS

    def path(self, kind: str) -> Path:
        return Path(self.out) / "parts" / f"{self.name}.{kind}.bin"

    @property
    def state(self) -> Path:
        return Path(self.out) / "parts" / f"{self.name}.json"

    def fingerprint(self) -> str:
        made_from = {k: v for k, v in vars(self).items() if k != "out"}
        made_from |= {
            "spans": [(s.name, s.start, s.end, s.encoding, *files.stamp(Path(s.path))) for s in self.spans],
            "reading": vars(self.reading),
            "clean": self.clean.model_dump(),
        }
        return files.hash_json([shards.FORMAT, RULES, made_from])


def part_bytes(size: int) -> int:
    """How much of a source of `size` bytes makes a part. Workers have no say: the result must not depend on them."""
    return min(max(size // PARTS, PART_BYTES[0]), PART_BYTES[1])


def groups(spans: Iterator[read.Span], limit: int) -> Iterator[tuple[read.Span, ...]]:
    """The spans of a source, in order, by `limit` bytes; a larger one stands alone."""
    group: list[read.Span] = []
    size = 0
    for span in spans:
        size += span.size
        if group and size > limit:
            yield tuple(group)
            group, size = [], span.size
        group.append(span)
    if group:
        yield tuple(group)


def tokenizer_folder(out: Path) -> Path:
    """Where the shards keep their tokenizer, chat template included."""
    return out / "tokenizer"


def items_file(out: Path) -> Path:
    """Where the index of the evaluation items lies."""
    return out / "items.bin"


@lru_cache(maxsize=2)
def _tools(out: str, tokenizer_hash: str, items_hash: str) -> tuple[PreTrainedTokenizerBase, Items | None]:
    """What a process loads once: neither is cheap."""
    tokenizer = tokenizers.reload(tokenizer_folder(Path(out)))
    assert tokenizers.fingerprint(tokenizer) == tokenizer_hash, "the saved tokenizer is another"
    return tokenizer, Items.open(items_file(Path(out))) if items_hash else None


def found(job: Job, fingerprint: str) -> dict[str, Any] | None:
    """The counts of a part that is made already, or None."""
    if not job.state.exists():
        return None
    done: dict[str, Any] = files.read_json(job.state)
    if done["fingerprint"] == fingerprint and all(
        job.path(kind).exists() and job.path(kind).stat().st_size == done["sizes"][kind] for kind in job.kinds()
    ):
        return done
    job.state.unlink()  # before its files change: a state file always speaks of the files beside it
    return None


def run(job: Job) -> dict[str, Any]:
    """Makes one part, or finds it made; returns its counts (the part's JSON file)."""
    fingerprint = job.fingerprint()
    if done := found(job, fingerprint):
        return done
    part = _Part(job)
    with ExitStack() as stack:
        part.out = {kind: stack.enter_context(_written(job.path(kind))) for kind in job.kinds()}
        for batch in _batches(job, part):
            part.add(batch)
    done = {
        "fingerprint": fingerprint,
        "read": part.read,
        "lines": [read.lines_in(span) if span.part else 0 for span in job.spans],
        "dropped": dict(sorted(part.dropped.items())),
        "notes": {note: n for note, n in sorted(part.notes.items()) if n},
        "samples": part.samples,
        "hits": sorted(part.hits, key=lambda hit: -max(hit["item_share"], hit["text_share"]))[:HITS],
        "sizes": {kind: job.path(kind).stat().st_size for kind in job.kinds()},
        "hashes": {kind: files.hash_file(job.path(kind)) for kind in job.kinds()},
    }
    files.write_json(job.state, done)
    return done


@contextmanager
def _written(path: Path) -> Iterator[IO[bytes]]:
    with files.atomic_file(path) as tmp, open(tmp, "wb") as f:
        yield f


class _Record(NamedTuple):
    """A record on its way into a part."""

    span: int  # number within the job's
    line: int
    group: str
    examples: list[Example]


def _batches(job: Job, part: _Part) -> Iterator[list[_Record]]:
    cleaner = Cleaner(job.clean) if job.clean != Clean() else None
    batch: list[_Record] = []
    chars = 0
    for number, span in enumerate(job.spans):
        for item in read.records(span, job.reading.layout):
            part.read += 1
            if isinstance(item, read.Bad):
                part.drop(item.cause, number, item.line, item.detail)
                continue
            shown: Any = item.value
            try:
                group = sources.group_of(item.value, job.reading) if job.reading.by else ""
                examples = sources.examples_of(item.value, job.reading)
                if cleaner:
                    shown = examples
                    examples = [cleaner(example, part.notes) for example in examples]
            except sources.Drop as e:
                part.drop(str(e), number, item.line, shown)
                continue
            batch.append(_Record(number, item.line, group, examples))
            chars += sum(map(_chars, examples))
            if len(batch) == BATCH_RECORDS or chars >= BATCH_CHARS:
                yield batch
                batch, chars = [], 0
    if batch:
        yield batch


def _chars(example: Example) -> int:
    return len(example.text) if isinstance(example, Text) else sum(len(text) for _, text in example.messages)


class _Part:
    """A part while it is made."""

    out: dict[str, IO[bytes]]  # its files

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tokenizer, self.items = _tools(job.out, job.tokenizer_hash, job.items_hash)
        self.read = 0
        self.dropped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()  # what was changed, not dropped
        self.samples: list[dict[str, Any]] = []
        self.hits: list[dict[str, Any]] = []
        self._dtype = shards.token_dtype(job.vocab_size)
        self._tokens = self._records = 0  # written so far

    def drop(self, cause: str, span: int, line: int, value: Any, like: str = "") -> None:
        """Counts a record that is not used; the first of a cause stay as samples."""
        self.dropped[cause] += 1
        if self.dropped[cause] <= SHOWN:
            sample = {"cause": cause, "span": span, "line": line, "text": _shown(value)}
            self.samples.append(sample | ({"like": like} if like else {}))

    def add(self, batch: list[_Record]) -> None:
        """Writes what stays of a batch: no evaluation items, nothing that fits no row."""
        sketches = None
        if self.job.near or self.items:
            texts = [dedup.text_of(record.examples) for record in batch]
            units = ngrams.units([self._own(text) for text in texts])
            stays = self._check(batch, texts, units) if self.items else np.ones(len(batch), bool)
            if self.job.near:
                compared = [dedup.compared(record.examples) for record in batch]
                if compared != texts:
                    units = ngrams.units([self._own(text) for text in compared])
                sketches = dedup.sketches(units, len(batch))[stays]
            batch = [record for record, stay in zip(batch, stays, strict=True) if stay]
        examples = [example for record in batch for example in record.examples]
        pieces = iter(cut.pieces(self.tokenizer, examples, self.job.seq_len, self.notes))
        fitting = [self._fitting(record, pieces) for record in batch]
        self._write(batch, fitting)
        if sketches is not None:
            self.out["sketches"].write(sketches[[bool(some) for some in fitting]].tobytes())

    def _own(self, text: str) -> str:
        """A text without what all records of its layout say."""
        for phrase in sources.fixed_phrases(self.job.reading):
            text = text.replace(phrase, "")
        return text

    def _check(self, batch: list[_Record], texts: list[str], units: ngrams.Units) -> NDArray[np.bool_]:
        """Which records hold no evaluation item [records]; those that touch one are listed."""
        assert self.items
        stays = np.ones(len(batch), bool)
        for i, hit in enumerate(self.items.check(units, len(batch))):
            if hit is None:
                continue
            record, stays[i] = batch[i], not hit.contaminated
            about = {"item": hit.item, "item_share": round(hit.item_share, 4), "text_share": round(hit.text_share, 4)}
            place = {"span": record.span, "line": record.line, "text": texts[i][:SAMPLE_CHARS]}
            self.hits.append(place | about | {"dropped": hit.contaminated})
            if hit.contaminated:
                self.drop("contaminated", record.span, record.line, texts[i], hit.item)
        return stays

    def _fitting(self, record: _Record, pieces: Iterator[list[Rendered]]) -> list[Rendered]:
        """The next pieces, which are this record's; none where no example fits."""
        fitted = [next(pieces) for _ in record.examples]
        mine = [piece for some in fitted for piece in some]
        if not mine:  # a question that fills a row by itself
            self.drop("too_long", record.span, record.line, record.examples)
        elif not all(fitted):
            self.notes["examples_too_long"] += sum(not some for some in fitted)  # others of the record fit
        return mine

    def _write(self, batch: list[_Record], fitting: list[list[Rendered]]) -> None:
        documents: list[tuple[int, int, int, int, int]] = []
        records: list[tuple[bytes, int, int, int]] = []
        ranges: list[tuple[int, int]] = []  # trained tokens, counted from the batch's first
        base = self._tokens
        for record, mine in zip(batch, fitting, strict=True):
            row = self._records + len(records)
            for number, piece in enumerate(mine):
                length, trained = len(piece.input_ids), sum(end - first for first, end in piece.trained)
                documents.append((self._tokens, length, trained, row, number))
                ranges += [(self._tokens - base + first, self._tokens - base + end) for first, end in piece.trained]
                self._tokens += length
            if mine:
                records.append((dedup.key(record.examples), record.span, record.line, _group(record.group)))
        if not records:
            return
        self._records += len(records)
        mask = np.zeros(self._tokens - base, np.uint8)
        for first, end in ranges:
            mask[first:end] = 1
        ids = chain.from_iterable(piece.input_ids for mine in fitting for piece in mine)
        arrays = {
            "tokens": np.fromiter(ids, self._dtype, len(mask)),
            "mask": mask,
            "documents": np.array(documents, shards.DOCUMENT),
            "records": np.array(records, shards.RECORD),
        }
        for kind, array in arrays.items():
            self.out[kind].write(array.tobytes())


def _group(value: str) -> int:
    """A number for what a record is sampled by; 0 for nothing."""
    return int.from_bytes(blake3(value.encode()).digest(8), "little") | 1 if value else 0


def _shown(value: Any) -> str:
    """The beginning of a record, for people."""
    if isinstance(value, list) and value and isinstance(value[0], Example):
        value = dedup.text_of(value)
    return (value if isinstance(value, str) else repr(value))[:SAMPLE_CHARS]
