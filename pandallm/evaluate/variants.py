"""What a run asks: a task's questions in several wordings and orders of their options, with examples shown before."""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

from pandallm import files, log
from pandallm.config import UserError
from pandallm.data.questions import WORDINGS
from pandallm.evaluate import tasks as task_files
from pandallm.evaluate.tasks import Question, Task

ALL_ORDERS_UP_TO = 6  # options whose orders (720) are listed; of more, orders are drawn


@dataclass(frozen=True)
class Asked:
    """A question as it is shown: its options are in the order shown, and so is its gold.

    `order`: for each option shown, its index in the file; empty where only the file's order is asked.
    """

    question: Question
    wording: str
    order: tuple[int, ...] = ()
    examples: tuple[Question, ...] = ()

    def fields(self) -> dict[str, Any]:
        """What a line of predictions.jsonl says of it besides, only where there is something to say."""
        said: dict[str, Any] = {}
        if self.question.subject:
            said["subject"] = self.question.subject
        if self.order:
            said["order"] = list(self.order)
        if self.question.duplicate_options:
            said["duplicate_options"] = True
        return said


def wordings(names: Sequence[str]) -> list[str]:
    """Wordings by name, or "all" of them. UserError: none, an unknown one, one twice."""
    if list(names) == ["all"]:
        return list(WORDINGS)
    if not names:
        raise UserError(f"no wording: name some of {', '.join(WORDINGS)}, or all")
    for name in names:
        if name not in WORDINGS:
            near = difflib.get_close_matches(name, WORDINGS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(WORDINGS)}; or all, alone"
            raise UserError(f"wording '{name}': unknown; {hint}")
        if list(names).count(name) > 1:
            raise UserError(f"wording '{name}': given twice")
    return list(names)


def orders(question: Question, count: int) -> list[tuple[int, ...]]:
    """`count` orders of a question's options, the file's own first; the same in every run, whatever else is asked.

    All differ as long as there are enough; where there are not (two options have two), they come round again, each as
    often as the others, so that every question counts the same.
    """
    n = len(question.options)
    identity = tuple(range(n))
    drawn = random.Random(f"{question.id}\n{question.question}")
    if n <= ALL_ORDERS_UP_TO:
        others = [order for order in permutations(identity) if order != identity]
        drawn.shuffle(others)
    else:
        others = []
        while len(others) + 1 < min(count, math.factorial(n)):
            order = tuple(drawn.sample(identity, n))
            if order != identity and order not in others:
                others.append(order)
    cycle = [identity, *others]
    return [cycle[i % len(cycle)] for i in range(count)]


def ask(
    questions: Sequence[Question],
    names: Sequence[str],
    permute: int,
    examples: Mapping[str, Sequence[Question]],
) -> list[Asked]:
    """Every question in every wording and `permute` orders. `examples`: of each subject, shown before its questions."""
    asked = []
    for name in names:
        for question in questions:
            shown = tuple(examples.get(question.subject, ()))
            for order in orders(question, permute):
                options = tuple(question.options[i] for i in order)
                turned = replace(question, options=options, gold=order.index(question.gold))
                asked.append(Asked(turned, name, order if permute > 1 else (), shown))
    return asked


@dataclass(frozen=True)
class Set:
    """A task's questions as they are asked. `data`: hash of the files they come from; `examples`: of their examples',
    "" where they have none."""

    task: Task
    asked: list[Asked]
    data: str
    examples: str
    left_out: dict[str, int]  # questions by cause


def sets(
    tasks: Sequence[str],
    data: Path | None,
    split: str,
    limit: int | None = None,
    names: Sequence[str] = ("original",),
    shots: int = 0,
    permute: int = 1,
) -> dict[str, Set]:
    """What each task asks, by the task's name; what was left out or looks odd is told.

    `limit`: the first questions of each task, of each subject where it has some. `names`: of wordings. `shots`: how
    many answered examples stand before each question. `permute`: how many orders of its options are asked.
    Raises UserError for every mistake in the arguments and the files.
    """
    names = wordings(names)
    for what, count, least in (("shots", shots, 0), ("permute", permute, 1)):
        if count < least:
            raise UserError(f"{what}: {count} is out of range; {least} or more is wanted")
    found: dict[str, Set] = {}
    for text in tasks:
        task = task_files.get(text)
        if task.name in found:
            raise UserError(f"task '{task.name}': given twice")
        questions, left_out = task_files.read(text, data, split)
        questions = _first(questions, limit)
        examples = task_files.examples(text, data, split, shots) if shots else {}
        for subject in {question.subject for question in questions} - examples.keys() if shots else ():
            raise UserError(f"{text}: the subject {subject} has no examples; leave --shots out")
        hashed = _hash(task_files.find(text, data, split))
        hashed_examples = _hash(task_files.find(text, data, task.examples)) if shots else ""
        found[task.name] = Set(task, ask(questions, names, permute, examples), hashed, hashed_examples, left_out)
        _tell(task, questions, left_out, examples)
    return found


def _first(questions: Iterable[Question], limit: int | None) -> list[Question]:
    """The first `limit` questions of each subject."""
    if limit is None:
        return list(questions)
    chosen: dict[str, list[Question]] = {}
    for question in questions:
        chosen.setdefault(question.subject, []).append(question)
    return [question for of_subject in chosen.values() for question in of_subject[:limit]]


def _hash(paths: Sequence[Path]) -> str:
    hashes = [files.hash_file(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else files.hash_json(hashes)


def _tell(
    task: Task,
    questions: Sequence[Question],
    left_out: Mapping[str, int],
    examples: Mapping[str, Sequence[Question]],
) -> None:
    def said(question: Question) -> tuple[str, str, frozenset[str]]:
        return question.context, question.question, frozenset(question.options)

    shown = {subject: set(map(said, some)) for subject, some in examples.items()}
    if leaked := sum(said(question) in shown.get(question.subject, ()) for question in questions):
        log.warn(f"{task.name}: questions shown answered among their own examples: {leaked}; they tell nothing")
    if left_out:
        log.warn(f"{task.name}: questions left out, {sum(left_out.values())} in all: {task_files.counts(left_out)}")
    duplicates = sum(question.duplicate_options for question in questions)
    if duplicates:
        log.warn(
            f"{task.name}: questions with the right option twice: {duplicates}; flagged (duplicate_options), and only"
            " the one that the file names (the first, where it names a text) counts as right"
        )
