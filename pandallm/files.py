"""Files that appear whole or not at all, and their hashes.

Everything the project leaves on disk goes through here: written under a temporary name, fsynced, renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from blake3 import blake3

from pandallm.config import UserError

TEMPORARY = ".partial"  # suffix of what is not finished yet; never read back


def fsync_dir(folder: Path) -> None:
    """Makes the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def check_writable(folder: Path) -> None:
    """UserError unless files can be made in `folder`, or in what there is of the way to it. Leaves nothing there."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with TemporaryDirectory(dir=existing, suffix=TEMPORARY):  # permissions alone don't tell: root has them all
            pass
    except OSError as e:
        raise UserError(f"{folder}: can't be written ({existing}: {e.strerror}); choose another folder") from None


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write; on success it becomes `path`, on an exception it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        yield tmp
        fsync_file(tmp)
        os.replace(tmp, path)
        fsync_dir(path.parent)
    finally:
        tmp.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill; on success it becomes `path` (replacing it), on an exception it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + TEMPORARY)
    shutil.rmtree(tmp, ignore_errors=True)  # left by a killed run
    tmp.mkdir()
    try:
        yield tmp
        publish_dir(tmp, path)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def publish_dir(tmp: Path, path: Path) -> None:
    """Makes a filled folder durable and renames it to `path`, replacing what is there."""
    for folder, _, names in os.walk(tmp):
        for name in names:
            fsync_file(Path(folder) / name)
        fsync_dir(Path(folder))
    if path.exists():
        # A folder can't be replaced in one step; between these two renames `path` is absent, never half-written.
        old = path.with_name(f"{path.name}.old{TEMPORARY}")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
        os.rename(tmp, path)
        shutil.rmtree(old)
    else:
        os.rename(tmp, path)
    fsync_dir(path.parent)


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, ensure_ascii=False, indent=1) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def stamp(path: Path) -> tuple[int, int]:
    """Tells a changed file as make does: by size and time."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def hash_bytes(data: bytes | memoryview) -> str:
    return blake3(data, max_threads=blake3.AUTO).hexdigest()


def hash_file(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def hash_json(data: Any) -> str:
    """Hash of a JSON value, whatever the order of its keys."""
    return hash_bytes(json.dumps(data, ensure_ascii=False, sort_keys=True).encode())
