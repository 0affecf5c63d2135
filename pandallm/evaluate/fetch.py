"""`panda data fetch`: question files that anyone may download, pinned by commit and checked by hash."""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pandallm import files, log
from pandallm.config import UserError
from pandallm.evaluate import tasks

TIMEOUT = 60.0  # seconds without a byte
CHUNK = 1 << 20


@dataclass(frozen=True)
class Remote:
    """A file to fetch. `path`: below --out, where the task looks for it. `sha256`: "" where it isn't on record."""

    url: str
    path: str
    sha256: str = ""


_C3 = "https://raw.githubusercontent.com/nlpdata/c3/dd2d89324e961786a1a9eec73ae13f1c6b800384/data/"
_LOGIQA = (
    "https://raw.githubusercontent.com/csitfun/LogiQA2.0/955e1d3df6c59d9bfb44d9913da1e1a27ec14e18/logiqa/DATA/LOGIQA/"
)
_HASHES = {
    "c3/c3-d-dev.json": "8c7054930a40aeb288ad7c51c42fa93d54aef678ccab29c75d46a7432f4f6278",
    "c3/c3-d-train.json": "baf81f327dee84c6f451c9a4dd662e6193c67473b8791ffb72cce75cdb528f20",
    "c3/c3-m-dev.json": "357d0d8d2a29bc845cbe50e048c263629f5e527b70f24c3e0838c387c8d3cb54",
    "c3/c3-m-train.json": "4c84a534f1eec2c72e5f60f0c044cc39e2e42a88df01134e677e03217472d6af",
    "logiqa_v2/dev_zh.txt": "a72a23160c9e12e15ea8c13e57af5032a7c37157573ebdd7e7c8e0ad34aef780",
}


def _remotes(base: str, folder: str, *names: str) -> tuple[Remote, ...]:
    return tuple(Remote(base + name, f"{folder}/{name}", _HASHES.get(f"{folder}/{name}", "")) for name in names)


FILES: dict[str, tuple[Remote, ...]] = {
    "c3-d": _remotes(_C3, "c3", "c3-d-dev.json", "c3-d-test.json", "c3-d-train.json"),
    "c3-m": _remotes(_C3, "c3", "c3-m-dev.json", "c3-m-test.json", "c3-m-train.json"),
    "logiqa-v2": _remotes(_LOGIQA, "logiqa_v2", "dev_zh.txt", "test_zh.txt", "train_zh.txt"),
    "logiqa-v2-en": _remotes(_LOGIQA, "logiqa_v2", "dev.txt", "test.txt", "train.txt"),
}


def run(task: str, out: Path) -> dict[str, Any]:
    """Fetches a task's files into `out`, a folder for --data; what is there already is checked, not fetched again.

    Returns {"task", "source", "files": [{"path", "bytes", "sha256", "checked"}]}; `checked`: the hash is the one on
    record. Raises UserError: unknown task, none that panda may fetch, another file in its place, no connection, another
    hash than the one on record (nothing is kept of the file).
    """
    record = tasks.get(task)
    if task not in FILES:
        known = ", ".join(FILES)
        raise UserError(f"{task}: is not fetched by panda (those are: {known}); get it from {record.source}")
    log.say(f"{task}: from {record.source}")
    return {"task": task, "source": record.source, "files": [_fetch(remote, out) for remote in FILES[task]]}


def _fetch(remote: Remote, out: Path) -> dict[str, Any]:
    path = out / remote.path
    if path.exists():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if remote.sha256 and digest != remote.sha256:
            raise UserError(f"{path}: is there, but not the file on record (sha256 {remote.sha256}); move it away")
        return _said(path, digest, remote, "is there already")
    sha = hashlib.sha256()
    try:
        with (
            urllib.request.urlopen(remote.url, timeout=TIMEOUT) as answer,
            files.atomic_file(path) as tmp,
            open(tmp, "wb") as f,
        ):
            while chunk := answer.read(CHUNK):
                sha.update(chunk)
                f.write(chunk)
            wanted = answer.headers["Content-Length"]
            if wanted is not None and f.tell() != int(wanted):  # urllib takes a broken connection for the end
                raise OSError(f"{f.tell()} bytes came, {wanted} were announced")
            if remote.sha256 and sha.hexdigest() != remote.sha256:
                raise UserError(
                    f"{remote.url}: not the file on record (sha256 {sha.hexdigest()}, {remote.sha256} is wanted);"
                    " nothing was kept"
                )
    except (OSError, http.client.HTTPException) as e:  # URLError, HTTPError and timeouts are OSErrors
        raise UserError(f"{remote.url}: can't be fetched to {path}: {' '.join(str(e).split())}") from None
    return _said(path, sha.hexdigest(), remote, "fetched")


def _said(path: Path, digest: str, remote: Remote, what: str) -> dict[str, Any]:
    checked = "as on record" if remote.sha256 else "none on record; the commit alone pins it"
    log.say(f"{path}: {what}, sha256 {digest} ({checked})")
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": digest, "checked": bool(remote.sha256)}
