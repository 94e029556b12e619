"""What a stage is, and how one is run on one unit of work.

A stage is a plain object: build it, `setup()` once a worker, call it with the videos of one unit. It
needs no Ray; `pipeline.graph` lists the stages a recipe names, and `pipeline.run`
puts them on Ray Data or runs them in this process.
Module level imports of stage files stay light: models are imported in `setup`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from pipeline.faults import StoreError, TransientFault, WorkerFault, kind_of, sentence
from pipeline.record import Error, Video
from pipeline.watch import at, back_at

T = TypeVar("T")

TRIES = 3  # calls of a stage that the moment spoils, before that becomes somebody's fault
BACKOFF_S = 0.5  # wait before the second call, doubled for the third


@dataclass(frozen=True)
class Resources:
    """What one worker of a stage takes from the cluster; with the recipe's wishes put in, `stage.resources`."""

    cpus: float = 1.0
    gpus: float = 0.0
    min_workers: int = 1
    max_workers: int | None = None  # none: as many as fit
    batch: int | None = field(
        default=None, compare=False
    )  # pictures a forward pass on a GPU; none: the model's own

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))

    def device(self) -> str:
        """Where a stage's model computes; torch gets its threads. For `setup`.

        'cuda' with a share of a GPU (on a machine that has none: 'cpu'); without a share 'cpu', whatever is there.
        """
        import torch

        torch.set_num_threads(self.threads)
        return "cuda" if self.gpus and torch.cuda.is_available() else "cpu"


@dataclass
class Produces:
    """The columns a stage adds to clips/*.parquet."""

    scores: list[str] = field(default_factory=list)
    embeddings: dict[str, int] = field(default_factory=dict)  # name → length


class Stage(Protocol):
    name: str
    resources: Resources
    produces: Produces
    # Optional: `whole_unit = True` for a stage that writes one file for its unit. It is never given a part
    # of the unit, tells its videos' faults by `fail` itself, and may be called again from the start.
    # `lets_go`: fields of Frames that no later stage reads. `sees_samples = False` for one that does not look at
    # `Frames.samples`: they are let go after the last that does. `whole_source = True` for one that must see all clips
    # of a source: after the last such stage long sources are divided into chunks (pipeline.run.chunks).

    def setup(self) -> None:
        """Once a worker: load the model."""

    def __call__(self, videos: list[Video]) -> list[Video]:
        """Grow the records of one unit, in place, and return them.

        Go over them as `for video in each(videos)`, so that it is known which one was in work when the process
        dies or hangs. Raise a fault of `pipeline.faults` (or anything) to fail a video. A stage is idempotent:
        called again on a video it has half done, it gives what one call would have given.
        """
        ...


def let_go_of_samples(stages: list[Stage]) -> None:
    """Have the last stage of a run that looks at `Frames.samples` let go of them."""
    last: Any = next((s for s in reversed(stages) if getattr(s, "sees_samples", True)), None)
    if last is not None:
        last.lets_go = (*getattr(last, "lets_go", ()), "samples")


def divide_after(stages: list[Stage], chunk_s: float) -> None:
    """Have long sources divided into chunks of so many seconds after the last stage that must see all of a source."""
    last: Any = next((s for s in reversed(stages) if getattr(s, "whole_source", False)), None)
    if last is not None:
        last.divides = chunk_s


def produced(stages: list[Stage]) -> Produces:
    """Every score and embedding column of a run, in stage order."""
    all_ = Produces()
    for stage in stages:
        all_.scores += [s for s in stage.produces.scores if s not in all_.scores]
        all_.embeddings |= stage.produces.embeddings
    return all_


# Who is in work ------------------------------------------------------------------------------------


def each(videos: Iterable[Video]) -> Iterator[Video]:
    """The videos one by one, each announced: if the process dies or hangs now, that one is to blame.

    What comes after the last is work for all of them again.
    """
    before: str | None = None
    for video in videos:
        was = at(video.source.uri)
        before = was if before is None else before
        yield video
    if before is not None:
        back_at(before)


# Running a stage -----------------------------------------------------------------------------------


def run_stage(stage: Stage, videos: list[Video]) -> list[Video]:
    """Run a stage on one unit; a video it fails on becomes an error and the others go on.

    The unit is tried whole (models batch across its videos), then, if that fails, video by video; a stage
    that writes one file for the unit is only ever tried whole. What may be the moment's fault is tried TRIES
    times. Raises WorkerFault and StoreError, which are no video's fault.
    """
    good = [v for v in videos if v.error is None]
    if not good:
        return videos
    start = time.perf_counter()
    try:
        _call(stage, good)
    except (StoreError, WorkerFault):
        raise
    except (Exception, SystemExit) as e:
        if getattr(stage, "whole_unit", False):
            raise WorkerFault(f"stage '{stage.name}' failed on a whole unit: {sentence(e)}") from e
        if len(good) == 1:
            fail(good[0], stage.name, e)
        else:
            for v in each(good):
                run_stage(stage, [v])
            return videos
    spent = time.perf_counter() - start
    for v in good:
        for name in getattr(stage, "lets_go", ()) if v.frames is not None else ():
            setattr(v.frames, name, [] if name == "samples" else None)
        v.seconds[stage.name] = v.seconds.get(stage.name, 0.0) + spent / len(good)
    return videos


def _call(stage: Stage, videos: list[Video]) -> None:
    """Call a stage, patiently; a worker's fault comes out as one, named after the stage."""
    try:
        patiently(lambda: stage(videos))
    except Exception as e:
        if kind_of(e) is WorkerFault and not isinstance(e, WorkerFault):
            raise WorkerFault(f"stage '{stage.name}': {sentence(e)}") from e
        raise


def patiently(call: Callable[[], T]) -> T:
    """What `call` returns; called up to TRIES times, with growing waits, while the moment is at fault.

    For work that may be done again from the start: a stage on its unit, one video inside a whole-unit stage.
    """
    for attempt in range(1, TRIES):
        try:
            return call()
        except Exception as e:
            if kind_of(e) is not TransientFault or getattr(e, "tried", False):
                raise
            time.sleep(BACKOFF_S * 2 ** (attempt - 1))
    return call()


def fail(video: Video, stage: str, e: BaseException) -> None:
    """Turn an exception into the video's error row: one sentence, its kind, the stage, the time.

    The stage is the fault's own where it has one. What was downloaded of it is let go. Raises `e` where it is no
    video's fault.
    """
    from pipeline.sources.fetch import release

    kind = kind_of(e)
    if isinstance(e, Exception) and issubclass(kind, StoreError | WorkerFault):
        raise e
    at = datetime.now(UTC).isoformat(timespec="seconds")
    video.error = Error(getattr(e, "stage", "") or stage, sentence(e), at, kind.kind)
    video.frames = None
    video.clips = []
    release(video.source)
