"""evaluate/variants: wordings byte for byte, orders and examples, and runs that ask in many ways."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from test_tasks import CMMLU, text

from pandallm import demo, prompt, tokenizer
from pandallm.config import UserError
from pandallm.data.questions import WORDINGS, letter
from pandallm.evaluate import run as evaluation
from pandallm.evaluate import score, tasks, variants
from pandallm.evaluate.tasks import Question
from pandallm.model import load

DEMO = demo.ROOT / "eval"
GOLDEN = Path(__file__).parent / "golden"

DIALOGUE = Question("c3-d", "1-0", "男：下雨了。\n女：带伞吧。", "他们要做什么？", ("带伞", "等车", "回家"), 0)
MIXED = Question("c3-m", "2-1", "湖边有一家{小}店。", "店在湖边。", ("正确", "错误"), 0)
LOGIC = Question("logiqa-v2", "7", "凡是甲都是乙。", "可以推出哪一项？", ("甲是乙", "乙是甲", "没有甲", "没有乙"), 2)
FACT = Question("cmmlu", "x/0", "", "水的化学式是？", ("H2O", "CO2", "O2", "NaCl"), 0, "x")


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c3-d", "c3-m", "logiqa-v2"])
def test_the_originals_prompt_byte_for_byte(name: str, tmp_path: Path) -> None:
    """From a record in the file's own layout to the bytes that RECIPE section 5 describes."""
    record, golden = GOLDEN / f"{name}.json", (GOLDEN / f"{name}.txt").read_bytes()
    place = {"c3-d": "c3-d-dev.json", "c3-m": "c3-m-dev.json", "logiqa-v2": "dev_zh.txt"}[name]
    (tmp_path / place).write_bytes(record.read_bytes())
    (question,) = tasks.load(name, tmp_path, "dev")
    assert tasks.prompt_for(question, "original").encode() == golden


def test_examples_of_the_original_end_in_the_answer_is() -> None:
    shown = tasks.prompt_for(MIXED, "original", examples=[DIALOGUE, LOGIC])
    instruction = "阅读下面的文章并从选项中选择的答案回答问题：\n\n"
    first = (
        "Context:\n男：下雨了。\n女：带伞吧。\n\nQuestion:\n他们要做什么？\n\nOptions:\nA: 带伞\nB: 等车\nC: 回家\n\n"
        "The answer is A\n\n"
    )
    assert shown.startswith(instruction + first + "Context:\n凡是甲都是乙。")
    assert "\n\nThe answer is C\n\nContext:\n湖边有一家{小}店。" in shown
    assert instruction + shown.split("The answer is C\n\n")[1] == tasks.prompt_for(MIXED, "original")


def test_there_are_enough_wordings() -> None:
    assert len(WORDINGS) >= 8 and next(iter(WORDINGS)) == "original"
    for question in (DIALOGUE, FACT):
        shown = {tasks.prompt_for(question, name) for name in WORDINGS}
        assert len(shown) == len(WORDINGS)
    openings = "".join(w.reading for w in WORDINGS.values())
    assert "閱讀" in openings and "阅读" in openings and "Read" in openings


@pytest.mark.parametrize("name", WORDINGS)
def test_without_options_nobody_asks_for_one(name: str) -> None:
    """Where the options' texts are the answers, a prompt that wants a letter would count against them."""
    for question in (LOGIC, DIALOGUE, replace(LOGIC, context="")):
        bare = tasks.prompt_for(replace(question, options=()), name)
        opening = bare.split(question.context or question.question)[0]
        assert not [word for word in ("选项", "選項", "字母", "单项", "單項", "letter", "option") if word in opening]


def test_examples_that_give_the_question_away_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"question": f"问{i}", "options": ["甲", "乙"], "answer": "A"} for i in range(3)]
    turned = [line | {"options": ["乙", "甲"], "answer": "B"} for line in lines]
    for name, some in (("q", lines), ("t", turned)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in some))
    (tmp_path / "own.yaml").write_text("name: own\nfile: q.jsonl\ntrain_file: t.jsonl\n")
    variants.sets([str(tmp_path / "own.yaml")], None, "test", shots=2)
    assert "own: questions shown answered among their own examples: 2;" in capsys.readouterr().err


@pytest.mark.parametrize("name", WORDINGS)
def test_a_wording(name: str) -> None:
    """Says all that there is, in order, what is common to a passage's questions in front, and ends in no blank."""
    for question in (DIALOGUE, LOGIC, FACT):
        shown = tasks.prompt_for(question, name)
        place = 0
        for part in (question.context, question.question, *question.options):
            place = shown.index(part, place) + len(part)
        assert shown == shown.rstrip() and "{" not in shown
        assert all(letter(i) in shown for i in range(len(question.options)))
    other = Question("c3-d", "1-1", DIALOGUE.context, "谁没有带伞？", ("男的", "女的"), 1)
    common = score.commonprefix([tasks.prompt_for(q, name, examples=[LOGIC]) for q in (DIALOGUE, other)])
    assert DIALOGUE.context in common and LOGIC.options[3] in common
    assert tasks.prompt_for(FACT, name).startswith(WORDINGS[name].knowledge)
    # A context cut off to the last character is still a question on a text.
    for context in (None, ""):
        assert tasks.prompt_for(DIALOGUE, name, context).startswith(WORDINGS[name].reading)
    assert tasks.prompt_for(MIXED, name).count("{小}") == 1


def test_wordings_by_name() -> None:
    assert variants.wordings(["all"]) == list(WORDINGS)
    assert variants.wordings(["en-read", "original"]) == ["en-read", "original"]
    for names, said in ((["orginal"], "did you mean 'original'"), ([], "no wording"), (["zh-bare"] * 2, "given twice")):
        with pytest.raises(UserError, match=said):
            variants.wordings(names)


# --- orders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8])
def test_orders(n: int) -> None:
    question = Question("t", "1", "", "?", tuple("甲乙丙丁戊己庚辛"[:n]), n - 1)
    identity = tuple(range(n))
    assert variants.orders(question, 1) == [identity]
    found = variants.orders(question, 6)
    assert found[0] == identity and found == variants.orders(question, 6) and len(found) == 6
    assert variants.orders(question, 9)[:6] == found[:6]  # however many are asked
    counts = Counter(found)
    assert max(counts.values()) - min(counts.values()) <= 1  # all differ, or each comes round as often
    assert len(counts) == min(6, len(list(permutations(identity))))
    if n == 4:
        everything = variants.orders(question, 24)
        assert len(set(everything)) == 24 and everything[:6] == found
        assert variants.orders(Question("t", "2", "", "?", question.options, 0), 6) != found


def test_a_turned_question_has_the_same_answer() -> None:
    asked = variants.ask([LOGIC, DIALOGUE], ["original", "en-read"], 3, {})
    assert len(asked) == 2 * 2 * 3
    for a in asked:
        source = LOGIC if a.question.id == LOGIC.id else DIALOGUE
        assert a.question.options == tuple(source.options[i] for i in a.order)
        assert a.question.options[a.question.gold] == source.options[source.gold]
        assert a.fields() == {"order": list(a.order)}
    (alone,) = variants.ask([LOGIC], ["original"], 1, {})
    assert alone.question == LOGIC and alone.order == () and alone.fields() == {}


def test_duplicates_are_flagged() -> None:
    twice = Question("c3-m", "1", "", "?", ("甲", "乙", "甲"), 0)
    assert variants.Asked(twice, "original").fields() == {"duplicate_options": True}
    assert not Question("c3-m", "1", "", "?", ("甲", "乙", "甲"), 1).duplicate_options  # not the right one
    assert all(a.fields()["duplicate_options"] for a in variants.ask([twice], ["original"], 6, {}))


# --- prompts in a window ---------------------------------------------------------------------------------------------


def test_examples_that_do_not_fit_are_left_out_whole() -> None:
    words = tokenizer.load(load.resolve("tiny"))
    assert score.use_format(words, "alpaca") == "alpaca"
    shots = [LOGIC, DIALOGUE]
    lengths = [len(score.build_prompt(words, "alpaca", MIXED, "zh-exam", 10**6, shots[:k]).ids) for k in range(3)]
    for room, count in ((lengths[2], 2), (lengths[2] - 1, 1), (lengths[1] - 1, 0), (lengths[0], 0)):
        found = score.build_prompt(words, "alpaca", MIXED, "zh-exam", room, shots)
        assert (found.shots, found.truncated) == (count, False)
        message = {"role": "user", "content": tasks.prompt_for(MIXED, "zh-exam", examples=shots[:count])}
        assert found.text == prompt.prompt_text(words, [message])
    cut = score.build_prompt(words, "alpaca", MIXED, "zh-exam", lengths[0] - 1, shots)
    assert cut.truncated and cut.shots == 0 and "【材料】" in cut.text


# --- runs ------------------------------------------------------------------------------------------------------------


def evaluate(out: Path, **changes: Any) -> dict[str, Any]:
    arguments = {"model": "tiny", "tasks": ["c3-m"], "data": DEMO, "split": "dev", "protocols": ["choice"], "limit": 2}
    return evaluation.run(out=out, precision="fp32", **(arguments | changes))


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_in_many_ways(tmp_path: Path) -> None:
    names = ["original", "hant-read", "en-exam"]
    results = evaluate(tmp_path / "out", wordings=names, shots=1, permute=2)
    rows, entry = rows_of(tmp_path / "out"), results["tasks"]["c3-m"]
    assert len(rows) == 2 * 3 * 2 and [w["wording"] for w in entry["wordings"]] == names
    assert entry["shots"] == 1 and entry["permute"] == 2 and results["arguments"]["wordings"] == names
    questions = {q.id: q for q in tasks.load("c3-m", DEMO, "dev")}
    (example,) = tasks.examples("c3-m", DEMO, "dev", 1)[""]
    for row in rows:
        question = questions[row["id"]]
        order = row["order"]
        assert question.options[order["ABCD".index(row["gold"])]] == question.options[question.gold]
        assert row["shots"] == 1 and row["correct"] == (row["pred"] == row["gold"])
        turned = variants.Question(
            "c3-m", question.id, question.context, question.question, tuple(question.options[i] for i in order), 0
        )
        assert row["prompt"] == tasks.prompt_for(turned, row["wording"], examples=[example])
    assert evaluate(tmp_path / "out", wordings=names, shots=1, permute=2) == results
    for change in ({"wordings": ["original"]}, {"shots": 2}, {"permute": 1}):
        with pytest.raises(UserError, match=f"another {next(iter(change))}"):
            evaluate(tmp_path / "out", **({"wordings": names, "shots": 1, "permute": 2} | change))


def test_a_run_over_subjects_tells_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text(tmp_path / "d/cmmlu/test/arts.csv", CMMLU)
    text(tmp_path / "d/cmmlu/test/law.csv", ",Question,A,B,C,D,Answer\n0,法？,一,一,三,四,A\n")
    text(tmp_path / "d/cmmlu/dev/arts.csv", CMMLU)
    entry = evaluate(tmp_path / "out", tasks=["cmmlu"], data=tmp_path / "d", split="test", limit=1)["tasks"]["cmmlu"]
    rows = rows_of(tmp_path / "out")
    assert [row["subject"] for row in rows] == ["arts", "law"] and entry["n"] == 2  # the limit is each subject's
    assert "order" not in rows[0] and "shots" not in rows[0] and "duplicate_options" not in rows[0]
    assert rows[1]["duplicate_options"] is True
    assert entry["subjects"] == {row["subject"]: float(row["correct"]) for row in rows}
    assert entry["subjects_mean"] == entry["accuracy"] and entry["left_out"] == {"an empty option": 1}
    said = capsys.readouterr().err
    assert "questions left out, 1 in all: 1 an empty option" in said and "the right option twice: 1;" in said
    with pytest.raises(UserError, match="subject law has no examples"):
        evaluate(tmp_path / "two", tasks=["cmmlu"], data=tmp_path / "d", split="test", shots=1)
    text(tmp_path / "d/cmmlu/test/law.csv", ",Question,A,B,C,D,Answer\n0,法？,一,二,三,四,A\n")
    with pytest.raises(UserError, match="another data"):
        evaluate(tmp_path / "out", tasks=["cmmlu"], data=tmp_path / "d", split="test", limit=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"wordings": ["polite"]}, "wording 'polite'"),
        ({"shots": -1}, "shots: -1"),
        ({"shots": 500}, "choose fewer --shots"),
        ({"split": "train", "shots": 1}, "evaluate another"),
        ({"permute": 0}, "permute: 0"),
        ({"tasks": ["nowhere.yaml"]}, "nowhere.yaml: no such file"),
        ({"tasks": ["cmmlu/arts", "cmmlu/arts"]}, "cmmlu/arts"),
    ],
)
def test_bad_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str) -> None:
    monkeypatch.setattr(load, "load", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(UserError) as e:
        evaluate(tmp_path / "out", **changes)
    assert said in str(e.value) and "\n" not in str(e.value) and not list(tmp_path.iterdir())
