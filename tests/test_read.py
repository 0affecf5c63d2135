"""Files of any layout -> records: nothing is lost without being counted, and nothing raises."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from pandallm.config import UserError
from pandallm.data import read, sources
from pandallm.data.read import Bad, Record

CORPORA = sorted((ROOT / "pandallm" / "demo" / "corpora").glob("*.jsonl"))
ITEMS: list[Any] = [
    {"id": "1", "text": "第一行\n第二行"},
    {"id": "2", "text": "行\u2028分\u2029隔\x85符\u3000"},
    [{"inputs": "问", "targets": "答"}, {"inputs": "再问", "targets": "再答"}],
    {"id": "3", "text": "繁體與 English 混寫，“引號”🐼"},
]


def dump(value: Any, **keys: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **keys)


@pytest.fixture
def of(tmp_path: Path) -> Any:
    """of(content) -> the records of a file with this content; a name without a suffix."""

    def of_(content: str | bytes, as_text: bool = False) -> list[Record | Bad]:
        path = tmp_path / "corpus"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(read.records(path, as_text))

    return of_


def values(items: list[Record | Bad]) -> list[Any]:
    assert all(isinstance(item, Record) for item in items), items
    return [item.value for item in items if isinstance(item, Record)]


LINES = "\n".join(map(dump, ITEMS)) + "\n"
BOM = "\ufeff"


@pytest.mark.parametrize(
    "text",
    [
        LINES,
        LINES.rstrip(),
        "\n \n" + LINES.replace("\n", "\n\n"),
        dump(ITEMS),
        dump(ITEMS) + "\n",
        dump(ITEMS, indent=2),
        "[\n" + ",\n".join(map(dump, ITEMS)) + "\n]\n",
        "[" + ",\n".join(map(dump, ITEMS)) + "]",
        "[\n" + "\n,".join(map(dump, ITEMS)) + "\n]",
        "[\n\n" + ",\n\n".join(dump(item, indent=4) for item in ITEMS) + "]",
    ],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "gzip"])
def test_same_records_from_every_layout(of: Any, text: str, ending: str, encoding: str) -> None:
    text = text.replace("\n", ending)
    data = gzip.compress(text.encode()) if encoding == "gzip" else text.encode(encoding)
    assert values(of(data)) == ITEMS


def test_places(of: Any) -> None:
    """The line of a record in JSON lines (blank ones counted), its number in an array."""
    assert [item.line for item in of("\n" + LINES.replace("\n", "\n\n"))] == [2, 4, 6, 8]
    assert [item.line for item in of(dump(ITEMS, indent=1))] == [1, 2, 3, 4]


@pytest.mark.parametrize("keys", [{}, {"indent": 2}])
def test_one_object_a_file(of: Any, keys: dict[str, Any]) -> None:
    talk = {"round_1": {"prompt": "问", "response": "答"}, "round_2": {"prompt": "再问", "response": "再答"}}
    assert values(of(dump(talk, **keys))) == [talk]
    assert values(of(BOM + dump(talk, **keys) + "\r\n")) == [talk]
    assert values(of('{"conversations":\n[{"from": "human", "value": "问"}]\n}')) == [
        {"conversations": [{"from": "human", "value": "问"}]}
    ]


def test_json_lines_of_arrays(of: Any) -> None:
    talks = [[{"inputs": "问", "targets": "答"}], [{"inputs": "甲", "targets": "乙"}]]
    assert values(of("\n".join(map(dump, talks)))) == talks


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("第一段\n\n第二段\n", "第一段\n\n第二段"),
        (BOM + "第一段\r\n第二段", "第一段\n第二段"),
        ("第一段\r第二段", "第一段\n第二段"),
        ("[新华社] 今日天气", "[新华社] 今日天气"),
        ("标题\n[1]\n", "标题\n[1]"),
        ('他说：{"a": 1}', '他说：{"a": 1}'),
        ("\n\n正文".encode("gb18030"), "正文"),
    ],
)
def test_plain_text(of: Any, content: str | bytes, text: str) -> None:
    assert values(of(content)) == [text]


def test_as_text(of: Any) -> None:
    assert values(of(LINES, as_text=True)) == [LINES.strip()]


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\t\n", BOM.encode(), BOM.encode() + b"\n", b"[]", b"[\n]\n"])
def test_nothing_in_it(of: Any, content: bytes) -> None:
    assert of(content) == []
    assert of(gzip.compress(content)) == []


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize(
    "broken", ['{"id": "9", "text": "断', 'xt": "断"}', "{'id': 9}", '{"a": NaN}', "]", '"\ud800"']
)
def test_one_broken_line(of: Any, at: int, broken: str) -> None:
    lines = [*map(dump, ITEMS)]
    lines.insert(at, broken)
    found = of("\n".join(lines).encode("utf-8", "surrogatepass"))
    assert [item.value for item in found if isinstance(item, Record)] == ITEMS
    assert [item.line for item in found if isinstance(item, Bad)] == [at + 1]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_truncated_array(of: Any, indent: int | None, share: float) -> None:
    """Counted as one bad record whose line is where the file breaks off."""
    text = dump(ITEMS, indent=indent)
    text = text[: int(len(text) * share)]
    (bad,) = of(text)
    assert isinstance(bad, Bad) and bad.cause == "bad_json" and bad.line == text.count("\n") + 1


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


def test_one_bad_byte_in_gb18030(of: Any) -> None:
    lines = [dump({"text": "汉字" * 9}).encode("gb18030") for _ in range(5)]
    lines[2] = lines[2][:20] + b"\xff" + lines[2][21:]
    found = of(b"\n".join(lines))
    assert [type(item) for item in found] == [Record, Record, Bad, Record, Record]
    assert found[2].cause == "bad_encoding" and found[2].line == 3


def test_ascii_start_then_chinese(of: Any) -> None:
    """The encoding is told from the file's first MiB; what turns out otherwise is counted line by line."""
    lines = [dump({"text": "a" * 1000}).encode()] * 1100
    found = of(b"\n".join([*lines, dump({"text": "汉字"}).encode("gb18030")]))
    assert len(found) == 1101 and isinstance(found[-1], Bad) and found[-1].cause == "bad_encoding"
    assert values(of(b"\n".join([*lines, dump({"text": "汉字"}).encode()])))[-1] == {"text": "汉字"}


@pytest.mark.parametrize("cut", range(8))
def test_the_first_mib_may_end_inside_a_character(of: Any, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "SNIFF_BYTES", 100 + cut)
    for encoding in ("utf-8", "gb18030"):
        assert (
            values(of((dump({"text": "汉字🐼" * 100}) + "\n").encode(encoding) * 2)) == [{"text": "汉字🐼" * 100}] * 2
        )


def test_boms_of_joined_files(of: Any) -> None:
    assert values(of("".join(BOM + dump(item) + "\n" for item in ITEMS))) == ITEMS


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


@pytest.mark.parametrize(
    ("content", "causes"),
    [
        (b"a\0b", ["bad_encoding"]),
        (b"\0" * 1000, ["bad_encoding"]),
        (b'{"text": "a\0b"}\n{"text": "c"}', ["bad_json", None]),
        (b'\0{"text": "b"}\n{"text": "c"}\n{"text": "d"}', ["bad_json", None, None]),
        ("好".encode("utf-16"), ["bad_encoding"]),
        (dump(ITEMS).encode("utf-16"), ["bad_encoding"]),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ["bad_encoding"]),
        (gzip.compress(b"x" * 1000)[:-4], ["bad_gzip"]),
        (b"\x1f\x8b", ["bad_gzip"]),
        (b"\x1f\x8b\x08" + b"\xff" * 50, ["bad_gzip"]),
        (b"\x1f\x8b\x07" + gzip.compress(b"x" * 1000)[3:], ["bad_gzip"]),
        (gzip.compress(b"x" * 1000)[:10] + b"\xff" * 50, ["bad_gzip"]),
        (gzip.compress(b"x" * 1000)[:-8] + b"\0" * 8, ["bad_gzip"]),
    ],
)
def test_no_text_at_all(of: Any, content: bytes, causes: list[str | None]) -> None:
    assert [item.cause if isinstance(item, Bad) else None for item in of(content)] == causes


def test_a_gzip_cut_short_keeps_its_first_records(of: Any) -> None:
    rng = random.Random(0)
    lines = [dump({"text": "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(500))}) for _ in range(2000)]
    data = gzip.compress("\n".join(lines).encode())
    found = of(data[: len(data) * 3 // 4])
    assert isinstance(found[-1], Bad) and found[-1].cause == "bad_gzip"
    got = values(found[:-1])
    assert 1000 < len(got) < 2000 and got == [json.loads(line) for line in lines[: len(got)]]


def count_examples(value: Any, layout: str) -> int:
    """Examples of a record; a dropped one has none. Any other exception is a defect."""
    try:
        return len(sources.examples_of(value, layout, ("甲", "乙"), seed=0))
    except sources.Drop:
        return 0


def mutations(rng: random.Random, data: bytes) -> Iterator[bytes]:
    """A few wounds of each kind."""
    at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    yield data[:at] + data[to:]
    yield data[:at]
    yield data[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9))) + data[at:]
    yield data[:at] + rng.choice([b"\0", b"\n", b"\r", b'"', b"\\", b"{", b"]", b"null", b"\\ud800"]) + data[to:]
    yield data[:at] + data[at:to].decode("utf-8", "replace").encode("gb18030") + data[to:]
    yield data[at:to][::-1] + data[:at]


def test_byte_soup(of: Any) -> None:
    """Mutated demo records, in files of every kind: each file is read to its end, and each record kept or counted."""
    rng = random.Random(2026)
    lines = [line for path in CORPORA for line in path.read_bytes().splitlines()]
    kept = bad = 0
    for line in rng.sample(lines, 40):
        for wounded in mutations(rng, line):
            whole = rng.choice(lines)
            for content in (
                wounded,
                whole + b"\n" + wounded + b"\n" + whole,
                b"[" + whole + b",\n" + wounded + b"]",
                gzip.compress(wounded) if rng.random() < 0.5 else wounded[: len(wounded) // 2] + gzip.compress(wounded),
            ):
                for item in of(content):
                    if isinstance(item, Record):
                        kept += 1
                        for layout in ("auto", rng.choice(list(sources.LAYOUTS))):
                            count_examples(item.value, layout)
                    else:
                        assert item.cause in sources.BAD and item.line >= 1 and "\n" not in item.detail
                        bad += 1
    assert kept > 500 and bad > 500


def test_wrong_types_everywhere() -> None:
    """Every value of a good record of every layout replaced by every type: kept or dropped, never an exception."""
    rng = random.Random(1)
    good = [json.loads(line) for path in CORPORA for line in path.read_text(encoding="utf-8").splitlines()[:3]]
    good += [
        {"instruction": "问", "input": "", "output": "答", "history": [["甲", "乙"]], "system": "丙"},
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
        {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]},
        {"chat": {"turn_1": {"Human": "问", "MOSS": "答"}}},
        {"round_1": {"prompt": "问", "response": "答"}},
        {"textbox_question": "问", "textbox_answer": "答", "textbox_q_context": None},
        [["段落"], [{"question": "问", "choice": ["甲", "乙"], "answer": "乙"}], "id"],
        {"text": "文", "question": "问", "options": ["甲", "乙"], "answer": 1},
    ]
    strange: list[Any] = [
        None,
        0,
        1.5,
        True,
        "",
        "a",
        "ab",
        [],
        [1],
        ["a", "b"],
        [[]],
        {},
        {"a": 1},
        [{}],
        [{"inputs": 1}],
    ]

    def wound(value: Any) -> Any:
        if rng.random() < 0.1:
            return rng.choice(strange)
        if isinstance(value, dict):
            return {rng.choice([k, k, k, f"{k}x", "round_x", "turn_"]): wound(v) for k, v in value.items()}
        return [wound(v) for v in value] if isinstance(value, list) else value

    counts = [count_examples(wound(record), layout) for record in good * 60 for layout in ("auto", *sources.LAYOUTS)]
    assert sum(count > 0 for count in counts) > 500 and sum(count == 0 for count in counts) > 5000


def test_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("b/2.json", "a/3", "b/1.txt", ".hidden/x", "a/.DS_Store", "c.jsonl"):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("好")
    (tmp_path / "corpus" / "empty").mkdir()
    (tmp_path / "corpus" / "d").symlink_to("c.jsonl")
    (tmp_path / "corpus" / "again").symlink_to("b")
    found = [str(path.relative_to(tmp_path / "corpus")) for path in read.files_of(tmp_path / "corpus", "here")]
    assert found == ["a/3", "b/1.txt", "b/2.json", "c.jsonl", "d"]
    assert read.files_of(tmp_path / "corpus" / "a" / ".DS_Store", "here") == [tmp_path / "corpus" / "a" / ".DS_Store"]


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
