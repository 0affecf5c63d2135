"""Scoring: texts that begin alike run as one tree, with the results of plain Transformers, one text at a time."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_equalities import ARCHITECTURES, SHAPE, VOCABULARY
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pandallm import demo, tokenizer
from pandallm.evaluate import score, tasks
from pandallm.evaluate.tasks import Question
from pandallm.model import generate, load, trees

DEMO = demo.ROOT / "eval"


@pytest.fixture(scope="module")
def tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = load.resolve("tiny")
    return load.load(folder, torch.float32).eval(), tokenizer.load(folder)


def alike(seed: int = 0) -> list[list[int]]:
    """Three passages with five endings each, texts of their own, one that ends within another, one twice."""
    rng = random.Random(seed)

    def some(n: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(n)]

    texts = [passage + some(rng.randrange(1, 12)) for passage in map(some, (40, 25, 60)) for _ in range(5)]
    texts += [some(3), some(17), texts[0][:-1], texts[7]]
    rng.shuffle(texts)
    return texts


def one_by_one(
    model: PreTrainedModel, texts: list[list[int]], wanted: list[list[tuple[int, int]]]
) -> list[list[float]]:
    """Log-likelihoods of (position, token) pairs by the whole logits of one text."""
    found = []
    for ids, pairs in zip(texts, wanted, strict=True):
        with torch.inference_mode():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append([float(log_p[position, token]) for position, token in pairs])
    return found


@pytest.mark.parametrize(("model_type", "extra"), ARCHITECTURES)
@pytest.mark.parametrize("budget", [1, 300, 10**6])
def test_trees_are_the_texts_alone(model_type: str, extra: dict[str, Any], budget: int) -> None:
    config = {"model_type": model_type, **SHAPE, **extra}
    model = load.from_scratch(config, VOCABULARY, seed=1, attention="sdpa").eval()
    texts = alike()
    wanted = [[(len(ids) - 1, 7), (len(ids) // 2, 3), (len(ids) - 1, 9), (0, 1)] for ids in texts]
    expected = one_by_one(model, texts, wanted)
    for got, values in zip(score.log_likelihoods(model, texts, wanted, budget), expected, strict=True):
        assert got == pytest.approx(values, abs=1e-5)


def test_trees_hold_what_is_shared_once() -> None:
    texts = alike()
    grown = trees.grow(texts)
    assert sorted(number for tree in grown for number in tree.paths) == list(range(len(texts)))
    for tree in grown:
        for number, path in tree.paths.items():
            assert [tree.ids[place] for place in path] == texts[number]
            assert [tree.positions()[place] for place in path] == list(range(len(path)))
            seen = tree.mask(len(tree.ids) + 2)[path]
            assert all(seen[depth].nonzero().flatten().tolist() == path[: depth + 1] for depth in range(len(path)))
    assert len(grown) == 5 and sum(len(tree.ids) for tree in grown) < sum(map(len, texts)) / 3
    assert len(trees.grow(texts, share=False)) == len(texts)


def test_trees_do_not_grow_without_end() -> None:
    """A long common beginning, as of examples before every question: many trees, the beginning in each."""
    beginning = list(range(300))
    texts = [[*beginning, 1000 + i, *range(2000, 2060)] for i in range(50)]
    grown = trees.grow(texts)
    assert len(grown) > 1 and all(len(tree.ids) <= trees.ROOM for tree in grown)
    assert sum(len(tree.ids) for tree in grown) == 300 * len(grown) + 61 * 50


@pytest.mark.parametrize("chat_format", ["none", "panda", "chatml"])
def test_cloze_is_transformers_one_by_one(
    tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase], chat_format: str
) -> None:
    model, words = tiny[0], tokenizer.load(load.resolve("tiny"))
    score.use_format(words, chat_format)
    questions = [*tasks.load("c3-m", DEMO, "dev")[:4], *tasks.load("logiqa-v2", DEMO, "dev")[:2]]
    bare = [Question(q.task, q.id, q.context, q.question, (), 0) for q in questions]
    prompts = [score.build_prompt(words, chat_format, q, "original", 4000) for q in bare]
    assert not any(option in p.text for p, q in zip(prompts, questions, strict=True) for option in ["Options", "A:"])
    lead = score.answer_lead(words, chat_format)
    for budget in (1, 10**6):
        answers = score.cloze(model, words, questions, prompts, chat_format, budget)
        for question, asked, answer in zip(questions, prompts, answers, strict=True):
            expected = []
            for option in question.options:
                ids = words(asked.text + lead + option, add_special_tokens=chat_format == "none")["input_ids"]
                own = len(asked.ids)
                assert ids[:own] == asked.ids
                pairs = [(i - 1, ids[i]) for i in range(own, len(ids))]
                expected.append(sum(one_by_one(model, [ids], [pairs])[0]))
            assert answer.log_likelihoods == pytest.approx(expected, abs=1e-4)
            assert answer.pred == expected.index(max(expected))
            by_length = [value / len(option) for value, option in zip(expected, question.options, strict=True)]
            assert answer.second == by_length.index(max(by_length))


def test_cloze_does_not_choose_what_has_no_text(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, words = tiny[0], tokenizer.load(load.resolve("tiny"))
    for chat_format in ("none", "chatml"):
        score.use_format(words, chat_format)
        for options in (("", "雨"), ("雨", ""), ("雨", " ")):
            question = Question("c3-d", "1", "天黑了。", "怎么了？", options, 0)
            asked = score.ask(words, chat_format, question, "original", "cloze", 2048)
            (answer,) = score.cloze(model, words, [question], [asked], chat_format, 4096)
            assert answer.output == "雨" and answer.second == answer.pred == options.index("雨")


@pytest.mark.parametrize(
    ("output", "n_options", "index"),
    [
        ("B", 4, 1),
        ("Answer: B", 4, 1),
        ("答案是C。", 4, 2),
        ("（Ｄ）", 4, 3),
        ("A cat", 4, 0),
        ("Cats and Dogs", 4, None),
        ("ABCD", 4, None),
        ("C", 2, None),
        ("选项 D 或 B", 3, 1),
        ("25℃，选B", 4, 1),
        ("30 °C", 4, None),
        ("Ⓒ不算，Ｂ算", 4, 1),
        ("３Ａ", 4, None),
        ("b", 4, None),
        ("", 4, None),
    ],
)
def test_parse_strict(output: str, n_options: int, index: int | None) -> None:
    assert tasks.parse_strict(output, n_options) == index


def test_stopping_early_changes_no_answer(
    tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that favours letters and signs makes the tiny model write answers of every kind."""
    words = tiny[1]
    model = load.load(load.resolve("tiny"), torch.float32).eval()
    favoured = [i for text in "ABCD 是。x\n：" for i in words(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        model.get_output_embeddings().weight[favoured] *= 2
    questions = tasks.load("c3-m", DEMO, "dev") + tasks.load("logiqa-v2", DEMO, "dev")
    prompts = [score.build_prompt(words, "none", q, "original", 4000) for q in questions]
    short = score.generate(model, words, questions, prompts, 4096)
    real = generate.greedy_batch
    monkeypatch.setattr(generate, "greedy_batch", lambda *args: real(*args[:-1]))  # `enough` is the last
    whole = score.generate(model, words, questions, prompts, 4096)
    assert [(a.pred, a.second) for a in short] == [(a.pred, a.second) for a in whole]
    assert all(b.output.startswith(a.output) for a, b in zip(short, whole, strict=True))
    assert sum(len(a.output) < len(b.output) for a, b in zip(short, whole, strict=True)) >= 5


@pytest.mark.parametrize(
    "written", ["答案是Ｂ。即选项B", "水在100℃沸腾，所以选B", "选C。不，选A", "Bob says A", "没有"]
)
def test_a_text_ends_where_both_readings_are_settled(
    tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    """Token by token: the answers are those of the whole text, though one reading is settled before the other."""
    words = tiny[1]

    def write(*args: Any) -> list[list[int]]:
        ids, enough = words(written, add_special_tokens=False)["input_ids"], args[-1]
        ends = (n for n in range(1, len(ids)) if enough(0, ids[:n]))
        return [ids[: next(ends, len(ids))]]

    monkeypatch.setattr(generate, "greedy_batch", write)
    for options in (("甲", "乙"), ("甲", "乙", "丙", "丁")):
        question = Question("c3-m", "1", "", "？", options, 1)
        (answer,) = score.generate(tiny[0], words, [question], [score.Prompt("", [])], 4096)
        n = len(options)
        assert (answer.pred, answer.second) == (tasks.parse_letter(written, n), tasks.parse_strict(written, n))


@pytest.mark.slow
def test_real_questions_one_by_one(real_data: Path) -> None:
    """200 real questions with 2, 3 and 4 options on the real model, fp32: batched and shared = one by one, and the
    same predictions for any budget."""
    folder = load.resolve("smollm2-135m")
    model, words = load.load(folder, torch.float32).eval(), tokenizer.load(folder)
    questions: list[Question] = []
    for task, n in (("c3-m", 120), ("c3-d", 40), ("logiqa-v2", 40)):
        questions += tasks.load(task, real_data, "dev")[:n]
    assert {len(q.options) for q in questions} == {2, 3, 4}
    prompts = [score.build_prompt(words, "none", q, "original", 1900) for q in questions]
    expected = []
    for question, asked in zip(questions, prompts, strict=True):
        wholes = [words(f"{asked.text} {'ABCD'[i]}")["input_ids"] for i in range(len(question.options))]
        before = wholes[0][:-1]
        assert all(whole[:-1] == before for whole in wholes)
        pairs = [(i - 1, before[i]) for i in range(len(asked.ids), len(before))]
        values = one_by_one(model, [before], [pairs + [(len(before) - 1, whole[-1]) for whole in wholes]])[0]
        expected.append([sum(values[: len(pairs)]) + value for value in values[len(pairs) :]])
    worst = 0.0
    for budget in (1024, 2048, 8192, 65536):
        answers = score.choice(model, words, questions, prompts, "none", budget)
        for answer, values in zip(answers, expected, strict=True):
            worst = max(worst, *(abs(a - b) for a, b in zip(answer.log_likelihoods, values, strict=True)))
            assert answer.pred == values.index(max(values))
    print(f"largest difference {worst:.1e} nats")
    assert worst < 1e-4


@pytest.mark.slow
def test_real_questions_are_written_as_by_transformers(real_data: Path) -> None:
    """The real model, fp32: what is written for questions that share passages, token for token."""
    folder = load.resolve("smollm2-135m")
    model, words = load.load(folder, torch.float32).eval(), tokenizer.load(folder)
    questions = [q for task in ("c3-m", "c3-d", "logiqa-v2") for q in tasks.load(task, real_data, "dev")[:8]]
    prompts = [score.build_prompt(words, "none", q, "original", 1900).ids for q in questions]
    ends = generate.stop_ids(model.generation_config, words)
    written = generate.greedy_batch(model, prompts, score.MAX_NEW_TOKENS, ends, 4096)
    for ids, ours in zip(prompts, written, strict=True):
        whole = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=score.MAX_NEW_TOKENS,
            eos_token_id=sorted(ends),
            pad_token_id=words.eos_token_id,
        )
        theirs = whole[0, len(ids) :].tolist()
        assert ours == (theirs[:-1] if theirs[-1] in ends else theirs)
