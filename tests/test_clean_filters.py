"""Cleaning: what filters drop, what is counted, what a preset sets."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_clean import talk

from pandallm import config
from pandallm.config import UserError
from pandallm.data.clean import PRESETS, Clean, Cleaner
from pandallm.data.sources import Drop
from pandallm.prompt import Dialogue, Example, Text


def dropped(text: str | Dialogue, **switches: Any) -> str | None:
    """The cause by which an example is dropped, or None."""
    try:
        Cleaner(Clean(**switches))(Text(text) if isinstance(text, str) else text, Counter())
    except Drop as e:
        return str(e)
    return None


LONG = "人工智能正在改变我们的生活，也带来许多新的问题需要大家认真思考。"


def test_filters_of_texts() -> None:
    assert dropped("太短", min_chars=3) == "too_short"
    assert dropped("刚刚好", min_chars=3, max_chars=3) is None
    assert dropped("太长了吧", max_chars=3) == "too_long_text"
    assert dropped(LONG + "\ufffd" * 3, max_replacement=0.01) == "replacement_chars"
    assert dropped(LONG + "\ue003" * 3, max_replacement=0.01) == "replacement_chars"
    assert dropped("两个\ufffd\ufffd", max_replacement=0.01) is None
    assert dropped("★☆★☆——！！！▓░ 好", max_symbols=0.6) == "symbols"
    assert dropped(LONG, max_symbols=0.2) is None
    assert dropped("哈哈，" * 200, max_repetition=0.6) == "repetitive"
    assert dropped(f"{LONG}\n" * 8, max_repetition=0.6) == "repetitive"
    distinct = "".join(chr(0x4E00 + 7 * i) for i in range(100))
    assert dropped(distinct * 2, max_repetition=0.6) is None
    assert dropped(distinct * 3, max_repetition=0.6) == "repetitive"
    assert dropped(f"流程图\n```\n{'+----+' * 100}\n```", max_repetition=0.6) is None
    assert dropped("All of this is English.", min_han=0.1) == "little_chinese"
    assert dropped("1 + 2 = 3", min_han=0.1) is None
    assert dropped(LONG + " English", min_han=0.5) is None


def test_filters_are_at_their_bounds() -> None:
    assert dropped("好" * 50 + "！" * 50, max_symbols=0.5) is None
    assert dropped("好" * 50 + "！" * 51, max_symbols=0.5) == "symbols"
    assert dropped("好" * 97 + "\ufffd" * 3, max_replacement=0.03) is None
    assert dropped("好" * 96 + "\ufffd" * 4, max_replacement=0.03) == "replacement_chars"
    assert dropped("好a", min_han=0.5) is None
    assert dropped("好aa", min_han=0.5) == "little_chinese"


def test_filters_of_dialogues() -> None:
    sums = talk("1+1=?", "2")
    assert dropped(sums, preset="web") is None  # short and full of signs, as sums are
    assert dropped(talk("请改正：" + LONG * 2, LONG * 2), preset="web") is None  # an answer that repeats the question
    assert dropped(talk("继续", "哈哈，" * 200), preset="web") == "repetitive"
    assert dropped(talk("这是什么", "乱码\ufffd\ufffd\ufffd"), preset="web") == "replacement_chars"
    assert dropped(talk("翻译：你好", "Hello"), min_han=0.3) is None  # counted as a whole
    assert dropped(talk("Hi", "Hello"), min_han=0.3) == "little_chinese"
    assert dropped(talk("四字的话", "四字的话"), max_chars=7) == "too_long_text"


def test_what_is_emptied_is_dropped() -> None:
    assert dropped("\u200b\u200b", unicode=True) == "empty_text"
    assert dropped(talk("问\u200b", "\u200b"), unicode=True) == "empty_answer"
    assert dropped(talk("\u200b", "答"), unicode=True) == "empty_question"
    system = Dialogue((("system", "\u200b"), ("user", "问"), ("assistant", "答")))
    assert Cleaner(Clean(unicode=True))(system, Counter()) == talk("问", "答")


def test_ordinary_text_passes_the_web_preset_untouched() -> None:
    cleaner = Cleaner(Clean(preset="web"))
    notes: Counter[str] = Counter()
    texts = [LONG, "白日依山尽，\n黄河入海流。\n欲穷千里目，\n更上一层楼。", "Plain English text, with a < b && c > d."]
    examples: list[Example] = [
        *map(Text, texts),
        talk("写一段代码", "```c\nfor (;;) {}\n```"),
        talk("解：$x^{2}<4$", "$-2<x<2$"),
    ]
    for example in examples:
        assert cleaner(example, notes) is example
    assert not notes


def test_each_repair_is_counted_once_an_example() -> None:
    cleaner = Cleaner(Clean(preset="light", script="t2s", mask_phones=True))
    notes: Counter[str] = Counter()
    cleaner(talk("问\u200b题\u200b", "回\u200b答&amp;<br>電 話 號 13800138000"), notes)
    assert notes == {
        "unicode_mended": 1,
        "html_removed": 1,
        "blanks_removed": 1,
        "script_converted": 1,
        "phones_masked": 1,
    }
    cleaner(Text("数学（，）是"), notes)
    assert notes["brackets_removed"] == 1 and notes["unicode_mended"] == 1


def test_what_is_dropped_is_not_counted_as_mended() -> None:
    notes: Counter[str] = Counter()
    with pytest.raises(Drop, match="too_short"):
        Cleaner(Clean(preset="web"))(Text("短\u200b"), notes)
    assert not notes


def test_a_preset_sets_what_is_not_given() -> None:
    assert Clean() == Clean(preset="off") == Clean.model_validate({"preset": False})
    light, web = Clean(preset="light"), Clean(preset="web", html=False, min_chars=3)
    assert light.unicode and light.html and light.min_chars == 0 and not light.mask_phones
    assert web.unicode and not web.html and web.min_chars == 3
    assert web.max_symbols == PRESETS["web"]["max_symbols"] < 1
    for conf in (light, web):
        assert Clean(**conf.model_dump()) == conf
    assert Cleaner(Clean())(Text("Ａ\u200b<br> "), Counter()) == Text("Ａ\u200b<br> ")


def test_mistakes_of_the_config(tmp_path: Path) -> None:
    path = tmp_path / "clean.yaml"
    for text, said in (
        ("preset: webb", "preset"),
        ("presets: web", "did you mean 'preset'"),
        ("script: t2x", "script"),
        ("max_symbols: 2", "max_symbols"),
        ("min_chars: 9\nmax_chars: 8", "max_chars 8 is below min_chars 9"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=re.escape(said)):
            config.load(Clean, path)
    path.write_text("preset: off", encoding="utf-8")  # YAML reads a false
    assert config.load(Clean, path) == Clean()
