"""Data preparation, ours and the peers' in one run on the same text: speed; or our memory; or kills and worker counts.

.venv/bin/python benchmarks/data.py [--mb 60] [--trl PYTHON] [--llamafactory PYTHON]   speed
.venv/bin/python benchmarks/data.py --memory      peak memory at 1 GB and at 3 GB of corpora
.venv/bin/python benchmarks/data.py --kills 10    same bytes after kills and for 1, 2 and 4 workers

Needs the folder of real corpora (--data). The peers are run by the Python of an environment that has them:
pip install trl datasets; pip install llamafactory. What is printed are the figures for benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import platform
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import corpus
from watch import PANDA, kept, killed_after, last_json, manifest, peak_memory, timed, write_conf

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).resolve().parent / "peers"
MB = 1_000_000
KINDS = ("instruct", "raw")
# (ours, the other, what their ratio should be); a cleaned run is held against encoding alone too
RATIOS = (
    ("ours", "bare tokenizers", 0.8),
    ("ours, cleaned", "bare tokenizers", 0.5),
    ("ours", "TRL", 3.0),
    ("ours", "TRL, loss masks", 3.0),
    ("ours", "TRL, as its trainer", 3.0),
    ("ours", "LLaMA-Factory", None),
)


@dataclass(frozen=True)
class Row:
    """What one contender took for the whole corpus, and its rate without what it takes to start."""

    name: str
    tokens: int
    seconds: float
    slope: float  # tokens/s between a quarter of the corpus and the whole


Contender = Callable[[str, Path], tuple[int, float]]  # (kind, corpus) -> (tokens in the rows, seconds)


def ours(work: Path, data: Path, cleaning: bool) -> Contender:
    def run(kind: str, path: Path) -> tuple[int, float]:
        shutil.rmtree(work / "out", ignore_errors=True)
        seconds = timed([*PANDA, str(write_conf(work, {kind: path}, data, cleaning))], work / "ours.log")
        if cleaning:
            print(f"  {path.name}: {kept(work / 'out')}", flush=True)
        return manifest(work / "out")["tokens"], seconds

    return run


def bare(work: Path) -> Contender:
    def run(kind: str, path: Path) -> tuple[int, float]:
        command = [sys.executable, str(PEERS / "bare_tokenizers.py"), str(work / "tokenizer"), kind, str(path)]
        done = last_json(command, RAYON_NUM_THREADS="2", TOKENIZERS_PARALLELISM="true")
        return done["tokens"], done["seconds"]

    return run


def peer(python: str, script: str, work: Path, *options: str) -> Contender:
    """A script of benchmarks/peers run by the Python that has what it needs; nothing of a run before is found again."""

    def run(kind: str, path: Path) -> tuple[int, float]:
        out, cache = work / "peer-out", work / "peer-cache"
        for folder in (out, cache):
            shutil.rmtree(folder, ignore_errors=True)
        env = {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [python, str(PEERS / script)]
        making = [*command, str(work / "tokenizer"), kind, str(path), str(out), *options]
        seconds = timed(making, work / "peer.log", **env)
        done = last_json([*command, "count", str(out)], **env)
        print(f"  {path.name}: {done['rows']} rows by {done['versions']}", flush=True)
        return done["tokens"], seconds

    return run


def save_tokenizer(folder: Path) -> None:
    """The tokenizer with the chat template of our rows, for all contenders."""
    from pandallm import prompt, tokenizer
    from pandallm.model.names import resolve

    loaded = tokenizer.load(resolve("smollm2-135m"))
    prompt.set_format(loaded, "chatml")
    loaded.save_pretrained(folder)


def contenders(args: argparse.Namespace, kind: str) -> dict[str, Contender]:
    """By name; a peer without its environment is left out, and that is said."""
    found = {
        "bare tokenizers": bare(args.work),
        "ours": ours(args.work, args.data, False),
        "ours, cleaned": ours(args.work, args.data, True),
    }
    if args.trl:
        found["TRL"] = peer(args.trl, "trl_pack.py", args.work)
        if kind == "instruct":
            found["TRL, loss masks"] = peer(args.trl, "trl_pack.py", args.work, "--masks")
        found["TRL, as its trainer"] = peer(args.trl, "trl_pack.py", args.work, "--masks", "--one-by-one")
    else:
        print("  TRL: skipped, no --trl PYTHON")
    if args.llamafactory and kind == "instruct":
        found["LLaMA-Factory"] = peer(args.llamafactory, "llamafactory_pack.py", args.work)
    elif kind == "instruct":
        print("  LLaMA-Factory: skipped, no --llamafactory PYTHON")
    return found


def speed(args: argparse.Namespace) -> None:
    save_tokenizer(args.work / "tokenizer")
    for kind in KINDS:
        quarter, whole = (make_corpus(args, kind, mb) for mb in (args.mb / 4, args.mb))
        rows = {}
        for name, run in contenders(args, kind).items():
            tokens, seconds = best_of(args.repeats, run, kind, whole)
            fewer, less = best_of(args.repeats, run, kind, quarter)
            rows[name] = Row(name, tokens, seconds, (tokens - fewer) / max(seconds - less, 1e-9))
        print_table(f"{kind}, {args.mb:g} MB, 2 processes", rows)


def best_of(repeats: int, run: Contender, kind: str, path: Path) -> tuple[int, float]:
    return min((run(kind, path) for _ in range(repeats)), key=lambda result: result[1])


def make_corpus(args: argparse.Namespace, kind: str, mb: float, seed: int = 0) -> Path:
    path = Path(args.work / f"{kind}-{mb:g}MB-{seed}.jsonl")
    corpus.write(path, kind, int(mb * MB), args.data, seed)
    return path


def print_table(title: str, rows: dict[str, Row]) -> None:
    """Rates, and ratios of ours to the others': all in all, and (the slope between two sizes) without starting."""
    print(f"\n{title:<34}{'tokens':>12}{'seconds':>10}{'tokens/s':>12}{'… started':>12}")
    for row in rows.values():
        print(
            f"{row.name:<34}{row.tokens:>12,}{row.seconds:>10.2f}{row.tokens / row.seconds:>12,.0f}{row.slope:>12,.0f}"
        )
    for upper, lower, target in RATIOS:
        if lower not in rows:
            continue
        a, b = rows[upper], rows[lower]
        whole, slope = a.tokens / a.seconds / (b.tokens / b.seconds), a.slope / b.slope
        verdict = f"   target {target:g}: {'met' if whole >= target else 'MISSED'}" if target else ""
        print(f"{f'{upper} / {lower}':<34}{'':>22}{whole:>12.2f}{slope:>12.2f}{verdict}")
    print(flush=True)


def memory(args: argparse.Namespace) -> None:
    peaks = []
    for mb in args.memory_mb:
        corpora = {kind: make_corpus(args, kind, mb / 2) for kind in KINDS}
        shutil.rmtree(args.work / "out", ignore_errors=True)
        command = [*PANDA, str(write_conf(args.work, corpora, args.data, True))]
        rss, pss, seconds = peak_memory(command, args.work / "memory.log")
        peaks.append((rss, pss))
        print(
            f"{mb:g} MB: peak RSS {rss:.3f} GB, PSS {pss:.3f} GB, {seconds:.0f} s; {kept(args.work / 'out')}",
            flush=True,
        )
        for path in corpora.values():
            path.unlink()
    (rss, pss), (more_rss, more_pss) = peaks
    print(f"ratio: RSS {more_rss / rss:.2f}, PSS {more_pss / pss:.2f} (target 1.2); RSS below 1.5 GB: {more_rss < 1.5}")


def kills(args: argparse.Namespace) -> None:
    """Compares the files of `out` with those of an undisturbed run: after kills, and for other numbers of workers."""
    # Eight sources: the work of each is kept by itself, so a kill finds some of it done.
    corpora = {f"{kind}-{i}": make_corpus(args, kind, args.mb / 8, i) for kind in KINDS for i in range(4)}
    out, reference = args.work / "out", args.work / "reference"
    command = [*PANDA, str(write_conf(args.work, corpora, args.data, True))]
    for folder in (out, reference):
        shutil.rmtree(folder, ignore_errors=True)
    undisturbed = timed(command, args.work / "kills.log")
    out.rename(reference)
    print(f"undisturbed: {undisturbed:.1f} s; {kept(reference)}", flush=True)
    wrong, killed, draw = 0, 0, random.Random(args.kills)
    while killed < args.kills:
        moment = draw.uniform(0, undisturbed)
        if killed_after(command, moment, args.work / "kills.log"):
            killed += 1
            print(f"killed after {moment:.1f} s: {len(list(out.rglob('*')))} files", flush=True)
        else:  # it went on from what was there and ended before: a new one
            wrong += differ("finished after kills", out, reference)
            shutil.rmtree(out)
    timed(command, args.work / "kills.log")
    wrong += differ(f"after {killed} kills", out, reference)
    for workers in (1, 2, 4):
        shutil.rmtree(out)
        timed([*command, f"workers={workers}"], args.work / "kills.log")
        wrong += differ(f"workers={workers}", out, reference)
    sys.exit(1 if wrong else 0)


def differ(what: str, out: Path, reference: Path) -> bool:
    """Whether the files of two folders differ in name or in a byte; says so."""
    names = {path.relative_to(folder) for folder in (out, reference) for path in folder.rglob("*") if path.is_file()}
    wrong = sorted(str(n) for n in names if not same(out / n, reference / n))
    print(f"{what}: {len(names)} files, {f'DIFFERENT: {wrong}' if wrong else 'the same bytes'}", flush=True)
    return bool(wrong)


def same(a: Path, b: Path) -> bool:
    return a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("PANDALLM_TEST_DATA") or ROOT.parent / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(data), help="real corpora (default: $PANDALLM_TEST_DATA)")
    parser.add_argument("--work", type=Path, default=Path("/tmp/pandallm-bench"), help="folder for what is made")
    parser.add_argument("--mb", type=float, default=60, help="size of a corpus (of both, with --kills)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each contender, of which the best counts")
    parser.add_argument("--trl", metavar="PYTHON", help="Python that has trl and datasets")
    parser.add_argument("--llamafactory", metavar="PYTHON", help="Python that has llamafactory")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory-mb", type=float, nargs=2, default=[1000, 3000], help="the two sizes of --memory")
    parser.add_argument("--kills", type=int, default=0, metavar="N")
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.data = args.data.resolve()
    if not args.data.is_dir():
        sys.exit(f"{args.data}: no real corpora there; give --data or set PANDALLM_TEST_DATA")
    args.work.mkdir(parents=True, exist_ok=True)
    names = ", ".join(f"{name} {version(name)}" for name in ("pandallm", "tokenizers", "transformers"))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {time.strftime('%F')}; {names}"
    )
    mode = memory if args.memory else kills if args.kills else speed
    mode(args)


if __name__ == "__main__":
    main()
