"""`panda data prepare`: corpora -> packed token shards. Outside torch.distributed, in parallel, resumable.

Corpus files become parts (tokenize.py), in any number of processes (workers.py); the parts become rows (assemble.py).
The result is the same bytes whatever the number of workers and however often it was killed.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pandallm import config, files, log, prompt
from pandallm import tokenizer as tokenizers
from pandallm.config import UserError
from pandallm.data import account, assemble, decontaminate, read, shards, tokenize, workers
from pandallm.data.account import PartCounts, Places, SourceCount
from pandallm.data.settings import PrepareConfig
from pandallm.data.tokenize import Job
from pandallm.model.names import resolve

ROWS = ("rows.documents.bin", "rows.sizes.bin")
MADE = (*ROWS, "tokenizer", "items.bin", "items.json", "report.json", "manifest.json")  # beside parts/, which is first
_PART = re.compile(r".+-\d{5}\.[\w.]+")  # a file in its parts/
WORTH_KEEPING = 64 << 20  # bytes of corpora from which the parts of a run that failed stay for the next


def run(path: str, overrides: list[str], ray: str | None = None) -> dict[str, Any]:
    """Prepares the shards a config asks for; returns their manifest. A finished run is found and left alone.

    `ray`: address of a Ray cluster whose nodes see the same files and `out`; None for processes of this machine.
    """
    conf = config.load(PrepareConfig, path, overrides)
    out = Path(conf.out)
    corpus = {s.name: read.files_of(Path(s.path), f"{path}: source {s.name}") for s in conf.sources}
    items = [str(f) for p in conf.decontaminate for f in read.files_of(Path(p), f"{path}: decontaminate")]
    _check_out(out, corpus)
    tokenizer = _tokenizer(conf)
    items_key = files.hash_json([decontaminate.RULES, [[item, *files.stamp(Path(item))] for item in items]])
    jobs = _jobs(conf, corpus, tokenizer, items_key if items else "")
    fingerprint = files.hash_json(
        [conf.model_dump(exclude={"workers"}), [[job.name, job.fingerprint()] for job in jobs]]
    )
    if manifest := _finished(out, fingerprint):
        log.say(f"{out}: prepared already: {manifest['rows']} rows, {manifest['trained_tokens']} trained tokens")
        return manifest
    try:
        (out / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}: out: {out} can't be made: {e.strerror}") from None
    (out / "manifest.json").unlink(missing_ok=True)  # until the new one: nobody trains on half of each
    try:
        _save_tools(out, tokenizer, items, items_key, path)
        done = workers.run_all(jobs, conf.workers, ray, lambda done: account.check_source(conf, jobs, done))
        places = Places(jobs, done)
        counts = account.count(conf, jobs, done, places)
        rows = assemble.assemble(conf, jobs, counts, places, tokenizer)
    except UserError:
        _remove_failed(out, jobs)
        raise
    _remove_stale(out, {job.name for job in jobs})
    files.write_json(out / "report.json", account.report(jobs, done, counts, places))
    manifest = _manifest(conf, jobs, done, counts, rows, places)
    manifest |= {"tokenizer_hash": jobs[0].tokenizer_hash, "fingerprint": fingerprint}
    files.write_json(out / "manifest.json", manifest)
    _say(out, manifest)
    return manifest


def _check_out(out: Path, corpus: dict[str, list[Path]]) -> None:
    """Raises UserError where something else than shards is where they would come, or a corpus is there: nothing of that
    may be touched."""
    for name, paths in corpus.items():
        inside = [path for path in paths if path.resolve().is_relative_to(out.resolve())]
        if inside:
            raise UserError(
                f"source {name}: {inside[0]} lies in out ({out}), with what is made there; choose another out"
            )
    if not out.is_dir():
        return
    parts, manifest = out / "parts", out / "manifest.json"
    if parts.is_dir():
        odd = [path for path in parts.iterdir() if not (path.is_file() and _PART.fullmatch(path.name))]
    else:
        odd = [path for path in out.iterdir() if path.name in MADE]
    if manifest.exists() and not shards.is_manifest(manifest):
        odd.append(manifest)
    if odd:
        raise UserError(f"out: {out} holds {odd[0].relative_to(out)}, which is not of shards; choose another folder")


def _is_ours_unfinished(path: Path) -> bool:
    return path.name.endswith(files.TEMPORARY) and path.name.startswith(MADE)


def _tokenizer(conf: PrepareConfig) -> PreTrainedTokenizerBase:
    tokenizer = tokenizers.load(resolve(conf.tokenizer))
    if conf.pad_token:
        tokenizers.add_pad(tokenizer, conf.pad_token)
    prompt.set_format(tokenizer, conf.chat_format)
    return tokenizer


def _finished(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """The manifest of whole shards made from just this, if `out` holds them."""
    try:
        manifest = shards.Shards(out).manifest
    except UserError:
        return None
    return manifest if manifest.get("fingerprint") == fingerprint else None


def _jobs(
    conf: PrepareConfig, corpus: dict[str, list[Path]], tokenizer: PreTrainedTokenizerBase, items_hash: str
) -> list[Job]:
    tokenizer_hash = tokenizers.fingerprint(tokenizer)
    vocab_size = 1 + max(tokenizer.get_vocab().values())  # numbers may be left out: more than there are tokens
    jobs = []
    for source in conf.sources:
        reading = source.reading(conf.seed)
        limit = tokenize.part_bytes(sum(path.stat().st_size for path in corpus[source.name]))
        spans = (
            span for path in corpus[source.name] for span in read.spans_of(path, reading.layout, limit, source.encoding)
        )
        for number, group in enumerate(tokenize.groups(spans, limit)):
            job = Job(
                name=f"{source.name}-{number:05d}",
                source=source.name,
                spans=group,
                reading=reading,
                clean=conf.clean,
                near=conf.dedup.near,
                items_hash=items_hash,
                tokenizer_hash=tokenizer_hash,
                eos=str(tokenizer.eos_token),
                vocab_size=vocab_size,
                seq_len=conf.seq_len,
                out=conf.out,
            )
            jobs.append(job)
    return jobs


def _save_tools(out: Path, tokenizer: PreTrainedTokenizerBase, items: list[str], items_key: str, where: str) -> None:
    """Writes what the workers load, where it isn't there yet."""
    folder = tokenize.tokenizer_folder(out)
    if not folder.exists() or tokenizers.fingerprint(tokenizers.reload(folder)) != tokenizers.fingerprint(tokenizer):
        with files.atomic_dir(folder) as tmp:
            tokenizer.save_pretrained(str(tmp))
    index = tokenize.items_file(out)
    key = index.with_suffix(".json")
    if not items:
        index.unlink(missing_ok=True)
        key.unlink(missing_ok=True)
    elif not (index.exists() and key.exists() and files.read_json(key)["made_from"] == items_key):
        key.unlink(missing_ok=True)
        decontaminate.build(items, index, f"{where}: decontaminate")
        files.write_json(key, {"made_from": items_key, "files": items})


def _manifest(
    conf: PrepareConfig,
    jobs: list[Job],
    done: list[PartCounts],
    counts: dict[str, SourceCount],
    rows: int,
    places: Places,
) -> dict[str, Any]:
    out = Path(conf.out)
    hashes = {
        f"parts/{job.name}.{kind}.bin": d["hashes"][kind]
        for job, d in zip(jobs, done, strict=True)
        for kind in job.kinds()
    }
    hashes |= {name: files.hash_file(out / name) for name in (*ROWS, "report.json")}
    table = account.table(counts)
    tokens = sum(source["tokens"] for source in table)
    return {
        "format": shards.FORMAT,
        "rows": rows,
        "documents": sum(source["documents"] for source in table),
        "tokens": tokens,
        "trained_tokens": sum(source["trained_tokens"] for source in table),
        "utilisation": round(tokens / (rows * conf.seq_len), 6),
        "seq_len": conf.seq_len,
        "chat_format": conf.chat_format,
        "token_dtype": shards.token_dtype(jobs[0].vocab_size).str,
        "vocab_size": jobs[0].vocab_size,
        "sources": table,
        "parts": [
            {
                "name": job.name,
                "source": job.source,
                "files": [span.name for span in job.spans],
                "first_lines": places.first_lines[job.name],
            }
            for job in jobs
        ],
        "config": conf.model_dump(exclude={"workers"}),
        "files": hashes,
        "sizes": {name: (out / name).stat().st_size for name in hashes},
    }


def _remove_stale(out: Path, keep: set[str]) -> None:
    """Removes parts that the config no longer asks for and what killed runs left half written."""
    for path in (out / "parts").iterdir():
        if path.name.split(".")[0] not in keep or path.name.endswith(files.TEMPORARY):
            path.unlink()
    for path in filter(_is_ours_unfinished, list(out.iterdir())):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove_failed(out: Path, jobs: list[Job]) -> None:
    """After a user's mistake nothing is left behind, except parts that took long to make: they are whole, and the next
    try begins with those whose corpora didn't change."""
    _remove_stale(out, {job.name for job in jobs if job.state.exists()})
    if sum(span.size for job in jobs for span in job.spans) >= WORTH_KEEPING:
        log.say(f"{out}: the parts made so far stay there, so that the same command goes on from them")
        return
    shutil.rmtree(tokenize.tokenizer_folder(out), ignore_errors=True)
    index = tokenize.items_file(out)
    for path in (*(out / name for name in (*ROWS, "report.json")), index, index.with_suffix(".json")):
        path.unlink(missing_ok=True)
    shutil.rmtree(out / "parts")  # last: without it, the others would be somebody else's
    if not any(out.iterdir()):
        out.rmdir()


def _say(out: Path, manifest: dict[str, Any]) -> None:
    for s in manifest["sources"]:
        dropped = ", ".join(f"{cause} {n}" for cause, n in s["dropped"].items()) or "none"
        log.say(
            f"{s['name']}: {s['read']} records read, {s['kept']} kept (dropped: {dropped}); {s['documents']} documents,"
            f" {s['tokens']} tokens, {s['trained_tokens']} trained, {100 * s['share']:.1f} % of the mixture"
        )
    log.say(
        f"{out}: {manifest['rows']} rows of {manifest['seq_len']}, {100 * manifest['utilisation']:.1f} % used,"
        f" {manifest['trained_tokens']} trained tokens; see them: panda data stats {out}"
    )
