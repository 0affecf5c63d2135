"""Records of every corpus of the recipe, and the common instruction layouts: the exact messages of each, and every
cause of a drop. With real data at hand, every file of the corpora themselves."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from pandallm import prompt, tokenizer
from pandallm.data import read, sources
from pandallm.model.load import resolve
from pandallm.prompt import Dialogue, Text


def talk(*turns: str, system: str = "") -> list[Dialogue]:
    """A dialogue: questions and answers in turn."""
    messages = [("system", system)] if system else []
    messages += [(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)]
    return [Dialogue(tuple(messages))]


def auto(record: Any, *instruction: str) -> list[Any]:
    return sources.examples_of(record, "auto", instruction, seed=0)


WIKI = {
    "id": "7",
    "url": "https://zh.wikipedia.org/?curid=7",
    "title": "热干面",
    "text": "热干面\n\n一种面食。\r\n发源于武汉。 ",
}
NEWS = {
    "news_id": "n1",
    "keywords": "天气",
    "title": "今日多云",
    "desc": "多云。",
    "source": "某报",
    "time": "03-15 09:00",
    "content": "气象台说，今日多云。",
}
BAIKE = {
    "qid": "qid_1",
    "category": "生活-饮食",
    "title": "茶怎么泡？",
    "desc": "绿茶",
    "answer": "水温八十度。\r一分钟。",
}
WEBTEXT = {
    "qid": 1,
    "title": "周末去哪儿？",
    "desc": "带孩子",
    "topic": "出行",
    "star": 3,
    "content": "去植物园。",
    "answer_id": 2,
    "answerer_tags": "园丁",
}
EXAM = {
    "subject": "地理",
    "textbox_q_instruction": "选出正确的一项。",
    "textbox_q_context": "长江流入东海。",
    "textbox_question": "长江流入哪里？A. 东海 B. 南海",
    "textbox_answer": "A",
    "textbox_answer_analysis": "材料里写明了。",
}
ALPACA = {"instruction": "改正错字", "input": "我在见你", "output": "我再见你"}
TRANSLATED = {"trans_instruction": "说个颜色", "trans_input": "暖色", "trans_output": "红", **ALPACA}
MOSS = {
    "conversation_id": "1",
    "meta_instruction": "You are an AI assistant whose name is MOSS.",
    "num_turns": 2,
    "chat": {
        "turn_10": {"Human": "<|Human|>: 再见<eoh>\n", "Inner Thoughts": "", "MOSS": "<|MOSS|>：再会。<eom>\n"},
        "turn_2": {"Human": "<|Human|>: 几点了<eoh>\n", "Inner Thoughts": "", "MOSS": "<|MOSS|>: 三点。<eom>\n"},
    },
}
SHAREGPT = {
    "id": "1",
    "conversations": [
        {"from": "system", "value": "少说话。"},
        {"from": "human", "value": "问"},
        {"from": "gpt", "value": "答"},
        {"from": "Human", "value": "再问"},
        {"from": "GPT", "value": "再答"},
        {"from": "human", "value": "没人回答的"},
    ],
}
MESSAGES = {"messages": [{"role": "user", "content": " 问 "}, {"role": "assistant", "content": "答\n"}]}

QUESTION = (  # as evaluation asks it
    "阅读下面的文章并从选项中选择的答案回答问题：\n\nContext:\n{text}\n\nQuestion:\n{question}\n\n"
    "Options:\n{options}\n\n本题的答案是："
)

# layout -> (a record, its examples)
LAYOUTS: dict[str, tuple[Any, list[Any]]] = {
    "wiki": (WIKI, [Text("热干面\n\n一种面食。\n发源于武汉。")]),
    "news": (NEWS, [Text("今日多云\n\n气象台说，今日多云。")]),
    "webtext": (WEBTEXT, talk("请回答下面网友提出的问题。\n周末去哪儿？\n带孩子", "去植物园。")),
    "baike": (BAIKE, talk("请回答下面的百科问题。\n茶怎么泡？\n绿茶", "水温八十度。\n一分钟。")),
    "translation": (
        {"english": "Good morning.", "chinese": "早上好。"},
        talk("请把下面的内容翻译成中文。\nGood morning.", "早上好。")
        + talk("请把下面的内容翻译成英文。\n早上好。", "Good morning."),
    ),
    "exam": (
        EXAM,
        talk("选出正确的一项。\n长江流入东海。\n长江流入哪里？A. 东海 B. 南海", "A\n材料里写明了。"),
    ),
    "translated": (TRANSLATED, talk("说个颜色\n暖色", "红")),
    "alpaca": (ALPACA, talk("改正错字\n我在见你", "我再见你")),
    "unified": ({"inputs": "问", "targets": "答", "task": "t"}, talk("问", "答")),
    "moss": (MOSS, talk("几点了", "三点。", "再见", "再会。")),
    "sharegpt": (SHAREGPT, talk("问", "答", "再问", "再答", system="少说话。")),
    "messages": (MESSAGES, talk("问", "答")),
    "article": ({"title": "题", "content": "文", "dataType": "百科"}, [Text("题\n\n文")]),
    "json_text": ({"text": "English text.", "timestamp": "2019", "url": "u"}, [Text("English text.")]),
    "alpaca_turns": (
        [ALPACA, {"instruction": "再来", "input": "", "output": "好"}],
        talk("改正错字\n我在见你", "我再见你", "再来", "好"),
    ),
    "rounds": (
        {
            "round_10": {"prompt": "丙", "response": "三"},
            "round_2": {"prompt": "乙", "response": "二"},
            "round_1": {"prompt": "甲", "response": "一"},
        },
        talk("甲", "一", "乙", "二", "丙", "三"),
    ),
    "c3": (
        [
            ["男：走吧。", "女：好。"],
            [{"question": "女的去吗？", "choice": ["去", "不去"], "answer": "不去"}] * 2,
            "id",
        ],
        talk(QUESTION.format(text="男：走吧。\n女：好。", options="A: 去\nB: 不去", question="女的去吗？"), "B") * 2,
    ),
    "logiqa": (
        {"example_id": 1, "text": "文。", "question": "问？", "options": ["甲", "乙", "丙", "丁"], "answer": 3},
        talk(QUESTION.format(text="文。", options="A: 甲\nB: 乙\nC: 丙\nD: 丁", question="问？"), "D"),
    ),
    "text": ("一篇文章。\r\n第二行。\n", [Text("一篇文章。\n第二行。")]),
}


def test_every_layout_is_here() -> None:
    assert LAYOUTS.keys() == sources.LAYOUTS.keys()


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str) -> None:
    record, examples = LAYOUTS[name]
    assert sources.recognise(record) == name
    assert auto(record) == examples
    assert sources.examples_of(record, name, (), seed=1) == examples


def test_unified_list_is_a_dialogue() -> None:
    record = [{"inputs": "问", "targets": "答"}, {"inputs": "再问", "targets": "再答"}]
    assert sources.recognise(record) == "unified"
    assert auto(record) == talk("问", "答", "再问", "再答")


def test_alpaca_with_history_and_system() -> None:
    record = ALPACA | {"history": [["甲", "一\r\n"], ["乙", "二"]], "system": "你是老师。"}
    assert auto(record) == talk("甲", "一", "乙", "二", "改正错字\n我在见你", "我再见你", system="你是老师。")
    for nothing in (None, [], ""):
        assert auto(ALPACA | {"history": nothing, "system": nothing or None, "input": None}) == talk(
            "改正错字", "我再见你"
        )


def test_titles_are_not_said_twice() -> None:
    assert auto(NEWS | {"content": "今日多云，气象台说。"}) == [Text("今日多云，气象台说。")]
    assert auto(NEWS | {"title": ""}) == [Text("气象台说，今日多云。")]
    assert auto(BAIKE | {"desc": " 茶怎么泡？"}) == talk("请回答下面的百科问题。\n茶怎么泡？", "水温八十度。\n一分钟。")
    assert auto(BAIKE | {"desc": None}) == auto(BAIKE | {"desc": ""}) == auto({**BAIKE, "desc": BAIKE["title"]})


def test_an_empty_system_text_is_none() -> None:
    said = [{"role": "system", "content": " "}, *MESSAGES["messages"]]
    assert auto({"messages": said}) == talk("问", "答")


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
        ({"question": "问", "answer": "答"}, "unknown_layout"),
        ({}, "unknown_layout"),
        ([], "unknown_layout"),
        (["甲"], "unknown_layout"),
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
                examples = sources.examples_of(record, name, (), seed=0)
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
        return [sources.examples_of(r, "auto", wordings, seed)[0].messages[0][1].split("\n")[0] for r in records]

    first = drawn(records, 0)
    assert first == drawn(records[::-1], 0)[::-1] == drawn([dict(reversed(r.items())) for r in records], 0)
    assert all(150 < n < 250 for n in Counter(first).values()) and set(first) == set(wordings)
    assert 300 < sum(a != b for a, b in zip(first, drawn(records, 1), strict=True)) < 500
    assert first == drawn([r | {"qid": "other"} for r in records], 0), "a duplicate with another id stays a duplicate"


REAL = [  # file or folder, records, drops, layout; counts of the data's README and MANIFEST
    ("wiki2019zh/AA/wiki_00", 64, {}, "wiki"),
    ("wiki2019zh/relaid_cmrc2018.jsonl", 1104, {}, "wiki"),
    ("news2016zh/news2016zh_real_1.json", 1, {}, "news"),
    ("news2016zh/news2016zh_relaid_xwlb.json", 2458, {}, "news"),
    ("baike2018qa/baike_qa_real_4.json", 4, {}, "baike"),
    ("baike2018qa/baike_qa_relaid_toyhom.json", 3000, {}, "baike"),
    ("webtext2019zh/web_text_zh_real_4.json", 4, {}, "webtext"),
    ("webtext2019zh/web_text_zh_relaid_cluecorpussmall.json", 268, {}, "webtext"),
    ("translation2019zh/translation2019zh_valid.real_500.json", 500, {}, "translation"),
    ("translation2019zh/translation2019zh_real_readme_6.json", 6, {}, "translation"),
    ("translation2019zh/translation2019zh_relaid_tatoeba_5000.json", 5000, {}, "translation"),
    ("coig_schema/exam_instructions.jsonl", 2811, {}, "exam"),
    ("coig_schema/human_value_alignment_instructions_part1.json", 92, {}, "alpaca"),
    ("coig_schema/human_value_alignment_instructions_part2.json", 600, {}, "exam"),
    ("coig_schema/leetcode_instructions.jsonl", 48, {}, "alpaca"),
    ("coig_schema/translated_instructions.jsonl", 2000, {"empty_answer": 2}, "translated"),
    ("coig_schema/counterfactural_correction_multi_round_chat", 150, {}, "rounds"),
    ("instruct/alpaca_zh_carbonz0_part-00.json", 10021, {"empty_answer": 6}, "alpaca"),
    ("instruct/moss_original_layout", 20, {}, "moss"),
]


@pytest.mark.parametrize(("name", "count", "drops", "layout"), REAL)
def test_real_data(real_data: Path, name: str, count: int, drops: dict[str, int], layout: str) -> None:
    items = [item for path in read.files_of(real_data / name, name) for item in read.records(path)]
    assert len(items) == count
    assert {sources.recognise(item.value) for item in items if isinstance(item, read.Record)} == {layout}
    dropped: Counter[str] = Counter()
    examples = []
    for item in items:
        assert isinstance(item, read.Record), item
        try:
            examples.append(auto(item.value))
        except sources.Drop as e:
            dropped[str(e)] += 1
    assert dropped == drops
    assert {len(some) for some in examples} == {2 if layout == "translation" else 1}
    _check_masks([example for some in examples[:: max(1, len(examples) // 25)] for example in some])


def _check_masks(examples: list[Any]) -> None:
    """What is trained, decoded, is each answer and its end mark; all of a raw text."""
    tok = tokenizer.load(resolve("tiny"))
    prompt.set_format(tok, "chatml")
    for example, rendered in zip(examples, prompt.render(tok, examples), strict=True):
        pairs = list(zip(rendered.loss_mask, rendered.input_ids, strict=True))
        if isinstance(example, Text):
            assert tok.decode(rendered.input_ids) == example.text + tok.eos_token
            assert [trained for trained, _ in pairs] == [False] + [True] * (len(pairs) - 1)
            continue
        spans = [tok.decode([i for _, i in group]) for trained, group in groupby(pairs, lambda p: p[0]) if trained]
        assert spans == [text + "<|im_end|>" for role, text in example.messages if role == "assistant"]


def test_questions_are_asked_as_in_evaluation() -> None:
    """A model trained on a question file reads, letter for letter, what `panda eval` asks of the same file."""
    from pandallm import demo
    from pandallm.evaluate import tasks

    for task, path in (("c3-m", "c3/c3-m-train.json"), ("logiqa-v2", "logiqa_v2/train_zh.txt")):
        trained = [
            example.messages
            for record in read.records(demo.ROOT / "eval" / path)
            for example in sources.examples_of(record.value, "auto", [], 0)
        ]
        asked = tasks.load(task, demo.ROOT / "eval", "train")
        wanted = [(("user", tasks.prompt_for(q, "original")), ("assistant", "ABCD"[q.gold])) for q in asked]
        assert trained == wanted


@pytest.mark.parametrize("change", [{"answer": 4}, {"answer": "x"}, {"options": ["a"]}, {"options": [1, 2, 3, 4]}])
def test_a_broken_question_is_dropped(change: dict[str, Any]) -> None:
    record = {"text": "文", "question": "问", "options": ["甲", "乙", "丙", "丁"], "answer": 0, **change}
    with pytest.raises(sources.Drop, match="bad_record"):
        auto(record)
