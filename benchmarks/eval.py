"""Evaluation, ours and lm-evaluation-harness's in one run on the same prompts: speed, memory, and every answer.

.venv/bin/python benchmarks/eval.py --lm-eval PYTHON                      all of C3-m dev and LogiQA dev: hours
.venv/bin/python benchmarks/eval.py --lm-eval PYTHON --limit 200          the first questions of each
.venv/bin/python benchmarks/eval.py --lm-eval PYTHON --limit 40 --protocols choice --precisions fp32

`panda eval` against the hf backend of the harness, whose tasks `panda eval export-lm-eval` writes: the same model, raw
text, the same ids. Every contender is a process of its own, ours between the harness's batch sizes, of which the faster
one counts. The seconds are those of scoring, tokenisation included; the wall clock has the loading too (and, in the
harness, its index of tasks). The memory is the process's peak. `--batch-sizes 8,auto` lets the harness look for a size
too; on a CPU that takes it minutes (for `generate` it tries whole windows), and its memory is limited so that a size
too large fails as it expects (--memory), and not the machine. PYTHON is that of an environment that has the harness:
pip install "lm-eval[hf]".

In fp32 the answers must be equal but for ties. In bf16 the harness rounds its logits to bf16 (1/8 between 16 and 32),
so that options often tie for it; the margins show that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from os.path import commonprefix
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from watch import last_json, watched

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).resolve().parent / "peers"
PANDA = str(Path(sys.executable).parent / "panda")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
SPEED = {"choice": 2.0, "cloze": 4.0, "generate": 4.0}  # the harness's seconds / ours
MEMORY = 1.0  # ours / the harness's
TIE = 1e-4  # nats

Key = tuple[str, str, str]  # precision, protocol, task


@dataclass(frozen=True)
class Reply:
    """`pred`: a letter, None where there is none. `values`: what it was the largest of, nothing for `generate`."""

    pred: str | None
    correct: bool
    values: tuple[float, ...]
    output: str

    @property
    def margin(self) -> float:
        """How much larger the largest is than the next."""
        second, first = sorted(self.values)[-2:] if self.values else (0.0, float("inf"))
        return first - second


Replies = dict[tuple[str, str], Reply]  # by question and rule: "", or "by length"


@dataclass(frozen=True)
class Result:
    name: str
    seconds: float  # of scoring
    wall: float  # of the process
    peak: float  # GiB
    replies: Replies

    @property
    def accuracy(self) -> float:
        plain = [reply.correct for (_, rule), reply in self.replies.items() if not rule]
        return sum(plain) / len(plain)


def letter(index: int) -> str:
    return chr(ord("A") + index)


def likeliest(sums: Sequence[float], lengths: Sequence[int], gold: int) -> dict[str, Reply]:
    """The reply by each rule, the second dividing by `lengths` where there are any."""
    found = {}
    by_length = [total / length for total, length in zip(sums, lengths, strict=False)]
    for rule, values in (("", sums), ("by length", by_length)):
        if values:
            pred = list(values).index(max(values))
            found[rule] = Reply(letter(pred), pred == gold, tuple(values), "")
    return found


def ours(args: argparse.Namespace, key: Key) -> Result:
    precision, protocol, task = key
    out = args.work / f"ours-{'-'.join(key)}"
    command = [PANDA, "eval", "--model", args.model, "--task", task, "--data", str(args.data), "--split", "dev"]
    command += ["--protocol", protocol, "--precision", precision, "--chat-format", "none", "--out", str(out)]
    command += [] if args.limit is None else ["--limit", str(args.limit)]
    wall, peak = run(args, command, out.with_suffix(".log"))
    entry = json.loads((out / "results.json").read_text(encoding="utf-8"))["tasks"][task]
    replies: Replies = {}
    for row in read_lines(out / "predictions.jsonl"):
        if protocol == "generate":
            replies[row["id"], ""] = Reply(row["pred"], row["correct"], (), row["output"])
            continue
        question = args.questions[task, protocol][row["id"]]
        lengths = [len(option) for option in question["options"]] if protocol == "cloze" else []
        found = likeliest(row["log_likelihoods"], lengths, question["gold"])
        for rule, name in (("", "pred"), ("by length", "pred_norm")):
            if rule in found and row.get(name, found[rule].pred) != found[rule].pred:
                raise ValueError(f"{out}: {row['id']}: {name} isn't the likeliest: {row['log_likelihoods']}")
        replies |= {(row["id"], rule): reply for rule, reply in found.items()}
    return Result("ours", float(entry["seconds"]), wall, peak, replies)


def harness(args: argparse.Namespace, key: Key, batch: str) -> Result:
    precision, protocol, task = key
    name, out = f"panda_{task}_{protocol}", args.work / f"harness-{batch}-{'-'.join(key)}"
    command = ["prlimit", f"--as={int(args.memory * 2**30)}"] if batch == "auto" else []
    command += [args.lm_eval, str(PEERS / "lm_eval_timed.py"), f"{out}.json", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"{args.model_args},dtype={DTYPES[precision]}", "--include_path", ".", "--tasks", name]
    command += ["--batch_size", batch, "--log_samples", "--output_path", str(out)]
    command += [] if args.limit is None else ["--limit", str(args.limit)]
    cache = {"HF_DATASETS_CACHE": str(args.work / "cache")}
    wall, peak = run(args, command, out.with_suffix(".log"), args.work / "tasks", **cache)
    done = json.loads(Path(f"{out}.json").read_text())
    (samples,) = out.rglob(f"samples_{name}_*.jsonl")
    replies: Replies = {}
    for sample in read_lines(samples):
        doc = sample["doc"]
        if protocol == "generate":
            pred = sample["filtered_resps"][0]
            output = sample["resps"][0][0]
            replies[doc["id"], ""] = Reply(
                None if pred == "[invalid]" else pred, bool(sample["exact_match"]), (), output
            )
            continue
        sums = [float(value) for value, _ in sample["filtered_resps"]]
        lengths = [len(option) for option in doc["options"]] if protocol == "cloze" else []
        found = likeliest(sums, lengths, doc["gold"])
        replies |= {(doc["id"], rule): reply for rule, reply in found.items()}
        for rule, metric in (("", "acc"), ("by length", "acc_norm")):
            if rule in found and bool(sample[metric]) != found[rule].correct:
                raise ValueError(f"{samples}: {doc['id']}: {metric} isn't that of its log-likelihoods")
    versions = " ".join(done["versions"].values())
    return Result(f"lm-eval {versions}, batch size {batch}", float(done["seconds"]), wall, peak, replies)


def run(
    args: argparse.Namespace, command: list[str], log: Path, cwd: Path | None = None, **env: str
) -> tuple[float, float]:
    """(wall seconds, peak GiB) of a command. Exits where it fails."""
    start = time.perf_counter()
    peak = watched(command, log, lambda: None, cwd=cwd, OMP_NUM_THREADS=str(args.threads), **env)
    return time.perf_counter() - start, peak


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def export(args: argparse.Namespace) -> None:
    """The harness's tasks, and what of them the comparison needs."""
    command = [PANDA, "eval", "export-lm-eval", "--model", args.model, "--task", ",".join(args.tasks), "--json"]
    command += ["--data", str(args.data), "--split", "dev", "--protocol", ",".join(args.protocols)]
    made = last_json([*command, "--chat-format", "none", "--out", str(args.work / "tasks")])
    args.model_args = next(part for part in made["command"].split() if part.startswith("pretrained="))
    args.model_args = args.model_args.replace(",dtype=float32", "")
    args.questions = {}
    for task, protocol in product(args.tasks, args.protocols):
        lines = read_lines(args.work / "tasks" / f"panda_{task}_{protocol}.jsonl")
        args.questions[task, protocol] = {line["id"]: line for line in lines}


def attempts(args: argparse.Namespace, key: Key) -> tuple[Result, list[Result]]:
    """Ours, and what the harness managed, fastest first."""
    mine, theirs = None, []
    for batch in (*args.batch_sizes[:1], "", *args.batch_sizes[1:]):  # ours in the middle
        load = os.getloadavg()[0]
        try:
            r = harness(args, key, batch) if batch else ours(args, key)
        except SystemExit as e:  # a batch size too large for the machine
            if not batch:
                raise
            print(f"  {' '.join(key)}, batch size {batch}: the harness failed: …{str(e)[-300:]!r}", flush=True)
            continue
        if batch:
            theirs.append(r)
        else:
            mine = r
        print(
            f"  {' '.join(key)}, {r.name} (load before {load:.1f}): {r.seconds:.1f} s scoring, {r.wall:.1f} s in all,"
            f" peak {r.peak:.2f} GiB, accuracy {r.accuracy:.2%}",
            flush=True,
        )
    if not theirs or mine is None:
        sys.exit("the harness failed with every batch size")
    return mine, sorted(theirs, key=lambda r: r.seconds)


def print_ratio(key: Key, mine: Result, best: Result) -> None:
    speed, memory, wanted = best.seconds / mine.seconds, mine.peak / best.peak, SPEED[key[1]]
    print(
        f"{' '.join(key)}: ours {speed:.2f}x as fast (in all {best.wall / mine.wall:.2f}x), target {wanted}:"
        f" {'met' if speed >= wanted else 'MISSED'}; memory {memory:.2f}, target {MEMORY}:"
        f" {'met' if memory <= MEMORY else 'MISSED'}; accuracy {mine.accuracy:.2%} and {best.accuracy:.2%}"
    )


def print_differences(args: argparse.Namespace, key: Key, mine: Result, theirs: Result) -> None:
    """Every question that got another answer, and how near it was to a tie."""
    if mine.replies.keys() != theirs.replies.keys():
        sys.exit(f"{' '.join(key)}: the harness answered other questions than we did")
    pairs = {name: (reply, theirs.replies[name]) for name, reply in mine.replies.items()}
    apart = {name: pair for name, pair in pairs.items() if pair[0].pred != pair[1].pred}
    margins = {name: min(a.margin, b.margin) for name, (a, b) in apart.items()}
    if apart and key[1] == "generate":
        margins = forks(args, key, apart)
    beyond = sum(margin > TIE for margin in margins.values())
    gaps = [abs(x - y) for a, b in pairs.values() for x, y in zip(a.values, b.values, strict=True)]
    gap = f"; log-likelihoods at most {max(gaps):.1e} apart" if gaps else ""
    verdict = "met" if not beyond else "MISSED" if key[0] == "fp32" else "bf16, see the head of this file"
    print(f"  {len(apart)} of {len(pairs)} answers differ, {beyond} of them by more than a tie ({verdict}){gap}")
    for (question, rule), (a, b) in apart.items():
        about = f"margins {a.margin:.2e} and {b.margin:.2e}"
        if not a.values:
            about = f"margin {margins[question, rule]:.2e}; {a.output[:40]!r} and {b.output[:40]!r}"
        print(f"    {question}{', ' + rule if rule else ''}: {a.pred} and {b.pred}; {about}", flush=True)


def forks(
    args: argparse.Namespace, key: Key, apart: dict[tuple[str, str], tuple[Reply, Reply]]
) -> dict[tuple[str, str], float]:
    """Where two texts part: the difference of their next tokens' log-likelihoods after what they share, by plain
    Transformers in fp32, one by one. Texts are encoded again, so a token may be cut otherwise than it was written."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = args.model_args.removeprefix("pretrained=").split(",")[0]
    words = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for name, pair in apart.items():
        start = args.questions[key[2], key[1]][name[0]]["prompt"]
        a, b = ([*words(start + reply.output)["input_ids"], words.eos_token_id] for reply in pair)
        shared = commonprefix([a, b])  # of any sequences
        with torch.inference_mode():
            logits = model(torch.tensor([shared]), logits_to_keep=1).logits[0, -1]
        found[name] = float((logits[a[len(shared)]] - logits[b[len(shared)]]).abs())
    return found


def run_all(args: argparse.Namespace) -> None:
    names = ", ".join(f"{name} {version(name)}" for name in ("pandallm", "torch", "transformers"))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads, load {os.getloadavg()[0]:.1f},"
        f" {time.strftime('%F')}; {names}; {args.model}; limit {args.limit}; logs in {args.work}",
        flush=True,
    )
    export(args)
    done = {}
    for key in product(args.precisions, args.protocols, args.tasks):
        mine, theirs = attempts(args, key)
        done[key] = mine, theirs[0]
        print_differences(args, key, mine, theirs[0])
    print()
    for key, (mine, best) in done.items():
        print_ratio(key, mine, best)


def main() -> None:
    def several(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("PANDALLM_TEST_DATA") or ROOT.parent / "shared" / "data"
    parser.add_argument("--lm-eval", metavar="PYTHON", help="Python that has lm-eval[hf]")
    parser.add_argument("--data", type=Path, default=Path(data), help="the tasks' files (default: $PANDALLM_TEST_DATA)")
    parser.add_argument("--work", type=Path, help="folder for what is made (default: a new temporary one)")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", type=several, default=["c3-m", "logiqa-v2"])
    parser.add_argument("--protocols", type=several, default=list(SPEED))
    parser.add_argument("--precisions", type=several, default=list(DTYPES))
    parser.add_argument("--batch-sizes", type=several, default=["8", "16"], help="of the harness; or auto")
    parser.add_argument("--limit", type=int, help="questions of each task (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=float, default=12.0, help="GiB of address space for the batch size auto")
    args = parser.parse_args()
    if not args.lm_eval:  # `make bench` runs what needs nothing
        print("skipped: no --lm-eval PYTHON")
        return
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
        if any(args.work.iterdir()):
            sys.exit(f"--work: {args.work} isn't empty")
    args.work = (args.work or Path(mkdtemp(prefix="pandallm-eval-"))).resolve()
    args.data = args.data.resolve()
    run_all(args)


if __name__ == "__main__":
    main()
