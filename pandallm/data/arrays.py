"""JSON arrays and sequences of JSON objects, piece by piece; reading goes on after an element that is damaged."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from itertools import islice
from typing import Any

import orjson

from pandallm.data import containers
from pandallm.data.containers import Bad, Broken, Record


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
        """Reads as much again as is left, up to a record's limit; False at the end of the stream."""
        pieces = [self.data[self.at :] if forget else self.data]
        want, got = max(containers.BLOCK, min(len(pieces[0]), containers.TOO_LARGE - len(pieces[0]))), 0
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
_COLON = re.compile(rb"\s*:")
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
        self._starts: list[bytes] = []  # how elements begin
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
        if len(w.data) - w.at < containers.BLOCK // 4:
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
                if _COLON.match(w.data, end):
                    return self._broken("bad_json", "a key outside an object")
                if not (
                    isinstance(value, list) and self._bracketed and not w.data[end : end + 1000].strip(b", \n\r\t}")
                ):
                    break
                if not w.more():  # the end of the array was taken for that of an element
                    return None if w.broken else self._broken("bad_json", "a bracket too many")
            except orjson.JSONDecodeError as e:
                return self._broken(cause_of(e), e.msg)
            except _Incomplete:
                if len(w.data) - w.at > containers.TOO_LARGE:
                    return self._broken("too_large", containers.too_large(0).detail)
                if not w.more():
                    return None if w.broken else self._broken("bad_json", "the file ends inside it", cut_short=True)
        self._longest = max(self._longest, end - w.at)
        self._guess = min(2 * (end - w.at) + 64, containers.BLOCK)
        if self._bracketed and (start := _START_HERE.match(w.data, w.at)):
            self._learn(start[0])
        if glue := _GLUE.match(w.data, end - 1):
            self._glue = glue[0]
        w.at = end
        return Record(value, self._number)

    def _learn(self, start: bytes) -> None:
        """Elements may begin like this too; a string does not count among objects, being a key that lost its object."""
        known = self._starts
        if start not in known and len(known) < 8 and (b"{" in start or not any(b"{" in other for other in known)):
            known.append(start)
            self._like = re.compile(b"|".join(_starts_like(other).pattern for other in known))

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
