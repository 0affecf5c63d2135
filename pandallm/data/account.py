"""What became of every record: read = kept + dropped by cause, with samples and their places, in the manifest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pandallm import log
from pandallm.config import UserError
from pandallm.data import sources
from pandallm.data.settings import PrepareConfig
from pandallm.data.tokenize import SHOWN, Job

PartCounts = dict[str, Any]  # a part's JSON file
Sample = dict[str, Any]  # {"file", "line", "text"}, and {"like"} for what repeats something
FATAL = ("broken_array",)  # causes by which more is lost than one record


@dataclass
class SourceCount:
    """What became of a source's records."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[Sample]] = field(default_factory=dict)  # by cause
    documents: int = 0  # in the rows, repeats included
    tokens: int = 0
    trained_tokens: int = 0
    epochs: float = 0.0
    repeats: int = 0  # how often its most used record is seen


class Places:
    """Where the records of parts stand: a part counts a file's lines from where its span begins."""

    def __init__(self, jobs: list[Job], done: list[PartCounts]) -> None:
        before: Counter[tuple[str, str]] = Counter()
        self._jobs = {job.name: job for job in jobs}
        self.first_lines: dict[str, list[int]] = {}  # by part, a number a span: lines of the file that come before it
        for job, d in zip(jobs, done, strict=False):
            first = self.first_lines[job.name] = []
            for span, lines in zip(job.spans, d["lines"], strict=True):
                first.append(before[job.source, span.name])
                before[job.source, span.name] += lines

    def of(self, part: str, span: int, line: int) -> Sample:
        return {"file": self._jobs[part].spans[span].name, "line": self.first_lines[part][span] + line}

    def sample(self, part: str, sample: dict[str, Any]) -> Sample:
        """A part's sample or hit, with its place in the file."""
        rest = {k: v for k, v in sample.items() if k not in ("cause", "span", "line")}
        return self.of(part, sample["span"], sample["line"]) | rest


def check_source(conf: PrepareConfig, jobs: list[Job], done: list[PartCounts]) -> None:
    """After each part: UserError when more of its source than `max_bad` could not be read, or can't have been by the
    end, at so many records a byte as so far."""
    name = jobs[len(done) - 1].source
    last = len(done) == len(jobs) or jobs[len(done)].source != name
    if not last and not any(done[-1]["dropped"].get(cause) for cause in sources.BAD):
        return
    sizes = [sum(span.size for span in job.spans) for job in jobs]
    mine = [i for i, job in enumerate(jobs) if job.source == name]
    finished = [i for i in mine if i < len(done)]
    read = sum(done[i]["read"] for i in finished)
    bad = sum(done[i]["dropped"].get(cause, 0) for i in finished for cause in sources.BAD)
    fatal = conf.max_bad < 1 and any(done[i]["dropped"].get(cause) for i in finished for cause in FATAL)
    expected = read * sum(sizes[i] for i in mine) / max(1, sum(sizes[i] for i in finished))
    if not bad or not (fatal or bad > conf.max_bad * expected):
        return
    causes, places = FATAL if fatal else sources.BAD, Places(jobs, done)
    job, first = next((jobs[i], s) for i in finished for s in done[i]["samples"] if s["cause"] in causes)
    place = places.sample(job.name, first)
    raise UserError(
        f"{place['file']}:{place['line']}: {first['cause']}: {' '.join(place['text'].split())[:200]}"
        f" ({bad} of {read} records of {name} are bad; max_bad is {conf.max_bad})"
    )


def count(conf: PrepareConfig, jobs: list[Job], done: list[PartCounts], places: Places) -> dict[str, SourceCount]:
    """Counts of each source so far; the first records that could not be read are shown."""
    counts = {source.name: SourceCount() for source in conf.sources}
    for job, d in zip(jobs, done, strict=True):
        mine = counts[job.source]
        mine.read += d["read"]
        mine.dropped.update(d["dropped"])
        mine.changed.update(d["notes"])
        for sample in d["samples"]:
            some = mine.samples.setdefault(sample["cause"], [])
            if len(some) < SHOWN:
                some.append(places.sample(job.name, sample))
    for mine in counts.values():
        bad = [(cause, sample) for cause in sources.BAD for sample in mine.samples.get(cause, [])]
        for cause, sample in bad[:SHOWN]:
            log.warn(f"{sample['file']}:{sample['line']}: {cause}: {' '.join(sample['text'].split())[:200]}")
    return counts


def report(jobs: list[Job], done: list[PartCounts], counts: dict[str, SourceCount], places: Places) -> dict[str, Any]:
    """Samples of what was dropped, by source and cause, and the records that touch evaluation items, worst first."""
    samples = {name: {cause: some for cause, some in sorted(c.samples.items()) if some} for name, c in counts.items()}
    hits: list[Sample] = [
        {"source": job.source} | places.sample(job.name, hit)
        for job, d in zip(jobs, done, strict=True)
        for hit in d["hits"]
    ]
    hits.sort(key=lambda hit: -max(hit["item_share"], hit["text_share"]))
    return {"samples": samples, "contamination": hits}


def table(counts: dict[str, SourceCount]) -> list[dict[str, Any]]:
    """What each source gave: records read, kept, dropped by cause; documents, tokens and share in the rows."""
    whole = sum(c.trained_tokens for c in counts.values())
    rows = []
    for name, c in counts.items():
        dropped = {cause: n for cause, n in sorted(c.dropped.items()) if n}
        row = {
            "name": name,
            "read": c.read,
            "kept": c.read - sum(dropped.values()),
            "dropped": dropped,
            "changed": {note: n for note, n in sorted(c.changed.items()) if n},
            "epochs": round(c.epochs, 6),
            "repeats": c.repeats,
            "documents": c.documents,
            "tokens": c.tokens,
            "trained_tokens": c.trained_tokens,
            "share": round(c.trained_tokens / whole, 6) if whole else 0.0,
        }
        rows.append(row)
    return rows
