"""Files of any layout -> records: nothing is lost without being counted, and nothing raises."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from pandallm.config import UserError
from pandallm.data import containers, read, sources
from pandallm.data.read import Bad, Record, Span

ITEMS: list[Any] = [
    {"id": "1", "text": "第一行\n第二行"},
    {"id": "2", "text": "行\u2028分\u2029隔\x85符\u3000"},
    [{"inputs": "问", "targets": "答"}, {"inputs": "再问", "targets": "再答"}],
    {"id": "3", "text": "繁體與 English 混寫，“引號”🐼"},
]
BOM = "\ufeff"


def dump(value: Any, **keys: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **keys)


def zipped(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/", b"")
        archive.writestr("folder/.hidden", b"\xff")
        archive.writestr("__MACOSX/x", b"\xff")
        archive.writestr("folder/数据", data)
    return out.getvalue()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gz": gzip.compress,
    "two gz": lambda data: gzip.compress(data[:50]) + gzip.compress(data[50:]),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor().compress,
    "two zst": lambda data: zstandard.compress(data[:50]) + zstandard.compress(data[50:]),
    "zip": zipped,
    "gz in zip": lambda data: zipped(gzip.compress(data)),
}


@pytest.fixture
def of(tmp_path: Path) -> Any:
    """of(content, layout, limit) -> the records of a file with this content; a name without a suffix."""

    def of_(content: str | bytes, layout: str = "auto", limit: int = 1 << 40) -> list[Record | Bad]:
        path = tmp_path / "corpus"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        found, before = [], 0
        for span in read.spans_of(path, layout, limit):
            for item in read.records(span, layout):
                moved = {**vars(item), "line": item.line + before}
                found.append(Record(**moved) if isinstance(item, Record) else Bad(**moved))
            before += read.lines_in(span) if span.part else 0
        assert all(item.cause in read.CAUSES and "\n" not in item.detail for item in found if isinstance(item, Bad))
        return found

    return of_


def values(items: list[Record | Bad]) -> list[Any]:
    assert all(isinstance(item, Record) for item in items), items
    return [item.value for item in items if isinstance(item, Record)]


def good(items: list[Record | Bad]) -> list[Any]:
    return [item.value for item in items if isinstance(item, Record)]


def causes(items: list[Record | Bad]) -> list[str | None]:
    return [item.cause if isinstance(item, Bad) else None for item in items]


LINES = "\n".join(map(dump, ITEMS)) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        LINES,
        LINES.rstrip(),
        "\n \n" + LINES.replace("\n", "\n\n"),
        LINES.replace("\n", ",\n"),
        dump(ITEMS),
        dump(ITEMS) + "\n",
        dump(ITEMS, indent=2),
        "[\n" + ",\n".join(map(dump, ITEMS)) + "\n]\n",
        "[" + ",\n".join(map(dump, ITEMS)) + "]",
        "[\n" + "\n,".join(map(dump, ITEMS)) + "\n]",
        "[\n\n" + ",\n\n".join(dump(item, indent=4) for item in ITEMS) + "]",
        "[" + ",".join(map(dump, ITEMS)) + ",]",
        dump(ITEMS[:1], indent=1) + "\n" + dump(ITEMS[1:], indent=1),
        dump({"version": "1", "data": ITEMS}),
        dump({"info": {"a": [1, {"b": "}"}]}, "data": ITEMS, "n": 4}, indent=1),
    ],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16", *(name for name in PACK if name != "plain")]
)
def test_same_records_from_every_layout(of: Any, text: str, ending: str, encoding: str) -> None:
    text = text.replace("\n", ending)
    data = PACK[encoding](text.encode()) if encoding in PACK else text.encode(encoding)
    assert values(of(data)) == ITEMS


def test_places(of: Any) -> None:
    """The line of a record in JSON lines (blank ones counted), its number in an array."""
    assert [item.line for item in of("\n" + LINES.replace("\n", "\n\n"))] == [2, 4, 6, 8]
    assert [item.line for item in of(dump(ITEMS, indent=1))] == [1, 2, 3, 4]


@pytest.mark.parametrize("keys", [{}, {"indent": 2}])
def test_one_object_a_file(of: Any, keys: dict[str, Any]) -> None:
    talk = {"round_1": {"prompt": "问", "response": "答"}, "round_2": {"prompt": "再问", "response": "再答"}}
    long = {"id": 1, "conversations": [{"from": "human", "value": "问"}] * 200}
    for value in (talk, long, {"data": ["问", "答"]}, {"text": "长" * (1 << 20)}):
        assert values(of(dump(value, **keys))) == [value]
        assert values(of(BOM + dump(value, **keys) + "\r\n")) == [value]
    assert values(of(dump(talk, **keys) + "\n" + dump(long, **keys))) == [talk, long]


def test_records_in_an_object(of: Any) -> None:
    """The only long array of an object holds the records, under any name; a second one is not lost silently."""
    assert values(of(dump({"名": "题库", "questions": ITEMS[:1] * 101}))) == ITEMS[:1] * 101
    assert values(of(dump({"questions": ITEMS[:1] * 3}))) == [{"questions": ITEMS[:1] * 3}]
    assert causes(of(dump({"data": ITEMS, "more": ITEMS[:2]}))) == [None] * 4 + ["broken_array"]


def test_json_lines_of_arrays(of: Any) -> None:
    talks = [[{"inputs": "问", "targets": "答"}], [{"inputs": "甲", "targets": "乙"}]]
    assert values(of("\n".join(map(dump, talks)))) == talks


def test_long_first_line(of: Any) -> None:
    """What the first MiB can't tell is told from more."""
    lines = [{"text": "长" * 700_000}, {"text": "短"}]
    assert values(of("\n".join(map(dump, lines)))) == lines
    assert values(of(dump(lines))) == lines


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("第一段\n\n第二段\n", "第一段\n\n第二段"),
        (BOM + "第一段\r\n第二段", "第一段\n第二段"),
        (BOM + "第一段\n" + BOM + "第二段", "第一段\n第二段"),
        ("第一段\r第二段", "第一段\n第二段"),
        ("[新华社] 今日天气", "[新华社] 今日天气"),
        ("[1] 参考文献\n[2] 参考文献", "[1] 参考文献\n[2] 参考文献"),
        ("{{条目}}\n正文", "{{条目}}\n正文"),
        ("标题\n[1]\n", "标题\n[1]"),
        ('他说：{"a": 1}', '他说：{"a": 1}'),
        ("\n\n正文".encode("gb18030"), "正文"),
        ("第一段\n第二段".encode("utf-16"), "第一段\n第二段"),
        ("秦川雄帝宅,函谷壮皇居。\n" * 20, "秦川雄帝宅,函谷壮皇居。\n" * 19 + "秦川雄帝宅,函谷壮皇居。"),
        (
            "Roses are red,\nviolets are blue, and\nso on, you see.",
            "Roses are red,\nviolets are blue, and\nso on, you see.",
        ),
        ("\t第一段\n\t第二段\n\t第三段", "第一段\n\t第二段\n\t第三段"),
    ],
)
def test_plain_text(of: Any, content: str | bytes, text: str) -> None:
    assert values(of(content)) == [text]


def test_how_plain_text_is_cut(of: Any) -> None:
    """By the layout that is given, whatever the text looks like; else by its look."""
    assert values(of(LINES, "text")) == [LINES.strip()]
    assert values(of(LINES, "lines")) == [dump(item) for item in ITEMS]
    assert values(of("甲\n乙\n\n \n丙\u3000\n\u3000\n丁\n", "paragraphs")) == ["甲\n乙", "丙\u3000", "丁"]
    assert [item.line for item in of("\n甲\n乙\n\n \n丙\n", "paragraphs")] == [2, 6]
    long, sentence = "长" * 200, "这是一句话。\n"
    assert values(of(f"{long}\n" * 60)) == [long] * 60
    assert len(values(of(f"{long}\n" * 20))) == len(values(of(sentence * 500))) == 1
    assert values(of((sentence * 5 + "\n") * 30)) == [(sentence * 5).strip()] * 30
    assert len(values(of((sentence + "\n") * 100))) == 1


def table(rows: list[list[str]], **keys: Any) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n", **keys).writerows(rows)
    return out.getvalue()


ROWS = [["1", "第一行\n第二行"], ["2", '他说："好, 好"'], ["3", ""], ["4", "x" * 200_000], ["5", "甲,乙"], ["6", "丙"]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16", "zip"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("keys", [{}, {"quoting": csv.QUOTE_ALL}, {"delimiter": "\t", "quoting": csv.QUOTE_ALL}])
def test_csv(of: Any, encoding: str, ending: str, keys: dict[str, Any]) -> None:
    def read_back(rows: list[list[str]]) -> list[Any]:
        text = table(rows, **keys).replace("\n", ending)
        found = values(of(PACK[encoding](text.encode()) if encoding in PACK else text.encode(encoding)))
        return json.loads(json.dumps(found).replace("\\r\\n", "\\n"))  # line ends within a cell are as they were

    assert read_back([["id", "text"], *ROWS]) == [{"id": a, "text": b} for a, b in ROWS]
    assert read_back([["", "label", "text"], ["0", "a", "b,\nc"]]) == [{"": "0", "label": "a", "text": "b,\nc"}]
    assert read_back(ROWS) == ROWS
    assert read_back([["text"], *(row[1:] for row in ROWS if row[1])]) == [{"text": row[1]} for row in ROWS if row[1]]


def test_places_in_tables(of: Any) -> None:
    assert [item.line for item in of(table([["id", "text"], *ROWS]))] == [2, 4, 5, 6, 7, 8]
    assert [item.line for item in of("a\tb\n\nc\td\n")] == [1, 3]


def test_tsv_has_no_quotes(of: Any) -> None:
    rows = [["He said.", '"你好。'], ['"Hi', "嗨"], ["Go", '走"开"'], ["\\n", "字面"]]
    text = "\n".join(map("\t".join, rows))
    assert values(of(text)) == rows
    assert values(of("english\tchinese\n" + text)) == [{"english": a, "chinese": b} for a, b in rows]


@pytest.mark.parametrize("broken", ['7,"开着', '7,"开着\n续', '7,"a"b', "7,甲,乙", "7", '"', "7,\0", '7,"\n"\n"'])
@pytest.mark.parametrize("at", range(7))
def test_one_broken_row(of: Any, at: int, broken: str) -> None:
    """Costs itself and what it swallowed of the next, never the rest of the file; it is counted."""
    rows = [[str(i), f"第{i}行，\n{i}续" if i % 2 else f"第{i}行"] for i in range(40)]
    lines = [table([row]) for row in rows]
    lines.insert(at, broken + "\n")
    found = of("id,text\n" + "".join(lines))
    read_rows = [[item["id"], item["text"]] for item in good(found)]
    assert [row for row in rows if row not in read_rows] in ([], [rows[min(at, 39)]])
    assert 1 <= sum(map(bool, causes(found))) <= 4 and set(causes(found)) <= {None, "bad_record", "bad_encoding"}


def parquet(path: Path, rows: list[dict[str, Any]], size: int = 3) -> None:
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path, row_group_size=size)


def test_parquet(of: Any, tmp_path: Path) -> None:
    rows = [{"id": i, "text": f"第{i}篇", "turns": [{"role": "user", "content": "问"}] * (i % 3)} for i in range(10)]
    parquet(tmp_path / "table", rows)
    data = (tmp_path / "table").read_bytes()
    whole = of(data)
    assert values(whole) == rows and [item.line for item in whole] == list(range(1, 11))
    assert len(read.spans_of(tmp_path / "corpus", "auto", 1)) == 4
    assert of(data, limit=1) == whole
    assert causes(of(data[:-20])) == causes(of(zipped(data))) == causes(of(data, "lines")) == ["bad_archive"]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "table", [{"text": "好"}])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="needs pyarrow; pip install pyarrow"):
        read.spans_of(tmp_path / "table", "auto", 1)


LONG = ["短", "", "长" * 50, "\u3000缩进\r", "", "x" * 300, '{"a": 1}', "末"] * 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
@pytest.mark.parametrize("layout", ["auto", "lines", "paragraphs", "text"])
@pytest.mark.parametrize(
    "text",
    [LINES * 5, LINES.replace("\n", "\r\n\n") * 3, "\n".join(LONG), "a\tb\n" * 9 + "c\n", dump(ITEMS * 9, indent=1)],
)
def test_spans_together_give_the_whole(of: Any, text: str, layout: str, encoding: str) -> None:
    data = text.encode(encoding)
    whole = of(data, layout)
    for limit in (1, 2, 7, 50, 99, 100, 101, 500, len(data) - 1, len(data)):
        assert of(data, layout, limit) == whole


def test_spans(tmp_path: Path) -> None:
    """Cut after LF, near each multiple of the limit; sizes add up; what can't be cut is whole."""
    path = tmp_path / "x"
    path.write_text("".join(f'{{"text": "{"字" * (i % 50)}"}}\n' for i in range(1000)), encoding="utf-8")
    data = path.read_bytes()
    spans = read.spans_of(path, "auto", 1000)
    assert spans[0].start == 0 and spans[-1].end == len(data) and sum(span.size for span in spans) == len(data)
    assert all(
        a.end == b.start and data[b.start - 1 : b.start] == b"\n" for a, b in zip(spans, spans[1:], strict=False)
    )
    assert all(1000 * i <= span.start < 1000 * i + 200 for i, span in enumerate(spans))
    assert sum(map(read.lines_in, spans)) == 1000
    path.write_bytes(zipped(data))
    (span,) = read.spans_of(path, "auto", 1)
    assert span.name == f"{path}!folder/数据" and not span.part and 0 < span.size < path.stat().st_size
    path.write_bytes(gzip.compress(data))
    assert read.spans_of(path, "auto", 1) == [Span(str(path), size=path.stat().st_size)]


def test_what_it_is_taken_for(tmp_path: Path) -> None:
    for content, layout in ((LINES, "json lines"), (dump(ITEMS), "array"), ("a\tb\n" * 2, "tsv"), ("\0\1", "binary")):
        (tmp_path / "x").write_text(content, encoding="utf-8")
        assert read.layout_of(Span(str(tmp_path / "x")), "auto") == layout
        assert read.layout_of(Span(str(tmp_path / "x")), "lines") == ("binary" if layout == "binary" else "lines")


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\t\n", BOM.encode(), BOM.encode() + b"\n", b"[]", b"[\n]\n"])
def test_nothing_in_it(of: Any, content: bytes) -> None:
    for pack in PACK.values():
        assert of(pack(content)) == []
    if b"[" not in content:
        assert [of(content, layout) for layout in read.PLAIN] == [[], [], []]


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize(
    "broken", ['{"id": "9", "text": "断', 'xt": "断"}', "{'id': 9}", '{"a": NaN}', "]", '"\ud800"', '{"a": "\\ud800"}']
)
def test_one_broken_line(of: Any, at: int, broken: str) -> None:
    lines = [*map(dump, ITEMS)]
    lines.insert(at, broken)
    found = of("\n".join(lines).encode("utf-8", "surrogatepass"))
    assert good(found) == ITEMS
    assert [item.line for item in found if isinstance(item, Bad)] == [at + 1]


MANY = [{"text": f"第{i}篇，“[{{”", "turns": [{"q": f"问{i}", "a": "}, {"}] * 3, "n": [i, [], {}]} for i in range(50)]


@pytest.mark.parametrize("at", [0, 1, 25, 49])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "broken",
    [
        '{"text": "断"',  # no closing bracket
        '{"text": "断',  # no closing quote either
        'xt": "断"}',
        '{"text": "断", "turns": [{"q": "问", "a": "答"}, {"q": "问"}',
        '{"text": "断", "turns": [{"q": "问"}]]}',
        "{'text': 9}",
        '{"text": NaN}',
        '{"text": "断"}]',
        '{"text": "断"} {',
        "[" * 5000,
        "nul",
        '{"text": "\ud800"}',
        '{"text": "\\u12"}',
    ],
)
def test_one_broken_element(of: Any, at: int, indent: int | None, broken: str) -> None:
    """Costs itself, wherever it stands; what looks like elements inside it may be counted as more."""
    items = [dump(item, indent=indent) for item in MANY]
    items.insert(at, broken)
    found = of(("[" + ", ".join(items) + "]").encode("utf-8", "surrogatepass"))
    kept = [item for item in good(found) if "turns" in item and len(item["turns"]) == 3]
    assert len(kept) >= len(MANY) - 1 and all(item in MANY for item in kept)
    assert 1 <= sum(map(bool, causes(found))) <= 4 and len(good(found)) <= len(MANY) + 1
    assert "broken_array" not in causes(found)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.9, 1])
def test_truncated_array(of: Any, indent: int | None, share: float) -> None:
    """Keeps what is whole; what is cut is one bad record."""
    text = dump(MANY, indent=indent)
    found = of(text[: int(len(text) * share) - 1])
    assert causes(found)[-1] == "bad_json" and not any(causes(found)[:-1])
    assert good(found) == MANY[: len(found) - 1] and len(found) - 1 >= int(50 * share) - 1


def test_lost_array(of: Any) -> None:
    """Where an array can't be taken up again the loss is said, and is no one bad record."""
    found = of(dump(MANY)[:-1] + ", " + "损" * 100_000)
    assert good(found) == MANY and causes(found)[50:] == ["broken_array"]
    assert "bytes from there on can't be read" in found[50].detail  # type: ignore[union-attr]


def test_arrays_longer_than_a_block(of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the blocks' borders fall on."""
    items = [*MANY, "文", 7, None, [], {}, ["甲", ["乙"]], 1.5e3, "\\", '"', "}, {", *MANY]
    for block in (1, 2, 3, 7, 50, 1000):
        monkeypatch.setattr(containers, "BLOCK", block)
        assert values(of(dump(items))) == items
        assert values(of(dump(items, indent=1).encode("gb18030"))) == items
        assert values(of("\n".join(map(dump, items[:50])))) == items[:50]
        assert values(of(dump({"data": [{"a": 1}, *items]}))) == [{"a": 1}, *items]
    for alike in (["文", "}, {", '", "'], [1, 22, 333], [[1, [2]], [3]], [None, True], [{}, {}]):
        assert values(of(dump(alike * 50))) == alike * 50


def test_too_large(of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record above the limit is counted, not held; the others stay."""
    for module in (containers, read):
        monkeypatch.setattr(module, "TOO_LARGE", 1000)
        monkeypatch.setattr(module, "SNIFF_BYTES", 200, raising=False)
    monkeypatch.setattr(containers, "BLOCK", 100)
    long = {"text": "长" * 2000}
    items = [*ITEMS[:2], long, *ITEMS[:2]]
    for text in ("\n".join(map(dump, items)), dump(items), dump(items, indent=1)):
        found = of(text)
        assert causes(found) == [None, None, "too_large", None, None] and good(found) == [*ITEMS[:2]] * 2
    assert causes(of("短\n" + "长" * 2000 + "\n短", "lines")) == [None, "too_large", None]
    assert causes(of("短\n\n" + "长\n" * 2000 + "\n短", "paragraphs")) == [None, "too_large", None]
    assert causes(of("长\n" * 2000, "text")) == ["too_large"]
    for pack in ("plain", "gz"):  # no single document any more, however it looks
        assert len(values(of(PACK[pack]("短句。\n".encode() * 2000)))) == 2000
        assert len(values(of(PACK[pack]("短句。\n\n".encode() * 2000)))) == 2000


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


def test_deep_nesting(of: Any) -> None:
    for depth in (100, 1000, 1020, 100_000):
        deep = "[" * depth + "]" * depth
        line = f'{{"text": "好", "extra": {deep}}}'
        found = of(f"{dump(ITEMS[0])}\n{line}\n{deep}\n{dump(ITEMS[0])}")
        assert len(found) == 4 and values([found[0], found[3]]) == [ITEMS[0]] * 2
        for item in found:
            if isinstance(item, Record):  # what reads it must not run out of stack either
                for layout in ("auto", *sources.LAYOUTS):
                    count_examples(item.value, layout)


def count_examples(value: Any, layout: str) -> int:
    """Examples of a record; a dropped one has none. Any other exception is a defect."""
    try:
        return len(sources.examples_of(value, sources.Reading(layout)))
    except sources.Drop:
        return 0


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a\0b", ["bad_encoding"]),
        (b"\0" * 1000, ["bad_encoding"]),
        (b'{"text": "a\0b"}\n{"text": "c"}', ["bad_json", None]),
        (b'\0{"text": "b"}\n{"text": "c"}\n{"text": "d"}', ["bad_json", None, None]),
        (dump(ITEMS).encode("utf-16")[:-1], [None, None, None, None, "bad_encoding"]),
        (dump(ITEMS[0]).encode("utf-16-le"), ["bad_encoding"]),  # no mark: NULs
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ["bad_encoding"]),
        (random.Random(0).randbytes(100_000), ["bad_encoding"]),
        (b"corpus.txt".ljust(257, b"\0") + b"ustar" + b"\0" * 1000, ["bad_encoding"]),
        (b"PAR1" + b"\0" * 50, ["bad_archive"]),
        (b"\x1f\x8b", ["bad_archive"]),
        (b"\x1f\x8b\x08" + b"\xff" * 50, ["bad_archive"]),
        (gzip.compress(gzip.compress(b"x")), ["bad_encoding"]),
        (b"PK\x03\x04" + b"x" * 50, ["bad_archive"]),
        (zipped(zipped(b"x")), ["bad_archive"]),
        (zipped(b""), []),
    ],
)
@pytest.mark.parametrize("layout", ["auto", "text"])
def test_no_text_at_all(of: Any, content: bytes, expected: list[str | None], layout: str) -> None:
    found = causes(of(content, layout))
    assert found == expected or (layout == "text" and content[:1] in b"{\0\xff" and len(found) == 1)


@pytest.mark.parametrize("name", [name for name in PACK if name != "plain"])
@pytest.mark.parametrize("array", [False, True])
def test_a_stream_cut_short_keeps_its_first_records(of: Any, name: str, array: bool) -> None:
    rng = random.Random(0)
    items = [{"text": "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(500))} for _ in range(1000)]
    data = PACK[name]((dump(items) if array else "\n".join(map(dump, items))).encode())
    cut = len(data) * 3 // 4
    found = of(data[:cut])
    assert isinstance(found[-1], Bad) and found[-1].cause == "bad_archive"
    assert values(found[:-1]) == items[: len(found) - 1]
    assert len(found) > 250 or name == "bz2" or "zip" in name  # whose directory stands at its end
    found = of(data[:cut] + bytes(len(data) - cut - 500) + data[-500:])
    assert causes(found)[-1] == "bad_archive" and len(causes(found)) - len(good(found)) <= 2
    assert good(found) == items[: len(good(found))] and (len(found) > 250 or name == "bz2")


def test_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("b/2.json", "a/3", "b/1.txt", ".hidden/x", "a/.DS_Store", "c.jsonl"):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("好")
    (tmp_path / "corpus" / "empty").mkdir()
    (tmp_path / "corpus" / "d").symlink_to("c.jsonl")
    (tmp_path / "corpus" / "again").symlink_to("b")

    def found(pattern: str) -> list[str]:
        return [str(p.relative_to(tmp_path / "corpus")) for p in read.files_of(tmp_path / "corpus" / pattern, "here")]

    assert found("") == ["a/3", "b/1.txt", "b/2.json", "c.jsonl", "d"]
    assert read.files_of(tmp_path / "corpus" / "a" / ".DS_Store", "here") == [tmp_path / "corpus" / "a" / ".DS_Store"]
    assert found("*.jsonl") == ["c.jsonl"] and found("[ab]/[0-9]*") == ["a/3", "b/1.txt", "b/2.json"]
    assert found("b/**/*.json") == ["b/2.json"]
    assert found("[a-b]") == ["a/3", "b/1.txt", "b/2.json"] and found("?") == ["a/3", "b/1.txt", "b/2.json", "d"]
    with pytest.raises(UserError, match="no file has a name like that"):
        found("*.nothing")
    (tmp_path / "corpus" / "x[1]").write_text("好")
    assert found("x[1]") == ["x[1]"]


@pytest.mark.parametrize(
    ("link", "to", "why"),
    [
        ("out", "../secret.txt", "leads out of"),
        ("out", "..", "leads out of"),
        ("out", "/etc", "leads out of"),
        ("gone", "nowhere", "leads nowhere"),
        ("loop", "loop", "leads nowhere"),
    ],
)
def test_links(tmp_path: Path, link: str, to: str, why: str) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "secret.txt").write_text("好")
    (tmp_path / "corpus" / "a.txt").write_text("好")
    (tmp_path / "corpus" / link).symlink_to(to)
    with pytest.raises(UserError, match=why) as e:
        read.files_of(tmp_path / "corpus", "conf.yaml: source wiki")
    assert str(e.value).startswith(f"conf.yaml: source wiki: {tmp_path / 'corpus' / link}: a link that")


def test_no_files(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / ".hidden").write_text("好")
    with pytest.raises(UserError, match="the folder holds no files"):
        read.files_of(tmp_path / "corpus", "here")
    for name in ("none", "none/none", "x" * 300):
        with pytest.raises(UserError, match="no such file or folder"):
            read.files_of(tmp_path / name, "here")
    os.mkfifo(tmp_path / "corpus" / "pipe")  # opening one would wait for ever
    with pytest.raises(UserError, match="the folder holds no files"):
        read.files_of(tmp_path / "corpus", "here")


def test_real_data(real_data: Path) -> None:
    """Every file gives as many records as its README says, and each is taken for what it is."""
    expected = {
        "wiki2019zh/AA/wiki_00": ("json lines", 64),
        "instruct/belle_zh_seed_tasks.json": ("json lines", 175),
        "instruct/lawyer_legal_advice.json": ("array", 5000),
        "c3/c3-m-dev.json": ("array", 1046),
        "traditional/DRCD_dev.json": ("array", 383),
        "traditional/poet.tang.0.json": ("array", 1000),
        "instruct/llama_chinese_dev_sft.csv": ("csv", 200),
        "translation2019zh/tatoeba_cmn.txt": ("tsv", 29155),
        "flan/cot_tsv/qasc_train.tsv": ("tsv", 1084),
        "raw/CLUECorpusSmall_sampled.even_lines.txt": ("lines", 1250),
        "news2016zh/news2016zh_real_1.json": ("object", 1),
        "README.md": ("text", 1),
    }
    expected |= {f"raw/luxun_pd/{path.name}": ("text", 1) for path in (real_data / "raw" / "luxun_pd").iterdir()}
    for name, (kind, count) in expected.items():
        (span,) = read.spans_of(real_data / name, "auto", 1 << 40)
        assert (name, read.layout_of(span, "auto")) == (name, kind)
        assert len(values(list(read.records(span, "auto")))) == count


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
    if encoding in ("big5", "utf-8"):
        path.write_bytes(path.read_bytes().replace("漢字".encode(encoding), b"\xff", 1))
        found = list(read.records(read.spans_of(path, "auto", 1 << 20, encoding)[0], "auto"))
        assert [type(item) for item in found].count(Bad) == 1 and len(found) == 50
