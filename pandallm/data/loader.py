"""Shards -> the batches of a step. Which rows a step sees is a pure function of (seed, step): nothing to save or skip.

T = tokens of a micro batch, N = those of them that are trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pandallm.data.shards import Shards


@dataclass
class Batch:
    """Some rows, laid end to end without padding."""

    input_ids: torch.Tensor  # [1, T]
    position_ids: torch.Tensor  # [1, T], from 0 in every document
    cu_seqlens: list[int]  # borders of the documents: [0, …, T]
    borders: torch.Tensor  # [documents + 1], the same as int32
    longest: int  # no document is longer; one of few values, so that a compiled model isn't compiled again
    trained_at: torch.Tensor  # [N] positions whose next token is trained
    targets: torch.Tensor  # [N] those next tokens
    rows: list[int]

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            name: value.pin_memory().to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


Document = tuple[NDArray[np.int64], NDArray[np.bool_]]  # input_ids [L], loss_mask [L]


def collate(documents: list[Document], rows: list[int]) -> Batch:
    """Lays documents (input_ids [L], loss_mask [L]) end to end. The token before a trained one is where it's learnt."""
    lengths = [len(ids) for ids, _ in documents]
    at, targets, start = [], [], 0
    for ids, mask in documents:
        trained = np.flatnonzero(mask[1:])
        at.append(trained + start)
        targets.append(ids[1:][trained])
        start += len(ids)
    cu_seqlens = [0, *np.cumsum(lengths).tolist()]
    return Batch(
        input_ids=torch.from_numpy(np.concatenate([ids for ids, _ in documents]))[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        cu_seqlens=cu_seqlens,
        borders=torch.tensor(cu_seqlens, dtype=torch.int32),
        longest=-(-max(lengths) // 512) * 512,
        trained_at=torch.from_numpy(np.concatenate(at)),
        targets=torch.from_numpy(np.concatenate(targets)),
        rows=rows,
    )


class Step(NamedTuple):
    """What a rank needs for a step."""

    number: int  # from 1
    rows: list[int]  # of all ranks
    tokens: int  # trained, of all ranks
    batches: list[Batch]  # this rank's


class Loader:
    """Micro batches of one rank. All ranks together see each row of a step once."""

    def __init__(
        self, shards: Shards, seed: int, global_batch_size: int, micro_batch_size: int, rank: int = 0, world: int = 1
    ) -> None:
        self.shards, self.seed = shards, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world = rank, world
        self._order = lru_cache(maxsize=2)(self._permutation)  # a step may touch two epochs

    def steps(self, epochs: float) -> int:
        """Steps that `epochs` passes take; the last may have fewer rows."""
        return -(-round(epochs * len(self.shards)) // self.global_batch_size)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.shards))

    def rows_of(self, step: int, last_row: int | None = None) -> list[int]:
        """The rows of step 1, 2, …; none at or past `last_row` of the endless sequence of epochs."""
        first = (step - 1) * self.global_batch_size
        end = first + self.global_batch_size
        if last_row is not None:
            end = min(end, last_row)
        size = len(self.shards)
        return [int(self._order(i // size)[i % size]) for i in range(first, end)]

    def trained_tokens(self, rows: list[int]) -> int:
        """Trained tokens of rows: what a step's loss is divided by. Every rank counts them all, without talking."""
        return sum(self.shards.size(int(d))[1] for row in rows for d in self.shards.row(row))

    def micro_batches(self, rows: list[int]) -> list[Batch]:
        """This rank's share of a step's rows, in order. Every rank gets equally many batches, as collectives need;
        where rows run out, a row whose mask is empty stands in."""
        size = self.micro_batch_size
        count = -(-len(rows) // (size * self.world))
        batches = []
        for k in range(count):
            start = (k * self.world + self.rank) * size
            mine = rows[start : start + size]
            documents = [self.shards.document(int(d)) for row in mine or rows[:1] for d in self.shards.row(row)]
            if not mine:
                documents = [(ids, np.zeros_like(mask)) for ids, mask in documents[:1]]
            batches.append(collate(documents, mine))
        return batches

    def steps_from(self, first: int, last: int, last_row: int | None) -> Iterator[Step]:
        """Steps first … last; each is read while the one before it runs.

        Raises ValueError where a step has nothing to train.
        """
        if first > last:
            return
        with ThreadPoolExecutor(1, "loader") as reader:
            coming = reader.submit(self._step, first, last_row)
            for number in range(first, last + 1):
                step = coming.result()
                if number < last:
                    coming = reader.submit(self._step, number + 1, last_row)
                if not step.tokens:
                    raise ValueError(f"step {number}: none of the tokens of rows {step.rows} is trained")
                yield step

    def _step(self, number: int, last_row: int | None) -> Step:
        rows = self.rows_of(number, last_row)
        return Step(number, rows, self.trained_tokens(rows), self.micro_batches(rows))
