"""A worker: a stage process, and who is to blame when it ends.

Stages run in a process of their own (`pipeline.run.child`), so that whatever ends it (a signal, `os._exit`, want of
memory, a hang) ends neither the run nor a Ray actor, and its parent knows how it ended and on which source. A
source on which MAX_DEATHS processes died becomes an error row, one that hung at once; the others of its unit go on.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Protocol

from pipeline.faults import StoreError, WorkerFault, how_to_go_on
from pipeline.recipe import Limits
from pipeline.record import Video
from pipeline.run.child import Verdict
from pipeline.run.log import heard
from pipeline.run.progress import LOST, MAX_DEATHS, Display, Ledger
from pipeline.stages import Stage

GRACE_S = 20.0  # after the end of a time limit the process may take so long to raise it; then it is killed
BEAT_S = 5.0  # a worker within its limits says so at least this often

# argv: socket, parent's pid, then the parent's sys.path
_BOOT = "import sys; sys.path[:] = sys.argv[3:]; from pipeline.run.child import serve; serve(*map(int, sys.argv[1:3]))"

# Linux kills a process's children when the thread that started them ends: this one never does
_starter = ThreadPoolExecutor(1)


class RunError(Exception):
    """The run cannot start or go on; the message is one sentence with the fix."""


class SetupError(RunError):
    """A stage cannot be set up."""


class Died(Exception):
    """A stage process ended in the middle of a unit.

    Args:
        source: uri of the one in work; '': several were.
        how: a clause.
        hung: it was killed, as it took too long.
    """

    def __init__(self, stage: str, source: str, how: str, hung: bool):
        super().__init__(how)
        self.stage, self.source, self.how, self.hung = stage, source, how, hung


class Told(Protocol):
    """Who is told what happens: a Ledger, here or elsewhere. See there."""

    def hello(self, pool: int) -> None: ...
    def begin(self, pool: int, unit: str) -> tuple[str, str, int] | None: ...
    def at(self, pool: int, unit: str, stage: str, source: str) -> None: ...
    def alive(self) -> None: ...
    def done(self, pool: int, stage: str, *counts: Any) -> None: ...
    def end(self, pool: int, unit: str, good: int) -> str | None: ...
    def reason(self) -> str | None: ...
    def died(self, pool: int, unit: str, stage: str, source: str, how: str) -> int: ...


class StageProcess:
    """A process with stages in it, started at the first unit (or by `start`) and again after it ended.

    Args:
        stages: pickled.
    """

    def __init__(self, stages: bytes, limits: Limits):
        self.stages, self.limits = stages, limits
        self.ready = False
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._end: weakref.finalize[Any, StageProcess] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def start(self) -> None:
        """Start it, without waiting until its stages are set up."""
        self.close()
        import socket

        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", _BOOT, str(theirs.fileno()), str(os.getpid()), *sys.path]
            self._process = _starter.submit(subprocess.Popen, command, pass_fds=[theirs.fileno()]).result()
        self._pipe = Connection(ours.detach())
        self._end = weakref.finalize(self, _kill, self._process, self._pipe)
        self.deadline, self.late = time.monotonic() + self.limits.setup_s, "(limits.setup_s)"
        self.stage = self.source = ""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._pipe.send_bytes(pickle.dumps(self.limits))
            self._pipe.send_bytes(self.stages)

    def close(self) -> None:
        """Kill it, if there is one."""
        if self._end is not None:
            self._end()
        self._process = self._pipe = self._end = None
        self.ready = False

    def run(
        self,
        unit: Any,
        verdicts: tuple[Verdict, ...],
        alone: frozenset[str],
        last: bool,
        hear: Callable[[tuple[Any, ...]], None],
        beat: Callable[[], None],
    ) -> tuple[int, list[tuple[str, bytes]]]:
        """One unit (bytes-like: pickled videos) through the stages.

        Args:
            verdicts, alone: see `Worker.run`.
            last: nothing comes back.
            hear: gets the messages ('at', …), ('done', …) and ('said', …), see `child.serve`.
            beat: called every few seconds while the process is within its limits.

        Returns how many of its sources are no errors, and the units that it became: name and pickled videos.

        Raises Died, SetupError, RunError (a bug of ours), and what a stage raised that is no video's fault: StoreError,
        WorkerFault. After any of them the next call starts another process.
        """
        if self.pid is None:
            self.start()
        assert self._pipe is not None
        try:
            for again in range(MAX_DEATHS - 1, -1, -1):
                if not self.ready:
                    self._set_up(beat, again)
            self.stage = self.source = ""
            self.deadline, self.late = time.monotonic() + self.limits.stall_s, "(limits.stall_s)"
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # told by _next
                self._pipe.send((verdicts, alone, last))
                self._pipe.send_bytes(unit)
            while True:
                message = self._next(beat)
                if message[0] == "units":
                    return message[1], [(name, self._bytes()) for name in message[2]]
                if message[0] == "fault":
                    raise {"output": StoreError, "worker": WorkerFault}.get(message[1], RunError)(message[2])
                if message[0] == "at":
                    self.stage, self.source, seconds, self.late = message[1:]
                    self.deadline = time.monotonic() + seconds
                hear(message)
        except BaseException:
            self.close()  # also when it is interrupted between request and reply
            raise

    def _set_up(self, beat: Callable[[], None], again: int) -> None:
        """Wait until it is ready. Raises SetupError, and WorkerFault where the process hangs or dies in it.

        Where it dies, another is started `again` times more.
        """
        try:
            while (message := self._next(beat))[0] == "said":
                heard(*message[1:])
            kind, *rest = message
        except Died as e:
            if again and not e.hung:
                self.start()
                return
            raise WorkerFault(f"a worker's stages cannot be set up: {e.how}") from e
        if kind == "broken":
            raise SetupError(rest[0])
        self.ready = True

    def _next(self, beat: Callable[[], None]) -> tuple[Any, ...]:
        """The next message. Raises Died."""
        assert self._pipe is not None
        try:
            while True:
                left = self.deadline + GRACE_S - time.monotonic()
                if self._pipe.poll(max(0.0, min(left, BEAT_S))):
                    return self._pipe.recv()
                if left <= 0:
                    why = f"it was killed because it hung: {self.late}"
                    raise Died(self.stage, self.source, why, hung=True)
                beat()
        except (EOFError, ConnectionResetError) as e:
            raise self._died() from e

    def _bytes(self) -> bytes:
        assert self._pipe is not None
        try:
            return self._pipe.recv_bytes()
        except (EOFError, ConnectionResetError) as e:
            raise self._died() from e

    def _died(self) -> Died:
        from pipeline.io.isolate import cause_of_death

        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)  # the socket closes a moment before the exit status is there
        return Died(self.stage, self.source, cause_of_death(self._process.returncode), hung=False)


def _kill(process: subprocess.Popen[bytes], pipe: Connection) -> None:
    pipe.close()
    process.kill()
    process.wait()


class Worker:
    """Takes units through a stage process, and finds the culprit when that dies.

    Args:
        pool: number of the pool of workers it belongs to.
        last: nothing comes back from that pool.
    """

    def __init__(self, process: StageProcess, ledger: Told, pool: int = 0, last: bool = True):
        self.process, self.ledger, self.pool, self.last = process, ledger, pool, last
        ledger.hello(pool)

    def run(self, name: str, unit: Any) -> list[tuple[str, bytes]]:
        """A unit through the stages, whatever it takes; returns the units that it became (none from the last pool).

        Raises StoreError and RunError, which end the run, and WorkerFault: the unit may go to another worker.
        """
        blame = Blame()
        lost = self.ledger.begin(self.pool, name)
        if lost is not None:
            stage, source, times = lost
            blame.charge(stage, source, LOST, times, "worker")
        told: set[tuple[str, str]] = set()  # part of the unit, stage

        def hear(message: tuple[Any, ...]) -> None:
            kind, *rest = message
            if kind == "at":
                self.ledger.at(self.pool, name, rest[0], rest[1])
            elif kind == "said":
                heard(*rest)
            elif (rest[0], rest[1]) not in told:  # a unit that is done again counts once
                told.add((rest[0], rest[1]))
                self.ledger.done(self.pool, *rest[1:])

        while True:
            try:
                good, units = self.process.run(
                    unit, tuple(blame.verdicts), frozenset(blame.alone), self.last, hear, self.ledger.alive
                )
                if why := self.ledger.end(self.pool, name, good):
                    raise RunError(why)
                return units
            except Died as e:
                times = self.ledger.died(self.pool, name, e.stage, e.source, e.how)
                if why := self.ledger.reason():
                    raise RunError(why) from e
                if not blame.charge(e.stage, e.source, e.how, times, hung=e.hung):
                    self.ledger.end(self.pool, name, 0)
                    raise WorkerFault(
                        f"workers die in stage '{e.stage}' on unit {name} whatever is left out: {e.how}"
                    ) from e
            except WorkerFault:
                self.ledger.end(self.pool, name, 0)
                raise


class Blame:
    """What is known of the deaths on one unit: who is not to be tried again, and where to find out who it is."""

    def __init__(self) -> None:
        self.verdicts: list[Verdict] = []
        self.alone: set[str] = set()  # stages to run source by source
        self.unknown: Counter[str] = Counter()  # deaths in a stage when several sources were in work

    def charge(
        self, stage: str, source: str, how: str, times: int, kind: str = "source", hung: bool = False
    ) -> bool:
        """A worker died, the `times`th one on `source`; False: on one that was given up already."""
        if any(v.source == source for v in self.verdicts):
            return False
        if not source:
            self.unknown[stage] += 1
            self.alone.add(stage)
            times = 0
        times += self.unknown[stage]
        if hung and source:
            self.verdicts.append(Verdict(source, stage, how, kind))
        elif times >= MAX_DEATHS:
            message = f"the worker process died {times} times in stage '{stage}' here: {how}"
            self.verdicts.append(Verdict(source, stage, message, kind))
        return True


# ---------------------------------------------------------------- in one process beside this one


def run_local(
    stages: list[Stage],
    units: Iterable[list[Video]],
    display: Display | None = None,
    limits: Limits | None = None,
) -> None:
    """Every unit through every stage, one after the other, in a process beside this one.

    Raises RunError, StoreError.
    """
    ledger = Ledger(first=stages[0].name, shown=display.update if display else None)
    process = StageProcess(pickle.dumps(stages), limits or Limits())
    worker = Worker(process, ledger)
    try:
        for unit in units:
            worker.run(unit[0].unit, pickle.dumps(unit, protocol=5))
    except WorkerFault as e:
        raise RunError(how_to_go_on(str(e))) from e
    finally:
        process.close()
    if display:
        display.update(ledger.snapshot(), final=True)
