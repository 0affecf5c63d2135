"""What happens between two steps: checkpoints, held-out measurements, and the wish to stop."""

from __future__ import annotations

import math
import os
import signal
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pandallm import log
from pandallm.model import checkpoint
from pandallm.model.checkpoint import Content, Writer
from pandallm.train import heldout
from pandallm.train.engine import Engine
from pandallm.train.heldout import Measure
from pandallm.train.progress import Progress
from pandallm.train.settings import TrainConfig

BY_SIGNAL = "a signal"


class Stop:
    """Catches SIGTERM and the first Ctrl-C: the run saves after the step it is in. A second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._before = {s: signal.signal(s, self._catch) for s in (signal.SIGTERM, signal.SIGINT)}

    def _catch(self, number: int, _: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        # Not printed: the step that was interrupted may be in the middle of a line of its own.
        os.write(2, f"{signal.Signals(number).name}: saving after this step, then ending\n".encode())

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Between:
    """See the module. All ranks come here at the same steps."""

    def __init__(
        self,
        out: Path,
        conf: TrainConfig,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        progress: Progress,
        measure: Measure | None,
        total_steps: int,
    ) -> None:
        self.out, self.conf, self.engine, self.tokenizer = out, conf, engine, tokenizer
        self.model: PreTrainedModel = engine.module.model
        self.progress, self.measure, self.total_steps = progress, measure, total_steps
        self.stop = Stop()
        self._rank = log.rank()
        self.checkpoints, self.best = (Writer(self._rank, engine.world, engine.barrier) for _ in range(2))

    def report(self) -> list[float]:
        """Numbers that are summed over the ranks, together with the step's own, and given to `after`."""
        return [*self.checkpoints.report(), *self.best.report(), float(self.stop.signal)]

    def after(self, step: int, reports: list[float]) -> str | None:
        """Saves, measures; why to stop, or None."""
        # The best model of a step comes before its checkpoint: a run that goes on from that doesn't write it again.
        self.best.settle(*reports[2:4])
        if not self.best.busy:
            self.checkpoints.settle(*reports[:2])
        reason = None
        if self.measure and (step % self.measure.conf.every == 0 or step == self.total_steps):
            reason = self.measured(step)
        if reports[4]:
            self.save(step)
            return BY_SIGNAL
        if not reason and step % self.conf.save_every == 0 and step < self.total_steps:
            self.save(step)
        return reason

    def measured(self, step: int) -> str | None:
        """Measures, keeps the best; why to stop, or None."""
        assert self.measure
        line = self.measure.measure(step, self.progress.heldout)
        if not all(math.isfinite(bits) for bits in line["bits_per_character"].values()):
            log.warn(f"step {step}: a held-out loss isn't finite")
        self.progress.measured(line)
        lines = self.progress.heldout
        if self.measure.conf.keep_best and step and heldout.best_so_far(lines) == len(lines) - 1:
            self.finish()
            self.best.begin(self.out / "best", *self._model(""))
        return heldout.why_stop(self.measure.conf, lines)

    def _model(self, prefix: str) -> tuple[Content, Any]:
        """This rank's files of the model, and what writes the rest of its folder."""
        layout = checkpoint.model_files(self.model)
        mine = {f: names for i, (f, names) in enumerate(layout.items()) if i % self.engine.world == self._rank}
        weights = self.engine.weights([name for names in mine.values() for name in names])
        content = {prefix + f: {name: weights[name] for name in names} for f, names in mine.items()}
        return content, lambda folder: checkpoint.save_config(self.model, self.tokenizer, folder / prefix)

    def save(self, step: int, keep_all: bool = False) -> None:
        """Begins a checkpoint; training goes on once the copies are made, and the one before is written."""
        self.progress.sync()
        if self.checkpoints.busy:
            self.finish()
        content, rest = self._model("model/")
        if pieces := self.engine.pieces():
            content[f"state-{self._rank:05d}.safetensors"] = pieces
        state = {"step": step, "state": {"ranks": self.engine.world, **self.engine.state()}}
        then = None if keep_all or self._rank else partial(checkpoint.prune, self.out, self.conf.keep_last, step)
        self.checkpoints.begin(checkpoint.folder_of(self.out, step), content, rest, state, then)

    def finish(self) -> None:
        """Waits for what is being written."""
        self.best.wait(self.engine.total)
        self.checkpoints.wait(self.engine.total)

    def publish_model(self) -> bool:
        """Writes OUT/model; whether that worked."""
        self.best.begin(self.out / "model", *self._model(""))
        self.best.wait(self.engine.total)
        return (self.out / "model").is_dir()
