"""evaluate/tasks, layouts, variants: question files read or refused, wordings, orders and examples, fetched files."""

from __future__ import annotations

import email.message
import hashlib
import io
import json
import re
import urllib.response
from collections import Counter
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import yaml

from pandallm import demo, files, prompt, tokenizer
from pandallm.config import UserError
from pandallm.data.questions import WORDINGS, letter
from pandallm.evaluate import fetch, score, tasks, variants
from pandallm.evaluate import run as evaluation
from pandallm.evaluate.tasks import Question
from pandallm.model import load

DEMO = demo.ROOT / "eval"
GOLDEN = Path(__file__).parent / "golden"

DIALOGUE = Question("c3-d", "1-0", "男：下雨了。\n女：带伞吧。", "他们要做什么？", ("带伞", "等车", "回家"), 0)
MIXED = Question("c3-m", "2-1", "湖边有一家{小}店。", "店在湖边。", ("正确", "错误"), 0)
LOGIC = Question("logiqa-v2", "7", "凡是甲都是乙。", "可以推出哪一项？", ("甲是乙", "乙是甲", "没有甲", "没有乙"), 2)
FACT = Question("cmmlu", "x/0", "", "水的化学式是？", ("H2O", "CO2", "O2", "NaCl"), 0, "x")


def lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


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


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_orders(n: int) -> None:
    question = Question("t", "1", "", "?", tuple("甲乙丙丁戊己庚"[:n]), n - 1)
    identity = tuple(range(n))
    assert variants.orders(question, 1) == [identity]
    found = variants.orders(question, 6)
    assert found[0] == identity and found == variants.orders(question, 6) and len(found) == 6
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


# --- files -----------------------------------------------------------------------------------------------------------

CMMLU = ',Question,A,B,C,D,Answer\n0,最大的海？,一,二,三,四,B\n1,"引号，\n换行",甲,乙,丙,丁,D\n2,空,甲,,丙,丁,A\n'
CEVAL = "id,question,A,B,C,D,answer\n0,会计？,一,二,三,四,C\n"
CEVAL_DEV = "id,question,A,B,C,D,answer,explanation\n0,会计？,一,二,三,四,C,因为\n1,税？,一,二,三,四,A,\n"


def test_cmmlu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text(tmp_path / "cmmlu/test/arts.csv", CMMLU)
    text(tmp_path / "cmmlu/test/anatomy.csv", ",Question,A,B,C,D,Answer\n0,心？,一,二,三,四,A\n")
    questions, left_out = tasks.read("cmmlu", tmp_path, "test")
    assert [q.id for q in questions] == ["anatomy/0", "arts/0", "arts/1"] and left_out == {"an empty option": 1}
    assert questions[1] == Question("cmmlu", "arts/0", "", "最大的海？", ("一", "二", "三", "四"), 1, "arts")
    assert questions[2].question == "引号，\n换行" and questions[2].gold == 3
    assert "2 of 67 subjects" in capsys.readouterr().err
    (only,) = tasks.load("cmmlu/anatomy", tmp_path, "test")
    assert only.task == "cmmlu/anatomy" and only.subject == "anatomy"
    with pytest.raises(UserError, match="did you mean 'anatomy'"):
        tasks.load("cmmlu/anatmy", tmp_path, "test")
    with pytest.raises(UserError, match="split 'train': unknown; cmmlu has dev, test"):
        tasks.load("cmmlu", tmp_path, "train")
    with pytest.raises(UserError, match="c3-m has no subjects"):
        tasks.load("c3-m/anatomy", tmp_path, "test")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (",Question,A,B,C,D\n0,?,1,2,3,4\n", ":1: the column 'Answer'"),
        (CMMLU + "3,?,一,二,三,四,E\n", ":6: the answer 'E'"),
        (CMMLU + "3,?,一,二,三,四,\n", ":6: the answer ''"),
        (CMMLU + "3,?,一,二\n", ":6: the line has not as many"),
        (CMMLU + "3,?,一,二,三,四,A,A\n", ":6: the line has not as many"),
        (CMMLU + '3,"?,一,二,三,四,A\n', ":6: not valid CSV"),
        (",Question,A,B,C,D,Answer\n", "has no questions"),
    ],
)
def test_bad_csv(tmp_path: Path, bad: str, said: str) -> None:
    text(tmp_path / "test/arts.csv", bad)
    with pytest.raises(UserError) as e:
        tasks.load("cmmlu/arts", tmp_path, "test")
    assert said in str(e.value) and "\n" not in str(e.value)


def test_ceval(tmp_path: Path) -> None:
    text(tmp_path / "val/accountant_val.csv", CEVAL)
    text(tmp_path / "dev/accountant_dev.csv", CEVAL_DEV)
    (question,) = tasks.load("ceval/accountant", tmp_path, "val")
    assert question.id == "accountant/0" and question.gold == 2
    assert [q.gold for q in tasks.examples("ceval", tmp_path, "val", 2)["accountant"]] == [2, 0]
    with pytest.raises(UserError, match="'test' are not published; choose --split val"):
        tasks.load("ceval", tmp_path, "test")
    with pytest.raises(UserError, match="accountant: the split 'dev' has 2 questions"):
        tasks.examples("ceval", tmp_path, "val", 3)
    with pytest.raises(UserError, match="evaluate another"):
        tasks.examples("ceval", tmp_path, "dev", 1)


def agieval(**changes: Any) -> dict[str, Any]:
    entry = {"passage": None, "question": "?", "options": ["(A)一", "(B) (A)二", "三"], "label": "B", "answer": None}
    return entry | changes


def test_agieval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    law = [agieval(label=["A"]), agieval(label=["A", "B"]), agieval(label="AB"), agieval(label=None, answer="7")]
    lines(tmp_path / "data/v1/jec-qa-kd.jsonl", [*law, agieval(options=["(A)一(B)二"])])
    lines(tmp_path / "data/v1/logiqa-zh.jsonl", [agieval(passage="文")])
    lines(tmp_path / "data/v1/lsat-ar.jsonl", [{"not": "read"}])
    questions, left_out = tasks.read("agieval", tmp_path, "test")
    assert left_out == {"several answers": 2, "no answer": 1, "options not found": 1}
    options = ("一", "(A)二", "三")
    assert questions[0] == Question("agieval", "jec-qa-kd/1", "", "?", options, 0, "jec-qa-kd")
    assert questions[1] == Question("agieval", "logiqa-zh/1", "文", "?", options, 1, "logiqa-zh")
    said = capsys.readouterr().err
    assert "2 of 10 subjects" in said and "gaokao-physics" in said
    with pytest.raises(UserError, match="leave --shots out"):
        tasks.examples("agieval", tmp_path, "test", 1)
    lines(tmp_path / "data/v1/logiqa-zh.jsonl", [agieval(label="D")])
    with pytest.raises(UserError, match=r"logiqa-zh.jsonl:1: the answer 'D'"):
        tasks.load("agieval", tmp_path, "test")
    lines(tmp_path / "data/v1/logiqa-zh.jsonl", law[1:])
    with pytest.raises(UserError, match="no question can be asked; left out: 2 several answers, 1 no answer"):
        tasks.load("agieval/logiqa-zh", tmp_path, "test")


def test_gaokao(tmp_path: Path) -> None:
    def entry(question: str, *answer: str) -> dict[str, Any]:
        return {"year": "2020", "question": question, "answer": list(answer), "index": 0}

    good = entry("1．（6分）下列 A．B 两项中，正确的是（　　） \nA．甲   \nB．乙  C．丙\n D．丁 \n", "C")
    table_ = entry("如表\nA 检测\nB 观察\nA．A B．B C．C D．D\n", "B")
    several = entry("1．甲 A．一 B．二 C．三 D．四", "AB")
    three = entry("A．一 B．二 C．三", "A")
    files.write_json(
        tmp_path / "Data/Objective_Questions/2010-2022_Biology_MCQs.json", {"example": [good, table_, several, three]}
    )
    renamed = {"standard_answer" if k == "answer" else k: v for k, v in good.items()}
    files.write_json(tmp_path / "Data/Objective_Questions/2010-2022_Math_I_MCQs.json", {"example": [renamed]})
    files.write_json(tmp_path / "Data/Objective_Questions/model_2010-2022_Biology_MCQs.json", {})
    questions, left_out = tasks.read("gaokao", tmp_path, "test")
    assert left_out == {"several answers": 1, "options not found": 1}
    asked = "1．（6分）下列 A．B 两项中，正确的是（　　）"
    assert questions[0] == Question("gaokao", "biology/0", "", asked, ("甲", "乙", "丙", "丁"), 2, "biology")
    assert questions[1].options == ("A", "B", "C", "D") and questions[1].gold == 1
    assert questions[2].id == "math_i/0" and len(questions) == 3
    files.write_json(tmp_path / "Data/Objective_Questions/2010-2022_Math_I_MCQs.json", {"example": [entry("?", "E")]})
    assert tasks.read("gaokao/biology", tmp_path, "test").questions[0].task == "gaokao/biology"


def test_logiqa_in_english(tmp_path: Path) -> None:
    entry = {"id": 10471, "answer": 0, "text": "T", "question": "Q", "options": ["a", "b"], "type": {"x": True}}
    lines(tmp_path / "logiqa_v2/dev.txt", [entry, entry])
    found = tasks.load("logiqa-v2-en", tmp_path, "dev")
    assert [q.id for q in found] == ["1", "2"] and found[0].context == "T" and found[0].gold == 0


# --- a user's own ----------------------------------------------------------------------------------------------------


def own_task(folder: Path, **keys: Any) -> str:
    lines(folder / "mine.jsonl", [{"q": "问？", "text": "文", "o": ["甲", "乙"], "a": "B"}])
    spec = {"name": "mine", "file": "mine.jsonl", "context": "text", "question": "q", "options": "o", "answer": "a"}
    return str(text(folder / "mine.yaml", yaml.safe_dump(spec | keys, allow_unicode=True)))


def test_a_users_task(tmp_path: Path) -> None:
    path = own_task(tmp_path, version=3)
    assert tasks.load(path, None, "test") == [Question("mine", "1", "文", "问？", ("甲", "乙"), 1)]
    assert tasks.get(path).version == 3
    lines(tmp_path / "mine.jsonl", [{"q": "问？", "A": "甲", "B": "乙", "C": "丙", "a": 2}, {}])
    path = own_task(tmp_path, options=["A", "B", "C"], context=None, answer_is="index")
    lines(tmp_path / "mine.jsonl", [{"q": "问？", "A": "甲", "B": "乙", "C": "丙", "a": 2}])
    assert tasks.load(path, None, "dev") == [Question("mine", "1", "", "问？", ("甲", "乙", "丙"), 2)]
    path = own_task(tmp_path, answer_is="text")
    lines(tmp_path / "mine.jsonl", [{"q": "问？", "text": "", "o": ["甲", "乙", "甲"], "a": "甲"}])
    assert tasks.load(path, None, "test")[0].gold == 0
    with pytest.raises(UserError, match="leave --shots out"):
        tasks.examples(path, None, "test", 1)
    lines(tmp_path / "train.jsonl", [{"q": "例", "text": "文", "o": ["甲", "乙"], "a": "A"}])
    path = own_task(tmp_path, train_file="train.jsonl")
    assert tasks.examples(path, None, "test", 1)[""][0].question == "例"
    with pytest.raises(UserError, match="evaluate another"):
        tasks.examples(own_task(tmp_path, train_file="mine.jsonl"), None, "test", 1)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"file": "../mine.jsonl"}, "lies outside the folder"),
        ({"file": "/etc/passwd"}, "lies outside the folder"),
        ({"file": "link.jsonl"}, "lies outside the folder"),
        ({"train_file": "../x"}, "lies outside the folder"),
        ({"file": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"name": "c3-m"}, "choose another"),
        ({"name": "a/b"}, "name"),
        ({"nmae": "x"}, "did you mean 'name'"),
        ({"answer": "x"}, "mine.jsonl:1: the key 'x' is missing"),
        ({"answer_is": "index"}, "mine.jsonl:1: the answer 'B'"),
        ({"answer_is": "text"}, "mine.jsonl:1: the answer 'B'"),
        ({"options": "text"}, "mine.jsonl:1: the answer 'B'"),
        ({"context": "nothing"}, "the key 'nothing'"),
    ],
)
def test_a_bad_task_of_a_users(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    folder = tmp_path / "folder"
    path = own_task(folder, **keys)
    (tmp_path / "mine.jsonl").write_text("{}")
    (folder / "link.jsonl").symlink_to(tmp_path / "mine.jsonl")
    with pytest.raises(UserError) as e:
        tasks.load(path, None, "test")
    assert said in str(e.value) and "\n" not in str(e.value)


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
    assert "1 questions left out: 1 an empty option" in said and "1 questions have the right option twice" in said
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


def test_real_files(real_data: Path) -> None:
    for task, n, twice in (("c3-d", 1825, 0), ("c3-m", 1991, 0), ("logiqa-v2", 1593, 4)):
        questions, left_out = tasks.read(task, real_data, "dev")
        assert len(questions) == n and not left_out
        assert sum(q.duplicate_options for q in questions) == twice


# --- fetched files ---------------------------------------------------------------------------------------------------


def remote(tmp_path: Path, name: str, content: bytes, sha256: str | None = None) -> fetch.Remote:
    source = tmp_path / "theirs" / name
    source.parent.mkdir(exist_ok=True)
    source.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest() if sha256 is None else sha256
    return fetch.Remote(source.as_uri(), f"c3/{name}", digest)


def test_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    known, unknown = remote(tmp_path, "a.json", b"known"), remote(tmp_path, "b.json", b"unknown", "")
    monkeypatch.setitem(fetch.FILES, "c3-d", (known, unknown))
    out = tmp_path / "out"
    found = fetch.run("c3-d", out)
    assert (out / "c3/a.json").read_bytes() == b"known" and (out / "c3/b.json").read_bytes() == b"unknown"
    assert [(f["bytes"], f["checked"]) for f in found["files"]] == [(5, True), (7, False)]
    said = capsys.readouterr().err
    assert "non-commercial" in said and "none on record" in said and found["files"][1]["sha256"] in said
    (tmp_path / "theirs" / "a.json").unlink()
    assert fetch.run("c3-d", out) == found  # there already
    assert "is there already" in capsys.readouterr().err
    (out / "c3/a.json").write_bytes(b"mine")
    with pytest.raises(UserError, match="move it away"):
        fetch.run("c3-d", out)
    assert (out / "c3/a.json").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda p: remote(p, "a.json", b"x", "0" * 64), "not the file on record"),
        (lambda p: fetch.Remote((p / "nowhere").as_uri(), "c3/a.json"), "can't be fetched"),
    ],
)
def test_a_bad_fetch_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Callable[[Path], fetch.Remote], said: str
) -> None:
    monkeypatch.setitem(fetch.FILES, "c3-d", (made(tmp_path),))
    with pytest.raises(UserError) as e:
        fetch.run("c3-d", tmp_path / "out")
    assert said in str(e.value) and "\n" not in str(e.value)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_short_answer_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = remote(tmp_path, "a.json", b"whole", "")
    monkeypatch.setitem(fetch.FILES, "c3-d", (made,))
    headers = email.message.Message()
    headers["Content-Length"] = "9"
    answer = urllib.response.addinfourl(io.BytesIO(b"whole"), headers, made.url)
    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda *a, **k: answer)
    with pytest.raises(UserError, match="5 bytes came, 9 were announced"):
        fetch.run("c3-d", tmp_path / "out")
    assert not (tmp_path / "out/c3/a.json").exists()


def test_what_is_not_fetched(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not fetched by panda.*github.com/haonan-li/CMMLU"):
        fetch.run("cmmlu", tmp_path)
    with pytest.raises(UserError, match="did you mean 'c3-d'"):
        fetch.run("c3d", tmp_path)


def test_fetched_files_are_where_tasks_look() -> None:
    for task, remotes in fetch.FILES.items():
        places = {
            pattern.format(split=split) for pattern in tasks.TASKS[task].files for split in ("train", "dev", "test")
        }
        assert {r.path for r in remotes} <= places
        assert all(re.search(r"/[0-9a-f]{40}/", r.url) for r in remotes)


def test_hashes_on_record_are_those_of_the_real_files(real_data: Path) -> None:
    for path, digest in fetch._HASHES.items():
        assert hashlib.sha256((real_data / path).read_bytes()).hexdigest() == digest
