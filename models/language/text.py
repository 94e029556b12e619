"""Text without a vocabulary file: UTF-8 bytes as tokens, three special ones after them."""

from __future__ import annotations

import torch
from torch import Tensor

PAD, BEGIN, END = 256, 257, 258
VOCABULARY = 259


def encode(texts: list[str], length: int) -> Tensor:
    """int64 [B, length]: BEGIN, the bytes (cut to fit), END, padding."""
    rows = []
    for text in texts:
        body = list(text.encode("utf-8"))[: length - 2]
        row = [BEGIN, *body, END]
        rows.append(row + [PAD] * (length - len(row)))
    return torch.tensor(rows, dtype=torch.long).reshape(len(texts), length)


def decode(tokens: Tensor) -> list[str]:
    """The text of each row up to END; broken UTF-8 is replaced."""
    texts = []
    for row in tokens.tolist():
        if END in row:
            row = row[: row.index(END)]
        texts.append(bytes(t for t in row if t < 256).decode("utf-8", "replace"))
    return texts
