"""Tables in text, CSV and TSV: told from prose by their beginning, and read row by row."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, deque
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from pandallm.data import containers
from pandallm.data.containers import Bad, Record

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
        return containers.too_large(number)
    try:
        text = line.decode().removesuffix("\r").replace("\ufeff", "")
    except UnicodeDecodeError as e:
        return Bad("bad_encoding", number, f"byte {e.start} of the line is damaged")
    return text if "\0" not in text else Bad("bad_encoding", number, "a NUL: this is no text")


def _rows_of_lines(stream: Iterator[bytes], table: Table) -> Iterator[tuple[int, list[str] | Bad]]:
    for number, line in enumerate(containers.lines(stream), 1):
        text = _line_of(line, number)
        if isinstance(text, Bad):
            yield number, text
        elif text.strip():
            yield number, text.split(table.delimiter)


class _Lines:
    """Lines for csv.reader, one row's worth at a time; what it took for a row can be given back."""

    def __init__(self, stream: Iterator[bytes]) -> None:
        self._rest = ((number, _line_of(line, number)) for number, line in enumerate(containers.lines(stream), 1))
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
