"""What a run tells while it goes: a progress line, metrics.jsonl, TensorBoard; at the end the loss curve."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pandallm import files, log
from pandallm.data.loader import Batch
from pandallm.train import page
from pandallm.train.trackers import Tracker

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
PAGE_EVERY = 20.0  # seconds between two versions of the run's page
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


def peak_memory(device: torch.device) -> int:
    """Bytes this rank has held at most: of the GPU's memory, or resident in the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _numel(parameter: torch.Tensor) -> int:
    """Of the whole weight, where ZeRO-3 has parted it too."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def batch_flops(model: PreTrainedModel, batches: list[Batch]) -> float:
    """Forward and backward FLOPs of batches: 6 a weight and token in the blocks, 6 a weight and *trained* token in the
    head (the others don't pass it), 6 L² a layer and attention width in causal attention. Recomputation isn't counted.
    Source: PaLM (arXiv 2204.02311), appendix B.
    """
    head = _numel(model.get_output_embeddings().weight)
    blocks = sum(_numel(p) for layer in model.model.layers for p in layer.parameters())
    c = model.config
    width = c.num_attention_heads * (getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)
    total = 0.0
    for batch in batches:
        lengths = [b - a for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)]
        total += 6.0 * blocks * sum(lengths) + 6.0 * head * len(batch.targets)
        total += 6.0 * c.num_hidden_layers * width * sum(n * n for n in lengths)
    return total


class Progress:
    """Rank 0 writes; the others' calls do nothing. A full disk costs lines of a report, never the run."""

    def __init__(self, out: Path, first_step: int, record: dict[str, Any], trackers: list[Tracker]) -> None:
        self.out, self.record, self.trackers = out, record, trackers
        self.total_steps, self.peak = record["steps"], record["peak_flops"]
        self.chief = log.rank() == 0
        self.terminal = sys.stderr.isatty()
        self._began, self._last_line, self._next_page = time.monotonic(), 0.0, 0.0
        self._first_step = first_step
        # Every rank knows the measurements: whether to stop depends on them.
        self.heldout = [line for line in log.read_metrics(out / "heldout.jsonl") if line["step"] < first_step]
        if self.chief:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import: not for other commands

            self.metrics = log.Metrics(out / "metrics.jsonl", first_step - 1)
            self.measurements = log.Metrics(out / "heldout.jsonl", first_step - 1)
            self.lines = log.read_metrics(out / "metrics.jsonl")
            self.board: SummaryWriter | None = SummaryWriter(str(out / "tensorboard"), purge_step=first_step)

    def step(self, step: int, *, seconds: float, flops: float, **values: Any) -> None:
        if not self.chief:
            return
        rate = values["input_tokens"] / seconds
        mfu = flops / seconds / self.peak if self.peak else None
        line = {
            "step": step,
            **values,
            "tokens_per_s": round(rate, 1),
            "mfu": mfu and round(mfu, 4),
            "seconds": round(seconds, 3),
        }
        self.lines.append(line)
        self._keep(self.metrics, line)
        self._chart(
            {name: line[name] for name in ("loss", "lr", "grad_norm", "tokens_per_s") if line[name] is not None}, step
        )
        now = time.monotonic()
        if self.terminal or now - self._last_line >= LINE_EVERY or step in (self._first_step, self.total_steps):
            self._last_line = now
            left = (now - self._began) / (step - self._first_step + 1) * (self.total_steps - step)
            norm = "overflow" if values["grad_norm"] is None else f"{values['grad_norm']:.2f}"
            text = (
                f"step {step}/{self.total_steps}  loss {values['loss']:.4f}  lr {values['lr']:.2e}"
                f"  grad {norm}  {rate:,.0f} tokens/s"
                + (f"  mfu {100 * mfu:.0f} %" if mfu else "")
                + f"  left {_clock(left)}"
            )
            end = "\n" if not self.terminal or step == self.total_steps else ""
            print(("\r\x1b[K" if self.terminal else "") + text, end=end, file=sys.stderr, flush=True)
        if now >= self._next_page:
            self.page(refresh=int(PAGE_EVERY))
            # A long run's page takes longer to draw: never more than a hundredth of the time.
            self._next_page = now + max(PAGE_EVERY, 100 * (time.monotonic() - now))

    def measured(self, line: dict[str, Any]) -> None:
        """A line of heldout.jsonl."""
        self.heldout.append(line)
        bits = line["bits_per_character"]
        log.say(f"step {line['step']}: bits per character " + ", ".join(f"{n} {b:.4f}" for n, b in bits.items()))
        for warning in line["warnings"]:
            log.warn(f"step {line['step']}: {warning}")
        if self.chief:
            self._keep(self.measurements, line)
            self._chart({f"heldout/{name}": value for name, value in bits.items()}, line["step"])

    def _keep(self, metrics: log.Metrics, line: dict[str, Any]) -> None:
        try:
            metrics.write(**line)
        except OSError as e:  # what could not be written yet stays in the file's buffer, and goes with the next line
            log.warn(f"{metrics.path}: {e.strerror}; training goes on")

    def _chart(self, values: dict[str, float], step: int) -> None:
        for tracker in list(self.trackers):
            tracker.log(values, step)
        try:
            for name, value in values.items():
                if self.board:
                    self.board.add_scalar(name, value, step)
        except OSError as e:
            log.warn(f"TensorBoard: {e.strerror}; training goes on without it")
            self.board = None

    def page(self, refresh: int | None = None) -> None:
        """OUT/run.html; with `refresh` a browser loads it again after so many seconds."""
        if not self.chief:
            return
        try:
            page.write(self.out / "run.html", self.out.name, self.record, self.lines, self.heldout, refresh)
        except OSError as e:
            log.warn(f"{self.out / 'run.html'}: {e.strerror}; training goes on")

    def sync(self) -> None:
        """Makes the metrics durable, before a checkpoint that counts on them."""
        if self.chief:
            try:
                self.metrics.sync()
                self.measurements.sync()
            except OSError as e:
                log.warn(f"{self.metrics.path}: {e.strerror}; training goes on")

    def close(self, failed: bool) -> None:
        if self.chief:
            for metrics in (self.metrics, self.measurements):
                try:
                    metrics.close()
                except OSError as e:
                    log.warn(f"{metrics.path}: {e.strerror}; its last lines are lost")
            if self.board:
                self.board.close()
            for tracker in self.trackers:
                tracker.finish(failed)


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
