"""Evaluation items are found in whatever form they stand in a text; stock phrases and quotations drop nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pandallm.config import UserError
from pandallm.data import decontaminate, ngrams, read, sources
from pandallm.data.decontaminate import Hit, Items
from pandallm.prompt import Text

HARBOUR = (
    "小渔村的码头上立着一座老灯塔，守塔人姓钟，今年七十三岁。每天黄昏他都要爬一百二十级台阶，把灯擦亮再点燃。"
    "村里早就通了电，导航也用卫星，年轻人劝他歇着，他却说，海上总有没带手机的人。去年冬天一条舢板在浓雾里迷了路，"
    "正是那束灯光把父子两人领回了港湾。"
)
BAMBOO = (
    "竹子开花是一件稀罕事。一片竹林往往几十年不开一次，一旦开了，整片林子便会同时枯死，种子落在地里，来年再长出新苗。"
    "植物学家认为，这种步调一致的习性能让吃种子的动物一时吃不完，因此总有一部分种子留得下来。"
)
LOGIC = (
    "某图书馆规定，凡借阅古籍的读者必须先参加培训，凡参加培训的读者都要登记姓名。小林没有登记姓名，"
    "馆员因此断定小林不曾借阅过馆里的任何一部古籍。"
)
STEM = "根据上面这段文字的内容，下面四个选项当中说法正确的一项是哪一个"
ENGLISH = (
    "The old lighthouse keeper climbs one hundred and twenty steps every evening to polish the lamp before he lights "
    "it, although the village has had electricity for years and every boat carries a satellite receiver."
)
FORMULA = (
    r"已知 $f(x)=\frac{3x^2+5}{x-7}$，且 $g(t)=\sqrt{t^3-4t+11}$，当 $-2\leq m\leq 8$ 时，"
    r"求 $f(g(m))-g(f(2m-1))$ 的最大值，并写出取得最大值时 $m$ 的全部取值。"
)
HOST = "".join(
    f"第{i}段写的是山里第{i}个村庄的日常，人们种茶、养蜂、修路，也谈论第{i * 7}年的收成和天气，并没有什么特别的事情。"
    for i in range(40)
)

C3 = [
    [[HARBOUR], [{"question": STEM, "choice": ["灯塔", "渔船"], "answer": "灯塔"}], "1-1"],
    [[BAMBOO], [{"question": STEM, "choice": ["竹子", "松树"], "answer": "竹子"}], "1-2"],
]


def logiqa(text: str, options: Sequence[str] = ("甲", "乙", "丙", "丁")) -> dict[str, Any]:
    return {"example_id": 7, "answer": 0, "text": text, "question": STEM, "options": list(options)}


def write(path: Path, value: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return str(path)


def index(folder: Path, **values: Any) -> Items:
    """Items of files NAME.json with these values."""
    files = [write(folder / f"{name}.json", value) for name, value in values.items()]
    decontaminate.build(files, folder / "items.bin", "conf.yaml: decontaminate")
    return Items.open(folder / "items.bin")


def check(items: Items, *texts: str) -> list[Hit | None]:
    return items.check(ngrams.units(texts), len(texts))


def only(items: Items, text: str) -> Hit:
    (hit,) = check(items, text)
    assert hit is not None
    return hit


def planted(passage: str, at: int = 700) -> str:
    return HOST[:at] + "\n" + passage + "\n" + HOST[at:]


def full_width(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


FORMS: dict[str, Callable[[str], str]] = {
    "as is": str,
    "other punctuation": lambda text: text.translate(str.maketrans("，。", "！；")),
    "no punctuation": lambda text: "".join(c for c in text if c.isalnum()),
    "full width": full_width,
    "line breaks": lambda text: "\n".join(text[i : i + 17] for i in range(0, len(text), 17)),
    "blanks": " ".join,
    "upper case": str.upper,
}


@pytest.mark.parametrize("form", FORMS)
def test_planted_items_are_found_in_any_form(tmp_path: Path, form: str) -> None:
    items = index(tmp_path, c3=C3, logiqa=logiqa(LOGIC), english=[logiqa(ENGLISH)], maths=[logiqa(FORMULA)])
    passages = {"c3.json:1": HARBOUR, "c3.json:2": BAMBOO, "logiqa.json:1": LOGIC, "english.json:1": ENGLISH}
    passages["maths.json:1"] = FORMULA
    hits = check(items, HOST, *(planted(FORMS[form](passage)) for passage in passages.values()))
    assert hits[0] is None
    for name, hit in zip(passages, hits[1:], strict=True):
        assert hit is not None and hit[:3] == (True, name, 1.0)


def grams(text: str) -> list[str]:
    """The n-grams of a Chinese text, the slow way."""
    text = "".join(c for c in text if c.isalnum()).lower()
    return [text[i : i + 13] for i in range(len(text) - 12)]


def test_the_shares_are_those_of_plain_sets(tmp_path: Path) -> None:
    rng = random.Random(3)
    items = index(tmp_path, c3=C3, logiqa=logiqa(LOGIC))
    sets = {"c3.json:1": HARBOUR, "c3.json:2": BAMBOO, "logiqa.json:1": LOGIC}
    seen = set()
    for _ in range(200):
        pieces = []
        for passage in rng.choices(list(sets.values()), k=rng.randint(1, 3)):
            start = rng.randrange(len(passage))
            pieces.append(passage[start : start + rng.randint(1, 120)])
        text = HOST[: rng.randint(0, 300)].join(["", *pieces, ""])
        found = {}
        for name, passage in sets.items():
            of_item = {gram for gram in grams(passage) if sum("一" <= c <= "鿿" for c in gram) >= decontaminate.HAN}
            of_text = grams(text)
            shared = len(of_item & set(of_text))
            item_share, text_share = shared / len(of_item), sum(g in of_item for g in of_text) / max(len(of_text), 1)
            whole = item_share >= 0.5 or (text_share >= 0.5 and len(of_text) >= decontaminate.TEXT_RUN)
            if shared:
                found[name] = (whole, item_share, text_share)
        (hit,) = check(items, text)
        assert (hit is None) == (not found)
        if hit:
            assert (hit.contaminated, hit.item_share, hit.text_share) == pytest.approx(max(found.values()))
            assert found[hit.item] == max(found.values())
        seen.add(hit and hit.contaminated)
    assert seen == {None, True, False}  # every outcome was tried


def test_a_shared_phrase_is_listed_and_drops_nothing(tmp_path: Path) -> None:
    hit = only(index(tmp_path, c3=C3), planted("他却说，海上总有没带手机的人。"))
    assert (hit.contaminated, hit.item) == (False, "c3.json:1")
    assert 0 < hit.item_share < 0.05 and 0 < hit.text_share < 0.05


def test_a_piece_of_a_long_item_is_contaminated_but_a_short_one_is_not(tmp_path: Path) -> None:
    items = index(tmp_path, c3=[[[HARBOUR + BAMBOO + LOGIC], C3[0][1], "1"]])
    hit = only(items, BAMBOO)
    assert hit.contaminated and hit.item_share < decontaminate.SHARE and hit.text_share == 1.0
    hit = only(items, BAMBOO[:40])
    assert not hit.contaminated and hit.text_share == 1.0


@pytest.mark.parametrize("text", ["", "好", "，。！", "A", HARBOUR[:12], "\ud800", "\0" * 50])
def test_short_texts_touch_nothing(tmp_path: Path, text: str) -> None:
    assert check(index(tmp_path, c3=C3), text, HOST, text) == [None, None, None]
    assert check(index(tmp_path, c3=C3)) == []


def test_short_items_must_be_there_whole(tmp_path: Path) -> None:
    items = index(tmp_path, c3=[[["男：这把蓝色的雨伞是谁的？", "女：门口那位客人的。"], [], "1"]])
    assert only(items, planted("男：这把蓝色的雨伞是谁的？女：门口那位客人的。")).contaminated
    hit = only(items, planted("男：这把蓝色的雨伞是谁的？女：门口那位客"))
    assert not hit.contaminated and hit.item_share >= decontaminate.SHARE


def test_short_items_full_of_numbers_are_told_by_their_chinese(tmp_path: Path) -> None:
    passage = "男：一张票120元，两张235元，太贵了。女：我们改坐慢车去好了吧。"
    assert only(index(tmp_path, c3=[[[passage], [], "1"]]), planted(passage)).item_share == 1.0


def test_many_questions_on_one_passage_are_one_item(tmp_path: Path) -> None:
    many = [logiqa(HARBOUR) | {"question": f"第{i}问"} for i in range(2 * decontaminate.COMMON)]
    assert only(index(tmp_path, many=[logiqa(LOGIC), *many]), planted(HARBOUR))[:3] == (True, "many.json:2", 1.0)


def test_items_that_share_a_passage_in_part(tmp_path: Path) -> None:
    items = index(tmp_path, two=[logiqa(HARBOUR + BAMBOO), logiqa(HARBOUR + LOGIC)])
    for line, rest in ((1, BAMBOO), (2, LOGIC)):
        assert only(items, planted(HARBOUR + rest))[:3] == (True, f"two.json:{line}", 1.0)


def test_stems_tell_nothing_beside_a_passage(tmp_path: Path) -> None:
    items = index(tmp_path, c3=C3, logiqa=logiqa(LOGIC))
    assert check(items, planted(STEM), f"{HOST}\n{STEM}？", STEM * 9) == [None, None, None]


def test_phrasing_that_many_items_share_tells_none_of_them(tmp_path: Path) -> None:
    bodies = [f"{'子丑寅卯辰巳午未申酉戌亥'[i % 12]}地出产的{'铜铁锡'[i // 12]}器以雕花细密著称于世" for i in range(36)]
    questions = [{"question": f"{STEM}：{body}", "A": "甲", "B": "乙", "answer": "A"} for body in bodies]
    few = decontaminate.COMMON
    assert only(index(tmp_path / "few", e=questions[:few]), planted(STEM)).contaminated  # nothing says it is a phrase
    items = index(tmp_path / "many", e=questions)
    assert check(items, planted(STEM)) == [None]
    for line, question in enumerate(questions, 1):
        assert only(items, planted(question["question"])).item == f"e.json:{line}"


def test_options_tell_a_passage_that_is_too_short(tmp_path: Path) -> None:
    options = ["所有去过北岸的渔民都见过那座白色的灯塔", "有些没有去过北岸的渔民也听说过那座灯塔"]
    items = index(tmp_path, logiqa=logiqa("渔民们都说北岸有一座灯塔。", options))
    assert only(items, planted("\n".join(["渔民们都说北岸有一座灯塔。", *options]))).contaminated
    assert check(items, planted("渔民们都说北岸有一座灯塔。")) == [None]
    long = index(tmp_path / "long", logiqa=logiqa(LOGIC, options))
    assert check(long, planted(options[0])) == [None]  # LOGIC tells it by itself


def test_english_takes_more_than_a_few_words(tmp_path: Path) -> None:
    items = index(tmp_path, english=[logiqa(ENGLISH)], c3=C3)
    words = "one hundred and twenty steps every"
    assert len(words.replace(" ", "")) < decontaminate.OTHER
    assert check(items, planted(words), f"{words}. {words.title()}!") == [None, None]
    touches = only(
        items, "We walked up one hundred and twenty steps every evening to polish the thing." + "Then rest. " * 9
    )
    assert (touches.contaminated, touches.item) == (False, "english.json:1")


def test_an_instruction_does_not_tell_the_english_text_below_it(tmp_path: Path) -> None:
    order = "阅读下面的短文，从每题所给的四个选项中选出最佳的一项填入空白处，并在答题卡上将该项涂黑，每空只能选一项。\n"
    items = index(tmp_path, exam=[{"inputs": order + ENGLISH, "targets": "B"}])
    assert not only(items, planted(order + "Bees dance. " * 40)).contaminated
    assert only(items, planted(order + ENGLISH)).contaminated
    assert only(items, planted(ENGLISH)).contaminated


QUESTION = "下列有关海边灯塔历史的叙述当中，哪一项与地方志所记载的修建年代不相符合？"
ROW = [QUESTION, "始建于明代", "重修于清代", "毁于一场台风", "由渔民集资", "C"]
LAYOUTS = {
    "ceval": "\n".join(map(",".join, [["id", "question", *"ABCD", "answer"], ["0", *ROW]])),
    "cmmlu": "\n".join(map(",".join, [["", "Question", *"ABCD", "Answer"], ["0", *ROW]])),
    "mmlu": "\n".join(",".join([q, *ROW[1:]]) for q in [QUESTION, '"How many, if any?"', *BAMBOO.split("，")]),
    "choices": [{"question": ROW[0], "choices": ROW[1:5], "answer": 2}],
    "arc": [{"id": "x", "question": {"stem": ROW[0], "choices": [{"text": ROW[1], "label": "A"}]}, "answerKey": "A"}],
    "hub": [{"question": ROW[0], "choices": {"text": ROW[1:5], "label": list("ABCD")}, "answerKey": "C"}],
    "alpaca": [{"instruction": ROW[0], "input": "", "output": "丙"}],
    "unanswered": [{"instruction": ROW[0], "input": "", "output": ""}],
    "messages": {"messages": [{"role": "user", "content": ROW[0]}, {"role": "assistant", "content": "丙"}]},
    "unknown": [{"topic": {"body": [ROW[0]]}, "n": 3, "x": None}],
    "plain": QUESTION,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_files_of_any_layout(tmp_path: Path, layout: str) -> None:
    hit = only(index(tmp_path, **{layout: LAYOUTS[layout]}), planted(QUESTION))
    assert hit.contaminated and hit.item.startswith(f"{layout}.json:") and hit.item_share > 0.9


def test_names_lead_to_the_item(tmp_path: Path) -> None:
    law = [
        write(tmp_path / set_ / "dev" / "law.json", value) for set_, value in (("a", C3), ("b", [logiqa(LOGIC)] * 3))
    ]
    other = write(tmp_path / "b" / "more.json", [logiqa(ENGLISH), logiqa(HARBOUR)])
    decontaminate.build([*law, other, law[0]], tmp_path / "items.bin", "x")
    hits = check(Items.open(tmp_path / "items.bin"), HARBOUR, BAMBOO, LOGIC, ENGLISH)
    names = [hit and hit.item for hit in hits]  # of items that are there several times, the first
    assert names == ["a/dev/law.json:1", "a/dev/law.json:2", "b/dev/law.json:1", "more.json:1"]


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    lines = [json.dumps(logiqa(text), ensure_ascii=False) for text in (LOGIC, HARBOUR)]
    hits = check(index(tmp_path, dev="\n\n".join(["", *lines, ""])), LOGIC, HARBOUR)
    assert [hit and hit.item for hit in hits] == ["dev.json:3", "dev.json:5"]


BROKEN = {
    "empty": ("", "empty.json: holds no evaluation items"),
    "blank": ("\n \n", "blank.json: holds no evaluation items"),
    "no_items": ("[]", "no_items.json: holds no evaluation items"),
    "short": (["短", "也短"], "no item of short.json is long enough"),
    "torn": ("\n".join([json.dumps(logiqa(LOGIC))] * 3 + ['{"text": "半', ""]), "torn.json:4: bad_json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_files_are_the_users_mistake(tmp_path: Path, name: str) -> None:
    value, message = BROKEN[name]
    with pytest.raises(UserError) as e:
        index(tmp_path, **{name: value})
    assert str(e.value).startswith("conf.yaml: decontaminate: ") and message in str(e.value)
    assert not (tmp_path / "items.bin").exists()


def test_a_file_that_is_taken_for_one_long_text_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index(tmp_path, prose="\n".join(HOST.replace("第", f"第{i}") for i in range(4)), c3=C3)
    assert "prose.json: was read as one text" in (said := capsys.readouterr().err) and "c3.json: was" not in said


def test_a_missing_file_and_a_foreign_index_are_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="x: .*nowhere.json: can't be read"):
        decontaminate.build([str(tmp_path / "nowhere.json")], tmp_path / "items.bin", "x")
    for content in ("1", "no index at all, but long enough to hold the lengths of all arrays" * 9):
        write(tmp_path / "foreign.bin", content)
        with pytest.raises(UserError, match="foreign.bin: no index"):
            Items.open(tmp_path / "foreign.bin")


def test_the_index_is_a_function_of_the_files(tmp_path: Path) -> None:
    files = [write(tmp_path / "c3.json", C3), write(tmp_path / "dev.json", [logiqa(LOGIC), logiqa(ENGLISH)])]
    one, two, three = tmp_path / "one.bin", tmp_path / "two.bin", tmp_path / "three.bin"
    assert decontaminate.build(files, one, "x") == decontaminate.build(files, two, "y")
    assert one.read_bytes() == two.read_bytes()
    write(tmp_path / "dev.json", [logiqa(LOGIC), logiqa(ENGLISH.replace("old", "new"))])
    assert decontaminate.build(files, three, "x") != decontaminate.build(files[:1], two, "x")
    assert one.read_bytes() != three.read_bytes()


def test_the_size_of_batches_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"c3": C3, "logiqa": [logiqa(LOGIC), logiqa(ENGLISH), logiqa(FORMULA)]}
    items = index(tmp_path / "one", **values)
    texts = [HOST, HARBOUR, "", planted(BAMBOO), LOGIC[:30], ENGLISH, "好", planted(FORMULA), HARBOUR + LOGIC, HARBOUR]
    hits = check(items, *texts)
    assert sum(hit is not None for hit in hits) == 7
    for size in (1, 2, 3):
        assert [h for i in range(0, len(texts), size) for h in check(items, *texts[i : i + size])] == hits
    monkeypatch.setattr(decontaminate, "_BATCH_CHARS", 1)
    index(tmp_path / "two", **values)
    assert (tmp_path / "one" / "items.bin").read_bytes() == (tmp_path / "two" / "items.bin").read_bytes()


def test_the_bitmap_only_saves_work(tmp_path: Path) -> None:
    items = index(tmp_path, c3=C3, logiqa=[logiqa(LOGIC), logiqa(ENGLISH)])
    texts = [HOST, HARBOUR, planted(BAMBOO), LOGIC[:30], ENGLISH]
    hits = check(items, *texts)
    arrays = dict(items._arrays)
    arrays["bitmap"] = np.full_like(arrays["bitmap"], 255)  # every n-gram collides
    assert check(Items(arrays), *texts) == hits


def test_what_is_contaminated_is_named_before_what_is_touched(tmp_path: Path) -> None:
    short = "渔民们都说北岸有一座白色的灯塔。"
    items = index(tmp_path, long=[logiqa(HARBOUR + LOGIC + BAMBOO)], short=[logiqa(short)])
    text = LOGIC + short[:-2]
    hit = only(items, text)
    assert (hit.contaminated, hit.item) == (True, "long.json:1")  # for its text_share
    touched = only(items, HOST + short[:-2])
    assert (touched.contaminated, touched.item) == (False, "short.json:1") and touched.item_share > hit.item_share


EVALS = ("c3/c3-m-dev.json", "c3/c3-d-dev.json", "logiqa_v2/dev_zh.txt")


@pytest.fixture(scope="module")
def real_items(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Items:
    out = tmp_path_factory.mktemp("items") / "items.bin"
    decontaminate.build([str(real_data / name) for name in EVALS], out, "x")
    return Items.open(out)


def texts_of(path: Path) -> list[str]:
    texts = []
    for span in read.spans_of(path, "auto", 1 << 30):
        for record in read.records(span, "auto"):
            assert isinstance(record, read.Record)
            examples = sources.examples_of(record.value, sources.Reading())
            parts = [[e.text] if isinstance(e, Text) else [text for _, text in e.messages] for e in examples]
            texts.append("\n".join(text for part in parts for text in part))
    return texts


def test_real_passages_are_found_in_real_articles(real_data: Path, real_items: Items) -> None:
    rng = random.Random(1)
    hosts = [text for text in texts_of(real_data / "wiki2019zh" / "relaid_cmrc2018.jsonl") if len(text) > 400]
    c3 = [record for name in EVALS[:2] for record in json.loads((real_data / name).read_text())]
    lines = (real_data / EVALS[2]).read_text().split("\n")
    passages = ["\n".join(record[0]) for record in c3] + [json.loads(line)["text"] for line in lines if line]
    passages = [passage for passage in passages if len(passage) >= 40]  # shorter ones may need their options
    assert len(passages) > 3500
    texts = []
    for passage in passages:
        host = rng.choice(hosts)
        at = rng.randrange(len(host))
        texts.append(host[:at] + FORMS[rng.choice(list(FORMS))](passage) + host[at:])
    missed = [
        passage
        for start in range(0, len(texts), 256)
        for passage, hit in zip(passages[start:], check(real_items, *texts[start : start + 256]), strict=False)
        if not (hit and hit.contaminated)
    ]
    assert missed == []
    assert not any(hit and hit.contaminated for hit in check(real_items, *hosts))


def test_real_training_files_lose_what_they_share_and_no_more(real_data: Path, real_items: Items) -> None:
    expected = {  # (records that touch an item, records that hold one)
        "c3/c3-m-train.json": (20, 1),
        "c3/c3-d-train.json": (14, 0),
        "logiqa_v2/train_zh.relaid_from_v1.txt": (0, 0),
        "coig_schema/exam_instructions.jsonl": (3, 0),
    }
    for name, counts in expected.items():
        hits = [hit for hit in check(real_items, *texts_of(real_data / name)) if hit]
        assert (len(hits), sum(hit.contaminated for hit in hits)) == counts, name
        if counts[1]:
            assert max(hits).item == "c3-m-dev.json:927"
