"""What a training step spends outside forward, backward and optimizer: the share of its wall time, target below 2 %.

.venv/bin/python benchmarks/hot_path.py [--steps 8]

Runs `panda train` in this process, on the dialogues and with the settings of train.py, with a timer around the engine's
`loss`, `backward` and `step`. Between the ends of two steps, what isn't in them is ours: drawing rows, making batches,
counting, metrics, TensorBoard.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import train as benchmark
import watch

PARTS = ("loss", "backward", "step")
TARGET = 0.02
Times = list[tuple[float, dict[str, float]]]  # end of each step, seconds spent in the parts until then


def wrap(engine: Any) -> Times:
    """Puts timers around the engine's (a class's) methods; the list grows by one with every step."""
    ends: Times = []
    spent = dict.fromkeys(PARTS, 0.0)

    def timed(name: str) -> None:
        method = getattr(engine, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = method(*args, **kwargs)
            ended = time.perf_counter()
            spent[name] += ended - began
            if name == "step":
                ends.append((ended, dict(spent)))
            return result

        setattr(engine, name, call)

    for name in PARTS:
        timed(name)
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("PANDALLM_TEST_DATA") or benchmark.ROOT.parent / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(data), help="real corpora (default: $PANDALLM_TEST_DATA)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts, 1 or more")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    args = parser.parse_args()
    args.work = Path(mkdtemp(prefix="pandallm-hot-path-"))
    os.environ.update(watch.ENV)  # before torch is loaded
    benchmark.make_talks(args, benchmark.make_model(args.work / "model"))
    benchmark.make_shards(args)

    from pandallm.train import run
    from pandallm.train.engine import TorchEngine

    ends = wrap(TorchEngine)
    conf = benchmark.write_conf(args, "bf16", args.steps)
    print(f"load {os.getloadavg()[0]:.1f}, {time.strftime('%F')}", flush=True)
    run.run(str(conf), [])
    (began, before), (ended, after) = ends[args.warmup - 1], ends[-1]
    whole = ended - began
    parts = {name: after[name] - before[name] for name in PARTS}
    outside = 1 - sum(parts.values()) / whole
    shares = ", ".join(f"{name} {seconds / whole:.2%}" for name, seconds in parts.items())
    verdict = "met" if outside < TARGET else "MISSED"
    print(f"{args.steps} steps, {whole:.1f} s: {shares}, outside {outside:.3%}, target {TARGET:.0%}: {verdict}")


if __name__ == "__main__":
    main()
