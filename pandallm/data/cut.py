"""Examples -> pieces of at most seq_len tokens: texts end at a sentence's end, dialogues between two exchanges."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache, partial
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from pandallm import prompt
from pandallm.prompt import Dialogue, Example, Rendered, Text

LOOK_BACK = 8  # an end is looked for in the last 1/8 of a row: whole sentences cost at most that much of it
BLOCK_CHARS = 1 << 17  # longer texts are encoded in blocks: a tokenizer needs a hundred times a text's size
_CLOSING = "”’」』）)\"'"
_SENTENCE_END = re.compile(rf"(?:[。！？!?…；;]|(?<![0-9])\.(?=\s))[{_CLOSING}]*|\n")
_CLAUSE_END = re.compile(r"[，、：,:—]")


def pieces(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], seq_len: int, notes: Counter[str]
) -> list[list[Rendered]]:
    """The pieces of each example, in order; none where nothing trained would be left. What was cut is noted."""
    usual = [e for e in examples if isinstance(e, Dialogue) or len(e.text) <= BLOCK_CHARS]
    rendered = iter(prompt.render(tokenizer, usual))
    done: list[list[Rendered]] = []
    for example in examples:
        if isinstance(example, Dialogue):
            whole = next(rendered)
            fits = len(whole.input_ids) <= seq_len
            mine = [whole] if fits else list(_cut_dialogue(tokenizer, example, seq_len, notes))
        else:
            blocks = list(_blocks(example.text))
            parts = prompt.render(tokenizer, [Text(b) for b in blocks]) if len(blocks) > 1 else [next(rendered)]
            mine = list(_cut_text(tokenizer, blocks, parts, seq_len))
            notes["texts_cut_up"] += len(mine) > 1
        done.append([piece for piece in mine if piece.trained])
    return done


def _blocks(text: str) -> Iterator[str]:
    """A text, or pieces of a very long one that end at a sentence's end where there is one."""
    at = 0
    while len(text) - at > BLOCK_CHARS:
        ends = [m.end() for m in _SENTENCE_END.finditer(text, at + BLOCK_CHARS // 2, at + BLOCK_CHARS)]
        end = ends[-1] if ends else at + BLOCK_CHARS
        yield text[at:end]
        at = end
    yield text[at:]


def _cut_text(
    tokenizer: PreTrainedTokenizerBase, blocks: list[str], parts: list[Rendered], seq_len: int
) -> Iterator[Rendered]:
    """Pieces of a text that was rendered in blocks. Only the first opens with bos, only the last closes with eos."""
    for number, (block, part) in enumerate(zip(blocks, parts, strict=True)):
        ids = part.input_ids
        start = int(number > 0 and ids[:1] == [tokenizer.bos_token_id])
        stop = len(ids) - int(number < len(parts) - 1 and ids[-1] == tokenizer.eos_token_id)
        placed = cache(partial(_placed, tokenizer, block))
        while stop - start > seq_len:
            end = _end(tokenizer, placed, ids, start, start + seq_len)
            if stop - end == 1:
                end = _end(tokenizer, placed, ids, start, end - 1)  # a piece of one token would train nothing
            yield _piece(ids, start, end)
            start = end
        yield _piece(ids, start, stop)


def _piece(ids: list[int], start: int, end: int) -> Rendered:
    return Rendered(ids[start:end], [(1, end - start)] if end - start > 1 else [])


def _placed(tokenizer: PreTrainedTokenizerBase, text: str) -> Rendered:
    """A text with the places of its tokens."""
    (placed,) = prompt.render(tokenizer, [Text(text)], offsets=True)
    return placed


def _end(
    tokenizer: PreTrainedTokenizerBase, places: Callable[[], Rendered], ids: list[int], start: int, limit: int
) -> int:
    """The token at or before `limit` where a piece of a text that begins at `start` ends best: behind a token that ends
    a sentence; where there is none, behind a sentence's end that has no token of its own, or a clause's, or anywhere
    but inside a character. `places`: gives the text with its tokens' places, which cost time."""
    lowest = max(start + 1, limit - max(8, (limit - start) // LOOK_BACK))
    marks = _sentence_marks(tokenizer)
    for token in range(limit, lowest, -1):
        last, following = ids[token - 1], ids[token]
        if (last in marks.ending and following not in marks.closing) or (
            last in marks.period and following in marks.spaced
        ):
            return token
    placed = places()
    clause = border = 0
    for token in range(limit, lowest, -1):
        before, after = placed.encoding.token_to_chars(token - 1), placed.encoding.token_to_chars(token)
        if before is None or (after is not None and after[0] < before[1]):
            continue  # bos, or inside a character of several tokens
        here = before[1]
        border = border or token
        if _ends_sentence(placed.text, here):
            return token
        if not clause and _CLAUSE_END.match(placed.text, here - 1):
            clause = token
    return clause or border or limit


class _Marks(NamedTuple):
    """Tokens by which a sentence's end is told."""

    ending: frozenset[int]  # end a sentence by themselves
    closing: frozenset[int]  # begin with a closing mark, which belongs to the sentence before
    period: frozenset[int]  # end in a full stop, which may stand in a number
    spaced: frozenset[int]  # begin with a blank


@lru_cache(maxsize=2)
def _sentence_marks(tokenizer: PreTrainedTokenizerBase) -> _Marks:
    backend = tokenizer.backend_tokenizer
    numbers = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder))
    texts = dict(zip(numbers, backend.decode_batch([[number] for number in numbers]), strict=True))
    bare = {i: text.rstrip(_CLOSING) for i, text in texts.items() if "\ufffd" not in text}
    return _Marks(
        ending=frozenset(i for i, text in bare.items() if text and text[-1] in "。！？!?…；;\n"),
        closing=frozenset(i for i, text in texts.items() if text and text[0] in _CLOSING),
        period=frozenset(i for i, text in bare.items() if text.endswith(".")),
        # Byte-level and SentencePiece vocabularies write a blank as Ġ and ▁, which decoding alone may drop.
        spaced=frozenset(i for i in numbers if (backend.id_to_token(i) or "")[:1] in ("Ġ", "▁", " ", "Ċ")),
    )


def _ends_sentence(text: str, place: int) -> bool:
    """Whether a sentence ends just before character `place`, its closing quotes and brackets included."""
    first = place - 1
    while first > 0 and place - first < 4 and text[first] in _CLOSING:
        first -= 1
    found = _SENTENCE_END.match(text, first)
    return bool(found and found.end() == place)


def _cut_dialogue(
    tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, seq_len: int, notes: Counter[str]
) -> Iterator[Rendered]:
    """As many exchanges as fit, then the next ones as a talk of their own under the same system text. An answer that
    is too long by itself loses its end."""
    turns = list(dialogue.messages)
    system = [turns.pop(0)] if turns[0][0] == "system" else []
    exchanges = [turns[i : i + 2] for i in range(0, len(turns), 2)]
    cut = False
    while exchanges:
        some = exchanges[: seq_len // 2 + 1]  # an exchange has two tokens at least: the rest can't fit
        (rendered,) = prompt.render(tokenizer, [_talk(system, some)])
        fitting = sum(end <= seq_len for _, end in rendered.trained)
        (piece,) = prompt.render(tokenizer, [_talk(system, exchanges[: max(1, fitting)])])
        while fitting > 1 and len(piece.input_ids) > seq_len:  # what follows an answer may not fit
            fitting -= 1
            (piece,) = prompt.render(tokenizer, [_talk(system, exchanges[:fitting])])
        if len(piece.input_ids) > seq_len:
            trained = [(a, min(b, seq_len)) for a, b in piece.trained if a < seq_len]
            notes["answers_shortened" if trained else "exchanges_too_long"] += 1
            piece = Rendered(piece.input_ids[:seq_len], trained)
        exchanges = exchanges[max(1, fitting) :]
        cut = cut or bool(exchanges)
        yield piece
    notes["dialogues_cut_up"] += cut


def _talk(system: list[tuple[str, str]], exchanges: list[list[tuple[str, str]]]) -> Dialogue:
    return Dialogue((*system, *(turn for exchange in exchanges for turn in exchange)))
