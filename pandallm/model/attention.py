"""Attention that stops at document borders, registered with Transformers for every architecture at once.

B = 1 (rows lie end to end), H = query heads, K = key/value heads, T = tokens, D = head size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

PACKED = "panda_packed"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, K, T, D]
    value: torch.Tensor,  # [1, K, T, D]
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seqlens: list[int] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document: one call a document, so no T x T mask and no work across borders.

    `cu_seqlens` [documents + 1] are the borders in T. Returns ([1, T, H, D], None).
    """
    if cu_seqlens is None:
        raise ValueError("packed attention needs cu_seqlens; for generation load the model with attention='sdpa'")
    grouped = query.shape[1] != key.shape[1]
    pieces = []
    for start, end in pairwise(cu_seqlens):
        span = slice(start, end)
        mask = _band(end - start, sliding_window, query.device)
        pieces.append(
            F.scaled_dot_product_attention(
                query[:, :, span],
                key[:, :, span],
                value[:, :, span],
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None  # [1, H, T, D] -> [1, T, H, D]


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Mask [L, L] of a sliding window, or None where the document fits into it and plain causal attention will do."""
    if window is None or length <= window:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)


def register() -> None:
    """Makes PACKED an `attn_implementation` of Transformers, with no mask of its own."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, lambda *_, **__: None)
