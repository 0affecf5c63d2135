"""What a command says: lines of one rank, metrics.jsonl, and the record of a run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from pandallm import __version__, files

T = TypeVar("T")

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "deepspeed", "vllm", "numpy")


def rank() -> int:
    """This process's rank, as torchrun, the deepspeed launcher and srun's wrappers set it."""
    return int(os.environ.get("RANK", "0"))


def say(message: str) -> None:
    """One line on standard error, from rank 0 only."""
    if rank() == 0:
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    say(f"warning: {message}")


def watch(items: Sequence[T], done: str) -> Iterator[T]:
    """Tensors one after another, with a line now and then for who waits."""
    last = time.monotonic()
    for i, item in enumerate(items):
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            say(f"{done}: {i} of {len(items)} tensors")
        yield item


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    found = {"pandallm": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code() -> str:
    """Hash of the package's source: what a result depends on, committed or not."""
    root = Path(__file__).parent
    return files.hash_json({str(path.relative_to(root)): files.hash_file(path) for path in sorted(root.rglob("*.py"))})


def commit() -> str | None:
    """Commit of the checkout the package runs from, `+changes` if edited; None where it is installed from a wheel."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if dirty.strip() else "")


class Metrics:
    """metrics.jsonl: a line a step, whole lines only; opening it for a resume drops what came after that step."""

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= last_step]
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, **values: Any) -> None:
        self._file.write(json.dumps(values, ensure_ascii=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Makes the lines durable; called before a checkpoint that counts on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]
