"""Subtitles in SubRip's format, and those that are shown at given times.

1
00:00:01,500 --> 00:00:03,000
<font color="white" size=".72c">Hi guys, today</font>
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from jobs.benchmarks.items import BenchmarkError

_TIMES = re.compile(
    r"^\s*(\d+):(\d\d):(\d\d)[,.](\d{1,3})\s*-->\s*(\d+):(\d\d):(\d\d)[,.](\d{1,3}).*$", re.MULTILINE
)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>|\{\\[^}]*\}")
_NUMBER = re.compile(r"\n\s*\d+\s*\Z")  # of the cue that follows


class Cue(NamedTuple):
    start: float  # seconds
    end: float
    text: str  # on one line, without marks of its looks


def read(path: Path) -> list[Cue]:
    """In the file's order. Raises BenchmarkError where it is none."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise BenchmarkError(f"{path} cannot be read ({e}): fetch it again") from e
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = "\n".join(data.decode("utf-16" if wide else "utf-8-sig", errors="replace").splitlines())
    marks = list(_TIMES.finditer(text))
    if not marks and text.strip():
        raise BenchmarkError(
            f"{path} holds no subtitles (no line '00:00:01,500 --> 00:00:03,000'): fetch it again"
        )
    numbered = bool(marks) and text[: marks[0].start()].strip().isdecimal()
    found = []
    for i, mark in enumerate(marks):
        said = text[mark.end() : marks[i + 1].start() if i + 1 < len(marks) else len(text)]
        if numbered and i + 1 < len(marks):
            said = _NUMBER.sub("", said.rstrip())
        h, m, s, ms, h2, m2, s2, ms2 = mark.groups()
        start, end = _seconds(h, m, s, ms), _seconds(h2, m2, s2, ms2)
        if plain := " ".join(_TAG.sub("", said).split()):
            found.append(Cue(start, end, plain))
    return found


def _seconds(hours: str, minutes: str, seconds: str, parts: str) -> float:
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + int(parts.ljust(3, "0")) / 1000


def shown_at(cues: Iterable[Cue], times: Iterable[float]) -> list[str]:
    """What is on screen at any of these times, in the order of the times, nothing twice in a row."""
    cues = list(cues)
    found: list[str] = []
    for t in times:
        for text in (c.text for c in cues if c.start <= t < c.end):
            if text not in found[-2:]:  # lines that roll up are on screen in two cues
                found.append(text)
    return found
