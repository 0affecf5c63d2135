"""Parts -> rows: duplicates left out, samples drawn, sources mixed, documents packed. Needs their lengths only.

Holds some 40 bytes a record and 30 a document in the rows; the rest is read part by part.
N = records of all parts, in their order; R = those of one part.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pandallm import files
from pandallm.config import UserError
from pandallm.data import dedup, mix, pack, shards
from pandallm.data.account import Places, Sample, SourceCount
from pandallm.data.settings import PrepareConfig
from pandallm.data.tokenize import SAMPLE_CHARS, SHOWN, Job


def assemble(
    conf: PrepareConfig,
    jobs: list[Job],
    counts: dict[str, SourceCount],
    places: Places,
    tokenizer: PreTrainedTokenizerBase,
) -> int:
    """Writes rows.documents.bin and rows.sizes.bin, and completes `counts`; returns the number of rows. UserError if
    nothing is left to train on."""
    ends = np.cumsum([0, *(job.path("records").stat().st_size // shards.RECORD.itemsize for job in jobs)])
    samples = _Samples(jobs, ends, counts, places, tokenizer)
    keep = _without_duplicates(conf, jobs, ends, samples)
    _draw_samples(conf, jobs, ends, keep, counts)
    trained = _trained_tokens(jobs, ends)
    times = _times(conf, jobs, ends, keep, trained, counts)
    del keep, trained
    numbers, lengths = _documents(jobs, ends, times, counts)
    if not len(numbers):
        dropped: Counter[str] = sum((count.dropped for count in counts.values()), Counter())
        some = any(count.read > count.dropped.total() for count in counts.values())
        why = "epochs, weights and samples leave no text" if some else "the corpora are empty"
        raise UserError(f"{conf.out}: nothing to train on: {why} (dropped: {dict(dropped) or 'nothing'})")
    order = np.random.default_rng([conf.seed, 1]).permutation(len(numbers))
    numbers, lengths = numbers[order], lengths[order]
    del order
    packed = conf.packing == "best_fit"
    row_of = pack.best_fit(lengths, conf.seq_len) if packed else np.arange(len(numbers))
    out = Path(conf.out)
    sizes = np.bincount(row_of).astype("<u4")
    for name, array in (("rows.sizes.bin", sizes), ("rows.documents.bin", numbers[np.argsort(row_of, kind="stable")])):
        with files.atomic_file(out / name) as tmp:
            array.tofile(tmp)
    return len(sizes)


def _records(job: Job) -> NDArray[Any]:
    return np.fromfile(job.path("records"), shards.RECORD)


def _without_duplicates(
    conf: PrepareConfig, jobs: list[Job], ends: NDArray[np.int64], samples: _Samples
) -> NDArray[np.bool_]:
    """Which records are the first of their content, exactly or nearly [N]."""
    keep = np.ones(int(ends[-1]), bool)
    if conf.dedup.exact:
        keep = dedup.exact([shards.read_flat(job.path("records"), shards.RECORD)["key"] for job in jobs])
        samples.count("duplicate", ~keep, None)
    if conf.dedup.near:
        like = dedup.near([job.path("sketches") for job in jobs], np.diff(ends).tolist(), keep)
        samples.count("near_duplicate", like >= 0, like)
        keep &= like < 0
    return keep


@dataclass(frozen=True)
class _Samples:
    """Counts what is dropped after the parts are made, and keeps the first of each as samples."""

    jobs: list[Job]
    ends: NDArray[np.int64]  # [parts + 1] number of each part's first record
    counts: dict[str, SourceCount]
    places: Places
    tokenizer: PreTrainedTokenizerBase

    def count(self, cause: str, dropped: NDArray[np.bool_], like: NDArray[np.int64] | None) -> None:
        """`dropped` [N]; `like` [N]: the record that each repeats."""
        for i, job in enumerate(self.jobs):
            mine = np.flatnonzero(dropped[self.ends[i] : self.ends[i + 1]]) + self.ends[i]
            count = self.counts[job.source]
            count.dropped[cause] += len(mine)
            some = count.samples.setdefault(cause, [])
            for record in mine[: SHOWN - len(some)].tolist():
                of = {"like": self._sample(int(like[record]))["text"]} if like is not None else {}
                some.append(self._sample(record) | of)

    def _sample(self, record: int) -> Sample:
        """A record's place, and the beginning of its text as the tokens have it."""
        part = int(np.searchsorted(self.ends, record, side="right")) - 1
        job, number = self.jobs[part], record - int(self.ends[part])
        documents = shards.read_flat(job.path("documents"), shards.DOCUMENT)
        first = documents[int(np.searchsorted(documents["record"], number))]
        span = slice(int(first["offset"]), int(first["offset"]) + min(int(first["length"]), SAMPLE_CHARS))
        ids = shards.read_flat(job.path("tokens"), shards.token_dtype(job.vocab_size))[span].tolist()
        text = str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)).rstrip("\ufffd")[:SAMPLE_CHARS]
        at = shards.read_flat(job.path("records"), shards.RECORD)[number]
        return self.places.of(job.name, int(at["file"]), int(at["line"])) | {"text": text}


def _draw_samples(
    conf: PrepareConfig,
    jobs: list[Job],
    ends: NDArray[np.int64],
    keep: NDArray[np.bool_],
    counts: dict[str, SourceCount],
) -> None:
    """Takes the records that are not drawn out of `keep` [N], for sources with a `sample`."""
    for number, source in enumerate(conf.sources):
        if source.sample is None:
            continue
        mine = [i for i, job in enumerate(jobs) if job.source == source.name]
        where = np.concatenate([np.flatnonzero(keep[ends[i] : ends[i + 1]]) + ends[i] for i in mine])
        groups = np.concatenate([_records(jobs[i])["group"][keep[ends[i] : ends[i + 1]]] for i in mine])
        drawn = mix.sample(groups, source.sample, source.cap, np.random.default_rng([conf.seed, 2, number]))
        keep[where[~drawn]] = False
        counts[source.name].dropped["not_sampled"] += int((~drawn).sum())


def _trained_tokens(jobs: list[Job], ends: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Trained tokens of each record [N]."""
    trained = np.zeros(int(ends[-1]), np.uint32)
    for i, job in enumerate(jobs):
        documents = np.fromfile(job.path("documents"), shards.DOCUMENT)
        size = int(ends[i + 1] - ends[i])
        trained[ends[i] : ends[i + 1]] = np.bincount(documents["record"], documents["trained"], size)[:size]
    return trained


def _times(
    conf: PrepareConfig,
    jobs: list[Job],
    ends: NDArray[np.int64],
    keep: NDArray[np.bool_],
    trained: NDArray[np.uint32],
    counts: dict[str, SourceCount],
) -> NDArray[np.uint16]:
    """How often each record is used [N]."""
    of_source: dict[str, list[slice]] = {source.name: [] for source in conf.sources}
    for i, job in enumerate(jobs):
        of_source[job.source].append(slice(int(ends[i]), int(ends[i + 1])))
    totals = [sum(int(trained[at][keep[at]].sum(dtype=np.int64)) for at in of_source[s.name]) for s in conf.sources]
    for source, total in zip(conf.sources, totals, strict=True):
        if source.weight and not total:
            raise UserError(f"source {source.name}: it can't have weight {source.weight}: it holds nothing to train on")
    given = [s.epochs if s.epochs is not None or s.weight is not None else 1.0 for s in conf.sources]
    epochs = mix.epochs_for(totals, [s.weight for s in conf.sources], given)
    times = np.zeros(len(keep), np.uint16)
    for number, (source, passes) in enumerate(zip(conf.sources, epochs, strict=True)):
        counts[source.name].epochs = passes
        if passes >= np.iinfo(times.dtype).max:
            raise UserError(f"source {source.name}: {passes:.0f} passes over it; give it less weight or fewer epochs")
        where = np.concatenate([np.flatnonzero(keep[at]) + at.start for at in of_source[source.name]])
        times[where] = mix.repeats(trained[where], passes, np.random.default_rng([conf.seed, 3, number]))
        counts[source.name].repeats = int(times[where].max(initial=0))
    return times


def _documents(
    jobs: list[Job], ends: NDArray[np.int64], times: NDArray[np.uint16], counts: dict[str, SourceCount]
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """(number, length) of the documents to train on, repeats included, in the parts' order; and their counts."""
    numbers, lengths, first = [], [], 0
    for i, job in enumerate(jobs):
        documents = np.fromfile(job.path("documents"), shards.DOCUMENT)
        used = times[ends[i] : ends[i + 1]][documents["record"]]
        numbers.append(np.repeat(np.arange(first, first + len(documents), dtype="<u4"), used))
        lengths.append(np.repeat(documents["length"], used))
        first += len(documents)
        count = counts[job.source]
        count.documents += len(numbers[-1])
        count.tokens += int(lengths[-1].sum(dtype=np.int64))
        count.trained_tokens += int((documents["trained"] * used.astype(np.int64)).sum())
    return np.concatenate(numbers), np.concatenate(lengths)
