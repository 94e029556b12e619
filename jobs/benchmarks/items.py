"""What a benchmark asks about a video, whatever format its files have."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

ENDINGS = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v")


class BenchmarkError(ValueError):
    """A benchmark's folder cannot be read; one sentence with the fix."""


@dataclass(frozen=True)
class Item:
    """A video with its captions, or with a question.

    video: a file; of a run's shards a function that gives the clip's bytes.
    span: of the video, in seconds from its begin; none: all of it.
    captions: that people wrote, or `answers`: that are right of an open question.
    options: of a multiple-choice question, `answer` the place of the right one.
    group: names of the kinds that the question is of; figures are given of each.
    subtitles: a .srt file of the video.
    """

    id: str
    video: Path | Callable[[], bytes]
    captions: tuple[str, ...] = ()
    question: str = ""
    options: tuple[str, ...] = ()
    answer: int | None = None
    answers: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    span: tuple[float, float] | None = None
    subtitles: Path | None = None


@dataclass
class Found:
    """Items whose videos are there, and how many there would be with all of them."""

    items: list[Item]
    missing: list[str] = field(default_factory=list)  # names of videos that are not

    def note(self) -> str:
        """Of videos that are missing, '' where none is."""
        if not self.missing:
            return ""
        some = ", ".join(self.missing[:3]) + (", …" if len(self.missing) > 3 else "")
        return (
            f"Left out, as they are not in the folder: {len(self.missing):,} ({some}). Figures do not compare with "
            "those of the whole."
        )


@dataclass(frozen=True)
class Folder:
    """A benchmark's folder: annotation files, videos and their subtitles at any depth, by names without ending."""

    path: Path

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise BenchmarkError(f"{self.path} is no folder: give the one with the benchmark's files")

    @cached_property
    def videos(self) -> dict[str, Path]:
        """Name → file."""
        found: dict[str, Path] = {}
        for path in sorted(self.path.rglob("*")):
            if path.suffix.lower() in ENDINGS:
                found.setdefault(path.stem, path)
        return found

    @cached_property
    def subtitles(self) -> dict[str, Path]:
        """Name of a video → its .srt."""
        return {path.stem: path for path in sorted(self.path.rglob("*.srt"), reverse=True)}

    def files(self, *names: str) -> list[Path]:
        """Those of these names (patterns) at any depth, in the order of the names."""
        return [path for name in names for path in sorted(self.path.rglob(name)) if path.is_file()]

    def file(self, *names: str) -> Path:
        """The first of these names. Raises BenchmarkError."""
        for path in self.files(*names):
            return path
        raise BenchmarkError(f"{self.path}: there is no file {' or '.join(names)}: put it there")

    def with_videos(self, items: Iterable[tuple[str, Item]]) -> Found:
        """Items with the files of the videos that they name.

        Args:
            items: name of the video, item without it. Raises BenchmarkError where there is none at all.
        """
        found, missing = [], {}
        for name, item in items:
            if name in self.videos:
                found.append(replace(item, video=self.videos[name], subtitles=self.subtitles.get(name)))
            else:
                missing[name] = True
        if not found:
            wanted = next(iter(missing), None)
            what = f"none of its videos ({wanted}.mp4, …)" if wanted else "nothing of that split"
            raise BenchmarkError(f"{self.path} holds {what}: give the folder that has annotations and videos")
        return Found(found, list(missing))


NOWHERE = Path()  # of an item whose video is still to be found


def read_json(path: Path) -> Any:
    """Raises BenchmarkError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise BenchmarkError(f"{path} cannot be read as JSON ({e}): fetch it again") from e


def read_csv(path: Path, columns: Iterable[str]) -> Iterator[dict[str, str]]:
    """Rows by column. Raises BenchmarkError where it lacks one of these."""
    try:
        with path.open(encoding="utf-8", newline="") as f:
            reader = csv.DictReader(f)
            if lacking := [name for name in columns if name not in (reader.fieldnames or ())]:
                raise BenchmarkError(
                    f"{path} has no column {lacking[0]!r}: it is not the benchmark's own file"
                )
            yield from reader
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise BenchmarkError(f"{path} cannot be read as CSV ({e}): fetch it again") from e


def check_split(split: str, known: Iterable[str]) -> None:
    """Raises BenchmarkError for another."""
    if split not in (names := list(known)):
        raise BenchmarkError(f"--split {split}: give one of {', '.join(names)}")


def fields(path: Path, row: Any, *names: str) -> list[Any]:
    """Values of a row of JSON. Raises BenchmarkError where it has them not."""
    if not isinstance(row, dict) or (lacking := [name for name in names if name not in row]):
        lacks = f"{lacking[0]!r}" if isinstance(row, dict) else "any field"
        raise BenchmarkError(f"{path} has an entry without {lacks}: it is not the benchmark's own file")
    return [row[name] for name in names]
