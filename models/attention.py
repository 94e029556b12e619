"""Attention over sequences, through whichever kernel: all give the same numbers (tested).

q, k, v are [B, H, L, D] (heads before length). Who may look at whom is one structure, `Mask`: documents that lie end
to end on one axis, padding, frames, causal order; every kernel reads of it what it needs. `bias` is added to the
logits and broadcasts to [B, H, Lq, Lk].

Below the kernels, what the transformers share: rotary positions over time, row and column, and the layers of self-
and cross-attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache, wraps
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import _get_current_dispatch_mode

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None  # type: ignore[assignment]

Kernel = Literal["auto", "plain", "sdpa", "math", "efficient", "flash", "cudnn", "flex", "varlen"]
"""auto: by document where there are some, else torch's choice. plain: the formula written out. sdpa: torch's choice
under a dense mask; math, efficient, flash, cudnn: that one of torch's. flex: a block mask, which skips blocks of keys
that none may look at. varlen: by document."""

_SDPA = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
flex_attention: Any = flex.flex_attention
_DENSE = ("sdpa", "math", "efficient")  # of documents too
MOST_ROWS = 65_535  # sequences a CUDA kernel takes at once: its grid's second side


# ---------------------------------------------------------------- who may look at whom


class Spans(NamedTuple):
    """Where each of S documents lies when all are laid end to end on one axis, without padding."""

    offsets: Tensor  # int32 [S + 1]: the beginnings, then the end of the last
    longest: int
    ends: tuple[int, ...]  # the same as `offsets`, on the host

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | None = None) -> Spans:
        return cls._at((0, *accumulate(lengths)), device)

    @classmethod
    def _at(cls, ends: tuple[int, ...], device: torch.device | None) -> Spans:
        longest = max(b - a for a, b in pairwise(ends))
        return cls(torch.tensor(ends, dtype=torch.int32).to(device), longest, ends)

    def between(self, start: int, stop: int) -> Spans:
        """Those of the places from start to stop; of a document that lies elsewhere nothing is left."""
        ends = tuple(min(max(x, start), stop) - start for x in self.ends)
        return self._at(ends, self.offsets.device)


def owners(lengths: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Which document each place belongs to, int64 [sum of lengths]."""
    each = torch.arange(len(lengths), device=device)
    return each.repeat_interleave(torch.tensor(lengths, device=device), output_size=sum(lengths))


@dataclass(frozen=True, eq=False)
class Tokens:
    """What a mask knows of the places of one axis, each int [L], or [B, L] where batch rows differ.

    document: which one a place belongs to; −1: padding, which no one sees. frame: of the clip, see `Mask.moving`.
    place: in causal order. spans: where documents lie, if each is one run of places, in order.
    """

    document: Tensor | None = None
    frame: Tensor | None = None
    place: Tensor | None = None
    spans: Spans | None = None

    def between(self, start: int, stop: int) -> Tokens:
        document, frame, place = (
            None if x is None else x[..., start:stop] for x in (self.document, self.frame, self.place)
        )
        return Tokens(document, frame, place, None if self.spans is None else self.spans.between(start, stop))


ANY = Tokens()  # of which nothing is known


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys a query may look at: those for which every rule says yes that both sides have something of.

    documents: its own. frames: the clip's where it is in the clip, its own where it is an independent image.
    causal: none of a later place.

    Args:
        moving: how many frames the clip has; those after them are images by themselves.
        aligned: both sides are the same places, so within a document the i-th query sees the first i keys.
        context: what attends in place of a kernel, (q, k, v, mask) → out, where the sequence lies on several ranks or
            is looked at in blocks: models/ring_attention.py makes such masks.
    """

    queries: Tokens = ANY
    keys: Tokens = ANY
    moving: int = 0
    causal: bool = False
    aligned: bool = False
    block: Any = None  # flex_attention's BlockMask, where it was `prepared`
    context: Callable[[Tensor, Tensor, Tensor, Mask], Tensor] | None = None

    @classmethod
    def documents(
        cls, queries: Sequence[int], keys: Sequence[int] | None = None, device: torch.device | None = None
    ) -> Mask:
        """Packed: document i of the queries, so long, sees document i of the keys (none: the same axis)."""
        sides = []
        for lengths in (queries, keys):
            if lengths is not None:
                sides.append(Tokens(owners(lengths, device), spans=Spans.of(lengths, device)))
        return cls(sides[0], sides[-1])

    @classmethod
    def padding(cls, there: Tensor | None) -> Mask | None:
        """Keys where `there` (bool [B, L]) says that a token is."""
        return None if there is None else cls(keys=Tokens(there.int() - 1))

    @classmethod
    def frames(
        cls, frames: int, images: int, tokens: int = 1, device: torch.device | None = None
    ) -> Mask | None:
        """Of a clip whose last frames are independent images (Ho et al. 2022); None where there are none.

        Args:
            tokens: of a frame.
        """
        if not images:
            return None
        side = Tokens(frame=torch.arange(frames, device=device).repeat_interleave(tokens))
        return cls(side, side, moving=frames - images)

    def in_order(self, queries: int, keys: int | None = None, device: torch.device | None = None) -> Mask:
        """The same and causal: no place sees a later one. Args: their numbers of places (keys: none, the same)."""
        sides = (self.queries, queries), (self.keys, queries if keys is None else keys)
        placed = [replace(side, place=torch.arange(n, device=device)) for side, n in sides]
        aligned = self.queries is self.keys and sides[0] == sides[1]
        return replace(self, queries=placed[0], keys=placed[1], causal=True, aligned=aligned)

    def part(self, queries: tuple[int, int], keys: tuple[int, int]) -> Mask:
        """Of the queries from start to stop and the keys from start to stop, as ring attention meets them."""
        sides = self.queries.between(*queries), self.keys.between(*keys)
        return replace(self, queries=sides[0], keys=sides[1], aligned=self.aligned and queries == keys)

    @property
    def spans(self) -> tuple[Spans, Spans] | None:
        """Of queries and keys, where documents, and perhaps an order within each, are all there is to say."""
        q, k = self.queries, self.keys
        only = q.frame is None and k.frame is None and self.aligned == self.causal
        return (q.spans, k.spans) if only and q.spans is not None and k.spans is not None else None

    @property
    def triangle(self) -> bool:
        """Whether the order is all there is to say: the i-th query sees the first i keys."""
        told = (x for side in (self.queries, self.keys) for x in (side.document, side.frame))
        return self.aligned and all(x is None for x in told)

    @property
    def rows(self) -> int:
        """Batch rows that it tells apart; 1 where it is the same for all."""
        each = (x for side in (self.queries, self.keys) for x in (side.document, side.frame, side.place))
        return max((len(x) for x in each if x is not None and x.ndim > 1), default=1)

    def allows(self, query: Callable[[Tensor], Tensor], key: Callable[[Tensor], Tensor]) -> Tensor:
        """bool, the rules on what `query` and `key` pick of a side's places."""
        q, k, rules = self.queries, self.keys, []
        if k.document is not None:
            rules.append(key(k.document) >= 0)
            if q.document is not None:
                rules.append(query(q.document) == key(k.document))
        if q.frame is not None and k.frame is not None:
            a, b = query(q.frame), key(k.frame)
            rules.append((a == b) | ((a < self.moving) & (b < self.moving)))
        if self.causal and q.place is not None and k.place is not None:
            rules.append(key(k.place) <= query(q.place))
        if not rules:
            return torch.ones((), dtype=torch.bool)
        found = rules[0]
        for rule in rules[1:]:
            found = found & rule
        return found

    def dense(self) -> Tensor:
        """bool [B or 1, 1, Lq or 1, Lk]."""
        return self.allows(lambda x: x.view(-1, 1, x.shape[-1], 1), lambda x: x.view(-1, 1, 1, x.shape[-1]))

    @cached_property
    def _dense(self) -> Tensor:
        return self.dense()

    def prepared(self, kernel: Kernel, queries: int, keys: int, device: torch.device) -> Mask:
        """The same for a kernel that needs more than the rules, made once for all layers. Args: numbers of places."""
        if kernel != "flex" or self.context is not None:
            return self
        return replace(self, block=self.blocks(queries, keys, device))

    def blocks(self, queries: int, keys: int, device: torch.device) -> Any:
        """flex_attention's BlockMask for so many queries and keys."""

        def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return self.allows(
                lambda x: x[b, i] if x.ndim > 1 else x[i], lambda x: x[b, j] if x.ndim > 1 else x[j]
            )

        return flex.create_block_mask(
            rule, None if self.rows == 1 else self.rows, None, queries, keys, device
        )


# ---------------------------------------------------------------- kernels


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    kernel: Kernel = "auto",
) -> Tensor:
    """softmax(q kᵀ / √D + bias) v under the mask, [B, H, Lq, D]; a query that may look nowhere gets 0.

    k and v may have fewer heads, of which H is a multiple: query head h has key head ⌊h · theirs / H⌋ (Ainslie et al.
    2023, grouped queries). Where the mask has a context, that attends, whatever the kernel.
    """
    if mask is not None and mask.context is not None:
        if bias is not None:
            raise ValueError(
                "attention over a ring or in blocks takes no bias: hand in a mask without a context"
            )
        return mask.context(q, k, v, mask)
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if len(q) > MOST_ROWS and (mask is None or mask.rows == 1) and (bias is None or bias.ndim < 4):
        parts = zip(q.split(MOST_ROWS), k.split(MOST_ROWS), v.split(MOST_ROWS), strict=True)
        return torch.cat([attend(a, b, c, mask, bias, kernel) for a, b, c in parts])  # over time: B·h·w
    spans = None if mask is None or bias is not None or kernel in ("plain", "flex", *_DENSE) else mask.spans
    if kernel == "varlen" and spans is None:
        raise ValueError("attention kernel varlen: it knows documents that lie end to end alone; use auto")
    causal = mask is not None and mask.causal
    compiling = torch.compiler.is_compiling()  # then block masks are those that were prepared
    if spans is not None and kernel in ("auto", "flash", "varlen") and _varlen(q):
        return _by_kernel(q, k, v, *spans, causal=causal)
    if spans is not None and not compiling:
        return _one_by_one(q, k, v, *spans, kernel=kernel, causal=causal)
    if kernel == "flex" and mask is not None and bias is None and (mask.block is not None or not compiling):
        block = mask.blocks(q.shape[2], k.shape[2], q.device) if mask.block is None else mask.block
        return (flex_attention if compiling else _flex(q.device))(q, k, v, block_mask=block)
    triangle = mask is not None and mask.triangle and bias is None and kernel != "plain"
    seen = None if mask is None or triangle else mask.dense() if compiling else mask._dense
    if kernel == "plain":
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        logits = logits if bias is None else logits + bias
        logits = logits if seen is None else logits.masked_fill(~seen, float("-inf"))
        return torch.softmax(logits, dim=-1).nan_to_num(0.0) @ v
    if bias is not None:
        bias = bias[None].to(q.dtype) if bias.ndim == 3 else bias.to(q.dtype)  # kernels know two or four axes
        seen = bias if seen is None else bias.masked_fill(~seen, float("-inf"))
    with sdpa_kernel(_SDPA[kernel]) if kernel in _SDPA else contextlib.nullcontext():
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            return _in_float32(q, k, v, seen, triangle)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=triangle)


def _in_float32(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, triangle: bool) -> Tensor:
    """On a CPU torch's kernel goes backward in bf16 slower than in float32: of 16 tokens seven times."""
    seen = seen.float() if seen is not None and seen.is_floating_point() else seen
    with torch.autocast("cpu", enabled=False):
        wide = q.float(), k.float(), v.float()
        return F.scaled_dot_product_attention(*wide, attn_mask=seen, is_causal=triangle).to(q.dtype)


def _varlen(q: Tensor) -> bool:
    """Whether torch's kernel for documents of any length takes it."""
    return (
        q.is_cuda and len(q) == 1 and q.dtype in (torch.float16, torch.bfloat16) and varlen_attn is not None
    )


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, causal: bool) -> Tensor:
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # L H D each
    sizes = queries.offsets, keys.offsets, queries.longest, keys.longest
    window = (-1, 0) if causal else (-1, -1)
    return cast(Tensor, varlen_attn(q, k, v, *sizes, window_size=window)).transpose(0, 1)[None]


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, kernel: Kernel, causal: bool
) -> Tensor:
    """Document by document, which costs no padding either."""
    kernel, out = "auto" if kernel == "varlen" else kernel, []
    sizes = [[b - a for a, b in pairwise(side.ends)] for side in (queries, keys)]
    own = (x.split(of, dim=2) for x, of in ((q, sizes[0]), (k, sizes[1]), (v, sizes[1])))
    for a, b, c in zip(*own, strict=True):
        if length := a.shape[2]:
            order = Mask().in_order(length, device=q.device) if causal else None
            out.append(attend(a, b, c, order, kernel=kernel) if b.shape[2] else a * 0.0)
    return torch.cat(out, dim=2)


@cache
def _flex(device: torch.device) -> Callable[..., Tensor]:
    return torch.compile(flex_attention) if device.type == "cuda" else flex_attention


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, H·D] → [B, H, L, D]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, H, L, D] → [B, L, H·D]"""
    return x.transpose(1, 2).flatten(2)


Make = TypeVar("Make", bound=Callable[..., Any])


def kept(make: Make) -> Make:
    """A table of positions is made once for the same arguments and kept.

    What is made while operations are looked at (counted, on shapes alone) is not: it may be no real tensor.
    """
    stored = lru_cache(maxsize=64)(make)

    @wraps(make)
    def table(*args: Any, **named: Any) -> Any:
        return (make if _get_current_dispatch_mode() else stored)(*args, **named)

    return cast(Make, table)


def rotary_rates(pairs: int, base: float, device: torch.device | None = None) -> Tensor:
    """How fast n pairs of features turn: pair i at base^(−i/n) (Su et al. 2021, eq. 15), float64 [n]."""
    return base ** -(torch.arange(pairs, device=device).double() / pairs)


class Rotary(NamedTuple):
    """Angles that turn queries and keys, so that their product knows only how far apart they are."""

    cos: Tensor  # [L, D/2]
    sin: Tensor

    @classmethod
    def of(cls, positions: Tensor, size: int, base: float = 10_000.0) -> Rotary:
        """positions [L, 3]: time, row, column; `size`: D, the width of a head, even.

        Of the c = D/2 pairs of features, c − 2⌊c/3⌋ turn with time, ⌊c/3⌋ with the row and ⌊c/3⌋ with the
        column, each at `rotary_rates` (split over axes as Wan does).
        """
        third = size // 2 // 3
        pairs = size // 2 - 2 * third, third, third
        rates = [rotary_rates(n, base, positions.device) for n in pairs]
        angle = torch.cat([positions[:, i, None] * rate for i, rate in enumerate(rates)], dim=-1)
        return cls(angle.cos(), angle.sin())

    def to(self, device: torch.device, dtype: torch.dtype) -> Rotary:
        return Rotary(self.cos.to(device, dtype), self.sin.to(device, dtype))

    def turn(self, x: Tensor) -> Tensor:
        """x [B, H, L, D], neighbouring features (2i, 2i + 1) as a complex number, turned; x's type."""
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = real * self.cos - imaginary * self.sin, real * self.sin + imaginary * self.cos
        return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


class AttentionLayer(nn.Module):
    """A layer that asks `attend`; `choose_kernel` says of which kernel."""

    kernel: Kernel = "auto"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, bias: Tensor | None = None
    ) -> Tensor:
        return attend(q, k, v, mask, bias, self.kernel)


def choose_kernel(module: nn.Module, kernel: Kernel) -> None:
    """Every attention layer of the module uses this one from now on."""
    for layer in module.modules():
        if isinstance(layer, AttentionLayer):
            layer.kernel = kernel


QKNorm = Literal["none", "head", "width"]


class SelfAttention(AttentionLayer):
    """[B, L, dim] → [B, L, dim].

    Args:
        qk_norm: RMS norm of queries and keys, which keeps the logits bounded (Dehghani et al. 2023, sec. 2; Henry et
            al. 2020): of each head, or of all at once, as Wan has it.
    """

    def __init__(self, dim: int, heads: int, qk_norm: QKNorm = "none"):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = _qk_norms(dim, heads, qk_norm)

    def forward(self, x: Tensor, mask: Mask | None = None, rotary: Rotary | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # B L dim each
        q, k, v = (split_heads(y, self.heads) for y in (self.q_norm(q), self.k_norm(k), v))  # B H L D
        if rotary is not None:
            q, k = rotary.turn(q), rotary.turn(k)
        return self.proj(join_heads(self.attend(q, k, v, mask)))


class CrossAttention(AttentionLayer):
    """x [B, L, dim] looks at tokens [B, M, dim] → [B, L, dim]."""

    def __init__(self, dim: int, heads: int, qk_norm: QKNorm = "none"):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = _qk_norms(dim, heads, qk_norm)

    def forward(self, x: Tensor, tokens: Tensor, mask: Mask | None = None) -> Tensor:
        k, v = self.kv(tokens).chunk(2, dim=-1)  # B M dim each
        q, k, v = (split_heads(y, self.heads) for y in (self.q_norm(self.q(x)), self.k_norm(k), v))
        return self.proj(join_heads(self.attend(q, k, v, mask)))


class RMSNorm(nn.RMSNorm):
    """Over runs of `size` features of the last axis; its weight takes x's type, as autocast does for linear layers."""

    def forward(self, x: Tensor) -> Tensor:
        runs = x.unflatten(-1, (-1, len(self.weight)))
        return F.rms_norm(runs, self.normalized_shape, self.weight.to(x.dtype), self.eps).flatten(-2)


def _qk_norms(dim: int, heads: int, qk_norm: QKNorm) -> tuple[nn.Module, nn.Module]:
    if dim % heads:
        raise ValueError(f"heads={heads} does not divide dim={dim}: choose a divisor")
    if qk_norm == "none":
        return nn.Identity(), nn.Identity()
    size = dim if qk_norm == "width" else dim // heads
    return RMSNorm(size, eps=1e-6), RMSNorm(size, eps=1e-6)


Axis = Literal["full", "space", "time"]


def along(axis: Axis, attention: Callable[..., Tensor], x: Tensor, mask: Mask | None = None) -> Tensor:
    """`attention(x [B, L, dim], mask)` on x [B, T, N, dim]: over all tokens, a frame's, or those at a place."""
    if axis == "full":
        return attention(x.flatten(1, 2), mask).view_as(x)
    if axis == "space":
        return attention(x.flatten(0, 1), mask).view_as(x)
    b, _, n, _ = x.shape
    return attention(x.transpose(1, 2).flatten(0, 1), mask).unflatten(0, (b, n)).transpose(1, 2)
