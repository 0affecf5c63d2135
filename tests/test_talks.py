"""Talks in every notation: turns, roles, system texts and marks become the same dialogues, and other texts don't."""

from __future__ import annotations

import pytest
from test_layouts import ALPACA, MESSAGES, MOSS, auto, talk

from pandallm.data import sources
from pandallm.prompt import Text


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


def test_an_empty_system_text_is_none() -> None:
    said = [{"role": "system", "content": " "}, *MESSAGES["messages"]]
    assert auto({"messages": said}) == talk("问", "答")


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


def test_many_rounds() -> None:
    """More keys than are remembered."""
    record = {f"round_{i}": {"prompt": f"问{i}", "response": f"答{i}"} for i in range(1, 100)}
    assert auto(record) == talk(*(f"{kind}{i}" for i in range(1, 100) for kind in "问答"))
