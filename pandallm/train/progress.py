"""What a run tells while it goes: a progress line, metrics.jsonl, TensorBoard; at the end the loss curve."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pandallm import files, log
from pandallm.data.loader import Batch

# Dense bf16 FLOP/s by the name torch gives a device. Sources: the makers' data sheets, without sparsity.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "3090": 71e12,
    "V100": 125e12,
}
LINE_EVERY = 10.0  # seconds between lines where there is no terminal to rewrite one on


def peak_flops(device: torch.device) -> float:
    """FLOP/s that MFU is measured against: a GPU's by its data sheet, a CPU's by a short bf16 product; 0 = unknown."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((flops for key, flops in PEAK_FLOPS.items() if key in name), 0.0)
    size = 1536
    a = torch.ones(size, size, dtype=torch.bfloat16)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


def batch_flops(model: PreTrainedModel, batches: list[Batch]) -> float:
    """Forward and backward FLOPs of batches: 6 a weight and token in the blocks, 6 a weight and *trained* token in the
    head (the others don't pass it), 6 L² a layer and attention width in causal attention. Recomputation isn't counted.
    Source: PaLM (arXiv 2204.02311), appendix B.
    """
    head = model.get_output_embeddings().weight.numel()
    blocks = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    c = model.config
    width = c.num_attention_heads * (getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)
    total = 0.0
    for batch in batches:
        lengths = [b - a for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)]
        total += 6.0 * blocks * sum(lengths) + 6.0 * head * len(batch.targets)
        total += 6.0 * c.num_hidden_layers * width * sum(n * n for n in lengths)
    return total


class Progress:
    """Rank 0 writes; the others' calls do nothing."""

    def __init__(self, out: Path, first_step: int, total_steps: int, peak: float) -> None:
        self.total_steps, self.peak = total_steps, peak
        self.chief = log.rank() == 0
        self.terminal = sys.stderr.isatty()
        self._began, self._last_line = time.monotonic(), 0.0
        self._first_step = first_step
        if self.chief:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import: not for other commands

            self.metrics = log.Metrics(out / "metrics.jsonl", first_step - 1)
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step)

    def step(self, step: int, *, seconds: float, flops: float, **values: float) -> None:
        if not self.chief:
            return
        rate = values["input_tokens"] / seconds
        mfu = flops / seconds / self.peak if self.peak else None
        self.metrics.write(
            step=step, **values, tokens_per_s=round(rate, 1), mfu=mfu and round(mfu, 4), seconds=round(seconds, 3)
        )
        for name in ("loss", "lr", "grad_norm"):
            self.board.add_scalar(name, values[name], step)
        self.board.add_scalar("tokens_per_s", rate, step)
        now = time.monotonic()
        if self.terminal or now - self._last_line >= LINE_EVERY or step in (self._first_step, self.total_steps):
            self._last_line = now
            left = (now - self._began) / (step - self._first_step + 1) * (self.total_steps - step)
            line = (
                f"step {step}/{self.total_steps}  loss {values['loss']:.4f}  lr {values['lr']:.2e}"
                f"  grad {values['grad_norm']:.2f}  {rate:,.0f} tokens/s"
                + (f"  mfu {100 * mfu:.0f} %" if mfu else "")
                + f"  left {_clock(left)}"
            )
            end = "\n" if not self.terminal or step == self.total_steps else ""
            print(("\r\x1b[K" if self.terminal else "") + line, end=end, file=sys.stderr, flush=True)

    def sync(self) -> None:
        """Makes the metrics durable, before a checkpoint that counts on them."""
        if self.chief:
            self.metrics.sync()

    def close(self) -> None:
        if self.chief:
            self.metrics.close()
            self.board.close()


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def loss_curve(metrics: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws loss and learning rate over the steps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [m["step"] for m in metrics]
    figure, left = plt.subplots(figsize=(7, 4), dpi=120)
    left.plot(steps, [m["loss"] for m in metrics], color="tab:blue", linewidth=1.5)
    left.set(xlabel="step", ylabel="loss (nats per trained token)", title=title)
    left.grid(alpha=0.3)
    right = left.twinx()
    right.plot(steps, [m["lr"] for m in metrics], color="tab:orange", linewidth=1, alpha=0.7)
    right.set_ylabel("learning rate", color="tab:orange")
    right.set_ylim(bottom=0)
    figure.tight_layout()
    with files.atomic_file(path) as tmp:
        figure.savefig(tmp, format="png")
    plt.close(figure)
