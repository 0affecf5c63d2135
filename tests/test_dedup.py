"""Duplicates: what counts as one, who stays, and that neither parts nor memory limits change the result."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pandallm.data import dedup, ngrams
from pandallm.prompt import Dialogue, Example, Text

ARTICLE = (
    "江南的春天来得很早，正月还没有过完，河边的柳树就已经冒出嫩绿的新芽。清晨的雾气还没有散去，卖豆腐的老人挑着担子从石桥上走过，"
    "木板在他脚下吱呀作响。孩子们背着书包跑过小巷，惊起一群正在觅食的麻雀。到了中午，太阳照在青石板路上，家家户户把被子抱出来晾晒，"
    "空气里满是棉花和阳光的味道。傍晚时分，渔船陆续靠岸，妇人们提着篮子等在码头，讨价还价的声音一直传到镇子的另一头。"
)
OTHER = (
    "高原上的铁路修了整整五年，工人们在缺氧的环境里打通了十几座隧道。冬天气温降到零下三十度，混凝土必须用棉被裹起来保温，"
    "否则还没有凝固就会冻裂。负责测量的年轻人每天要爬上山脊校准仪器，常常走到半路就喘不上气来。通车那天，沿线的牧民穿着节日的盛装，"
    "骑着马赶来看第一列火车，有人献上洁白的哈达，有人唱起古老的歌谣。"
)
COMMON = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定"
)
Sketches = NDArray[np.uint8]


def sketch(*texts: str) -> Sketches:
    return dedup.sketches(ngrams.units(texts), len(texts))


def changed(text: str, share: float, seed: int = 0) -> str:
    """`text` with a share of its characters replaced by random ones."""
    rng = random.Random(seed)
    chars = list(text)
    for i in rng.sample(range(len(chars)), round(share * len(chars))):
        chars[i] = rng.choice(COMMON)
    return "".join(chars)


def texts_of(count: int, seed: int = 0) -> list[str]:
    """Random texts of 200 characters, of which every fifth is a changed copy of an earlier one."""
    rng = random.Random(seed)
    texts: list[str] = []
    for i in range(count):
        again = i % 5 == 4
        texts.append(changed(rng.choice(texts), 0.05, i) if again else "".join(rng.choices(ARTICLE + OTHER, k=200)))
    return texts


def run_near(folder: Path, sketches: Sketches, sizes: list[int], keep: NDArray[np.bool_] | None = None) -> list[int]:
    """near() with the sketches cut up into parts of these sizes."""
    paths, at = [], 0
    for i, size in enumerate(sizes):
        paths.append(folder / f"{i}.bin")
        sketches[at : at + size].tofile(paths[-1])
        at += size
    assert at == len(sketches)
    return dedup.near(paths, sizes, np.ones(at, bool) if keep is None else keep).tolist()


def by_hand(sketches: Sketches) -> list[int]:
    """Every record against every earlier one that stays."""
    like: list[int] = []
    for i in range(len(sketches)):
        stay = [j for j in range(i) if like[j] < 0 and sketches[j].any()]
        similar = dedup.alike(np.repeat(sketches[i : i + 1], len(stay), axis=0), sketches[stay])
        like.append(stay[int(similar.argmax())] if sketches[i].any() and similar.any() else -1)
    return like


# Exact duplicates


def talk(question: str, answer: str) -> list[Example]:
    return [Dialogue((("user", question), ("assistant", answer)))]


def test_key_is_of_the_content_white_space_aside() -> None:
    assert dedup.key(talk("你好 吗", "好")) == dedup.key(talk("你好\n\n  吗 ", " 好\r\n"))
    assert len(dedup.key([Text("")])) == 16
    records = [
        talk("你好", "好"),
        talk("你", "好好"),
        talk("好", "你好"),
        [Text("你好\n好")],
        [*talk("你好", "好")] * 2,
        [],
    ]
    assert len({dedup.key(record) for record in records}) == len(records)


def test_keys_survive_numpy_strings() -> None:
    keys = [dedup.key([Text(str(i))]) for i in range(2000)]
    assert np.array(keys, "S16").tolist() == keys


def test_text_of_holds_all_turns() -> None:
    examples: list[Example] = [Text("甲"), Dialogue((("system", "乙"), ("user", "丙"), ("assistant", "丁")))]
    assert dedup.text_of(examples) == "甲\n乙\n丙\n丁"
    assert dedup.text_of([]) == ""


def random_keys(count: int, kinds: int, seed: int = 0) -> NDArray[np.bytes_]:
    rng = np.random.default_rng(seed)
    return np.array([dedup.key([Text(str(i))]) for i in rng.integers(0, kinds, count)], "S16")


def first_ones(keys: NDArray[np.bytes_]) -> list[bool]:
    seen: set[bytes] = set()
    return [not (key in seen or seen.add(key)) for key in keys.tolist()]  # type: ignore[func-returns-value]


@pytest.mark.parametrize("limit", [1 << 21, 100, 7])
def test_exact_keeps_the_first_of_each_whatever_the_parts_and_limits(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(dedup, "SORTED", limit)
    keys = random_keys(1000, 400)
    wanted = first_ones(keys)
    assert 300 < sum(wanted) < 400
    for borders in ([], [500], [0, 1, 1, 999, 1000]):
        assert dedup.exact(np.split(keys, borders)).tolist() == wanted


def test_exact_compares_all_of_a_key() -> None:
    halves = [b"\xff" * 8, b"\xee" * 8, b"\xdd" * 8]
    keys = np.array([a + b for a in halves for b in halves] * 2, "S16")
    assert dedup.exact([keys]).tolist() == [True] * 9 + [False] * 9
    mixed = keys[[0, 3, 0, 1, 2, 1, 0]]  # equal first halves, in an order that isn't that of the second
    assert dedup.exact([mixed]).tolist() == first_ones(mixed)


def test_exact_reads_fields_of_records() -> None:
    records = np.zeros(6, [("line", "<u4"), ("key", "S16")])
    records["key"] = random_keys(6, 3)
    assert dedup.exact([records["key"]]).tolist() == first_ones(records["key"].copy())


def test_exact_of_nothing() -> None:
    assert dedup.exact([]).tolist() == []
    assert dedup.exact([np.empty(0, "S16")] * 2).tolist() == []


# Sketches


def test_a_batch_has_the_sketches_of_its_texts() -> None:
    texts = [ARTICLE, "", OTHER, "短", changed(ARTICLE, 0.1), ARTICLE[:40], "abc " * 50, "12345 " * 30]
    assert np.array_equal(sketch(*texts), np.concatenate([sketch(text) for text in texts]))
    assert sketch(*texts).shape == (len(texts), dedup.K)


def test_no_sketch_for_what_is_too_short() -> None:
    enough = ARTICLE.replace("，", "").replace("。", "")[: dedup.SHORTEST]
    assert sketch(enough).any()
    assert not sketch("", "！？" * 100, enough[:-1], enough[:-1] + "。" * 9).any()
    assert dedup.sketches(ngrams.units([]), 0).shape == (0, dedup.K)


def test_punctuation_width_and_case_dont_count() -> None:
    text = ARTICLE + "ABC 2024"
    assert np.array_equal(
        sketch(text), sketch(text.replace("，", "\n").replace("ABC", "ａｂＣ").replace("2024", "２０２４"))
    )


@pytest.mark.parametrize(
    "text", [ARTICLE, OTHER, "The committee met on Tuesday to discuss the new harbour. " * 2 + OTHER]
)
def test_values_tell_an_empty_slot(text: str) -> None:
    assert sketch(text)[0, : dedup.K - dedup.DIGIT_SLOTS].all()  # 0 is for no sketch
    assert not sketch(text)[0, dedup.K - dedup.DIGIT_SLOTS :].any()  # no digits


def alike(a: str, b: str) -> bool:
    return bool(dedup.alike(sketch(a), sketch(b))[0])


def test_copies_are_alike_and_others_are_not() -> None:
    for text in (ARTICLE, OTHER):
        for seed in range(50):
            assert alike(text, changed(text, 0.05, seed))
        assert not any(alike(text, changed(text, 0.4, seed)) for seed in range(50))
    assert sum(alike(ARTICLE, changed(ARTICLE, 0.1, seed)) for seed in range(100)) >= 97
    assert not alike(ARTICLE, OTHER)
    assert alike(ARTICLE, "转载：" + ARTICLE + "（完）")


def test_siblings_are_not_alike() -> None:
    question = "请用不超过一百个字介绍下面这座城市的地理位置、气候特点和主要的旅游景点，语言要通顺，内容要真实。"
    north = "哈尔滨在黑龙江省南部，冬天漫长寒冷，冰雪大世界和中央大街吸引着来自全国各地的游客。"
    south = "三亚位于海南岛最南端，全年温暖如夏，亚龙湾的沙滩与蜈支洲岛的海水最受欢迎。"
    assert not alike(f"{question}\n{north}", f"{question}\n{south}")  # another answer
    assert not alike(f"{ARTICLE}\n{north * 2}", f"{ARTICLE}\n{south * 2}")
    assert not alike(f"{question}{north}{ARTICLE[:120]}", f"{OTHER[:90]}{ARTICLE[:120]}")  # another question


def test_other_numbers_make_another_record() -> None:
    problem = "水果店上午卖出苹果{}千克，下午比上午多卖出{}千克，每千克售价{}元，请问全天一共收入多少元？要求写出过程。"
    one, two = problem.format(48, 17, 6), problem.format(35, 29, 8)
    assert not alike(one, two)
    assert alike(one, problem.replace("请问", "那么").format(48, 17, 6))
    assert alike(one, problem.format(48, 17, 5))  # one of them may be mistyped


# Near-duplicates


def test_near_is_what_comparing_all_with_all_finds(tmp_path: Path) -> None:
    sketches = sketch(*texts_of(300))
    found = run_near(tmp_path, sketches, [300])
    assert found == by_hand(sketches)
    assert sum(i >= 0 for i in found) >= 55


@pytest.mark.parametrize("sizes", [[100, 0, 200], [1] * 300, [0, 299, 1]])
def test_near_is_the_same_however_the_records_are_split(tmp_path: Path, sizes: list[int]) -> None:
    sketches = sketch(*texts_of(300, seed=1))
    assert run_near(tmp_path, sketches, sizes) == run_near(tmp_path, sketches, [300])


@pytest.mark.parametrize("limits", [(10, 1, 3), (64, 900, 50), (299, 1 << 25, 1)])
def test_near_is_the_same_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int, int]
) -> None:
    sketches = sketch(*texts_of(300, seed=2))
    wanted = run_near(tmp_path, sketches, [120, 180])
    for name, value in zip(("SORTED", "HELD", "COMPARED"), limits, strict=True):
        monkeypatch.setattr(dedup, name, value)
    assert run_near(tmp_path, sketches, [120, 180]) == wanted


def test_the_first_stays(tmp_path: Path) -> None:
    a, b, c = ARTICLE, changed(ARTICLE, 0.03, 1), changed(ARTICLE, 0.03, 2)
    for texts in ([a, OTHER, b, c], [c, OTHER, a, b], [b, OTHER, c, a]):
        assert run_near(tmp_path, sketch(*texts), [4]) == [-1, -1, 0, 0]


def test_equal_sketches_are_always_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    once = rng.integers(1, 256, (500, dedup.K), dtype=np.uint8)
    once[:2] = [[1], [255]]  # the lowest and highest hashes
    order = rng.permutation(1000) % 500
    first = {int(i): at for at, i in reversed(list(enumerate(order)))}
    wanted = [first[int(i)] if first[int(i)] != at else -1 for at, i in enumerate(order)]
    assert run_near(tmp_path, once[order], [400, 600]) == wanted


def chain() -> Sketches:
    """Each sketch is like the next, but not like the one after that."""
    rng = np.random.default_rng(3)
    rows = [rng.integers(1, 256, dedup.K, dtype=np.uint8)]
    for i in range(3):
        row = rows[-1].copy()
        moved = np.arange(dedup.K) // dedup.BAND % 4 == i  # whole bands, so that the others are found
        row[moved] = rng.integers(1, 256, int(moved.sum()), dtype=np.uint8)
        rows.append(row)
    return np.array(rows)


def test_dropped_only_for_one_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "ALIKE", 0.65)
    rows = chain()
    pairs = [[bool(dedup.alike(a[None], b[None])[0]) for b in rows] for a in rows]
    assert pairs[0][1] and pairs[1][2] and not pairs[0][2], "the chain isn't one"
    rows = np.concatenate([rows, rows[2:3]])
    found = run_near(tmp_path, rows, [5])
    assert found == [-1, 0, -1, 2, 2]  # 2 is like 1, which is gone


def test_found_behind_a_sibling_that_shares_every_band(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    last = slice((dedup.QUARTERS - 1) * dedup.SLOTS, dedup.QUARTERS * dedup.SLOTS)
    first, second = np.repeat(rng.integers(1, 256, (1, dedup.K), dtype=np.uint8), 2, axis=0)
    second[last] ^= 1 + rng.integers(0, 100, dedup.SLOTS, dtype=np.uint8) * 2  # a quarter is quite another
    third = second.copy()
    third[last][:: dedup.BAND] ^= 1  # like the second, but for one value in each band of that quarter
    third[third == 0] = 7
    assert run_near(tmp_path, np.array([first, second, third]), [3]) == [-1, -1, 1]


def test_what_is_out_already_takes_nobody_along(tmp_path: Path) -> None:
    texts = [ARTICLE, ARTICLE, changed(ARTICLE, 0.03), OTHER, OTHER]
    keep = np.array([True, False, True, False, True])
    assert run_near(tmp_path, sketch(*texts), [5], keep) == [-1, -1, 0, -1, -1]


def test_short_records_stay(tmp_path: Path) -> None:
    assert run_near(tmp_path, sketch("好的。", "好的。", "", "", "你好，请问有什么可以帮您？"), [5]) == [-1] * 5


def test_near_of_nothing(tmp_path: Path) -> None:
    nothing = np.empty((0, dedup.K), np.uint8)
    assert run_near(tmp_path, nothing, [0, 0]) == []
    assert dedup.near([], [], np.ones(0, bool)).tolist() == []


def test_real_copies_are_found(real_data: Path, tmp_path: Path) -> None:
    lines = (real_data / "raw" / "CLUECorpusSmall_sampled.even_lines.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in dict.fromkeys(lines) if len(line) >= 50]
    copies = [changed(line, 0.1, i) for i, line in enumerate(lines)]
    found = run_near(tmp_path, sketch(*lines, *copies), [len(lines)] * 2)
    assert sum(i >= 0 for i in found[: len(lines)]) <= 0.001 * len(lines) + 1
    assert np.mean([like == i for i, like in enumerate(found[len(lines) :])]) >= 0.95


def test_questions_on_one_passage_are_no_copies() -> None:
    """Each differs from the others in a line and an answer only; a changed copy of one is told all the same."""

    def asked(question: str, answer: str, passage: str = ARTICLE) -> list[Example]:
        return [Dialogue((("user", f"请阅读文章回答问题：{question}\n{passage}"), ("assistant", answer)))]

    records = [
        asked("卖豆腐的老人从哪里走过？", "石桥上"),
        asked("孩子们跑过小巷时惊起了什么？", "一群麻雀"),
        asked("渔船什么时候靠岸？", "傍晚时分"),
        asked("孩子们跑过小巷时惊起了什么？", "一群麻雀", changed(ARTICLE, 0.05)),
        asked("修铁路的人缺什么？", "氧气", OTHER),
    ]
    sketches = sketch(*map(dedup.compared, records))
    assert by_hand(sketches) == [-1, -1, -1, 1, -1]
    plain = [Text(ARTICLE)], asked("问？", OTHER), [Dialogue((("user", ARTICLE), ("assistant", "")))]
    assert [dedup.compared(record) for record in plain] == [dedup.text_of(record) for record in plain]
