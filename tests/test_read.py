"""Files of any layout -> records: the same ones whatever holds them and however they are cut; files of a folder."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from pandallm.config import UserError
from pandallm.data import containers, read
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


MANY = [{"text": f"第{i}篇，“[{{”", "turns": [{"q": f"问{i}", "a": "}, {"}] * 3, "n": [i, [], {}]} for i in range(50)]


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
