"""The tasks: Chinese multiple-choice sets from the files their authors publish, or a user's own; a question's prompt.

A task is a record in TASKS (where its files lie, how they are read, which splits they have), or a YAML file of the
same kind beside its questions.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from pandallm import config, log
from pandallm.config import UserError
from pandallm.data.questions import example_of, letter, text_of
from pandallm.evaluate import layouts
from pandallm.evaluate.layouts import Question, Reader

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Task:
    """`files`: patterns below the data folder, tried in order; `train_files`: more of them for the split train.

    `version` grows whenever the same file would give other questions or another prompt.
    """

    files: tuple[str, ...]
    read: Reader
    version: int
    source: str  # where the files come from, and their licence
    splits: tuple[str, ...] = SPLITS
    examples: str = "train"  # the split that answered examples come from, "" if there is none
    unanswered: tuple[str, ...] = ()  # splits published without answers
    train_files: tuple[str, ...] = ()
    subjects: int = 0  # how many subjects the set has, a file each; 0: one file a split
    names: tuple[str, ...] = ()  # the subjects' names, where other files lie beside them
    language: str = "zh"
    name: str = ""  # as asked for: a key of TASKS, "cmmlu/anatomy", or what a YAML file says
    subject: str = ""  # the only one wanted
    own: Mapping[str, Path] = field(default_factory=dict)  # a user's files by split, in place of `files`


class OwnTask(config.Config):
    """A YAML file that makes a task of JSON lines beside it."""

    name: str = Field(pattern=r"^[\w.-]+$")
    file: str  # the questions, whatever split is asked for
    train_file: str | None = None  # answered examples for --shots
    version: int = Field(1, ge=1)
    language: str = "zh"
    context: str | None = None  # keys of a line; no context: knowledge questions
    question: str = "question"
    options: str | list[str] = "options"  # the key of a list, or one key an option
    answer: str = "answer"
    answer_is: Literal["letter", "index", "text"] = "letter"  # index: from 0; text: the right option's


class Loaded(NamedTuple):
    """A split's questions in the files' order, and how many were left out by cause."""

    questions: list[Question]
    left_out: dict[str, int]


def prompt_for(question: Question, wording: str, context: str | None = None, examples: Sequence[Question] = ()) -> str:
    """The text that asks a question, ending where the answer begins. `wording`: a key of WORDINGS.

    `context`: what is left of the question's, where all of it is too long. `examples`: are shown before, with answers.
    """
    listing = bool(question.options)
    shown = [example_of(e.context, e.question, e.options, e.gold, wording, listing) for e in examples]
    left = question.context if context is None else context
    return text_of(left, question.question, question.options, wording, shown, on_text=bool(question.context))


def parse_letter(output: str, n_options: int) -> int | None:
    """Index of the option an output names, by the original's rule: the first of the letters A-D anywhere in it.

    The rule is crude and kept so, for figures that compare with the published ones: "Answer: B" is A, lower-case and
    full-width letters (Ａ) don't count, and a "C" to a question of two options is an answer (a wrong one). Questions of
    more than four options, which the original had none of, get as many letters as options. None: no letter, so wrong.
    """
    found = re.search(f"[A-{letter(max(n_options, 4) - 1)}]", output)
    return ord(found.group()) - ord("A") if found else None


HALF_WIDTH = {0xFEE0 + ord(c): c for c in string.ascii_letters + string.digits}  # by the full-width form's number


def parse_strict(output: str, n_options: int) -> int | None:
    """Index of the option an output names, by a stricter rule: the first letter of an option that stands alone.

    "Answer: B" is B; full-width letters count; letters inside a word, of a degree (°C, ℃) or of no option don't.
    """
    text = output.translate(HALF_WIDTH)
    found = re.search(f"(?<![A-Za-z0-9°])[A-{letter(n_options - 1)}](?![A-Za-z0-9])", text)
    return ord(found.group()) - ord("A") if found else None


def get(text: str) -> Task:
    """The task of a name, of a name and a subject ("cmmlu/anatomy"), or of a YAML file's path.

    Raises UserError: no such task; a YAML file that is none, or names files outside its folder.
    """
    if text.endswith((".yaml", ".yml")):
        return _own(Path(text))
    name, slash, subject = text.partition("/")
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known tasks: {', '.join(TASKS)}, or the path of a .yaml"
        raise UserError(f"task '{text}': unknown; {hint}")
    if slash and not TASKS[name].subjects:
        raise UserError(f"task '{text}': {name} has no subjects")
    if slash and not subject:
        raise UserError(f"task '{text}': name a subject after the '/', or leave it out")
    return replace(TASKS[name], name=text, subject=subject)


def _own(path: Path) -> Task:
    spec = config.load(OwnTask, path)
    if spec.name in TASKS:
        raise UserError(f"{path}: name: '{spec.name}' is a task of panda's own; choose another")
    folder = path.parent.resolve()

    def beside(file: str) -> Path:
        if "\0" in file:
            raise UserError(f"{path}: '{file!r}' is no file's name")
        whole = (folder / file).resolve()  # links are followed first: they may not lead out of the folder either
        if not whole.is_relative_to(folder):
            raise UserError(f"{path}: '{file}' lies outside the folder of this file; put it beside it")
        return whole

    own = {"test": beside(spec.file), "dev": beside(spec.file)}
    if spec.train_file is not None:
        own["train"] = beside(spec.train_file)
    keys = layouts.Fields(spec.context, spec.question, spec.options, spec.answer, spec.answer_is)
    shots = "train" if "train" in own else ""
    return Task(
        (),
        layouts.own(keys),
        spec.version,
        str(path),
        splits=tuple(own),
        examples=shots,
        language=spec.language,
        name=spec.name,
        own=own,
    )


def find(text: str, data: Path | None, split: str) -> list[Path]:
    """The files of a task's split below the folder `data` (not needed for a user's own task): one, or one a subject.

    Raises UserError: as `get`, unknown split, one without answers, no such file (names the paths tried), more than one
    that fits, no such subject.
    """
    task = get(text)
    if split in task.unanswered:
        raise UserError(f"{text}: the answers of the split '{split}' are not published; choose --split val")
    if split not in task.splits:
        raise UserError(f"{text}: split '{split}': unknown; {text} has {', '.join(task.splits)}")
    if task.own:
        return [task.own[split]]
    if data is None:
        raise UserError(f"{text}: name the folder its files lie in (--data); they come from {task.source}")
    paths: list[Path] = []
    patterns = task.files + (task.train_files if split == "train" else ())
    for pattern in patterns:
        paths = sorted(data.glob(pattern.format(split=split)))
        paths = [path for path in paths if not task.names or _subject(path, split) in task.names]
        if paths:
            break
    else:
        tried = ", ".join(str(data / pattern.format(split=split)) for pattern in patterns)
        raise UserError(f"{text}: no file for the split '{split}'; tried {tried}; they come from {task.source}")
    if not task.subjects and len(paths) > 1:
        raise UserError(f"{text}: {' and '.join(map(str, paths))} both fit; leave one of them in {data}")
    return _only(paths, task.subject, split) if task.subject else paths


def _only(paths: list[Path], subject: str, split: str) -> list[Path]:
    there = {_subject(path, split): path for path in paths}
    if subject not in there:
        near = difflib.get_close_matches(subject, there, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else f" in {paths[0].parent}"
        raise UserError(f"subject '{subject}': no file of it{hint}")
    return [there[subject]]


def _subject(path: Path, split: str) -> str:
    """ "accountant_dev.csv" -> accountant, "2010-2022_Biology_MCQs.json" -> biology."""
    return re.sub(rf"^\d{{4}}-\d{{4}}_|_({re.escape(split)}|MCQs)$", "", path.stem).lower()


def read(text: str, data: Path | None, split: str) -> Loaded:
    """The questions of a task's split, in the files' order; subjects of a set that aren't there are told.

    Raises UserError: as `find`, or a record that breaks its layout, with its place.
    """
    task, paths = get(text), find(text, data, split)
    if not task.subject and len(paths) < task.subjects:
        lacking = sorted(set(task.names) - {_subject(path, split) for path in paths})
        missing = f"; missing: {', '.join(lacking)}" if lacking else ""
        log.warn(f"{text}: {len(paths)} of {task.subjects} subjects are in {paths[0].parent}{missing}")
    found: list[Question] = []
    left_out: Counter[str] = Counter()
    for path in paths:
        before = len(found) + left_out.total()
        for item in task.read(task.name, _subject(path, split) if task.subjects else "", path):
            if isinstance(item, Question):
                found.append(item)
            else:
                left_out[item] += 1
        if len(found) + left_out.total() == before:
            raise UserError(f"{path}: has no questions")
    if not found:
        raise UserError(f"{text}: no question can be asked; left out: {counts(left_out)}")
    _check_ids(found, paths[0] if len(paths) == 1 else paths[0].parent)
    return Loaded(found, dict(left_out))


def _check_ids(questions: Iterable[Question], where: Path) -> None:
    seen: set[str] = set()
    for question in questions:  # results of two models are paired by id
        if question.id in seen:
            raise UserError(f"{where}: the question id '{question.id}' is there twice")
        seen.add(question.id)


def load(text: str, data: Path | None, split: str) -> list[Question]:
    """The questions of `read`."""
    return read(text, data, split).questions


def counts(left_out: Mapping[str, int]) -> str:
    """Causes with their numbers, for a line."""
    return ", ".join(f"{count} {cause}" for cause, count in left_out.items())


def examples(text: str, data: Path | None, split: str, count: int) -> dict[str, list[Question]]:
    """The first `count` questions of a task's train split by subject ("" where it has none), to be shown answered.

    Raises UserError: the task has no such split, or not so many questions there, or it is the `split` evaluated.
    """
    task = get(text)
    if not task.examples:
        raise UserError(f"{text}: has no questions to take examples from; leave --shots out")
    if split == task.examples or (task.own and task.own[split] == task.own[task.examples]):
        raise UserError(f"{text}: the split '{split}' is where the examples of --shots come from; evaluate another")
    by_subject: dict[str, list[Question]] = {}
    for question in read(text, data, task.examples).questions:
        chosen = by_subject.setdefault(question.subject, [])
        if len(chosen) < count:
            chosen.append(question)
    for subject, chosen in by_subject.items():
        if len(chosen) < count:
            where = f"{text}, {subject}" if subject else text
            raise UserError(f"{where}: the split '{task.examples}' has {len(chosen)} questions; choose fewer --shots")
    return by_subject


_CC = "CC BY-NC-SA 4.0, not for commercial use"
_LOGIQA = f"https://github.com/csitfun/LogiQA2.0 ({_CC})"
_C3 = "https://github.com/nlpdata/c3 (for non-commercial research)"
_AGIEVAL = ("logiqa-zh", "jec-qa-kd", "jec-qa-ca", "gaokao-chinese", "gaokao-geography", "gaokao-history") + (
    *("gaokao-biology", "gaokao-chemistry", "gaokao-physics", "gaokao-mathqa"),
)

TASKS: dict[str, Task] = {
    "c3-d": Task(("c3/c3-d-{split}.json", "c3-d-{split}.json"), layouts.c3, 2, _C3),
    "c3-m": Task(("c3/c3-m-{split}.json", "c3-m-{split}.json"), layouts.c3, 2, _C3),
    "logiqa-v2": Task(
        ("logiqa_v2/{split}_zh.txt", "{split}_zh.txt"),
        layouts.logiqa,
        2,
        _LOGIQA,
        train_files=("logiqa_v2/{split}_zh*.txt", "{split}_zh*.txt"),
    ),
    "logiqa-v2-en": Task(
        ("logiqa_v2/{split}.txt", "{split}.txt"), partial(layouts.logiqa, key=None), 1, _LOGIQA, language="en"
    ),
    "cmmlu": Task(
        ("cmmlu/{split}/*.csv", "data/{split}/*.csv", "{split}/*.csv"),
        partial(layouts.table, question="Question", answer="Answer"),
        2,
        f"https://github.com/haonan-li/CMMLU ({_CC})",
        splits=("dev", "test"),
        examples="dev",
        subjects=67,
    ),
    "ceval": Task(
        ("ceval/{split}/*_{split}.csv", "ceval-exam/{split}/*_{split}.csv", "{split}/*_{split}.csv"),
        partial(layouts.table, question="question", answer="answer"),
        2,
        f"https://huggingface.co/datasets/ceval/ceval-exam ({_CC})",
        splits=("dev", "val"),
        examples="dev",
        unanswered=("test",),
        subjects=52,
    ),
    "agieval": Task(
        ("agieval/*.jsonl", "data/v1_1/*.jsonl", "data/v1/*.jsonl", "*.jsonl"),
        layouts.agieval,
        4,
        "https://github.com/ruixiangcui/AGIEval (each set has its own licence; JEC-QA: https://jecqa.thunlp.org)",
        splits=("test",),
        examples="",
        subjects=len(_AGIEVAL),
        names=_AGIEVAL,
    ),
    "gaokao": Task(
        ("gaokao/20*_MCQs.json", "Data/Objective_Questions/20*_MCQs.json", "20*_MCQs.json"),
        layouts.gaokao,
        4,
        "https://github.com/OpenLMLab/GAOKAO-Bench (Apache-2.0)",
        splits=("test",),
        examples="",
        subjects=10,
    ),
}
