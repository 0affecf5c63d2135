"""Shards: the record each document came from, documents shown with what is trained, and shards that can't be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Prepare
from test_prepare import DEMO, check, tok

from pandallm.config import UserError
from pandallm.data import shards, show
from pandallm.data.shards import Shards


def test_provenance(run: Prepare, tmp_path: Path) -> None:
    """Source, file and line of every document, in every layout of files; of an array, the record's number."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "甲一"}\n\n\n{"text": "甲四"}\n{"text": ""}\n{"text": "甲六"}\n')
    (folder / "b.json").write_text(json.dumps([{"text": "乙一"}, {"text": "乙二"}], indent=2))
    (folder / "c").write_text("丙一\n不是标题\n")
    (folder / "d.json").write_text('{"english": "four", "chinese": "丁一"}')
    run([{"name": "own", "path": str(folder)}, *DEMO])
    data = check(tmp_path / "shards")
    found = {}
    for n in data.documents_of("own").tolist():
        source, file, line = data.provenance(n)
        found[tok().decode(data.document(n)[0])] = (source, Path(file).name, line)
    end = "<|endoftext|>"
    raw = {text: where for text, where in found.items() if text.endswith(end)}
    assert raw == {
        f"甲一{end}": ("own", "a.jsonl", 1),
        f"甲四{end}": ("own", "a.jsonl", 4),
        f"甲六{end}": ("own", "a.jsonl", 6),
        f"乙一{end}": ("own", "b.json", 1),
        f"乙二{end}": ("own", "b.json", 2),
        f"丙一\n不是标题{end}": ("own", "c", 1),
    }
    assert sorted(found[text] for text in found.keys() - raw) == [("own", "d.json", 1)] * 2
    with pytest.raises(UserError, match="no source 'none'; it has home, own, wiki"):
        data.documents_of("none")


def test_show_marks_what_is_trained(run: Prepare, corpus: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    talk = [{"inputs": "问", "targets": "答🐼"}, {"inputs": "a b", "targets": " 再 答 "}]
    path = corpus("own", [talk, {"text": "ab 𠮷野家"}])["path"]
    run([{"name": "own", "path": path}], seq_len=256)
    dialogue, text = show.run(str(tmp_path / "shards"), 9, "own", colour=False)
    header, _, body = dialogue.partition("\n")
    assert header.startswith(f"--- document, own, {path}:1, ") and header.endswith("trained")
    assert body == (
        "<|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n⟦答🐼<|im_end|>⟧\n"
        "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n⟦再 答<|im_end|>⟧\n"
    )
    assert text.partition("\n")[2] == "a⟦b 𠮷野家<|endoftext|>⟧"
    (row,) = show.run(str(tmp_path / "shards"), 9, None, colour=True)
    assert "--- row 0, own, " in row and "\x1b[32m再 答<|im_end|>\x1b[0m" in row


def test_show_where_a_border_lies_inside_a_character(
    run: Prepare, corpus: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """A raw text's first token, not trained, may be a third of a character."""
    run([corpus("own", [{"text": "𠮷野家"}])])
    (text,) = show.run(str(tmp_path / "shards"), 1, "own", colour=False)
    assert text.partition("\n")[2] == "⟦𠮷野家<|endoftext|>⟧"


def test_token_dtype() -> None:
    assert shards.token_dtype(1 << 16) == np.dtype("<u2") and shards.token_dtype((1 << 16) + 1) == np.dtype("<u4")


def test_shards_that_cannot_be_read(run: Prepare, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no manifest.json; make the shards with: panda data prepare"):
        Shards(tmp_path)
    run(DEMO)
    manifest = tmp_path / "shards" / "manifest.json"
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text.replace('"format": 3', '"format": 1'), encoding="utf-8")
    with pytest.raises(UserError, match="shards of format 1, not 3; prepare them again"):
        Shards(tmp_path / "shards")
    manifest.write_text(text[:100], encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest.json: damaged \(.*\); prepare the shards again"):
        Shards(tmp_path / "shards")
    for other in ("[]", "5", "null", "{}", "[" * 100_000):
        manifest.write_text(other, encoding="utf-8")
        with pytest.raises(UserError, match=r"manifest.json: (is no shards' manifest|damaged)"):
            Shards(tmp_path / "shards")
    manifest.write_text('{"format": 3}', encoding="utf-8")
    with pytest.raises(UserError, match=r"damaged \('seq_len' is missing\)"):
        Shards(tmp_path / "shards")
    manifest.write_text(text, encoding="utf-8")
    (tmp_path / "shards" / "parts" / "home-00000.mask.bin").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"home-00000.mask.bin: missing or not \d+ bytes long; prepare the shards again"
    ):
        Shards(tmp_path / "shards")
