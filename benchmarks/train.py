"""Instruction tuning, ours and the peers' in one run on the same dialogues: speed and memory on two CPU cores.

.venv/bin/python benchmarks/train.py [--trl PYTHON] [--llamafactory PYTHON]   all that is here
.venv/bin/python benchmarks/train.py --list                                   their names
.venv/bin/python benchmarks/train.py --only "ours,TRL packing" --steps 2      some of them, in this order

SmolLM2-135M and the first 2,000 usable dialogues of a real alpaca file in Chinese (--data), all weights trained, bf16
arithmetic, loss on the answers. Padded: 4 dialogues at once, 16 a step. Packed: rows of --length, as many a step as
hold about 16 dialogues. A peer is otherwise as its users get it, but for gradient checkpointing, which is off for all.
Every contender is a process of its own. Tokens are those of the batches it was really given, without padding; the time
is that between the ends of two steps; the memory is the process's peak, from its start to the model it saved. The
peers are run by the Python of an environment that has them: pip install trl; pip install llamafactory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import yaml
from watch import manifest, timed, watched

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).resolve().parent / "peers"
PANDA = str(Path(sys.executable).parent / "panda")
SOURCE, DIALOGUES = "instruct/alpaca_zh_carbonz0_part-00.json", 2000
AT_ONCE, A_STEP = 4, 16  # dialogues
SPEED = {"padded": 2.5, "packed": 1.4}  # ours / a peer, tokens a second
MEMORY = 0.6  # ours / a peer


@dataclass(frozen=True)
class Result:
    tokens: int  # of the timed steps, without padding
    trained: int
    places: int  # what the model computed for them: padding too
    seconds: float
    peak: float  # GiB
    steps: int
    about: str


@dataclass(frozen=True)
class Contender:
    kind: str  # ours, padded or packed
    steps: int  # timed ones, 60 to 120 s on two cores
    run: Callable[[int], Result]


def ours(args: argparse.Namespace, precision: str) -> Callable[[int], Result]:
    def run(steps: int) -> Result:
        path = write_conf(args, precision, steps)
        out = path.with_suffix("")
        stamps = Stamps(out / "metrics.jsonl")
        peak = watched([PANDA, "train", str(path)], path.with_suffix(".log"), stamps.look)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][args.warmup :]
        tokens = sum(int(line["input_tokens"]) for line in lines)
        return Result(
            tokens=tokens,
            trained=sum(int(line["tokens"]) for line in lines),
            places=tokens,
            seconds=stamps.seen[args.warmup + steps] - stamps.seen[args.warmup],
            peak=peak,
            steps=len(lines),
            about=f"precision {precision}; the steps' own clocks {sum(line['seconds'] for line in lines):.1f} s",
        )

    return run


def write_conf(args: argparse.Namespace, precision: str, steps: int) -> Path:
    """A training config; its run goes into the folder beside it, of the same name."""
    out = args.work / f"ours-{precision}"
    conf = {
        "model": str(args.work / "model"),
        "data": str(args.work / "shards"),
        "out": str(out),
        "micro_batch_size": 1,
        "global_batch_size": args.rows,
        "max_steps": args.warmup + steps,
        "learning_rate": 1e-5,
        "precision": precision,
        "activation_checkpointing": "none",
        "save_every": 1_000_000,
    }
    path = out.with_name(f"{out.name}.yaml")
    path.write_text(yaml.safe_dump(conf))
    return path


class Stamps:
    """When the lines of a file appeared, to 0.1 s: a clock of our steps outside their process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: dict[int, float] = {}

    def look(self) -> None:
        if self.path.exists():
            self.seen.setdefault(self.path.read_bytes().count(b"\n"), time.perf_counter())


def peer(args: argparse.Namespace, python: str, script: str, *options: str) -> Callable[[int], Result]:
    def run(steps: int) -> Result:
        name = "-".join([script.removesuffix(".py"), *(option.strip("-") for option in options)])
        out = args.work / name
        packing = "--packing" in options
        sizes = {
            "--batch": 1 if packing else AT_ONCE,
            "--accumulate": args.rows if packing else A_STEP // AT_ONCE,
            "--length": args.length,
            "--warmup": args.warmup,
            "--steps": steps,
        }
        command = [python, str(PEERS / script), str(args.work / "model"), str(args.work / "talks.jsonl"), str(out)]
        command += [*options, *(str(part) for pair in sizes.items() for part in pair)]
        cache = {"HF_DATASETS_CACHE": str(args.work / "cache")}
        peak = watched(command, args.work / f"{name}.log", lambda: None, **cache)
        done = json.loads((out / "result.json").read_text())
        shutil.rmtree(out)
        about = "; ".join(f"{key} {value}" for key, value in [*done["facts"].items(), *done["versions"].items()])
        return Result(done["tokens"], done["trained"], done["places"], done["seconds"], peak, steps, about)

    return run


def contenders(args: argparse.Namespace) -> dict[str, Contender]:
    """By name, in the order of a run: ours in the middle, for machines grow faster or slower."""
    trl, factory = args.trl or "", args.llamafactory or ""
    found = {
        "Transformers Trainer": Contender("padded", 3, peer(args, args.transformers, "hf_trainer.py")),
        "Transformers Trainer, fp32 weights": Contender(
            "padded", 3, peer(args, args.transformers, "hf_trainer.py", "--fp32-weights")
        ),
        "TRL": Contender("padded", 3, peer(args, trl, "trl_sft.py")),
        "LLaMA-Factory": Contender("padded", 3, peer(args, factory, "llamafactory_sft.py")),
        "ours": Contender("ours", 10, ours(args, "bf16")),
        "ours, bf16_pure": Contender("ours", 10, ours(args, "bf16_pure")),
        "TRL packing": Contender("packed", 6, peer(args, trl, "trl_sft.py", "--packing")),
        "LLaMA-Factory neat_packing": Contender("packed", 6, peer(args, factory, "llamafactory_sft.py", "--packing")),
    }
    if args.only:
        found = {name: found[name] for name in chosen(args.only, found)}
    for python, option, family in ((trl, "--trl", "TRL"), (factory, "--llamafactory", "LLaMA-Factory")):
        for name in [name for name in found if name.startswith(family) and not python and not args.list]:
            print(f"{name}: skipped, no {option} PYTHON")
            del found[name]
    return found


def chosen(only: str, found: dict[str, Contender]) -> list[str]:
    """The names in `only`; names may hold a comma themselves."""
    wanted, rest = [], only
    while rest := rest.lstrip(", "):
        fitting = [name for name in found if rest == name or rest.startswith(f"{name},")]
        if not fitting:
            sys.exit(f"--only: {rest!r} begins with none of {', '.join(found)}")
        wanted.append(max(fitting, key=len))
        rest = rest.removeprefix(wanted[-1])
    return wanted


def make_model(folder: Path) -> Any:
    """The model with the chat template of our rows, for all contenders; returns its tokenizer."""
    from pandallm import prompt, tokenizer
    from pandallm.model.names import resolve

    base = resolve("smollm2-135m").resolve()
    loaded = tokenizer.load(base)
    prompt.set_format(loaded, "chatml")
    folder.mkdir()
    for path in base.glob("*.*"):
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path)
        elif path.name in ("config.json", "generation_config.json"):
            shutil.copy(path, folder)
    loaded.save_pretrained(folder)
    return loaded


def make_talks(args: argparse.Namespace, tokenizer: Any) -> None:
    """talks.jsonl: the first dialogues that have a question and an answer, differ, and fit into 1,024 tokens."""
    from pandallm import prompt

    records = json.loads((args.data / SOURCE).read_text(encoding="utf-8"))
    usable = {json.dumps(r, ensure_ascii=False): r for r in records if r["instruction"].strip() and r["output"].strip()}
    with open(args.work / "talks.jsonl", "w", encoding="utf-8") as f:
        count = tokens = trained = 0
        for line, r in usable.items():
            question = f"{r['instruction']}\n{r['input']}" if r["input"] else r["instruction"]
            talk = prompt.Dialogue((("user", question), ("assistant", r["output"])))
            rendered = prompt.render(tokenizer, [talk])[0]
            if len(rendered.input_ids) > 1023:  # LLaMA-Factory's rows hold a token less
                continue
            f.write(line + "\n")
            count, tokens = count + 1, tokens + len(rendered.input_ids)
            trained += sum(rendered.loss_mask)
            if count == DIALOGUES:
                break
    args.rows = max(1, round(A_STEP * tokens / count / args.length))
    print(
        f"{count} dialogues, {tokens / count:.0f} tokens each, {trained / tokens:.0%} of them trained; a packed step"
        f" is {args.rows} rows of {args.length}"
    )


def make_shards(args: argparse.Namespace) -> None:
    conf = {
        "tokenizer": str(args.work / "model"),
        "chat_format": "chatml",
        "seq_len": args.length,
        "workers": 2,
        "out": str(args.work / "shards"),
        "dedup": {"exact": False},
        "sources": [{"name": "alpaca", "path": str(args.work / "talks.jsonl")}],
    }
    path = args.work / "data.yaml"
    path.write_text(yaml.safe_dump(conf))
    seconds = timed([PANDA, "data", "prepare", str(path)], args.work / "prepare.log")
    made = manifest(args.work / "shards")
    print(
        f"panda data prepare: {seconds:.1f} s, {made['rows']} rows, {made['documents']} documents, {made['tokens']}"
        f" tokens, {made['trained_tokens']} trained",
        flush=True,
    )


def print_table(found: dict[str, Contender], results: dict[str, Result]) -> None:
    print(
        f"\n{'':<36}{'tokens/s':>10}{'trained/s':>11}{'peak GiB':>10}{'steps':>7}{'seconds':>9}{'tokens/step':>13}"
        f"{'padding':>9}"
    )
    for name, r in results.items():
        print(
            f"{name:<36}{r.tokens / r.seconds:>10.1f}{r.trained / r.seconds:>11.1f}{r.peak:>10.2f}{r.steps:>7}"
            f"{r.seconds:>9.1f}{r.tokens / r.steps:>13.0f}{1 - r.tokens / r.places:>9.0%}"
        )
    print()
    for mine in (name for name in results if found[name].kind == "ours"):
        for name, r in results.items():
            kind = found[name].kind
            if kind != "ours":
                print_ratio(f"{mine} / {name}", results[mine], r, SPEED[kind])


def print_ratio(title: str, a: Result, b: Result, wanted: float) -> None:
    speed = a.tokens / a.seconds / (b.tokens / b.seconds)
    trained = a.trained / a.seconds / (b.trained / b.seconds)
    memory = a.peak / b.peak
    print(
        f"{title:<54}tokens/s {speed:5.2f} (trained {trained:.2f}), target {wanted}:"
        f" {'met' if speed >= wanted else 'MISSED'}; memory {memory:.2f}, target {MEMORY}:"
        f" {'met' if memory <= MEMORY else 'MISSED'}"
    )


def run_all(args: argparse.Namespace, found: dict[str, Contender]) -> None:
    names = ", ".join(f"{name} {version(name)}" for name in ("pandallm", "torch", "transformers"))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {time.strftime('%F')}; {names};"
        f" logs in {args.work}"
    )
    make_talks(args, make_model(args.work / "model"))
    make_shards(args)
    results = {}
    for name, contender in found.items():
        load, began = os.getloadavg()[0], time.perf_counter()
        results[name] = contender.run(args.steps or contender.steps)
        spent = time.perf_counter() - began
        print(f"  {name} (load before {load:.1f}, {spent:.0f} s in all): {results[name].about}", flush=True)
    print_table(found, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("PANDALLM_TEST_DATA") or ROOT.parent / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(data), help="real corpora (default: $PANDALLM_TEST_DATA)")
    parser.add_argument("--work", type=Path, help="folder for what is made (default: a new temporary one)")
    parser.add_argument("--transformers", metavar="PYTHON", default=sys.executable, help="Python that has accelerate")
    parser.add_argument("--trl", metavar="PYTHON", help="Python that has trl")
    parser.add_argument("--llamafactory", metavar="PYTHON", help="Python that has llamafactory")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a packed row; no less (try 2048)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, help="timed steps of each (default: 60 to 120 s of them)")
    parser.add_argument("--only", metavar="NAMES", help="these contenders, in this order")
    parser.add_argument("--list", action="store_true", help="print the contenders' names")
    args = parser.parse_args()
    if args.list:
        print("\n".join(contenders(args)))
        return
    args.data = args.data.resolve()
    if not (args.data / SOURCE).is_file():
        sys.exit(f"{args.data}: {SOURCE} isn't there; give --data or set PANDALLM_TEST_DATA")
    if args.length < 1024:
        sys.exit("--length: dialogues of up to 1,023 tokens are used; 1024 or more is wanted")
    if not (found := contenders(args)):
        sys.exit("nothing left to run")
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
        if any(args.work.iterdir()):
            sys.exit(f"--work: {args.work} isn't empty")
    args.work = (args.work or Path(mkdtemp(prefix="pandallm-train-"))).resolve()
    run_all(args, found)


if __name__ == "__main__":
    main()
