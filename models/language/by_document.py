"""Attention of packed documents one document at a time, for language models of `transformers`.

A mask over a whole sequence of L tokens costs L² whatever is in it; documents of n tokens each cost n · L this way. It
is causal attention of torch's scaled_dot_product_attention, of each document by itself, under a name among those of
transformers' kernels; whatever else is asked of it is what `sdpa` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DOCUMENTS = "clipmill_documents"


def register() -> None:
    """Make the name known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(DOCUMENTS, attend)
    AttentionMaskInterface.register(DOCUMENTS, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def stand_in(device: torch.device) -> Tensor:
    """In place of a mask, of which transformers then makes none."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    documents: Sequence[Sequence[int]] | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Queries [B, H, L, W], keys and values [B, G, L, W] → [B, L, H, W].

    Args:
        documents: lengths of those that lie end to end in each row, L together.

    Raises ValueError where a language model did not hand the lengths on.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if documents is None:
        if attention_mask is not None and attention_mask.shape == (1, 1, 1, 1) and query.shape[2] > 1:
            raise ValueError(
                f"{type(module).__name__} does not know of packed documents: set compute.attention: sdpa"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    if all(len(row) == 1 for row in documents):
        return sdpa_attention_forward(module, query, key, value, None, **more)
    rows = []
    for i, row in enumerate(documents):
        parts = zip(*(x[i : i + 1].split(list(row), 2) for x in (query, key, value)), strict=True)
        seen = [sdpa_attention_forward(module, q, k, v, None, **more)[0] for q, k, v in parts]
        rows.append(torch.cat(seen, 1))
    return torch.cat(rows), None
