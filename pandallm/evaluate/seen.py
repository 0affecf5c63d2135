"""Which questions a model has read in training: told by the n-grams of prepared shards, as decontamination does it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pandallm import log
from pandallm.data import ngrams, shards, show
from pandallm.data.decontaminate import Items
from pandallm.data.shards import Shards
from pandallm.evaluate.tasks import Question

BATCH_CHARS = 1 << 20  # characters of texts looked at together
MOST_TOKENS = 1 << 16  # of a text that was cut into pieces, joined again
BLOCK = 1 << 20  # numbers of documents read at once


def flags(questions: Iterable[Question], folders: Sequence[Path]) -> set[tuple[str, str]] | None:
    """(task, id) of the questions seen in any of the shards; None where no shards are given."""
    once: dict[tuple[str, str], Question] = {}
    for question in questions:  # its first order, which is the file's: flags don't depend on how many are asked
        once.setdefault((question.task, question.id), question)
    return set().union(*(seen(list(once.values()), folder) for folder in folders)) if folders else None


def seen(questions: Sequence[Question], folder: Path) -> set[tuple[str, str]]:
    """(task, id) of the questions that stand in the rows of the shards in `folder`.

    A question is known by its passage, or by its own text where it has none, and where those are short by its options
    too; half of their n-grams in one training text, or half of that text, tell it (data/decontaminate.py). One that is
    too short to be told is not in the set; how many there are is said. Memory: a byte a document and one batch of
    texts. Raises UserError where the folder holds no whole shards.
    """
    if not questions:
        return set()
    data = Shards(folder)
    words = show.tokenizer_of(data)
    items, groups = Items.of([[q.context if q.context.strip() else q.question, *q.options] for q in questions])
    found: set[int] = set()
    for texts in _batches(_texts(data, words)) if groups else ():
        for _, item, hit in items.matches(ngrams.units(texts)):
            if hit.contaminated:
                found.update(groups[item])
    short = len(questions) - sum(map(len, groups))
    log.say(
        f"{folder}: {len(found)} of {len(questions)} questions were seen in training"
        + (f"; {short} are too short to tell" if short else "")
    )
    return {(questions[i].task, questions[i].id) for i in found}


def _used(data: Shards, documents: int) -> NDArray[np.bool_]:
    """Which documents stand in some row [documents]: what was sampled away was not trained."""
    used = np.zeros(documents, bool)
    numbers = shards.read_flat(data.folder / "rows.documents.bin", "<u4")
    for start in range(0, len(numbers), BLOCK):
        used[numbers[start : start + BLOCK]] = True
    return used


def _texts(data: Shards, words: PreTrainedTokenizerBase) -> Iterator[str]:
    """Every training text, as it was before it was cut into pieces, up to MOST_TOKENS."""
    parts = [
        shards.read_flat(data.folder / f"parts/{part['name']}.documents.bin", shards.DOCUMENT) for part in data.parts
    ]
    used = _used(data, sum(map(len, parts)))
    first = 0
    for documents in parts:
        for batch in _id_batches(data, first, documents, used):
            yield from words.backend_tokenizer.decode_batch(batch, skip_special_tokens=True)
        first += len(documents)


def _id_batches(
    data: Shards, first: int, documents: NDArray[np.void], used: NDArray[np.bool_]
) -> Iterator[list[list[int]]]:
    """Token ids of a part's texts. Where a long one is divided, both halves have the piece between them."""
    batch: list[list[int]] = []
    held: list[list[int]] = []  # pieces of one record
    size, record = 0, -1
    for at in np.flatnonzero(used[first : first + len(documents)]).tolist():
        ids = data.document(first + at)[0].tolist()
        size += len(ids)
        if int(documents[at]["record"]) != record or sum(map(len, held)) + len(ids) > MOST_TOKENS:
            if held:
                batch.append([i for piece in held for i in piece])
            held = held[-1:] if int(documents[at]["record"]) == record else []
            record = int(documents[at]["record"])
        held.append(ids)
        if size > BATCH_CHARS:
            yield batch
            batch, size = [], 0
    yield [*batch, [i for piece in held for i in piece]] if held else batch


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
