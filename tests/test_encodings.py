"""Encodings: told from a file's beginning or declared; bytes that break it cost their own record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_read import BOM, ITEMS, dump, good, values

from pandallm.data import read
from pandallm.data.read import Bad, Record


def test_one_bad_byte_does_not_make_it_gb18030(of: Any) -> None:
    """A damaged UTF-8 file read as GB18030 would be Chinese characters nobody wrote."""
    for at in range(4, 200):
        data = bytearray(dump({"text": "汉字" * 40}).encode() + b"\n" + dump({"text": "完好"}).encode())
        data[at] = 0xFF if at % 2 else 0x41
        found = of(bytes(data))
        for item in found:
            if isinstance(item, Record) and item.line == 1 and "text" in item.value:
                assert set(item.value["text"]) <= set("汉字A")
        assert isinstance(found[1], Record) and found[1].value == {"text": "完好"}


@pytest.mark.parametrize("wound", [b"\xff", b"\x81", b"\x81\x30", b"\xb0"])
def test_bad_bytes_in_gb18030(of: Any, wound: bytes) -> None:
    """They cost their own record, in lines and in arrays."""
    items = [{"text": "汉字" * 9 + str(i)} for i in range(5)]
    for join, ends in (("\n", ("", "")), (",\n", ("[", "]")), (", ", ("[", "]"))):
        parts = [dump(item).encode("gb18030") for item in items]
        parts[2] = parts[2][:20] + wound + b'"' + parts[2][21:]
        found = of(ends[0].encode() + join.encode().join(parts) + ends[1].encode())
        assert good(found) == [*items[:2], *items[3:]]
        assert [item.line for item in found if isinstance(item, Bad)] == [3]


def test_ascii_start_then_chinese(of: Any) -> None:
    """The encoding is told from the file's first MiB; what turns out otherwise is counted line by line."""
    lines = [dump({"text": "a" * 1000}).encode()] * 1100
    found = of(b"\n".join([*lines, dump({"text": "汉字"}).encode("gb18030")]))
    assert len(found) == 1101 and isinstance(found[-1], Bad) and found[-1].cause == "bad_encoding"
    assert values(of(b"\n".join([*lines, dump({"text": "汉字"}).encode()])))[-1] == {"text": "汉字"}


@pytest.mark.parametrize("cut", range(8))
def test_the_first_mib_may_end_inside_a_character(of: Any, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "SNIFF_BYTES", 100 + cut)
    for encoding in ("utf-8", "gb18030", "utf-16"):
        for text in ("汉字🐼" * 100, "汉字\n" * 100):
            assert values(of((dump({"text": text}, indent=1) + "\n").encode(encoding))) == [{"text": text}]
            assert values(of((dump({"text": text}) + "\n").encode(encoding) * 2)) == [{"text": text}] * 2


def test_boms_of_joined_files(of: Any) -> None:
    assert values(of("".join(BOM + dump(item) + "\n" for item in ITEMS))) == ITEMS
    assert values(of("".join(BOM + dump(item, indent=1) + "\n" for item in ITEMS[:2]))) == ITEMS[:2]


@pytest.mark.parametrize("encoding", ["big5", "gb18030", "utf-16-le", "utf-8"])
def test_a_declared_encoding(encoding: str, tmp_path: Path) -> None:
    """Mostly ASCII, so that nothing tells it; whole and in spans. A damaged character is one bad record."""
    lines = [json.dumps({"text": f"line {i} in English, only one word is 漢字"}, ensure_ascii=False) for i in range(50)]
    path = tmp_path / "corpus"
    path.write_bytes("".join(line + "\n" for line in lines).encode(encoding))
    for limit in (1 << 20, 200):
        spans = read.spans_of(path, "auto", limit, encoding)
        found = [item for span in spans for item in read.records(span, "auto")]
        assert [item.value for item in found if isinstance(item, Record)] == [json.loads(line) for line in lines]
        assert sum(read.lines_in(span) for span in spans) == 50
        assert (len(spans) > 5) == (limit == 200 and not encoding.startswith("utf-16"))
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    assert [type(item) for item in read.records(read.spans_of(path, "auto", 1 << 20, "utf-16")[0], "auto")] == [Bad]
    path.write_bytes("".join(line + "\n" for line in lines).encode(encoding))
    if encoding in ("big5", "utf-8"):
        path.write_bytes(path.read_bytes().replace("漢字".encode(encoding), b"\xff", 1))
        found = list(read.records(read.spans_of(path, "auto", 1 << 20, encoding)[0], "auto"))
        assert [type(item) for item in found].count(Bad) == 1 and len(found) == 50
