"""Sources: every cause of a drop, instructions drawn by seed, placeholders, scores and groups of records."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from test_layouts import (
    ALPACA,
    BAIKE,
    BILINGUAL,
    EXAM,
    LAYOUTS,
    MESSAGES,
    NEWS,
    SQUAD,
    TRANSLATED,
    WEBTEXT,
    WIKI,
    auto,
    talk,
)

from pandallm.data import read, sources
from pandallm.data.sources import Reading
from pandallm.prompt import Text


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        (WIKI | {"text": " \n"}, "empty_text"),
        (WIKI | {"text": None}, "empty_text"),
        (NEWS | {"content": ""}, "empty_text"),
        ("", "empty_text"),
        (BAIKE | {"answer": ""}, "empty_answer"),
        (BAIKE | {"answer": None}, "empty_answer"),
        (BAIKE | {"title": "", "desc": ""}, "empty_question"),
        (WEBTEXT | {"content": " \r\n"}, "empty_answer"),
        ({"english": "a", "chinese": ""}, "empty_answer"),
        ({"english": "", "chinese": "甲"}, "empty_answer"),
        (EXAM | {"textbox_answer": ""}, "empty_answer"),
        (EXAM | {"textbox_answer": None}, "empty_answer"),
        (ALPACA | {"output": ""}, "empty_answer"),
        (ALPACA | {"instruction": "", "input": ""}, "empty_question"),
        (ALPACA | {"history": [["甲", ""]]}, "empty_answer"),
        (TRANSLATED | {"trans_output": ""}, "empty_answer"),
        ({"inputs": "问", "targets": ""}, "empty_answer"),
        ([{"inputs": "问", "targets": "答"}, {"inputs": "问", "targets": ""}], "empty_answer"),
        ({"messages": []}, "no_answer"),
        ({"messages": [{"role": "user", "content": "问"}]}, "no_answer"),
        ({"messages": [{"role": "system", "content": "问"}]}, "no_answer"),
        ({"messages": [{"role": "assistant", "content": "答"}]}, "roles_out_of_order"),
        ({"messages": [*MESSAGES["messages"], *MESSAGES["messages"][1:]]}, "roles_out_of_order"),
        ({"messages": [*MESSAGES["messages"][:1], *MESSAGES["messages"]]}, "roles_out_of_order"),
        (
            {"messages": [*MESSAGES["messages"], {"role": "system", "content": "晚"}, *MESSAGES["messages"]]},
            "roles_out_of_order",
        ),
        ({"messages": [*MESSAGES["messages"], {"role": "tool", "content": "3"}]}, "unknown_role"),
        ({"messages": [{"role": "user", "content": ""}, *MESSAGES["messages"][1:]]}, "empty_question"),
        ({"conversations": [{"from": "observation", "value": "3"}]}, "unknown_role"),
        ([["段落"], [], "id"], "empty_question"),
        (BILINGUAL | {"zh_output": ""}, "empty_answer"),
        ({"inputs": "问", "targets": "<|endoftext|>"}, "empty_answer"),
        ({"question": "问", "std_answer": ""}, "empty_answer"),
        ({"instruction": "甲", "instances": []}, "no_answer"),
        ({"input": "甲", "expected": {}}, "no_answer"),
        ({"input": "甲", "expected": {"s2t": ""}}, "empty_answer"),
        ({"input": [], "output": []}, "no_answer"),
        ({"author": "某人", "paragraphs": [], "title": "题"}, "empty_text"),
        (SQUAD | {"paragraphs": [{"context": "文", "qas": [{"question": "问", "answers": []}]}]}, "no_answer"),
        (SQUAD | {"paragraphs": [{"context": "", "qas": [{"question": "问", "answers": ["答"]}]}]}, "empty_question"),
        ({"context": "文", "question": "问", "answers": []}, "no_answer"),
        ({"context": "文", "question": "", "answers": ["答"]}, "empty_question"),
        (["Hi.", ""], "empty_answer"),
        (["Hi.", "Hello."], "same_language"),
        (["3", "4"], "same_language"),
        (["这是甲。", "那是乙。"], "same_language"),
        (["这是甲。", "那个组织是WTO。"], "same_language"),
        (["", "yes", "No question."], "empty_question"),
        (["Is it?", "", "No answer."], "empty_answer"),
        ({"text": "<|im_start|>tool\n3<|im_end|>"}, "unknown_role"),
        ({"text": "<s>Human: 问</s>"}, "no_answer"),
        ({"chosen": {"from": "gpt", "value": ""}, "conversations": [{"from": "human", "value": "问"}]}, "empty_answer"),
        (ALPACA | {"output": "我叫{{name}}。"}, "placeholder"),
    ],
)
def test_expected_drops(record: Any, cause: str) -> None:
    assert cause not in sources.BAD
    with pytest.raises(sources.Drop) as e:
        auto(record)
    assert str(e.value) == cause


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        (WIKI | {"text": 3}, "bad_record"),
        (WIKI | {"text": ["文"]}, "bad_record"),
        (NEWS | {"title": 3}, "bad_record"),
        (BAIKE | {"answer": 42}, "bad_record"),
        (ALPACA | {"output": {"text": "答"}}, "bad_record"),
        (ALPACA | {"input": 3.5}, "bad_record"),
        (ALPACA | {"history": ["问答"]}, "bad_record"),  # two characters are no question and answer
        (ALPACA | {"history": [["问"]]}, "bad_record"),
        (ALPACA | {"history": [["问", "答", "问"]]}, "bad_record"),
        (ALPACA | {"history": [["问", 3]]}, "bad_record"),
        (ALPACA | {"history": 3}, "bad_record"),
        (ALPACA | {"system": 3}, "bad_record"),
        ([ALPACA, "甲"], "bad_record"),
        ([{"inputs": "问", "targets": "答"}, {"inputs": "问"}], "bad_record"),
        ({"round_1": {"prompt": "问", "response": "答"}, "round_x": 3}, "bad_record"),
        ({"round_1": {"prompt": "问"}}, "bad_record"),
        ({"round_1": "问"}, "bad_record"),
        ({"chat": {"turn_x": {"Human": "问", "MOSS": "答"}}}, "bad_record"),
        ({"chat": {"turn_1": {"Human": "问"}}}, "bad_record"),
        ({"chat": [1]}, "bad_record"),
        ({"messages": [{"role": None, "content": "问"}]}, "bad_record"),
        ({"messages": [{"role": 3, "content": "问"}]}, "bad_record"),
        ({"messages": ["问", "答"]}, "bad_record"),
        ({"messages": {"role": "user"}}, "bad_record"),
        ({"messages": None}, "bad_record"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "问"}]}]}, "bad_record"),
        ([["段落"], [{"question": "问", "choice": "甲乙", "answer": "乙"}], "id"], "bad_record"),
        ([["段落"], [{"question": "问", "choice": ["甲", "乙"], "answer": "丙"}], "id"], "bad_record"),
        ([["段落"], [{"question": "问", "choice": ["甲"], "answer": "甲"}], "id"], "bad_record"),
        ([[3], [{"question": "问", "choice": ["甲", "乙"], "answer": "甲"}], "id"], "bad_record"),
        ({"text": "文", "question": "问", "options": ["甲", "乙"], "answer": 2}, "bad_record"),
        ({"text": "文", "question": "问", "options": ["甲", "乙"], "answer": None}, "bad_record"),
        ({"text": "文", "question": "问", "options": ["甲", 3], "answer": 0}, "bad_record"),
        (ALPACA | {"instruction": []}, "bad_record"),
        (ALPACA | {"instruction": ["甲", ""]}, "bad_record"),
        (ALPACA | {"instruction": ["甲", 3]}, "bad_record"),
        ({"input": ["甲", "乙"], "output": ["一"]}, "bad_record"),
        ({"input": "甲", "expected": {"s2x": "乙"}}, "bad_record"),
        ({"input": "甲", "expected": {"s2t2s": "乙"}}, "bad_record"),
        ({"author": "某人", "paragraphs": "一行"}, "bad_record"),
        ({"author": "某人", "paragraphs": [["行"]]}, "bad_record"),
        (SQUAD | {"paragraphs": ["一行"]}, "bad_record"),
        ({"translation": {"en": "Hi"}}, "bad_record"),
        ({"translation": "Hi"}, "bad_record"),
        ({"instruction": "甲", "instances": "乙"}, "bad_record"),
        ({"chosen": 3, "prompt": "甲"}, "bad_record"),
        ({"question": "问", "answer": ["答"]}, "bad_record"),
        ({"conversations": {"from": "human", "value": "问"}}, "bad_record"),
        ({"text": ["甲"]}, "bad_record"),
        ({"text": "文", "question": "问", "options": ["甲", "乙"], "answer": float("inf")}, "bad_record"),
        # A question without its options, a text that is asked about: read as less than they are they would teach wrong.
        ({"question": "问", "A": "甲", "B": "乙", "answer": "A"}, "unknown_layout"),
        ({"question": "问", "options": ["甲", "乙"], "answer": "A"}, "unknown_layout"),
        ({"context": "文", "question": "问", "answers": ["甲", "乙"], "label": 1}, "unknown_layout"),
        ({"text": "文", "question": "问"}, "unknown_layout"),
        ({"title": "题", "content": "文", "question": "问"}, "unknown_layout"),
        ({}, "unknown_layout"),
        ([], "unknown_layout"),
        (["甲"], "unknown_layout"),
        (["Hi.", "嗨。", "0.97"], "unknown_layout"),
        (["Hi.", "嗨。", "greeting"], "unknown_layout"),
        (["甲", "乙", "丙", "丁"], "unknown_layout"),
        (["甲", 3], "unknown_layout"),
        ([{"a": 1}], "unknown_layout"),
        (3, "unknown_layout"),
        (None, "unknown_layout"),
        (True, "unknown_layout"),
    ],
)
def test_bad_records(record: Any, cause: str) -> None:
    assert cause in sources.BAD
    with pytest.raises(sources.Drop) as e:
        auto(record)
    assert str(e.value) == cause


def test_a_layout_by_name_is_taken_at_its_word() -> None:
    for name in sources.LAYOUTS:
        for record in (None, 3, "甲", [], {}, ["甲"], {"text": "甲"}):
            try:
                examples = sources.examples_of(record, Reading(name))
            except sources.Drop:
                continue
            assert examples == [Text("甲")]


def test_own_instruction_replaces_the_fixed_one() -> None:
    assert auto(BAIKE, "解答：") == talk("解答：\n茶怎么泡？\n绿茶", "水温八十度。\n一分钟。")
    assert auto(BAIKE, "") == talk("茶怎么泡？\n绿茶", "水温八十度。\n一分钟。")
    assert auto({"english": "Hi", "chinese": "嗨"}, "译成{language}：") == talk("译成中文：\nHi", "嗨") + talk(
        "译成英文：\n嗨", "Hi"
    )


def test_one_of_several_instructions_is_drawn() -> None:
    """The same one whatever came before; each about equally often; another seed draws otherwise."""
    wordings = ("甲", "乙", "丙")
    records = [BAIKE | {"title": f"第{i}问", "qid": f"q{i}"} for i in range(600)]

    def drawn(records: list[Any], seed: int) -> list[str]:
        reading = Reading(instruction=wordings, seed=seed)
        return [sources.examples_of(r, reading)[0].messages[0][1].split("\n")[0] for r in records]

    first = drawn(records, 0)
    assert first == drawn(records[::-1], 0)[::-1] == drawn([dict(reversed(r.items())) for r in records], 0)
    assert all(150 < n < 250 for n in Counter(first).values()) and set(first) == set(wordings)
    assert 300 < sum(a != b for a, b in zip(first, drawn(records, 1), strict=True)) < 500
    assert first == drawn([r | {"qid": "other"} for r in records], 0), "a duplicate with another id stays a duplicate"


def test_one_of_a_records_own_phrasings_is_drawn() -> None:
    """COIG: an instruction may be a list. What is drawn hangs on what the record says and on the seed."""
    wordings = ["改正错字", "找出错字并改正"]
    records = [ALPACA | {"instruction": wordings, "input": f"第{i}句"} for i in range(200)]

    def drawn(seed: int, **extra: Any) -> list[int]:
        found = [sources.examples_of(r | extra, Reading(seed=seed)) for r in records]
        for i, examples in enumerate(found):
            assert examples in [talk(f"{wording}\n第{i}句", "我再见你") for wording in wordings]
        return [wordings.index(examples[0].messages[0][1].split("\n")[0]) for examples in found]

    first = drawn(0)
    assert 60 < sum(first) < 140 and first == drawn(0, id="other") != drawn(1)
    assert auto(ALPACA | {"instruction": ["改正错字"]}) == auto(ALPACA)


def test_placeholders() -> None:
    values = (("name", "小熊"), ("author", "{{name}}的作者"))
    record = ALPACA | {"output": "我叫{{name}}，由{{author}}写成。", "system": "{{name}}"}
    with pytest.raises(sources.Drop, match="placeholder"):
        sources.examples_of(record, Reading(values=values[:1]))
    (filled,) = sources.examples_of(ALPACA | {"output": "我叫{{name}}。"}, Reading(values=values))
    assert filled.messages[-1] == ("assistant", "我叫小熊。")
    (filled,) = sources.examples_of(record, Reading(values=(("name", "小熊"), ("author", "某人"))))
    assert filled.messages[0] == ("system", "小熊") and filled.messages[-1][1] == "我叫小熊，由某人写成。"
    assert sources.examples_of("我叫{{name}}。", Reading(values=values)) == [Text("我叫小熊。")]
    assert auto("一篇讲{{name}}的文章") == [Text("一篇讲{{name}}的文章")], "a raw text keeps its braces"


@pytest.mark.parametrize(
    "text",
    [
        r"$\frac{{abc}}{{def}}$",
        "$x^{{ab}}_{{cd}}$",
        "```html\n<p>{{message}}</p>\n```",
        "写成`{{message}}`即可",
        "```\n{{unclosed}}",
        "{{ user.name }}",
        "{{ name }}",
        "{{d|goto|雪}}",
        "{{{name}}}",
        "${{secrets}}",
        "{{1}}",
        "{{x}}",
        "{{}}",
        "f({{1, 2}, {3}})",
    ],
)
def test_other_braces_are_no_placeholders(text: str) -> None:
    assert auto(ALPACA | {"output": text}) == talk("改正错字\n我在见你", text)


@pytest.mark.parametrize(
    "text", ["{{name}}", "我是{{user_name}}。", "`代码`外的{{name}}", "我叫{{姓名}}", "{{a1}}{{b2}}"]
)
def test_open_placeholders_are_dropped(text: str) -> None:
    for record in (ALPACA | {"output": text}, ALPACA | {"input": text}, {"question": text, "answer": "答"}):
        with pytest.raises(sources.Drop, match="placeholder"):
            auto(record)


def test_scores() -> None:
    """metadata.score, score or star, a number or its digits; a record without one isn't known to be good enough."""
    reading = Reading(min_score=3)
    for good in ({"score": 3}, {"score": "3.0"}, {"star": 4.5}, {"metadata": {"score": " 5 "}, "score": 1}):
        assert sources.examples_of(ALPACA | good, reading) == auto(ALPACA)
    for low in ({"score": 2.9}, {"score": "-1"}, {"metadata": {"score": 2}, "score": 5}, {"star": 0}):
        with pytest.raises(sources.Drop, match="low_score"):
            sources.examples_of(ALPACA | low, reading)
        assert auto(ALPACA | low) == auto(ALPACA)
    for none in (
        {},
        {"score": None},
        {"score": True},
        {"score": "高"},
        {"score": [5]},
        {"score": "nan"},
        {"score": "inf"},
        {"score": 10**400},
        {"metadata": 5},
    ):
        with pytest.raises(sources.Drop, match="no_score"):
            sources.examples_of(ALPACA | none, reading)
    assert sources.examples_of(WEBTEXT, reading) == auto(WEBTEXT)
    with pytest.raises(sources.Drop, match="no_score"):
        sources.examples_of("一篇文章。", reading)
    assert not {"low_score", "no_score", "placeholder", "needs_tools", "same_language"} & set(sources.BAD)


def test_groups() -> None:
    reading = Reading(by="task")
    assert sources.group_of({"inputs": "问", "targets": "答", "task": " nli "}, reading) == "nli"
    assert sources.group_of({"task": 3}, reading) == "3"
    for record in ({}, {"task": None}, {"task": " "}, {"task": ["nli"]}, {"task": 10**5000}, [], "nli", None, 3):
        with pytest.raises(sources.Drop, match="no_by_key"):
            sources.group_of(record, reading)


def test_causes_of_reading_count_as_bad() -> None:
    assert set(read.CAUSES) | {"bad_record", "unknown_layout", "no_by_key"} == set(sources.BAD)


JUNK = (None, True, 0, -1, 1e400, 10**400, "", "甲", "{{", "A" * 100, [], [[]], {}, {"a": {}}, ["甲"], [["甲", "乙"]])
JUNK += ("\ud800", b"bytes", ("甲",), [None] * 3, {"role": None}, [{"from": [], "value": {}}], "turn_x", {"text": [3]})


def test_fuzzed_records() -> None:
    """Valid records of each layout with anything put anywhere, read as any layout: examples or a Drop, no other error.
    And what comes out is whole: talks that alternate and end in an answer, no text empty."""
    rng = random.Random(2026)
    kept = 0
    for name, (record, _) in LAYOUTS.items():
        for _ in range(150):
            wounded = _wounded(rng, record)
            layout = rng.choice(("auto", name, name, rng.choice(list(sources.LAYOUTS))))
            reading = Reading(
                layout, *rng.choice(((), (("甲", "乙"), 1), ((), 0, 1.0), ((), 0, None, (("name", "x"),))))
            )
            try:
                examples = sources.examples_of(wounded, reading)
            except sources.Drop:
                continue
            kept += 1
            assert examples and all(whole(example) for example in examples)
    assert kept > 150 * len(LAYOUTS) // 10


def _wounded(rng: random.Random, value: Any) -> Any:
    """A copy in which one thing, at any depth, is other, gone, or there twice."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return value | {key if rng.random() < 0.9 else "turn_x": _wounded(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(([], [_wounded(rng, value[at])], value[at:] * 2)) + value[at + 1 :]
    return rng.choice(JUNK)


def whole(example: Any) -> bool:
    if isinstance(example, Text):
        return bool(example.text)
    roles = [role for role, _ in example.messages]
    roles = roles[1:] if roles[0] == "system" else roles
    alternate = roles == ["user", "assistant"] * (len(roles) // 2)
    return bool(roles) and alternate and all(text for _, text in example.messages)


@pytest.mark.parametrize("change", [{"answer": 4}, {"answer": "x"}, {"options": ["a"]}, {"options": [1, 2, 3, 4]}])
def test_a_broken_question_is_dropped(change: dict[str, Any]) -> None:
    record = {"text": "文", "question": "问", "options": ["甲", "乙", "丙", "丁"], "answer": 0, **change}
    with pytest.raises(sources.Drop, match="bad_record"):
        auto(record)
