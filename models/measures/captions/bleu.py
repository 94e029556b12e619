"""BLEU: how many of a text's word runs are in its references (Papineni et al. 2002)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from models.measures.captions.tokens import ngrams, tokens

LONGEST = 4


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a corpus, 0 to 1.

    BLEU-n = BP · (Π p_k)^(1/n) with p_k the share of k-grams that are in a reference, each no more often than there,
    over the whole corpus, and BP = min(1, e^(1 − r/c)) of its length c against the closest references' r. 0 where
    some p_k is.
    """
    right, made = [0] * LONGEST, [0] * LONGEST
    c = r = 0
    for candidate, its in zip(candidates, references, strict=True):
        words, others = tokens(candidate), [tokens(x) for x in its]
        c += len(words)
        r += min((abs(len(o) - len(words)), len(o)) for o in others)[1]
        for k in range(1, LONGEST + 1):
            most: Counter[tuple[str, ...]] = Counter()
            for other in others:
                most |= Counter(ngrams(other, k))
            right[k - 1] += (Counter(ngrams(words, k)) & most).total()
            made[k - 1] += max(0, len(words) - k + 1)
    if c == 0:
        return [0.0] * LONGEST
    penalty = min(1.0, math.exp(1 - r / c))
    found, product = [], 1.0
    for k in range(LONGEST):
        product *= right[k] / made[k] if made[k] else 0.0
        found.append(penalty * product ** (1 / (k + 1)))
    return found
