"""When a run can't go on: what is kept to look into it, and what would help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pandallm import files, log
from pandallm.config import UserError
from pandallm.data.shards import Shards
from pandallm.train.between import Between
from pandallm.train.engine import Engine
from pandallm.train.loop import NonFinite
from pandallm.train.settings import TrainConfig

REPORT = "nonfinite.json"


def keep_for_replay(out: Path, error: NonFinite, shards: Shards, engine: Engine, between: Between) -> None:
    """Writes what a step with a loss or gradient that isn't finite was made of, and a checkpoint of just before it:
    the same command then begins with that step. All ranks call this."""
    if log.rank() == 0:
        rows = {
            str(row): ["{}, {}:{}".format(*shards.provenance(int(d))) for d in shards.row(row)] for row in error.rows
        }
        report: dict[str, Any] = {
            "step": error.step,
            "what": error.what,
            "losses of rank 0's micro batches": [repr(loss) for loss in error.losses],
            "weights whose gradient isn't finite": engine.bad_gradients(),
            "rows and their documents (source, file:line)": rows,
        }
        files.write_json(out / REPORT, report)
    between.save(error.step - 1, keep_all=True)
    between.finish()


@contextmanager
def out_of_memory(model: PreTrainedModel, conf: TrainConfig, seq_len: int) -> Iterator[None]:
    """Turns a GPU's running out of memory into one line that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise UserError(f"{advice(model, conf, seq_len)} ({str(e).splitlines()[0]})") from None


def advice(model: PreTrainedModel, conf: TrainConfig, seq_len: int) -> str:
    """What a step needs by estimate, and what would lower it."""
    held = estimate(model, conf, seq_len)
    parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in held.items())
    remedies = []
    if conf.micro_batch_size > 1:
        remedies.append(f"micro_batch_size={max(1, conf.micro_batch_size // 2)} (the result stays the same)")
    if conf.activation_checkpointing != "full":
        remedies.append("activation_checkpointing=full")
    if conf.engine == "torch":
        remedies.append("engine=deepspeed with more GPUs, or deepspeed.zero_optimization.offload_optimizer.device=cpu")
    else:
        remedies.append("a higher deepspeed.zero_optimization.stage, offload_optimizer or offload_param")
    return f"out of memory; a rank needs about, in GiB: {parts}. Lower it by " + "; or ".join(remedies)


def estimate(model: PreTrainedModel, conf: TrainConfig, seq_len: int) -> dict[str, float]:
    """Bytes of a rank, roughly: weights, gradients and optimizer state by ZeRO stage, activations by the blocks' shape
    (34 values a token and hidden size in a block, arXiv 2205.05198, or its input alone where it is recomputed)."""
    all_, trained = (
        sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad or whole)
        for whole in (True, False)
    )
    mixed = conf.precision in ("bf16", "fp16")
    size = 4 if conf.precision == "fp32" else 2
    ranks = (
        1 if conf.engine == "torch" or not torch.distributed.is_initialized() else torch.distributed.get_world_size()
    )
    stage = conf.zero_optimization["stage"] if conf.engine == "deepspeed" else 0
    c = model.config
    tokens = conf.micro_batch_size * seq_len
    a_block = tokens * c.hidden_size * size
    recomputed = -(-c.num_hidden_layers // conf.recompute_every) if conf.recompute_every else 0
    return {
        "weights": all_ * size / (ranks if stage == 3 else 1),
        "gradients": trained * (4 if mixed else size) / (ranks if stage >= 2 else 1),
        "optimizer": trained * (12 if mixed else 2 * size) / (ranks if stage >= 1 else 1),
        "activations": (recomputed + 17 * max(1, c.num_hidden_layers - recomputed)) * a_block,
        "head": 3.0 * 4 * (1 << 25),
    }
