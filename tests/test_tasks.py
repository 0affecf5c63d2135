"""evaluate/tasks, layouts: question files read or refused, the authors' and a user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pandallm import files
from pandallm.config import UserError
from pandallm.evaluate import tasks
from pandallm.evaluate.tasks import Question


def lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


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
        ('"Question"x,A,B,C,D,Answer\n', ":1: not valid CSV"),
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
    lines(tmp_path / "data/v1/gaokao-physics.jsonl", [agieval(), agieval(options=["(A)一", "(B) ", "(C)三"])])
    assert tasks.read("agieval/gaokao-physics", tmp_path, "test").left_out == {"an empty option": 1}
    (tmp_path / "data/v1/gaokao-physics.jsonl").unlink()
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
        ({"file": "a\0b"}, "is no file's name"),
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


def test_real_files(real_data: Path) -> None:
    for task, n, twice in (("c3-d", 1825, 0), ("c3-m", 1991, 0), ("logiqa-v2", 1593, 4)):
        questions, left_out = tasks.read(task, real_data, "dev")
        assert len(questions) == n and not left_out
        assert sum(q.duplicate_options for q in questions) == twice
