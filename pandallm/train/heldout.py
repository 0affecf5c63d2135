"""Measured while training: bits per character of files that are not trained on, and what the model makes of prompts.

Bits per character compare over vocabularies, so that a grown one is judged fairly. A source with `max_rise` is a guard
against forgetting: an English probe, say, that must not get worse by more than that.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pandallm import log, prompt
from pandallm.config import UserError
from pandallm.data import read, sources
from pandallm.data.containers import Bad
from pandallm.data.loader import Batch, Document, collate
from pandallm.model.generate import stop_ids
from pandallm.prompt import Dialogue, Example
from pandallm.train.engine import Engine
from pandallm.train.settings import HeldOut, HeldOutSource


class Measure:
    """Holds the held-out texts as batches. All ranks measure together, each its share."""

    def __init__(self, conf: HeldOut, engine: Engine, tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
        """`tokens`: of a batch, and the longest piece. UserError where a source can't be read."""
        self.conf, self.engine, self.tokenizer = conf, engine, tokenizer
        self.rank, self.batches, self.characters = log.rank(), {}, {}
        for source in conf.sources:
            examples = _examples(source, conf.limit)
            documents, self.characters[source.name] = _documents(tokenizer, examples, tokens, source)
            self.batches[source.name] = self._mine(documents, tokens)

    def _mine(self, documents: list[Document], tokens: int) -> list[Batch]:
        """This rank's batches, equally many on every rank; where there are none left, one that counts nothing."""
        groups: list[list[Document]] = [[]]
        for document in documents:
            if groups[-1] and sum(len(ids) for ids, _ in groups[-1]) + len(document[0]) > tokens:
                groups.append([])
            groups[-1].append(document)
        while len(groups) % self.engine.world:
            groups.append([(ids, np.zeros_like(mask)) for ids, mask in groups[-1][:1]])
        return [collate(group, rows=[]) for group in groups[self.rank :: self.engine.world]]

    @torch.no_grad()
    def measure(self, step: int, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """The line of heldout.jsonl for this step; `lines` are those before it, the first from before training."""
        self.engine.module.eval()
        bits = {}
        for name, batches in self.batches.items():
            nats = math.fsum(float(self.engine.loss(batch)) for batch in batches)
            bits[name] = self.engine.total([nats])[0] / math.log(2) / self.characters[name]
        line: dict[str, Any] = {"step": step, "bits_per_character": bits}
        aims = [bits[source.name] for source in self.conf.sources if not source.max_rise]
        if aims:
            line["mean"] = sum(aims) / len(aims)
        first = lines[0]["bits_per_character"] if lines else bits
        rises = [(s, bits[s.name] - first[s.name]) for s in self.conf.sources if s.max_rise]
        line["warnings"] = [
            f"{s.name} rose by {rise:.4f} bits per character since the start, to {bits[s.name]:.4f}; max_rise is"
            f" {s.max_rise}"
            for s, rise in rises
            if s.max_rise and rise > s.max_rise
        ]
        if self.conf.prompts:
            line["samples"] = self._samples()
        self.engine.module.train()
        return line

    def _samples(self) -> list[dict[str, str]]:
        """Greedy continuations of the prompts, as the user's turn where there is a chat format. All run as one row."""
        tok = self.tokenizer
        ids = [prompt.render_prompt(tok, [{"role": "user", "content": text}]) for text in self.conf.prompts]
        starts = [len(row) for row in ids]
        going = set(range(len(ids)))
        ends_answer = stop_ids(self.engine.module.model.generation_config, tok)
        for _ in range(self.conf.max_new_tokens):
            hidden = self.engine.module.hidden(_reading(ids).to(self.engine.device))  # [1, T, D]
            ends = torch.tensor([len(row) for row in ids], device=self.engine.device).cumsum(0) - 1
            chosen = self.engine.module.logits(hidden[0, ends]).argmax(-1).tolist()  # [prompts]
            for i in sorted(going):
                ids[i].append(chosen[i])
                if chosen[i] in ends_answer:
                    going.discard(i)
            if not going:  # the same on every rank
                break
        texts = [str(tok.decode(row[start:], skip_special_tokens=True)) for row, start in zip(ids, starts, strict=True)]
        return [{"prompt": p, "text": t} for p, t in zip(self.conf.prompts, texts, strict=True)]


def _reading(ids: list[list[int]]) -> Batch:
    return collate([(np.array(row), np.zeros(len(row), dtype=bool)) for row in ids], rows=[])


def best_so_far(lines: list[dict[str, Any]]) -> int:
    """Index of the line with the lowest mean; the first of equals."""
    means = [line["mean"] for line in lines]
    return means.index(min(means))


def why_stop(conf: HeldOut, lines: list[dict[str, Any]]) -> str | None:
    """Whether the newest of these lines ends the run, and why."""
    if lines[-1]["warnings"] and conf.on_rise == "stop":
        return "; ".join(lines[-1]["warnings"])
    if conf.patience and len(lines) - 1 - best_so_far(lines) >= conf.patience:
        best = lines[best_so_far(lines)]
        return f"no better held-out mean in {conf.patience} measurements since step {best['step']} ({best['mean']:.4f})"
    return None


def _examples(source: HeldOutSource, limit: int) -> list[Example]:
    where = f"heldout.sources: {source.name}"
    found: list[Example] = []
    skipped: Counter[str] = Counter()
    spans = (span for file in read.files_of(Path(source.path), where) for span in read.spans_of(file, "auto", 1 << 62))
    for record in itertools.islice((record for span in spans for record in read.records(span, "auto")), limit):
        if isinstance(record, Bad):
            skipped[record.cause] += 1
            continue
        try:
            found += sources.examples_of(record.value, sources.Reading())
        except sources.Drop as e:
            skipped[str(e)] += 1
    if skipped:
        log.say(f"{where}: {source.path}: " + ", ".join(f"{n} records left out: {c}" for c, n in skipped.items()))
    if not found:
        raise UserError(f"{where}: {source.path} has no record that can be read")
    return found


def _documents(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example], most: int, source: HeldOutSource
) -> tuple[list[Document], int]:
    """Documents of at most `most` tokens, and the characters they hold that are measured.

    A text follows bos (eos where there is none), so that its first token counts too; its end is not scored. Of a
    dialogue the assistant's turns count, with their end marks; one that is too long is left out.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    documents: list[Document] = []
    characters = too_long = 0
    for example in examples:
        if isinstance(example, Dialogue):
            (whole,) = prompt.render(tokenizer, [example])
            if len(whole.input_ids) <= most:
                documents.append((np.array(whole.input_ids), np.array(whole.loss_mask)))
                characters += sum(len(text) for role, text in example.messages if role == "assistant")
            else:
                too_long += 1
            continue
        ids = tokenizer(example.text, add_special_tokens=False)["input_ids"]
        for at in range(0, len(ids), most - 1):
            piece = np.array([start, *ids[at : at + most - 1]])
            documents.append((piece, np.arange(len(piece)) > 0))
        characters += len(example.text)
    told = f"heldout.sources: {source.name}: {too_long} dialogues are longer than a row of training, {most} tokens"
    if not characters:
        raise UserError(f"{told}; nothing is left to measure")
    if too_long:
        log.say(f"{told}; they are left out")
    return documents, characters
