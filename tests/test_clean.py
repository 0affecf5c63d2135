"""Cleaning: what each repair and mask mends and, as much, what it must leave alone."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pandallm.data.clean import Clean, Cleaner, is_id
from pandallm.data.sources import Drop
from pandallm.prompt import Dialogue, Example, Text


def clean(text: str, **switches: Any) -> str:
    """A raw text cleaned; the preset `light` unless switches are given."""
    done = Cleaner(Clean(**(switches or {"preset": "light"})))(Text(text), Counter())
    assert isinstance(done, Text)
    return done.text


def talk(*texts: str) -> Dialogue:
    roles = ["user", "assistant"] * len(texts)
    return Dialogue(tuple(zip(roles, texts, strict=False)))


def answer(question: str, text: str, **switches: Any) -> str:
    """An answer cleaned beside its question."""
    done = Cleaner(Clean(**(switches or {"preset": "light"})))(talk(question, text), Counter())
    assert isinstance(done, Dialogue)
    return done.messages[1][1]


UNICODE = [
    ("全角ＡＢＣ１２３，（标点）保留。", "全角ABC123，（标点）保留。"),
    ("病毒量为３．９１", "病毒量为3.91"),
    ("１．第一条；２．第二条", "1．第一条；2．第二条"),
    ("零\u200b宽\ufeff字\u2060符\u00ad", "零宽字符"),
    ("左\u200e右\u202b标\u2069记", "左右标记"),
    ("控\x00制\x1b字\x7f符", "控制字符"),
    ("不\xa0断\u2003行", "不 断 行"),
    ("第一行\r\n第二行\r第三行\u2028第四行\x0b第五行", "第一行\n第二行\n第三行\n第四行\n第五行"),
    ("cafe\u0301", "café"),
    ("⼀个⼈从⻓⻔来", "一个人从长门来"),
    ("of\ufb01ce", "office"),
    ("等\x85\x85他说\x97好", "等……他说—好"),
    ("$z\\cdot\x08ar{z}=\x0crac{1}{2}$", "$z\\cdot\\bar{z}=\\frac{1}{2}$"),
    ("坏" + "\u0326" * 30 + "字", "坏字"),
    ("Ｍｙ\u3000ｄｅａｒ", "My dear"),
]
NOT_UNICODE = [
    "中文，标点：“引号”；《书名》（括号）……——！？％＋＝～",
    "👨\u200d👩\u200d👧 家 🏳\ufe0f\u200d🌈 旗 ❤\ufe0f\u200d🔥",
    "می\u200cخواهم क्\u200dष",
    "下列正确的是（\u3000\u3000）。填\u3000\u3000空",
    "王\u3000明",
    "缩进\tTab\n换行",
    "生僻字𠮷\ue4c2，〖目夹〗□",
    "①②③ ℃ ² é",
]


@pytest.mark.parametrize(("before", "after"), UNICODE)
def test_unicode_is_mended(before: str, after: str) -> None:
    assert clean(before, unicode=True) == after


@pytest.mark.parametrize("text", NOT_UNICODE)
def test_unicode_that_means_something_stays(text: str) -> None:
    assert clean(text, unicode=True) == text


HTML = [
    ("他&nbsp;说&ldquo;好&rdquo;&#160;a&amp;b", "他 说“好” a&b"),
    ("双重&amp;lt;转换&amp;amp;", "双重<转换&"),
    ("第一行<br>第二行<br/>\n第三行<BR />第四行", "第一行\n第二行\n第三行\n第四行"),
    ("<p>第一段</p><p>第二段</p>", "第一段\n\n第二段"),
    ("if x &lt; 3:\n    print(&quot;小&quot;)", 'if x < 3:\n    print("小")'),
    ("R&B<br>音乐", "R&B\n音乐"),
    ("&lt;div&gt;<br>", "<div><br>"),
]
NOT_HTML = [
    "若 a<b 且 c>d，则 a<b<c；x&y；AT&T；&sum; 是求和",
    "ptr = &num; for (p = &copy; *p; p++);",
    "std::vector<p> v; #include <iostream>",
    "<div><p>一段</p><br>&nbsp;</div>",
    "HTML 中用 <br> 标签换行，用 &lt; 表示小于号的实体",
    "| 列一 | 列二 |\n|---|---|\n| 甲<br>乙 | 丙 |",
    "小于号写作 `&lt;`，和号写作“&amp;”",
    "```\n&lt;br&gt;<br>&nbsp;\n```",
    "半个表情 &#55357; 留着",
]


@pytest.mark.parametrize(("before", "after"), HTML)
def test_html_is_removed(before: str, after: str) -> None:
    assert clean(before, html=True) == after


@pytest.mark.parametrize("text", NOT_HTML)
def test_html_that_is_meant_stays(text: str) -> None:
    assert clean(text, html=True) == text


def test_a_question_about_html_spares_its_answer() -> None:
    assert answer("怎样写一个 HTML 段落？", "<p>一段</p><br>") == "<p>一段</p><br>"
    assert answer("介绍一下自己。", "<p>我是小熊</p>") == "我是小熊"


BRACKETS = [
    ("圆周率（，）是一个常数。", "圆周率是一个常数。"),
    ("化学（）是科学，（，）", "化学是科学，（，）"),
    ("高德纳（，1938年－）", "高德纳（1938年－）"),
    ("某某公司 ()，简称某某", "某某公司，简称某某"),
    ("编程（）（）。其次", "编程。其次"),
    ("采取「」的战略", "采取的战略"),
]
NOT_BRACKETS = [
    "下列说法正确的是（）。\nA．甲",
    "我国的首都是（），人口是()万",
    "选择合适的词填入（）中",
    "以下哪一项一定为假？（）",
    "谁是作者（\u3000\u3000）？谁（ ）画",
    "调用函数()可以，main()也可以，print（）函数",
    "逗号（，）和顿号（、）不同，引号「」也不同",
    "小猫（；￣▽￣）笑了",
]


@pytest.mark.parametrize(("before", "after"), BRACKETS)
def test_empty_brackets_are_removed(before: str, after: str) -> None:
    assert clean(before, brackets=True) == after


@pytest.mark.parametrize("text", NOT_BRACKETS)
def test_blanks_to_fill_in_and_code_keep_their_brackets(text: str) -> None:
    assert clean(text, brackets=True) == text


def test_brackets_and_lines_of_a_dialogue_stay() -> None:
    text = "圆周率（，）是常数\n我很喜欢吃苹果。\n我很喜欢吃苹果。\n我很喜欢吃苹果。"
    assert answer("把这句话写三遍", text) == text
    assert clean(text) == "圆周率是常数\n我很喜欢吃苹果。"


BLANKS = [
    ("中 国 人", "中国人"),
    ("由 题 意 可 知 $a$，故 答 案 为: 2", "由题意可知 $a$，故答案为: 2"),
    ("不 能 确 定 ， 如 图 ： 略", "不能确定，如图：略"),
    ("行尾  \n空白\t\n去掉", "行尾\n空白\n去掉"),
    ("一\n\n\n\n二\n \n \n三", "一\n\n二\n\n三"),
    ("\u3000\u3000段首缩进\n\u3000\u3000又一段", "段首缩进\n又一段"),
]
NOT_BLANKS = [
    "床前明月光 疑是地上霜",
    "张三 李四 王五 苹果 香蕉",
    "猫 ： 狗，一 一 一 得一",
    "种群 甲 乙 丙 丁 戊\n河南 唐 宋 明 清\n有无 有 无 有 有",
    "中文 English 中文 3 个 B 超",
    "姓名  年龄  性别\n小 明    12    男",
    "def f():\n    return 1\n\nclass A:\n    pass",
    "填空\n\u3000   \u3000。\n途径是 \u3000   \u3000\n（填字母）",
]


@pytest.mark.parametrize(("before", "after"), BLANKS)
def test_blanks_are_removed(before: str, after: str) -> None:
    assert clean(before, blanks=True) == after


@pytest.mark.parametrize("text", NOT_BLANKS)
def test_blanks_that_separate_stay(text: str) -> None:
    assert clean(text, blanks=True) == text


def test_repeated_lines() -> None:
    line = "点击查看更多精彩内容"
    assert clean(f"{line}\n{line}\n\n{line}\n正文", repeated_lines=True) == f"{line}\n正文"
    for stays in (
        f"{line}\n{line}\n正文",
        "啦啦啦\n" * 5 + "完",
        f"{line}\n{line}\n{line}了",
        "<td>第一行</td>\n" * 4 + "x",
    ):
        assert clean(stays, repeated_lines=True) == stays
    song = f"{line}\n另外一行完全不同的词\n" * 4 + "完"
    assert clean(song, repeated_lines=True) == song


def test_nothing_in_a_fence_is_touched() -> None:
    code = "```python\nｘ = '中 国 人（，）'  \n\n\n\ny = '&lt;<br>\u200b'\n```"
    assert clean(f"说明ＡＢＣ\u200b\n{code}\n结束\u200b") == f"说明ABC\n{code}\n结束"
    assert clean("前\u200b文\n```\n没有结束\u200b") == "前文\n```\n没有结束\u200b"


# Everything the repairs look at, and what stands around it.
PIECES = (
    "中国人的是（），、；。「」<>&;lt#38amp/pbr `1ＡＢ３．\u3000\u200b\u200d\xa0\t\r\n\x08ar{\x0crac{\u0301é👩🏽❤\ufe0f"
    "甲乙号|\"'()⼀\ufb01\x85標签函数"
)
MARKS = [
    "```",
    "<br>",
    "<p>",
    "</p>",
    "&nbsp;",
    "&amp;",
    "（，）",
    "（）",
    "()",
    "「」",
    "中 国 人 ",
    "\n\n\n",
    "同样的一行文字\n",
]


@settings(max_examples=400, deadline=None, database=None)
@given(st.lists(st.one_of(st.sampled_from(MARKS), st.sampled_from(PIECES), st.characters()), max_size=40).map("".join))
def test_cleaning_again_changes_nothing(text: str) -> None:
    cleaner = Cleaner(Clean(preset="light", mask_phones=True, mask_ids=True, mask_emails=True))
    examples: list[Example] = [Text(text), talk("问", text)]
    for example in examples:
        try:
            once = cleaner(example, Counter())
        except Drop as e:
            assert str(e) in ("empty_text", "empty_answer") and not re.search(r"[\u4e00-\u9fff]{3}", text)
            continue
        notes: Counter[str] = Counter()
        assert cleaner(once, notes) == once
        assert not notes


@settings(max_examples=200, deadline=None, database=None)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=60))
def test_chinese_and_letters_are_never_lost(text: str) -> None:
    """No repair takes out a letter that has a place in ordinary text."""
    cleaned = clean(text + "完", unicode=True, blanks=True)
    before, after = (
        Counter(c for c in unicodedata.normalize("NFKC", t) if c.isalnum()) for t in (text + "完", cleaned)
    )
    gone = before - after
    assert not gone or any(unicodedata.name(c, "").startswith(("CJK RADICAL", "LATIN SMALL LIGATURE")) for c in text)


def test_masks() -> None:
    every = {"mask_phones": True, "mask_ids": True, "mask_emails": True}
    numbers = [
        "13800138000",
        "138 0013 8000",
        "+86-138-0013-8000",
        "010-12345678",
        "(0571)8888-8888",
        "0755-1234567转803",
    ]
    numbers += ["+852 9123 4567", "+85291234567", "0912-345-678", "(02)2345-6789", "+1 (415) 555-2671", "415-555-2671"]
    for number in numbers:
        assert clean(f"请拨打{number}。", **every) == "请拨打[电话]。", number
    assert clean("邮箱 a.b-c@mail.example.cn；```\n13800138000\n```", **every) == "邮箱 [邮箱]；```\n[电话]\n```"
    # Area 110105, born 31 December 1949; the standard's own example.
    assert clean("证号11010519491231002X，", **every) == "证号[身份证号]，"
    for stays in (
        "证号110105194912310021",
        "共13800138000元",
        "2023-10-12 12:30:45",
        "3.1415926535",
        "订单号1380013800012",
        "热线400-123-4567和12345",
        "求和 81693+100701+100899",
        "git@github.com:a/b.git @某人 a@b",
        "1690000000000",
    ):
        assert clean(stays, **every) == stays, stays


def test_the_check_digit_of_an_identity_number() -> None:
    assert is_id("11010519491231002X") and is_id("11010519491231002x")
    assert not any(is_id(f"11010519491231002{digit}") for digit in range(10))


def test_real_corpora(real_data: Path) -> None:
    """What is known of two real files: the wiki extractor's brackets go, exam papers' blanks stay."""
    cleaner = Cleaner(Clean(preset="light"))
    notes: Counter[str] = Counter()
    before = after = 0
    for line in (real_data / "wiki2019zh" / "AA" / "wiki_00").read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        done = cleaner(Text(text), notes)
        assert isinstance(done, Text) and cleaner(done, Counter()) == done
        before, after = before + text.count("（）"), after + done.text.count("（）")
        assert len("".join(done.text.split())) > 0.95 * len("".join(text.split()))
    assert before > 40 and after < before / 4 and notes["brackets_removed"] > 20
    blank = re.compile(r"（[ \u3000]*）")
    for line in (real_data / "coig_schema" / "exam_instructions.jsonl").read_text(encoding="utf-8").splitlines():
        question = json.loads(line)["textbox_question"].strip()
        cleaned = answer(question or "问", question or "答")
        assert len(blank.findall(cleaned)) == len(blank.findall(question))
