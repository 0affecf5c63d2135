"""Records of every corpus of the recipe, and the common instruction layouts: the exact messages of each, and every
cause of a drop. With real data at hand, every file of the corpora themselves."""

from __future__ import annotations

import random
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from pandallm import prompt, tokenizer
from pandallm.data import layouts, read, sources
from pandallm.data.sources import Reading
from pandallm.model.names import resolve
from pandallm.prompt import Dialogue, Text


def talk(*turns: str, system: str = "") -> list[Dialogue]:
    """A dialogue: questions and answers in turn."""
    messages = [("system", system)] if system else []
    messages += [(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)]
    return [Dialogue(tuple(messages))]


def auto(record: Any, *instruction: str) -> list[Any]:
    return sources.examples_of(record, Reading(instruction=instruction))


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

BILINGUAL = {
    **{"en_instruction": "Name a colour", "en_input": "", "en_output": "Red"},
    **{"zh_instruction": "说个颜色", "zh_input": "暖色", "zh_output": "红"},
    "metadata": {"translated": True, "score": "4"},
}
SQUAD = {
    "title": "河",
    "id": "1",
    "paragraphs": [
        {
            "context": "船在河上，人在船上。",
            "qas": [
                {
                    "id": "1",
                    "question": "船在哪里？",
                    "answers": [{"id": "1", "text": "河上"}, {"id": "2", "text": "河"}],
                },
                {"id": "2", "question": "车在哪里？", "answers": [], "is_impossible": True},
                {"id": "3", "question": "谁在船上？", "answers": [{"id": "1", "text": "人"}]},
            ],
        },
        {"context": "没人问的。", "qas": []},
        {"context": "天晴了。", "qas": [{"id": "4", "question": "天气怎样？", "answers": [{"text": "晴"}]}]},
    ],
}
READ = "请阅读下面的文章并回答问题，答案用文章里的原话。"
REASONS = "Answer the question. Give your reasons first, then the answer."
MORNING = talk("请把下面的内容翻译成中文。\nGood morning.", "早上好。") + talk(
    "请把下面的内容翻译成英文。\n早上好。", "Good morning."
)

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
    "lines": ("一篇文章。", [Text("一篇文章。")]),
    "paragraphs": ("一篇文章。\n第二行。", [Text("一篇文章。\n第二行。")]),
    "bilingual": (BILINGUAL, talk("说个颜色\n暖色", "红")),
    "bilingual_en": (BILINGUAL, talk("Name a colour", "Red")),
    "seed_tasks": (
        {
            "id": "1",
            "instruction": "写反义词",
            "instances": [{"input": "高", "output": "低"}, {"input": "", "output": "无"}],
            "is_classification": False,
        },
        talk("写反义词\n高", "低") + talk("写反义词", "无"),
    ),
    "preference": (
        {
            "conversations": [{"from": "system", "value": "少说话。"}, {"from": "human", "value": "问"}],
            "chosen": {"from": "gpt", "value": "好的答案"},
            "rejected": {"from": "gpt", "value": "坏的答案"},
        },
        talk("问", "好的答案", system="少说话。"),
    ),
    "conversation": (
        {
            "conversation_id": 1,
            "conversation": [{"human": "问", "assistant": "答"}, {"human": "再问", "assistant": "再答"}],
        },
        talk("问", "答", "再问", "再答"),
    ),
    "poem": (
        {"author": "某人", "paragraphs": ["山上有云，", "", " 云下有山。"], "title": "云山", "id": "1"},
        [Text("云山\n某人\n\n山上有云，\n云下有山。")],
    ),
    "squad": (
        SQUAD,
        talk(f"{READ}\n船在河上，人在船上。\n船在哪里？", "河上", "谁在船上？", "人")
        + talk(f"{READ}\n天晴了。\n天气怎样？", "晴"),
    ),
    "squad_flat": (
        {
            "id": "1",
            "context": "天晴了。",
            "question": "天气怎样？",
            "answers": {"text": ["晴", "晴了"], "answer_start": [1, 1]},
        },
        talk(f"{READ}\n天晴了。\n天气怎样？", "晴"),
    ),
    "opencc": (
        {"id": "case_1", "input": "鼠标里面", "expected": {"s2t": "鼠標裏面", "s2twp": "滑鼠裡面"}},
        talk("请把下面的文字由简体中文转换成繁体中文。\n鼠标里面", "鼠標裏面")
        + talk("请把下面的文字由简体中文转换成台湾正体（用台湾的词语）。\n鼠标里面", "滑鼠裡面"),
    ),
    "en_zh": ({"en": "Good morning.", "zh": "早上好。"}, MORNING),
    "opus": ({"translation": {"en": "Good morning.", "zh": "早上好。"}}, MORNING),
    "pairs": (["Good morning.", "早上好。", "CC-BY 2.0 (France) Attribution: someone"], MORNING),
    "cot": (
        [r"Which is red?\nOptions:\n- (A) sky\n- (B) rust", "(B)", "Rust is red."],
        talk(f"{REASONS}\nWhich is red?\nOptions:\n- (A) sky\n- (B) rust", "Rust is red.\nThe answer is (B)"),
    ),
    "belle_eval": ({"question": "问", "std_answer": "答", "class": "math"}, talk("问", "答")),
    "question_answer": ({"question": "问", "answer": "答"}, talk("问", "答")),
    "prompt_response": ({"prompt": "问", "response": "答", "history": [["甲", "乙"]]}, talk("甲", "乙", "问", "答")),
    "prompt_completion": ({"prompt": "问", "completion": "\n答<|endoftext|>"}, talk("问", "答")),
    "query_response": ({"query": "问", "response": "答"}, talk("问", "答")),
    "instruction_response": (
        {"instruction": "概括", "context": "长文。", "response": "短文。", "category": "summarization"},
        talk("概括\n长文。", "短文。"),
    ),
    "input_target": ({"kind": "NLI", "input": "问", "target": "答"}, talk("问", "答")),
    "wen_da": ({"id": 1, "问": "问", "答": "答"}, talk("问", "答")),
    "input_output": ({"input": ["甲", "乙"], "output": ["一", "二"]}, talk("甲", "一", "乙", "二")),
    "content": ({"id": 1, "content": "一篇文章。"}, [Text("一篇文章。")]),
    "marked": ({"text": "<s>Human: 问\n</s><s>Assistant: 答\n</s>"}, talk("问", "答")),
}
BY_NAME = ("lines", "paragraphs", "bilingual_en")  # what `auto` takes for another layout


def test_every_layout_is_here() -> None:
    assert LAYOUTS.keys() == sources.LAYOUTS.keys() == layouts.LAYOUTS.keys()
    assert set(read.PLAIN) <= LAYOUTS.keys()


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str) -> None:
    record, examples = LAYOUTS[name]
    assert sources.examples_of(record, Reading(name, seed=1)) == examples
    if name not in BY_NAME:
        assert sources.recognise(record) == name
        assert auto(record) == examples


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


def test_marks_are_taken_off() -> None:
    """Ends of turns as other trainers wrote them; not what only looks like them."""
    for mark in ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<eoh>", "<eom>", "<eoa>"):
        assert auto(ALPACA | {"output": f"好{mark}\n"}) == auto(ALPACA | {"output": f" 好 {mark}{mark}"})
        assert auto(ALPACA | {"output": f"好{mark}"}) == auto(ALPACA | {"output": "好"})
        assert auto(ALPACA | {"output": f"{mark}好"}) == talk("改正错字\n我在见你", f"{mark}好")
        with pytest.raises(sources.Drop, match="empty_answer"):
            auto(ALPACA | {"output": mark * 3})
    assert auto(ALPACA | {"output": "好</s>"}) == auto(ALPACA | {"output": "好"})
    for kept in ("<s>错</s>", "a<b>", "<p>段</p>", "x >"):
        assert auto(ALPACA | {"output": kept}) == talk("改正错字\n我在见你", kept)


@pytest.mark.parametrize(
    "text",
    [
        "<s>Human: 问\n</s><s>Assistant: 答\n</s><s>Human: 再问</s><s>Assistant: 再答</s>",
        "<|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n答<|im_end|>\n"
        "<|im_start|>user\n再问<|im_end|>\n<|im_start|>assistant\n再答<|im_end|>\n",
        "<|Human|>: 问<eoh>\n<|MOSS|>: 答<eom>\n<|Human|>:再问 <eoh>\n<|MOSS|>：再答<eom>",
        "<|user|>\n问\n<|assistant|>\n答\n<|user|>再问<|assistant|>再答",
        "[Human]: 问<eoh>\n[MOSS]: 答<eoa>\n[Human]: 再问<eoh>\n[MOSS]: 再答<eoa>",
        "### Human: 问\n### Assistant: 答\n\n### Human: 再问\n### Assistant: 再答",
        "\r\n### 用户：问\r\n### 助手：答\r\n### 用户：再问\r\n### 助手：再答\r\n### 用户：没人回答的",
    ],
)
def test_a_talk_in_one_text(text: str) -> None:
    for record in (text, {"text": text}, {"plain_text": text, "num_turns": 2}):
        assert sources.recognise(record) == "marked"
        assert auto(record) == talk("问", "答", "再问", "再答")


@pytest.mark.parametrize(
    "text", ["<s>划掉</s>", "### 标题\n正文", "[新华社] 正文", "<|x|>", "他说：Human: 好", "<html>"]
)
def test_other_texts_are_no_talks(text: str) -> None:
    assert auto(text) == auto({"text": text}) == [Text(text)]


def test_moss_with_plugins() -> None:
    """What a tool found is read, not made up; a picture can't be."""
    turn = {
        "Human": "<|Human|>: 半径三，圆面积多少？<eoh>\n",
        "Inner Thoughts": "<|Inner Thoughts|>: 要算一算<eot>\n",
        "Commands": '<|Commands|>: Calculate("pi*3^2")<eoc>\n',
        "Tool Responses": "<|Results|>:\n<|1|>: '28.27'\n<eor>\n",
        "MOSS": "<|MOSS|>: 约为28.27<sup><|1|></sup>。<|1|><eor><eom>\n",
    }
    none = turn | {"Commands": "<|Commands|>: None<eoc>\n", "Tool Responses": "<|Results|>:\nNone\n<eor>\n"}
    asked, answer = "半径三，圆面积多少？", "约为28.27[1]。[1]"
    assert auto(MOSS | {"chat": {"turn_1": turn}}) == talk(f"{asked}\n\n工具给出的结果：\n[1]: '28.27'", answer)
    assert auto(MOSS | {"chat": {"turn_1": none | {"MOSS": "<|MOSS|>: 二十八。<eom>"}}}) == talk(asked, "二十八。")
    drawn = turn | {"Commands": '<|Commands|>: Text2Image("a circle")<eoc>\n'}
    with pytest.raises(sources.Drop, match="needs_tools"):
        auto(MOSS | {"chat": {"turn_1": none, "turn_2": drawn}})


def test_roles_and_system_texts() -> None:
    said = [{"role": "用户", "content": "问"}, {"role": "<|助手|>", "content": "答"}]
    assert auto({"messages": said}) == auto({"conversations": said, "system": ""}) == talk("问", "答")
    assert auto({"conversations": said, "instruction": "少说话。"}) == talk("问", "答", system="少说话。")
    led = [{"role": "系统", "content": "说中文。"}, *said]
    assert auto({"conversations": led, "system": "少说话。"}) == talk("问", "答", system="少说话。\n说中文。")


def test_preferences() -> None:
    """The answer that was preferred, wherever the question stands."""
    asked = {"role": "user", "content": "问"}
    best, worst = ([asked, {"role": "assistant", "content": text}] for text in ("好", "坏"))
    for record in (
        {"prompt": "问", "chosen": "好", "rejected": "坏"},
        {"question": "问", "chosen": "好", "rejected": "坏"},
        {"instruction": "问", "input": "", "chosen": "好", "rejected": "坏"},
        {"prompt": "问", "chosen": best, "rejected": worst, "messages": best},
        {"prompt": [asked], "chosen": best[1:], "rejected": worst[1:]},
        {"messages": [asked], "chosen": "好", "rejected": "坏"},
        {"chosen": best, "rejected": worst},
    ):
        assert auto(record) == talk("问", "好")


def test_pairs_in_either_order() -> None:
    assert auto(["早上好。", "Good morning."]) == auto(["Good morning.", "早上好。"]) == MORNING
    assert (
        auto(["I use WeChat.", "我用WeChat。"])[0]
        == talk("请把下面的内容翻译成中文。\nI use WeChat.", "我用WeChat。")[0]
    )
    assert auto(["What does 家 mean?", "家是什么意思？"])[1].messages[1][1] == "What does 家 mean?"


def test_many_rounds() -> None:
    """More keys than are remembered."""
    record = {f"round_{i}": {"prompt": f"问{i}", "response": f"答{i}"} for i in range(1, 100)}
    assert auto(record) == talk(*(f"{kind}{i}" for i in range(1, 100) for kind in "问答"))


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
        with pytest.raises(sources.Drop, match="bad_record"):
            sources.group_of(record, reading)


def test_causes_of_reading_count_as_bad() -> None:
    assert set(read.CAUSES) | {"bad_record", "unknown_layout"} == set(sources.BAD)


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
            assert examples and all(_whole(example) for example in examples)
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


def _whole(example: Any) -> bool:
    if isinstance(example, Text):
        return bool(example.text)
    roles = [role for role, _ in example.messages]
    roles = roles[1:] if roles[0] == "system" else roles
    alternate = roles == ["user", "assistant"] * (len(roles) // 2)
    return bool(roles) and alternate and all(text for _, text in example.messages)


# file or folder, records, drops, layout, examples a record where it isn't one; counts of the data's README and MANIFEST
REAL: list[tuple[Any, ...]] = [
    ("baike2018qa/baike_qa_real_4.json", 4, {}, "baike"),
    ("baike2018qa/baike_qa_relaid_toyhom.json", 3000, {}, "baike"),
    ("c3/c3-d-dev.json", 1628, {}, "c3", 1825),
    ("c3/c3-d-train.json", 4885, {}, "c3", 5856),
    ("c3/c3-m-dev.json", 1046, {}, "c3", 1991),
    ("c3/c3-m-train.json", 3138, {}, "c3", 6013),
    ("coig_schema/counterfactural_correction_multi_round_chat", 150, {}, "rounds"),
    ("coig_schema/exam_instructions.jsonl", 2811, {}, "exam"),
    ("coig_schema/human_value_alignment_instructions_part1.json", 92, {}, "alpaca"),
    ("coig_schema/human_value_alignment_instructions_part2.json", 600, {}, "exam"),
    ("coig_schema/leetcode_instructions.jsonl", 48, {}, "alpaca"),
    ("coig_schema/translated_instructions.jsonl", 2000, {"empty_answer": 2}, "translated"),
    ("flan/cot_tsv/qasc_train.tsv", 1084, {}, "cot"),
    ("flan/cot_tsv/strategyqa_train.tsv", 2061, {}, "cot"),
    ("flan/flan_cot_relaid_2100.jsonl", 2100, {}, "unified"),
    ("flan/p3_t0_sample.jsonl", 3372, {"empty_answer": 84}, "unified"),  # nothing but an end mark
    ("instruct/alpaca_bilingual_v3_part1-6.json", 6000, {"empty_answer": 5}, "bilingual"),
    ("instruct/alpaca_en_0-3252.json", 3252, {"empty_answer": 4}, "alpaca"),
    ("instruct/alpaca_zh_carbonz0_part-00.json", 10021, {"empty_answer": 6}, "alpaca"),
    ("instruct/belle_eval_set.json", 1000, {"empty_answer": 369}, "belle_eval"),
    ("instruct/belle_zh_seed_tasks.json", 175, {}, "seed_tasks"),
    ("instruct/chatlm_mini_train_3k.jsonl", 3000, {}, "prompt_response"),
    ("instruct/chinese_vicuna_sample_chat.jsonl", 3, {}, "input_output"),
    ("instruct/chinese_vicuna_sample_instruct.jsonl", 10, {}, "alpaca"),
    ("instruct/firefly_dummy_data.jsonl", 33, {}, "conversation"),
    ("instruct/flagai_convo_samples.jsonl", 100, {}, "sharegpt"),
    ("instruct/huatuo_llama_data.json", 8658, {}, "alpaca"),
    ("instruct/lawyer_judical_examination.json", 2000, {}, "alpaca_turns"),
    ("instruct/lawyer_legal_advice.json", 5000, {}, "alpaca_turns"),
    ("instruct/llama_chinese_dev_sft.csv", 200, {}, "marked"),
    ("instruct/llamafactory_alpaca_en_demo.json", 999, {}, "alpaca"),
    ("instruct/llamafactory_alpaca_zh_demo.json", 1000, {}, "alpaca"),
    ("instruct/llamafactory_dpo_zh_demo.json", 300, {}, "preference"),
    ("instruct/llamafactory_identity.json", 91, {"placeholder": 85}, "alpaca"),
    ("instruct/moss_original_layout", 20, {}, "moss"),
    ("instruct/moss_sft_with_plugins.jsonl", 500, {"needs_tools": 100}, "moss"),
    ("instruct/moss_sft_without_plugins.jsonl", 600, {}, "moss"),
    ("instruct/oasst_sft_zh.json", 689, {}, "alpaca"),
    ("logiqa_v2/dev_zh.txt", 1593, {}, "logiqa"),
    ("logiqa_v2/train_zh.relaid_from_v1.txt", 374, {}, "logiqa"),
    ("news2016zh/news2016zh_real_1.json", 1, {}, "news"),
    ("news2016zh/news2016zh_relaid_xwlb.json", 2458, {}, "news"),
    ("raw/CLUECorpusSmall_sampled.even_lines.txt", 1250, {}, "text"),
    ("raw/luxun_pd", 57, {}, "text"),
    ("traditional/DRCD_dev.json", 383, {}, "squad", 1000),
    ("traditional/opencc_testcases.jsonl", 232, {}, "opencc", 543),
    ("traditional/poet.tang.0.json", 1000, {}, "poem"),
    ("traditional/poet.tang.1000.json", 1000, {}, "poem"),
    ("traditional/simplified_counterpart_yuanqu_500.json", 500, {"empty_text": 13}, "poem"),
    # One line has no tab.
    ("traditional/tatoeba_cmn_unconverted_mixed_script.txt", 30980, {"bad_record": 1}, "pairs", 2 * 30979),
    # One translation is a quotation mark.
    ("translation2019zh/news-commentary-v13-en-zh_sampled.txt", 1000, {"same_language": 1}, "pairs", 2 * 999),
    ("translation2019zh/tatoeba_cmn.txt", 29155, {}, "pairs", 2 * 29155),
    ("translation2019zh/translation2019zh_real_readme_6.json", 6, {}, "translation", 12),
    ("translation2019zh/translation2019zh_relaid_tatoeba_5000.json", 5000, {}, "translation", 10000),
    ("translation2019zh/translation2019zh_valid.real_500.json", 500, {}, "translation", 1000),
    ("webtext2019zh/web_text_zh_real_4.json", 4, {}, "webtext"),
    ("webtext2019zh/web_text_zh_relaid_cluecorpussmall.json", 268, {}, "webtext"),
    ("wiki2019zh/AA/wiki_00", 64, {}, "wiki"),
    ("wiki2019zh/relaid_cmrc2018.jsonl", 1104, {}, "wiki"),
]


def _items(path: Path) -> list[Any]:
    """What read.py yields of a file or folder."""
    spans = [span for file in read.files_of(path, path.name) for span in read.spans_of(file, "auto", 1 << 26)]
    return [item for span in spans for item in read.records(span, "auto")]


def _read(path: Path) -> list[Any]:
    return [item.value for item in _items(path)]


@pytest.mark.parametrize("case", REAL, ids=lambda case: case[0])
def test_real_data(real_data: Path, case: tuple[Any, ...]) -> None:
    name, count, drops, layout, *amount = case
    items = _items(real_data / name)
    assert len(items) == count
    assert {sources.recognise(item.value) for item in items if isinstance(item, read.Record)} == {layout}
    dropped: Counter[str] = Counter()
    examples = []
    for item in items:
        if isinstance(item, read.Bad):
            dropped[item.cause] += 1
            continue
        try:
            examples += auto(item.value)
        except sources.Drop as e:
            dropped[str(e)] += 1
    assert dropped == drops
    assert [len(examples)] == (amount or [count - sum(drops.values())])
    assert all(_whole(example) for example in examples)
    _check_masks(examples[:: max(1, len(examples) // 25)])


def test_every_real_file_is_listed(real_data: Path) -> None:
    listed = [real_data / case[0] for case in REAL]
    for path in real_data.rglob("*"):
        if path.is_file() and path.parent != real_data and path.name != "license.txt":
            assert any(path.is_relative_to(one) for one in listed), path


def test_real_scores_and_names(real_data: Path) -> None:
    kept: Counter[str] = Counter()
    for record in _read(real_data / "instruct/alpaca_bilingual_v3_part1-6.json"):
        try:
            sources.examples_of(record, Reading(min_score=4))
        except sources.Drop as e:
            kept[str(e)] += 1
    assert kept == {"low_score": 631, "empty_answer": 4}  # the fifth empty answer is among the poor ones
    reading = Reading(values=(("name", "小熊"), ("author", "某人")))
    named = [sources.examples_of(r, reading) for r in _read(real_data / "instruct/llamafactory_identity.json")]
    assert len(named) == 91 and "{{" not in str(named) and str(named).count("小熊") > 70


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
        trained = [example.messages for record in _read(demo.ROOT / "eval" / path) for example in auto(record)]
        asked = tasks.load(task, demo.ROOT / "eval", "train")
        wanted = [(("user", tasks.prompt_for(q, "original")), ("assistant", "ABCD"[q.gold])) for q in asked]
        assert trained == wanted


@pytest.mark.parametrize("change", [{"answer": 4}, {"answer": "x"}, {"options": ["a"]}, {"options": [1, 2, 3, 4]}])
def test_a_broken_question_is_dropped(change: dict[str, Any]) -> None:
    record = {"text": "文", "question": "问", "options": ["甲", "乙", "丙", "丁"], "answer": 0, **change}
    with pytest.raises(sources.Drop, match="bad_record"):
        auto(record)
