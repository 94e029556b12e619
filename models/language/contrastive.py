"""Losses of a model that knows which text belongs to which video: contrastive, matching, and among rival captions.

Each rank has its own B of the N pairs of a step. The losses are sums over the rank's own videos and texts, so that the
sum over ranks, divided by N, is the loss of the whole; features of the others are gathered with their gradients. Ranks
have equally many pairs.

B: pairs of this rank; N: of all ranks; K: captions of a video; D: width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

GREATEST = 100.0  # of the logit scale (Radford et al. 2021, sec. 2.5)
Group = Any  # a torch.distributed.ProcessGroup; None: one process


# ---------------------------------------------------------------- what they share


class _Gather(torch.autograd.Function):
    """Rows of all ranks, in their order. Backward: what all ranks' losses want of the rows of this one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.rows = group, len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        whole = grads[0].contiguous().clone()
        dist.all_reduce(whole, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.rows
        return whole[start : start + ctx.rows], None


def gathered(x: Tensor, group: Group = None) -> Tensor:
    """x [B, …] of each rank of the group → [N, …], differentiable."""
    if group is None or dist.get_world_size(group) == 1:
        return x
    if x.requires_grad:
        return _Gather.apply(x, group)
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group)
    return torch.cat(parts)


def first_row(rows: int, group: Group = None) -> int:
    """Place of this rank's first row among the gathered."""
    return 0 if group is None else dist.get_rank(group) * rows


class _Bounded(torch.autograd.Function):
    """min(x, most); of the gradient what would push x further beyond is left out, so that it can come back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: float) -> Tensor:
        ctx.save_for_backward(x >= most)
        return x.clamp(max=most)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (beyond,) = ctx.saved_tensors
        return grads[0].masked_fill(beyond & (grads[0] < 0), 0.0), None


class LogitScale(nn.Module):
    """What cosines are multiplied by, learned, at most 100; begins at 1 / 0.07 as CLIP's does."""

    def __init__(self, start: float = 1 / 0.07):
        super().__init__()
        self.log = nn.Parameter(torch.tensor([math.log(start)]))  # FSDP shards no scalars

    def forward(self) -> Tensor:
        scale: Tensor = _Bounded.apply(self.log, math.log(GREATEST))
        return scale.exp()[0]


# ---------------------------------------------------------------- contrastive


def contrastive(
    video: Tensor, text: Tensor, scale: Tensor | float, group: Group = None, same: Tensor | None = None
) -> Tensor:
    """Σ over own pairs of ½ (cross-entropy of the text given the video + of the video given the text).

    Args:
        video, text: features [B, D] of any length; cosines are compared.
        scale: of the cosines, see `LogitScale`.
        same: int64 [B]; pairs of the same number (equal captions, clips of one moment) are not each other's negatives.
    """
    v, t = F.normalize(video.float(), dim=-1), F.normalize(text.float(), dim=-1)
    own = torch.arange(len(v), device=v.device) + first_row(len(v), group)
    alike = None if same is None else same[:, None] == gathered(same, group)  # B N
    loss = v.new_zeros(())
    for queries, keys in ((v, t), (t, v)):
        logits = scale * queries @ gathered(keys, group).T  # B N
        if alike is not None:
            others = alike.scatter(1, own[:, None], False)
            logits = logits.masked_fill(others, float("-inf"))
        loss = loss + F.cross_entropy(logits, own, reduction="sum")
    return loss / 2


def among_rivals(
    video: Tensor,
    texts: Tensor,
    chosen: Tensor,
    scale: Tensor | float,
    group: Group = None,
    there: Tensor | None = None,
    own: float = 1.0,
    others: float = 0.01,
) -> Tensor:
    """Σ over own videos of −log[e^{s⁺} / (e^{s⁺} + Σ w e^{s})], Panda-70M's (Chen et al. 2024, sec. 3.2).

    s⁺ is that of the chosen caption; w is `own` for the captions of the same video that were not chosen, `others`
    for all captions of other videos.

    Args:
        video [B, D], texts [B, K, D]: features; cosines are compared.
        chosen: int64 [B], which of the K.
        there: bool [B, K], False where a video has fewer captions; None: all are.
    """
    b, k = texts.shape[:2]
    v, t = F.normalize(video.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    logits = scale * v @ gathered(t, group).flatten(0, 1).T  # B NK
    rows = torch.arange(b, device=v.device) + first_row(b, group)  # own videos among all
    of = torch.arange(logits.shape[1], device=v.device) // k  # whose caption
    weights = torch.where(of == rows[:, None], own, others).log().to(logits)
    target = rows * k + chosen
    weights = weights.scatter(1, target[:, None], 0.0)
    if there is not None:
        weights = weights.masked_fill(~gathered(there, group).flatten(), float("-inf"))
    return F.cross_entropy(logits + weights, target, reduction="sum")


# ---------------------------------------------------------------- matching


def hard_negatives(
    similarity: Tensor,
    positive: Tensor,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """For each query one candidate that is not its own, drawn by softmax(similarity) (Li et al. 2021, ALBEF, sec. 3.2).

    Args:
        similarity: [B, N], scaled. positive: bool [B, N], never drawn.
        uniform: [B] in 0 … 1, by which they are drawn; none: by the generator.

    Returns int64 [B]. Raises ValueError where a query has no negative.
    """
    if not positive.is_meta and bool(positive.all(1).any()):
        raise ValueError(
            "a pair has no negative in its step: raise the batch, or give fewer pairs the same caption"
        )
    p = similarity.detach().float().masked_fill(positive, float("-inf")).softmax(-1)
    if uniform is None:
        return torch.multinomial(p, 1, generator=generator)[:, 0]
    upto = p.double().cumsum(-1)  # never one of p = 0: it is the first whose sum lies above
    return (upto <= uniform.double().clamp(max=1 - 1e-12)[:, None] * upto[:, -1:]).sum(-1)


def matching(
    match: Callable[[Tensor, Tensor], Tensor],
    video: Tensor,
    text: Tensor,
    scale: Tensor | float,
    group: Group = None,
    same: Tensor | None = None,
    generator: torch.Generator | None = None,
    draw: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Σ over own pairs of three binary cross-entropies: the pair, its video with a wrong text, the reverse.

    Args:
        match: videos [n, …], texts [n, …] → logits [n] that they belong together.
        video, text: [B, D] as `match` takes them; negatives are drawn by their cosines, from all ranks.
        same: as of `contrastive`.
        draw: the negatives, places among all N of texts [B] and videos [B], where they are drawn elsewhere.
    """
    videos, texts = gathered(video, group), gathered(text, group)
    if draw is None:
        alike = _alike(len(video), len(videos), group, same, video.device)
        v, t = (F.normalize(x.detach().float(), dim=-1) for x in (videos, texts))
        start = first_row(len(video), group)
        mine = slice(start, start + len(video))
        draw = (
            hard_negatives(scale * v[mine] @ t.T, alike, generator),
            hard_negatives(scale * t[mine] @ v.T, alike, generator),
        )
    wrong_text, wrong_video = draw
    return matched(match(*triples(video, text, videos[wrong_video], texts[wrong_text])))


def triples(video: Tensor, text: Tensor, wrong_video: Tensor, wrong_text: Tensor) -> tuple[Tensor, Tensor]:
    """Videos and texts [3 B, D] of the pairs of `matching`: right, with a wrong text, with a wrong video."""
    return torch.cat([video, video, wrong_video]), torch.cat([text, wrong_text, text])


def matched(logits: Tensor) -> Tensor:
    """Σ of binary cross-entropies of `triples`, logits [3 B]."""
    target = torch.zeros_like(logits)
    target[: len(logits) // 3] = 1.0
    return F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="sum")


def _alike(b: int, n: int, group: Group, same: Tensor | None, device: torch.device) -> Tensor:
    """bool [B, N], which are the own pair or one of the same number."""
    if same is not None:
        return same[:, None] == gathered(same, group)
    own = torch.arange(b, device=device) + first_row(b, group)
    return own[:, None] == torch.arange(n, device=device)


# ---------------------------------------------------------------- large batches, in two passes

Features = tuple[Tensor, ...]


def feature_gradients(
    chunks: Sequence[Features], loss: Callable[..., Tensor]
) -> tuple[Tensor, list[Features]]:
    """The loss of a step and its gradient by each feature; the first pass of a gradient cache (Gao et al. 2021).

    The features of all micro-batches are made without gradients, then each micro-batch again, with `surrogate`, whose
    gradients are those of the whole step at once. Dropout must draw the same both times. Weights that the loss itself
    uses (a matching head's) get no gradient here: in the second pass they take part again, on the detached features.

    Args:
        chunks: of each micro-batch the same features, [b, …] each, which are joined; a scalar (the logit scale) is
            taken of the first.
        loss: joined features → scalar.

    Returns the loss, detached, and gradients as `chunks`.
    """
    leaves = [tuple(x.detach().requires_grad_() for x in chunk) for chunk in chunks]
    joined = [each[0] if each[0].ndim == 0 else torch.cat(each) for each in zip(*leaves, strict=True)]
    with torch.enable_grad():
        total = loss(*joined)
        # by the features alone: what the loss asks of the model's own weights (a matching head) the second pass gives
        every = [x for chunk in leaves for x in chunk]
        found = iter(torch.autograd.grad(total, every, allow_unused=True))
    gradients = [
        tuple(torch.zeros_like(x) if (g := next(found)) is None else g for x in chunk) for chunk in leaves
    ]
    return total.detach(), gradients


def surrogate(features: Features, gradients: Features) -> Tensor:
    """Σ feature · its gradient: backward through it gives the weights' gradients of the loss. The second pass."""
    return torch.stack([(x * g).sum() for x, g in zip(features, gradients, strict=True)]).sum()
