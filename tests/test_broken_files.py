"""Damaged files: what is whole is kept, what is lost is counted by cause, and nothing raises."""

from __future__ import annotations

import gzip
import random
from typing import Any

import pytest
from test_read import ITEMS, MANY, PACK, causes, dump, good, values, zipped

from pandallm.data import containers, read, sources
from pandallm.data.read import Bad, Record


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
