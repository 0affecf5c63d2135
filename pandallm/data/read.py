"""Files of any layout -> records. What a file holds is told from its content, never from its name.

JSON lines, JSON arrays, JSON objects, CSV, TSV, parquet, plain text; packed or in a zip archive (containers.py); UTF-8
with or without BOM, UTF-16 or GB18030; LF or CRLF. A large file is read in spans, which together give what the whole
file gives. What can't be read is a Bad, counted by the caller, never an exception.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import orjson

from pandallm.config import UserError
from pandallm.data import arrays, containers, tables
from pandallm.data.arrays import Array
from pandallm.data.containers import TOO_LARGE, Bad, Broken, Record
from pandallm.data.tables import Table

PLAIN = ("text", "lines", "paragraphs")  # layouts that say how a plain text is cut into documents
CAUSES = ("bad_json", "bad_encoding", "bad_archive", "bad_record", "broken_array", "too_large")
SNIFF_BYTES = 1 << 20
SNIFF_LINES = 100
_BOM = "\ufeff".encode()
_WIDE_BLANK = "\u3000".encode()


@dataclass(frozen=True)
class Span:
    """A piece of a corpus file that one worker reads."""

    path: str
    # Bytes of a file of lines (a line belongs to the span its first byte lies in), or row groups of parquet.
    start: int = 0
    end: int | None = None  # None: to the end
    member: str = ""  # of a zip archive
    size: int = 0  # bytes on disk that it stands for
    encoding: str = ""  # a codec's name; "": told from the content

    @property
    def name(self) -> str:
        return f"{self.path}!{self.member}" if self.member else self.path

    @property
    def part(self) -> bool:
        return bool(self.start) or self.end is not None


def files_of(path: Path, where: str) -> list[Path]:
    """The regular files of a corpus (a file, a folder or a pattern), in a fixed order. UserError if there is none, one
    can't be opened, or a link leads nowhere or out of the folder. Hidden files, and folders that links name a second
    time, are left out."""
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        if not glob.has_magic(str(path)):
            raise UserError(f"{where}: {path}: no such file or folder")
        matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
        found = [file for match in matches if not _empty(match) for file in files_of(match, where)]
        if not found:
            raise UserError(f"{where}: {path}: no file has a name like that")
        return list(dict.fromkeys(found))
    root = path.resolve()
    found = []
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(path).parts):
            continue
        if not os.path.exists(file):
            raise UserError(f"{where}: {file}: a link that leads nowhere; remove it or mend it")
        if not file.resolve().is_relative_to(root):
            raise UserError(f"{where}: {file}: a link that leads out of {path}; copy the file or name its folder")
        if file.is_file():
            if not os.access(file, os.R_OK):
                raise UserError(f"{where}: {file}: may not be read by this user")
            found.append(file)
    if not found:
        raise UserError(f"{where}: {path}: the folder holds no files")
    return found


def _empty(match: Path) -> bool:
    """A folder without files, or neither file nor folder: no mistake where a pattern names more."""
    return os.path.exists(match) and not match.is_file() and not any(f.is_file() for f in match.rglob("[!.]*"))


def spans_of(path: Path, layout: str, limit: int, encoding: str = "") -> list[Span]:
    """The spans of a file, of about `limit` bytes where it can be cut: unpacked lines at LF, parquet between row
    groups, a zip archive between its members."""
    size = os.stat(path).st_size
    whole = Span(str(path), size=size, encoding=encoding)
    try:
        if _is_parquet(whole, layout):
            sizes = containers.row_groups(whole.path)
            return [Span(whole.path, a, b, size=sum(sizes[a:b])) for a, b in _groups(sizes, limit)] or [whole]
        if _packing(whole.path) == "zip":
            return [replace(whole, member=name, size=packed) for name, packed in containers.members(whole.path)]
        if size > limit and not _packing(whole.path) and _form(whole, layout)[0].cuttable:
            cuts = [0, *_line_starts(whole.path, size, limit), size]
            if len(cuts) > 2:
                return [replace(whole, start=a, end=b, size=b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
    except Broken:
        pass  # reading it will say so
    return [whole]


def _groups(sizes: list[int], limit: int) -> Iterator[tuple[int, int]]:
    start = 0
    for i in range(len(sizes)):
        if i + 1 == len(sizes) or sum(sizes[start : i + 2]) > limit:
            yield start, i + 1
            start = i + 1


def _line_starts(path: str, size: int, limit: int) -> Iterator[int]:
    """The first beginning of a line at or after each multiple of `limit`."""
    at = 0
    with open(path, "rb") as f:
        for target in range(limit, size, limit):
            if target <= at:
                continue
            at = f.seek(target - 1)
            while (block := f.read(containers.BLOCK)) and b"\n" not in block:
                at += len(block)
            at += block.find(b"\n") + 1
            if at >= size:
                return
            yield at


def lines_in(span: Span) -> int:
    """Lines that the span holds, or rows of parquet: what comes before the first line of the next span of its file."""
    try:
        if _is_parquet(span, "auto"):
            return containers.rows_in(span.path, span.start, span.end)
        head, _, stream = _peek(containers.blocks(span.path, span.member, span.start, span.end), SNIFF_BYTES)
        count, last = 0, b"\n"
        for block in containers.utf8(stream, span.encoding or containers.encoding_of(head)):
            count, last = count + block.count(b"\n"), block[-1:]
        return count + (last != b"\n")
    except Broken:
        return 0


def layout_of(span: Span, layout: str) -> str:
    """What a file is taken for: `json lines`, `array`, `object`, `csv`, `tsv`, `parquet`, `binary`, one of PLAIN."""
    try:
        return "parquet" if _is_parquet(span, layout) else _form(span, layout)[0].kind
    except Broken:
        return "binary"


def records(span: Span, layout: str) -> Iterator[Record | Bad]:
    """The records of a span in order, with their lines counted from where it begins."""
    last = 0
    try:
        for item in _records(span, layout):
            last = item.line
            yield item
    except Broken as e:
        yield Bad("bad_archive", last + 1, str(e))


def _records(span: Span, layout: str) -> Iterator[Record | Bad]:
    if _is_parquet(span, layout):
        return containers.rows(span.path, span.start, span.end)
    if not span.member and _packing(span.path) == "zip":
        containers.members(span.path)  # says why it has none
    form, stream = _form(span, layout)
    if form.kind == "json lines":
        return _json_lines(stream)
    if form.kind == "array":
        return iter(Array(stream, form.at, bracketed=True, in_object=form.in_object))
    if form.kind == "object":
        return _objects(stream)
    if form.table:
        return tables.table_rows(stream, form.table, begins=not span.start)
    if form.kind == "binary":
        return iter([Bad("bad_encoding", 1, form.why)])
    return _plain(stream, form.kind, form.if_large)


def _packing(path: str) -> str:
    with open(path, "rb") as f:
        return containers.packing(f.read(16))


def _is_parquet(span: Span, layout: str) -> bool:
    return layout not in PLAIN and not span.member and _packing(span.path) == "parquet"


class _Form(NamedTuple):
    """What a file was recognised as."""

    kind: str
    at: int = 0  # array: where the first element begins
    in_object: bool = False  # array: as a member of an object
    table: Table | None = None
    if_large: str = ""  # text: how it is cut if it is too large for one document
    cuttable: bool = False  # at any line, whatever stands before
    why: str = ""  # binary


def _peek(stream: Iterator[bytes], size: int) -> tuple[bytes, bool, Iterator[bytes]]:
    """(the stream's first bytes, whether that is all, the stream from its start)."""
    pieces: list[bytes] = []
    error: list[Broken] = []
    got = 0
    try:
        while got <= size and (block := next(stream, None)) is not None:
            pieces.append(block)
            got += len(block)
    except Broken as e:
        error.append(e)
    return b"".join(pieces)[:size], got <= size and not error, chain(pieces, _failing(error), stream)


def _failing(error: list[Broken]) -> Iterator[bytes]:
    if error:
        raise error[0]
    yield from ()


def _form(span: Span, layout: str) -> tuple[_Form, Iterator[bytes]]:
    """What the file is, by its beginning, whichever span of it is asked for; and the span's stream as UTF-8."""
    stream = containers.blocks(span.path, span.member, span.start, span.end)
    start = containers.blocks(span.path) if span.part else stream
    size = SNIFF_BYTES
    while True:
        head, whole, start = _peek(start, size)
        encoding = span.encoding or containers.encoding_of(head[:SNIFF_BYTES])
        data = b"".join(containers.utf8(iter([head]), encoding))
        form = None if layout in PLAIN else _json_form(data, whole)
        if not form or form.kind != "one line" or size >= TOO_LARGE:
            break
        size *= 8
    large = not span.member and os.stat(span.path).st_size > TOO_LARGE
    text = data.decode("utf-8", "replace").replace("\ufeff", "")
    form = form or _binary(head, text) or (_Form(layout) if layout in PLAIN else None)
    if not form:
        table = tables.table_of(text, whole)
        form = _Form("csv" if table.quoted else "tsv", table=table) if table else _plain_form(text, whole, large)
    cuttable = form.kind in ("json lines", "tsv", "lines") and not encoding.startswith(("utf-16", "utf-32"))
    return form._replace(cuttable=cuttable), containers.utf8(stream if span.part else start, encoding)


# `[` and `{` open texts too: "[新华社] …", "[1] 参考文献".
_JSON_START = re.compile(
    r"""\{\s*(?:["'}]|$)
    | \[\s*(?: [\[{\]] | $ | "[^"\\]*(?:\\.[^"\\]*)*(?:"\s*(?:[,\]]|$)|\\?$) | '[^']*'\s*[,\]]
        | (?:-?\d[\d.eE+-]*|true|false|null)\s*(?:,|\]?$) )""",
    re.VERBOSE,
)
_ARRAY_START = re.compile(rb"(?:\s|\xef\xbb\xbf)*\[")
_OBJECTS = re.compile(rb"\}\s*,\s*\{\s*\"")  # no text has these, though an array's first element may be broken


def _json_form(data: bytes, whole: bool) -> _Form | None:
    """JSON lines, array or object, from the first lines that aren't blank, one of which may be broken; or None."""
    text = data.decode("utf-8", "replace")
    lines = [s for line in text.split("\n", 4 * SNIFF_LINES) if (s := line.strip("\ufeff \t\r"))]
    one = len(lines) == 1
    if not whole and lines:
        lines.pop()  # cut off, or what lies behind the first lines
    if not lines and not one:
        return None
    starts_json = bool(_JSON_START.match((lines[0] if lines else text.strip("\ufeff \t\r\n"))[:1000]))
    if len(lines) > 1 or (lines and not whole):
        lines = lines[:SNIFF_LINES]
        good = [line.startswith(("{", "[")) and _parses(line) for line in lines]
        if good[0] or 2 * sum(good) > len(lines) or (starts_json and 2 * sum(good) == len(lines)):
            return _Form("json lines")
    array = _ARRAY_START.match(data)
    if not starts_json and not (array and _OBJECTS.search(data)):
        return None
    if array:
        return _Form("array", array.end())
    if at := arrays.wrapped_at(data):
        return _Form("array", at, in_object=True)
    return _Form("object" if lines else "one line")


def _parses(line: str) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


_NO_TEXT = re.compile("[\0-\x08\x0e-\x1a\x1c-\x1f\ufffd]")


def _binary(head: bytes, text: str) -> _Form | None:
    if head[257:262] == b"ustar":
        return _Form("binary", why="a tar archive: unpack it first")
    if 20 * len(_NO_TEXT.findall(text)) > len(text):
        return _Form("binary", why="this is no text file, or one in an encoding other than UTF-8, UTF-16 and GB18030")
    return None


def _plain_form(text: str, whole: bool, large: bool) -> _Form:
    """How a plain text is cut where nobody says. Documents that stand a line each are long, many, and have no blank
    lines between them; where there are blank lines, several sentences to a line each between two of them are documents.
    Anything else (a chapter with a paragraph a line) is one document, unless it is too large for one."""
    lines = [line.strip() for line in text.replace("\r", "\n" if "\n" not in text else "").split("\n")]
    if not whole:
        lines.pop()
    full = [line for line in lines if line]
    blocks = sum(bool(a) and not b for a, b in zip(lines, [*lines[1:], ""], strict=False))  # ended by a blank line
    parted = blocks > max(1, len(full) // 100)
    if not parted and len(full) >= 50 and sum(map(len, full)) >= 150 * len(full):
        return _Form("lines")
    ends = sum(line[-1] in "。！？…；：”』」）!?.;" for line in full)
    if parted and blocks >= 20 and len(full) >= 3 * blocks and 10 * ends >= 7 * len(full):
        return _Form("paragraphs")
    if_large = "paragraphs" if parted else "lines"
    return _Form(if_large) if large else _Form("text", if_large=if_large)


def _json_lines(stream: Iterator[bytes]) -> Iterator[Record | Bad]:
    # Only LF ends a line: U+2028 and the like occur inside strings of real corpora.
    loads = orjson.loads
    for number, line in enumerate(containers.lines(stream), 1):
        if line is None:
            yield containers.too_large(number)
            continue
        try:
            value = loads(line)
        except orjson.JSONDecodeError:
            line = line.strip().removeprefix(_BOM).strip()  # a BOM may stand in the middle of joined files
            if not line:
                continue
            try:
                value = loads(line)
            except orjson.JSONDecodeError as e:
                yield Bad(arrays.cause_of(e), number, f"{e.msg} (column {e.colno})")
                continue
        yield Record(value, number)


def _objects(stream: Iterator[bytes]) -> Iterator[Record | Bad]:
    """One object a file, which may hold a long array of records; or several, one after the other."""
    items = iter(Array(stream, 0, bracketed=False))
    first = list(islice(items, 2))
    if len(first) == 1 and isinstance(first[0], Record):
        yield from (Record(value, i) for i, value in enumerate(arrays.records_in(first[0].value), 1))
        return
    yield from first
    yield from items


def _plain(stream: Iterator[bytes], kind: str, if_large: str) -> Iterator[Record | Bad]:
    """The documents of a plain text; `if_large` is how it is cut if it is too large for one."""
    if kind == "text":
        data, whole, stream = _peek(stream, TOO_LARGE)
        if not whole and len(data) < TOO_LARGE:
            for _ in stream:  # raises Broken, which is why it isn't whole
                pass
        if whole or not if_large:
            yield from filter(None, [_document(data, 1) if whole else containers.too_large(1)])
            return
        kind = if_large
    numbered: Iterator[tuple[int, bytes | None]]
    numbered = enumerate(containers.lines(stream), 1) if kind == "lines" else _paragraphs(stream)
    for number, document in numbered:
        item = containers.too_large(number) if document is None else _document(document, number)
        if item:
            yield item


def _paragraphs(stream: Iterator[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """(first line, text) of what stands between blank lines; None for what is too large."""
    parts: list[bytes] = []
    size = first = 0
    for number, line in enumerate(chain(containers.lines(stream), [b""]), 1):
        if line is None or line.replace(_BOM, b"").replace(_WIDE_BLANK, b"").strip():
            first = first or number
            size = TOO_LARGE + 1 if line is None else size + len(line) + 1
            if size <= TOO_LARGE:
                parts.append(line or b"")
        elif first:
            yield first, b"\n".join(parts) if size <= TOO_LARGE else None
            parts, size, first = [], 0, 0


def _document(data: bytes, line: int) -> Record | Bad | None:
    """A text as a record, None if it is empty; `line` is its first."""
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        return Bad("bad_encoding", line + data.count(b"\n", 0, e.start), f"byte {e.start} of the text is damaged")
    if "\0" in text:
        return Bad("bad_encoding", line + text.count("\n", 0, text.index("\0")), "a NUL: this is no text")
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "").strip(" \t\n")
    return Record(text, line) if text else None
