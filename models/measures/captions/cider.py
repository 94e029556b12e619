"""CIDEr-D: word runs a text shares with references, rare ones counting more (Vedantam et al. 2015, arXiv:1411.5726).

For runs of n = 1 … 4 words: term frequency × inverse document frequency vectors, a cosine in which a run of the
candidate counts no more than in the reference, times e^(−Δ²/2σ²) for a difference in length Δ; mean over n and
references, times 10.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from models.measures.captions.tokens import ngrams, tokens

LONGEST, SIGMA = 4, 6.0
Gram = tuple[str, ...]


@dataclass(frozen=True)
class Vector:
    """A text's weighted word runs, by their length."""

    grams: list[dict[Gram, float]]
    norms: list[float]
    length: int  # pairs of words, which is what COCO's evaluation takes for the length


def vector(text: str, idf: Callable[[Gram], float]) -> Vector:
    words = tokens(text)
    counts = [Counter(ngrams(words, n)) for n in range(1, LONGEST + 1)]
    grams = [{gram: k * idf(gram) for gram, k in some.items()} for some in counts]
    norms = [math.sqrt(math.fsum(x * x for x in some.values())) for some in grams]
    return Vector(grams, norms, max(0, len(words) - 1))


def similarity(candidate: Vector, reference: Vector) -> float:
    """CIDEr-D of one candidate and one reference, 0 to 10."""
    total = 0.0
    for u, v, a, b in zip(candidate.grams, reference.grams, candidate.norms, reference.norms, strict=True):
        if a and b:
            total += math.fsum(min(x, v[gram]) * v[gram] for gram, x in u.items() if gram in v) / (a * b)
    apart = candidate.length - reference.length
    return 10 * total / LONGEST * math.exp(-(apart**2) / (2 * SIGMA**2))


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each candidate against its references, 0 to 10; a corpus' score is the mean.

    Document frequencies are those of the references at hand, an item's references being one document: scores of
    different corpora do not compare, and of a single item all are 0.
    """
    documents: Counter[Gram] = Counter()
    for its in references:
        documents.update({gram for x in its for n in range(1, LONGEST + 1) for gram in ngrams(tokens(x), n)})
    most = math.log(max(1, len(references)))

    def idf(gram: Gram) -> float:
        return most - math.log(max(1, documents[gram]))

    found = []
    for candidate, its in zip(candidates, references, strict=True):
        told = vector(candidate, idf)
        found.append(math.fsum(similarity(told, vector(x, idf)) for x in its) / len(its))
    return found


def consensus(texts: Sequence[str], ignored: frozenset[str] = frozenset()) -> list[float]:
    """Each text's mean CIDEr-D with the others as its references: minimum Bayes risk (Kumar and Byrne 2004).

    Args:
        ignored: words that say nothing; runs of nothing else do not count. They stand in for document frequencies, so
            that the score of a clip's captions does not depend on other clips.
    """
    told = [vector(text, lambda gram: float(not ignored.issuperset(gram))) for text in texts]
    return [
        math.fsum(similarity(told[i], told[j]) for j in range(len(told)) if j != i) / max(1, len(told) - 1)
        for i in range(len(told))
    ]
