"""Files of any layout -> records. What a file holds is told from its content, never from its name.

JSON lines, one JSON array, one JSON object a file, or plain text (one document a file); UTF-8 with or without BOM,
or GB18030; LF or CRLF.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from pandallm.config import UserError

SNIFF_BYTES = 1 << 20


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
    """The regular files of a corpus, in a fixed order. UserError if there is none, or for a link out of the folder."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{where}: {path}: no such file or folder")
    root = path.resolve()
    found = []
    for file in sorted(path.rglob("*")):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
            if not file.resolve().is_relative_to(root):
                raise UserError(f"{where}: {file}: a link that leads out of {path}; copy the file or name its folder")
            found.append(file)
    if not found:
        raise UserError(f"{where}: {path}: the folder holds no files")
    return found


def detect_encoding(path: Path) -> str:
    """`utf-8-sig` (UTF-8 with or without a BOM), or `gb18030` when the file's start is that and not UTF-8."""
    with open(path, "rb") as f:
        head = f.read(SNIFF_BYTES)
    for name in ("utf-8-sig", "gb18030"):
        try:
            codecs.getincrementaldecoder(name)().decode(head)  # incremental: the cut may fall inside a character
            return name
        except UnicodeDecodeError:
            continue
    return "utf-8-sig"  # neither: its lines are then counted as bad_encoding


def records(path: Path, as_text: bool = False) -> Iterator[Record | Bad]:
    """The records of one file in order; `as_text` takes it as one plain document whatever it looks like."""
    encoding = detect_encoding(path)
    kind = "text" if as_text else _kind(path, encoding)
    if kind == "lines":
        yield from _json_lines(path, encoding)
        return
    try:
        text = path.read_text(encoding=encoding)
    except UnicodeDecodeError as e:
        yield Bad("bad_encoding", 1, f"byte {e.start} is neither UTF-8 nor GB18030")
        return
    if kind == "text":
        if text.strip():
            yield Record(text.strip(), 1)
        return
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as e:
        yield Bad("bad_json", e.lineno, e.msg)
        return
    if kind == "array":
        for i, item in enumerate(value, 1):
            yield Record(item, i)
    else:
        yield Record(value, 1)


def _kind(path: Path, encoding: str) -> str:
    """`lines`, `array`, `object` or `text`, from the first lines that aren't blank."""
    with open(path, encoding=encoding, errors="replace") as f:
        lines = (line.strip() for line in f)
        first = next((line for line in lines if line), "")
        second = next((line for line in lines if line), "")
    if not first.startswith(("{", "[")):
        return "text"
    if _parses(first) and second:
        return "lines"
    if second and _parses(second) and second.startswith(("{", "[")) and not first.endswith(("[", "{", ",")):
        return "lines"  # the first line is broken, the second is a record
    return "array" if first.startswith("[") else "object"


def _parses(line: str) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def _json_lines(path: Path, encoding: str) -> Iterator[Record | Bad]:
    with open(path, "rb") as raw:
        # Only LF ends a line: U+2028 and the like occur inside strings of real corpora.
        for number, line in enumerate(raw, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if encoding == "gb18030":
                try:
                    line = line.decode(encoding).encode()
                except UnicodeDecodeError as e:
                    yield Bad("bad_encoding", number, str(e))
                    continue
            if not line.strip():
                continue
            try:
                yield Record(orjson.loads(line), number)
            except orjson.JSONDecodeError as e:
                cause = "bad_encoding" if "UTF-8" in e.msg.upper() else "bad_json"
                yield Bad(cause, number, f"{e.msg} (column {e.colno})")


def text_of(path: Path) -> str:
    """A whole file as text, line ends made LF."""
    return io.TextIOWrapper(open(path, "rb"), encoding=detect_encoding(path)).read()
