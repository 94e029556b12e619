"""A stage process: consecutive stages over units of work, told and limited from outside.

`Worker` runs the stages. `serve` is the process around it: it takes units from its parent (`pipeline.run.worker`),
tells it at every step which source is in work and how long that may take, and interrupts work that takes longer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from pipeline import watch
from pipeline.faults import (
    Fault,
    OutOfTime,
    SourceFault,
    StoreError,
    TooLong,
    WorkerFault,
    one_line,
    sentence,
)
from pipeline.recipe import Limits, RecipeError
from pipeline.record import Video
from pipeline.run.chunks import UNIT_S, divided
from pipeline.run.log import attach, log
from pipeline.stages import Stage, fail, patiently, run_stage
from pipeline.watch import Watch, watched_by

Tell = Callable[[tuple[Any, ...]], None]

RING_AGAIN_S = 5.0  # work that goes on after its limit is interrupted again so often


@dataclass(frozen=True)
class Verdict:
    """A source that is not to be worked on any more, as it cost too many workers."""

    source: str  # uri; '': every one of the unit
    stage: str
    message: str  # one sentence
    kind: str = "source"  # of pipeline.faults


class Worker:
    """One process's share of the mill: a few consecutive stages, set up once."""

    def __init__(self, stages: list[Stage], watch: Alarm | None = None):
        self.stages, self.watch = stages, watch
        for stage in stages:
            try:
                stage.setup()
            except (RecipeError, StoreError):
                raise  # they say it themselves
            except (Exception, SystemExit) as e:
                raise WorkerFault(f"stage '{stage.name}' cannot be set up: {sentence(e)}") from e

    def run(
        self,
        videos: list[Video],
        verdicts: tuple[Verdict, ...] = (),
        alone: frozenset[str] = frozenset(),
        tell: Tell = lambda message: None,
    ) -> list[list[Video]]:
        """One unit through the pool's stages; returns what it became: itself, or the units of `pipeline.run.chunks`.

        Args:
            verdicts: sources that become errors at once.
            alone: names of stages that take the unit's sources one by one, as a worker died in there and nobody
                knows on which.
            tell: is told of every stage that is done: ('done', part of the unit, stage, sources it had work with,
                clips, seconds of video, seconds of work, sentences of the new errors, sources that are none).
        """
        given_up: set[str] = set()
        for verdict in verdicts:
            for v in videos:
                if v.error is None and verdict.source in ("", v.source.uri):
                    fail(v, verdict.stage, SourceFault(f"{v.source.name}: {verdict.message}"))
                    if v.error is not None:
                        v.error.kind = verdict.kind
                        given_up.add(v.source.uri)
        if self.watch:
            self.watch.spent = {v.source.uri: sum(v.seconds.values()) for v in videos}
        through = partial(self._through, alone=alone, given_up=given_up, tell=tell)
        at = next((n for n, s in enumerate(self.stages) if getattr(s, "divides", 0)), None)
        if at is None:
            through(self.stages, videos, "")
            return [videos]
        before, after, chunk_s = self.stages[: at + 1], self.stages[at + 1 :], self.stages[at].divides  # type: ignore[attr-defined]
        units: list[list[Video]] = []
        for number, group in enumerate(self._groups(before, videos, through)):
            through(before[1:], group, f"{number}")
            for unit in divided(group, videos, chunk_s):
                through(after, unit, unit[0].unit)
                units.append(unit)
        return units

    def _groups(
        self, stages: list[Stage], videos: list[Video], through: Callable[..., None]
    ) -> Iterator[list[Video]]:
        """The unit's sources after the first stage; where that decodes, as many at a time as have UNIT_S seconds."""
        if stages[0].name != "decode":
            through(stages[:1], videos, "")
            yield videos
            return
        group: list[Video] = []
        for n, v in enumerate(videos):
            through(stages[:1], [v], f"decode {n}")
            group.append(v)
            if sum(v.duration_s for v in group) > UNIT_S:
                yield group
                group = []
        if group:
            yield group

    def _through(
        self,
        stages: list[Stage],
        videos: list[Video],
        part: str,
        alone: frozenset[str],
        given_up: set[str],
        tell: Tell,
    ) -> None:
        """Sources through some stages."""
        for stage in stages:
            here = [v for v in videos if _arrives(v, stage, given_up)]
            start = time.perf_counter()
            whole = getattr(stage, "whole_unit", False)
            for group in [[v] for v in videos] if stage.name in alone and not whole else [videos]:
                with self.watch.over(stage.name, group) if self.watch else contextlib.nullcontext():
                    if stage.name == "commit":  # it writes the failed ones too
                        _commit(stage, group)
                    else:
                        _run(stage, group)
            first = [v for v in videos if v.chunk == 0]  # a source counts once
            worked = videos if stage.name == "commit" else here
            tell(
                (
                    "done",
                    part,
                    stage.name,
                    sum(v.chunk == 0 for v in worked),
                    sum(len(v.clips) for v in videos),
                    sum(v.duration_s for v in first),
                    time.perf_counter() - start,
                    [v.error.message for v in here if v.error is not None],
                    sum(v.error is None for v in first),
                )
            )


def _arrives(video: Video, stage: Stage, given_up: set[str]) -> bool:
    """A source that no stage before this one has failed on; in it, as it cost workers, it may have been given up."""
    error = video.error
    return error is None or (error.stage == stage.name and video.source.uri in given_up)


def _run(stage: Stage, group: list[Video]) -> None:
    """`run_stage`; a time limit that is over just between two videos is the next one's."""
    while True:
        try:
            run_stage(stage, group)
            return
        except OutOfTime as e:
            late = next(v for v in group if e.source in ("", v.source.uri))
            fail(late, stage.name, e)


def _commit(stage: Stage, group: list[Video]) -> None:
    try:
        patiently(partial(stage, group))
    except (StoreError, WorkerFault):
        raise
    except Exception as e:
        raise WorkerFault(f"stage '{stage.name}' failed on a whole unit: {sentence(e)}") from e


# ---------------------------------------------------------------- time limits


class Alarm(Watch):
    """Tells who is in work and interrupts what takes too long, in the main thread of this process.

    An interruption is an exception out of SIGALRM; where none can be raised (C code that hangs), the parent, who was
    told how long the work may take, ends the process.

    Args:
        tell: gets ('at', stage, source, seconds the work may take from now on, why no longer).
    """

    def __init__(self, limits: Limits, tell: Tell):
        self.limits, self.tell = limits, tell
        self.on, self.stage, self.source = False, "", ""
        self.spent: dict[str, float] = {}  # of the unit's sources: seconds of work in all stages so far
        self.began = self.moved = 0.0
        self.inner: list[tuple[float, str]] = []  # limits within a source: (end, why)
        self.late: dict[str, OutOfTime] = {}  # sources whose limit in this stage is over
        signal.signal(signal.SIGALRM, self._ring)

    @contextlib.contextmanager
    def over(self, stage: str, group: list[Video]) -> Iterator[None]:
        """Watch a stage's work on a group of sources."""
        self.stage, self.source, self.inner = stage, group[0].source.uri if len(group) == 1 else "", []
        self.late = {}
        self.began = self.moved = time.monotonic()
        self.on = True
        watched_by(self)
        watch.at(self.source)
        self._arm()
        try:
            yield
        finally:
            self.on = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            watched_by(None)
            watch.at("")
            self._account()
            shared = self.spent.pop("", 0.0) / len(group)
            for v in group:
                self.spent[v.source.uri] = self.spent.get(v.source.uri, 0.0) + shared

    def _account(self) -> None:
        now = time.monotonic()
        self.spent[self.source] = self.spent.get(self.source, 0.0) + now - self.began
        self.began = now

    def at(self, source: str) -> None:
        self._account()
        if source in self.late:  # its unit is tried again; it had its time
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise self.late[source]
        self.source, self.moved, self.inner = source, self.began, []
        self._arm()

    def back_at(self, source: str) -> None:
        self.at("" if source in self.late else source)

    def progress(self) -> None:
        now = time.monotonic()
        if now - self.moved > 1.0:
            self.moved = now
            self._arm()

    @contextlib.contextmanager
    def limit(self, seconds: float | None, why: str) -> Iterator[None]:
        if seconds is None or not self.on:
            yield
            return
        mine = (time.monotonic() + seconds, why)
        self.inner.append(mine)
        self.moved = time.monotonic()
        self._arm()
        try:
            yield
        finally:
            if mine in self.inner:
                self.inner.remove(mine)
            self.moved = time.monotonic()
            self._arm()

    def _next(self) -> tuple[float, Fault]:
        """When the first limit ends, and what is raised then."""
        who, limits = self.source, self.limits
        stalled = f"no progress in stage '{self.stage}' for {limits.stall_s:g} s (limits.stall_s)"
        ends: list[tuple[float, Fault]] = [(end, TooLong(why)) for end, why in self.inner]
        if not self.inner:
            ends.append((self.moved + limits.stall_s, OutOfTime(stalled, who)))
        if who and self.stage != "commit":  # what is written by now counts
            late = f"more than {limits.source_s:g} s of work in all its stages (limits.source_s)"
            left = limits.source_s - self.spent.get(who, 0.0)
            ends.append((self.began + left, OutOfTime(late, who)))
        return min(ends, key=lambda end: end[0])

    def _arm(self) -> None:
        end, fault = self._next()
        seconds = max(end - time.monotonic(), 0.05)
        self.tell(("at", self.stage, self.source, seconds, str(fault)))
        signal.setitimer(signal.ITIMER_REAL, seconds, RING_AGAIN_S)

    def _ring(self, *_: object) -> None:
        if self.on:
            end, fault = self._next()
            if time.monotonic() >= end:
                if isinstance(fault, OutOfTime) and fault.source:
                    self.late[fault.source] = fault
                raise fault


# ---------------------------------------------------------------- the process


class _Up(logging.Handler):
    """Sends warnings up to the parent, who has the terminal; the run's file has them already."""

    def __init__(self, tell: Tell):
        super().__init__(logging.WARNING)
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        if threading.current_thread() is threading.main_thread():  # the pipe is its alone
            self.tell(("said", record.levelno, str(record.msg), record.getMessage()))


def serve(fd: int, parent: int) -> None:
    """The process's whole life: set the stages up, then unit after unit, until the parent goes away.

    The parent sends the pickled stages and the limits, then for each unit (verdicts, alone, last) and the pickled
    videos; it is sent tuples: ('ready',), ('at', …) of `Alarm`, ('done', …) of `Worker.run`, ('said', level,
    kind, text) for a warning, ('units', sources that are no errors, names) and the pickled videos of each unit that
    comes back, and where it cannot go on, ('fault', kind, sentence).
    """
    from pipeline.io.isolate import die_with, watch_for_hang_up

    pipe = Connection(fd)
    die_with(parent)
    for stop in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: they are the parent's to handle
        signal.signal(stop, signal.SIG_IGN)
    threading.Thread(target=watch_for_hang_up, args=(fd,), daemon=True).start()
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")  # when memory runs out, this process goes first, not the one that knows about it
    attach()
    log.addHandler(_Up(pipe.send))
    # what code of stages prints to stdout is no output of the run
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _serve(pipe)
    sys.stderr.flush()
    os._exit(0)  # threads that libraries have started may not survive the interpreter's end


def _serve(pipe: Connection) -> None:
    try:
        limits = pickle.loads(pipe.recv_bytes())
        worker = Worker(pickle.loads(pipe.recv_bytes()), Alarm(limits, pipe.send))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except (Exception, SystemExit) as e:
        pipe.send(("broken", one_line(e) if isinstance(e, RecipeError) else sentence(e)))
        return
    pipe.send(("ready",))
    while True:
        verdicts, alone, last = pipe.recv()
        videos = pickle.loads(pipe.recv_bytes())
        try:
            found = worker.run(videos, verdicts, alone, pipe.send)
        except Fault as e:
            pipe.send(("fault", e.kind, sentence(e)))
            return
        except Exception as e:
            pipe.send(("fault", "bug", sentence(e)))
            return
        del videos
        good = sum(v.error is None for unit in found for v in unit)
        found = [] if last else found[::-1]
        pipe.send(("units", good, [unit[0].unit for unit in reversed(found)]))
        while found:
            pipe.send_bytes(pickle.dumps(found.pop(), protocol=5))
