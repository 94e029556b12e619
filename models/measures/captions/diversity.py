"""How many different things a captioner says: distinct-n, self-BLEU, vocabulary.

All three depend on how many texts are looked at, so captioners are compared on the same number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.measures.captions.bleu import bleu
from models.measures.captions.tokens import ngrams, tokens


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Different runs of n words among all (Li et al. 2016, arXiv:1510.03055), 0 to 1; None where there are none."""
    runs = [gram for text in texts for gram in ngrams(tokens(text), n)]
    return len(set(runs)) / len(runs) if runs else None


def vocabulary(texts: Sequence[str]) -> int:
    """Different words."""
    return len({word for text in texts for word in tokens(text)})


def self_bleu(texts: Sequence[str], most: int = 100, seed: int = 0) -> float | None:
    """Mean BLEU-4 of a text with others as its references (Zhu et al. 2018, arXiv:1802.01886), 1: all alike.

    Args:
        most: so many of the texts, drawn by `seed`, are looked at.
    """
    if len(texts) > most:
        texts = [texts[i] for i in np.random.default_rng(seed).choice(len(texts), most, replace=False)]
    if len(texts) < 2:
        return None
    return float(np.mean([bleu([text], [[*texts[:i], *texts[i + 1 :]]])[-1] for i, text in enumerate(texts)]))
