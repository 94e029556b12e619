"""Words as the caption metrics count them: lower case, without punctuation, in the manner of the Penn Treebank.

COCO's evaluation hands every caption to Stanford's PTBTokenizer, a Java program, before it scores it; this gives the
same words for plain English sentences without Java. Brackets are left out here; there they stay, as -lrb- and -rrb-.
"""

from __future__ import annotations

import re

_CLITIC = re.compile(r"(?<=\w)(n['’]t|['’](?:s|re|ve|ll|d|m))\b")
_TWO = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b")  # words that the Treebank takes apart
_WORD = re.compile(
    r"n['’]t\b|['’](?:s|re|ve|ll|d|m)\b|\d+(?:[.,:]\d+)*|[^\W_]+(?:[-_.&/'’](?=[^\W_])[^\W_]+)*|[$%&#@*+=]"
)


def tokens(text: str) -> list[str]:
    """'The man's dog doesn't bark.' → the man 's dog does n't bark."""
    apart = _CLITIC.sub(r" \1", _TWO.sub(lambda m: " ".join(filter(None, m.groups())), text.lower()))
    return [w.replace("’", "'") for w in _WORD.findall(apart)]


def ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n words, in order."""
    return list(zip(*(words[i:] for i in range(n)), strict=False))
