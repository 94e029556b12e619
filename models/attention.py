"""Attention over sequences, through whichever kernel: all give the same numbers (tested).

q, k, v are [B, H, L, D] (heads before length). `mask` is bool, True where a query may look at a key;
`bias` is added to the logits. Both broadcast to [B, H, Lq, Lk].
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Backend = Literal["auto", "plain", "math", "efficient", "flash", "cudnn"]
_SDPA = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
_backend: Backend = "auto"


@contextlib.contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Every attention inside uses this kernel: 'auto' is torch's choice, 'plain' is the formula written out."""
    global _backend
    before, _backend = _backend, name
    try:
        with sdpa_kernel(_SDPA[name]) if name in _SDPA else contextlib.nullcontext():
            yield
    finally:
        _backend = before


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √D + bias) v, [B, H, Lq, D]; a query that may look nowhere gets 0."""
    if _backend == "plain":
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        logits = logits if bias is None else logits + bias
        logits = logits if mask is None else logits.masked_fill(~mask, float("-inf"))
        return torch.softmax(logits, dim=-1).nan_to_num(0.0) @ v
    if bias is not None:
        bias = bias.to(q.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, H·D] → [B, H, L, D]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, H, L, D] → [B, L, H·D]"""
    return x.transpose(1, 2).flatten(2)
