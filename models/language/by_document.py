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

from models.attention import Mask

DOCUMENTS = "clipmill_documents"
# of recipes (compute.attention) → of transformers; any other is sdpa
KERNELS = {"auto": DOCUMENTS, "plain": "eager", "flex": "flex_attention", "flash": "flash_attention_2"}


def kernel_of(attention: str, compiled: bool) -> str:
    """transformers' name of a recipe's kernel; documents one by one would be compiled anew for each packing."""
    kernel = KERNELS.get(attention, "sdpa")
    return "sdpa" if kernel == DOCUMENTS and compiled else kernel


def register() -> None:
    """Make the name known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(DOCUMENTS, attend)
    AttentionMaskInterface.register(DOCUMENTS, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def stand_in(device: torch.device) -> Tensor:
    """In place of a mask, of which transformers then makes none."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def apart(
    config: Any,
    dtype: torch.dtype,
    lengths: Sequence[Sequence[int]],
    device: torch.device,
    *,
    placed: bool,
    single: bool,
) -> dict[str, Any]:
    """Arguments of a language model's forward pass by which documents do not see each other.

    Args:
        config: the language model's, with its kernel. dtype: of its weights.
        lengths: of each row, padding as one more document, see `loss.with_padding`.
        placed: positions are given; without a mask, transformers would read documents out of them.
        single: no row has more than one document: padding behind it is seen by padding alone.

    Raises ValueError where the language model cannot keep documents apart.
    """
    found: dict[str, Any] = {"attention_mask": _mask(config, dtype, lengths, device, placed)}
    if config._attn_implementation == DOCUMENTS:
        found["documents"] = [[sum(row)] for row in lengths] if single else lengths
    return found


def _mask(
    config: Any, dtype: torch.dtype, lengths: Sequence[Sequence[int]], device: torch.device, placed: bool
) -> Any:
    """Who sees whom, as the language model's kernel takes it; None: causal order is all."""
    if all(len(row) == 1 for row in lengths):
        return torch.ones(len(lengths), lengths[0][0], device=device) if placed else None
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        raise ValueError(
            f"language model {config.model_type}: it has layers without full attention, which would let packed "
            "documents see each other: set packing off"
        )
    kernel = config._attn_implementation
    if kernel.startswith("flash"):  # transformers tells documents by positions that begin anew
        if placed:
            raise ValueError(
                f"attention {kernel} takes no positions of packed documents: use sdpa or flex_attention"
            )
        return None
    if kernel == DOCUMENTS:
        return stand_in(device)
    masks = [Mask.documents(row, device=device).in_order(sum(row), device=device) for row in lengths]
    if kernel == "flex_attention" and len(masks) == 1:
        return masks[0].blocks(sum(lengths[0]), sum(lengths[0]), device)
    seen = torch.cat([mask.dense() for mask in masks])  # B 1 L L
    if kernel != "eager":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)


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
