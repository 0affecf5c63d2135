"""One corpus file -> one part of the shards. Runs in worker processes; each part appears whole or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from transformers import PreTrainedTokenizerBase

from pandallm import files, prompt
from pandallm.data import read, shards, sources
from pandallm.prompt import Dialogue, Example, Rendered, Text

BATCH = 256  # records rendered at once
SHOWN = 5  # bad records shown of each file
KINDS = ("tokens", "mask", "documents", "records")


@dataclass(frozen=True)
class Job:
    """All that a part is made from; `fingerprint` names the result."""

    name: str
    source: str
    file: str
    layout: str
    instruction: tuple[str, ...]
    tokenizer: str
    tokenizer_hash: str
    chat_format: str
    vocab_size: int
    seq_len: int
    seed: int
    out: str

    def fingerprint(self) -> str:
        stat = Path(self.file).stat()
        made_from = {k: v for k, v in vars(self).items() if k != "out"}
        return files.hash_json([shards.FORMAT, made_from, stat.st_size, stat.st_mtime_ns])


def run(job: Job, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Makes one part, or finds it made; returns its counts (the part's JSON file)."""
    folder = Path(job.out) / "parts"
    state = folder / f"{job.name}.json"
    fingerprint = job.fingerprint()
    if state.exists():
        done: dict[str, Any] = files.read_json(state)
        sizes = {kind: folder / f"{job.name}.{kind}.bin" for kind in KINDS}
        if done["fingerprint"] == fingerprint and all(
            path.exists() and path.stat().st_size == done["sizes"][kind] for kind, path in sizes.items()
        ):
            return done
        state.unlink()  # before its files change: a state file always speaks of the files beside it
    part = _Part(job)
    for batch in _batched(job, part):
        part.add(batch, prompt.render(tokenizer, [example for _, examples in batch for example in examples]))
    arrays = part.arrays()
    for kind, array in arrays.items():
        with files.atomic_file(folder / f"{job.name}.{kind}.bin") as tmp:
            array.tofile(tmp)
    done = {
        "fingerprint": fingerprint,
        "read": part.read,
        "dropped": dict(sorted(part.dropped.items())),
        "notes": dict(sorted(part.notes.items())),
        "bad": part.bad,
        "sizes": {kind: array.nbytes for kind, array in arrays.items()},
        "hashes": {kind: files.hash_file(folder / f"{job.name}.{kind}.bin") for kind in KINDS},
    }
    files.write_json(state, done)
    return done


Batch = list[tuple[int, list[Example]]]  # (line, examples of the record)


def _batched(job: Job, part: _Part) -> Iterator[Batch]:
    batch: Batch = []
    for item in read.records(Path(job.file), as_text=job.layout == "text"):
        part.read += 1
        if isinstance(item, read.Bad):
            part.drop(item.cause, item.line, item.detail)
            continue
        try:
            batch.append((item.line, sources.examples_of(item.value, job.layout, job.instruction, job.seed)))
        except sources.Drop as e:
            part.drop(str(e), item.line, repr(item.value)[:80])
        if len(batch) == BATCH:
            yield batch
            batch = []
    yield batch


class _Part:
    """A part while it is made."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.read = 0
        self.dropped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()  # what was changed, not dropped
        self.bad: list[str] = []
        self._dtype = shards.token_dtype(job.vocab_size)
        self._tokens: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        self._documents: list[tuple[int, int, int, int, int]] = []
        self._records: list[tuple[bytes, int]] = []
        self._offset = 0

    def drop(self, cause: str, line: int, detail: str) -> None:
        self.dropped[cause] += 1
        if cause in sources.BAD and len(self.bad) < SHOWN:
            self.bad.append(f"{self.job.file}:{line}: {cause}: {detail}")

    def add(self, batch: Batch, rendered: list[Rendered]) -> None:
        position = 0
        for line, examples in batch:
            mine = rendered[position : position + len(examples)]
            position += len(examples)
            pieces = [piece for example, r in zip(examples, mine, strict=True) for piece in self._fit(example, r)]
            if not pieces:
                self.drop("too_long", line, "")  # a question that fills a row by itself
                continue
            for number, piece in enumerate(pieces):
                self._append(piece, len(self._records), number)
            self._records.append((_key(examples), line))

    def _fit(self, example: Example, rendered: Rendered) -> list[Rendered]:
        """Pieces of at most seq_len tokens: a text is cut up, a dialogue loses its end; both are noted."""
        ids, mask, seq_len = rendered.input_ids, rendered.loss_mask, self.job.seq_len
        if len(ids) <= seq_len:
            pieces = [rendered]
        elif isinstance(example, Text):
            self.notes["texts_cut_up"] += 1
            starts = range(0, len(ids), seq_len)
            pieces = [Rendered(ids[s : s + seq_len], [False, *mask[s + 1 : s + seq_len]]) for s in starts]
        else:
            pieces = [Rendered(ids[:seq_len], mask[:seq_len])]
            self.notes["dialogues_shortened"] += any(pieces[0].loss_mask)
        return [piece for piece in pieces if any(piece.loss_mask)]

    def _append(self, piece: Rendered, record: int, number: int) -> None:
        length = len(piece.input_ids)
        self._tokens.append(np.array(piece.input_ids, self._dtype))
        self._masks.append(np.array(piece.loss_mask, np.uint8))
        self._documents.append((self._offset, length, sum(piece.loss_mask), record, number))
        self._offset += length

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "tokens": np.concatenate([np.empty(0, self._dtype), *self._tokens]),
            "mask": np.concatenate([np.empty(0, np.uint8), *self._masks]),
            "documents": np.array(self._documents, shards.DOCUMENT),
            "records": np.array(self._records, shards.RECORD),
        }


def _key(examples: list[Example]) -> bytes:
    """Hash of a record's content, white space aside: equal for exact duplicates, in whatever layout they came."""
    h = blake3()
    for example in examples:
        turns = example.messages if isinstance(example, Dialogue) else (("text", example.text),)
        for role, content in turns:
            h.update(f"{role}\0{' '.join(content.split())}\0".encode())
    # NumPy strips trailing zero bytes of S16; a key never ends in one.
    return h.digest(15) + b"\1"
