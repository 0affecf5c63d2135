"""`panda data prepare`: corpora -> packed token shards. Outside torch.distributed, in parallel, resumable.

Each corpus file becomes a part (small ones some together; tokenize.py); then duplicates are left out, sources mixed
and documents packed, which needs only their lengths. The result is the same bytes whatever the number of workers and
however often it was killed.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from transformers import PreTrainedTokenizerBase

from pandallm import config, files, log, prompt
from pandallm import tokenizer as tokenizers
from pandallm.config import Config, UserError
from pandallm.data import mix, pack, read, shards, sources, tokenize
from pandallm.model.load import resolve


class Source(Config):
    """One corpus of the mixture."""

    name: str
    path: str  # a file, or a folder whose files are all read
    format: str = "auto"  # a name of sources.LAYOUTS
    instruction: str | list[str] = []  # replaces the corpus's fixed one; of several, one is drawn a record
    epochs: float | None = Field(None, ge=0)
    weight: float | None = Field(None, gt=0, le=1)  # share of the trained tokens

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not re.fullmatch(r"[\w-]+", value):
            raise ValueError("letters, digits, _ and - only: it names files")
        return value

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        if value != "auto" and value not in sources.LAYOUTS:
            raise ValueError(f"not one of auto, {', '.join(sources.LAYOUTS)}")
        return value

    @model_validator(mode="after")
    def _one_amount(self) -> Source:
        if self.epochs is not None and self.weight is not None:
            raise ValueError("give epochs or weight, not both")
        return self


class Clean(Config):
    script: Literal["keep"] = "keep"


class Dedup(Config):
    exact: bool = True  # over all sources, white space aside; the first of the config's order stays
    near: Literal[False] = False


class PrepareConfig(Config):
    """A mixture: what `panda data prepare` reads."""

    tokenizer: str
    chat_format: prompt.ChatFormat = "chatml"
    pad_token: str | None = None  # added where the tokenizer has no pad token, as the original did
    seq_len: int = Field(2048, ge=8)
    packing: Literal["best_fit", "none"] = "best_fit"
    out: str
    seed: int = 42
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    max_bad: float = Field(0.01, ge=0, le=1)  # share of a source's records that may be unreadable
    sources: list[Source] = Field(min_length=1)
    clean: Clean = Clean()
    dedup: Dedup = Dedup()
    decontaminate: list[str] = Field([], max_length=0)

    @field_validator("sources")
    @classmethod
    def _names_differ(cls, value: list[Source]) -> list[Source]:
        twice = [name for name, n in Counter(source.name for source in value).items() if n > 1]
        if twice:
            raise ValueError(f"two sources are called '{twice[0]}'")
        return value

    @field_validator("sources")
    @classmethod
    def _weights_leave_room(cls, value: list[Source]) -> list[Source]:
        weights = [source.weight for source in value if source.weight is not None]
        if len(weights) < len(value) and sum(weights) > 1 - 1e-6:
            raise ValueError("the weights add up to 1 or more, which leaves nothing for the sources with epochs")
        return value


def run(path: str, overrides: list[str]) -> dict[str, Any]:
    """Prepares the shards a config asks for; returns their manifest. A finished run is found and left alone."""
    conf = config.load(PrepareConfig, path, overrides)
    out = Path(conf.out)
    corpus = [(source, read.files_of(Path(source.path), f"{path}: source {source.name}")) for source in conf.sources]
    tokenizer = tokenizers.load(resolve(conf.tokenizer))
    if conf.pad_token:
        tokenizers.add_pad(tokenizer, conf.pad_token)
    prompt.set_format(tokenizer, conf.chat_format)
    jobs = _jobs(conf, corpus, tokenizer)
    fingerprint = files.hash_json([conf.model_dump(exclude={"workers"}), [job.fingerprint() for job in jobs]])
    if manifest := _finished(out, fingerprint):
        log.say(f"{out}: prepared already: {manifest['rows']} rows, {manifest['trained_tokens']} trained tokens")
        return manifest
    try:
        (out / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}: out: {out} can't be made: {e.strerror}") from None
    (out / "manifest.json").unlink(missing_ok=True)  # until the new one: nobody trains on half of each
    done = tokenize.run_all(jobs, conf.workers, conf.pad_token)
    try:
        counts = _count(conf, jobs, done)
        manifest = _assemble(conf, jobs, done, counts)
    except UserError:
        _remove(out, keep=set())
        raise
    _remove(out, keep={job.name for job in jobs})
    manifest |= {"tokenizer_hash": jobs[0].tokenizer_hash, "fingerprint": fingerprint}
    files.write_json(out / "manifest.json", manifest)
    _report(out, manifest)
    return manifest


def _finished(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """The manifest of whole shards made from just this, if `out` holds them."""
    try:
        manifest = shards.Shards(out).manifest
    except UserError:
        return None
    return manifest if manifest.get("fingerprint") == fingerprint else None


def _jobs(
    conf: PrepareConfig, corpus: list[tuple[Source, list[Path]]], tokenizer: PreTrainedTokenizerBase
) -> list[tokenize.Job]:
    tokenizer_hash = tokenizers.fingerprint(tokenizer)
    vocab_size = 1 + max(tokenizer.get_vocab().values())  # numbers may be left out: more than there are tokens
    jobs = []
    for source, paths in corpus:
        phrasings = (source.instruction,) if isinstance(source.instruction, str) else tuple(source.instruction)
        for number, group in enumerate(tokenize.groups(paths)):
            job = tokenize.Job(
                name=f"{source.name}-{number:05d}",
                source=source.name,
                files=tuple(map(str, group)),
                layout=source.format,
                instruction=phrasings,
                tokenizer=conf.tokenizer,
                tokenizer_hash=tokenizer_hash,
                eos=str(tokenizer.eos_token),
                chat_format=conf.chat_format,
                vocab_size=vocab_size,
                seq_len=conf.seq_len,
                seed=conf.seed if len(phrasings) > 1 else 0,  # nothing else in a part is random
                out=conf.out,
            )
            jobs.append(job)
    return jobs


def _count(conf: PrepareConfig, jobs: list[tokenize.Job], done: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Counts of each source. UserError when more of it than `max_bad` could not be read."""
    counts: dict[str, dict[str, Any]] = {}
    for source in conf.sources:
        mine = [d for job, d in zip(jobs, done, strict=True) if job.source == source.name]
        read_ = sum(d["read"] for d in mine)
        dropped: Counter[str] = sum((Counter(d["dropped"]) for d in mine), Counter())
        notes: Counter[str] = sum((Counter(d["notes"]) for d in mine), Counter())
        bad = sum(dropped[cause] for cause in sources.BAD)
        shown = [line for d in mine for line in d["bad"]][: tokenize.SHOWN]
        if bad > conf.max_bad * read_:
            raise UserError(
                f"{shown[0]} ({bad} of {read_} records of {source.name} are bad; max_bad is {conf.max_bad})"
            )
        for line in shown:
            log.warn(line)
        counts[source.name] = {"read": read_, "dropped": dropped, "notes": notes}
    return counts


def _assemble(
    conf: PrepareConfig,
    jobs: list[tokenize.Job],
    done: list[dict[str, Any]],
    counts: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Leaves out duplicates, mixes, packs, and writes the rows; returns the manifest."""
    out = Path(conf.out)
    documents = [np.fromfile(out / f"parts/{job.name}.documents.bin", shards.DOCUMENT) for job in jobs]
    records = [np.fromfile(out / f"parts/{job.name}.records.bin", shards.RECORD) for job in jobs]
    keep = _first_occurrences(records) if conf.dedup.exact else [np.ones(len(r), bool) for r in records]
    for job, kept in zip(jobs, keep, strict=True):
        counts[job.source]["dropped"]["duplicate"] += int((~kept).sum())
    numbers, epochs = _mix(conf, jobs, documents, keep)
    if not len(numbers):
        dropped: Counter[str] = sum((count["dropped"] for count in counts.values()), Counter())
        raise UserError(f"{out}: nothing to train on: the corpora are empty (dropped: {dict(dropped) or 'nothing'})")
    everything = np.concatenate(documents)
    lengths = everything["length"][numbers]
    rows = pack.best_fit(lengths, conf.seq_len) if conf.packing == "best_fit" else [[i] for i in range(len(numbers))]
    row_documents = numbers[[i for row in rows for i in row]].astype("<u4")
    row_sizes = np.array([len(row) for row in rows], "<u4")
    for name, array in (("rows.documents.bin", row_documents), ("rows.sizes.bin", row_sizes)):
        with files.atomic_file(out / name) as tmp:
            array.tofile(tmp)
    table = _sources_table(conf, jobs, documents, numbers, counts, epochs)
    return _manifest(conf, jobs, done, table, len(rows), everything[numbers])


def _mix(
    conf: PrepareConfig, jobs: list[tokenize.Job], documents: list[NDArray[Any]], keep: list[NDArray[np.bool_]]
) -> tuple[NDArray[np.int64], dict[str, float]]:
    """Numbers of the documents to train on, shuffled, repeats included; and how often each source is seen."""
    # Trained tokens of each kept record of a source, over all its parts.
    sizes: dict[str, list[NDArray[np.int64]]] = {source.name: [] for source in conf.sources}
    for job, docs, kept in zip(jobs, documents, keep, strict=True):
        trained = np.bincount(docs["record"], docs["trained"], minlength=len(kept)).astype(np.int64)
        sizes[job.source].append(trained[kept])
    totals = [sum(int(part.sum()) for part in parts) for parts in sizes.values()]
    for source, total in zip(conf.sources, totals, strict=True):
        if source.weight and not total:
            raise UserError(f"source {source.name}: it can't have weight {source.weight}: it holds nothing to train on")
    given = [s.epochs if s.epochs is not None or s.weight is not None else 1.0 for s in conf.sources]
    epochs = dict(zip(sizes, mix.epochs_for(totals, [s.weight for s in conf.sources], given), strict=True))

    rng = np.random.default_rng(conf.seed)
    times: list[NDArray[np.int64]] = []  # a part each, in the jobs' order: how often each kept record is used
    for name, parts in sizes.items():
        drawn = mix.repeats(np.concatenate(parts), epochs[name], rng)
        times += np.split(drawn, np.cumsum([len(part) for part in parts])[:-1])
    chosen, first = [], 0
    for docs, kept, used in zip(documents, keep, times, strict=True):
        of_record = np.zeros(len(kept), np.int64)
        of_record[kept] = used
        chosen.append(np.repeat(np.arange(len(docs)), of_record[docs["record"]]) + first)
        first += len(docs)
    return rng.permutation(np.concatenate(chosen)), epochs


def _first_occurrences(records: list[NDArray[Any]]) -> list[NDArray[np.bool_]]:
    """For each part, which of its records is the first of its content, in the order of parts."""
    keys = np.concatenate([r["key"] for r in records])
    first = np.zeros(len(keys), bool)
    first[np.unique(keys, return_index=True)[1]] = True
    return np.split(first, np.cumsum([len(r) for r in records])[:-1])


def _sources_table(
    conf: PrepareConfig,
    jobs: list[tokenize.Job],
    documents: list[NDArray[Any]],
    numbers: NDArray[np.int64],
    counts: dict[str, dict[str, Any]],
    epochs: dict[str, float],
) -> list[dict[str, Any]]:
    """What each source gave: records read, kept, dropped by cause; documents, tokens and share in the rows."""
    ends = np.cumsum([len(d) for d in documents])
    part = np.searchsorted(ends, numbers, side="right")
    everything = np.concatenate(documents)
    whole = int(everything["trained"][numbers].sum())
    table = []
    for source in conf.sources:
        mine = numbers[np.isin(part, [i for i, job in enumerate(jobs) if job.source == source.name])]
        count = counts[source.name]
        dropped = {cause: n for cause, n in sorted(count["dropped"].items()) if n}
        trained = int(everything["trained"][mine].sum())
        table.append(
            {
                "name": source.name,
                "read": count["read"],
                "kept": count["read"] - sum(dropped.values()),
                "dropped": dropped,
                "changed": dict(sorted(count["notes"].items())),
                "epochs": round(epochs[source.name], 6),
                "documents": len(mine),
                "tokens": int(everything["length"][mine].sum()),
                "trained_tokens": trained,
                "share": round(trained / whole, 6) if whole else 0.0,
            }
        )
    return table


def _manifest(
    conf: PrepareConfig,
    jobs: list[tokenize.Job],
    done: list[dict[str, Any]],
    table: list[dict[str, Any]],
    n_rows: int,
    used: NDArray[Any],
) -> dict[str, Any]:
    out = Path(conf.out)
    tokens = int(used["length"].sum())
    hashes = {
        f"parts/{j.name}.{kind}.bin": d["hashes"][kind]
        for j, d in zip(jobs, done, strict=True)
        for kind in tokenize.KINDS
    }
    hashes |= {name: files.hash_file(out / name) for name in ("rows.documents.bin", "rows.sizes.bin")}
    return {
        "format": shards.FORMAT,
        "rows": n_rows,
        "documents": len(used),
        "tokens": tokens,
        "trained_tokens": int(used["trained"].sum()),
        "utilisation": round(tokens / (n_rows * conf.seq_len), 6),
        "seq_len": conf.seq_len,
        "chat_format": conf.chat_format,
        "token_dtype": shards.token_dtype(jobs[0].vocab_size).str,
        "vocab_size": jobs[0].vocab_size,
        "sources": table,
        "parts": [{"name": job.name, "source": job.source, "files": list(job.files)} for job in jobs],
        "config": conf.model_dump(exclude={"workers"}),
        "files": hashes,
        "sizes": {name: (out / name).stat().st_size for name in hashes},
    }


def _remove(out: Path, keep: set[str]) -> None:
    """Removes parts that the config no longer asks for and what killed runs left half written; with none kept, all
    that a failed run wrote."""
    for path in (out / "parts").iterdir():
        if path.name.split(".")[0] not in keep or path.name.endswith(files.TEMPORARY):
            path.unlink()
    for path in out.glob(f"*{files.TEMPORARY}"):
        path.unlink()
    if not keep:
        for name in ("rows.documents.bin", "rows.sizes.bin"):
            (out / name).unlink(missing_ok=True)
        for folder in (out / "parts", out):
            if not any(folder.iterdir()):
                folder.rmdir()


def _report(out: Path, manifest: dict[str, Any]) -> None:
    for s in manifest["sources"]:
        dropped = ", ".join(f"{cause} {n}" for cause, n in s["dropped"].items()) or "none"
        log.say(
            f"{s['name']}: {s['read']} records read, {s['kept']} kept (dropped: {dropped}); {s['documents']} documents,"
            f" {s['tokens']} tokens, {s['trained_tokens']} trained, {100 * s['share']:.1f} % of the mixture"
        )
    log.say(
        f"{out}: {manifest['rows']} rows of {manifest['seq_len']}, {100 * manifest['utilisation']:.1f} % used,"
        f" {manifest['trained_tokens']} trained tokens"
    )
