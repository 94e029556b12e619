"""Cross-entropy over packed documents, each weighing as much as it would alone.

The loss of a document is the mean over its supervised tokens, that of a step the mean over its documents:

    loss = 1/N · Σ_documents 1/n_e · Σ_tokens −log p  =  1/N · Σ_t w_t · (−log p_t),   w_t = 1 / n_e(t)

A mean over all tokens would let long answers drown short ones (Large World Model, Liu et al. 2024, sec. 3.2: "masked
sequence packing"). N is of the whole step, over micro-batches and ranks, so the sums here are divided by the trainer.
With several kinds of tokens (text, vision) this holds for each kind, over the documents that have some of it.

B: batch rows, L: places of a row. `lengths`: of the documents that lie end to end in a row, from its start on; what is
left is padding. For a row [L], or [1, L], they are a list of ints, for more rows [B, L] a list of such lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.attention import owners

Lengths = Sequence[int] | Sequence[Sequence[int]]


def rows_of(lengths: Lengths) -> list[list[int]]:
    """The lengths of each row."""
    if not lengths or isinstance(lengths[0], int):
        return [list(cast(Sequence[int], lengths))]
    return [list(row) for row in cast(Sequence[Sequence[int]], lengths)]


def with_padding(lengths: Lengths, length: int) -> list[list[int]]:
    """Of each row, with its padding as one more document. Raises ValueError where a row is longer than `length`."""
    rows = rows_of(lengths)
    for row in rows:
        if sum(row) > length:
            raise ValueError(f"documents of {row} tokens do not fit a sequence of {length}")
    return [[*row, rest] if (rest := length - sum(row)) else row for row in rows]


def restarted(rows: Sequence[Sequence[int]], device: torch.device | None = None) -> Tensor:
    """Places 0, 1, … in each document of each row, int64 [B, L]; rows as `with_padding` gives them."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows]).to(device)


def _in_rows(x: Tensor, lengths: Lengths) -> Iterator[tuple[Tensor, list[int]]]:
    """Each row of x [L] or [B, L] as a view, with the lengths of its documents."""
    rows, of = x.view(-1, x.shape[-1]), rows_of(lengths)
    if len(rows) != len(of):
        raise ValueError(f"lengths are of {len(of)} rows, the tokens have {len(rows)}: give a list for each")
    with_padding(lengths, x.shape[-1])  # raises where they are too long
    return zip(rows, of, strict=True)


def _counted(mark: Tensor, row: list[int]) -> tuple[Tensor, Tensor]:
    """n_e of each document [documents], and which document each place that is no padding belongs to."""
    owner = owners(row, mark.device)
    none = torch.zeros(len(row), device=mark.device)
    return none.index_add_(0, owner, mark[: len(owner)].float()), owner


def documents(lengths: Lengths, supervised: Tensor) -> int:
    """How many documents have a supervised token (bool [L] or [B, L]): what a step's `summed` are divided by."""
    return sum(int((_counted(mark, row)[0] > 0).sum()) for mark, row in _in_rows(supervised, lengths))


def token_weights(lengths: Lengths, supervised: Tensor) -> Tensor:
    """w_t = 1 / n_e(t) where `supervised` (bool [L] or [B, L]), else 0; float32 of its shape."""
    weights = torch.zeros(supervised.shape, device=supervised.device)
    for out, (mark, row) in zip(
        weights.view(-1, weights.shape[-1]), _in_rows(supervised, lengths), strict=True
    ):
        count, owner = _counted(mark, row)
        out[: len(owner)] = mark[: len(owner)] / count.clamp(min=1)[owner]
    return weights


def shifted(x: Tensor, lengths: Lengths) -> Tensor:
    """Of each place what comes next in its document, [L] or [B, L] of x's type; 0 (False) at the last and in padding.

    Tokens become targets, a mask of tokens that are to be learnt that of such targets.
    """
    following = torch.zeros_like(x)
    following[..., :-1] = x[..., 1:]
    for out, row in _in_rows(following, lengths):
        out[[end - 1 for end in accumulate(row)]] = 0
        out[sum(row) :] = 0
    return following


def summed(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Σ w · cross-entropy, a float32 scalar. logits [..., V], targets int64 [...], weights [...]."""
    each = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
    return (each * weights.flatten()).sum()


def side_by_side(rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 [n, m] of rows of tokens, filled up behind with 0."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, each in zip(ids, rows, strict=True):
        row[: len(each)] = torch.tensor(each)
    return ids


def log_likelihoods(logits: Tensor, ids: Tensor, rows: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
    """(Σ log p of its tokens, how many these are) of each row, by logits [n, m, V]; ids [n, m]: `side_by_side`."""
    each = logits.float().log_softmax(-1).gather(2, ids[..., None])[..., 0].cpu()
    return [(float(each[i, : len(row)].sum()), len(row)) for i, row in enumerate(rows)]


class Goal(NamedTuple):
    """The targets of one kind that count, of a batch [B, L] laid out flat: n of its B·L places."""

    at: Tensor  # int64 [n], the places that predict them
    targets: Tensor  # int64 [n]
    weights: Tensor  # float32 [n]

    @classmethod
    def of(cls, targets: Tensor, weights: Tensor) -> Goal:
        """Those of weight ≠ 0. Both [L] or [B, L]; on the host, where it waits for no device."""
        at = weights.flatten().nonzero()[:, 0]
        return cls(at, targets.flatten()[at], weights.flatten()[at])

    def to(self, device: torch.device) -> Goal:
        return Goal(*(x.to(device, non_blocking=True) for x in self))


def summed_in_chunks(
    head: Callable[[Tensor], Tensor], hidden: Tensor, goal: Goal, chunk: int = 8192
) -> Tensor:
    """`summed` of head(hidden [B, L, D]) at the goal's places, a float32 scalar.

    There are logits of `chunk` places at a time only, computed again on the way back: all those of a context of a
    million tokens, 32,000 each, would take 128 GB.
    """

    def part(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return summed(head(hidden), targets, weights)

    rows = hidden.flatten(0, -2)[goal.at]
    pieces = zip(*(x.split(chunk) for x in (rows, goal.targets, goal.weights)), strict=True)
    return torch.stack([checkpoint(part, *piece, use_reentrant=False) for piece in pieces]).sum()
