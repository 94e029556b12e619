"""What the run has done so far, per stage, and how it is shown.

Workers report to a `Ledger` (in this process, or a Ray actor around one); the driver draws it: live
bars with rates and time left in a terminal, a plain line every few seconds elsewhere.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class StageCount:
    """Work one stage has finished."""

    sources: int = 0
    clips: int = 0
    video_s: float = 0.0  # seconds of source video
    busy_s: float = 0.0  # wall seconds of its workers


@dataclass
class Ledger:
    """Counts per stage, and which source each unit was at when its worker was last heard of."""

    stages: dict[str, StageCount] = field(default_factory=dict)
    at: dict[str, tuple[str, str]] = field(default_factory=dict)  # unit → (source, stage) in work
    deaths: dict[str, int] = field(default_factory=dict)  # source → workers that died on it
    errors: int = 0
    fatal: str | None = None  # why the whole run must end
    beat: float = field(default_factory=time.monotonic)

    def begin(self, unit: str) -> tuple[str, str, int] | None:
        """A worker takes a unit up. Where an earlier worker died on it: (source, stage, deaths so far)."""
        self.beat = time.monotonic()
        if unit not in self.at:
            self.at[unit] = ("", "")
            return None
        source, stage = self.at[unit]
        self.deaths[source] = self.deaths.get(source, 0) + 1
        return source, stage, self.deaths[source]

    def working(self, unit: str, source: str, stage: str) -> None:
        self.beat = time.monotonic()
        self.at[unit] = (source, stage)

    def alive(self) -> None:
        self.beat = time.monotonic()

    def end(self, unit: str) -> None:
        """The unit leaves its worker pool."""
        self.beat = time.monotonic()
        self.at.pop(unit, None)

    def add(
        self, stage: str, sources: int, clips: int, video_s: float, busy_s: float, errors: int = 0
    ) -> None:
        self.beat = time.monotonic()
        count = self.stages.setdefault(stage, StageCount())
        count.sources += sources
        count.clips += clips
        count.video_s += video_s
        count.busy_s += busy_s
        self.errors += errors

    def stop(self, why: str) -> None:
        """A worker met trouble that is no video's fault."""
        self.fatal = why

    def snapshot(self) -> tuple[dict[str, StageCount], int, float, str | None]:
        """Counts, errors, seconds since a worker was last heard of, and why the run must end."""
        return self.stages, self.errors, time.monotonic() - self.beat, self.fatal


class Display:
    """Draws a ledger's snapshots; a context manager."""

    def __init__(self, stages: list[str], total: int, every_s: float = 10.0):
        self.names, self.total, self.every_s = stages, total, every_s
        self.start = self.last_line = time.monotonic()
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

    def update(self, stages: dict[str, StageCount], errors: int, final: bool = False) -> None:
        elapsed = max(time.monotonic() - self.start, 1e-3)
        if self.live:
            self.live.update(self._table(stages, errors, elapsed), refresh=final)
        elif final or time.monotonic() - self.last_line >= self.every_s:
            self.last_line = time.monotonic()
            print(self._line(stages, errors, elapsed), file=sys.stderr, flush=True)

    def _eta(self, stages: dict[str, StageCount], elapsed: float) -> str:
        """Time left: the mean progress over the stages, run forward at the rate so far."""
        fraction = sum(s.sources for n, s in stages.items() if n in self.names) / max(
            self.total * len(self.names), 1
        )
        return _clock(elapsed * (1 - fraction) / fraction) if fraction > 0 else "–:––"

    def _line(self, stages: dict[str, StageCount], errors: int, elapsed: float) -> str:
        last = stages.get(self.names[-1], StageCount())
        parts = [f"{n} {stages[n].sources}" for n in self.names[:-1] if n in stages]
        return (
            f"[{_clock(elapsed)}] {last.sources}/{self.total} sources, {last.clips} clips, {errors} errors, "
            f"{last.video_s / elapsed:.1f}× real time, {self._eta(stages, elapsed)} left"
            + (f" ({', '.join(parts)})" if parts and last.sources < self.total else "")
        )

    def _table(self, stages: dict[str, StageCount], errors: int, elapsed: float) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        title = f"{_clock(elapsed)} elapsed · {self._eta(stages, elapsed)} left · {errors} errors"
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
        for column in ("stage", "", "sources", "clips", "sources/s", "× real time", "busy s"):
            table.add_column(column, justify="left" if column in ("stage", "") else "right")
        for name in self.names:
            s = stages.get(name, StageCount())
            table.add_row(
                name,
                ProgressBar(total=max(self.total, 1), completed=s.sources, width=24),
                f"{s.sources}/{self.total}",
                str(s.clips),
                f"{s.sources / elapsed:.2f}",
                f"{s.video_s / elapsed:.1f}",
                f"{s.busy_s:.1f}",
            )
        return table


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
