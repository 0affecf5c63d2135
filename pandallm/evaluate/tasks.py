"""The questions: Chinese multiple-choice sets from the files their authors publish, and the prompt made of a question.

A task is a record in TASKS: where its files lie and how they are read. A record that breaks its schema is an error with
file and place, never a question left out or guessed: a wrong question must not become a wrong score.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pandallm.config import UserError, read_text
from pandallm.data.questions import letter, text_of

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Question:
    """One multiple-choice question. `gold` is the index of the right option; options are lettered A, B, … in order."""

    task: str
    id: str
    context: str
    question: str
    options: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """`files`: patterns below the data folder, tried in order; `train_files`: more of them for the split train.

    `version` grows whenever the same file would give other questions or another prompt.
    """

    files: tuple[str, ...]
    read: Callable[[str, Path], Iterator[Question]]
    version: int
    train_files: tuple[str, ...] = ()


def prompt_for(question: Question, wording: str) -> str:
    """The text that asks a question, ending where the answer begins. `wording`: a key of WORDINGS."""
    return text_of(question.context, question.question, question.options, wording)


def parse_letter(output: str, n_options: int) -> int | None:
    """Index of the option an output names, by the original's rule: the first of the letters A-D anywhere in it.

    The rule is crude and kept so, for figures that compare with the published ones: "Answer: B" is A, lower-case and
    full-width letters (Ａ) don't count, and a "C" to a question of two options is an answer (a wrong one). Questions of
    more than four options, which the original had none of, get as many letters as options. None: no letter, so wrong.
    """
    found = re.search(f"[A-{letter(max(n_options, 4) - 1)}]", output)
    return ord(found.group()) - ord("A") if found else None


def parse_strict(output: str, n_options: int) -> int | None:
    """Index of the option an output names, by a stricter rule: the first letter of an option that stands alone.

    "Answer: B" is B; full-width letters count; letters inside a word, or of no option, don't.
    """
    text = unicodedata.normalize("NFKC", output)
    found = re.search(f"(?<![A-Za-z0-9])[A-{letter(n_options - 1)}](?![A-Za-z0-9])", text)
    return ord(found.group()) - ord("A") if found else None


def find(task: str, data: Path, split: str) -> Path:
    """The file of a task's split below the folder `data`.

    Raises UserError: unknown task or split, no such file (names the paths tried), more than one that fits.
    """
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known tasks: {', '.join(TASKS)}"
        raise UserError(f"task '{task}': unknown; {hint}")
    if split not in SPLITS:
        raise UserError(f"split '{split}': unknown; known splits: {', '.join(SPLITS)}")
    record = TASKS[task]
    patterns = record.files + (record.train_files if split == "train" else ())
    for pattern in patterns:
        paths = sorted(data.glob(pattern.format(split=split)))
        if len(paths) > 1:
            raise UserError(f"{task}: {' and '.join(map(str, paths))} both fit; leave one of them in {data}")
        if paths:
            return paths[0]
    tried = ", ".join(str(data / pattern.format(split=split)) for pattern in patterns)
    raise UserError(f"{task}: no file for the split '{split}'; tried {tried}")


def load(task: str, data: Path, split: str) -> list[Question]:
    """The questions of a task's split, in the file's order.

    Raises UserError: as `find`, or a record that breaks the schema, with its place.
    """
    path = find(task, data, split)
    questions = list(TASKS[task].read(task, path))
    if not questions:
        raise UserError(f"{path}: has no questions")
    seen: set[str] = set()
    for question in questions:  # results of two models are paired by id
        if question.id in seen:
            raise UserError(f"{path}: the question id '{question.id}' is there twice")
        seen.add(question.id)
    return questions


def _read_c3(task: str, path: Path) -> Iterator[Question]:
    """C3's layout: a list of [[paragraph or turn, …], [{question, choice, answer}, …], id]; the answer is a text."""
    try:
        records = json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}: not valid JSON: {e.msg}") from None
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
            if not isinstance(options, list) or answer not in options:
                raise UserError(f"{place}: the answer {answer!r} is not one of the choices")
            # A few real questions have the same choice twice: the first is the gold one.
            gold = options.index(answer)
            yield _question(task, f"{doc}-{k}", "\n".join(paragraphs), text, options, gold, place)


def _read_logiqa(task: str, path: Path) -> Iterator[Question]:
    """LogiQA 2.0's layout: JSON lines of {example_id, answer (0-3), text, question, options}."""
    # Not splitlines: it would also cut at U+2028 and other marks that a JSON string may hold.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as e:
            raise UserError(f"{where}: not valid JSON: {e.msg}") from None
        keys = ("example_id", "text", "question", "options", "answer")
        key, context, text, options, gold = _values(entry, keys, where)
        yield _question(task, str(key), context, text, options, gold, where)


def _values(entry: Any, keys: tuple[str, ...], where: str) -> list[Any]:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: an object with the keys {', '.join(keys)} is wanted")
    for key in keys:
        if key not in entry:
            raise UserError(f"{where}: the key '{key}' is missing")
    return [entry[key] for key in keys]


def _question(task: str, key: str, context: Any, text: Any, options: Any, gold: Any, where: str) -> Question:
    if not (isinstance(options, list) and all(isinstance(option, str) for option in options)):
        raise UserError(f"{where}: the options are not a list of texts")
    if not 2 <= len(options) <= 26:
        raise UserError(f"{where}: {len(options)} options; 2 to 26 are possible")
    if not (isinstance(context, str) and isinstance(text, str)):
        raise UserError(f"{where}: the context or the question is not a text")
    if type(gold) is not int or not 0 <= gold < len(options):  # `type`: true is an int in Python
        raise UserError(f"{where}: the answer {gold!r} is not the number of an option (0 to {len(options) - 1})")
    return Question(task, key, context, text, tuple(options), gold)


TASKS: dict[str, Task] = {
    "c3-d": Task(("c3/c3-d-{split}.json", "c3-d-{split}.json"), _read_c3, 1),
    "c3-m": Task(("c3/c3-m-{split}.json", "c3-m-{split}.json"), _read_c3, 1),
    "logiqa-v2": Task(
        ("logiqa_v2/{split}_zh.txt", "{split}_zh.txt"),
        _read_logiqa,
        1,
        ("logiqa_v2/{split}_zh*.txt", "{split}_zh*.txt"),
    ),
}
