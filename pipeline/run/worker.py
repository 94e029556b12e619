"""One process's share of the mill: consecutive stages over units of work, and who is to blame when it ends."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from typing import Any

from pipeline.faults import SourceFault
from pipeline.record import Video
from pipeline.run.progress import Display, Ledger
from pipeline.stages import Stage, fail, patiently, run_stage, watched_by

MAX_DEATHS = 3  # a source on which so many worker processes died becomes an error


class RunError(Exception):
    """The run cannot start or go on; the message is one sentence with the fix."""


# ---------------------------------------------------------------- in this process


def run_local(
    stages: list[Stage], units: Iterable[list[Video]], display: Display | None = None
) -> list[Video]:
    """Every unit through every stage, here; returns the finished records (without frames)."""
    worker, ledger, finished = Worker(stages), Ledger(), []
    for unit in units:
        finished += worker.run(unit, ledger)
        if display:
            display.update(ledger.stages, ledger.errors)
    if display:
        display.update(ledger.stages, ledger.errors, final=True)
    return finished


class Worker:
    """One process's share of the mill: a few consecutive stages, set up once."""

    def __init__(self, stages: list[Stage]):
        self.stages = stages
        for stage in stages:
            stage.setup()

    def run(self, videos: list[Video], ledger: Any) -> list[Video]:
        """One unit through the pool's stages.

        Where workers died on this unit before, its videos go one by one, so that the culprit is known,
        and a source that has cost MAX_DEATHS workers becomes an error.
        """
        unit = videos[0].unit
        died = ledger.begin(unit)
        if died is not None:
            source, stage, deaths = died
            for v in videos:
                if v.source.uri == source and deaths >= MAX_DEATHS and v.error is None:
                    fail(
                        v,
                        stage,
                        SourceFault(f"the worker process died {deaths} times in stage '{stage}' here"),
                    )
        for stage in self.stages:
            whole = getattr(stage, "whole_unit", False)
            for group in [videos] if whole or died is None else [[v] for v in videos]:
                ledger.working(unit, group[0].source.uri, stage.name)
                watched_by(partial(_note, ledger, unit, stage.name))
                errors = sum(v.error is not None for v in group)
                start = time.perf_counter()
                if stage.name == "commit":  # it writes the failed ones too
                    patiently(partial(stage, group))
                else:
                    run_stage(stage, group)
                ledger.add(
                    stage.name,
                    len(group),
                    sum(len(v.clips) for v in group),
                    sum(v.duration_s for v in group),
                    time.perf_counter() - start,
                    sum(v.error is not None for v in group) - errors,
                )
        ledger.end(unit)
        return videos


def _note(ledger: Any, unit: str, stage: str, source: str) -> None:
    ledger.working(unit, source, stage)
