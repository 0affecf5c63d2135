"""Protocols: how a model's answer to a question is read off, and bits per character of running text.

`generate` lets the model write and takes the first letter (the original's). `choice` compares the log-likelihoods of
the options' letters as the answer: no letter can be missing, so it tells more about a small or untuned model. `cloze`
compares those of the options' texts, after a prompt that doesn't list them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pandallm import prompt, ranks
from pandallm.config import UserError
from pandallm.data.questions import letter
from pandallm.evaluate import tasks
from pandallm.evaluate.tasks import Question
from pandallm.evaluate.vllm import Vllm
from pandallm.model import generate as generation
from pandallm.model import trees

PROTOCOLS = ("generate", "choice", "cloze")
MAX_NEW_TOKENS = 64  # the original's
HEAD_ROWS = 512  # positions whose logits [rows, V] are held at once

Progress = Callable[[int, int], None]  # is called with what is done and how much there is


@dataclass(frozen=True)
class Prompt:
    """What the model reads: the text with its format's marks, and its ids.

    `truncated`: the context was cut. `shots`: how many answered examples it has.
    """

    text: str
    ids: list[int]
    truncated: bool = False
    shots: int = 0


@dataclass(frozen=True)
class Answer:
    """`pred`: index of the option the model chose, None where its output has no letter.

    `second`: by the protocol's other rule, tasks.parse_strict (generate) or log-likelihood a character (cloze).
    """

    output: str
    pred: int | None
    second: int | None = None
    log_likelihoods: tuple[float, ...] = ()  # of each option's letter or text, in nats (choice, cloze)


def use_format(tokenizer: PreTrainedTokenizerBase, chat_format: str | None) -> str:
    """Puts the format that prompts are to have into the tokenizer; returns its name.

    "none": raw text. "model": the tokenizer's own template. Else a name of prompt.TEMPLATES. None: "model" where there
    is a template, else "none". Raises UserError where the tokenizer can't have it.
    """
    if chat_format is None:
        chat_format = "model" if tokenizer.chat_template else "none"
    if chat_format == "model" and not tokenizer.chat_template:
        raise UserError("chat_format model: the model's tokenizer has no chat template; name a format, or none")
    if chat_format not in ("none", "model"):
        prompt.set_format(tokenizer, chat_format)
    return chat_format


def build_prompt(
    tokenizer: PreTrainedTokenizerBase,
    chat_format: str,
    question: Question,
    wording: str,
    max_tokens: int,
    examples: Sequence[Question] = (),
) -> Prompt:
    """A question as the model reads it, in at most `max_tokens` tokens.

    Where it is longer, `examples` are left out, the last first, each whole; then the start of the context is cut off.
    Raises UserError if even without its context the question doesn't fit.
    """

    def ask(kept: int, shots: int) -> Prompt:
        """With the last `kept` characters of the context, after the first `shots` examples."""
        context = question.context[len(question.context) - kept :]
        text = tasks.prompt_for(question, wording, context, examples[:shots])
        if chat_format == "none":
            return Prompt(text, _encode(tokenizer, chat_format, [text])[0], shots=shots)
        messages = [{"role": "user", "content": text}]
        rendered = prompt.prompt_text(tokenizer, messages)
        return Prompt(rendered, prompt.render_prompt(tokenizer, messages), shots=shots)

    high = len(question.context)
    for shots in range(len(examples), -1, -1):
        whole = ask(high, shots)
        if len(whole.ids) <= max_tokens:
            return whole
    low, best = 0, ask(0, 0)
    if len(best.ids) > max_tokens:
        raise UserError(
            f"{question.task}, question {question.id}: without its context it is {len(best.ids)} tokens, and this model"
            f" has room for {max_tokens}: leave the task out, or evaluate a model with a longer window"
        )
    while high - low > 1:  # `low` characters fit, `high` don't
        middle = (low + high) // 2
        cut = ask(middle, 0)
        if len(cut.ids) <= max_tokens:
            low, best = middle, cut
        else:
            high = middle
    return replace(best, truncated=True)


def ask(
    tokenizer: PreTrainedTokenizerBase,
    chat_format: str,
    question: Question,
    wording: str,
    protocol: str,
    window: int,
    examples: Sequence[Question] = (),
) -> Prompt:
    """A question as a protocol asks it, cut so that a window of that many tokens has room for the answer."""
    room = MAX_NEW_TOKENS
    if protocol == "cloze":
        options = tokenizer(list(question.options), add_special_tokens=False)["input_ids"]
        room = max(map(len, options)) + 8  # the blank before it, and what a tokenizer may add
        question = replace(question, options=())
    return build_prompt(tokenizer, chat_format, question, wording, window - room, examples)


def _encode(tokenizer: PreTrainedTokenizerBase, chat_format: str, texts: list[str]) -> list[list[int]]:
    """Ids of prompts' texts: a raw text gets the tokenizer's own special tokens, a rendered one holds them already."""
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=chat_format == "none")["input_ids"]
    # Some tokenizers close every text with eos; after it a model would begin another one.
    return [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] and chat_format == "none" else ids for ids in encoded]


def answer_lead(tokenizer: PreTrainedTokenizerBase, chat_format: str) -> str:
    """The blank that comes between a prompt and its answer in this format, or ""."""
    if chat_format == "none":
        return " "  # as in the original's training rows: inputs + " " + targets
    user, assistant = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    head = prompt.prompt_text(tokenizer, [user])
    talk = str(tokenizer.apply_chat_template([user, assistant], tokenize=False))
    answer = talk[len(head) :] if talk.startswith(head) else ""
    return answer[: len(answer) - len(answer.lstrip())]


def generate(
    model: PreTrainedModel | Vllm,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    token_budget: int,
    progress: Progress | None = None,
) -> list[Answer]:
    """Protocol `generate`: at most 64 tokens, greedily; the first letter in them is the answer.

    A text ends early where what follows can't change the answer, by either rule.
    """

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    def decided(i: int, ids: list[int]) -> bool:
        # A letter at the end may yet be a word's first; so may one before a character that isn't whole.
        so_far = text(ids).rstrip(generation.REPLACEMENT) + "x"
        n = len(questions[i].options)
        return tasks.parse_letter(so_far, n) is not None and tasks.parse_strict(so_far, n) is not None

    ids, ends = [p.ids for p in prompts], generation.stop_ids(model.generation_config, tokenizer)
    if isinstance(model, Vllm):
        written = model.greedy(ids, MAX_NEW_TOKENS, ends)
    else:
        written = generation.greedy_batch(model, ids, MAX_NEW_TOKENS, ends, token_budget, progress, decided)
    answers = []
    for output, question in zip(map(text, written), questions, strict=True):
        n = len(question.options)
        answers.append(Answer(output, tasks.parse_letter(output, n), tasks.parse_strict(output, n)))
    return answers


def choice(
    model: PreTrainedModel | Vllm,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    chat_format: str,
    token_budget: int,
    progress: Progress | None = None,
) -> list[Answer]:
    """Protocol `choice`: the option whose letter is the likeliest answer; the first of equally likely ones."""
    letters = [[letter(i) for i in range(len(question.options))] for question in questions]
    answers = []
    for sums in _of_answers(model, tokenizer, prompts, letters, chat_format, token_budget, progress):
        pred = sums.index(max(sums))
        answers.append(Answer(letter(pred), pred, log_likelihoods=sums))
    return answers


def cloze(
    model: PreTrainedModel | Vllm,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    chat_format: str,
    token_budget: int,
    progress: Progress | None = None,
) -> list[Answer]:
    """Protocol `cloze`: the option whose text is the likeliest answer; the second rule divides by its characters.

    `prompts` don't list the options.
    """
    texts = [[option for option in question.options if option.strip()] for question in questions]
    found = _of_answers(model, tokenizer, prompts, texts, chat_format, token_budget, progress)
    answers = []
    for question, values in zip(questions, found, strict=True):
        left = iter(values)
        # What has no text has no likelihood, and is not chosen: real sets hold a few such options.
        sums = tuple(next(left) if option.strip() else -math.inf for option in question.options)
        pred = sums.index(max(sums))
        by_length = [total / max(1, len(text)) for total, text in zip(sums, question.options, strict=True)]
        answers.append(Answer(question.options[pred], pred, by_length.index(max(by_length)), sums))
    return answers


def _of_answers(
    model: PreTrainedModel | Vllm,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[str]],
    chat_format: str,
    token_budget: int,
    progress: Progress | None,
) -> list[tuple[float, ...]]:
    """The log-likelihood, in nats, of each of a prompt's answers."""
    lead = answer_lead(tokenizer, chat_format)
    inputs: dict[tuple[int, ...], int] = {}  # what is run, each distinct input once -> its number
    wanted: list[list[tuple[int, int]]] = []
    places: list[list[tuple[int, int, int]]] = []  # a prompt's answers: input, first and last of its wanted tokens
    for asked, texts in zip(prompts, answers, strict=True):
        wholes = _encode(tokenizer, chat_format, [asked.text + lead + text for text in texts])
        shared, tails = _tails(asked.ids, wholes)
        places.append([])
        for tail in tails:
            run = inputs.setdefault((*shared, *tail[:-1]), len(inputs))
            if run == len(wanted):
                wanted.append([])
            first = len(wanted[run])
            wanted[run] += [(len(shared) - 1 + k, token) for k, token in enumerate(tail)]
            places[-1].append((run, first, first + len(tail)))
    if isinstance(model, Vllm):
        scores = model.log_likelihoods(list(inputs), wanted)
    else:
        scores = log_likelihoods(model, list(inputs), wanted, token_budget, progress)
    return [tuple(math.fsum(scores[run][first:last]) for run, first, last in options) for options in places]


def _tails(prompt_ids: list[int], wholes: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """The tokens a prompt shares with all its continued forms, and what each of these has after them.

    A tokenizer may join the prompt's end with the answer; the tokens joined are then scored as part of every answer.
    """
    shared = list(commonprefix([prompt_ids, *wholes]))  # of any sequences, despite the module it is in
    tails = [whole[len(shared) :] for whole in wholes]
    if not shared or not all(tails):
        raise UserError("this tokenizer gives the answers' letters no tokens of their own: use the protocol generate")
    return shared, tails


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel,
    inputs: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[tuple[int, int]]],
    token_budget: int,
    progress: Progress | None = None,
) -> list[list[float]]:
    """log p(token | input up to and with position), in nats, for the (position, token) pairs wanted of each input.

    Inputs that begin alike are run as a tree; trees in batches of at most `token_budget` tokens, padding counted.
    Ranks share the batches. Raises UserError on a result that is not a number.
    B: trees of a batch, T: tokens of the largest, N: pairs, H: hidden size, V: vocabulary.
    """
    grown = trees.grow(inputs, trees.can_share(model, max(map(len, inputs), default=0)))
    done = 0

    def read(batch: list[int]) -> dict[int, list[float]]:
        nonlocal done
        hidden = trees.run(model, [grown[i] for i in batch])  # [B, T, H]
        pairs = [  # row, place, token, input
            (row, path[position], token, number)
            for row, i in enumerate(batch)
            for number, path in grown[i].paths.items()
            for position, token in wanted[number]
        ]
        rows, places, tokens, _ = torch.tensor(pairs, device=model.device).T
        values = _head(model, hidden[rows, places], tokens)
        if not all(map(math.isfinite, values)):
            raise UserError("the model's logits are not finite: its weights are damaged, or try precision fp32")
        results: dict[int, list[float]] = {number: [] for i in batch for number in grown[i].paths}
        for (_, _, _, number), value in zip(pairs, values, strict=True):
            results[number].append(value)
        done += len(results)
        if progress:
            progress(done, len(inputs))
        return results

    found = ranks.share(generation.batches([len(tree.ids) for tree in grown], token_budget), read)
    return [found[i] for i in range(len(inputs))]


def _head(model: PreTrainedModel, hidden: torch.Tensor, tokens: torch.Tensor) -> list[float]:
    """Log-probabilities of `tokens` [N] after the states `hidden` [N, H]."""
    head = model.get_output_embeddings()
    values: list[float] = []
    for h, t in zip(hidden.split(HEAD_ROWS), tokens.split(HEAD_ROWS), strict=True):
        # bf16 logits are multiples of 1/8 between 16 and 32: the letters of a question would often tie, and the first
        # win. The few logits asked for are computed in fp32; in the sum over V such errors cancel.
        own = (h.float() * head.weight[t].float()).sum(-1)
        values += (own - head(h).float().logsumexp(-1)).tolist()
    return values


def bits_per_character(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    window: int = 2048,
    token_budget: int = 4096,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Bits the model needs for a character (Unicode code point): comparable over vocabularies, lower is better.

    A text follows bos (eos where there is none), so that its first token counts too; its end is not scored. A text
    longer than `window` tokens is read in windows that overlap by half, each token scored once.
    Returns "bits_per_character", "characters", "tokens", "bits". Raises UserError if the texts have no characters.
    """
    texts = [text for text in texts if text]
    characters = sum(map(len, texts))
    if not characters:
        raise UserError("bits per character: the texts are empty")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    window = min(window, int(model.config.max_position_embeddings))
    inputs: list[list[int]] = []
    wanted: list[list[tuple[int, int]]] = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        sequence = [start, *ids]
        scored = 1  # tokens of the sequence that are behind us
        while scored < len(sequence):
            # The first window opens the text; a later one has half a window, already scored, as context.
            begin = 0 if scored == 1 else scored - 1 - window // 2
            end = min(begin + window, len(sequence) - 1)
            inputs.append(sequence[begin:end])
            wanted.append([(i - begin, sequence[i + 1]) for i in range(scored - 1, end)])
            scored = end + 1
    scores = log_likelihoods(model, inputs, wanted, token_budget, progress)
    bits = -math.fsum(value for values in scores for value in values) / math.log(2)
    tokens = sum(map(len, wanted))
    return {"bits_per_character": bits / characters, "characters": characters, "tokens": tokens, "bits": bits}
