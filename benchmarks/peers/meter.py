"""What the trainers built on Transformers have in common here: their arguments, and a meter on their steps.

The meter counts the tokens of the batches that a trainer's `compute_loss` is really given, and takes the time between
the ends of two steps. It says what the model and the optimizer turned out to be.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with weights, and a tokenizer that has the chat template")
    parser.add_argument("data", help="JSON lines with instruction, input and output")
    parser.add_argument("out", help="empty folder; the result goes to OUT/result.json")
    parser.add_argument("--packing", action="store_true", help="rows of --length tokens instead of padded dialogues")
    parser.add_argument("--length", type=int, default=1024, help="longest dialogue, or a packed row")
    parser.add_argument("--batch", type=int, default=4, help="dialogues, or packed rows, at once")
    parser.add_argument("--accumulate", type=int, default=4, help="batches a step")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--fp32-weights", action="store_true", help="load weights in fp32, whatever the file holds")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    return args


def training(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of all these trainers: what isn't here is as each of them has it."""
    return {
        "output_dir": args.out,
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": args.accumulate,
        "max_steps": args.warmup + args.steps,
        "learning_rate": 1e-5,
        "bf16": True,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def talks(path: str) -> list[list[dict[str, str]]]:
    """The dialogues as messages."""
    with open(path, encoding="utf-8") as f:
        records = [json.loads(line) for line in f]
    return [
        [
            {"role": "user", "content": f"{r['instruction']}\n{r['input']}" if r["input"] else r["instruction"]},
            {"role": "assistant", "content": r["output"]},
        ]
        for r in records
    ]


class Meter(TrainerCallback):
    """Give it to a trainer as a callback, after `watch` of the trainer's class."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.first, self.last, self.out = args.warmup, args.warmup + args.steps, Path(args.out)
        self.counts: Counter[str] = Counter()
        self.began = 0.0
        self.facts: dict[str, Any] = {}

    def watch(self, trainer: Any) -> None:
        """Counts what the trainer's (a class's) `compute_loss` is called with."""
        compute_loss = trainer.compute_loss

        def counted(this: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.counts.update(count(inputs))
            return compute_loss(this, model, inputs, *args, **kwargs)

        trainer.compute_loss = counted

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if state.global_step == self.first:
            self.counts.clear()
            self.began = now
        elif state.global_step == self.last:
            self.result = {"seconds": now - self.began, **self.counts}
            self.facts = facts(args, kwargs["model"], kwargs["optimizer"])

    def write(self, *packages: str, **more: Any) -> None:
        versions = {name: version(name) for name in (*packages, "transformers", "torch")}
        result = {**self.result, "facts": {**self.facts, **more}, "versions": versions}
        (self.out / "result.json").write_text(json.dumps(result), encoding="utf-8")


def count(inputs: dict[str, Any]) -> dict[str, int]:
    """Tokens of a batch: those that are no padding, those that are trained, and all places the model computes."""
    ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs.get("attention_mask")
    if mask is None:  # rows end to end, without padding
        tokens = ids.numel()
    elif mask.dim() == 4:  # [B, 1, T, T], 0 where attended: padding doesn't even see itself
        tokens = int((mask.diagonal(dim1=-2, dim2=-1) == 0).sum())
    else:
        tokens = int(mask.sum())
    return {"tokens": tokens, "trained": int((labels[:, 1:] != -100).sum()), "places": ids.numel()}


def facts(args: Any, model: Any, optimizer: Any) -> dict[str, Any]:
    """What an ordinary configuration turned out to be."""
    inner = getattr(optimizer, "optimizer", optimizer)
    weights = {str(p.dtype) for p in model.parameters()}
    moments = {
        str(v.dtype) for state in inner.state.values() for k, v in state.items() if k != "step" and torch.is_tensor(v)
    }
    return {
        "weights": "/".join(sorted(weights)),
        "moments": "/".join(sorted(moments)),
        "optimizer": getattr(args.optim, "value", args.optim),
        "attention": model.config._attn_implementation,
        "gradient_checkpointing": bool(getattr(model, "is_gradient_checkpointing", False)),
        "threads": torch.get_num_threads(),
    }
