"""Attention that stops at document borders, registered with Transformers for every architecture at once.

B = 1 (rows lie end to end), H = query heads, K = key/value heads, T = tokens, D = head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

PACKED = "panda_packed"
SHORT = 400  # tokens: up to this length torch's CPU kernel is faster in fp32 than in bf16 (2.2 times at 100)


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
    borders: torch.Tensor | None = None,
    longest: int = 0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document: no T x T mask, and no work across borders. Returns ([1, T, H, D], None).

    `cu_seqlens` [documents + 1] are the borders in T, `borders` the same as int32 on the device, `longest` a bound of
    the documents' lengths. On a GPU in bf16 or fp16 one kernel takes all documents; else it is one call a document.
    """
    if cu_seqlens is None or borders is None:
        raise ValueError("packed attention needs cu_seqlens; for generation load the model with attention='sdpa'")
    kernel = _varlen() if query.is_cuda and query.dtype != torch.float32 and not dropout else None
    if kernel is None:
        return _by_document(query, key, value, cu_seqlens, scaling, dropout, sliding_window), None
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, H or K, D]
    left = -1 if sliding_window is None else sliding_window - 1
    return kernel(q, k, v, borders, longest, scaling, left)[None], None


@cache
def _varlen() -> Callable[..., Any] | None:
    """torch's kernel for documents of different lengths (an older one knows no grouped heads), or flash-attn's."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            return lambda q, k, v, borders, longest, scale, left: varlen_attn(
                q, k, v, borders, borders, longest, longest, scale=scale, window_size=(left, 0), enable_gqa=True
            )
    except ImportError:
        pass
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return lambda q, k, v, borders, longest, scale, left: flash_attn_varlen_func(
        q, k, v, borders, borders, longest, longest, softmax_scale=scale, causal=True, window_size=(left, 0)
    )


def backend(device: torch.device) -> str:
    """What computes attention on a device, for the run's record."""
    return "one SDPA call a document" if device.type == "cpu" or _varlen() is None else "variable-length kernel"


@torch.compiler.disable
def _by_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: list[int],
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    pieces = []
    # Split, not sliced: the gradient of a slice is a tensor of the whole row's size for every document.
    for q, k, v in zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True):
        if q.device.type == "cpu" and q.shape[2] <= SHORT:
            q, k, v = q.float(), k.float(), v.float()
        mask = _band(q.shape[2], sliding_window, query.device)
        pieces.append(
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=grouped,
            ).to(query.dtype)
        )
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous()  # [1, H, T, D] -> [1, T, H, D]


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
