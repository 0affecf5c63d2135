"""Files of any layout -> records. What a file holds is told from its content, never from its name.

JSON lines, one JSON array, one JSON object a file, or plain text (one document a file); UTF-8 with or without BOM,
or GB18030; LF or CRLF; gzipped or not. What can't be read is a Bad, counted by the caller, never an exception.
"""

from __future__ import annotations

import codecs
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson

from pandallm.config import UserError

SNIFF_BYTES = 1 << 20
SNIFF_LINES = 100


@dataclass(frozen=True)
class Record:
    """One parsed record and its place: the line it starts at, or its number (from 1) in an array."""

    value: Any
    line: int


@dataclass(frozen=True)
class Bad:
    """A record that could not be read, with the cause it is counted under and what the parser said."""

    cause: str
    line: int
    detail: str


def files_of(path: Path, where: str) -> list[Path]:
    """The regular files of a corpus, in a fixed order. UserError if there is none, one can't be opened, or a link leads
    nowhere or out of the folder. Hidden files, and folders that links name a second time, are left out."""
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        raise UserError(f"{where}: {path}: no such file or folder")
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


def records(path: Path, as_text: bool = False) -> Iterator[Record | Bad]:
    """The records of one file in order; `as_text` takes it as one plain document whatever it looks like."""
    last = 0
    try:
        for item in _records(path, as_text):
            last = item.line
            yield item
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        yield Bad("bad_gzip", last + 1, str(e))


def _open(path: Path) -> BinaryIO:
    with open(path, "rb") as f:
        packed = f.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path) if packed else open(path, "rb"))


def _records(path: Path, as_text: bool) -> Iterator[Record | Bad]:
    encoding = _detect_encoding(path)
    kind = "text" if as_text else _kind(path, encoding)
    if kind == "lines":
        yield from _json_lines(path, encoding)
        return
    with _open(path) as f:
        data = f.read()
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as e:
        yield Bad("bad_encoding", data.count(b"\n", 0, e.start) + 1, f"byte {e.start} is neither UTF-8 nor GB18030")
        return
    if kind == "text":
        text = text.replace("\r\n", "\n").replace("\r", "\n").strip("\ufeff \t\r\n")
        if "\0" in text:
            yield Bad("bad_encoding", text.count("\n", 0, text.index("\0")) + 1, "a NUL: this is no text file")
        elif text:
            yield Record(text, 1)
        return
    try:
        value = orjson.loads(text.lstrip("\ufeff"))
    except orjson.JSONDecodeError as e:
        yield Bad("bad_json", e.lineno, e.msg)
        return
    if kind == "array":
        for i, item in enumerate(value, 1):
            yield Record(item, i)
    else:
        yield Record(value, 1)


def _detect_encoding(path: Path) -> str:
    """`gb18030` where the file's start, read as UTF-8, is wrong more often than right; else UTF-8 (BOM or not), whose
    damaged lines are then counted."""
    with _open(path) as f:
        head = f.read(SNIFF_BYTES)
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(head)  # incremental: the cut may split a character
    wrong = text.count("\ufffd")
    right = len(text) - wrong - len(text.encode("ascii", "ignore"))
    return "gb18030" if wrong > right else "utf-8-sig"


# `[` and `{` open texts too: "[新华社] …".
_JSON_START = re.compile(r"\{|\[\s*(?:[\[{\]\"'\d-]|true|false|null|$)")


def _kind(path: Path, encoding: str) -> str:
    """`lines`, `array`, `object` or `text`, from the first lines that aren't blank; one of them may be broken."""
    with _open(path) as raw:
        stripped = (line.strip("\ufeff \t\r\n") for line in io.TextIOWrapper(raw, encoding, errors="replace"))
        lines = list(islice((line for line in stripped if line), SNIFF_LINES))
    if not lines:
        return "text"
    starts_json = bool(_JSON_START.match(lines[0]))
    if len(lines) > 1:
        whole = [line.startswith(("{", "[")) and _parses(line) for line in lines]
        if whole[0] or 2 * sum(whole) > len(lines) or (starts_json and 2 * sum(whole) == len(lines)):
            return "lines"
    if not starts_json:
        return "text"
    return "array" if lines[0].startswith("[") else "object"


def _parses(line: str) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def _json_lines(path: Path, encoding: str) -> Iterator[Record | Bad]:
    with _open(path) as raw:
        # Only LF ends a line: U+2028 and the like occur inside strings of real corpora.
        for number, line in enumerate(raw, 1):
            if encoding == "gb18030":
                try:
                    line = line.decode(encoding).encode()
                except UnicodeDecodeError as e:
                    yield Bad("bad_encoding", number, str(e))
                    continue
            line = line.removeprefix(codecs.BOM_UTF8).strip()  # a BOM may stand in the middle of joined files
            if not line:
                continue
            try:
                yield Record(orjson.loads(line), number)
            except orjson.JSONDecodeError as e:
                cause = "bad_encoding" if "UTF-8" in e.msg.upper() else "bad_json"
                yield Bad(cause, number, f"{e.msg} (column {e.colno})")
