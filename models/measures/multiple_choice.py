"""Questions with options: how they are put to a model, which option an answer is, and when an open answer is right."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from models.measures.captions.tokens import tokens

LETTERS = string.ascii_uppercase
LETTER_ONLY = "Answer with the letter of the right option."
ARTICLES = {"a", "an", "the"}
_FIRST = re.compile(r"\(?([A-Z])(?:[).:]|\s*$)")
_NAMED = re.compile(r"\b(?:answer|option)\b(?:\s+is)?:?\s*\(?([A-Z])\b(?!['’])", re.IGNORECASE)


def lettered(question: str, options: Sequence[str], after: str = LETTER_ONLY) -> str:
    """The question, then its options, a line each: 'Which …?\\nA. red\\nB. blue\\nAnswer with the letter …'."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, *filter(None, [after])])


def chosen(said: str, options: Sequence[str]) -> int | None:
    """Which option an answer is: 'B', '(B) because …', 'the answer is B', or the words of one; None: of no one."""
    said = said.strip()
    for pattern in (_FIRST.match, _NAMED.search):
        found = pattern(said)
        if found and (place := LETTERS.find(found[1])) in range(len(options)):
            return place
    words, each = plain(said), [plain(option) for option in options]
    same = [i for i, option in enumerate(each) if option == words]
    named = same or [i for i, option in enumerate(each) if option and _within(option, words)]
    named = [
        i for i in named if not any(i != j and _within(each[i], each[j]) for j in named)
    ]  # 'blue' of 'dark blue'
    return named[0] if len(named) == 1 else None


def _within(part: list[str], whole: list[str]) -> bool:
    """Whether these words are some of those, in a row."""
    return f" {' '.join(part)} " in f" {' '.join(whole)} "


def plain(text: str) -> list[str]:
    """Words by which answers are compared: lower case, without punctuation and articles."""
    return [word for word in tokens(text) if word not in ARTICLES]
