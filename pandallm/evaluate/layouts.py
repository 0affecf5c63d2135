"""The layouts of question files: file -> questions, or for some of them the cause why they can't be asked.

A record that breaks its layout is an error with file and place, never a question guessed: a wrong question must not
become a wrong score. Where the authors' own files hold what one letter can't answer (two right options, no options),
the question is left out and its cause counted.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pandallm.config import UserError, parse_json, read_text
from pandallm.data.questions import letter

SEVERAL, NO_ANSWER, NO_OPTIONS = "several answers", "no answer", "options not found"
EMPTY_OPTION, PICTURE, GROUP = "an empty option", "needs a picture", "in a group that can't be split"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can name them, UTF-8 can't hold them


@dataclass(frozen=True)
class Question:
    """One multiple-choice question. `gold` is the index of the right option; options are lettered A, B, … in order."""

    task: str
    id: str
    context: str
    question: str
    options: tuple[str, ...]
    gold: int
    subject: str = ""

    @property
    def duplicate_options(self) -> bool:
        """Whether another option has the right one's text, so that its letter would be right too."""
        return self.options.count(self.options[self.gold]) > 1


Item = Question | str  # a question, or why there is none
Reader = Callable[[str, str, Path], Iterator[Item]]  # of task, subject ("" where a task has none) and file


def c3(task: str, subject: str, path: Path) -> Iterator[Item]:
    """C3: a list of [[paragraph or turn, …], [{question, choice, answer}, …], id]; the answer is a text."""
    records = parse_json(read_text(path), path)
    if not isinstance(records, list):
        raise UserError(f"{path}: C3's layout is a list of records")
    for number, record in enumerate(records, 1):
        where = f"{path}: record {number}"
        if not (isinstance(record, list) and len(record) == 3 and isinstance(record[1], list)):
            raise UserError(f"{where}: [[paragraphs], [questions], id] is wanted")
        paragraphs, entries, doc = record
        if not (isinstance(paragraphs, list) and all(isinstance(p, str) for p in paragraphs)):
            raise UserError(f"{where}: the first part is not a list of texts")
        if not isinstance(doc, (str, int)):
            raise UserError(f"{where}: the third part, the id, is neither a text nor a number")
        for k, entry in enumerate(entries):
            place = f"{where}, question {k + 1}"
            text, options, answer = _values(entry, ("question", "choice", "answer"), place)
            gold = _index_of(answer, options, place)
            yield _question(task, subject, f"{doc}-{k}", "\n".join(paragraphs), text, options, gold, place)


def logiqa(task: str, subject: str, path: Path, key: str | None = "example_id") -> Iterator[Item]:
    """LogiQA 2.0: JSON lines of {answer (0-3), text, question, options}, and `key`, the id (None: the line)."""
    keys = ("text", "question", "options", "answer")
    for number, where, entry in _json_lines(path):
        name = _values(entry, (key,), where)[0] if key else number
        context, text, options, gold = _values(entry, keys, where)
        yield _question(task, subject, str(name), context, text, options, gold, where)


def table(task: str, subject: str, path: Path, question: str, answer: str) -> Iterator[Item]:
    """CMMLU and C-Eval: CSV with a header; the columns A to D, and those named `question` and `answer` (a letter)."""
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    wanted = (question, "A", "B", "C", "D", answer)
    try:
        lacking = [column for column in wanted if column not in (rows.fieldnames or ())]
    except csv.Error as e:
        raise UserError(f"{path}:1: not valid CSV: {e}") from None
    if lacking:
        raise UserError(f"{path}:1: the column '{lacking[0]}' is missing; {', '.join(wanted)} are wanted")
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as e:
            raise UserError(f"{path}:{rows.reader.line_num}: not valid CSV: {e}") from None
        where = f"{path}:{rows.line_num}"
        if None in row or None in row.values():
            raise UserError(f"{where}: the line has not as many fields as the header")
        options = [row[name] for name in "ABCD"]
        name = f"{subject}/{number}"
        number += 1
        if _lacks_one(options):
            yield EMPTY_OPTION
        else:
            gold = _index_of(row[answer].strip(), list("ABCD"), where)
            yield _question(task, subject, name, "", row[question], options, gold, where)


def agieval(task: str, subject: str, path: Path) -> Iterator[Item]:
    """AGIEval: JSON lines of {passage, question, options, label}; options are marked, a label is "A" or ["A", …]."""
    for number, where, entry in _json_lines(path):
        passage, text, options, label = _values(entry, ("passage", "question", "options", "label"), where)
        labels = label if isinstance(label, list) else list(label) if isinstance(label, str) else []
        if len(labels) != 1:
            yield SEVERAL if labels else NO_ANSWER
        elif not isinstance(options, list) or len(options) < 2:
            yield NO_OPTIONS  # or all of them in one text
        else:
            gold = _index_of(labels[0], [letter(i) for i in range(len(options))], where)
            asked = text.strip() if isinstance(text, str) else text
            bare = _without_marks(options)
            if _lacks_one(bare):
                yield EMPTY_OPTION
                continue
            yield _question(task, subject, f"{subject}/{number}", passage or "", asked, bare, gold, where)


def _without_marks(options: list[Any]) -> list[Any]:
    """Options without the letters that they begin with: "(A)", and in LogiQA's file "A．", "A:" or "A " too."""
    if not all(isinstance(option, str) for option in options):
        return options
    named = [(letter(i), option.strip()) for i, option in enumerate(options)]
    blank = all(option.startswith(f"{name} ") for name, option in named)  # of one alone it may be a word
    marks = [rf"\({name}\)|{name}[．.、：:]" + (f"|{name} " if blank else "") for name, _ in named]
    return [re.sub(f"^(?:{mark})", "", option).strip() for mark, (_, option) in zip(marks, named, strict=True)]


_MARK = re.compile(r"(?<![A-Za-z])([A-D])\s*[．.、：:]\s*")


def gaokao(task: str, subject: str, path: Path) -> Iterator[Item]:
    """GAOKAO-Bench: {"example": [{question, answer, …}, …]}; the options stand at the question's end, marked "A．".

    A group of questions on one text has an answer each. Left out: questions with several answers or a picture, and
    those whose end isn't four marked options in order.
    """
    records = parse_json(read_text(path), path)
    entries = records.get("example") if isinstance(records, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{path}: an object with the list 'example' is wanted")
    for number, entry in enumerate(entries):
        where = f"{path}: record {number + 1}"
        answers = "standard_answer" if isinstance(entry, dict) and "standard_answer" in entry else "answer"
        text, labels = _values(entry, ("question", answers), where)
        if not (isinstance(text, str) and isinstance(labels, list) and all(isinstance(x, str) for x in labels)):
            raise UserError(f"{where}: a text under 'question' and a list of letters under '{answers}' are wanted")
        parts = _parts(text, len(labels))
        if not any(labels):
            yield NO_ANSWER
        elif "![](" in text:
            yield PICTURE
        elif not parts:
            yield from [GROUP] * len(labels) if len(labels) > 1 else [NO_OPTIONS]
        else:
            for k, (label, (context, asked, options)) in enumerate(zip(labels, parts, strict=True)):
                if len(label) != 1:
                    yield SEVERAL if label else NO_ANSWER
                    continue
                if _lacks_one(options):
                    yield EMPTY_OPTION
                    continue
                key = f"{subject}/{number}" + (f"-{k + 1}" if len(parts) > 1 else "")
                gold = _index_of(label, list("ABCD"), where)
                yield _question(task, subject, key, context, asked, options, gold, where)


# The number of a question in a group: "1．", "17. ", "（2）", and "1．2010～2020 年"; not of a decimal.
_NUMBER = re.compile(r"(?<![\d.．])(\d{1,2})\s*[．.](?=2\d{3}|\D)|（(\d)）")


def _parts(text: str, count: int) -> list[tuple[str, str, list[str]]]:
    """Context, question and options of each of `count` questions; nothing where they can't be told apart for certain.

    One question ends in four marked options; those of a group are numbered one after another, and hold no other marks.
    """
    marks = list(_MARK.finditer(text))
    if count == 1:
        marks = marks[-4:]
    if not count or [mark[1] for mark in marks] != list("ABCD") * count:
        return []
    starts = [(0, 0)] if count == 1 else _numbers(text, [mark.span() for mark in marks], count)
    if not starts:
        return []
    ends = [start for start, _ in starts[1:]] + [len(text)]
    parts = []
    for k, ((_, begin), end) in enumerate(zip(starts, ends, strict=True)):
        four = marks[4 * k : 4 * k + 4]
        stops = [mark.start() for mark in four[1:]] + [end]
        options = [text[mark.end() : stop].strip() for mark, stop in zip(four, stops, strict=True)]
        parts.append((text[: starts[0][0]].strip(), text[begin : four[0].start()].strip(), options))
    return parts


def _numbers(text: str, marks: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Where a group's numbers stand: the last one before the first options, then each the next; all or nothing."""
    starts: list[tuple[int, int]] = []
    before: int | None = None
    for k in range(count):
        found = list(_NUMBER.finditer(text, marks[4 * k - 1][1] if k else 0, marks[4 * k][0]))
        numbered = [n for n in found if before is None or int(n[1] or n[2]) == before + 1]
        if not numbered:
            return []
        before = int(numbered[-1][1] or numbered[-1][2])
        starts.append(numbered[-1].span())
    return starts


@dataclass(frozen=True)
class Fields:
    """The keys of a user's JSON lines. `options`: the key of a list, or a key an option; `context`: None where there is
    no text to read."""

    context: str | None
    question: str
    options: str | list[str]
    answer: str
    answer_is: Literal["letter", "index", "text"]


def own(fields: Fields) -> Reader:
    """A user's task: JSON lines with these keys."""
    return partial(_own, fields=fields)


def _own(task: str, subject: str, path: Path, fields: Fields) -> Iterator[Item]:
    for number, where, entry in _json_lines(path):
        context = _values(entry, (fields.context,), where)[0] if fields.context else ""
        text, answer = _values(entry, (fields.question, fields.answer), where)
        if isinstance(fields.options, str):
            options = _values(entry, (fields.options,), where)[0]
        else:
            options = _values(entry, tuple(fields.options), where)
        if fields.answer_is != "index":
            count = len(options) if isinstance(options, list) else 0
            known = options if fields.answer_is == "text" else [letter(i) for i in range(count)]
            answer = _index_of(answer, known, where)
        yield _question(task, subject, str(number), context, text, options, answer, where)


def _lacks_one(options: list[Any]) -> bool:
    return any(isinstance(option, str) and not option.strip() for option in options)


def _json_lines(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Number, place and value of each line that isn't blank."""
    # Not splitlines: it would also cut at U+2028 and other marks that a JSON string may hold.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, f"{path}:{number}", parse_json(line, path, number)


def _values(entry: Any, keys: tuple[str, ...], where: str) -> list[Any]:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: an object with the keys {', '.join(keys)} is wanted")
    for key in keys:
        if key not in entry:
            raise UserError(f"{where}: the key '{key}' is missing")
    return [entry[key] for key in keys]


def _index_of(answer: Any, options: Any, where: str) -> int:
    """Where an answer stands among the options: of equal ones (a few real questions have them) the first."""
    if not isinstance(options, list) or answer not in options:
        raise UserError(f"{where}: the answer {answer!r} is not one of the choices")
    return options.index(answer)


def _question(
    task: str, subject: str, key: str, context: Any, text: Any, options: Any, gold: Any, where: str
) -> Question:
    if not (isinstance(options, list) and all(isinstance(option, str) for option in options)):
        raise UserError(f"{where}: the options are not a list of texts")
    if not 2 <= len(options) <= 26:
        raise UserError(f"{where}: {len(options)} options; 2 to 26 are possible")
    if not (isinstance(context, str) and isinstance(text, str)):
        raise UserError(f"{where}: the context or the question is not a text")
    if not any(option.strip() for option in options):
        raise UserError(f"{where}: all options are empty")
    if LONE_SURROGATE.search("".join((key, context, text, *options))):
        raise UserError(f"{where}: holds half a character (a lone surrogate); write it again")
    if type(gold) is not int or not 0 <= gold < len(options):  # `type`: true is an int in Python
        raise UserError(f"{where}: the answer {gold!r} is not the number of an option (0 to {len(options) - 1})")
    return Question(task, key, context, text, tuple(options), gold, subject)
