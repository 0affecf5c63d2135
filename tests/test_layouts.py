"""Records of every corpus of the recipe, and the common instruction layouts: the exact examples of each."""

from __future__ import annotations

from typing import Any

import pytest

from pandallm.data import layouts, read, sources
from pandallm.data.sources import Reading
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


def test_titles_are_not_said_twice() -> None:
    assert auto(NEWS | {"content": "今日多云，气象台说。"}) == [Text("今日多云，气象台说。")]
    assert auto(NEWS | {"title": ""}) == [Text("气象台说，今日多云。")]
    assert auto(BAIKE | {"desc": " 茶怎么泡？"}) == talk("请回答下面的百科问题。\n茶怎么泡？", "水温八十度。\n一分钟。")
    assert auto(BAIKE | {"desc": None}) == auto(BAIKE | {"desc": ""}) == auto({**BAIKE, "desc": BAIKE["title"]})


def test_pairs_in_either_order() -> None:
    assert auto(["早上好。", "Good morning."]) == auto(["Good morning.", "早上好。"]) == MORNING
    assert (
        auto(["I use WeChat.", "我用WeChat。"])[0]
        == talk("请把下面的内容翻译成中文。\nI use WeChat.", "我用WeChat。")[0]
    )
    assert auto(["What does 家 mean?", "家是什么意思？"])[1].messages[1][1] == "What does 家 mean?"
