"""Running the stages: the one file that knows Ray Data.

`curate` lists the sources, leaves out what is committed, groups the rest into units of work and sends
the units through the stages, on Ray Data or in this process; then it decides and packs the shards.

Consecutive CPU stages of equal need share one worker process (a pool), so frames cross processes only
on their way to a GPU and back. A pool is a Ray Data `map_batches` over an autoscaling actor pool.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.decide.rules import check_rules
from pipeline.graph import build
from pipeline.io.store import Store
from pipeline.recipe import Recipe
from pipeline.record import Source, Video, clip_schema
from pipeline.run import commit
from pipeline.run.progress import Display
from pipeline.run.ray import run_ray
from pipeline.run.worker import RunError, run_local
from pipeline.sources import listing as sources
from pipeline.stages import Resources, Stage, produced


def curate(
    args: list[str],
    recipe: Recipe,
    out: str,
    *,
    runner: str = "ray",
    address: str | None = None,
    workers: int | None = None,
    retry_errors: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Raw videos to captioned shards in `out`; run again after any interruption to finish.

    Args:
        args: the SOURCE arguments, see `pipeline.sources.listing`.
        runner: 'ray' (Ray Data, here or at `address`) or 'local' (this process, no Ray).
        address: a Ray cluster ('auto', 'host:port', 'ray://…'); none starts one here.
        workers: upper bound on the workers of each pool.
        retry_errors: try sources again that ended in an error.

    Returns the contents of run.json. Raises RunError, StoreError, or sources.SourceError.
    """
    from pipeline.report import page as report
    from pipeline.shards import pack

    store = Store(out)
    started = datetime.now(UTC)
    listed = sources.list_sources(args)
    with store.lock():
        run = _open(store, recipe, started, command)
        if retry_errors:
            commit.forget_errors(store)
        commit.sweep_uncommitted(store)
        units = _units(listed, commit.done_sources(store))
        todo = sum(map(len, units))
        if todo < len(listed):
            print(f"{len(listed) - todo} of {len(listed)} sources are done already", file=sys.stderr)
        if todo:
            _process(units, recipe, store, runner, address, workers)
            run["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
            run["wall_s"] = round(run.get("wall_s", 0.0) + (datetime.now(UTC) - started).total_seconds(), 3)
            store.write_bytes("run.json", json.dumps(run, indent=1).encode())
        pack.shard(store, recipe)
        report.write(store)
    return run


def _open(store: Store, recipe: Recipe, started: datetime, command: str) -> dict[str, Any]:
    """run.json of this output, new or from the run that is being resumed."""
    where = store.uri
    if store.exists("run.json"):
        run = json.loads(store.read_bytes("run.json"))
        if run["measure_key"] != recipe.measure_key():
            raise RunError(
                f"{where} holds a run of another recipe ({run['recipe']['name']}): give another --out, or the same "
                f"recipe and settings; thresholds alone are changed with 'clipmill shard {where}'"
            )
        run["recipe"] = recipe.model_dump(mode="json")
    else:
        if store.list():
            raise RunError(
                f"{where} is not empty and holds no clipmill run: give a new or empty folder as --out"
            )
        run = {
            "recipe": recipe.model_dump(mode="json"),
            "measure_key": recipe.measure_key(),
            "versions": _versions(),
            "started": started.isoformat(timespec="seconds"),
            "cpus": os.cpu_count(),
        }
    run["command"] = command
    store.write_bytes("run.json", json.dumps(run, indent=1).encode())
    return run


def _versions() -> dict[str, str]:
    """What made the run; part of every sample's provenance."""
    from pipeline.io import ffmpeg

    found = {"python": platform.python_version()}
    for name in (
        "clipmill",
        "torch",
        "av",
        "open_clip_torch",
        "transformers",
        "rapidocr",
        "ray",
        "opencv-python-headless",
    ):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    found["ffmpeg"] = ".".join(map(str, ffmpeg.version(ffmpeg.find())))
    return found


def _units(listed: list[Source], done: set[str]) -> list[list[Video]]:
    """Fresh records of what is not done, by unit of work.

    Small runs get a unit a source, so that every worker has something to do; large ones few files. The
    groups are formed over all sources, so an interrupted run and an undisturbed one have the same.
    """
    size = min(16, max(1, len(listed) // 64))
    groups = [[s for s in group if s.uri not in done] for group in sources.units(listed, max_sources=size)]
    return [[Video(source=s, unit=sources.unit_name(group)) for s in group] for group in groups if group]


def _process(
    units: list[list[Video]],
    recipe: Recipe,
    store: Store,
    runner: str,
    address: str | None,
    workers: int | None,
) -> None:
    stages = build(recipe, store.uri)
    columns = produced(stages)
    check_rules(recipe.decide.rules, clip_schema(columns.scores, columns.embeddings))
    stages.append(commit.CommitStage(store.uri, columns))
    resources = {s.name: _resources(s, recipe, workers) for s in stages}
    unknown = set(recipe.resources) - set(resources)
    if unknown:
        raise RunError(
            f"resources.{min(unknown)}: no such stage; stages of this recipe: {', '.join(resources)}"
        )
    with Display([s.name for s in stages], sum(map(len, units))) as display:
        if runner == "local":
            run_local(stages, units, display, recipe.limits)
        else:
            run_ray(stages, resources, units, display, address, recipe.limits)


def _resources(stage: Stage, recipe: Recipe, workers: int | None) -> Resources:
    """The stage's own needs, with what the recipe overrides and the bound of the command line."""
    asked = recipe.resources.get(stage.name)
    r = replace(stage.resources, **(asked.model_dump(exclude_none=True) if asked else {}))
    if workers is not None:
        r = replace(r, max_workers=min(workers, r.max_workers or workers))
    return replace(r, min_workers=min(r.min_workers, r.max_workers or r.min_workers))
