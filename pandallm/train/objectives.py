"""What is minimised. An objective is a module whose forward takes a Batch and returns the *sum* of its losses (nats).

The loop divides by the trained tokens of the whole step, so that neither accumulation nor the number of ranks matters.
N = trained positions, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from pandallm.data.loader import Batch

LOGITS_AT_ONCE = 1 << 27  # bytes of a chunk of logits, in the model's own precision
LOGITS_IN_CACHE = 1 << 21  # numbers that a CPU turns into probabilities at once, in fp32: they fit its cache


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of the output head, in chunks, with the gradient made on the way: logits are never all held."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """hidden [N, D], weight [V, D], targets [N] -> sum over N of -log p(target), fp32 scalar."""
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: torch.Tensor | None = None
        chunk = max(1, LOGITS_AT_ONCE // (weight.shape[0] * weight.element_size()))
        for start in range(0, len(targets), chunk):
            h, target = hidden[start : start + chunk], targets[start : start + chunk]
            logits = h @ weight.T  # [n, V]
            total += _cross_entropy(logits, target, needs_hidden or needs_weight)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[start : start + chunk])
            if needs_weight:
                grad = logits.T @ h  # [V, D]
                if len(targets) > chunk:  # chunks add up in fp32
                    grad = grad.float() if grad_weight is None else grad_weight.add_(grad)
                grad_weight = grad
        if needs_weight:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.grads = grad_hidden, grad_weight
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Once only: the gradients are scaled where they lie."""
        (upstream,) = grads
        hidden, weight = (None if g is None else g.mul_(upstream) for g in ctx.grads)
        del ctx.grads
        return hidden, weight, None


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, want_gradient: bool) -> torch.Tensor:
    """Sum of -log p over n rows of logits [n, V], computed in fp32; the logits become its gradient, in place."""
    rows = len(targets) if logits.is_cuda else max(1, LOGITS_IN_CACHE // logits.shape[1])
    losses = []
    for block, target in zip(logits.split(rows), targets.split(rows), strict=True):
        log_p = torch.log_softmax(block, -1, dtype=torch.float32)
        at = target[:, None]  # [n, 1]
        losses.append(-log_p.gather(1, at).sum())
        if want_gradient:  # softmax - one-hot
            block.copy_(log_p.exp_().scatter_add_(1, at, torch.full_like(at, -1, dtype=log_p.dtype)))
    return torch.stack(losses).sum()


class CausalLM(torch.nn.Module):
    """Next-token prediction on the trained tokens. Pretraining and instruction tuning differ in their masks alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def hidden(self, batch: Batch) -> torch.Tensor:
        """The last layer's output [1, T, D]."""
        hidden: torch.Tensor = self.model.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            cu_seqlens=batch.cu_seqlens,
            borders=batch.borders,
            longest=batch.longest,
        ).last_hidden_state
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of some positions' output [N, D]."""
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    def forward(self, batch: Batch) -> torch.Tensor:
        """Sum of -log p over the batch's trained tokens, fp32 scalar."""
        # Only what is trained goes through the head: in instruction data that is a part of the positions.
        trained = self.hidden(batch)[0, batch.trained_at]  # [N, D]
        weight = self.model.get_output_embeddings().weight
        if not torch.is_grad_enabled():  # which HeadLoss can't see: it would make the weight's gradient for nothing
            weight = weight.detach()
        loss: torch.Tensor = HeadLoss.apply(trained, weight, batch.targets)
        return loss


OBJECTIVES = {"causal_lm": CausalLM}
