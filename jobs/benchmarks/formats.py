"""Benchmarks by name: how each one's folder is read. A format is a file beside this one."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.benchmarks.items import Found

Read = tuple[str, str, str]  # file beside this one, its function, the split that is read where none is said


@dataclass(frozen=True)
class Format:
    """of: what is wanted (captions, retrieval, questions) → how it is read."""

    about: str
    of: Mapping[str, Read]


FORMATS = {
    "msr-vtt": Format(
        "captions; retrieval on 1k-A; MSRVTT-QA",
        {
            "captions": ("msrvtt", "captions", "test"),
            "retrieval": ("msrvtt", "captions", "1k-A"),
            "questions": ("msrvtt", "questions", "test"),
        },
    ),
    "msvd": Format(
        "captions; retrieval; MSVD-QA",
        {
            "captions": ("msvd", "captions", "test"),
            "retrieval": ("msvd", "captions", "test"),
            "questions": ("msvd", "questions", "test"),
        },
    ),
    "activitynet": Format(
        "captions of given stretches; retrieval by paragraphs; ActivityNet-QA",
        {
            "captions": ("activitynet", "captions", "val_1"),
            "retrieval": ("activitynet", "paragraphs", "val_1"),
            "questions": ("activitynet", "questions", "test"),
        },
    ),
    "vatex": Format(
        "captions; retrieval",
        {"captions": ("vatex", "captions", "val"), "retrieval": ("vatex", "captions", "val")},
    ),
    "next-qa": Format("questions, multiple choice or open", {"questions": ("nextqa", "questions", "val")}),
    "video-mme": Format(
        "questions, multiple choice, with --subtitles or without",
        {"questions": ("videomme", "questions", "test")},
    ),
    "questions": Format(
        "your own: SPLIT.json, as 'clipmill toy --questions' writes choices.json",
        {"questions": ("own", "questions", "choices")},
    ),
}


def read(name: str, folder: Path, wanted: str, split: str | None = None) -> tuple[Found, str]:
    """The items and the split they are of.

    Args:
        wanted: captions, retrieval or questions.

    Raises BenchmarkError, one sentence with the fix.
    """
    from jobs.benchmarks.items import BenchmarkError, Folder

    of = FORMATS[name].of
    if wanted not in of:
        able = [other for other, known in FORMATS.items() if wanted in known.of]
        raise BenchmarkError(f"--format {name} has no {wanted}: formats that have are {', '.join(able)}")
    file, function, usual = of[wanted]
    reader = getattr(importlib.import_module(f"jobs.benchmarks.{file}"), function)
    return reader(Folder(folder), split or usual), split or usual
