"""AGIEval and GAOKAO-Bench as their files really are: marks of many kinds, groups of questions, pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pandallm import files
from pandallm.evaluate import layouts, tasks
from pandallm.evaluate.tasks import Question


@pytest.mark.parametrize(
    "marked",
    [
        ["(A)甲 乙", "(B)A．丙", "(C)丁", "(D) 戊"],
        ["A．甲 乙", "B．A．丙", "C.丁", "D、戊"],
        ["A 甲 乙", "B A．丙", "C 丁", "D 戊"],
        ["A: 甲 乙", " B：A．丙", "C: 丁", "D: 戊"],
        ["(A)甲 乙", "(B)A．丙", "(C)丁", "D．戊 "],
        ["甲 乙", "A．丙", "丁", "戊"],
    ],
)
def test_marks_of_agieval(tmp_path: Path, marked: list[str]) -> None:
    entry = {"passage": None, "question": "问？\r\n", "options": marked, "label": "B"}
    path = tmp_path / "agieval" / "logiqa-zh.jsonl"
    files.write_text(path, json.dumps(entry, ensure_ascii=False) + "\n")
    (question,) = tasks.load("agieval", tmp_path, "test")
    assert question.question == "问？" and question.options == ("甲 乙", "A．丙", "丁", "戊") and question.gold == 1


def test_a_blank_alone_is_no_mark(tmp_path: Path) -> None:
    options = ["A 和 B", "都对", "都错", "D 和 B"]
    files.write_text(
        tmp_path / "agieval" / "logiqa-zh.jsonl",
        json.dumps({"passage": "", "question": "?", "options": options, "label": ["A"]}) + "\n",
    )
    assert list(tasks.load("agieval", tmp_path, "test")[0].options) == options


OPTIONS = "A．一 B．二\nC．三 D．四"


def entry(question: str, *answer: str) -> dict[str, Any]:
    return {"year": "2020", "question": question, "answer": list(answer), "index": 0}


def gaokao(folder: Path, *entries: dict[str, Any]) -> list[layouts.Item]:
    path = folder / "2010-2022_Geography_MCQs.json"
    files.write_json(path, {"example": list(entries)})
    return list(layouts.gaokao("gaokao", "geography", path))


def test_a_group_is_its_questions(tmp_path: Path) -> None:
    """Context: what stands before the first number; numbers in it, of years and decimals, are none."""
    text = "2．图中 1．5 万人，3．2010～2020 年。据此完成下列各题。\n"
    asked = f"6．（4 分）甲？\n{OPTIONS}\n7. 乙是（ ） {OPTIONS} （8）2019 年丙？{OPTIONS}"
    found = gaokao(tmp_path, entry(text + asked.replace("（8）", "8．"), "A", "BC", "D"))
    options = ("一", "二", "三", "四")
    assert found == [
        Question("gaokao", "geography/0-1", text.strip(), "（4 分）甲？", options, 0, "geography"),
        layouts.SEVERAL,
        Question("gaokao", "geography/0-3", text.strip(), "2019 年丙？", options, 3, "geography"),
    ]
    bracketed = f"文。（1）甲？{OPTIONS}（2）乙？{OPTIONS}"
    assert [q.question for q in gaokao(tmp_path, entry(bracketed, "A", "B")) if isinstance(q, Question)] == [
        "甲？",
        "乙？",
    ]


@pytest.mark.parametrize(
    "text",
    [
        f"文。1．甲？{OPTIONS} 3．乙？{OPTIONS}",  # another number
        f"文。1．甲？{OPTIONS} 乙？{OPTIONS}",  # none
        f"文。1．甲 A．酸？{OPTIONS} 2．乙？{OPTIONS}",  # a mark too many
        f"文。1．甲？{OPTIONS} 2．乙？A．一 C．二 B．三 D．四",
        f"文。1．甲？{OPTIONS}",
    ],
)
def test_a_group_that_cannot_be_split_is_counted(tmp_path: Path, text: str) -> None:
    assert gaokao(tmp_path, entry(text, "A", "B")) == [layouts.GROUP] * 2


def test_pictures_and_answers_are_left_out_by_cause(tmp_path: Path) -> None:
    picture = entry(f"如图 ![](https://example.org/1.jpg) {OPTIONS}", "A")
    found = gaokao(tmp_path, picture, entry(f"问？{OPTIONS}", "AC"), entry(f"问？{OPTIONS}"), entry("问？A．一", "A"))
    assert found == [layouts.PICTURE, layouts.SEVERAL, layouts.NO_ANSWER, layouts.NO_OPTIONS]
    assert gaokao(tmp_path, entry("问？A．甲 B．乙 C．丙 D． ", "A")) == [layouts.EMPTY_OPTION]
    two = f"文。1．一？{OPTIONS} 2．二？{OPTIONS}"
    assert [x if isinstance(x, str) else x.gold for x in gaokao(tmp_path, entry(two, "A", ""))] == [
        0,
        layouts.NO_ANSWER,
    ]
