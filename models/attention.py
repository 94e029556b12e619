"""Attention over sequences, through whichever kernel: all give the same numbers (tested).

q, k, v are [B, H, L, D] (heads before length). `mask` is bool, True where a query may look at a key;
`bias` is added to the logits. Both broadcast to [B, H, Lq, Lk].

Below the kernels, what the transformers share: sequences of different lengths packed end to end, rotary
positions over time, row and column, and the layers of self- and cross-attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None  # type: ignore[assignment]

Backend = Literal["auto", "plain", "math", "efficient", "flash", "cudnn"]
_SDPA = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
_backend: Backend = "auto"
MOST_ROWS = 65_535  # sequences a CUDA kernel takes at once: its grid's second side


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
    if len(q) > MOST_ROWS and all(x is None or x.ndim < 4 or len(x) == 1 for x in (mask, bias)):
        parts = zip(q.split(MOST_ROWS), k.split(MOST_ROWS), v.split(MOST_ROWS), strict=True)
        return torch.cat([attend(a, b, c, mask, bias) for a, b, c in parts])  # over time there are B·h·w
    if _backend == "plain":
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        logits = logits if bias is None else logits + bias
        logits = logits if mask is None else logits.masked_fill(~mask, float("-inf"))
        return torch.softmax(logits, dim=-1).nan_to_num(0.0) @ v
    if bias is not None:
        bias = bias.to(q.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    if mask is not None and mask.ndim == 3:
        mask = mask[None]  # the fast kernels know two or four axes
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, H·D] → [B, H, L, D]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, H, L, D] → [B, L, H·D]"""
    return x.transpose(1, 2).flatten(2)


class Packing(NamedTuple):
    """Where each of S sequences lies when all are laid end to end on one axis, without padding."""

    offsets: Tensor  # int32 [S + 1]: the beginnings, then the end of the last
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | None = None) -> Packing:
        offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(offsets.to(device), max(lengths))


def attend_packed(q: Tensor, k: Tensor, v: Tensor, queries: Packing, keys: Packing) -> Tensor:
    """Block-diagonal attention: sequence i of the queries sees sequence i of the keys, nothing else.

    q [1, H, Lq, D]; k, v [1, H, Lk, D]; L the sum of the lengths. One variable-length kernel on CUDA in half
    precision ('auto', 'flash'); otherwise `attend` once a sequence, which costs no padding either.
    """
    half = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    if half and _backend in ("auto", "flash") and varlen_attn is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # L H D each
        sizes = queries.offsets, keys.offsets, queries.longest, keys.longest
        return cast(Tensor, varlen_attn(q, k, v, *sizes)).transpose(0, 1)[None]
    spans = zip(pairwise(queries.offsets.tolist()), pairwise(keys.offsets.tolist()), strict=True)
    return torch.cat([attend(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d]) for (a, b), (c, d) in spans], dim=2)


class Rotary(NamedTuple):
    """Angles that turn queries and keys, so that their product knows only how far apart they are."""

    cos: Tensor  # [L, D/2]
    sin: Tensor

    @classmethod
    def of(cls, positions: Tensor, size: int, base: float = 10_000.0) -> Rotary:
        """positions [L, 3]: time, row, column; `size`: D, the width of a head, even.

        Of the c = D/2 pairs of features, c − 2⌊c/3⌋ turn with time, ⌊c/3⌋ with the row and ⌊c/3⌋ with the
        column, pair i of n at rate base^(−i/n) (Su et al. 2021, eq. 15; split over axes as Wan does).
        """
        third = size // 2 // 3
        pairs = size // 2 - 2 * third, third, third
        rates = [base ** -(torch.arange(n, device=positions.device).double() / n) for n in pairs]
        angle = torch.cat([positions[:, i, None] * rate for i, rate in enumerate(rates)], dim=-1)
        return cls(angle.cos(), angle.sin())

    def to(self, device: torch.device, dtype: torch.dtype) -> Rotary:
        return Rotary(self.cos.to(device, dtype), self.sin.to(device, dtype))

    def turn(self, x: Tensor) -> Tensor:
        """x [B, H, L, D], neighbouring features (2i, 2i + 1) as a complex number, turned; x's type."""
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = real * self.cos - imaginary * self.sin, real * self.sin + imaginary * self.cos
        return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


class SelfAttention(nn.Module):
    """[B, L, dim] → [B, L, dim].

    Args:
        qk_norm: RMS norm of each head's queries and keys, which keeps the logits bounded (Dehghani et al.
            2023, sec. 2; Henry et al. 2020).
    """

    def __init__(self, dim: int, heads: int, qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = _head_norms(dim, heads, qk_norm)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """mask as in `attend`; with a packing B is 1 and each sequence sees itself only."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # B H L D each
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotary.turn(q), rotary.turn(k)
        out = attend(q, k, v, mask) if packing is None else attend_packed(q, k, v, packing, packing)
        return self.proj(join_heads(out))


class CrossAttention(nn.Module):
    """x [B, L, dim] looks at tokens [B, M, dim] → [B, L, dim]."""

    def __init__(self, dim: int, heads: int, qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = _head_norms(dim, heads, qk_norm)

    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        mask: Tensor | None = None,
        packings: tuple[Packing, Packing] | None = None,
    ) -> Tensor:
        """mask: bool [B, M], True where there is a token. packings: of x and of tokens; then B is 1."""
        q = split_heads(self.q(x), self.heads)
        k, v = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # B H M D each
        q, k = self.q_norm(q), self.k_norm(k)
        if packings is None:
            out = attend(q, k, v, None if mask is None else mask[:, None, None])
        else:
            out = attend_packed(q, k, v, *packings)
        return self.proj(join_heads(out))


class HeadNorm(nn.RMSNorm):
    """RMS norm over a head's features; its weight takes x's type, as autocast does for linear layers."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def _head_norms(dim: int, heads: int, qk_norm: bool) -> tuple[nn.Module, nn.Module]:
    if dim % heads:
        raise ValueError(f"heads={heads} does not divide dim={dim}: choose a divisor")
    if not qk_norm:
        return nn.Identity(), nn.Identity()
    return HeadNorm(dim // heads, eps=1e-6), HeadNorm(dim // heads, eps=1e-6)


Axis = Literal["full", "space", "time"]


def along(axis: Axis, attention: Callable[..., Tensor], x: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attention(x [B, L, dim], mask)` on x [B, T, N, dim]: over all tokens, a frame's, or those at a place."""
    if axis == "full":
        return attention(x.flatten(1, 2), mask).view_as(x)
    if axis == "space":
        return attention(x.flatten(0, 1), mask).view_as(x)
    b, _, n, _ = x.shape
    return attention(x.transpose(1, 2).flatten(0, 1), mask).unflatten(0, (b, n)).transpose(1, 2)
