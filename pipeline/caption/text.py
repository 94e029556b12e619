"""What captions are made of: sentences, and the words that say something."""

from __future__ import annotations

import re

# A full stop after these, or after a single capital, ends no sentence.
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Mt|No|vs|etc|e\.g|i\.e|approx)\.$")
_LONGEST = len(" approx.")
# Possessive, and begun only where a run begins: what a model says without end is gone over once
_END = re.compile(r"(?<![.!?…])[.!?…]++[\"')\]”’]*+\s++|(?<![。！？])[。！？]++[」』”]*+\s*+")


def sentences(text: str) -> list[str]:
    """A text's sentences, without the white space between them."""
    found, start = [], 0
    for end in _END.finditer(text):
        before = text[max(start, end.start() + 1 - _LONGEST) : end.end()].rstrip()
        if not _ABBREVIATION.search(before):
            found.append(text[start : end.end()].strip())
            start = end.end()
    return [*found, *([text[start:].strip()] if text[start:].strip() else [])]


# Words that carry the sentence rather than say what is seen.
_STOP_WORDS = """
    a an the this that these those it its is are was were be been being has have had do does did can could may
    might will would and or but nor so as if then than there here who which what when where while with without
    within of in on at to from by for into onto through between about he she they them his her their him we you
    i our your my some any no not very more most other another each also just only both such same one
    video clip picture image scene footage frame shot show shows showing shown see seen appears
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


# Chinese and Japanese set no spaces between words: a character stands for one there
_CHARACTER = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
_WORD = re.compile(rf"{_CHARACTER}|(?:(?!{_CHARACTER})\w)+(?:['’](?:(?!{_CHARACTER})\w)+)?")


def tokens(text: str) -> list[str]:
    """All words, in lower case; each character of Chinese and Japanese is one."""
    return _WORD.findall(text.lower())


def words(text: str) -> list[str]:
    """The words that say something, in lower case; an English plural counts as its singular."""
    found = (w for w in tokens(text) if w not in STOP_WORDS)
    return [w[:-1] if len(w) > 3 and w[-1] == "s" and w[-2] not in "sui" else w for w in found]
