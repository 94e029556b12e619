"""ROUGE-L: the longest run of words, gaps allowed, that a text shares with a reference (Lin 2004)."""

from __future__ import annotations

from collections.abc import Sequence

from models.measures.captions.tokens import tokens

BETA = 1.2  # of captions, as in COCO's evaluation: recall counts more


def rouge_l(candidate: str, references: Sequence[str]) -> float:
    """F_β of the best precision and the best recall over the references, 0 to 1.

    P = LCS / words of the candidate, R = LCS / words of the reference, F = (1 + β²) P R / (R + β² P).
    """
    words = tokens(candidate)
    precision = recall = 0.0
    for reference in references:
        other = tokens(reference)
        if words and other:
            common = longest_common(words, other)
            precision = max(precision, common / len(words))
            recall = max(recall, common / len(other))
    if not precision:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of their longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0  # of the row above, one to the left
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
