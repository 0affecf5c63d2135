"""What records lie in: packed streams, zip archives, text encodings, JSON arrays, parquet.

Streams come as blocks of bytes and nothing here holds a whole file. A stream that is cut short or damaged raises Broken
after the last good block. A JSON array is parsed piece by piece, and goes on after an element that is damaged.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import importlib
import io
import lzma
import os
import re
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import IO, Any, NamedTuple, cast

import orjson
import zstandard

from pandallm.config import UserError

BLOCK = 1 << 17
TOO_LARGE = 64 << 20  # bytes of one record or document above which it is not read
ROWS = 256  # of a table that are held at once


@dataclass(frozen=True)
class Record:
    """One parsed record and its place: the line it starts at, or its number in an array or of a row; from 1."""

    value: Any
    line: int


@dataclass(frozen=True)
class Bad:
    """A record that could not be read, with the cause it is counted under and what the parser said."""

    cause: str
    line: int
    detail: str


class Broken(Exception):
    """A stream that is cut short or damaged."""


_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError, zipfile.BadZipFile, RuntimeError)


def packing(head: bytes) -> str:
    """What a file that begins like this is: gz, bz2, xz, zst, zip, parquet, or "" for none of these."""
    for name, magic in (
        ("gz", rb"\x1f\x8b"),
        ("bz2", rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
        ("xz", rb"\xfd7zXZ\0"),
        ("zst", rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
        ("zip", rb"PK(?:\x03\x04|\x05\x06)"),
        ("parquet", rb"PAR1"),
    ):
        if re.match(magic, head):
            return name
    return ""


def blocks(path: str, member: str = "", start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The unpacked bytes of a file, of a member of a zip archive or of a range of a file. Raises Broken."""
    try:
        with _archive(path, *_stamp(path)).open(member) if member else open(path, "rb") as f:
            if start or end is not None:
                f.seek(start)
                yield from _range(f, None if end is None else end - start)
            else:
                yield from _unpacked(f)
    except _DAMAGE as e:
        if isinstance(e, OSError) and e.errno is not None:  # the disk's failure, not the file's
            raise
        raise Broken(" ".join(str(e).split()) or type(e).__name__) from None


def _range(f: IO[bytes], size: int | None) -> Iterator[bytes]:
    while block := f.read(BLOCK if size is None else min(BLOCK, size)):
        yield block
        if size is not None:
            size -= len(block)


def _unpacked(f: Any) -> Iterator[bytes]:
    kind = packing(f.peek(16))
    if kind in ("zip", "parquet"):
        raise Broken("a damaged archive, or one inside another: unpack it first")
    if kind == "zst":
        yield from _zstd(f)
        return
    openers: dict[str, Any] = {"gz": lambda f: gzip.GzipFile(fileobj=f), "bz2": bz2.BZ2File, "xz": lzma.LZMAFile}
    reader = openers[kind](f) if kind in openers else f
    while block := reader.read1(BLOCK):  # read1: all that was unpacked before a damaged place
        yield block


def _zstd(f: IO[bytes]) -> Iterator[bytes]:
    decoder = None
    while data := f.read(1 << 13):  # little at a time: what comes out may be a thousand times as much
        while data:
            if decoder is None:
                decoder = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            if block := decoder.decompress(data):
                yield block
            data = decoder.unused_data if decoder.eof else b""
            if decoder.eof:
                decoder = None
    if decoder is not None:
        raise EOFError("the stream ended before its end mark")


def _stamp(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=2)  # the directory of an archive with 10,000 members takes long to read
def _archive(path: str, size: int, time: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def members(path: str) -> list[tuple[str, int]]:
    """(name, packed size) of the files in a zip archive, in its order, without hidden ones. Raises Broken."""
    try:
        found = _archive(path, *_stamp(path)).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as e:
        raise Broken(str(e)) from None
    return [
        (m.filename, m.compress_size)
        for m in found
        if not m.is_dir() and not any(part.startswith((".", "__MACOSX")) for part in m.filename.split("/"))
    ]


def encoding_of(head: bytes) -> str:
    """`utf-16` or `utf-32` by their marks; `gb18030` where the file's start, read as UTF-8, is wrong more often than
    right; else UTF-8 (BOM or not), whose damaged lines are then counted."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(head)  # incremental: the cut may split a character
    wrong = text.count("\ufffd")
    right = len(text) - wrong - len(text.encode("ascii", "ignore"))
    return "gb18030" if wrong > right else "utf-8"


def utf8(stream: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """The stream as UTF-8. A damaged place stays one: it becomes bytes that are never UTF-8, in the same line."""
    if encoding == "utf-8":
        yield from stream
        return
    decoder = codecs.getincrementaldecoder(encoding)("surrogateescape" if encoding == "gb18030" else "surrogatepass")
    for block in stream:
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError:  # UTF-32 only: the rest can't be told
            raise Broken(f"not {encoding.upper()}") from None
        if text:
            yield text.encode("utf-8", "surrogatepass")
    if decoder.getstate()[0]:  # half a character
        yield b"\xff"


def lines(stream: Iterator[bytes]) -> Iterator[bytes | None]:
    """The lines of a stream, without their LF; None for one that is too large."""
    parts: list[bytes] = []
    size = 0
    for block in stream:
        pieces = block.split(b"\n")
        size += len(pieces[0])
        if size <= TOO_LARGE:
            parts.append(pieces[0])
        if len(pieces) > 1:
            yield b"".join(parts) if size <= TOO_LARGE else None
            last = pieces.pop()
            yield from islice(pieces, 1, None)
            parts, size = [last], len(last)
    if size:
        yield b"".join(parts) if size <= TOO_LARGE else None


def too_large(line: int) -> Bad:
    return Bad("too_large", line, f"more than {TOO_LARGE >> 20} MB")


# ------------------------------------------------------------------------------------------------- tables

ROW_CHARS = 1 << 22  # of a row in quotes; a quote that is never closed would swallow the file
SNIFF_ROWS = 200
_NAME = re.compile(r"[\w .:/()-]{0,40}")
_KNOWN = """
    text content contents title question answer answers query response prompt completion instruction input output inputs
    targets input_text target_text source target src tgt label labels ask english chinese en zh sentence sentence1
    sentence2 document summary context passage review comment dialogue url history system category
    文本 标题 题目 内容 正文 文章 问题 答案 回答 提问 回复 指令 输入 输出 中文 英文 原文 译文 标签 类别 摘要 评论"""
_NAMES = frozenset(_KNOWN.split())


class Table(NamedTuple):
    """How a table is written."""

    delimiter: str
    quoted: bool  # whether cells may stand in quotes and hold line ends
    width: int
    header: list[str] | None


def table_of(text: str, whole: bool) -> Table | None:
    """How the table is written that begins like this; None if it is none. A tab divides cells, and quotes are text,
    where almost all lines have the same number of tabs. A comma does only where a first line of column names, or
    numbers or quoted cells beside it, tell that this isn't prose."""
    lines = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
    lines = (lines if whole else lines[:-1])[:SNIFF_ROWS]
    if not lines:
        return None
    tabs = Counter(line.count("\t") for line in lines)
    most = tabs.most_common(1)[0][0]
    if most and len(lines) > 1 and 20 * tabs[most] >= 19 * len(lines):
        cells = [line.split("\t") for line in lines if line.count("\t") == most]
        if 10 * sum(bool(row[0].strip()) for row in cells) >= 9 * len(cells):
            quoted = all(len(cell) > 1 and cell[0] == cell[-1] == '"' for row in cells for cell in row)
            names = [cell.strip('"') if quoted else cell for cell in cells[0]]
            return Table("\t", quoted, most + 1, _header(names))
    return _quoted_table(text, whole, "\t" if "\t" in lines[0] else ",")


def _quoted_table(text: str, whole: bool, delimiter: str) -> Table | None:
    try:
        first = next(filter(None, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)), [])
    except csv.Error:
        return None
    width, header = len(first), _header(first)
    if width == 1 and not header:
        return None
    guess = Table(delimiter, True, width, header)
    rows = [row for _, row in islice(_quoted_rows(iter([text.encode()]), guess), SNIFF_ROWS)]
    while rows and not whole and isinstance(rows[-1], Bad):  # cut off
        rows.pop()
    even = [row for row in rows if not isinstance(row, Bad) and len(row) == width]
    if header:
        return guess if len(even) > 1 and 2 * len(even) > len(rows) else None
    numbers = any(all(row[i].strip().isdecimal() for row in even) for i in range(width))
    quoted = any(delimiter in cell or "\n" in cell for row in even for cell in row)
    return guess if len(even) >= 5 and 20 * len(even) >= 19 * len(rows) and (numbers or quoted) else None


def _header(cells: list[str]) -> list[str] | None:
    """The names of the columns, if the first row is one of names: one that is known at least."""
    names = [cell.strip("\ufeff \t\r") for cell in cells]
    if len(set(names)) < len(names) or not all(map(_NAME.fullmatch, names)):
        return None
    if len(names) == 1 and not names[0].isascii():  # 标题: a line of a text
        return None
    return names if _NAMES & {name.lower() if len(names) > 1 else name for name in names} else None


def table_rows(stream: Iterator[bytes], table: Table, begins: bool) -> Iterator[Record | Bad]:
    """The rows of a table, as dicts where it has a header, else as lists of cells. `begins`: the header comes first."""
    skip = begins and table.header is not None
    for number, row in _quoted_rows(stream, table) if table.quoted else _rows_of_lines(stream, table):
        if isinstance(row, Bad):
            yield row
        elif skip and _header(row):
            skip = False
        elif len(row) != table.width:
            yield Bad("bad_record", number, f"{len(row)} cells, not {table.width}")
        else:
            yield Record(dict(zip(table.header, row, strict=True)) if table.header else row, number)


def _line_of(line: bytes | None, number: int) -> str | Bad:
    if line is None:
        return too_large(number)
    try:
        text = line.decode().removesuffix("\r").replace("\ufeff", "")
    except UnicodeDecodeError as e:
        return Bad("bad_encoding", number, f"byte {e.start} of the line is damaged")
    return text if "\0" not in text else Bad("bad_encoding", number, "a NUL: this is no text")


def _rows_of_lines(stream: Iterator[bytes], table: Table) -> Iterator[tuple[int, list[str] | Bad]]:
    for number, line in enumerate(lines(stream), 1):
        text = _line_of(line, number)
        if isinstance(text, Bad):
            yield number, text
        elif text.strip():
            yield number, text.split(table.delimiter)


class _Lines:
    """Lines for csv.reader, one row's worth at a time; what it took for a row can be given back."""

    def __init__(self, stream: Iterator[bytes]) -> None:
        self._rest = ((number, _line_of(line, number)) for number, line in enumerate(lines(stream), 1))
        self._back: deque[tuple[int, str | Bad]] = deque()
        self.taken: list[tuple[int, str | Bad]] = []
        self._chars = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        item = self._back.popleft() if self._back else next(self._rest)
        self.taken.append(item)
        self._chars += len(item[1]) if isinstance(item[1], str) else ROW_CHARS
        if self._chars > ROW_CHARS:
            raise csv.Error("a quote that is not closed")
        return f"{item[1]}\n"

    def keep(self, count: int) -> None:
        """The first lines taken are done with, the others are given back."""
        self._back.extendleft(reversed(self.taken[count:]))
        self.taken, self._chars = [], 0


def _quoted_rows(stream: Iterator[bytes], table: Table) -> Iterator[tuple[int, list[str] | Bad]]:
    """(line, cells) of each row. A broken one costs the lines up to where a row begins again."""
    source = _Lines(stream)
    csv.field_size_limit(ROW_CHARS)
    lost = False
    while True:
        row, why = None, ""
        try:
            row = next(csv.reader(source, delimiter=table.delimiter, strict=True), None)
        except csv.Error as e:
            why = str(e)
        if not source.taken:
            return
        number, text = source.taken[0]
        if isinstance(text, Bad):
            source.keep(1)
            yield number, text
            continue
        if lost and table.width == 1 and not text.startswith('"'):  # the rest of a broken cell
            row = None
        if row is None or ((lost or len(source.taken) > 1) and len(row) != table.width):
            lost = True
            source.keep(1)
            if text.strip():
                yield number, Bad("bad_record", number, why or f"not {table.width} cells")
            continue
        lost = False
        source.keep(len(source.taken))
        if row:
            yield number, row


# ------------------------------------------------------------------------------------------------ parquet


def row_groups(path: str) -> list[int]:
    """Packed size of each row group of a parquet file. Raises Broken, or UserError if pyarrow is missing."""
    with _parquet(path) as f:
        groups = [f.metadata.row_group(i) for i in range(f.metadata.num_row_groups)]
        return [sum(g.column(c).total_compressed_size for c in range(g.num_columns)) for g in groups]


def rows_in(path: str, start: int, end: int | None) -> int:
    """Rows of a parquet file's row groups."""
    with _parquet(path) as f:
        groups = range(f.metadata.num_row_groups)[start:end]
        return sum(f.metadata.row_group(i).num_rows for i in groups)


def rows(path: str, start: int, end: int | None) -> Iterator[Record | Bad]:
    """The rows of a parquet file's row groups, as dicts. Raises Broken."""
    number = 0
    with _parquet(path) as f:
        groups = list(range(f.metadata.num_row_groups)[start:end])
        batches = f.iter_batches(ROWS, row_groups=groups, use_threads=False)
        while True:
            try:
                batch = next(batches, None)
            except Exception as e:  # pyarrow raises half a dozen kinds
                raise Broken(" ".join(str(e).split())) from None
            if batch is None:
                return
            values = _rows(batch)
            for i in range(len(batch)):
                number += 1
                value = values[i : i + 1] if values else _rows(batch.slice(i, 1))
                yield Record(value[0], number) if value else Bad("bad_encoding", number, "a string that is not UTF-8")


def _rows(batch: Any) -> list[Any] | None:
    try:
        return cast(list[Any], batch.to_pylist())
    except (UnicodeDecodeError, ValueError, OverflowError):  # a date beyond the calendar, too
        return None


def _parquet(path: str) -> Any:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from None
    try:
        return parquet.ParquetFile(path)
    except Exception as e:  # as above
        raise Broken(" ".join(str(e).split())) from None


class _Window:
    """A stretch of a stream. `at` is where parsing goes on; what lies before it is forgotten by `more`."""

    def __init__(self, stream: Iterator[bytes], at: int) -> None:
        self._stream = stream
        self.data = b""
        self.at = at
        self.broken: Broken | None = None
        while len(self.data) <= at and self.more(forget=False):
            pass

    def more(self, forget: bool = True) -> bool:
        """Reads as much again as is left, a block at least; False at the end of the stream."""
        pieces = [self.data[self.at :] if forget else self.data]
        want, got = max(BLOCK, len(pieces[0])), 0
        try:
            for block in self._stream:
                pieces.append(block)
                got += len(block)
                if got >= want:
                    break
        except Broken as e:
            self.broken = e
        self.data = b"".join(pieces)
        self.at = 0 if forget else self.at
        return got > 0


class _Incomplete(Exception):
    """A JSON value that goes on beyond the data."""


def _error_at(data: bytes, e: orjson.JSONDecodeError) -> tuple[int, bool]:
    """Where parsing failed, in bytes, and whether it failed only because the data end there."""
    if e.doc:
        return len(e.doc[: e.pos].encode()), e.pos == len(e.doc)
    try:
        data.decode()
    except UnicodeDecodeError as wrong:
        return wrong.start, wrong.end == len(data) and wrong.reason == "unexpected end of data"
    return 0, not data


def value_at(data: bytes, at: int, guess: int) -> tuple[Any, int]:
    """The JSON value at `at` and where it ends. Raises _Incomplete, or orjson.JSONDecodeError if it is broken."""
    wrong: orjson.JSONDecodeError | None = None
    while True:
        piece = data[at : at + guess]
        whole = at + guess >= len(data)
        while True:
            try:
                value = orjson.loads(piece)
                if wrong or piece.rstrip()[-1:] in (b"}", b"]", b'"'):  # a number may go on
                    return value, at + len(piece)
                break
            except orjson.JSONDecodeError as e:
                stop, at_end = _error_at(piece, e)
                if stop and not e.doc:  # not UTF-8 from there on, which may be beyond the value
                    wrong, piece = (wrong if at_end else e), piece[:stop]
                    continue
                if at_end:
                    break
                try:  # nor is text after the value an error of the value
                    return orjson.loads(piece[:stop]), at + stop
                except orjson.JSONDecodeError:
                    raise e from None
        if wrong:
            raise wrong
        if whole:
            raise _Incomplete
        guess *= 4


_SKIP = re.compile(rb"(?:[\s,]|\xef\xbb\xbf)*")
# How an element begins, as far as others begin the same: its brackets and its first key.
_START = rb"(?:\[\s*){0,3}(?:\{\s*\"[^\"\\]{0,100}\"|\"|(?=[-\dtfn]))"
_START_HERE = re.compile(_START)
_GLUE = re.compile(rb"[^\s,]\s*,\s*" + _START)
_ANY_START = re.compile(rb"[}\]]\s*,\s*((?:\[\s*)*\{\s*\"[^\"\\]{0,100}\")")
LINE_START = re.compile(rb"\n(?=\{)")


def _starts_like(start: bytes) -> re.Pattern[bytes]:
    """Finds where another element begins that begins so, whatever blanks lie between."""
    like = rb"\s*".join(re.escape(token) for token in re.findall(rb'[\[{]|"[^"]*"?', start))
    return re.compile(rb"(?=" + like + rb")" if b"{" in start else rb",\s*(?=" + like + rb")")


def _outermost(data: bytes, at: int) -> re.Pattern[bytes] | None:
    """How elements begin where none was read yet: like the largest value that follows, since it holds the others."""
    sizes: dict[bytes, int] = {}
    for found in islice(_ANY_START.finditer(data, at), 1000):
        if found[1] not in sizes and len(sizes) < 8:
            try:
                sizes[found[1]] = value_at(data, found.start(1), 1 << 12)[1] - found.start(1)
            except (_Incomplete, orjson.JSONDecodeError):
                sizes[found[1]] = 0
    return _starts_like(max(sizes, key=lambda start: sizes[start])) if sizes else None


class Array:
    """The elements of a JSON array, or (not `bracketed`) of a sequence of JSON objects, one after the other.

    As much as is at hand is parsed at once, up to a place that looks like the end of an element; only what fails is
    parsed element by element. After a broken element it goes on where something begins as the others began. `tail` is
    what an array that lies in an object is followed by. A missing comma loses nothing and is let pass.
    """

    def __init__(self, stream: Iterator[bytes], at: int, bracketed: bool, in_object: bool = False) -> None:
        self._w = _Window(stream, at)
        self._bracketed, self._in_object = bracketed, in_object
        self._number = 0
        self._longest = 0  # bytes of an element
        self._guess = 1 << 12
        self._start = b""  # how the last element began
        self._glue = b""  # the bytes around the comma between two elements
        self._like: re.Pattern[bytes] | None = None if bracketed else LINE_START
        self._fails = self._wait = 0  # elements to parse one by one before the next try of many

    def __iter__(self) -> Generator[Record | Bad, None, None]:
        w = self._w
        while True:
            w.at = _SKIP.match(w.data, w.at).end()  # type: ignore[union-attr]
            if w.at == len(w.data):
                if w.more():
                    continue
                if self._bracketed and not w.broken:
                    yield Bad("bad_json", self._number + 1, "the array is not closed")
                break
            if self._bracketed and w.data[w.at] == 0x5D:  # ]
                w.at += 1
                if (yield from self._closed()):
                    break
            elif (values := self._many()) is not None:
                for value in values:
                    self._number += 1
                    yield Record(value, self._number)
            else:
                self._number += 1
                if not (item := self._one()):
                    break
                yield item
        if w.broken:
            raise w.broken

    def _closed(self) -> Generator[Bad, None, bool]:
        """After an array's end: True if that was all. Another array may follow, or what an object holds beside it."""
        w = self._w
        end = w.at
        while (begin := _SKIP.match(w.data, w.at).end()) == len(w.data):  # type: ignore[union-attr]
            if not w.more():
                return True
            end = 0
        apart = b"," not in w.data[end:begin]
        w.at = begin
        if self._in_object:
            w.more()
            if (rest := _object(b"{" + w.data[w.at :])) is not None:
                if any(map(_objects_in, rest.values())):
                    yield Bad("broken_array", self._number + 1, "a second array in the object was not read")
                return True
        elif apart and w.data[begin] == 0x5B:  # [
            w.at += 1
            return False
        self._number += 1
        yield self._broken("bad_json", "text after the end of the array")
        return False

    def _many(self) -> list[Any] | None:
        """The elements up to the last place at hand that looks like an element's end; None if that doesn't work."""
        w = self._w
        if self._wait or not self._glue:
            self._wait = max(0, self._wait - 1)
            return None
        if len(w.data) - w.at < BLOCK // 4:
            w.more()
        cut = w.data.rfind(self._glue, w.at)
        for _ in range(3):
            if cut < 0:
                break
            piece = b"[" + w.data[w.at : cut + 1] + b"]"
            try:
                values: list[Any] = orjson.loads(piece)
                self._fails, w.at = 0, cut + 1
                return values
            except orjson.JSONDecodeError as e:
                stop = min(cut, w.at + _error_at(piece, e)[0] - 1)
                cut = w.data.rfind(self._glue, w.at, max(w.at, stop))
        self._fails = min(self._fails + 1, 10)
        self._wait = (1 << self._fails) - 2
        return None

    def _one(self) -> Record | Bad | None:
        """The next element; None if the stream breaks off in it."""
        w = self._w
        while True:
            try:
                value, end = value_at(w.data, w.at, self._guess)
                break
            except orjson.JSONDecodeError as e:
                return self._broken(cause_of(e), e.msg)
            except _Incomplete:
                if len(w.data) - w.at > TOO_LARGE:
                    return self._broken("too_large", too_large(0).detail)
                if not w.more():
                    return None if w.broken else self._broken("bad_json", "the file ends inside it", cut_short=True)
        self._longest = max(self._longest, end - w.at)
        self._guess = min(2 * (end - w.at) + 64, BLOCK)
        if self._bracketed and (start := _START_HERE.match(w.data, w.at)) and start[0] != self._start:
            self._start, self._like = start[0], _starts_like(start[0])
        if glue := _GLUE.match(w.data, end - 1):
            self._glue = glue[0]
        w.at = end
        return Record(value, self._number)

    def _broken(self, cause: str, detail: str, cut_short: bool = False) -> Bad:
        """A broken element, after moving to where the next seems to begin. If much more than one is lost: no."""
        lost, found = self._skip()
        if lost > 4 * self._longest + (1 << 20 if found or cut_short else 1 << 12) and cause != "too_large":
            return Bad("broken_array", self._number, f"{detail}; {lost} bytes from there on can't be read")
        return Bad(cause, self._number, detail)

    def _skip(self) -> tuple[int, bool]:
        """Moves to the next place that looks like an element's start: (bytes passed, whether there is one)."""
        w = self._w
        like = self._like
        if not like:
            start = _START_HERE.match(w.data, w.at)
            like = _starts_like(start[0]) if start and start[0] else None
            if not like or not like.search(w.data, w.at + 1):
                like = _outermost(w.data, w.at) or like or LINE_START
        w.at += 1
        lost = 1
        while not (found := like.search(w.data, w.at)):
            keep = max(w.at, len(w.data) - 256)  # a start may lie across the end
            lost += keep - w.at
            w.at = keep
            if not w.more():
                lost += len(w.data) - w.at
                w.at = len(w.data)
                self._bracketed = False  # no end to wait for
                return lost, False
        lost += found.end() - w.at
        w.at = found.end()
        return lost, True


def cause_of(e: orjson.JSONDecodeError) -> str:
    return "bad_encoding" if "UTF-8" in e.msg else "bad_json"


# Members of an object that hold the records of a whole file (SQuAD), and those that hold one record's turns.
_WRAPPERS = (b"data", b"rows", b"records", b"examples", b"items")
_TALKS = ("conversation", "conversations", "messages", "turns", "dialog", "dialogue", "history", "chat")
_OPEN = re.compile(rb"(?:\s|\xef\xbb\xbf)*\{")
_KEY = re.compile(rb'\s*,?\s*"([^"\\]*)"\s*:\s*')
_OBJECTS = re.compile(rb"\[(?=\s*\{)")


def wrapped_at(head: bytes) -> int:
    """Where the elements begin of the array of records that an object holds; 0 if it is a record itself."""
    opened = _OPEN.match(head)
    at = opened.end() if opened else len(head)
    while key := _KEY.match(head, at):
        if key[1] in _WRAPPERS and (objects := _OBJECTS.match(head, key.end())):
            return objects.end()
        try:
            at = value_at(head, key.end(), 1 << 12)[1]
        except (_Incomplete, orjson.JSONDecodeError):
            break
    return 0


def records_in(value: Any) -> list[Any]:
    """The records of a file that is one object: itself, or the members of the only array in it if that is long."""
    if isinstance(value, dict):
        long = [v for k, v in value.items() if k not in _TALKS and _objects_in(v) and len(v) > 100]
        if len(long) == 1 and sum(isinstance(v, dict | list) for v in value.values()) == 1:
            return list(long[0])
    return [value]


def _objects_in(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
