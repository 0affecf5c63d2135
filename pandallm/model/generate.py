"""Text from a model: many prompts greedily at once (evaluation), or one, sampled and streamed (chat, serving)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from pandallm import prompt
from pandallm.config import UserError

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not (yet) a character


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: the tokenizer's eos, the model's own list, the end mark of the tokenizer's format."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    listed: list[int] = own if isinstance(own, list) else [] if own is None else [own]
    template, vocabulary = str(tokenizer.chat_template or ""), tokenizer.get_vocab()
    marks = [vocabulary[mark] for mark in prompt.END_MARKS.values() if mark in template and mark in vocabulary]
    return {int(tokenizer.eos_token_id), *listed, *marks}


def batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices into `lengths`, longest first, in batches of at most `token_budget` tokens, padding counted.

    What is longer than the budget is a batch of its own. Longest first: what doesn't fit into memory fails at once.
    """
    found: list[list[int]] = []
    width = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not found or (len(found[-1]) + 1) * width > token_budget:
            found.append([])
            width = lengths[i]
        found[-1].append(i)
    return found


def greedy_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Set[int],
    pad_id: int,
    token_budget: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The likeliest continuation of each prompt, token by token, in the order given; without the eos that ends it.

    `token_budget`: tokens of prompts and answers, padding counted, that a batch holds (its keys and values are kept).
    `progress` is called with the prompts done and their number. Raises UserError if the model's logits are not numbers.
    """
    outputs: list[list[int]] = [[] for _ in prompts]
    done = 0
    for rows in batches([len(p) + max_new_tokens for p in prompts], token_budget):
        written = _greedy(model, [prompts[row] for row in rows], max_new_tokens, eos_ids, pad_id)
        for row, ids in zip(rows, written, strict=True):
            outputs[row] = ids
        done += len(rows)
        if progress:
            progress(done, len(prompts))
    return outputs


@torch.inference_mode()
def _greedy(
    model: PreTrainedModel, prompts: list[Sequence[int]], max_new_tokens: int, eos_ids: Set[int], pad_id: int
) -> list[list[int]]:
    """One batch of `greedy_batch`. B: rows not finished, T: longest prompt, S: T and the tokens generated so far."""
    width = max(len(p) for p in prompts)
    # Padded on the left, so that every row's next token is at the end.
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=model.device)  # [B, T]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)  # [B, S]
    outputs: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))  # the prompt of each row
    cache = DynamicCache(config=model.config)
    for _ in range(max_new_tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        )
        picked = _numbers(output.logits[:, -1]).argmax(-1)  # [B]
        tokens = picked.tolist()
        going = [i for i, token in enumerate(tokens) if token not in eos_ids]
        for i in going:
            outputs[live[i]].append(tokens[i])
        if not going:
            break
        if len(going) < len(live):  # finished rows leave the batch
            index = torch.tensor(going, device=model.device)
            cache.batch_select_indices(index)
            mask, picked, live = mask[index], picked[index], [live[i] for i in going]
        ids = picked[:, None]
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
    return outputs


def _numbers(logits: torch.Tensor) -> torch.Tensor:
    if logits.isnan().any():
        raise UserError("the model's logits are not numbers (NaN): its weights are damaged, or try precision fp32")
    return logits


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
