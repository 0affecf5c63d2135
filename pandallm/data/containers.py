"""What records lie in: packed streams, zip archives, text encodings, parquet.

Streams come as blocks of bytes and nothing here holds a whole file. A stream that is cut short or damaged raises Broken
after the last good block.
"""

from __future__ import annotations

import bz2
import codecs
import errno
import gzip
import importlib
import lzma
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import IO, Any, cast

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


_DAMAGE = (  # what the unpackers raise for it
    *(EOFError, OSError, RuntimeError, ValueError, LookupError),
    *(zlib.error, lzma.LZMAError, zstandard.ZstdError, zipfile.BadZipFile, struct.error),
)


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
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):  # the disk's failure, not the file's
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
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as e:  # what zipfile raises for damage
        raise Broken(str(e)) from None
    names = [m.filename for m in found]
    if "[Content_Types].xml" in names or names[:1] == ["mimetype"]:
        raise Broken("an office document or e-book, not a corpus: save it as text or CSV")
    if len(set(names)) < len(names):
        raise Broken(f"two members are called {next(name for name in names if names.count(name) > 1)}")
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
    wide = encoding.startswith(("utf-16", "utf-32"))
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass" if wide else "surrogateescape")
    for block in stream:
        try:
            text = decoder.decode(block)
        except UnicodeError:  # UTF-32, or UTF-16 without its mark: the rest can't be told
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
    """The rows of a parquet file's row groups, as dicts. A damaged group is one Bad. Raises Broken for the whole."""
    first = 1
    with _parquet(path) as f:
        for group in range(f.metadata.num_row_groups)[start:end]:
            count = f.metadata.row_group(group).num_rows
            number = first
            try:
                for batch in f.iter_batches(ROWS, row_groups=[group], use_threads=False):
                    yield from _rows(batch, number)
                    number += len(batch)
            except Exception as e:  # pyarrow raises a dozen kinds
                yield Bad("bad_archive", number, f"{first + count - number} rows lost: {' '.join(str(e).split())}")
            first += count


def _rows(batch: Any, number: int) -> Iterator[Record | Bad]:
    values = _values(batch)
    for i in range(len(batch)):
        value = values[i : i + 1] if values else _values(batch.slice(i, 1))
        yield Record(value[0], number + i) if value else Bad("bad_encoding", number + i, "a string that is not UTF-8")


def _values(batch: Any) -> list[Any] | None:
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
