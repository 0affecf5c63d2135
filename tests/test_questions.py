"""evaluate/: questions read or refused, and prompts byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pandallm import demo, files, tokenizer
from pandallm.config import UserError
from pandallm.evaluate import score, tasks
from pandallm.evaluate.tasks import Question
from pandallm.model import load

DEMO = demo.ROOT / "eval"
BASE = {"split": "dev", "limit": 3, "data": DEMO, "model": "tiny", "protocols": ["generate"], "precision": "fp32"}


@pytest.fixture(scope="module")
def tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = load.resolve("tiny")
    return load.load(folder, torch.float32).eval(), tokenizer.load(folder)


def words_of_tiny(chat_format: str) -> PreTrainedTokenizerBase:
    words = tokenizer.load(load.resolve("tiny"))
    assert score.use_format(words, chat_format) == chat_format
    return words


DIALOGUE = Question("c3-d", "1-0", "男：下雨了。\n女：带伞吧。", "他们要做什么？", ("带伞", "等车", "回家"), 0)
MIXED = Question("c3-m", "2-1", "湖边有一家{小}店。", "店在湖边。", ("正确", "错误"), 0)
LOGIC = Question("logiqa-v2", "7", "凡是甲都是乙。", "可以推出哪一项？", ("甲是乙", "乙是甲", "没有甲", "没有乙"), 0)

GOLDEN = {
    DIALOGUE: "阅读下面的文章并从选项中选择的答案回答问题：\n\nContext:\n男：下雨了。\n女：带伞吧。\n\n"
    "Question:\n他们要做什么？\n\nOptions:\nA: 带伞\nB: 等车\nC: 回家\n\n本题的答案是：",
    MIXED: "阅读下面的文章并从选项中选择的答案回答问题：\n\nContext:\n湖边有一家{小}店。\n\n"
    "Question:\n店在湖边。\n\nOptions:\nA: 正确\nB: 错误\n\n本题的答案是：",
    LOGIC: "阅读下面的文章并从选项中选择的答案回答问题：\n\nContext:\n凡是甲都是乙。\n\n"
    "Question:\n可以推出哪一项？\n\nOptions:\nA: 甲是乙\nB: 乙是甲\nC: 没有甲\nD: 没有乙\n\n本题的答案是：",
}


@pytest.mark.parametrize("question", GOLDEN)
def test_prompt(question: Question) -> None:
    assert tasks.prompt_for(question, "original").encode() == GOLDEN[question].encode()


@pytest.mark.parametrize(
    ("output", "n_options", "index"),
    [
        ("A", 4, 0),
        (" D: 回家", 4, 3),
        ("选B，不选A", 4, 1),
        ("Answer: B", 4, 0),  # the original's rule, literally
        ("the answer is C", 4, 2),
        ("C", 2, 2),  # an answer, and a wrong one
        ("b", 4, None),
        ("Ｂ", 4, None),
        ("E", 4, None),
        ("E", 5, 4),
        ("", 4, None),
        ("没有答案\n\n", 4, None),
        ("(C)", 4, 2),
        ("\n\n  D\n", 4, 3),
        ("答案是：　Ｂ，也就是 B", 4, 1),  # full-width letters don't count
        ("DNA 和 A", 4, 3),  # a word's letter does
        ("CBA", 4, 2),
        ("Ａ／Ｂ／Ｃ", 4, None),
        ("選項丙", 4, None),
        ("option c", 4, None),
        ("The answer is B", 4, 1),  # "T" and "h" are none of them
        ("🐼D", 4, 3),
        ("\ufffdB", 4, 1),
    ],
)
def test_parse_letter(output: str, n_options: int, index: int | None) -> None:
    assert tasks.parse_letter(output, n_options) == index


def test_demo_questions_load() -> None:
    for task, n in (("c3-d", 4), ("c3-m", 4), ("logiqa-v2", 4)):
        for split in ("dev", "train"):
            questions = tasks.load(task, DEMO, split)
            assert len(questions) >= n and all(q.task == task for q in questions)
    assert {len(q.options) for q in tasks.load("c3-m", DEMO, "dev")} >= {2, 4}
    record = json.loads((DEMO / "c3" / "c3-d-dev.json").read_text(encoding="utf-8"))[1]
    question = next(q for q in tasks.load("c3-d", DEMO, "dev") if q.id == f"{record[2]}-1")
    assert question.context == "\n".join(record[0])
    assert question.options[question.gold] == record[1][1]["answer"]


def test_line_ends_and_byte_order_mark_do_not_matter(tmp_path: Path) -> None:
    for name in ("c3/c3-d-dev.json", "c3/c3-m-dev.json", "logiqa_v2/dev_zh.txt"):
        text = (DEMO / name).read_text(encoding="utf-8")
        flat = tmp_path / Path(name).name  # and without the subfolder
        flat.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    for task in ("c3-d", "c3-m", "logiqa-v2"):
        assert tasks.load(task, tmp_path, "dev") == tasks.load(task, DEMO, "dev")


def test_files_are_found(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'c3-d'"):
        tasks.find("c3d", tmp_path, "dev")
    with pytest.raises(UserError, match="split 'valid'"):
        tasks.find("c3-d", tmp_path, "valid")
    with pytest.raises(UserError) as e:
        tasks.find("c3-d", tmp_path, "test")
    assert str(tmp_path / "c3/c3-d-test.json") in str(e.value) and str(tmp_path / "c3-d-test.json") in str(e.value)
    (tmp_path / "train_zh.part.txt").touch()
    (tmp_path / "test_zh.part.txt").touch()
    assert [p.name for p in tasks.find("logiqa-v2", tmp_path, "train")] == ["train_zh.part.txt"]
    with pytest.raises(UserError):  # a stray file is not the test set
        tasks.find("logiqa-v2", tmp_path, "test")
    (tmp_path / "train_zh.more.txt").touch()
    with pytest.raises(UserError, match="both fit"):
        tasks.find("logiqa-v2", tmp_path, "train")
    (tmp_path / "train_zh.txt").touch()
    assert [p.name for p in tasks.find("logiqa-v2", tmp_path, "train")] == ["train_zh.txt"]


def c3(**changes: Any) -> list[Any]:
    entry = {"question": "问？", "choice": ["甲", "乙", "甲"], "answer": "甲"} | changes
    return [["一", "二"], [{k: v for k, v in entry.items() if v is not None}], "1-2"]


def logiqa(**changes: Any) -> dict[str, Any]:
    entry = {"example_id": 3, "answer": 1, "text": "文\u2028本", "question": "问？", "options": ["甲", "乙"]} | changes
    return {k: v for k, v in entry.items() if v is not None}


def test_good_records(tmp_path: Path) -> None:
    files.write_json(tmp_path / "c3-d-dev.json", [c3()])
    assert tasks.load("c3-d", tmp_path, "dev") == [Question("c3-d", "1-2-0", "一\n二", "问？", ("甲", "乙", "甲"), 0)]
    lines = [json.dumps(logiqa(), ensure_ascii=False), "", json.dumps(logiqa(example_id="x")), ""]
    (tmp_path / "dev_zh.txt").write_text("\n".join(lines), encoding="utf-8")
    loaded = tasks.load("logiqa-v2", tmp_path, "dev")
    assert loaded[0] == Question("logiqa-v2", "3", "文\u2028本", "问？", ("甲", "乙"), 1) and loaded[1].id == "x"


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (c3(answer="丙"), "record 2, question 1: the answer '丙'"),
        (c3(choice=["甲"]), "record 2, question 1: 1 options"),
        (c3(choice=["甲"] * 27), "27 options"),
        (c3(choice=["甲", 2]), "record 2, question 1: the options"),
        (c3(question=None), "record 2, question 1: the key 'question'"),
        (c3(question=["问"]), "record 2, question 1: the context or the question"),
        ([["一"], []], "record 2"),
        ([["一", 2], [], "x"], "record 2: the first part"),
        ([["一"], ["问"], "x"], "record 2, question 1"),
        ({}, "record 2"),
        (c3(), "'1-2-0' is there twice"),
    ],
)
def test_bad_c3_record(tmp_path: Path, bad: Any, said: str) -> None:
    path = tmp_path / "c3-m-dev.json"
    files.write_json(path, [c3(), bad])
    with pytest.raises(UserError) as e:
        tasks.load("c3-m", tmp_path, "dev")
    assert str(e.value).startswith(str(path)) and said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"example_id": 1, ', ":2: not valid JSON"),
        ("[1]", ":2: an object"),
        (json.dumps(logiqa(example_id=4, answer=2)), ":2: the answer 2"),
        (json.dumps(logiqa(example_id=4, answer=-1)), ":2: the answer -1"),
        (json.dumps(logiqa(example_id=4, answer="1")), ":2: the answer '1'"),
        (json.dumps(logiqa(example_id=4, answer=True)), ":2: the answer True"),
        (json.dumps(logiqa(text=None)), ":2: the key 'text'"),
        (json.dumps(logiqa(text=5)), ":2: the context"),
        (json.dumps(logiqa(options="AB")), ":2: the options"),
        (json.dumps(logiqa()), "'3' is there twice"),
        (json.dumps(logiqa(example_id=4, text="天\ud83d空")), ":2: holds half a character"),
        (json.dumps(logiqa(example_id="\udc00")), ":2: holds half a character"),
        (json.dumps(logiqa(example_id=4, options=["", " "])), ":2: all options are empty"),
        ("[" * 100_000, ":2: not valid JSON: nested too deep"),
        (f'{{"example_id": {"9" * 5000}}}', ":2: not valid JSON: a number"),
    ],
)
def test_bad_logiqa_line(tmp_path: Path, bad: str, said: str) -> None:
    path = tmp_path / "dev_zh.txt"
    path.write_text(json.dumps(logiqa()) + "\n" + bad + "\n")
    with pytest.raises(UserError) as e:
        tasks.load("logiqa-v2", tmp_path, "dev")
    assert str(path) in str(e.value) and said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", "[1,"])
def test_bad_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "c3-d-dev.json").write_text(text)
    with pytest.raises(UserError, match=r"c3-d-dev\.json"):
        tasks.load("c3-d", tmp_path, "dev")
