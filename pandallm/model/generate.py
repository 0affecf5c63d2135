"""Text from a model: many prompts greedily at once (evaluation), or one, sampled and streamed (chat, serving)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pandallm import prompt, ranks
from pandallm.config import UserError
from pandallm.model import trees

KEPT = 0.75  # share of a batch's rows that are still being written, below which the finished ones are let go

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not (yet) a character


def stop_ids(own_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: the tokenizer's eos, the model's own list, the end mark of the tokenizer's format."""
    own = own_config.eos_token_id if own_config else None
    listed: list[int] = own if isinstance(own, list) else [] if own is None else [own]
    template, vocabulary = str(tokenizer.chat_template or ""), tokenizer.get_vocab()
    marks = [vocabulary[mark] for mark in prompt.END_MARKS.values() if mark in template and mark in vocabulary]
    return {int(tokenizer.eos_token_id), *listed, *marks}


def batches(lengths: Sequence[int], token_budget: int, counts: Sequence[int] | None = None) -> list[list[int]]:
    """Indices into `lengths`, longest first, in batches of at most `token_budget` tokens, padding counted.

    `counts`: how many rows of its length each stands for (1). What is longer than the budget is a batch of its own.
    Longest first: what doesn't fit into memory fails at once.
    """
    found: list[list[int]] = []
    width = rows = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        count = counts[i] if counts else 1
        if not found or (rows + count) * width > token_budget:
            found.append([])
            width, rows = lengths[i], 0
        found[-1].append(i)
        rows += count
    return found


def greedy_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Set[int],
    token_budget: int,
    progress: Callable[[int, int], None] | None = None,
    enough: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """The likeliest continuation of each prompt, token by token, in the order given; without the eos that ends it.

    Prompts that begin alike are read as one. `token_budget`: tokens of prompts and answers, padding counted, that a
    batch holds (its keys and values are kept). `progress` is called with the prompts done and their number. `enough`
    is asked, with a prompt's number and what was written, whether that is all that is wanted. Raises UserError if the
    model's logits are not numbers. Ranks share the batches.
    """
    grown = trees.grow(prompts, trees.can_share(model, max(map(len, prompts), default=0)))
    lengths = [max(map(len, tree.paths.values())) + max_new_tokens for tree in grown]
    done = 0

    def write(batch: list[int]) -> dict[int, list[int]]:
        nonlocal done
        outputs = _greedy(model, [grown[i] for i in batch], max_new_tokens, eos_ids, enough)
        done += len(outputs)
        if progress:
            progress(done, len(prompts))
        return outputs

    found = ranks.share(batches(lengths, token_budget, [len(tree.paths) for tree in grown]), write)
    return [found[i] for i in range(len(prompts))]


@torch.inference_mode()
def _greedy(
    model: PreTrainedModel,
    grown: list[trees.Tree],
    max_new_tokens: int,
    eos_ids: Set[int],
    enough: Callable[[int, list[int]], bool] | None,
) -> dict[int, list[int]]:
    """One batch of `greedy_batch`: a prompt's number -> what is written.

    N: prompts, B: rows held, S: the longest prompt and the tokens generated so far, H: hidden size.
    """
    rows = [number for tree in grown for number in tree.paths]  # the prompt of each row
    outputs: dict[int, list[int]] = {number: [] for number in rows}
    paths = [path for tree in grown for path in tree.paths.values()]
    width = max(map(len, paths))
    cache, last = _read(model, grown, width)
    logits = model.get_output_embeddings()(last)  # [N, V]
    mask = torch.tensor([[0] * (width - len(path)) + [1] * len(path) for path in paths], device=model.device)  # [B, S]
    live = dict(enumerate(rows))  # of the rows held, those not finished
    for written in range(1, max_new_tokens + 1):
        picked = _numbers(logits).argmax(-1)  # [B]
        for row, token in enumerate(picked.tolist()):
            if row not in live:
                continue
            number = live[row]
            if token in eos_ids:
                del live[row]
                continue
            outputs[number].append(token)
            if enough and enough(number, outputs[number]):
                del live[row]
        if not live or written == max_new_tokens:
            break
        if len(live) <= KEPT * len(picked):  # finished rows leave the batch, not one by one: that copies the cache
            index = torch.tensor(list(live), device=model.device)
            cache.batch_select_indices(index)
            mask, picked, live = mask[index], picked[index], dict(enumerate(live.values()))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = mask.sum(1, keepdim=True) - 1
        output = model(
            input_ids=picked[:, None],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1]
    return outputs


def _read(model: PreTrainedModel, grown: list[trees.Tree], width: int) -> tuple[DynamicCache, torch.Tensor]:
    """The cache of every prompt of some trees on its own, padded on the left to `width`, and its last state [N, H].

    On a CPU few tokens are read at once: they fit its cache.
    """
    at_once = trees.IN_CACHE if model.device.type == "cpu" else sum(len(tree.ids) for tree in grown)
    caches, last = [], []
    for start, end in trees.runs(grown, at_once):
        read, some = DynamicCache(), grown[start:end]
        states = trees.run(model, some, read)  # [B, T, H]
        last += [states[row, path[-1]] for row, tree in enumerate(some) for path in tree.paths.values()]
        caches.append(trees.unfold(read, some, width))
    return trees.join(caches), torch.stack(last)


def _numbers(logits: torch.Tensor) -> torch.Tensor:
    if logits.isnan().any():
        raise UserError("the model's logits are not numbers (NaN): its weights are damaged, or try precision fp32")
    return logits


# What a model's generation_config.json may ask for beside greedy decoding -> the value that asks for nothing.
PLAIN: dict[str, Any] = {
    **{"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "num_beams": 1, "min_new_tokens": None},
    **{"suppress_tokens": None, "begin_suppress_tokens": None, "bad_words_ids": None, "forced_eos_token_id": None},
}


def not_plain(config: GenerationConfig | None) -> dict[str, Any]:
    """What a generation config has that would make greedy decoding something else; `greedy_batch` leaves it aside."""
    told = {name: getattr(config, name, None) for name in PLAIN}
    return {name: value for name, value in told.items() if value not in (None, [], PLAIN[name])}


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Raises UserError on values outside their range."""

    temperature: float = 0.7  # 0: always the likeliest token
    top_p: float = 0.9  # the likeliest tokens that together have this probability; 1: all
    top_k: int = 0  # the k likeliest tokens; 0: all
    repetition_penalty: float = 1.0  # above 1: tokens of the prompt and the answer become less likely again
    max_new_tokens: int = 512
    seed: int | None = None  # None: another answer each time

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("seed", self.seed is None or 0 <= self.seed < 1 << 63, "0 or more, below 2^63"),
        ):
            if not good:
                raise UserError(f"{name}: {getattr(self, name)} is out of range; {wanted} is wanted")


def pick(logits: torch.Tensor, previous: Sequence[int], sampling: Sampling, generator: torch.Generator) -> int:
    """Draws the next token from `logits` [V] after the tokens `previous`; steps and their order are Transformers'."""
    logits = logits.float()
    if sampling.repetition_penalty != 1.0 and previous:
        seen = torch.tensor(sorted(set(previous)))
        values = logits[seen]
        factor = sampling.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(values < 0, values * factor, values / factor))
    if sampling.temperature == 0:
        return int(logits.argmax())
    values, order = (logits / sampling.temperature).sort(descending=True)
    if sampling.top_k:
        values = values[: sampling.top_k]
    probabilities = values.softmax(0)
    # Kept: tokens before which less than top_p has been reached, so always the first.
    kept = probabilities.cumsum(0) - probabilities < sampling.top_p
    return int(order[torch.multinomial(probabilities * kept, 1, generator=generator)])


class Detokenizer:
    """Turns tokens into text as they come, whole characters only; all pieces joined are the decoding of all tokens.

    A Chinese character or emoji is often several tokens, and what a token reads as can depend on the one before it
    (SentencePiece's decoders drop the blank that opens a text). So a short window of recent tokens is decoded each
    time, and what is new in it is given out; the window moves on where tokens end at a character's border. Only where
    a model writes bytes that are no text can the pieces differ from a SentencePiece tokenizer's decoding of everything.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the window: tokens already given out, as context, then new ones
        self._context = 0  # how many of them are context
        self._sent = 0  # characters of the window's text given out

    def push(self, token: int) -> str:
        """The text that is certain with this token, "" if it only begins a character."""
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = text.rstrip(REPLACEMENT)  # a later token may complete these
        new = whole[self._sent :]
        self._sent += len(new)
        if new and whole == text:
            # The context must show in the text: behind tokens that don't, the next one would be decoded as the first.
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._sent = len(self._decode(self._ids))
        return new

    def flush(self) -> str:
        """What is left at the end: bytes that no token completed."""
        text = self._decode(self._ids)[self._sent :]
        self._sent += len(text)
        return text


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Sequence[int],
    sampling: Sampling,
    eos_ids: Set[int],
) -> Iterator[str]:
    """Text that continues `input_ids`, piece by piece, until an eos (not given out), the limit or the model's window.

    Raises UserError if the prompt leaves no room for an answer.
    """
    window = int(model.config.max_position_embeddings)
    if len(input_ids) >= window:
        raise UserError(f"the prompt is {len(input_ids)} tokens and the model reads {window}: shorten it")
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    detokenizer = Detokenizer(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))
    cache = DynamicCache(config=model.config)
    previous, new = list(input_ids), list(input_ids)
    for _ in range(min(sampling.max_new_tokens, window - len(input_ids))):
        token = pick(_next_logits(model, new, cache), previous, sampling, generator)
        if token in eos_ids:
            break
        new = [token]
        previous.append(token)
        piece = detokenizer.push(token)
        if piece:
            yield piece
    rest = detokenizer.flush().rstrip(REPLACEMENT)  # a character that the limit cut in two isn't shown at all
    if rest:
        yield rest


@torch.inference_mode()  # not around `stream`: the mode would leak into the caller between two pieces
def _next_logits(model: PreTrainedModel, ids: Sequence[int], cache: DynamicCache) -> torch.Tensor:
    """Logits [V] on the CPU after `ids` and what the cache holds."""
    batch = torch.tensor([list(ids)], device=model.device)
    output = model(input_ids=batch, past_key_values=cache, logits_to_keep=1)
    return _numbers(output.logits[0, -1].float().cpu())
