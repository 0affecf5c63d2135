"""Cutting: pieces put together are the whole, end where a sentence ends, and never inside a character."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from pandallm import prompt, tokenizer
from pandallm.data import cut
from pandallm.model.names import resolve
from pandallm.prompt import Dialogue, Text

SENTENCES = [
    "天气很好。",
    "我们去公园散步，看见了一只猫！",
    "“你要去哪里？”他问。",
    "It costs 3.5 yuan. ",
    "好……",
    "换行\n",
]


@pytest.fixture(scope="module")
def tok() -> Any:
    tiny = tokenizer.load(resolve("tiny"))
    prompt.set_format(tiny, "chatml")
    return tiny


def pieces(tok: Any, example: prompt.Example, seq_len: int) -> tuple[list[prompt.Rendered], Counter[str]]:
    notes: Counter[str] = Counter()
    (mine,) = cut.pieces(tok, [example], seq_len, notes)
    return mine, +notes


@pytest.mark.parametrize("seed", range(30))
def test_texts(tok: Any, seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices(SENTENCES, k=rng.randint(1, 300)))
    seq_len = rng.choice([400, 512, 800])
    (whole,) = prompt.render(tok, [Text(text)])
    mine, notes = pieces(tok, Text(text), seq_len)
    assert [i for piece in mine for i in piece.input_ids] == whole.input_ids
    assert all(2 <= len(piece.input_ids) <= seq_len for piece in mine)
    assert all(piece.loss_mask == [False] + [True] * (len(piece.input_ids) - 1) for piece in mine)
    assert notes == ({"texts_cut_up": 1} if len(mine) > 1 else {})
    for piece in mine[:-1]:
        assert len(piece.input_ids) > seq_len - seq_len // cut.LOOK_BACK
        assert tok.decode(piece.input_ids).rstrip(" ")[-1] in "。！？…\n.”", tok.decode(piece.input_ids)[-10:]


def test_a_text_without_sentences_ends_behind_clauses_or_anywhere(tok: Any) -> None:
    mine, _ = pieces(tok, Text("一二三四五六七八九，" * 90), 256)
    assert len(mine) > 3 and all(tok.decode(piece.input_ids).endswith("，") for piece in mine[:-1])
    mine, _ = pieces(tok, Text("字" * 500), 64)
    assert len(mine) > 3 and all(set(tok.decode(piece.input_ids)) == {"字"} for piece in mine[:-1])


def test_places_are_looked_up_once_a_text(tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once a row, which made a long text without sentences take hours."""
    asked = []
    real = prompt.render
    monkeypatch.setattr(prompt, "render", lambda *args, **keys: asked.append(keys) or real(*args, **keys))
    mine, _ = pieces(tok, Text("学而时习之不亦说乎" * 200), 64)
    assert len(mine) > 20 and asked.count({"offsets": True}) == 1


def test_never_inside_a_character(tok: Any) -> None:
    text = "🐼𠮷" * 300  # several tokens each
    for seq_len in range(20, 40):
        mine, _ = pieces(tok, Text(text), seq_len)
        decoded = [tok.decode(piece.input_ids) for piece in mine]
        assert "\ufffd" not in "".join(decoded) and "".join(decoded) == text + tok.eos_token


def test_very_long_texts_are_encoded_in_blocks(tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(random.Random(1).choices(SENTENCES, k=300))
    monkeypatch.setattr(cut, "BLOCK_CHARS", 200)
    blocks = list(cut._blocks(text))
    assert "".join(blocks) == text and len(blocks) > 5 and max(map(len, blocks)) <= 200
    mine, notes = pieces(tok, Text(text), 512)
    ids = [i for piece in mine for i in piece.input_ids]
    assert tok.decode(ids) == text + tok.eos_token and notes == {"texts_cut_up": 1}
    assert ids.count(tok.eos_token_id) == 1


def talk(*turns: str, system: str = "") -> Dialogue:
    roles = ("user", "assistant")
    opening = (("system", system),) if system else ()
    return Dialogue((*opening, *((roles[i % 2], turn) for i, turn in enumerate(turns))))


@pytest.mark.parametrize("system", ["", "你是助手。"])
def test_dialogues_are_cut_between_exchanges(tok: Any, system: str) -> None:
    turns = [f"{kind}{i}" * (3 + i % 4) for i in range(20) for kind in ("问", "答")]
    mine, notes = pieces(tok, talk(*turns, system=system), 96)
    assert len(mine) > 2 and notes == {"dialogues_cut_up": 1}
    got, at = [], 0
    for piece in mine:
        assert len(piece.input_ids) <= 96
        n = len(piece.trained)
        (again,) = prompt.render(tok, [talk(*turns[at : at + 2 * n], system=system)])
        assert piece == again, "a piece is a dialogue as any other"
        at += 2 * n
        got.append(n)
    assert at == len(turns), "no exchange is lost"


def test_a_dialogue_that_just_fits_is_not_cut(tok: Any) -> None:
    whole = talk("问", "答", "再问", "再答")
    size = len(prompt.render(tok, [whole])[0].input_ids)
    assert pieces(tok, whole, size) == (prompt.render(tok, [whole]), {})
    mine, notes = pieces(tok, whole, size - 1)
    assert len(mine) == 2 and notes == {"dialogues_cut_up": 1}


def test_a_long_answer_loses_its_end_a_long_question_is_dropped(tok: Any) -> None:
    mine, notes = pieces(tok, talk("问", "长" * 200, "再问", "再答"), 64)
    whole = prompt.render(tok, [talk("问", "长" * 200)])[0]
    assert mine[0].input_ids == whole.input_ids[:64] and mine[0].loss_mask == whole.loss_mask[:64]
    assert mine[1] == prompt.render(tok, [talk("再问", "再答")])[0]
    assert notes == {"answers_shortened": 1, "dialogues_cut_up": 1}
    mine, notes = pieces(tok, talk("长" * 200, "答", "再问", "再答"), 64)
    assert mine == prompt.render(tok, [talk("再问", "再答")])
    assert notes == {"exchanges_too_long": 1, "dialogues_cut_up": 1}
    assert pieces(tok, talk("长" * 200, "答"), 64) == ([], {"exchanges_too_long": 1})


def test_order(tok: Any) -> None:
    examples = [Text("甲" * 100), talk("问", "答"), Text("乙"), talk("长" * 300, "答"), Text("")]
    together = cut.pieces(tok, examples, 64, Counter())
    assert together == [cut.pieces(tok, [example], 64, Counter())[0] for example in examples]
    assert [len(some) for some in together] == [len(together[0]), 1, 1, 0, 0] and len(together[0]) > 1


def test_a_sentence_end_without_a_token_of_its_own_is_found_too(tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in vocabularies that hold no Chinese punctuation: by the places of the tokens."""
    text = "".join(random.Random(5).choices(SENTENCES, k=200))
    usual, _ = pieces(tok, Text(text), 400)
    nothing: frozenset[int] = frozenset()
    monkeypatch.setattr(cut, "_sentence_marks", lambda tokenizer: cut._Marks(nothing, nothing, nothing, nothing))
    placed, _ = pieces(tok, Text(text), 400)
    for mine in (usual, placed):
        assert len(mine) > 2 and all(
            tok.decode(piece.input_ids).rstrip(" ")[-1] in "。！？…\n.”" for piece in mine[:-1]
        )
    assert [i for piece in placed for i in piece.input_ids] == [i for piece in usual for i in piece.input_ids]


def test_tokens_that_end_a_sentence(tok: Any) -> None:
    marks = cut._sentence_marks(tok)
    vocabulary = {tok.decode([i]): i for i in range(len(tok))}
    assert {vocabulary["。"], vocabulary["\n"]} <= marks.ending and vocabulary["，"] not in marks.ending
    assert vocabulary[")"] in marks.closing and vocabulary['"'] not in marks.ending
    assert vocabulary["."] in marks.period - marks.ending and vocabulary[" "] in marks.spaced
    assert tok.eos_token_id not in marks.ending | marks.closing


def test_english_ends_at_full_stops_and_is_not_encoded_twice(tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "The price is 3.5 yuan. Mr Li said so, and he knows. " * 40
    calls: list[bool] = []
    render = prompt.render
    monkeypatch.setattr(prompt, "render", lambda t, e, offsets=False: (calls.append(offsets), render(t, e, offsets))[1])
    mine, _ = pieces(tok, Text(text), 256)
    assert len(mine) > 2 and all(tok.decode(piece.input_ids).endswith(".") for piece in mine[:-1])
    assert not any(calls)
