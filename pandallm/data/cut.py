"""Examples -> pieces of at most seq_len tokens: texts end at a sentence's end, dialogues between two exchanges."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from pandallm import prompt
from pandallm.prompt import Dialogue, Example, Rendered, Text

LOOK_BACK = 8  # an end is looked for in the last 1/8 of a row: whole sentences cost at most that much of it
BLOCK_CHARS = 1 << 17  # longer texts are encoded in blocks: a tokenizer needs a hundred times a text's size
_SENTENCE_END = re.compile(r"(?:[。！？!?…；;]|(?<![0-9])\.(?=\s))[”’」』）)\"']*|\n")
_CLAUSE_END = re.compile(r"[，、：,:—]")


class Cutter:
    """Renders examples and cuts them up. What was cut is counted in `notes`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seq_len: int, notes: Counter[str]) -> None:
        self.tokenizer, self.seq_len, self.notes = tokenizer, seq_len, notes
        self._chars, self._tokens = 1, 1  # of the texts so far

    def __call__(self, examples: Sequence[Example]) -> list[list[Rendered]]:
        """The pieces of each example, in order; none where nothing trained would be left."""
        long = [self._is_long(example) for example in examples]
        usual = [example for example, is_long in zip(examples, long, strict=True) if not is_long]
        rendered = iter(prompt.render(self.tokenizer, usual))
        done: list[list[Rendered]] = []
        for example, is_long in zip(examples, long, strict=True):
            whole = None if is_long else next(rendered)
            if whole and len(whole.input_ids) <= self.seq_len:
                mine = [whole]
            elif isinstance(example, Text):
                blocks = [Text(block) for block in _blocks(example.text)]
                mine = list(
                    _cut_text(self.tokenizer, prompt.render(self.tokenizer, blocks, offsets=True), self.seq_len)
                )
                self.notes["texts_cut_up"] += len(mine) > 1
            else:
                mine = list(_cut_dialogue(self.tokenizer, example, self.seq_len, self.notes))
            if isinstance(example, Text):
                self._chars += len(example.text)
                self._tokens += sum(len(piece.input_ids) for piece in mine)
            done.append([piece for piece in mine if piece.trained])
        return done

    def _is_long(self, example: Example) -> bool:
        """Whether a text will most likely be cut, as far as the texts so far can tell: the places of its tokens, which
        cost time, are wanted at once. The result is the same either way."""
        return isinstance(example, Text) and len(example.text) * self._tokens > 0.9 * self.seq_len * self._chars


def _blocks(text: str) -> Iterator[str]:
    """Pieces of a very long text that end at a sentence's end where there is one."""
    at = 0
    while len(text) - at > BLOCK_CHARS:
        ends = [m.end() for m in _SENTENCE_END.finditer(text, at + BLOCK_CHARS // 2, at + BLOCK_CHARS)]
        end = ends[-1] if ends else at + BLOCK_CHARS
        yield text[at:end]
        at = end
    yield text[at:]


def _cut_text(tokenizer: PreTrainedTokenizerBase, parts: list[Rendered], seq_len: int) -> Iterator[Rendered]:
    """Pieces of a text that was encoded in `parts`. Only the first opens with bos, only the last closes with eos."""
    for number, part in enumerate(parts):
        ids = part.input_ids
        start = int(number > 0 and ids[:1] == [tokenizer.bos_token_id])
        stop = len(ids) - int(number < len(parts) - 1 and ids[-1] == tokenizer.eos_token_id)
        while stop - start > seq_len:
            end = _end(part, start, start + seq_len)
            if stop - end == 1:
                end = _end(part, start, end - 1)  # a piece of one token would train nothing
            yield _piece(ids, start, end)
            start = end
        yield _piece(ids, start, stop)


def _piece(ids: list[int], start: int, end: int) -> Rendered:
    return Rendered(ids[start:end], [(1, end - start)] if end - start > 1 else [])


def _end(rendered: Rendered, start: int, limit: int) -> int:
    """The token at or before `limit` where a piece that begins at `start` ends best: behind a sentence, else behind a
    clause, else anywhere but inside a character."""
    text, encoding = rendered.text, rendered.encoding
    clause = border = 0
    for token in range(limit, max(start + 1, limit - max(8, (limit - start) // LOOK_BACK)), -1):
        before, after = encoding.token_to_chars(token - 1), encoding.token_to_chars(token)
        if before is None or (after is not None and after[0] < before[1]):
            continue  # bos, or inside a character of several tokens
        here = before[1]
        border = border or token
        if _ends_sentence(text, here):
            return token
        if not clause and _CLAUSE_END.match(text, here - 1):
            clause = token
    return clause or border or limit


def _ends_sentence(text: str, place: int) -> bool:
    """Whether a sentence ends just before character `place`, its closing quotes and brackets included."""
    first = place - 1
    while first > 0 and place - first < 4 and text[first] in "”’」』）)\"'":
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
        (rendered,) = prompt.render(tokenizer, [_talk(system, exchanges)])
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
