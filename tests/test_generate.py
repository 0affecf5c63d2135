"""model/generate.py: batched greedy decoding is Transformers' own; streamed text is the decoding of all its tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pandallm import demo, prompt, tokenizer
from pandallm.config import UserError
from pandallm.model import load, trees
from pandallm.model.generate import Detokenizer, Sampling, batches, greedy_batch, pick, stop_ids, stream

TEXTS = [
    "你好，世界！Hello, 世界. 3.14 + 2 = 5.14\n\n- 项目一\n- 项目二\t制表",
    "  开头有空格，結尾也有  ",
    "家人👨‍👩‍👧‍👦和国旗🇨🇳，还有👍🏽。𠮷野家 naïve café",
    "def f(x):\n    return [x ** 2 for _ in range(10)]  # 注释\n\n\n",
    "這是繁體中文，夾雜 English words 與 emoji 🐼🐼🐼。",
]


@pytest.fixture(scope="module")
def tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = load.resolve("tiny")
    return load.load(folder, torch.float32).eval(), tokenizer.load(folder)


def prompts_of(vocabulary: int, n: int = 9) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, vocabulary) for _ in range(rng.randrange(1, 50))] for _ in range(n)]


def reference(model: PreTrainedModel, ids: list[int], new: int, eos: list[int]) -> list[int]:
    batch = torch.tensor([ids])
    out = model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=eos,
        pad_token_id=0,
    )[0, len(ids) :].tolist()
    return out[:-1] if out[-1] in eos else out


@pytest.mark.parametrize("budget", [1, 150, 10**6])
def test_greedy_batch_is_generate(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase], budget: int) -> None:
    model, words = tiny
    prompts = prompts_of(len(words))
    free = [reference(model, ids, 20, [10**6]) for ids in prompts]
    # Tokens that the model writes sooner or later: rows of a batch then end at different steps.
    eos = [free[0][0], free[1][7], free[2][15]]
    expected = [reference(model, ids, 20, eos) for ids in prompts]
    assert len({len(ids) for ids in expected}) > 2
    said: list[tuple[int, int]] = []
    got = greedy_batch(model, prompts, 20, set(eos), budget, lambda done, total: said.append((done, total)))
    assert got == expected
    assert said[-1] == (9, 9)
    assert greedy_batch(model, prompts, 20, {10**6}, budget) == free


@pytest.mark.parametrize("budget", [1, 200, 10**6])
def test_greedy_batch_of_alike_prompts_is_generate(
    tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase], budget: int
) -> None:
    """Prompts that begin alike are read as one: a passage with questions, one of them twice, one within another."""
    model, words = tiny
    rng = random.Random(3)
    passages = [[rng.randrange(5, len(words)) for _ in range(n)] for n in (30, 45)]
    prompts = [passage + [rng.randrange(5, len(words)) for _ in range(n)] for passage in passages for n in (3, 9, 6)]
    prompts += [prompts[1], prompts[1][:-2], passages[0]]
    rng.shuffle(prompts)
    assert len(trees.grow(prompts)) == 2
    assert greedy_batch(model, prompts, 12, {10**6}, budget) == [reference(model, ids, 12, [10**6]) for ids in prompts]


def test_greedy_batch_stops_where_it_is_enough(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, words = tiny
    prompts = prompts_of(len(words))
    free = greedy_batch(model, prompts, 20, {10**6}, 10**6)
    wanted = [1 + i % 7 for i in range(len(prompts))]
    got = greedy_batch(model, prompts, 20, {10**6}, 10**6, enough=lambda i, ids: len(ids) == wanted[i])
    assert got == [ids[:n] for ids, n in zip(free, wanted, strict=True)]


def test_batches_keep_the_budget() -> None:
    rng = random.Random(1)
    for _ in range(50):
        lengths = [rng.randrange(1, 100) for _ in range(rng.randrange(1, 40))]
        budget = rng.randrange(1, 400)
        found = batches(lengths, budget)
        assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
        for batch in found:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
        for batch, after in zip(found, found[1:], strict=False):  # and no batch is smaller than it must be
            assert (len(batch) + 1) * lengths[batch[0]] > budget
            assert lengths[batch[-1]] >= lengths[after[0]]


def test_a_broken_model_is_an_error(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    broken = load.load(load.resolve("tiny"), torch.float32)
    with torch.no_grad():
        broken.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        greedy_batch(broken, [[5, 6]], 3, {0}, 100)
    with pytest.raises(UserError, match="NaN"):
        list(stream(broken, tiny[1], [5, 6], Sampling(), {0}))


def test_stop_ids(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, words = tiny[0], tokenizer.load(load.resolve("tiny"))
    assert stop_ids(model.generation_config, words) == {words.eos_token_id}
    prompt.set_format(words, "chatml")
    assert stop_ids(model.generation_config, words) == {words.eos_token_id, words.convert_tokens_to_ids("<|im_end|>")}


def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer as LLaMA's: blanks are ▁, one is put before a text and dropped again; rare characters are bytes."""
    alphabet = [f"<0x{i:02X}>" for i in range(256)]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *alphabet], limit_alphabet=100, show_progress=False
    )
    bpe.train_from_iterator(["你好 世界 hello world for x in range  the answer 中文 的 是 了 不 "] * 10, trainer)
    state = json.loads(bpe.to_str())  # the bytes are words like others, not special tokens that decoding leaves out
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in alphabet]
    bpe = Tokenizer.from_str(json.dumps(state))
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", unk_token="<unk>")


def metaspace() -> PreTrainedTokenizerFast:
    words = byte_fallback()
    words.backend_tokenizer.decoder = decoders.Metaspace()
    return words


def pieces(words: PreTrainedTokenizerBase, ids: list[int]) -> Iterator[str]:
    detokenizer = Detokenizer(lambda window: str(words.decode(window, skip_special_tokens=True)))
    for token in ids:
        yield detokenizer.push(token)
    yield detokenizer.flush()


def test_pieces_of_text_are_whole_characters(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    for words in (tiny[1], byte_fallback()):
        for text in [*TEXTS, *demo.texts()[:20]]:
            ids = words(text, add_special_tokens=False)["input_ids"]
            found = list(pieces(words, ids))
            assert "".join(found) == words.decode(ids, skip_special_tokens=True) == text
            assert found[-1] == "" and not any("\ufffd" in piece for piece in found)
            assert sum(map(bool, found)) > len(text) / 8  # it streams: text doesn't wait for the end


def test_pieces_of_any_bytes_are_the_decoding(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    words = tiny[1]
    rng = random.Random(2)
    for _ in range(400):
        ids = [rng.randrange(len(words)) for _ in range(rng.randrange(1, 60))]  # special tokens among them
        assert "".join(pieces(words, ids)) == words.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("make", [byte_fallback, metaspace])
def test_pieces_of_any_words_are_the_decoding(make: type) -> None:
    words = make()
    rng = random.Random(3)
    # Special tokens, and everything but single bytes: blanks in all places, the opening one among them.
    ids_there = [0, 1, 2, *range(259, len(words))]
    assert any(token.startswith("▁") and len(token) > 1 for token in words.convert_ids_to_tokens(ids_there))
    for _ in range(400):
        ids = [rng.choice(ids_there) for _ in range(rng.randrange(1, 30))]
        assert "".join(pieces(words, ids)) == words.decode(ids, skip_special_tokens=True)


def test_an_answer_cut_inside_a_character(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    words = tiny[1]
    ids = words("好🐼")["input_ids"][:-1]
    *sent, rest = pieces(words, ids)
    assert "".join(sent) == "好" and rest.strip("\ufffd") == ""
    assert "".join(sent) + rest == words.decode(ids)


def test_detokenising_is_linear(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    words = tiny[1]
    ids = words("".join(TEXTS * 40), add_special_tokens=False)["input_ids"]
    longest = 0

    def decode(window: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(window))
        return str(words.decode(window, skip_special_tokens=True))

    detokenizer = Detokenizer(decode)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == "".join(TEXTS * 40)
    assert longest <= 12


def test_stream_is_generate(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, words = tiny
    for ids in prompts_of(len(words), 4):
        expected = reference(model, ids, 40, [10**6])
        greedy = Sampling(temperature=0, max_new_tokens=40)
        eos = expected[9]
        for stops, cut in ((set(), expected), ({eos}, expected[: expected.index(eos)])):
            text = words.decode(cut, skip_special_tokens=True).rstrip("\ufffd")  # a character cut in two isn't given
            assert "".join(stream(model, words, ids, greedy, stops)) == text


def test_seeds(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, words = tiny

    def text(seed: int | None, **values: float) -> str:
        sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=20, seed=seed, **values)  # type: ignore[arg-type]
        return "".join(stream(model, words, [5, 6, 7], sampling, set()))

    assert text(1) == text(1) != text(2)
    assert text(None) != text(None)
    assert text(1, top_k=1) == "".join(
        stream(model, words, [5, 6, 7], Sampling(temperature=0, max_new_tokens=20), set())
    )


def test_stream_ends_at_the_window(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    words = tiny[1]
    model = load.load(load.resolve("tiny"), torch.float32)
    model.config.max_position_embeddings = 12
    text = "".join(stream(model, words, [70] * 10, Sampling(temperature=0), set()))
    assert text == words.decode(reference(model, [70] * 10, 2, [10**6])).rstrip("\ufffd")
    with pytest.raises(UserError, match="12"):
        next(stream(model, words, [70] * 12, Sampling(), set()))


def test_stream_does_not_change_its_callers_mode(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    modes: list[bool] = []
    hook = tiny[0].register_forward_pre_hook(lambda *arguments: modes.append(torch.is_inference_mode_enabled()))
    running = stream(*tiny, [70, 71], Sampling(temperature=0), set())
    next(running)
    hook.remove()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert modes and all(modes)  # nor does the caller's mode cost memory


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_p=1.0),
        Sampling(temperature=2.0, top_p=1.0, repetition_penalty=1.9),
        Sampling(temperature=0.5, top_p=0.8, repetition_penalty=1.7),
        Sampling(temperature=1.3, top_p=0.6, top_k=4, repetition_penalty=0.8),
        Sampling(temperature=2.0, top_p=1.0, top_k=3),
        Sampling(temperature=1.0, top_p=0.01),
    ],
)
def test_pick_draws_from_transformers_distribution(sampling: Sampling) -> None:
    logits = torch.tensor([1.0, -0.5, 2.0, 0.3, -2.0, 1.5, 0.0])
    previous = [2, 4, 2]
    steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    steps.append(TopPLogitsWarper(sampling.top_p))
    expected = steps(torch.tensor([previous]), logits[None].clone())[0].softmax(0)
    generator = torch.Generator().manual_seed(0)
    n = 4000
    drawn = torch.bincount(torch.tensor([pick(logits, previous, sampling, generator) for _ in range(n)]), minlength=7)
    assert not drawn[expected == 0].any()
    assert (drawn / n - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"max_new_tokens": 0},
        {"temperature": float("nan")},
        {"seed": -1},
        {"seed": 1 << 70},
    ],
)
def test_sampling_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(values))):
        Sampling(**values)  # type: ignore[arg-type]
