"""Benchmarks by name: how each one's folder is read. A format is a file beside this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jobs.benchmarks import activitynet, msrvtt, msvd, nextqa, own, vatex, videomme
from jobs.benchmarks.items import BenchmarkError, Folder, Found

Read = Callable[[Folder, str], Found]


@dataclass(frozen=True)
class Format:
    """of: what is wanted (captions, retrieval, questions) → reader, and the split that is read where none is said."""

    about: str
    of: Mapping[str, tuple[Read, str]] = field(default_factory=dict)


def _captions(
    read: Read, split: str, retrieval: tuple[Read, str] | None = None
) -> dict[str, tuple[Read, str]]:
    return {"captions": (read, split), "retrieval": retrieval or (read, split)}


FORMATS = {
    "msr-vtt": Format(
        "captions; retrieval on 1k-A; MSRVTT-QA",
        _captions(msrvtt.captions, "test", (msrvtt.captions, msrvtt.PAIRS))
        | {"questions": (msrvtt.questions, "test")},
    ),
    "msvd": Format(
        "captions; MSVD-QA", _captions(msvd.captions, "test") | {"questions": (msvd.questions, "test")}
    ),
    "activitynet": Format(
        "captions of given stretches; retrieval by paragraphs; ActivityNet-QA",
        _captions(activitynet.captions, "val_1", (activitynet.paragraphs, "val_1"))
        | {"questions": (activitynet.questions, "test")},
    ),
    "vatex": Format("captions", _captions(vatex.captions, "val")),
    "next-qa": Format("questions, multiple choice or open", {"questions": (nextqa.questions, "val")}),
    "video-mme": Format("multiple choice, without subtitles", {"questions": (videomme.questions, "test")}),
    "questions": Format(
        "your own: NAME.json, see 'clipmill toy --questions'", {"questions": (own.questions, "choices")}
    ),
}


def read(name: str, folder: Path, wanted: str, split: str | None = None) -> tuple[Found, str]:
    """The items and the split they are of.

    Args:
        wanted: captions, retrieval or questions.

    Raises BenchmarkError, one sentence with the fix.
    """
    of = FORMATS[name].of
    if wanted not in of:
        able = [other for other, known in FORMATS.items() if wanted in known.of]
        raise BenchmarkError(f"--format {name} has no {wanted}: formats that have are {', '.join(able)}")
    reader, usual = of[wanted]
    return reader(Folder(folder), split or usual), split or usual
