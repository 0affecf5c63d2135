"""evaluate/fetch: question files fetched and checked by hash, or nothing left behind."""

from __future__ import annotations

import email.message
import hashlib
import io
import re
import urllib.response
from collections.abc import Callable
from pathlib import Path

import pytest

from pandallm.config import UserError
from pandallm.evaluate import fetch, tasks


def remote(tmp_path: Path, name: str, content: bytes, sha256: str | None = None) -> fetch.Remote:
    source = tmp_path / "theirs" / name
    source.parent.mkdir(exist_ok=True)
    source.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest() if sha256 is None else sha256
    return fetch.Remote(source.as_uri(), f"c3/{name}", digest)


def test_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    known, unknown = remote(tmp_path, "a.json", b"known"), remote(tmp_path, "b.json", b"unknown", "")
    monkeypatch.setitem(fetch.FILES, "c3-d", (known, unknown))
    out = tmp_path / "out"
    found = fetch.run("c3-d", out)
    assert (out / "c3/a.json").read_bytes() == b"known" and (out / "c3/b.json").read_bytes() == b"unknown"
    assert [(f["bytes"], f["checked"]) for f in found["files"]] == [(5, True), (7, False)]
    said = capsys.readouterr().err
    assert "non-commercial" in said and "none on record" in said and found["files"][1]["sha256"] in said
    (tmp_path / "theirs" / "a.json").unlink()
    assert fetch.run("c3-d", out) == found  # there already
    assert "is there already" in capsys.readouterr().err
    (out / "c3/a.json").write_bytes(b"mine")
    with pytest.raises(UserError, match="move it away"):
        fetch.run("c3-d", out)
    assert (out / "c3/a.json").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda p: remote(p, "a.json", b"x", "0" * 64), "not the file on record"),
        (lambda p: fetch.Remote((p / "nowhere").as_uri(), "c3/a.json"), "can't be fetched"),
    ],
)
def test_a_bad_fetch_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Callable[[Path], fetch.Remote], said: str
) -> None:
    monkeypatch.setitem(fetch.FILES, "c3-d", (made(tmp_path),))
    with pytest.raises(UserError) as e:
        fetch.run("c3-d", tmp_path / "out")
    assert said in str(e.value) and "\n" not in str(e.value)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_short_answer_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = remote(tmp_path, "a.json", b"whole", "")
    monkeypatch.setitem(fetch.FILES, "c3-d", (made,))
    headers = email.message.Message()
    headers["Content-Length"] = "9"
    answer = urllib.response.addinfourl(io.BytesIO(b"whole"), headers, made.url)
    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda *a, **k: answer)
    with pytest.raises(UserError, match="5 bytes came, 9 were announced"):
        fetch.run("c3-d", tmp_path / "out")
    assert not (tmp_path / "out/c3/a.json").exists()


def test_what_is_not_fetched(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not fetched by panda.*github.com/haonan-li/CMMLU"):
        fetch.run("cmmlu", tmp_path)
    with pytest.raises(UserError, match="did you mean 'c3-d'"):
        fetch.run("c3d", tmp_path)


def test_fetched_files_are_where_tasks_look() -> None:
    for task, remotes in fetch.FILES.items():
        places = {
            pattern.format(split=split) for pattern in tasks.TASKS[task].files for split in ("train", "dev", "test")
        }
        assert {r.path for r in remotes} <= places
        assert all(re.search(r"/[0-9a-f]{40}/", r.url) for r in remotes)


def test_hashes_on_record_are_those_of_the_real_files(real_data: Path) -> None:
    for path, digest in fetch._HASHES.items():
        assert hashlib.sha256((real_data / path).read_bytes()).hexdigest() == digest
