"""What is odd about a caption, as named flags beside the untouched text.

FLAGS says what each means. A rule reads those of the chosen caption as the text `caption_flags`, and `choose.avoid`
names those with which a caption stands only where no other does. Only names and addresses of people are taken out of
the text; `raw` keeps what was said.

All of it is plain rules over words, so it misses what words alone do not tell: names that are no common English given
names, languages written in Latin letters when a text is short.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from importlib.resources import files

from pipeline.caption.text import sentences
from pipeline.record import Caption, Clip, Video

FLAGS = {
    "refusal": "says that it cannot see, or will not say",
    "opener": "begins with words about the video itself, as 'The video shows'",
    "loop": "says the same again and again",
    "truncated": "breaks off",
    "wrong_language": "is not English",
    "leak": "repeats its prompt, or thinks aloud",
    "broken_json": "was to be JSON and is none",
    "name": "named a person, who is 'a person' now",
    "contact": "held an e-mail address, phone number or web address, which is taken out",
    "camera": "says of the camera what the measured motion contradicts",
}

REFUSAL = re.compile(
    r"\b(i(?:'m| am) (?:sorry|unable|not able)|as an ai\b|(?:i )?(?:can(?:not|'t)|am unable to) "
    r"(?:see|view|watch|access|process|identify|provide|assist|help|describe)|no (?:video|image) (?:was )?provided)",
    re.I,
)
OPENER = re.compile(
    r"^(?:in |throughout )?(?:this|the|a) (?:short |brief )?"
    r"(?:video|clip|footage|image|picture|scene|frame|animation)s?(?: clip| footage| frame| sequence)?"
    r"(?:,| (?:shows?|depicts?|features?|captures?|presents?|begins?|opens?|starts?|displays?|showcases?|"
    r"is (?:about|of)|appears|we see)\b)",
    re.I,
)
LEAK = re.compile(
    r"</?think>|<\|?(?:im_start|im_end|assistant|user|system)\b|^(?:user|assistant|system|human)\s*:|"
    r"\b(?:the user (?:wants|asks|asked)|let me (?:think|look|analy[sz]e|describe)|okay, (?:so|let)|as requested)\b",
    re.I | re.M,
)
CONTACT = re.compile(
    r"(?P<address>[\w.+-]+@[\w-]+(?:\.[\w-]+)+)|(?P<web>\b(?:https?://|www\.)\S+)|"
    r"(?P<phone>(?<![\w.])\+?\(?\d{2,4}\)?[ .-]\d{3,4}[ .-]\d{3,4}(?:[ .-]\d{2,4})?(?![\w]))"
)
CONTACTS = {"address": "an e-mail address", "web": "a web address", "phone": "a phone number"}
TITLE = r"(?:Mr|Mrs|Ms|Miss|Dr|Prof|Sir|President|Senator)\.?"
NAME = re.compile(
    rf"\b(?:(?:[Aa]|[Tt]he) (?:man|woman|person|boy|girl) (?:named|called) )?(?:{TITLE} )?(?P<first>[A-Z][a-z]+)"
    r"(?: (?:[A-Z]\. )?(?P<last>[A-Z][a-z]+(?:-[A-Z][a-z]+)?))?(?P<own>['’]s)?"
)
_ENGLISH = "the a an of and with are by from while his her is that their for it at in on to there"
_OTHER = """
    el la los las un una unos que de del con por para se su en os um uma do da em na no com le les des une et est il sur
    dans au avec lo gli che di della per nel der die das und ein eine einen ist im auf mit het een van op w z na jest
    bir ve ile
"""
ENGLISH = frozenset(_ENGLISH.split())
OTHER = frozenset(_OTHER.split())  # as common in eight other languages that are written in Latin letters
MOVES, HOLDS = 0.02, 0.004  # net camera travel that cannot be overlooked, and none; see pipeline.score.motion
ENDINGS = (
    "and",
    "or",
    "the",
    "a",
    "an",
    "of",
    "in",
    "on",
    "with",
    "to",
    "is",
    "are",
    ",",
    ":",
    "-",
    "…",
    "...",
)


def tidy(caption: Caption, video: Video, clip: Clip) -> None:
    """Give a caption its flags, and take people's names and addresses out of its text."""
    if not caption.text:
        return
    said = caption.text
    text, contact = _without_contacts(said)
    text, name = _without_names(text)
    found = {
        "refusal": REFUSAL.search(said) is not None and len(said) < 400,
        "opener": OPENER.match(said) is not None,
        "loop": _loops(said),
        "truncated": caption.outcome == "truncated" or said.lower().endswith(ENDINGS_OF_WORDS),
        "wrong_language": _foreign(said),
        "leak": LEAK.search(said) is not None or _repeats(said, caption.prompt),
        "broken_json": _broken_json(said),
        "name": name,
        "contact": contact,
        "camera": contradicts(said, clip.scores),
    }
    caption.flags = sorted({*caption.flags, *(flag for flag, there in found.items() if there)})
    if text != said:
        caption.raw, caption.text = caption.raw or said, text


ENDINGS_OF_WORDS = tuple(e if not e.isalpha() else f" {e}" for e in ENDINGS)


def _without_contacts(text: str) -> tuple[str, bool]:
    new = CONTACT.sub(lambda found: CONTACTS[str(found.lastgroup)], text)
    return new, new != text


@functools.cache
def given_names() -> frozenset[str]:
    lines = (files("pipeline.caption") / "given_names.txt").read_text().splitlines()
    return frozenset(" ".join(line for line in lines if not line.startswith("#")).split())


def _without_names(text: str) -> tuple[str, bool]:
    """'a person' for each who is named: by a title, or by a common given name with a surname or inside a sentence."""
    starts = _starts(text)

    def person(found: re.Match[str]) -> str:
        whole, first = found.group(), found["first"]
        titled = re.search(rf"\b{TITLE} [A-Z]", whole) is not None
        introduced = " named " in whole or " called " in whole
        at = found.start("first")
        known = first.lower() in given_names() and (found["last"] is not None or at not in starts)
        if not (titled or introduced or known):
            return whole
        article = "A person" if found.start() in starts else "a person"
        return article + (found["own"] or "")

    new = NAME.sub(person, text)
    new = re.sub(
        r"\b([Aa] person)(?: and a person)+\b", lambda m: ("P" if m[1][0] == "A" else "p") + "eople", new
    )
    return new, new != text


def _starts(text: str) -> set[int]:
    """Where sentences begin."""
    found, at = set(), 0
    for sentence in sentences(text):
        at = text.index(sentence, at)
        found.add(at)
        at += len(sentence)
    return found


def _loops(text: str) -> bool:
    """One to eight words four times in a row, or a sentence of four words and more three times."""
    words = re.findall(r"\w+", text.lower())
    for n in range(1, 9):
        run = 0
        for i in range(n, len(words)):
            run = run + 1 if words[i] == words[i - n] else 0
            if run >= 3 * n:
                return True
    told = [s.lower().strip(" .!?") for s in sentences(text)]
    return any(told.count(s) >= 3 and len(s.split()) >= 4 for s in set(told))


def _foreign(text: str) -> bool:
    """Mostly in other letters than Latin ones, or with more common words of other languages than of English."""
    letters = [c for c in text if c.isalpha()]
    if letters and sum(ord(c) > 0x24F for c in letters) > 0.3 * len(letters):
        return True
    words = re.findall(r"[^\W\d_]+", text.lower())
    other = sum(w in OTHER for w in words)
    return other >= 2 and other > sum(w in ENGLISH for w in words)


def _repeats(text: str, prompt: str) -> bool:
    """A sentence of six words and more of its prompt."""
    low = " ".join(text.lower().split())
    return any(len(s.split()) >= 6 and s.lower() in low for s in sentences(" ".join(prompt.split())))


def _broken_json(text: str) -> bool:
    start = text.removeprefix("```json").removeprefix("```").strip()
    if not start.startswith(("{", "[{", '["')):
        return False
    try:
        json.loads(start.removesuffix("```").strip())
    except ValueError:
        return True
    return False


_MOVES = r"(?:camera|shot|view)\b[^.]{0,30}\b(?:pans?|panning|tilts?|tilting|moves?|moving)\b[^.]{0,20}\b"
_STILL = r"(?:still|static|stationary|fixed|steady)"
# Words about the camera, and what they say of pan_x, pan_y and zoom: a sign, or 0 for none at all.
CAMERA: list[tuple[str, dict[str, int]]] = [
    (
        rf"camera (?:is |remains |stays |holds )?{_STILL}|{_STILL} (?:camera|shot)",
        {"pan_x": 0, "pan_y": 0, "zoom": 0},
    ),
    (rf"{_MOVES}(?:to the )?left\b", {"pan_x": -1}),
    (rf"{_MOVES}(?:to the )?right\b", {"pan_x": 1}),
    (rf"{_MOVES}up(?:wards?)?\b", {"pan_y": -1}),
    (rf"{_MOVES}down(?:wards?)?\b", {"pan_y": 1}),
    (r"\bzoom(?:s|ing) in\b|\b(?:pushes|dollies) in\b|\bview closes in\b", {"zoom": 1}),
    (r"\bzoom(?:s|ing) out\b|\b(?:pulls|dollies) (?:out|back)\b|\bview widens\b", {"zoom": -1}),
]


def contradicts(text: str, scores: dict[str, float]) -> bool:
    """It says that the camera does what was measured otherwise: moves where it holds still, or the other way."""
    return any(_contradictions(text, scores))


def _contradictions(text: str, scores: dict[str, float]) -> Iterator[bool]:
    for words, says in CAMERA:
        if re.search(words, text, re.I):
            for name, sign in says.items():
                if (value := scores.get(name)) is not None:
                    yield abs(value) > MOVES if sign == 0 else value * sign < -HOLDS
