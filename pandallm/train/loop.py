"""The one loop. Objectives and engines are its arguments; which rows a step sees is the loader's affair."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pandallm import log
from pandallm.config import UserError
from pandallm.data.loader import Batch, Loader
from pandallm.train.between import Between
from pandallm.train.engine import Engine
from pandallm.train.progress import Progress, peak_memory
from pandallm.train.schedule import factor
from pandallm.train.settings import TrainConfig


class NonFinite(Exception):
    """The loss or the gradient of a step is not a number: training can't go on from here."""

    def __init__(self, what: str, step: int, rows: list[int], losses: list[float]) -> None:
        super().__init__(f"step {step}: {what}; its rows: {rows}")
        self.what, self.step, self.rows = what, step, rows
        self.losses = losses  # of this rank's micro batches


@dataclass(frozen=True)
class Plan:
    """How far a run goes."""

    total_steps: int
    last_row: int | None  # end of the data in the endless sequence of rows; None where max_steps is the end


def plan(conf: TrainConfig, loader: Loader) -> Plan:
    """From epochs or max_steps (the earlier of the two, where both are given)."""
    if conf.epochs is None:
        assert conf.max_steps is not None
        return Plan(conf.max_steps, None)
    steps = loader.steps(conf.epochs)
    rows = round(conf.epochs * len(loader.shards))
    if steps < 1:
        raise UserError(f"epochs: {conf.epochs} of {len(loader.shards)} rows is no row; train for more")
    return Plan(min(steps, conf.max_steps or steps), rows)


def train(
    engine: Engine,
    loader: Loader,
    conf: TrainConfig,
    plan: Plan,
    first_step: int,
    step_flops: Callable[[list[Batch]], float],
    progress: Progress,
    between: Between,
) -> str | None:
    """Runs steps first_step … plan.total_steps; returns why it stopped before the last, or None.

    Raises NonFinite, naming the step and its rows, with the weights as they were before that step; ValueError where a
    step has nothing to train.
    """
    began = time.perf_counter()
    for step, rows, tokens, batches in loader.steps_from(first_step, plan.total_steps, plan.last_row):
        # What is random in a step is a function of the step: nothing of it has to be saved.
        torch.manual_seed(conf.seed * 1_000_003 + step * 1_009 + log.rank())
        losses = []
        for i, batch in enumerate(batches):
            loss = engine.loss(batch)
            engine.backward(loss, tokens, last=i == len(batches) - 1)
            losses.append(loss.detach())
        mine = [float(loss) for loss in losses]
        read = float(sum(batch.cu_seqlens[-1] for batch in batches))
        total, read, flops, *reports = engine.total([sum(mine), read, step_flops(batches), *between.report()])
        if not math.isfinite(total):
            raise NonFinite(f"the loss is {total}", step, rows, mine)
        lr = conf.learning_rate * factor(conf.schedule, step, plan.total_steps, conf.warmup_ratio)
        norm = engine.step(lr)
        if not math.isfinite(norm) and not engine.overflowed:
            raise NonFinite(f"the gradient's norm is {norm}", step, rows, mine)
        progress.step(
            step,
            loss=total / tokens,
            lr=lr,
            grad_norm=norm if math.isfinite(norm) else None,
            tokens=tokens,
            input_tokens=int(read),
            flops=flops,
            memory=peak_memory(engine.device),
            seconds=time.perf_counter() - began,
        )
        reason = between.after(step, reports)
        if reason:
            return reason
        began = time.perf_counter()  # saving and measuring aren't a step's time
    return None
