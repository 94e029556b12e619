"""Sampling an answer by chance that belongs to the clip alone, whatever else is in its batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper


class OwnChance(LogitsProcessor):
    """Turns the likeliest token into one drawn from softmax(logits / temperature), cut to the nucleus of top_p.

    By the Gumbel-max trick: argmax(x + g) with g = −ln(−ln u), u uniform, is distributed as softmax(x). Each row has
    a generator of its own, so that `generate` stays greedy and a row's answer says nothing of the other rows.

    Args:
        keys: what each row's chance is drawn by, with `seed`.
    """

    def __init__(self, keys: Sequence[str], seed: int, temperature: float, top_p: float = 1.0):
        self.warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(temperature)]
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))
        self.generators = [torch.Generator().manual_seed(_seed(seed, key)) for key in keys]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B, T], [B, V] → [B, V]
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        # in float64, where u is never so near to 0 or 1 that a logarithm overflows
        u = torch.stack(
            [torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self.generators]
        )
        noise = -torch.log(-torch.log(u.clamp(1e-300, 1 - 1e-16)))
        return scores + noise.to(scores)


def _seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:8], "big") >> 1
