"""What the run has done so far, per stage, and how it is shown.

Workers report to a `Ledger` (in this process, or a Ray actor around one); the driver draws it: live
bars with rates and time left in a terminal, a plain line every few seconds elsewhere.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.faults import counted, how_to_go_on

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class StageCount:
    """Work one stage has finished."""

    sources: int = 0  # that it had work with: none that failed before
    clips: int = 0
    video_s: float = 0.0  # seconds of source video
    busy_s: float = 0.0  # wall seconds of its workers
    failed: int = 0  # sources that became errors in it
    good: int = 0  # sources that are none after it


MAX_DEATHS = 3  # a source on which so many worker processes died becomes an error
BREAKER = (
    5  # a worker that fails so often in a row, or so many sources in a row that cost workers, end the run
)
FIRST = 10  # so many sources that all fail alike in a stage no source has passed end it too
MAX_NEWS = 1000  # deaths told of one by one
EVERY_S = 10.0  # a line on what is done, where there is no terminal
NAME = 30  # letters of a source's name in it
WIDTH = 120  # of that line, about
LOST = "it was lost: killed from outside, short of memory, or its node went down"


@dataclass
class Ledger:
    """What workers tell: counts per stage, who is in work, how workers ended, and whether the run must end.

    A pool is the number of a set of workers that share their stages, a unit is known by its name.

    Args:
        first: the stage in which sources may fail as they like, e.g. a list of dead links.
    """

    first: str = ""
    stages: dict[str, StageCount] = field(default_factory=dict)
    working: dict[tuple[int, str], tuple[str, str]] = field(default_factory=dict)  # unit → (stage, source)
    deaths: Counter[str] = field(default_factory=Counter)  # source → workers that died on it, in all pools
    costly: dict[tuple[int, str, str], set[str]] = field(default_factory=dict)  # (pool, stage, how) → sources
    faults: Counter[tuple[int, str]] = field(default_factory=Counter)  # worker → faults in a row
    alike: Counter[tuple[str, str]] = field(default_factory=Counter)  # (stage, why) → sources
    pools: set[int] = field(default_factory=set)  # those with a worker
    errors: int = 0
    fatal: str | None = None  # why the whole run must end
    store: bool = False  # … as the output is at fault
    beat: float = field(default_factory=time.monotonic)
    news: list[str] = field(default_factory=list)  # how workers died, a line each
    shown: Callable[[Snapshot], None] | None = None  # gets a snapshot whenever a worker tells something

    def hello(self, pool: int) -> None:
        """A worker of that pool is there."""
        self.pools.add(pool)
        self.alive()

    def alive(self) -> None:
        """A worker is in work and within its time limits."""
        self.beat = time.monotonic()
        if self.shown:
            self.shown(self.snapshot())

    def begin(self, pool: int, unit: str) -> tuple[str, str, int] | None:
        """A worker takes a unit up. Where an earlier one was lost on it: (stage, source, deaths on that so far)."""
        self.alive()
        lost = self.working.get((pool, unit))
        self.working[pool, unit] = ("", "")
        if lost is None:
            return None
        stage, source = lost
        self.deaths[source or unit] += 1
        times = self.deaths[source or unit]
        self._tell(stage, source or unit, LOST, times)
        if times >= MAX_DEATHS:  # before that it may be the node's fault, that took many at once
            self._costs(pool, stage, LOST, source or unit)
        return stage, source, times

    def at(self, pool: int, unit: str, stage: str, source: str) -> None:
        """That source is in work now; '': several are."""
        self.alive()
        if (pool, unit) in self.working:
            self.working[pool, unit] = (stage, source)

    def died(self, pool: int, unit: str, stage: str, source: str, how: str) -> int:
        """A stage process died; returns how many have died on that source."""
        self.alive()
        self.deaths[source or unit] += 1
        self._tell(stage, source or unit, how, self.deaths[source or unit])
        self._costs(pool, stage, how, source or unit)
        return self.deaths[source or unit]

    def _tell(self, stage: str, source: str, how: str, times: int) -> None:
        if len(self.news) < MAX_NEWS:
            again = f" (death {times} there)" if times > 1 else ""
            self.news.append(f"a worker died at {_at(stage, source)}{again}: {how}")
        if self.shown:
            self.shown(self.snapshot())

    def _costs(self, pool: int, stage: str, how: str, source: str) -> None:
        costly = self.costly.setdefault((pool, stage, how), set())
        costly.add(source)
        if len(costly) >= BREAKER:
            self.stop(
                f"workers ended alike on {len(costly)} sources in a row in stage '{stage}': {how}; that is hardly the "
                "sources' fault: mend it, then run the same command again with --retry-errors"
            )

    def fault(self, pool: int, worker: str, why: str) -> int:
        """A worker cannot go on, by no source's fault; returns how often in a row, no unit finished in between."""
        self.alive()
        self.faults[pool, worker] += 1
        times = self.faults[pool, worker]
        if times >= BREAKER:
            self.stop(how_to_go_on(f"{why} ({times} times in a row)"))
        return times

    def done(
        self,
        pool: int,
        stage: str,
        sources: int,
        clips: int,
        video_s: float,
        busy_s: float,
        errors: list[str],
        good: int,
    ) -> None:
        """A stage is through with a unit; `errors`: the sentences of the new ones, `good`: sources that are none."""
        self.alive()
        count = self.stages.setdefault(stage, StageCount())
        count.sources += sources
        count.clips += clips
        count.video_s += video_s
        count.busy_s += busy_s
        count.failed += len(errors)
        count.good += good
        self.errors += len(errors)
        for error in errors:
            why = "".join("#" if c.isdigit() else c for c in error.partition(": ")[2] or error)
            self.alike[stage, why] += 1
            if "(limits." in error:
                self._costs(pool, stage, why, error)
            if stage != self.first and self.alike[stage, why] >= FIRST and not count.good:
                self.stop(
                    f"the first {self.alike[stage, why]} sources failed alike in stage '{stage}', the last with: "
                    f"{error}; mend that, then run the same command again with --retry-errors"
                )

    def end(self, pool: int, unit: str, good: int) -> str | None:
        """The unit leaves the pool, `good` of its sources without error; returns why the run must end."""
        self.alive()
        self.working.pop((pool, unit), None)
        if good:
            for mine in [k for k in self.faults if k[0] == pool]:
                del self.faults[mine]
            for key in [k for k in self.costly if k[0] == pool]:
                del self.costly[key]
        return self.fatal

    def reason(self) -> str | None:
        """Why the run must end."""
        return self.fatal

    def stop(self, why: str, store: bool = False) -> None:
        """The run must end; the first reason stands."""
        if self.fatal is None:
            self.fatal, self.store = why, store

    def snapshot(self) -> Snapshot:
        return Snapshot(
            self.stages,
            self.errors,
            time.monotonic() - self.beat,
            self.fatal,
            self.store,
            self.pools,
            list(self.working.values()),
            self.news,
        )


@dataclass
class Snapshot:
    stages: dict[str, StageCount]
    errors: int
    silence: float  # seconds since a worker was last heard of
    fatal: str | None
    store: bool
    pools: set[int]
    working: list[tuple[str, str]]  # (stage, source) of each unit in work
    news: list[str]


class Display:
    """Draws a ledger's snapshots; a context manager."""

    def __init__(self, stages: list[str], total: int, every_s: float | None = None):
        self.names, self.total = stages, total
        self.every_s = EVERY_S if every_s is None else every_s
        self.start = self.last_line = time.monotonic()
        self.finished = self.news = 0  # sources at the last line; news told
        self.live = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(stderr=True), refresh_per_second=4, transient=False)

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            self.live.stop()

    def update(self, said: Snapshot, final: bool = False) -> None:
        """Draw it, where it is time for that."""
        elapsed = max(time.monotonic() - self.start, 1e-3)
        for line in said.news[self.news :]:
            print(line, file=sys.stderr, flush=True)  # above the live bars, where these are
        self.news = len(said.news)
        if self.live:
            self.live.update(self._table(said.stages, said.errors, elapsed), refresh=final)
        elif final or time.monotonic() - self.last_line >= self.every_s:
            self.last_line = time.monotonic()
            print(self._line(said, elapsed), file=sys.stderr, flush=True)
            self.finished = said.stages.get(self.names[-1], StageCount()).sources

    def _expected(self, stages: dict[str, StageCount]) -> dict[str, int]:
        """Of each stage the sources it gets: all but those that failed before; the last writes these down too."""
        found, left = {}, self.total
        for name in self.names:
            found[name] = max(left, 0)
            left -= stages.get(name, StageCount()).failed
        return found | {self.names[-1]: self.total}

    def _eta(self, stages: dict[str, StageCount], elapsed: float) -> str:
        """Time left: mean progress over the stages, run forward at the rate so far; '' before a source is done."""
        if not stages.get(self.names[-1], StageCount()).sources:
            return ""
        expected = self._expected(stages)
        done = sum(s.sources for n, s in stages.items() if n in expected)
        fraction = min(1.0, done / max(sum(expected.values()), 1))
        return f"{_clock(elapsed * (1 - fraction) / fraction)} left"

    def _line(self, said: Snapshot, elapsed: float) -> str:
        """'[0:10] 1/6 sources, 1 clip, 0 errors, 0.8× real time, 0:34 left (scores 2)', about WIDTH long."""
        last = said.stages.get(self.names[-1], StageCount())
        parts = [
            f"{last.sources}/{self.total} sources",
            counted(last.clips, "clip"),
            counted(said.errors, "error"),
        ]
        if left := self._eta(said.stages, elapsed):
            parts += [f"{last.video_s / elapsed:.1f}× real time", left]
        line = f"[{_clock(elapsed)}] {', '.join(parts)}"
        if last.sources >= self.total:
            return line
        still = f"; {self._still(said, WIDTH - len(line))}" if self.finished == last.sources else ""
        room = WIDTH - len(line) - len(still) - len(" ()")
        shown: list[str] = []
        for part in self._under_way(said.stages):
            if len(", ".join([*shown, part])) > room:
                break
            shown.append(part)
        return line + (f" ({', '.join(shown)})" if shown else "") + still

    def _under_way(self, stages: dict[str, StageCount]) -> list[str]:
        """'cut 3': how far sources have come that are not finished; of stages that as many have passed the last."""
        expected = self._expected(stages)
        finished = stages.get(self.names[-1], StageCount()).sources
        passed: dict[int, str] = {}
        for name in self.names[:-1]:
            n = stages.get(name, StageCount()).sources
            if n and n != finished and (n < expected[name] or not finished):
                passed[n] = name
        return [f"{name} {n:,}" for n, name in passed.items()]

    def _still(self, said: Snapshot, room: int) -> str:
        """What is in work, where no source was finished since the last line: two sources, one where these are long."""
        found = [_at(stage, source) for stage, source in said.working if stage]
        if not found:
            return "loading models" if said.working or not said.stages else "still at work"
        n = 2 if len("; still at  and 99 more") + len("; ".join(found[:2])) <= room else 1
        return f"still at {'; '.join(found[:n])}" + (f" and {len(found) - n} more" if found[n:] else "")

    def _table(self, stages: dict[str, StageCount], errors: int, elapsed: float) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        left, expected = self._eta(stages, elapsed), self._expected(stages)
        told = [f"{_clock(elapsed)} elapsed", *filter(None, [left]), counted(errors, "error")]
        title = " · ".join(told)
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
        for column in ("stage", "", "sources", "clips", "sources/s", "× real time", "busy s"):
            table.add_column(column, justify="left" if column in ("stage", "") else "right")
        for name in self.names:
            s = stages.get(name, StageCount())
            table.add_row(
                name,
                ProgressBar(total=max(expected[name], 1), completed=s.sources, width=24),
                f"{s.sources}/{expected[name]}",
                str(s.clips),
                f"{s.sources / elapsed:.2f}",
                f"{s.video_s / elapsed:.1f}",
                f"{s.busy_s:.1f}",
            )
        return table


def _at(stage: str, source: str) -> str:
    """A source and the stage it is in, for a person; signed addresses without what follows '?'."""
    name = source.partition("?")[0].rstrip("/").rpartition("/")[2]
    name = name if len(name) <= NAME else f"{name[: NAME - 1]}…"
    return ", ".join(part for part in (name, stage) if part)


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
