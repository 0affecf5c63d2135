"""evaluate/: scores equal to plain Transformers, one text at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_questions import DIALOGUE, GOLDEN, LOGIC
from tokenizers import Tokenizer, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pandallm import demo, prompt, tokenizer
from pandallm.config import UserError
from pandallm.evaluate import score, tasks
from pandallm.evaluate.tasks import Question
from pandallm.model import load

DEMO = demo.ROOT / "eval"
BASE = {"split": "dev", "limit": 3, "data": DEMO, "model": "tiny", "protocols": ["generate"], "precision": "fp32"}


@pytest.fixture(scope="module")
def tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = load.resolve("tiny")
    return load.load(folder, torch.float32).eval(), tokenizer.load(folder)


def words_of_tiny(chat_format: str) -> PreTrainedTokenizerBase:
    words = tokenizer.load(load.resolve("tiny"))
    assert score.use_format(words, chat_format) == chat_format
    return words


def naive_choice(model: PreTrainedModel, words: PreTrainedTokenizerBase, text: str, letter: str, raw: bool) -> float:
    """Log-likelihood of `letter` after `text`, by the whole logits of plain Transformers, one sequence."""
    head = words(text, add_special_tokens=raw)["input_ids"]
    whole = words(text + letter, add_special_tokens=raw)["input_ids"]
    shared = 0
    while shared < len(head) and head[shared] == whole[shared]:
        shared += 1
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logits[i - 1, whole[i]]) for i in range(shared, len(whole)))


@pytest.mark.parametrize("chat_format", ["none", "panda", "chatml", "alpaca"])
def test_choice_is_transformers_one_by_one(
    tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase], chat_format: str
) -> None:
    model, words = tiny[0], words_of_tiny(chat_format)
    questions = [*tasks.load("c3-m", DEMO, "dev")[:5], *tasks.load("logiqa-v2", DEMO, "dev")[:2]]
    prompts = [score.build_prompt(words, chat_format, q, "original", 4000) for q in questions]
    assert score.answer_lead(words, chat_format) == (" " if chat_format in ("none", "panda") else "")
    expected = []
    for question, asked in zip(questions, prompts, strict=True):
        lead = " " if chat_format in ("none", "panda") else ""
        letters = ["A", "B", "C", "D"][: len(question.options)]
        expected.append([naive_choice(model, words, asked.text, lead + c, chat_format == "none") for c in letters])
    for budget in (1, 3000, 10**6):
        answers = score.choice(model, words, questions, prompts, chat_format, budget)
        for answer, values in zip(answers, expected, strict=True):
            assert answer.log_likelihoods == pytest.approx(values, abs=1e-4)
            assert answer.pred == int(np.argmax(values)) and answer.output == "ABCD"[answer.pred]


def test_choice_where_the_answer_joins_the_prompt(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    """A tokenizer without word borders, in which "： A" is one token, "： B" and "： C" three."""
    bpe = Tokenizer(tokenizer_models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], show_progress=False)
    bpe.train_from_iterator([*sorted(set("".join(GOLDEN.values()))), *["： A"] * 9], trainer)
    words = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    asked = score.build_prompt(words, "none", DIALOGUE, "original", 4000)
    assert words(asked.text + " A")["input_ids"][: len(asked.ids)] != asked.ids
    expected = []
    shared = min(len(_common(asked.ids, words(asked.text + f" {c}")["input_ids"])) for c in "ABC")
    for name in "ABC":
        ids = words(asked.text + f" {name}")["input_ids"]
        with torch.no_grad():
            logits = tiny[0](torch.tensor([ids])).logits[0].log_softmax(-1)
        expected.append(sum(float(logits[i - 1, ids[i]]) for i in range(shared, len(ids))))
    answer = score.choice(tiny[0], words, [DIALOGUE], [asked], "none", 4096)[0]
    assert answer.log_likelihoods == pytest.approx(expected, abs=1e-4)


def _common(a: list[int], b: list[int]) -> list[int]:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return a[:n]


def test_tails_refuse_what_has_no_letter() -> None:
    assert score._tails([1, 2, 3], [[1, 2, 3, 7], [1, 2, 9]]) == ([1, 2], [[3, 7], [9]])
    with pytest.raises(UserError):
        score._tails([1, 2], [[1, 2], [1, 2, 3]])
    with pytest.raises(UserError):
        score._tails([1, 2], [[5, 2], [1, 2, 3]])


def test_an_input_is_run_once(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, words = tiny
    asked = score.build_prompt(words, "none", LOGIC, "original", 4000)
    seen: list[int] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        score.choice(model, words, [LOGIC, LOGIC], [asked, asked], "none", 10**6)
    finally:
        hook.remove()
    assert sum(seen) <= len(asked.ids) + 1  # + 1: the blank before the letter, where it is a token of its own


def test_ties_go_to_the_first(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    flat = load.load(load.resolve("tiny"), torch.float32)
    with torch.no_grad():
        flat.get_output_embeddings().weight.zero_()
    asked = score.build_prompt(tiny[1], "none", LOGIC, "original", 4000)
    answer = score.choice(flat, tiny[1], [LOGIC], [asked], "none", 4096)[0]
    assert answer.pred == 0 and len(set(answer.log_likelihoods)) == 1


def test_prompt_ids_are_the_formats(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    raw = words_of_tiny("none")
    assert raw.chat_template is None and score.use_format(raw, None) == "none"
    asked = score.build_prompt(raw, "none", LOGIC, "original", 4000)
    assert asked.text == GOLDEN[LOGIC] and asked.ids == raw(GOLDEN[LOGIC])["input_ids"] and not asked.truncated
    with pytest.raises(UserError, match="no chat template"):
        score.use_format(raw, "model")
    chat = words_of_tiny("chatml")
    assert score.use_format(chat, None) == "model"
    asked = score.build_prompt(chat, "model", LOGIC, "original", 4000)
    assert asked.text == f"<|im_start|>user\n{GOLDEN[LOGIC]}<|im_end|>\n<|im_start|>assistant\n"
    assert asked.ids == prompt.render_prompt(chat, [{"role": "user", "content": GOLDEN[LOGIC]}])


@pytest.mark.parametrize("chat_format", ["none", "chatml"])
def test_a_long_context_is_cut_from_the_left(chat_format: str) -> None:
    words = words_of_tiny(chat_format)
    context = "".join(f"第{i}句。" for i in range(200))
    question = Question("c3-m", "9-0", context, "最后一句是第几句？", ("199", "200"), 0)
    whole = score.build_prompt(words, chat_format, question, "original", 10**6)
    assert not whole.truncated
    assert score.build_prompt(words, chat_format, question, "original", len(whole.ids)) == whole
    cut = score.build_prompt(words, chat_format, question, "original", 300)
    assert cut.truncated and 290 < len(cut.ids) <= 300
    before, _, after = whole.text.partition(context)
    assert cut.text.startswith(before) and cut.text.endswith(after)
    kept = cut.text[len(before) : len(cut.text) - len(after)]
    assert context.endswith(kept) and kept
    with pytest.raises(UserError, match="question 9-0"):
        score.build_prompt(words, chat_format, question, "original", 60)


def test_generate_reads_the_first_letter(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    """A model made to say one token after any prompt, again and again."""
    model = load.load(load.resolve("tiny"), torch.float32)
    words = tiny[1]
    asked = score.build_prompt(words, "none", LOGIC, "original", 4000)
    for text, pred in (("B", 1), ("好", None)):
        token = words(text)["input_ids"][0]
        model.get_output_embeddings().register_forward_hook(
            lambda module, args, output, token=token: torch.nn.functional.one_hot(
                torch.full(output.shape[:-1], token), output.shape[-1]
            ).float()
        )
        answer = score.generate(model, words, [LOGIC], [asked], 4096)[0]
        assert answer == score.Answer(words.decode([token] * 64), pred)


def naive_bits(model: PreTrainedModel, start: int, ids: list[int], window: int) -> float:
    """-log2 p of every token: each from the window that the rule gives it, by whole logits, one window a token."""
    total, sequence = 0.0, [start, *ids]
    begin = 0
    for i in range(1, len(sequence)):
        if i - begin > window:
            begin = i - 1 - window // 2
        with torch.no_grad():
            logits = model(torch.tensor([sequence[begin:i]])).logits[0, -1].double()
        total -= float(logits.log_softmax(-1)[sequence[i]]) / math.log(2)
    return total


def test_bits_per_character_is_the_sum_over_tokens(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, words = tiny
    texts = ["你好，世界。", "", "A short English text; 中文 mixed in. " * 3, "🐼", "山" * 30 + "水", "x"]
    ids = [words(text)["input_ids"] for text in texts if text]
    assert words.bos_token_id is None  # eos opens a text
    for window, budget in ((2048, 4096), (2048, 1), (16, 50), (7, 4096), (1, 10)):
        found = score.bits_per_character(model, words, texts, window=window, token_budget=budget)
        bits = sum(naive_bits(model, words.eos_token_id, x, window) for x in ids)
        assert found["bits"] == pytest.approx(bits, rel=1e-5)
        assert found["characters"] == sum(map(len, texts)) and found["tokens"] == sum(map(len, ids))
        assert found["bits_per_character"] == found["bits"] / found["characters"]
    with_bos = tokenizer.load(load.resolve("tiny"))
    with_bos.bos_token = "<|im_start|>"
    bits = sum(naive_bits(model, with_bos.bos_token_id, x, 2048) for x in ids)
    assert score.bits_per_character(model, with_bos, texts)["bits"] == pytest.approx(bits, rel=1e-5)
    with pytest.raises(UserError, match="empty"):
        score.bits_per_character(model, words, [""])


def test_bits_per_character_of_a_known_model(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    uniform = load.load(load.resolve("tiny"), torch.float32)
    with torch.no_grad():
        uniform.get_output_embeddings().weight.zero_()
    found = score.bits_per_character(uniform, tiny[1], ["一二三四五六七八九十"])
    assert found["bits_per_character"] == pytest.approx(found["tokens"] * math.log2(512) / 10)


def test_a_broken_model_has_no_score(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    broken = load.load(load.resolve("tiny"), torch.float32)
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(float("nan"))
    asked = score.build_prompt(tiny[1], "none", LOGIC, "original", 4000)
    with pytest.raises(UserError, match="finite"):
        score.choice(broken, tiny[1], [LOGIC], [asked], "none", 4096)
