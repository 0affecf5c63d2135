"""Questions that stand in training shards are told; those that don't are left alone."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import yaml

from pandallm import files
from pandallm.config import UserError
from pandallm.data import prepare
from pandallm.evaluate import run
from pandallm.evaluate import seen as module
from pandallm.evaluate.seen import seen
from pandallm.evaluate.tasks import Question

TOWER = (
    "小渔村的码头上立着一座老灯塔，守塔人姓钟，今年七十三岁。每天黄昏他都要爬一百二十级台阶，把灯擦亮再点燃。"
    "村里早就通了电，导航也用卫星，年轻人劝他歇着，他却说，海上总有没带手机的人。"
)
BAMBOO = (
    "竹子开花是一件稀罕事。一片竹林往往几十年不开一次，一旦开了，整片林子便会同时枯死，种子落在地里，来年再长出新苗。"
    "植物学家认为，这种步调一致的习性能让吃种子的动物一时吃不完。"
)
BRIDGE = (
    "石桥建于三百年前，桥洞正好框住对岸的水磨坊。每逢赶集，挑担的、推车的、赶羊的都要从桥上过，"
    "桥面的青石被磨出两道深深的车辙，雨天积了水，像两条并行的小溪。"
)
LONG = "".join(f"第{i}天，船队向南行了{i * 13 % 97}里，记录了{i * 7 % 53}种鱼，夜里听见{i}声钟响。" for i in range(60))
LOST = (
    "他在信里提到那只蓝色的搪瓷杯子，说杯底还留着当年在矿上磕出来的缺口，如今每天早晨仍旧拿它来喝茶，从不肯换一只新的。"
)


def question(key: str, context: str, options: tuple[str, ...] = ("是的", "不是")) -> Question:
    return Question("c3-m", key, context, "文中说的是什么？", options, 0)


QUESTIONS = [
    question("tower-0", TOWER),
    question("tower-1", TOWER, ("灯塔", "渔船", "码头")),  # the same passage: both are told
    question("bamboo", BAMBOO),  # nowhere in the data
    question("bridge", BRIDGE),  # nor this
    question("long", LONG),  # cut into pieces of one row each
    question("punctuated", TOWER.replace("，", ", ").replace("。", ".\n")),  # the same but for its marks
    question("short", "男：好。"),  # too short to tell
    Question("logiqa-v2", "none", "", LOST, ("甲", "乙"), 0),  # no passage: the question itself
]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("seen")
    filler = [f"第{i}个村子种茶，也养蜂，收成有{i * 31 % 17}担，今年修了{i}条路。" * 3 for i in range(30)]
    texts = [*filler[:20], f"前面是别的话。{TOWER}后面也是别的话。", LONG, *filler[20:], f"来信摘抄：{LOST}"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (folder / "web.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    keys = {
        "tokenizer": "tiny", "chat_format": "chatml", "seq_len": 128, "out": str(folder / "shards"), "workers": 1,
        "sources": [{"name": "web", "path": str(folder / "web.jsonl")}],
    }  # fmt: skip
    (folder / "data.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    prepare.run(str(folder / "data.yaml"), [])
    return folder / "shards"


EXPECTED = {
    ("c3-m", "tower-0"), ("c3-m", "tower-1"), ("c3-m", "long"), ("c3-m", "punctuated"), ("logiqa-v2", "none")
}  # fmt: skip


def test_planted_questions_are_told(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert seen(QUESTIONS, planted) == EXPECTED
    said = capsys.readouterr()
    assert "5 of 8 questions were seen in training; 1 are too short to tell" in said.out + said.err
    assert seen(list(reversed(QUESTIONS)), planted) == EXPECTED  # whatever their order
    assert seen(QUESTIONS[3:4], planted) == set() == seen([], planted) == seen(QUESTIONS[6:7], planted)


@pytest.mark.parametrize(("tokens", "chars"), [(200, 50), (128, 1 << 20), (1 << 16, 1)])
def test_batches_and_joints_do_not_matter(
    planted: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, chars: int
) -> None:
    monkeypatch.setattr(module, "MOST_TOKENS", tokens)
    monkeypatch.setattr(module, "BATCH_CHARS", chars)
    found = seen(QUESTIONS, planted)
    # The long passage is told only where enough of its pieces are together.
    assert found - {("c3-m", "long")} == EXPECTED - {("c3-m", "long")}


def test_flags_do_not_depend_on_the_orders_asked(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Any] = []
    monkeypatch.setattr(module, "seen", lambda questions, folder: looked.append(questions) or set())
    turned = [replace(QUESTIONS[1], options=options) for options in permutations(QUESTIONS[1].options)]
    module.flags(turned, [planted])
    module.flags(turned[:1], [planted])
    assert looked[0] == looked[1] == [QUESTIONS[1]]


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="manifest"):
        seen(QUESTIONS, tmp_path)


def test_a_run_flags_what_was_seen(planted: Path, tmp_path: Path) -> None:
    records = [
        [[passage], [{"question": "说的是什么？", "choice": ["甲", "乙"], "answer": "甲"}], key]
        for key, passage in (("tower", TOWER), ("bridge", BRIDGE), ("bamboo", BAMBOO))
    ]
    files.write_json(tmp_path / "c3-m-dev.json", records)
    arguments: Any = ("tiny", ["c3-m"], tmp_path, "dev", ["choice"], None)
    results = run.run(*arguments, tmp_path / "out", precision="fp32", training=[planted])
    lines = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["flagged"] for row in rows] == [True, False, False]
    entry = results["tasks"]["c3-m"]
    assert entry["flagged"] == 1
    assert entry["accuracy_unflagged"] == pytest.approx(sum(row["correct"] for row in rows[1:]) / 2)
    turned = run.run(*arguments, tmp_path / "turned", precision="fp32", training=[planted], permute=2)
    assert turned["tasks"]["c3-m"]["flagged"] == 1
    with pytest.raises(UserError, match="another training"):
        run.run(*arguments, tmp_path / "out", precision="fp32")
    with pytest.raises(UserError, match="manifest"):
        run.run(*arguments, tmp_path / "other", precision="fp32", training=[tmp_path])
    assert not (tmp_path / "other").exists()
