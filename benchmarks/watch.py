"""Running `panda data prepare`, and commands in general, under watch: their time, their memory, and killing them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

PANDA = [str(Path(sys.executable).parent / "panda"), "data", "prepare"]
# The same for all: threads that spin while they wait make a shared machine's figures worthless.
ENV = {
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
}
EVALUATION = ("c3/c3-d-dev.json", "c3/c3-m-dev.json", "logiqa_v2/dev_zh.txt")


def check(command: list[str], code: int, output: str) -> None:
    """Exits with the end of its output where a command failed."""
    if code:
        sys.exit(f"{' '.join(command)}: exit {code}\n{output[-2000:]}")


def timed(command: list[str], log: Path, **env: str) -> float:
    """Wall seconds of a command, start of the process included; its output goes to `log`. Exits where it fails."""
    with open(log, "wb") as f:
        start = time.perf_counter()
        done = subprocess.run(command, stdout=f, stderr=subprocess.STDOUT, env=os.environ | env)
    seconds = time.perf_counter() - start
    check(command, done.returncode, log.read_text(errors="replace"))
    return seconds


def last_json(command: list[str], **env: str) -> Any:
    """The JSON that a command's last line holds."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
    check(command, done.returncode, done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def write_conf(work: Path, corpora: dict[str, Path], data: Path, cleaning: bool) -> Path:
    """A mixture of `corpora` (name -> file), whose shards go to work/out."""
    conf = work / "data.yaml"
    keys = {
        "tokenizer": "smollm2-135m",
        "chat_format": "chatml",
        "seq_len": 2048,
        "workers": 2,
        "out": str(work / "out"),
        "sources": [{"name": name, "path": str(path)} for name, path in corpora.items()],
        "clean": {"preset": "web" if cleaning else "off"},
        "dedup": {"exact": True, "near": cleaning},
        "decontaminate": [str(data / name) for name in EVALUATION] if cleaning else [],
    }
    conf.write_text(yaml.safe_dump(keys, allow_unicode=True), encoding="utf-8")
    return conf


def manifest(out: Path) -> Any:
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def kept(out: Path) -> str:
    """What became of the records, for the reader to judge whether the corpus collapsed."""
    parts = [f"{s['name']}: {s['kept']} of {s['read']} kept, dropped {s['dropped']}" for s in manifest(out)["sources"]]
    return "; ".join(parts)


def peak_memory(command: list[str], log: Path) -> tuple[float, float, float]:
    """(RSS, PSS, seconds) of a command: memory of all its processes summed, at its highest, in GB. RSS counts what they
    share once for each."""
    import psutil  # type: ignore[import-untyped]

    rss = pss = 0
    start = time.perf_counter()
    with open(log, "wb") as f, subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            now = []
            for one in (root, *descendants(root)):
                try:
                    now.append(one.memory_full_info())
                except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                    continue  # it has just ended
            rss, pss = max(rss, sum(m.rss for m in now)), max(pss, sum(m.pss for m in now))
            time.sleep(0.2)
    check(command, process.returncode, log.read_text(errors="replace"))
    return rss / 1e9, pss / 1e9, time.perf_counter() - start


def watched(command: list[str], log: Path, look: Callable[[], None], cwd: Path | None = None, **env: str) -> float:
    """Runs a command to its end, calling `look` all the time; the peak of its memory in GiB: its high-water mark, or
    what it and the processes it started held at some moment."""
    import psutil

    peak, next_search = 0, 0.0
    with (
        open(log, "wb") as f,
        subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=os.environ | ENV | env, cwd=cwd) as process,
    ):
        status, root = Path(f"/proc/{process.pid}/status"), psutil.Process(process.pid)
        while process.poll() is None:
            look()
            peak = max(peak, high_water(status))
            if time.perf_counter() >= next_search:  # a search through all processes: not so often
                peak = max(peak, sum(resident(one) for one in (root, *descendants(root))))
                next_search = time.perf_counter() + 2
            time.sleep(0.1)
    look()
    check(command, process.returncode, log.read_text(errors="replace"))
    return peak / 2**30


def high_water(status: Path) -> int:
    """VmHWM of /proc/PID/status in bytes; 0 for a process that has just ended."""
    try:
        lines = status.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def resident(process: Any) -> int:
    import psutil

    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def descendants(process: Any) -> list[Any]:
    import psutil

    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def killed_after(command: list[str], seconds: float, log: Path) -> bool:
    """Whether the command still ran by then; it and all it started are gone in any case."""
    with open(log, "wb") as f:
        process = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        check(command, process.wait(seconds), log.read_text(errors="replace"))
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
