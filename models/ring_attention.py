"""Attention over sequences too long for one table of scores, or for one device: in blocks, over a ring of ranks.

    ring = Ring.of(world.mesh.get_group("context"))          or Ring(): one device, in blocks
    mask = ring.mask(Mask.documents(lengths).in_order(L), L)
    tokens, positions, targets = (ring.split(x) for x in …)   [B, L] → [B, L / ranks]
    model(tokens, positions, mask)                            as without a ring: `attend` follows the mask

A model that is handed its mask and positions needs nothing else; the loss is then summed over the ranks as over any
others, and so are gradients. Ranks have to go through the same layers in the same order, backward too.

Memory is linear in a rank's places: scores exist for one block of queries and one of keys at a time (Rabe & Staats
2021; Dao 2022), and keys and values go once around the ring while the queries stay (Liu, Zaharia & Abbeel 2023, 'Ring
Attention with Blockwise Transformers'). The mask is looked at block by block: one that sees nothing costs nothing, one
that sees everything needs no mask. Sums are kept in float32 (float64 for float64) all the way round, so that the error
does not grow with the ring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.attention import Mask, Tokens

Placement = Literal["contiguous", "zigzag"]
"""Which of a sequence's chunks, all of one size, a rank of P holds. contiguous: rank r chunk r of P; in causal order
the last then works while the first waits. zigzag: chunks r and 2P − 1 − r of 2P, the same work for all."""


# ---------------------------------------------------------------- sequences


def _chunks(rank: int, ranks: int, placement: Placement) -> tuple[int, ...]:
    return (rank, 2 * ranks - 1 - rank) if placement == "zigzag" and ranks > 1 else (rank,)


def split(x: Tensor, rank: int, ranks: int, placement: Placement, dim: int = -1) -> Tensor:
    """What the rank holds of a whole sequence: tokens, positions, targets, weights.

    Next-token targets are shifted before: what follows a chunk's last token is another rank's.
    Raises ValueError where the chunks would not be of one size.
    """
    mine = _chunks(rank, ranks, placement)
    count, length = len(mine) * ranks, x.shape[dim]
    if length % count:
        raise ValueError(
            f"a sequence of {length} places on {ranks} ranks ({placement}): fill it up to a multiple of {count}"
        )
    size = length // count
    return torch.cat([x.narrow(dim, chunk * size, size) for chunk in mine], dim)


def join(parts: Sequence[Tensor], placement: Placement, dim: int = -1) -> Tensor:
    """The whole sequence of what each rank holds, in their order: `split` undone."""
    chunks: dict[int, Tensor] = {}
    for rank, part in enumerate(parts):
        mine = _chunks(rank, len(parts), placement)
        chunks |= zip(mine, part.chunk(len(mine), dim), strict=True)
    return torch.cat([chunks[i] for i in sorted(chunks)], dim)


# ---------------------------------------------------------------- the ring


class Neighbours(Protocol):
    """A rank's place in the ring."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def pass_on(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin to give them to the next rank; the result waits for those of the same shapes from the one before."""
        ...


class Alone:
    rank, size = 0, 1

    def pass_on(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: list(tensors)


class InGroup:
    """The ranks of a process group, in its order; every rank has to ask for the same in the same order."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def pass_on(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        to, source = ((self.rank + step) % self.size for step in (1, -1))
        sent = [x.contiguous() for x in tensors]
        arriving = [torch.empty_like(x) for x in sent]
        ops = [dist.P2POp(dist.isend, x, group=self.group, group_peer=to) for x in sent]
        ops += [dist.P2POp(dist.irecv, x, group=self.group, group_peer=source) for x in arriving]
        works = dist.batch_isend_irecv(ops)

        def wait(_sent: list[Tensor] = sent) -> list[Tensor]:  # which has to stay until it is gone
            for work in works:
                work.wait()
            return arriving

        return wait


@dataclass(frozen=True)
class Ring:
    """Ranks that hold a sequence together.

    Args:
        block: how many queries, and how many keys, are looked at together; scores take [B, H, block, block] floats.
    """

    neighbours: Neighbours = field(default_factory=Alone)
    placement: Placement = "zigzag"
    block: int = 512

    @classmethod
    def of(cls, group: dist.ProcessGroup, placement: Placement = "zigzag", block: int = 512) -> Ring:
        return cls(InGroup(group), placement, block)

    def split(self, x: Tensor, dim: int = -1) -> Tensor:
        """This rank's part of a whole sequence, see `split`."""
        return split(x, self.neighbours.rank, self.neighbours.size, self.placement, dim)

    def join(self, x: Tensor, dim: int = -1) -> Tensor:
        """The whole sequence, on every rank, of the parts that all have; without gradients."""
        rank, size = self.neighbours.rank, self.neighbours.size
        held = [x.detach()]
        parts = {rank: held[0]}
        for step in range(1, size):
            held = self.neighbours.pass_on(held)()
            parts[(rank - step) % size] = held[0]
        return join([parts[i] for i in range(size)], self.placement, dim)

    def mask(self, mask: Mask | None, length: int) -> Mask:
        """For this rank's queries, of a mask (none: all see all) over the whole sequence of so many places.

        Raises ValueError where the mask has other places, or the ranks do not divide them.
        """
        rank, size = self.neighbours.rank, self.neighbours.size
        order = [split(torch.arange(length), r, size, self.placement) for r in range(size)]
        whole = mask or Mask()
        sides = (whole.queries, whole.keys)
        told = {
            x.shape[-1] for side in sides for x in (side.document, side.frame, side.place) if x is not None
        }
        if told - {length}:
            raise ValueError(
                f"a mask of {sorted(told)} places over a sequence of {length}: give one of the sequence"
            )
        queries, keys = _at(whole.queries, order[rank]), _at(whole.keys, torch.cat(order))
        made = replace(whole, queries=queries, keys=keys, block=None)
        places, chunks = length // size, len(_chunks(rank, size, self.placement))
        chunk = places // chunks
        blocks = [
            (a, min(a + self.block, start + chunk))
            for start in range(0, places, chunk)
            for a in range(start, start + chunk, self.block)
        ]
        everywhere = [(r * places + a, r * places + b) for r in range(size) for a, b in blocks]
        sights = sight(made, blocks, everywhere).unflatten(1, (size, -1)).transpose(0, 1).tolist()
        return replace(made, context=Blocks(self.neighbours, places, tuple(blocks), sights))


def _at(tokens: Tokens, places: Tensor) -> Tokens:
    """Of these places of it, without `spans`."""
    document, frame, place = (
        None if x is None else x[..., places.to(x.device)]
        for x in (tokens.document, tokens.frame, tokens.place)
    )
    return Tokens(document, frame, place)


# ---------------------------------------------------------------- what a block of queries sees of a block of keys

NOTHING, SOMETHING, ALL = range(3)
FAR = torch.iinfo(torch.int64).max


class _Bounds(NamedTuple):
    """Of the numbers in each block, int64 [blocks] each."""

    low: Tensor
    real: Tensor  # the lowest that is not negative
    high: Tensor

    @classmethod
    def of(cls, x: Tensor, blocks: Sequence[tuple[int, int]]) -> _Bounds:
        x = x.cpu().long()
        each = [x[..., a:b] for a, b in blocks]
        real = [y.where(y >= 0, FAR).min() for y in each]
        return cls(
            torch.stack([y.min() for y in each]), torch.stack(real), torch.stack([y.max() for y in each])
        )


def sight(mask: Mask, queries: Sequence[tuple[int, int]], keys: Sequence[tuple[int, int]]) -> Tensor:
    """Whether NOTHING, SOMETHING or ALL of a block (start, stop) of keys is seen from one of queries.

    int64 [queries, keys], from the bounds of the numbers in each block, without looking at pairs of places. SOMETHING
    is said as well where bounds tell too little.
    """
    nothing = torch.zeros(len(queries), len(keys), dtype=torch.bool)
    everything = ~nothing

    def bounds(of: str) -> tuple[_Bounds | None, _Bounds | None]:
        q, k = getattr(mask.queries, of), getattr(mask.keys, of)
        return (
            None if q is None else _Bounds(*(x[:, None] for x in _Bounds.of(q, queries))),
            None if k is None else _Bounds.of(k, keys),
        )

    q, k = bounds("document")
    if k is not None:
        nothing |= k.high < 0
        everything &= k.low >= 0
        if q is not None:
            nothing |= (q.high < k.real) | (k.high < q.real)
            everything &= _one(q, k)
    q, k = bounds("frame")
    if q is not None and k is not None:
        image = (q.low >= mask.moving) | (k.low >= mask.moving)
        nothing |= ((q.high < k.low) | (k.high < q.low)) & image
        everything &= ((q.high < mask.moving) & (k.high < mask.moving)) | _one(q, k)
    q, k = bounds("place") if mask.causal else (None, None)
    if q is not None and k is not None:
        nothing |= k.low > q.high
        everything &= k.high <= q.low
    return torch.where(nothing, NOTHING, torch.where(everything, ALL, SOMETHING))


def _one(q: _Bounds, k: _Bounds) -> Tensor:
    """Whether both hold one number only, and the same."""
    return (q.low == q.high) & (k.low == k.high) & (q.low == k.low)


# ---------------------------------------------------------------- attention


@dataclass(frozen=True, eq=False)
class Blocks:
    """How `attend` works under a mask of `Ring.mask`: which blocks of a rank's queries see which of a rank's keys.

    places: of a rank. blocks: (start, stop) of them. sights: [ranks][blocks of queries][blocks of keys].
    """

    neighbours: Neighbours
    places: int
    blocks: tuple[tuple[int, int], ...]
    sights: list[list[list[int]]]

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """q [B, H, L, D], k, v [B, K, L, D] of this rank's places, K divides H: query head h has key head ⌊h K / H⌋.

        Raises ValueError for other sizes.
        """
        if not q.shape[2] == k.shape[2] == self.places:
            raise ValueError(
                f"{q.shape[2]} queries and {k.shape[2]} keys under a mask of a ring with {self.places} places a "
                "rank: give a rank's part of the sequence, see Ring.split"
            )
        if q.shape[1] % k.shape[1]:
            raise ValueError(f"{q.shape[1]} heads of queries are no multiple of the {k.shape[1]} of keys")
        out: Tensor = _RingAttention.apply(q, k, v, self, mask)
        return out

    def round(self, held: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """Ranks and what they hold of keys and values, this one's first; the next ones come while these are used."""
        rank, size = self.neighbours.rank, self.neighbours.size
        for step in range(size):
            coming = self.neighbours.pass_on(held) if step < size - 1 else None
            yield (rank - step) % size, held
            if coming:
                held, coming = coming(), None  # what was sent is let go before more is asked for

    def seen(self, mask: Mask, owner: int, query: int) -> Iterator[tuple[tuple[int, int], Tensor | None]]:
        """Blocks of the owner's keys of which a block of queries sees some; which, bool, and none where it is all."""
        for (a, b), sight in zip(self.blocks, self.sights[owner][query], strict=True):
            if sight != NOTHING:
                keys = owner * self.places + a, owner * self.places + b
                yield (a, b), None if sight == ALL else mask.part(self.blocks[query], keys).dense()


class _RingAttention(torch.autograd.Function):
    """Below, G = H / K heads of queries share one of keys: q is [B, K, G, L, D], a block of it [B, K, G·rows, D].

    At step i rank r has the keys of rank j = (r − i) mod P. Forward: m' = max(m, rowmax S), p = e^(S − m'),
    l ← l e^(m − m') + Σp, o ← o e^(m − m') + p V_j; O = o / l, lse = m + log l. Backward: D = Σ dO∘O, P = e^(S − lse),
    dV += Pᵀ dO, dS = P∘(dO Vᵀ − D), dQ += dS K / √d, dK += dSᵀ Q / √d; dK and dV travel with K and V, one step
    behind, and are home after P.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, work: Blocks, mask: Mask) -> Tensor:
        heads, wide = _by_key_head(q, k), torch.promote_types(q.dtype, torch.float32)
        total = q.new_zeros(*heads.shape[:-1], v.shape[-1], dtype=wide)  # o
        weight = q.new_zeros(*heads.shape[:-1], 1, dtype=wide)  # l
        most = torch.full_like(weight, -torch.inf)  # m
        with torch.autocast(q.device.type, enabled=False):
            for owner, (keys, values) in work.round([k, v]):
                for i, rows in enumerate(work.blocks):
                    o, l, m = (_block(x, rows, wide) for x in (total, weight, most))  # noqa: E741
                    scaled = _block(heads, rows, wide) * q.shape[-1] ** -0.5
                    for (a, b), seen in work.seen(mask, owner, i):
                        s = _scores(scaled, keys[:, :, a:b].to(wide), seen)
                        before, m = m, torch.maximum(m, s.amax(-1, keepdim=True))
                        finite = m.masked_fill(m == -torch.inf, 0.0)  # of queries that have seen nothing yet
                        p, shrink = s.sub_(finite).exp_(), (before - finite).exp()
                        l = l * shrink + p.sum(-1, keepdim=True)  # noqa: E741
                        o = o * shrink + p @ values[:, :, a:b].to(wide)
                    for x, found in ((total, o), (weight, l), (most, m)):
                        x[..., slice(*rows), :] = found.unflatten(2, (heads.shape[2], -1))
                del keys, values
        blind = weight == 0
        out = (total / weight.masked_fill(blind, 1.0)).flatten(1, 2).to(q.dtype)
        lse = (most + weight.log()).masked_fill(blind, torch.inf)  # then P = e^(S − lse) is 0
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.work, ctx.mask = work, mask
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, out, lse), work = ctx.saved_tensors, ctx.work
        heads, wide = _by_key_head(q, k), torch.promote_types(q.dtype, torch.float32)
        scale = q.shape[-1] ** -0.5
        of_q = torch.zeros_like(heads, dtype=wide)
        coming: Callable[[], list[Tensor]] | None = None
        with torch.autocast(q.device.type, enabled=False):
            gradient = _by_key_head(gradient, k)
            inner = (gradient.to(wide) * _by_key_head(out, k)).sum(-1, keepdim=True)  # D
            for owner, (keys, values) in work.round([k, v]):
                of_keys, of_values = (torch.zeros_like(x, dtype=wide) for x in (k, v))
                for i, rows in enumerate(work.blocks):
                    scaled = _block(heads, rows, wide) * scale
                    of_out, sums, shift = (_block(x, rows, wide) for x in (gradient, inner, lse))
                    of_scaled = torch.zeros_like(scaled)
                    for (a, b), seen in work.seen(ctx.mask, owner, i):
                        key, value = keys[:, :, a:b].to(wide), values[:, :, a:b].to(wide)
                        p = _scores(scaled, key, seen).sub_(shift).exp_()
                        of_values[:, :, a:b] += p.mT @ of_out
                        of_s = (of_out @ value.mT).sub_(sums).mul_(p)
                        of_scaled += of_s @ key
                        of_keys[:, :, a:b] += of_s.mT @ scaled
                    of_q[..., slice(*rows), :] += of_scaled.unflatten(2, (heads.shape[2], -1)) * scale
                del keys, values
                if coming:  # what the ranks before found for these keys
                    before, coming = coming(), None
                    of_keys += before.pop(0)
                    of_values += before.pop(0)
                coming = work.neighbours.pass_on([of_keys, of_values])
        assert coming is not None
        of_keys, of_values = coming()
        return of_q.flatten(1, 2).to(q.dtype), of_keys.to(k.dtype), of_values.to(v.dtype), None, None


def _by_key_head(x: Tensor, keys: Tensor) -> Tensor:
    """[B, H, L, D] → [B, K, G, L, D]"""
    return x.unflatten(1, (keys.shape[1], -1))


def _block(x: Tensor, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """[B, K, G, L, D] → [B, K, G·rows, D]"""
    return x[..., slice(*rows), :].flatten(2, 3).to(dtype)


def _scores(q: Tensor, k: Tensor, seen: Tensor | None) -> Tensor:
    """q [B, K, G·rows, D], k [B, K, columns, D], seen [B or 1, 1, rows or 1, columns] → [B, K, G·rows, columns]."""
    scores = q @ k.mT
    if seen is not None:
        rows = scores.unflatten(2, (-1, seen.shape[2])) if seen.shape[2] > 1 else scores[:, :, None]
        rows.masked_fill_(~seen[:, :, None], -torch.inf)
    return scores
