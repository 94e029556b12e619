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
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files

from pipeline.caption.text import sentences, tokens
from pipeline.record import Caption, Clip, Video

FLAGS = {
    "refusal": "says that it cannot see, or will not say",
    "opener": "begins with words about the video or the answer itself, as 'The video shows'",
    "loop": "says the same again and again",
    "truncated": "breaks off",
    "wrong_language": "is not English, and its prompt asks for no other language",
    "leak": "repeats its prompt, or thinks aloud",
    "broken_json": "was to be JSON and is none",
    "name": "named a person, who is 'a person' now",
    "contact": "held an e-mail address, phone number or web address, which is taken out",
    "camera": "says of the camera what the measured motion contradicts",
}

REFUSAL = re.compile(
    r"\bi(?:'m| am) (?:sorry|unable|not able)\b|\bas (?:an ai|a language model)\b|"
    r"\bi (?:can(?:not|'t)|do(?: not|n't)(?: have the ability to)?) "
    r"(?:see (?:the|this|any)|view|watch|access|process|identify|provide|assist|help|describe)\b|"
    r"^(?:sorry\b.{0,20} )?(?:unable to|cannot|can't) \w+|"
    r"\bno (?:video|image)s? (?:(?:is|are|was|were) )?(?:provided|attached)\b",
    re.I,
)
_VIDEO = r"(?:video|clip|footage|image|picture|scene|frame|animation)s?(?: clip| footage| frame| sequence)?"
OPENER = re.compile(
    rf"^(?:in |throughout )?(?:this|the|a) (?:short |brief )?{_VIDEO}"
    r"(?:,| (?:shows?|depicts?|features?|captures?|presents?|begins?|opens?|starts?|displays?|showcases?|"
    r"is (?:about|of)|appears|we see)\b)|"
    rf"^this is (?:an?|the) (?:short |brief )?{_VIDEO} (?:of|about|that|which|showing)\b|"
    r"^(?:(?:sure|certainly|of course)[!,.] )?here(?:'s| is| are)\b[^.:]{0,40}\b(?:caption|description|summary)s?\b|"
    r"^(?:caption|description|summary|answer)\s*:",
    re.I,
)
LEAK = re.compile(
    r"</?think>|<\|?(?:im_start|im_end|assistant|user|system)\b|^(?:user|assistant|system|human)\s*:|"
    r"\b(?:the user (?:wants|asks|asked)|let me (?:think|look|analy[sz]e|describe)|okay, (?:so|let))\b|"
    r"^as requested\b",
    re.I | re.M,
)
# Bounded, and begun only where a run of such characters begins: what has no end is gone over once
CONTACT = re.compile(
    r"(?P<address>(?<![\w.+-])[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+)|"
    r"(?P<web>\b(?:https?://|www\.)\S*[\w/]|(?<![\w.@-])(?:[\w-]{1,63}\.){1,4}(?:com|org|net|gov|edu)\b(?:/\S*[\w/])?)|"
    r"(?P<phone>(?<![\w.])\+\d{8,15}(?!\w)|"
    r"(?<![\w.])(?:\+\d{1,3}[ .-])?\+?\(?\d{2,4}\)?[ .-]\d{3,4}[ .-]\d{3,4}(?:[ .-]\d{2,4})?(?!\w))"
)
CONTACTS = {"address": "an e-mail address", "web": "a web address", "phone": "a phone number"}
# Digits that are no phone number: thousands set apart, years, and addresses of machines
_AMOUNT = re.compile(r"\d{1,3}(?:([ .])\d{3})(?:\1\d{3})*|(?:(?:19|20)\d\d[ -]?)+|(?:\d{1,3}\.){3}\d{1,3}")
_DIALLED = re.compile(
    r"\b(?:call|dial|phone|telephone|tel|mobile|number|text|whatsapp|contact)\b\W*(?:\w+\W+)?$", re.I
)
TITLE = r"(?:Mr|Mrs|Ms|Miss|Dr|Prof|Sir|President|Senator)\.?"
NAME = re.compile(
    rf"\b(?:(?:[Aa]|[Tt]he) (?:man|woman|person|boy|girl) (?:named|called) )?(?:{TITLE} )?(?P<first>[A-Z][a-z]+)"
    r"(?: (?:[A-Z]\. )?(?P<last>[A-Z][a-z]+(?:-[A-Z][a-z]+)?))?(?P<own>['’]s)?"
)
# Right before a name these make it that of a thing or a place: a Sherman tank, an Allen key, St. Louis
_THING = re.compile(
    r"(?:\b(?:an?|the|two|three|several|[Ss]t\.?|Saint|San|Santa|Mount|Lake|Fort|Port))\s$", re.I
)
_BRANDS = frozenset(
    {"pepper", "martens", "oetker", "universe", "world", "america"}
)  # Dr Pepper, Miss Universe
_QUOTED = re.compile(r"“[^”]*”|\"[^\"]*\"")
_ENGLISH = "the a an of and with are by from while his her is that their for it at in on to there"
_OTHER = """
    el la los las un una unos que de del con por para se su en os um uma do da em na no com le les des une et est il sur
    dans au avec lo gli che di della per nel der die das und ein eine einen ist im auf mit het een van op w z na jest
    bir ve ile
"""
ENGLISH = frozenset(_ENGLISH.split())
OTHER = frozenset(_OTHER.split())  # as common in eight other languages that are written in Latin letters
LANGUAGES = re.compile(
    r"\b(?:Arabic|Chinese|Czech|Danish|Dutch|Finnish|French|German|Greek|Hebrew|Hindi|Hungarian|Indonesian|Italian|"
    r"Japanese|Korean|Mandarin|Norwegian|Persian|Polish|Portuguese|Romanian|Russian|Spanish|Swedish|Thai|Turkish|"
    r"Ukrainian|Vietnamese)\b"
)
MOVES, HOLDS = 0.02, 0.004  # net camera travel that cannot be overlooked, and none; see pipeline.score.motion
# Not those that may end a clause too, as in 'he turns the light on'
ENDINGS = (" and", " or", " the", " a", " an", " of", ",", ":", "-", "…", "...")


def tidy(caption: Caption, video: Video, clip: Clip) -> None:
    """Give a caption its flags, and take people's names and addresses out of its text."""
    if not caption.text:
        return
    said = caption.text
    text, contact = _without_contacts(said)
    text, name = _without_names(text)
    own = _own_words(said)
    found = {
        "refusal": len(own) < 400 and REFUSAL.search(own.replace("’", "'")) is not None,
        "opener": OPENER.match(own.replace("’", "'")) is not None,
        "loop": _loops(own),
        "truncated": caption.outcome == "truncated" or said.endswith(ENDINGS),
        "wrong_language": _foreign(own) and not _asks_for_another(caption.prompt),
        "leak": LEAK.search(own) is not None or _repeats(said, caption.prompt),
        "broken_json": _broken_json(said),
        "name": name,
        "contact": contact,
        "camera": contradicts(said, clip.scores),
    }
    caption.flags = sorted({*caption.flags, *(flag for flag, there in found.items() if there)})
    if text != said:
        caption.raw, caption.text = caption.raw or said, text


def _own_words(text: str) -> str:
    """Without what it quotes, as a text on screen; one that is in quotes as a whole, as it is."""
    if text.lstrip().startswith(("{", "[")):  # JSON
        return text
    own = _QUOTED.sub("“”", text)
    return own if any(c.isalnum() for c in own) else text.strip('“”"')


def _without_contacts(text: str) -> tuple[str, bool]:
    def told(found: re.Match[str]) -> str:
        kind = str(found.lastgroup)
        before = text[max(0, found.start() - 30) : found.start()]
        if kind == "phone" and _AMOUNT.fullmatch(found.group()) and not _DIALLED.search(before):
            return found.group()
        return CONTACTS[kind]

    new = CONTACT.sub(told, text)
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
        titled = re.search(rf"\b{TITLE} [A-Z]", whole) is not None and first.lower() not in _BRANDS
        introduced = " named " in whole or " called " in whole
        at = found.start("first")
        known = first.lower() in given_names() and (found["last"] is not None or at not in starts)
        known = known and not _THING.search(text[max(0, at - 9) : at])
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
    """A word six times or two to sixteen four times in a row, or a sentence of four words and more three times."""
    words = tokens(text)
    for n in range(1, 17):
        run, most = 0, 5 if n == 1 else 3 * n
        for i in range(n, len(words)):
            run = run + 1 if words[i] == words[i - n] else 0
            if run >= most:
                return True
    told = Counter(s.lower().strip(" .!?。！？") for s in sentences(text))
    return any(count >= 3 and len(tokens(s)) >= 4 for s, count in told.items())


def _foreign(text: str) -> bool:
    """Mostly in other letters than Latin ones, or with more common words of other languages than of English."""
    letters = [c for c in text if c.isalpha()]
    if letters and sum(ord(c) > 0x24F for c in letters) > 0.3 * len(letters):
        return True
    words = re.findall(r"[^\W\d_]+", text.lower())
    other = sum(w in OTHER for w in words)
    return other >= 2 and other > sum(w in ENGLISH for w in words)


def _asks_for_another(prompt: str) -> bool:
    """Whether a prompt's first line, which no title of a source is part of, is in or names a language not English."""
    lines = [line for line in prompt.splitlines() if not line.startswith("These ")]  # times of frames
    return bool(lines) and (_foreign(lines[0]) or LANGUAGES.search(lines[0]) is not None)


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
    except (ValueError, RecursionError):
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
    (rf"{_MOVES}(?:to the )?left\b(?! of| side| hand)", {"pan_x": -1}),
    (rf"{_MOVES}(?:to the )?right\b(?! of| side| hand)", {"pan_x": 1}),
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
