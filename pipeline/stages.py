"""What a stage is, and how one is run on one unit of work.

A stage is a plain object: build it, `setup()` once a worker, call it with the videos of one unit. It
needs no Ray; `pipeline.graph` lists the stages a recipe names, and `pipeline.run.job`
puts them on Ray Data or runs them in this process.
Module level imports of stage files stay light: models are imported in `setup`.
"""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from pipeline.io.store import StoreError
from pipeline.record import Error, Video


class StageError(Exception):
    """A source that a stage cannot use; the message is one sentence for the `error` column."""


@dataclass(frozen=True)
class Resources:
    """What one worker of a stage takes from the cluster."""

    cpus: float = 1.0
    gpus: float = 0.0
    min_workers: int = 1
    max_workers: int | None = None  # none: as many as fit


@dataclass
class Produces:
    """The columns a stage adds to clips/*.parquet."""

    scores: list[str] = field(default_factory=list)
    embeddings: dict[str, int] = field(default_factory=dict)  # name → length


class Stage(Protocol):
    name: str
    resources: Resources
    produces: Produces

    def setup(self) -> None:
        """Once a worker: load the model."""

    def __call__(self, videos: list[Video]) -> list[Video]:
        """Grow the records of one unit, in place, and return them.

        Raise StageError (or anything) to fail a video. A stage is idempotent: called again on a video
        it has half done, it gives what one call would have given.
        """
        ...


def produced(stages: list[Stage]) -> Produces:
    """Every score and embedding column of a run, in stage order."""
    all_ = Produces()
    for stage in stages:
        all_.scores += [s for s in stage.produces.scores if s not in all_.scores]
        all_.embeddings |= stage.produces.embeddings
    return all_


def run_stage(stage: Stage, videos: list[Video]) -> list[Video]:
    """Run a stage on one unit; a video it fails on becomes an error and the others go on.

    The unit is tried whole (models batch across its videos), then, if that raises, video by video.
    """
    good = [v for v in videos if v.error is None]
    if not good:
        return videos
    start = time.perf_counter()
    try:
        stage(good)
    except StoreError:
        raise  # the output, not a video, is at fault: the run ends
    except Exception as e:
        if len(good) == 1:
            fail(good[0], stage.name, e)
        else:
            for v in good:
                run_stage(stage, [v])
            return videos
    spent = time.perf_counter() - start
    for v in good:
        v.seconds[stage.name] = v.seconds.get(stage.name, 0.0) + spent / len(good)
    return videos


def fail(video: Video, stage: str, e: BaseException) -> None:
    """Turn an exception into the video's error row: one sentence, the stage, the time."""
    if isinstance(e, StageError):
        message = str(e)
    else:
        where = traceback.extract_tb(e.__traceback__)
        at = f" at {where[-1].filename.rsplit('/', 1)[-1]}:{where[-1].lineno}" if where else ""
        message = f"{type(e).__name__}: {e}{at}"
    video.error = Error(stage, " ".join(message.split()), datetime.now(UTC).isoformat(timespec="seconds"))
    video.frames = None
    video.clips = []
