"""What is minimised. An objective is a module whose forward takes a Batch and returns the *sum* of its losses (nats).

The loop divides by the trained tokens of the whole step, so that neither accumulation nor the number of ranks matters.
N = trained positions, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from pandallm.data.loader import Batch

LOGITS_AT_ONCE = 1 << 25  # numbers held by a chunk of logits: 128 MiB in fp32


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of the output head, in chunks, with the gradient made on the way: logits are never all held."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """hidden [N, D], weight [V, D], targets [N] -> sum over N of -log p(target), fp32 scalar."""
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        chunk = max(1, LOGITS_AT_ONCE // weight.shape[0])
        for start in range(0, len(targets), chunk):
            h, target = hidden[start : start + chunk], targets[start : start + chunk, None]
            logits = (h @ weight.T).float()  # [n, V]
            log_sum = logits.logsumexp(-1, keepdim=True)  # [n, 1]
            total += (log_sum - logits.gather(1, target)).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax - one-hot
            grad = logits.sub_(log_sum).exp_()
            grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ h
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (upstream,) = grads
        scaled = [None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors]
        return scaled[0], scaled[1], None


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
        loss: torch.Tensor = HeadLoss.apply(trained, self.model.get_output_embeddings().weight, batch.targets)
        return loss


OBJECTIVES = {"causal_lm": CausalLM}
