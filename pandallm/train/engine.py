"""Where a step runs: one device by plain torch, or many by DeepSpeed. The only file that imports deepspeed.

Both are given a sum of losses over a micro batch and the step's number of trained tokens, and make the gradient of
sum / tokens over all micro batches and ranks. Both keep the same state: an fp32 master (where weights are bf16 or fp16)
and Adam's two moments for every weight, saved in pieces that the other one, or another number of ranks, can read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from pandallm.config import UserError
from pandallm.data.loader import Batch
from pandallm.model.checkpoint import Pieces, Tensors
from pandallm.ranks import Heartbeat
from pandallm.train.objectives import CausalLM
from pandallm.train.settings import OURS, TrainConfig

DTYPES = {"bf16": torch.bfloat16, "bf16_pure": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
MOMENTS = ("exp_avg", "exp_avg_sq")
Fragment = tuple[str, int, Tensors]  # name of a weight, where this rank's stretch of it starts, kind -> values [n]


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


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, whatever happens to the original."""
    return tensor.detach().to("cpu", copy=True).contiguous()


class TorchEngine:
    """One device. In bf16, fp32 master weights, gradients and moments stand behind the model's bf16 weights."""

    world = 1
    overflowed = False

    def __init__(self, module: CausalLM, conf: TrainConfig, device: torch.device) -> None:
        if conf.precision == "fp16":
            raise UserError("precision: fp16 needs loss scaling, which engine: deepspeed has; or use bf16 or fp32")
        self.module, self.device = module.to(device), device
        self.max_grad_norm = conf.max_grad_norm
        named = [(name, p) for name, p in module.model.named_parameters() if p.requires_grad]
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

    def total(self, values: list[float]) -> list[float]:
        """Sums over the ranks."""
        return values

    def step(self, lr: float) -> float:
        """One optimizer step; returns the gradient's norm before clipping. If that isn't finite nothing is done, and
        the gradient stays to be looked at."""
        norm = float(nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            if self.masters is not self.parameters:
                with torch.no_grad():
                    torch._foreach_copy_(list(self.parameters), list(self.masters))
            self.optimizer.zero_grad(set_to_none=True)
        return norm

    def bad_gradients(self) -> list[str]:
        """Weights whose gradient holds a value that isn't finite."""
        grads = zip(self.names, (m.grad for m in self.masters), strict=True)
        return [name for name, g in grads if g is not None and not torch.isfinite(g).all()]

    def weights(self, names: list[str]) -> Tensors:
        """Copies of weights in host memory."""
        parameters = dict(self.module.model.named_parameters())
        return {name: _copy(parameters[name]) for name in names}

    def pieces(self) -> Tensors:
        """Copies of this rank's state in host memory, as model/checkpoint.py keeps it."""
        found: Tensors = {}
        for name, master in zip(self.names, self.masters, strict=True):
            if state := self.optimizer.state.get(master):
                found |= {f"{kind}.{name}@0": _copy(state[kind]).flatten() for kind in MOMENTS}
            if self.masters is not self.parameters:
                found[f"master.{name}@0"] = _copy(master).flatten()
        return found

    def state(self) -> dict[str, Any]:
        """What the trainer's state holds of the engine: how often the optimizer stepped."""
        steps = [float(state["step"]) for state in self.optimizer.state.values() if "step" in state]
        return {"updates": int(max(steps, default=0))}

    @torch.no_grad()
    def restore(self, pieces: Pieces, state: dict[str, Any]) -> None:
        """Puts a checkpoint's state in place of the fresh one."""
        for name, master, parameter in zip(self.names, self.masters, self.parameters, strict=True):
            if master is not parameter and f"master.{name}" in pieces:
                pieces.fill(f"master.{name}", 0, master.view(-1))
                parameter.copy_(master)
            if not state["updates"]:
                continue
            moments = {kind: torch.empty_like(master) for kind in MOMENTS}
            for kind, moment in moments.items():
                pieces.fill(f"{kind}.{name}", 0, moment.view(-1))
            step = torch.tensor(float(state["updates"]), device=self.device)
            self.optimizer.state[master] = {"step": step, **moments}

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
    """Ranks started by torchrun, the deepspeed launcher or srun; ZeRO as the config's `deepspeed` section says."""

    def __init__(self, module: CausalLM, conf: TrainConfig, device: torch.device) -> None:
        import deepspeed

        self.world = int(os.environ["WORLD_SIZE"])
        self.stage = int(conf.zero_optimization["stage"])
        if conf.precision == "bf16_pure":
            raise UserError("precision: bf16_pure is for engine: torch; DeepSpeed keeps fp32 master weights (use bf16)")
        if conf.precision == "fp16" and device.type == "cpu":
            raise UserError("precision: DeepSpeed computes in fp16 on GPUs only; use bf16 or fp32")
        if conf.precision != "fp32" and self.stage == 0:
            raise UserError(f"deepspeed.zero_optimization.stage: 0 is for fp32; in {conf.precision} take 1, 2 or 3")
        self.plain = self.stage == 0 and conf.precision == "fp32"  # DeepSpeed then tells no norm
        self.module = module
        self.named: list[tuple[str, Any]] = [
            (name, p) for name, p in module.model.named_parameters() if p.requires_grad
        ]
        try:
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=module,
                optimizer=adamw([p for _, p in self.named], conf),
                config=self._settings(conf),
                dist_init_required=False,
            )
        except ValidationError as e:
            wrong = e.errors()[0]
            key = ".".join(map(str, wrong["loc"]))
            raise UserError(f"deepspeed: {e.title}: {key}: {wrong['msg']} (got {wrong['input']!r})") from None
        self.device = self.engine.device
        self._heartbeat = Heartbeat() if self.world > 1 else None

    def _settings(self, conf: TrainConfig) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on offloaded state too
            **{key: value for key, value in conf.deepspeed.items() if key not in OURS},
            "zero_optimization": conf.zero_optimization,
            "train_micro_batch_size_per_gpu": conf.micro_batch_size,
            "gradient_accumulation_steps": -(-conf.global_batch_size // (conf.micro_batch_size * self.world)),
            "gradient_clipping": conf.max_grad_norm,
            "bf16": {**conf.deepspeed.get("bf16", {}), "enabled": conf.precision == "bf16"},
            "fp16": {**conf.deepspeed.get("fp16", {}), "enabled": conf.precision == "fp16"},
            "steps_per_print": 1 << 62,
            "zero_allow_untested_optimizer": True,
        }
        if conf.precision == "bf16":
            settings.setdefault("data_types", {"grad_accum_dtype": "fp32"})
        return settings

    @property
    def overflowed(self) -> bool:
        """Whether the last step was left out because fp16's loss scale was too large: it is smaller now."""
        return bool(self.engine.fp16_enabled() and self.optimizer.overflow)

    def loss(self, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self.engine(batch.to(self.device))
        return loss

    def backward(self, loss: torch.Tensor, tokens: int, last: bool) -> None:
        # DeepSpeed's own averaging is undone: no division by the accumulation steps, and times the ranks that it takes
        # the mean over. The border is set before: a step at the data's end has fewer micro batches than the config.
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * (self.world / tokens), scale_wrt_gas=False)

    def total(self, values: list[float]) -> list[float]:
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(summed)
        return [float(value) for value in summed.tolist()]

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        grads = [p.grad for _, p in self.named if p.grad is not None] if self.plain else []
        norm = float(nn.utils.get_total_norm(grads)) if grads else None
        if norm is not None and not math.isfinite(norm):
            return norm  # stages 1 to 3 leave the weights alone by themselves
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) if norm is None else norm

    def bad_gradients(self) -> list[str]:
        return []  # they are reduced, flattened and freed by then

    def weights(self, names: list[str]) -> Tensors:
        """Copies of weights in host memory. Under ZeRO-3 all ranks call this, and one weight at a time is gathered."""
        found, wanted = {}, set(names)
        for name, p in self.module.model.named_parameters():
            if self.stage == 3:
                import deepspeed

                with deepspeed.zero.GatheredParameters([p]):
                    if name in wanted:
                        found[name] = _copy(p)
            elif name in wanted:
                found[name] = _copy(p)
        return found

    def _fragments(self) -> Iterator[Fragment]:
        """This rank's stretch of every weight's state: views, in DeepSpeed's own buffers."""
        rank, updated = torch.distributed.get_rank(), bool(self._adam())
        for name, p in self.named:
            if self.stage == 3:
                start = rank * p.ds_tensor.ds_numel
                size = min(p.ds_tensor.ds_numel, p.ds_numel - start)  # the last ranks' stretches may be padded
                if size <= 0:
                    continue
                kinds = (None, *MOMENTS) if updated else (None,)
                parts = {k or "master": self.optimizer.get_local_fp32_param(p, k)[:size] for k in kinds}
            elif hasattr(p, "_hp_mapping"):
                if (mapping := p._hp_mapping) is None:
                    continue  # another rank's
                start, parts = mapping.lp_fragment_address.start, {"master": mapping.hp_fragment}
                if updated:
                    parts |= {kind: mapping.get_optim_state_fragment(kind) for kind in MOMENTS}
            else:  # stage 0 in fp32: a plain optimizer, the same on every rank
                start, parts = 0, {"master": p.data.view(-1)}
                if updated:
                    parts |= {kind: self.optimizer.state[p][kind].view(-1) for kind in MOMENTS}
            yield name, start, parts

    def _adam(self) -> dict[Any, Any]:
        """The optimizer's own state: by weight, or by a flat tensor of many."""
        state: dict[Any, Any] = getattr(self.optimizer, "optimizer", self.optimizer).state
        return state

    def pieces(self) -> Tensors:
        if self.stage == 0 and torch.distributed.get_rank():
            return {}
        return {f"{k}.{name}@{at}": _copy(v) for name, at, parts in self._fragments() for k, v in parts.items()}

    def state(self) -> dict[str, Any]:
        steps = [float(state["step"]) for state in self._adam().values() if "step" in state]
        scaler = getattr(self.optimizer, "loss_scaler", None)
        scale = {key: value for key, value in vars(scaler).items() if isinstance(value, int | float)} if scaler else {}
        return {"updates": int(max(steps, default=0)), "loss_scale": scale}

    @torch.no_grad()
    def restore(self, pieces: Pieces, state: dict[str, Any]) -> None:
        if state["updates"]:
            self._make_moments(float(state["updates"]))
        for name, start, parts in self._fragments():
            for kind, values in parts.items():
                if kind == "master" and f"master.{name}" not in pieces:
                    continue  # fp32: the weight is its own master, and the model's file has it
                pieces.fill(f"{kind}.{name}", start, values)
        if self.engine.fp16_enabled():
            vars(self.optimizer.loss_scaler).update(state.get("loss_scale", {}))

    def _make_moments(self, updates: float) -> None:
        """Gives the optimizer the state that its first step would: torch makes it only then."""
        adam = getattr(self.optimizer, "optimizer", self.optimizer)
        if self.stage == 3:
            flat = self.optimizer.fp32_partitioned_groups_flat
        else:
            flat = [p for group in adam.param_groups for p in group["params"]]
        for p in flat:
            zeros = {kind: torch.zeros_like(p) for kind in MOMENTS}
            adam.state[p] = {"step": torch.tensor(updates, device=p.device), **zeros}
        if hasattr(self.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def barrier(self) -> None:
        torch.distributed.barrier()

    def close(self) -> None:
        if self._heartbeat:
            self._heartbeat.close()
            self.barrier()  # rank 0 may hold the store that the others' hearts beat in: it leaves when all have stopped
        torch.distributed.destroy_process_group()


Engine = TorchEngine | DeepSpeedEngine
ENGINES: dict[str, type[TorchEngine] | type[DeepSpeedEngine]] = {"torch": TorchEngine, "deepspeed": DeepSpeedEngine}


def start(name: str, device: torch.device) -> None:
    """Joins the process group if there is one to join.

    UserError when several ranks were started for an engine of one, or DeepSpeed is missing.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if name == "torch":
        if world > 1:
            raise UserError("engine: torch runs on one device; several ranks were started: set engine=deepspeed")
        return
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        raise UserError("engine: deepspeed is not installed: pip install 'pandallm[deepspeed]'") from None
    from pandallm.train import builds  # not at the top: it needs a Unix

    builds.end_with_their_process()
    if "RANK" not in os.environ:  # started as a plain command: a group of one
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
