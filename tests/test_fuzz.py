"""Damaged corpora of every kind: reading them ends, raises nothing, and loses no more than was damaged."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pandallm.data import read, sources
from pandallm.data.read import Bad, Record

FAST, FULL = 400, 10_000  # mutations of each test
LAYOUTS = ("auto", "auto", "auto", *read.PLAIN)


def zipped(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", data[: len(data) // 2])
        archive.writestr("b", data[len(data) // 2 :])
    return out.getvalue()


PACKS: list[Callable[[bytes], bytes]] = [gzip.compress, bz2.compress, lzma.compress, zstandard.compress, zipped]


def items_of(rng: random.Random, count: int = 40) -> list[dict[str, Any]]:
    """Records of several layouts, one layout a corpus."""

    def text(most: int) -> str:
        return "".join(rng.choice('汉字，。“”abc 123\n"\\{}[],:🐼') for _ in range(rng.randrange(1, most)))

    kinds: list[Callable[[int], dict[str, Any]]] = [
        lambda i: {"id": str(i), "text": text(60)},
        lambda i: {"instruction": text(20), "input": "", "output": text(40), "history": [[text(9), text(9)]] * (i % 3)},
        lambda i: {"conversations": [{"from": role, "value": text(20)} for role in ("human", "gpt") * (1 + i % 3)]},
        lambda i: {
            "score": i / 7,
            "english": text(20),
            "chinese": text(20),
            "meta": {"a": [None, True], "b": {"c": i}},
        },
    ]
    kind = rng.choice(kinds)
    return [kind(i) for i in range(count)]


def written(rng: random.Random, items: list[dict[str, Any]], form: str) -> bytes:
    if form == "lines":
        return b"\n".join(map(orjson.dumps, items)) + b"\n"
    if form == "wrapped":
        return json.dumps({"version": 1, "data": items}, ensure_ascii=False, indent=rng.choice([None, 1])).encode()
    if form == "array":
        return json.dumps(items, ensure_ascii=False, indent=rng.choice([None, 1, 4])).encode()
    if form == "objects":
        return "\n".join(json.dumps(item, ensure_ascii=False, indent=2) for item in items).encode()
    if form == "parquet":
        out = io.BytesIO()
        table = pytest.importorskip("pyarrow").Table.from_pylist(items)
        pytest.importorskip("pyarrow.parquet").write_table(table, out, row_group_size=9)
        return out.getvalue()
    if form == "table":
        text = io.StringIO()
        rows = [[str(v) for v in item.values()] for item in items]
        writer = csv.writer(text, delimiter=rng.choice(",\t"), quoting=rng.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
        writer.writerows([list(items[0]), *rows] if rng.random() < 0.7 else rows)
        return text.getvalue().encode()
    return "\n".join(str(v) for item in items for v in item.values()).encode()


def wounded(rng: random.Random, data: bytes, most: int) -> bytes:
    """One wound: at most so many bytes are taken away, changed or put in."""
    at = rng.randrange(min(8, len(data)), len(data) + 1)
    to = min(len(data), at + rng.randrange(most))
    noise = bytes(rng.randrange(256) for _ in range(rng.randrange(1, most)))
    token = rng.choice(
        [b"\0", b"\n", b"\r", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b"null", b"\\ud800", b"\xef\xbb\xbf"]
    )
    return data[:at] + rng.choice(
        [
            data[to:],
            bytes([rng.randrange(256)]) + data[at + 1 :],
            noise + data[at:],
            noise + data[to:],
            token + data[at:],
            token + data[to:],
            token * rng.randrange(2, 50) + data[at:],
            data[at:to][::-1] + data[to:],
            data[at:to].replace(b"\n", b"") + data[to:],
            data[at:to] * 2 + data[to:],
            data[at:to].decode("utf-8", "replace").encode("gb18030", "replace") + data[to:],
        ]
    )


def all_of(path: Path, layout: str, limit: int = 1 << 40) -> list[Record | Bad]:
    """Everything a file gives. Of exceptions there may only be Drop, when the records are made examples."""
    found = [item for span in read.spans_of(path, layout, limit) for item in read.records(span, layout)]
    for item in found:
        assert item.line >= 1
        if isinstance(item, Bad):
            assert item.cause in read.CAUSES and "\n" not in item.detail
            continue
        with suppress(sources.Drop):
            sources.examples_of(item.value, sources.Reading(layout))
    return found


def values(items: list[Record | Bad]) -> list[Any]:
    return [item.value for item in items if isinstance(item, Record)]


def check_anything(path: Path, seed: int, source: Callable[[random.Random], bytes]) -> None:
    """Any wounds, any container, packed before or after."""
    rng = random.Random(seed)
    data = source(rng)
    for _ in range(rng.randrange(1, 4)):
        data = wounded(rng, data, rng.choice([2, 20, 1000])) if data else b"x"
    if rng.random() < 0.3:
        data = rng.choice(PACKS)(data)
        data = wounded(rng, data, 100) if rng.random() < 0.7 else data[: rng.randrange(len(data))]
    path.write_bytes(data)
    layout = rng.choice(LAYOUTS)
    whole = all_of(path, layout)
    assert len(whole) <= len(data) * (1000 if read.layout_of(read.Span(str(path)), layout) == "binary" else 50) + 1
    if rng.random() < 0.3:
        pieces = all_of(path, layout, rng.randrange(1, 500))
        assert [i.value if isinstance(i, Record) else i.cause for i in pieces] == [
            i.value if isinstance(i, Record) else i.cause for i in whole
        ]


def generated(rng: random.Random) -> bytes:
    form = rng.choice(["lines", "array", "wrapped", "objects", "table", "parquet", "plain"])
    return written(rng, items_of(rng), form)


def check_lines(path: Path, seed: int) -> None:
    """JSON lines: each line that is as it was gives its record, at its place."""
    rng = random.Random(seed)
    data = written(rng, items_of(rng), "lines")
    whole = set(data.splitlines())
    for _ in range(rng.randrange(1, 4)):
        data = wounded(rng, data, 30)
    path.write_bytes(data)
    found = {item.line: item for item in all_of(path, "auto")}
    for number, line in enumerate(data.split(b"\n"), 1):
        if line in whole:
            item = found[number]
            assert isinstance(item, Record) and item.value == orjson.loads(line)


def check_array(path: Path, seed: int) -> None:
    """Arrays: a wound costs the elements it touches, one more at most, and is counted."""
    rng = random.Random(seed)
    items = items_of(rng)
    data = written(rng, items, rng.choice(["array", "wrapped"]))
    wounds = rng.randrange(1, 4)
    for _ in range(wounds):
        data = data[:40] + wounded(rng, data[40:], 10)
    path.write_bytes(data)
    found = all_of(path, "auto")
    kept = values(found)
    missing = [item for item in items if item not in kept]
    assert len(missing) <= 3 * wounds, (seed, len(missing))
    assert len(found) >= len(items) - 3 * wounds


CHECKS = {
    "anything": lambda path, seed: check_anything(path, seed, generated),
    "lines": check_lines,
    "array": check_array,
}


@pytest.mark.parametrize("name", CHECKS)
def test_mutations(tmp_path: Path, name: str) -> None:
    for seed in range(FAST):
        CHECKS[name](tmp_path / "corpus", seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_many_mutations(tmp_path: Path, name: str) -> None:
    for seed in range(FAST, FAST + FULL):
        CHECKS[name](tmp_path / "corpus", seed)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
RECORDS = st.lists(st.dictionaries(st.text(max_size=5), JSON, min_size=1, max_size=5), min_size=2, max_size=12)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RECORDS, st.sampled_from(["lines", "array", "objects"]), st.integers(0, 2**32), st.integers(1, 200))
def test_any_records_come_back(tmp_path: Path, items: list[Any], form: str, seed: int, limit: int) -> None:
    rng = random.Random(seed)
    data = written(rng, items, form)
    (tmp_path / "corpus").write_bytes(rng.choice(PACKS[:-1])(data) if rng.random() < 0.3 else data)
    assert values(all_of(tmp_path / "corpus", "auto", limit)) == items


def mutate_real(real_data: Path, path: Path, seeds: range) -> None:
    files = [file for file in read.files_of(real_data, "here") if file.stat().st_size < 6_000_000]

    def source(rng: random.Random) -> bytes:
        data = rng.choice(files).read_bytes()
        start = rng.choice([0, rng.randrange(len(data))])
        return data[start : start + rng.choice([3000, 30_000])]

    for seed in seeds:
        check_anything(path, seed, source)


def test_mutations_of_real_files(real_data: Path, tmp_path: Path) -> None:
    mutate_real(real_data, tmp_path / "corpus", range(FAST // 2))


@pytest.mark.slow
def test_many_mutations_of_real_files(real_data: Path, tmp_path: Path) -> None:
    mutate_real(real_data, tmp_path / "corpus", range(FAST, FAST + FULL))
