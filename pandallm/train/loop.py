"""The one loop. Objectives and engines are its arguments; which rows a step sees is the loader's affair."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pandallm import log
from pandallm.data.loader import Batch, Loader
from pandallm.train.engine import Engine
from pandallm.train.progress import Progress
from pandallm.train.schedule import factor
from pandallm.train.settings import TrainConfig


class NonFinite(Exception):
    """The loss or the gradient of a step is not a number: training can't go on from here."""


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
    return Plan(min(steps, conf.max_steps or steps), rows)


def train(
    engine: Engine,
    loader: Loader,
    conf: TrainConfig,
    plan: Plan,
    first_step: int,
    step_flops: Callable[[list[Batch]], float],
    progress: Progress,
    save: Callable[[int], None],
) -> None:
    """Runs steps first_step … plan.total_steps; `save(step)` is called after every save_every-th but the last.

    Raises NonFinite, naming the step and its rows; ValueError where a step has nothing to train.
    """
    for step in range(first_step, plan.total_steps + 1):
        began = time.perf_counter()
        # What is random in a step is a function of the step: nothing of it has to be saved.
        torch.manual_seed(conf.seed * 1_000_003 + step * 1_009 + log.rank())
        rows = loader.rows_of(step, plan.last_row)
        tokens = loader.trained_tokens(rows)
        if tokens == 0:
            raise ValueError(f"step {step}: none of the tokens of rows {rows} is trained")
        batches = loader.micro_batches(rows)
        total = torch.zeros((), device=engine.device)
        for i, batch in enumerate(batches):
            loss = engine.loss(batch)
            engine.backward(loss, tokens, last=i == len(batches) - 1)
            total += loss.detach()
        loss_value = engine.total(total) / tokens
        if not math.isfinite(loss_value):
            raise NonFinite(f"step {step}: the loss is {loss_value}; its rows: {rows}")
        lr = conf.learning_rate * factor(conf.schedule, step, plan.total_steps, conf.warmup_ratio)
        norm = engine.step(lr)
        if not math.isfinite(norm):
            raise NonFinite(f"step {step}: the gradient's norm is {norm}; its rows: {rows}")
        progress.step(
            step,
            loss=loss_value,
            lr=lr,
            grad_norm=norm,
            tokens=tokens,
            input_tokens=int(
                engine.total(torch.tensor(float(sum(b.cu_seqlens[-1] for b in batches)), device=engine.device))
            ),
            flops=engine.total(torch.tensor(step_flops(batches), device=engine.device)),
            seconds=time.perf_counter() - began,
        )
        if step % conf.save_every == 0 and step < plan.total_steps:
            save(step)
