"""The keys of a training config (DESIGN: a stage is a config file plus an objective, never a new trainer)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pandallm.config import Config
from pandallm.train.schedule import Schedule


class Init(Config):
    """A model from scratch, in place of `model`."""

    config: dict[str, Any] | str  # a Transformers configuration, or a folder that holds config.json
    tokenizer: str


class HeldOutSource(Config):
    """A file that is measured while training, in bits per character."""

    name: str
    path: str  # any layout that `panda data prepare` reads
    max_rise: float | None = Field(None, gt=0)  # a forgetting guard: how many bits per character it may lose


class HeldOut(Config):
    """What is measured every `every` steps, before the first and after the last."""

    every: int = Field(100, ge=1)  # steps
    sources: list[HeldOutSource] = Field(min_length=1)
    limit: int = Field(200, ge=1)  # the first records of each
    on_rise: Literal["warn", "stop"] = "warn"  # when a guarded source rises beyond its bound
    keep_best: bool = False  # OUT/best: the model with the lowest mean over the sources that aren't guards
    patience: int | None = Field(None, ge=1)  # stop after so many measurements without a new best
    prompts: list[str] = []  # continued greedily each time, to be looked at
    max_new_tokens: int = Field(48, ge=1)

    @model_validator(mode="after")
    def _sensible(self) -> HeldOut:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError("sources: two have the same name")
        if (self.keep_best or self.patience) and all(source.max_rise for source in self.sources):
            raise ValueError("keep_best and patience need a source without max_rise")
        return self


# Keys of DeepSpeed's that would say again, or otherwise, what these say.
OURS = {
    "gradient_clipping": "max_grad_norm",
    "optimizer": "learning_rate, adam_betas, adam_eps and weight_decay",
    "scheduler": "schedule and warmup_ratio",
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
}

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Config):
    """What `panda train` reads. Defaults are the original's recipe (RECIPE section 3)."""

    model: str | None = None  # folder, hub id or built-in name
    init: Init | None = None
    data: str  # shards
    out: str
    objective: Literal["causal_lm"] = "causal_lm"
    adapter: None = None
    freeze: list[str] = []  # weights that stay as they are, by the beginning of their names: model.layers.0.
    pad_token: str | None = None  # added where the tokenizer has no pad token; as in the shards' config
    engine: Literal["torch", "deepspeed"] = "torch"
    deepspeed: dict[str, Any] = {}  # passed through to DeepSpeed
    micro_batch_size: int = Field(4, ge=1)  # rows a device holds at once
    global_batch_size: int = Field(128, ge=1)  # rows a step over all ranks
    epochs: float | None = Field(None, gt=0)
    max_steps: int | None = Field(None, ge=1)
    learning_rate: float = Field(1e-5, gt=0)
    schedule: Schedule = "warmup_decay"
    warmup_ratio: float = Field(0.01, ge=0, lt=1)
    adam_betas: tuple[Beta, Beta] = (0.9, 0.99)
    adam_eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(5.0, gt=0)
    precision: Literal["bf16", "fp32", "fp16", "bf16_pure"] = "bf16"
    activation_checkpointing: str = "full"  # none, full, every-2, every-3, …
    compile: bool = False  # torch.compile of every block
    liger: bool = False  # Liger's kernels for norms, rotary positions and SwiGLU; a GPU is needed
    save_every: int = Field(250, ge=1)  # steps
    keep_last: int = Field(3, ge=1)  # checkpoints
    seed: int = Field(42, ge=0, lt=1 << 32)
    heldout: HeldOut | None = None
    trackers: list[Literal["wandb", "swanlab", "trackio"]] = []
    project: str = "pandallm"  # the trackers' project

    @property
    def recompute_every(self) -> int:
        """Every how many-th block is recomputed in the backward pass; 0: none."""
        how = self.activation_checkpointing
        return {"none": 0, "full": 1}[how] if how in ("none", "full") else int(how.removeprefix("every-"))

    @property
    def zero_optimization(self) -> dict[str, Any]:
        """DeepSpeed's section, with the stage that is taken where none is given."""
        return {"stage": 1, **self.deepspeed.get("zero_optimization", {})}

    @field_validator("activation_checkpointing")
    @classmethod
    def _known(cls, value: str) -> str:
        if not re.fullmatch(r"none|full|every-[1-9]\d*", value):
            raise ValueError("none, full or every-N is wanted")
        return value

    @model_validator(mode="after")
    def _whole(self) -> TrainConfig:
        if (self.model is None) == (self.init is None):
            raise ValueError("give model (to go on from one) or init (to start from scratch), one of them")
        if self.epochs is None and self.max_steps is None:
            raise ValueError("give epochs or max_steps")
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict) or zero.get("stage", 1) not in (0, 1, 2, 3):
            raise ValueError("deepspeed.zero_optimization: a mapping with the stage 0, 1, 2 or 3 is wanted")
        for key in self.deepspeed.keys() & OURS.keys():
            if self.deepspeed[key] != "auto":
                raise ValueError(f"deepspeed.{key}: leave it out; {OURS[key]} decides it")
        return self


# What may differ when a run goes on: none of these changes what is computed.
FREE_TO_CHANGE = {
    "save_every",
    "keep_last",
    "micro_batch_size",
    "activation_checkpointing",
    "engine",
    "deepspeed",
    "out",
    "trackers",
    "project",
}
