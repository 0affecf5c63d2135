"""Corpus files -> the parts of the shards, in worker processes; each part appears whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import reprlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from blake3 import blake3
from transformers import PreTrainedTokenizerBase

from pandallm import files, log, prompt
from pandallm import tokenizer as tokenizers
from pandallm.data import read, shards, sources
from pandallm.model.load import resolve
from pandallm.prompt import Dialogue, Example, Rendered, Text

BATCH = 256  # records rendered at once
SAY_EVERY = 10.0  # seconds between two lines of progress
SHOWN = 5  # bad records shown of each file
PART_BYTES = 64 << 20  # small files make a part together until it is this large: thousands of parts can't all be open
PROCESSES_PAY = 4_000_000  # bytes of corpora below which starting processes takes longer than the work
KINDS = ("tokens", "mask", "documents", "records")


@dataclass(frozen=True)
class Job:
    """All that a part is made from; `fingerprint` names the result."""

    name: str
    source: str
    files: tuple[str, ...]  # one, or many small ones
    layout: str
    instruction: tuple[str, ...]
    tokenizer: str
    tokenizer_hash: str
    eos: str  # chosen in the tokenizer's settings, which its hash doesn't cover
    chat_format: str
    vocab_size: int
    seq_len: int
    seed: int
    out: str

    def fingerprint(self) -> str:
        stats = [Path(file).stat() for file in self.files]
        made_from = {k: v for k, v in vars(self).items() if k != "out"}
        return files.hash_json([shards.FORMAT, made_from, [(s.st_size, s.st_mtime_ns) for s in stats]])


def groups(paths: list[Path]) -> Iterator[list[Path]]:
    """The files of a source, in order, by PART_BYTES; a larger one stands alone."""
    group: list[Path] = []
    size = 0
    for path in paths:
        size += path.stat().st_size
        if group and size > PART_BYTES:
            yield group
            group, size = [], path.stat().st_size
        group.append(path)
    yield group


_worker: dict[str, Any] = {}  # the tokenizer of a worker process


def _start_worker(name: str, chat_format: str, pad_token: str | None) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    if multiprocessing.parent_process():
        threading.Thread(target=_end_with_parent, daemon=True).start()
    tokenizer = tokenizers.load(resolve(name))
    if pad_token:
        tokenizers.add_pad(tokenizer, pad_token)
    tokenizer.chat_template = prompt.template(chat_format, tokenizer)
    _worker["tokenizer"] = tokenizer


def _end_with_parent() -> None:
    """A worker whose parent was killed must not go on: the next run writes the same files."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _work(job: Job) -> dict[str, Any]:
    return run(job, _worker["tokenizer"])


def run_all(jobs: list[Job], workers: int, pad_token: str | None) -> list[dict[str, Any]]:
    """Makes the parts, in processes where that pays; results in the jobs' order."""
    start = partial(_start_worker, jobs[0].tokenizer, jobs[0].chat_format, pad_token)
    workers = min(workers, len(jobs))
    if workers == 1 or sum(Path(file).stat().st_size for job in jobs for file in job.files) < PROCESSES_PAY:
        start()
        return _gather(map(_work, jobs), jobs)
    context = multiprocessing.get_context("spawn")  # a forked tokenizer with threads may hang
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start) as pool:
        return _gather(pool.map(_work, jobs), jobs)


def _gather(results: Iterator[dict[str, Any]], jobs: list[Job]) -> list[dict[str, Any]]:
    """The results in order, with a line now and then for who waits."""
    done: list[dict[str, Any]] = []
    last = time.monotonic()
    for result in results:
        done.append(result)
        if time.monotonic() - last >= SAY_EVERY:
            last = time.monotonic()
            log.say(f"{jobs[0].out}: {len(done)} of {len(jobs)} parts, {sum(d['read'] for d in done)} records")
    return done


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
    with ExitStack() as stack:
        part.out = {kind: stack.enter_context(_written(folder / f"{job.name}.{kind}.bin")) for kind in KINDS}
        for batch in _batched(job, part):
            part.add(batch, prompt.render(tokenizer, [example for _, _, examples in batch for example in examples]))
    paths = {kind: folder / f"{job.name}.{kind}.bin" for kind in KINDS}
    done = {
        "fingerprint": fingerprint,
        "read": part.read,
        "dropped": dict(sorted(part.dropped.items())),
        "notes": {note: n for note, n in sorted(part.notes.items()) if n},
        "bad": part.bad,
        "sizes": {kind: path.stat().st_size for kind, path in paths.items()},
        "hashes": {kind: files.hash_file(path) for kind, path in paths.items()},
    }
    files.write_json(state, done)
    return done


@contextmanager
def _written(path: Path) -> Iterator[IO[bytes]]:
    with files.atomic_file(path) as tmp, open(tmp, "wb") as f:
        yield f


Batch = list[tuple[int, int, list[Example]]]  # (number of the file, line, examples of the record)


def _batched(job: Job, part: _Part) -> Iterator[Batch]:
    batch: Batch = []
    for number, file in enumerate(job.files):
        for item in read.records(Path(file), as_text=job.layout == "text"):
            part.read += 1
            if isinstance(item, read.Bad):
                part.drop(item.cause, f"{file}:{item.line}", item.detail)
                continue
            try:
                examples = sources.examples_of(item.value, job.layout, job.instruction, job.seed)
            except sources.Drop as e:
                part.drop(str(e), f"{file}:{item.line}", reprlib.repr(item.value))
                continue
            batch.append((number, item.line, examples))
            if len(batch) == BATCH:
                yield batch
                batch = []
    yield batch


class _Part:
    """A part while it is made."""

    out: dict[str, IO[bytes]]  # its files

    def __init__(self, job: Job) -> None:
        self.job = job
        self.read = 0
        self.dropped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()  # what was changed, not dropped
        self.bad: list[str] = []
        self._dtype = shards.token_dtype(job.vocab_size)
        self._tokens = self._records = 0  # written so far

    def drop(self, cause: str, place: str, detail: str) -> None:
        self.dropped[cause] += 1
        if cause in sources.BAD and len(self.bad) < SHOWN:
            self.bad.append(f"{place}: {cause}: {detail}")

    def add(self, batch: Batch, rendered: list[Rendered]) -> None:
        """Writes a batch's records."""
        todo = iter(rendered)
        pieces: list[Rendered] = []
        documents: list[tuple[int, int, int, int, int]] = []
        records: list[tuple[bytes, int, int]] = []
        for file, line, examples in batch:
            fitted = [self._fit(example, next(todo)) for example in examples]
            mine = [piece for some in fitted for piece in some]
            if not mine:
                self.drop("too_long", f"{self.job.files[file]}:{line}", "")  # a question that fills a row by itself
                continue
            self.notes["examples_too_long"] += sum(not some for some in fitted)  # others of the record fit
            for number, piece in enumerate(mine):
                length = len(piece.input_ids)
                documents.append((self._tokens, length, sum(piece.loss_mask), self._records + len(records), number))
                self._tokens += length
            pieces += mine
            records.append((_key(examples), file, line))
        self._records += len(records)
        arrays = {
            "tokens": np.array([i for piece in pieces for i in piece.input_ids], self._dtype),
            "mask": np.array([m for piece in pieces for m in piece.loss_mask], np.uint8),
            "documents": np.array(documents, shards.DOCUMENT),
            "records": np.array(records, shards.RECORD),
        }
        for kind, array in arrays.items():
            self.out[kind].write(array.tobytes())

    def _fit(self, example: Example, rendered: Rendered) -> list[Rendered]:
        """Pieces of at most seq_len tokens: a text is cut up, a dialogue loses its end; both are noted."""
        ids, mask, seq_len = rendered.input_ids, rendered.loss_mask, self.job.seq_len
        if len(ids) <= seq_len:
            pieces = [rendered]
        elif isinstance(example, Text):
            self.notes["texts_cut_up"] += 1
            edges = [*range(0, len(ids), seq_len), len(ids)]
            if edges[-1] - edges[-2] == 1:
                edges[-2] -= 1  # a piece of one token would train nothing
            pieces = [Rendered(ids[a:b], [False, *mask[a + 1 : b]]) for a, b in zip(edges, edges[1:], strict=False)]
        else:
            pieces = [Rendered(ids[:seq_len], mask[:seq_len])]
            self.notes["dialogues_shortened"] += any(pieces[0].loss_mask)
        return [piece for piece in pieces if any(piece.loss_mask)]


def _key(examples: list[Example]) -> bytes:
    """Hash of a record's content, white space aside: equal for exact duplicates, in whatever layout they came."""
    h = blake3()
    for example in examples:
        turns = example.messages if isinstance(example, Dialogue) else (("text", example.text),)
        for role, content in turns:
            h.update(f"{role}\0{' '.join(content.split())}\0".encode())
    # NumPy strips trailing zero bytes of S16; a key never ends in one.
    return h.digest(15) + b"\1"
