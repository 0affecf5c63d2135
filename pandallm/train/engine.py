"""Where a step runs: one device by plain torch, or many by DeepSpeed. The only file that imports deepspeed.

Both are given a sum of losses over a micro batch and the step's number of trained tokens, and make the gradient of
sum / tokens over all micro batches and ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pandallm.config import UserError
from pandallm.data.loader import Batch
from pandallm.train.settings import TrainConfig

DTYPES = {"bf16": torch.bfloat16, "bf16_pure": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def adamw(parameters: list[nn.Parameter], conf: TrainConfig) -> torch.optim.AdamW:
    """AdamW as in RECIPE section 3."""
    return torch.optim.AdamW(
        parameters,
        lr=conf.learning_rate,
        betas=conf.adam_betas,
        eps=conf.adam_eps,
        weight_decay=conf.weight_decay,
        fused=True,
    )


class TorchEngine:
    """One device. In bf16, fp32 master weights, gradients and moments stand behind the model's bf16 weights."""

    world = 1

    def __init__(self, module: nn.Module, conf: TrainConfig, device: torch.device) -> None:
        if conf.precision == "fp16":
            raise UserError("precision: fp16 needs loss scaling, which engine: deepspeed has; or use bf16 or fp32")
        self.module, self.device = module.to(device), device
        self.max_grad_norm = conf.max_grad_norm
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.masters: list[nn.Parameter] = self.parameters
        if conf.precision == "bf16":
            self.masters = [nn.Parameter(p.detach().float().clone()) for p in self.parameters]
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.register_post_accumulate_grad_hook(_into(master))
        self.optimizer = adamw(self.masters, conf)

    def loss(self, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self.module(batch.to(self.device))
        return loss

    def backward(self, loss: torch.Tensor, tokens: int, last: bool) -> None:
        """Adds a micro batch's gradient; `tokens` are the whole step's, `last` says that a step follows."""
        (loss / tokens).backward()

    def total(self, value: torch.Tensor) -> float:
        """Sum over the ranks."""
        return float(value)

    def step(self, lr: float) -> float:
        """One optimizer step; returns the gradient's norm before clipping. Does nothing if that isn't finite."""
        norm = float(nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm))
        if norm == norm and norm != float("inf"):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            if self.masters is not self.parameters:
                with torch.no_grad():
                    torch._foreach_copy_(list(self.parameters), list(self.masters))
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def save(self, folder: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name, master in zip(self.names, self.masters, strict=True):
            state = self.optimizer.state[master]
            tensors[f"exp_avg.{name}"], tensors[f"exp_avg_sq.{name}"] = state["exp_avg"], state["exp_avg_sq"]
            tensors[f"step.{name}"] = state["step"]
            if self.masters is not self.parameters:
                tensors[f"master.{name}"] = master.detach()
        save_file(tensors, folder / "optimizer.safetensors")

    def load(self, folder: Path) -> None:
        tensors = load_file(folder / "optimizer.safetensors", device=str(self.device))
        with torch.no_grad():
            for name, master, parameter in zip(self.names, self.masters, self.parameters, strict=True):
                if f"master.{name}" in tensors:
                    master.copy_(tensors[f"master.{name}"])
                    parameter.copy_(master)
                self.optimizer.state[master] = {
                    "step": tensors[f"step.{name}"].cpu() if self.device.type == "cpu" else tensors[f"step.{name}"],
                    "exp_avg": tensors[f"exp_avg.{name}"],
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
                }

    def barrier(self) -> None:
        return

    def close(self) -> None:
        return


def _into(master: nn.Parameter) -> Callable[[torch.Tensor], None]:
    """Hook that adds a fresh gradient to the fp32 one and lets go of it: micro batches add up without rounding."""

    def add(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return add


class DeepSpeedEngine:
    """Ranks started by torchrun or the deepspeed launcher; ZeRO as the config's `deepspeed` section says."""

    def __init__(self, module: nn.Module, conf: TrainConfig, device: torch.device) -> None:
        import deepspeed

        if conf.precision == "bf16_pure":
            raise UserError("precision: bf16_pure is for engine: torch; DeepSpeed keeps fp32 master weights (use bf16)")
        # Its own averaging is undone in `backward`: no division by the accumulation steps, and times the ranks that
        # it takes the mean over.
        self.world = int(os.environ["WORLD_SIZE"])
        settings: dict[str, Any] = {
            "zero_optimization": {"stage": 1},
            **conf.deepspeed,
            "train_micro_batch_size_per_gpu": conf.micro_batch_size,
            "gradient_accumulation_steps": -(-conf.global_batch_size // (conf.micro_batch_size * self.world)),
            "gradient_clipping": conf.max_grad_norm,
            "bf16": {"enabled": conf.precision == "bf16"},
            "fp16": {"enabled": conf.precision == "fp16", **conf.deepspeed.get("fp16", {})},
            "steps_per_print": 1 << 62,
            "zero_allow_untested_optimizer": True,
        }
        if conf.precision == "bf16":
            settings.setdefault("data_types", {"grad_accum_dtype": "fp32"})
        parameters = [p for p in module.parameters() if p.requires_grad]
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=adamw(parameters, conf),
            config=settings,
            dist_init_required=False,
        )
        self.device = self.engine.device
        self.module = module

    def loss(self, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self.engine(batch.to(self.device))
        return loss

    def backward(self, loss: torch.Tensor, tokens: int, last: bool) -> None:
        # Set before the backward pass: a step at the end of the data has fewer micro batches than the config implies.
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * (self.world / tokens), scale_wrt_gas=False)

    def total(self, value: torch.Tensor) -> float:
        value = value.detach().clone()
        torch.distributed.all_reduce(value)
        return float(value)

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0)

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder / "deepspeed"), tag="state", save_latest=False)

    def load(self, folder: Path) -> None:
        path, _ = self.engine.load_checkpoint(str(folder / "deepspeed"), tag="state")
        if path is None:
            raise UserError(f"{folder}: holds no DeepSpeed state for {self.world} ranks; resume with the same number")

    def barrier(self) -> None:
        torch.distributed.barrier()

    def close(self) -> None:
        torch.distributed.destroy_process_group()


Engine = TorchEngine | DeepSpeedEngine


def device_for(rank_on_node: int) -> torch.device:
    return torch.device("cuda", rank_on_node) if torch.cuda.is_available() else torch.device("cpu")


def start(name: str) -> torch.device:
    """Joins the process group if there is one to join; returns this rank's device.

    UserError when several ranks were started for an engine of one, or one without a launcher for DeepSpeed.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = device_for(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if name == "torch":
        if world > 1:
            raise UserError("engine: torch runs on one device; several ranks were started: set engine=deepspeed")
        return device
    try:
        import deepspeed
    except ImportError:
        raise UserError("engine: deepspeed is not installed: pip install 'pandallm[deepspeed]'") from None
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:  # started as a plain command: a group of one
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return device


ENGINES: dict[str, type[TorchEngine] | type[DeepSpeedEngine]] = {"torch": TorchEngine, "deepspeed": DeepSpeedEngine}
