"""What `curate` does.

It lists the sources, leaves out what is committed, groups the rest into units of work and sends the units
through the stages, on Ray Data or in this process; then it decides and packs the shards, and tells what came out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.caption import answers
from pipeline.decide.columns import META, check_listed, listed_asked, no_number, number_in
from pipeline.faults import WorkerFault, counted
from pipeline.graph import build, check
from pipeline.io.store import Store, below
from pipeline.layers import Layered
from pipeline.recipe import Recipe
from pipeline.record import Source, Video
from pipeline.run import commit, identity, layering, needs, relabel, resume, weights
from pipeline.run.log import TOLD, log, logging_to, without_secrets
from pipeline.run.outcome import Outcome, outcome
from pipeline.run.progress import Display
from pipeline.run.ray import run_ray
from pipeline.run.worker import RunError, run_local
from pipeline.sources import listing as sources
from pipeline.sources import youtube
from pipeline.stages import Resources, Stage, produced

TRANSIENT = ("transient",)


class RunEnded(RunError):
    """The workers or the cluster ended the run, or it could not start there; what is done is kept."""


@dataclass(frozen=True)
class Job:
    """How a recipe is run, and what of a finished run is done again."""

    runner: str = "ray"  # 'ray' (Ray Data, here or at `address`) or 'local' (this process, no Ray)
    address: str | None = None  # a Ray cluster ('auto', 'host:port', 'ray://…'); none starts one here
    workers: int | None = None  # upper bound on the workers of each pool
    retry_errors: bool = False  # failed sources, and the captions of clips on which a captioner failed
    redo_changed: bool = False  # sources whose bytes are no longer those that were measured
    refresh_metadata: bool = False  # take over what the list says now
    prune: bool = False  # forget sources that are no longer in the list
    asked: Sequence[str] = ()  # `--set` items of the command; they win over what `clipmill shard` has set
    command: str = ""  # as typed, for run.json and for advice
    verbose: bool = False  # the log on the terminal too
    columns: Mapping[str, str] = field(default_factory=dict)  # of lists, what to call some: theirs → ours


def curate(args: list[str], recipe: Recipe, out: str, job: Job = Job()) -> Outcome:
    """Raw videos to captioned shards in `out`; run again after any interruption to finish.

    Args:
        args: the SOURCE arguments, see `pipeline.sources.listing`.

    Tells on stderr what is found at the start, on stdout what came out; run.json holds both recipe and outcome.
    Raises RunError, RunEnded, StoreError, or sources.SourceError.
    """
    from pipeline.report import page as report
    from pipeline.shards import media, pack

    store = Store(out)
    started = datetime.now(UTC)
    listed = identity.dated(sources.list_sources(args, columns=dict(job.columns)))
    youtube.check(listed)
    with store.lock():
        asked = recipe
        run, recipe = _open(store, recipe, listed, started, job)
        with logging_to(store, job.verbose) as log_name:
            log.info("%s; recipe %s, %d sources", job.command or "curate", recipe.name, len(listed))
            for line in resume.told(recipe, asked, store.uri):
                _say(line)
            media.check(store)
            answered = answers.stored(store)
            units = _left_to_do(store, listed, recipe, job)
            before = commit.units(store)
            if units or job.retry_errors:
                _same_weights(store, run, recipe)
            try:
                if job.retry_errors:
                    _retry(store, recipe, listed, job)
                if units:
                    _process(units, recipe, store, job)
                    commit.sweep_uncommitted(store)
            finally:
                _log_errors(store, before)
            if units:
                run["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
                spent = (datetime.now(UTC) - started).total_seconds()
                run["wall_s"] = round(run.get("wall_s", 0.0) + spent, 3)
                _write_run(store, run)
            pack.shard(store, recipe)
            report.write(store)
            found = outcome(store, {s.uri for s in listed}, answered, before)
            _write_run(store, pack.read_run(store) | {"outcome": found.plain()})
            _tell(found, store, job, out, log_name)
    return found


def caption(out: str, recipe: Recipe | None, job: Job = Job()) -> Outcome:
    """Add what `recipe` names and the finished run in `out` lacks, as layers over it; its shards and report follow.

    Thresholds and the choice in force stay, but for what `job.asked` sets. Raises as `curate`, and RecipeError.

    Args:
        recipe: none: the run's own with what `job.asked` sets, and all that layers have added.
    """
    from pipeline.decide.rules import check_rules
    from pipeline.report import page as report
    from pipeline.shards import media, pack

    store = Store(out)
    run = pack.read_run(store)
    with store.lock(), logging_to(store, job.verbose) as log_name:
        log.info("%s", job.command or "caption")
        media.check(store)
        commit.sweep_uncommitted(store)
        clips = Layered(store)
        answered = answers.stored(store)
        own = resume.decided(run, [], out)
        recipe = recipe or layering.all_of(run, job.asked, clips.layers, out)
        recipe = layering.with_judges(recipe, own, clips.layers)
        if job.retry_errors:
            recipe = layering.with_fused(recipe, own, clips.layers)
        built = check(recipe, store)
        needs.check_models(recipe)
        layering.check(built, own, clips)
        weights.check(built, run.get("contents", {}), clips, out)
        if asked := listed_asked(resume.decided(run, job.asked, out).decide.rules):
            check_listed(asked, clips.meta_keys())
        added = layering.additional(built)
        again = _again(store, own, recipe, added, {}, job) if job.retry_errors else set()
        over = _layer_names(clips) if job.retry_errors else set()
        wanted = layering.missing(clips, added, over, also=again)
        if wanted:
            _say(f"to add: {_on_clips(wanted)}")
            _add(store, recipe, added, wanted, {}, job)
            for name, ids in layering.missing(Layered(store), added).items():
                _say(
                    f"{name} said nothing of {counted(len(ids), 'clip')}: see {log_name}; the same command tries again"
                )
        elif not again:
            _say("nothing to add: the run has all that this recipe names")
        layering.agree(store)
        in_force = resume.decided(run, job.asked, out)
        check_rules(in_force.decide.rules, Layered(store).schema())
        pack.shard(store, in_force)
        report.write(store)
        found = outcome(store, answered=answered)
        _write_run(store, pack.read_run(store) | {"outcome": found.plain()})
        if not found.caption_errors.keys() <= {s.name.removeprefix("caption:") for s in added}:
            job = replace(
                job, command=f"clipmill caption {shlex.quote(out)}"
            )  # what it did not name failed too
        _tell(found, store, job, out, log_name, sources=False)
    return found


def _tell(found: Outcome, store: Store, job: Job, out: str, log_name: str, sources: bool = True) -> None:
    """What came out, on stdout and in the log.

    Args:
        sources: the command tries them again too.
    """
    folder = out if store.local else store.uri
    where = {"report": below(folder, "report.html"), "log": below(folder, log_name)}
    if found.kept:
        where = {"shards": f"{below(folder, 'shards')} ({counted(found.tars, 'tar')})"} | where
    for line in found.lines(job.command, where, sources, folder):
        print(line)
        log.info("%s", line, extra=TOLD)


def _say(line: str) -> None:
    """A line for a person, before or after the display."""
    log.info("%s", line, extra=TOLD)
    print(line, file=sys.stderr)


def _left_to_do(store: Store, listed: list[Source], recipe: Recipe, job: Job) -> list[list[Video]]:
    """Bring the record in line with the list, and give what is still to be measured."""
    known = commit.known_sources(store)
    here = {s.uri for s in listed}
    again = [uri for uri in commit.failed(known, None if job.retry_errors else TRANSIENT) if uri in here]
    mended = commit.mended(known, {s.uri: s.problem for s in listed})
    if again:
        failed = "failed" if job.retry_errors else "the moment failed"
        _say(f"tried again: {counted(len(again), 'source')} that {failed}")
    if mended:
        _say(f"{counted(len(mended), 'error')} of listing mended or gone")
    commit.drop(store, {*again, *mended}, known)
    for uri in {*again, *mended}:
        del known[uri]
    found = identity.compare(listed, known)
    lines, done = identity.apply(
        store,
        found,
        listed,
        known,
        redo_changed=job.redo_changed,
        refresh_metadata=job.refresh_metadata,
        prune=job.prune,
    )
    for line in lines:
        _say(line)
    commit.sweep_uncommitted(store)
    many = any(getattr(s, "batch", 1) > 1 for s in build(recipe, store))
    units = _units(identity.untaken(listed, known, found, done), done, commit.units(store), many)
    commit.take_up_chunks(store, units)
    todo = sum(map(len, units))
    if todo < len(listed):
        _say(f"{len(listed) - todo:,} of {len(listed):,} sources are done already")
    return units


def _same_weights(store: Store, run: dict[str, Any], recipe: Recipe) -> None:
    """Raises RecipeError where the run began with other weights; of one that begins, these are noted."""
    stages = build(recipe, store)
    clips = Layered(store)
    if not clips.files:
        run["contents"] = weights.of_stages(stages)
        _write_run(store, run)
        return
    weights.check(stages, run.get("contents", {}), clips, store.uri)


def _retry(store: Store, recipe: Recipe, listed: list[Source], job: Job) -> None:
    """Captioners that failed on clips of finished sources have another look at these, in layers too."""
    known = {s.uri: s for s in listed}
    clips = Layered(store)
    built = layering.additional(build(recipe, store))
    again = _again(store, recipe, recipe, built, known, job)
    over = layering.retried(clips, again)
    if not over:
        return
    recipe = layering.with_judges(layering.with_layers(recipe, over), recipe, over)
    added = layering.additional(build(recipe, store))
    weights.check(added, {}, clips, store.uri)
    wanted = layering.missing(clips, added, _layer_names(clips), lacking=False, also=again)
    if wanted:
        _say(f"tried again, in layers: {_on_clips(wanted)}")
        _add(store, recipe, added, wanted, known, job)
    layering.agree(store)


def _again(
    store: Store, own: Recipe, recipe: Recipe, some: Sequence[Stage], known: Mapping[str, Source], job: Job
) -> set[str]:
    """Do again what failed of what `curate` itself wrote; gives the clips.

    Args:
        own: the run's.
        recipe: `some` are stages of.
        known: sources by uri.
    """
    over = _layer_names(Layered(store))
    mine = layering.of_run(some, own, over)
    bare = Layered(store, ())
    wanted = layering.missing(bare, mine, {s.name for s in mine}, lacking=False)
    if not wanted:
        return set()
    _say(f"tried again, from the clips: {_on_clips(wanted)}")
    last = relabel.RewriteStage(store, wanted)
    units = layering.units(bare, wanted, known)
    _run(layering.stages(store, recipe, mine, wanted, last, layered=False), units, recipe, job)
    return set().union(*wanted.values())


def _add(
    store: Store,
    recipe: Recipe,
    added: Sequence[Stage],
    wanted: layering.Wanted,
    known: Mapping[str, Source],
    job: Job,
) -> None:
    """Write what stages have to say of their clips into layers."""
    clips = Layered(store)
    versions = resume.read(store) or {}
    over = layering.noted(store, clips, added, wanted, versions.get("versions", {}) | _versions())
    units = layering.units(clips, wanted, known)
    last = layering.LayerStage(store, over, wanted)
    try:
        _run(layering.stages(store, recipe, added, wanted, last), units, recipe, job)
    except (RunError, WorkerFault):  # a server that nobody started, a model that it has not
        layering.drop_empty(store, over)
        raise
    store.sweep()


def _layer_names(clips: Layered) -> set[str]:
    return {layer.name for layer in clips.layers}


def _on_clips(wanted: layering.Wanted) -> str:
    return ", ".join(f"{name} on {counted(len(ids), 'clip')}" for name, ids in wanted.items())


def _log_errors(store: Store, before: set[str]) -> None:
    """A line in the log for every source that failed in this run, in units that are new."""
    columns = ["source", "status", "error", "error_kind", "stage"]
    new = sorted(f"videos/{unit}.parquet" for unit in commit.units(store) - before)
    for _, table in commit.tables(store, new, columns):
        for row in table.to_pylist():
            if row["status"] != "ok":
                log.info(
                    "[%s] error (%s) in %s: %s", *(row[c] for c in ("source", "error_kind", "stage", "error"))
                )


def _open(
    store: Store, recipe: Recipe, listed: list[Source], started: datetime, job: Job
) -> tuple[dict[str, Any], Recipe]:
    """run.json of this output, new or from the run that is being resumed, and the recipe in force."""
    asked = {"recipe": recipe.model_dump(mode="json", include=set(resume.LATER)), "set": list(job.asked)}
    run = resume.read(store)
    if run is None:
        run = {
            "recipe": {},
            "measure_key": recipe.measure_key(),
            "versions": _versions(),
            "started": started.isoformat(timespec="seconds"),
            "cpus": os.cpu_count(),
        }
    else:
        recipe = resume.in_force(run, recipe, job.asked, store.uri)
    _check_listed(store, recipe, listed)
    run |= {"recipe": recipe.model_dump(mode="json"), "asked": asked, "command": without_secrets(job.command)}
    _write_run(store, run)
    return run, recipe


def _check_listed(store: Store, recipe: Recipe, listed: list[Source]) -> None:
    """Raise RecipeError for a rule on a column that neither the list nor the clips have, or hold no number in."""
    rules = {name: r for name, r in recipe.decide.rules.items() if r.column.startswith(META)}
    if not rules or recipe.stages or any(s.problem and not s.meta for s in listed):
        return  # a stage of the user's own, or what could not be read now, may yet bring some
    metas = [meta for s in listed for meta in (s.meta, *s.interval_meta) if meta]
    asked, keys = listed_asked(rules), {key for meta in metas for key in meta}
    clips = Layered(store)
    if any(column.removeprefix(META) not in keys for column in asked):
        check_listed(asked, keys | clips.meta_keys())
    for name, rule in rules.items() if not clips.files else ():
        values = [text for meta in metas if (text := meta.get(rule.column.removeprefix(META)))]
        if not rule.textual and all(math.isnan(number_in(text)) for text in values):
            raise no_number(name, rule, next(iter(values), ""))


def _write_run(store: Store, run: dict[str, Any]) -> None:
    store.write_bytes("run.json", json.dumps(run, indent=1).encode())


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


def _units(listed: list[Source], done: set[str], committed: set[str], many: bool) -> list[list[Video]]:
    """Fresh records of what is not done, by unit of work.

    Small runs get a unit a source, so that every worker has something to do; large ones few files. Where models take
    many clips at once, short sources go together all the same: a model sees no more than a unit at a time, and a
    server that is asked for one clip idles. The groups are formed over all sources, so an interrupted run and an
    undisturbed one have the same. A unit never takes the name of a committed one: a uri may stand for other content
    than it did then.

    Args:
        many: some stage takes many clips at once.
    """
    few = min(16, max(1, len(listed) // 64))
    most = min(16, max(few, len(listed) // 4)) if many else few
    units = []
    for whole in sources.units(listed, max_sources=most, short=few):
        if group := [s for s in whole if s.uri not in done]:
            name = sources.unit_name(group)
            while name in committed:
                name = hashlib.sha256(name.encode()).hexdigest()[:16]
            units.append([Video(source=s, unit=name) for s in group])
    return units


def _process(units: list[list[Video]], recipe: Recipe, store: Store, job: Job) -> None:
    stages = check(recipe, store)
    _run([*stages, commit.CommitStage(store, produced(stages))], units, recipe, job)


def _run(stages: list[Stage], units: list[list[Video]], recipe: Recipe, job: Job) -> None:
    """Every unit through every stage."""
    resources = {s.name: _resources(s, recipe, job.workers) for s in stages}
    for s in stages:
        s.resources = resources[s.name]
    try:
        with Display([s.name for s in stages], sum(map(len, units))) as display:
            if job.runner == "local":
                run_local(stages, units, display, recipe.limits)
            else:
                run_ray(stages, resources, units, display, job.address, recipe.limits)
    except RunError as e:
        raise RunEnded(str(e)) from e


def _resources(stage: Stage, recipe: Recipe, workers: int | None) -> Resources:
    """The stage's own needs, with what the recipe overrides and the bound of the command line."""
    asked = recipe.resources.get(stage.name)
    r = replace(stage.resources, **(asked.model_dump(exclude_none=True) if asked else {}))
    if workers is not None:
        r = replace(r, max_workers=min(workers, r.max_workers or workers))
    return replace(r, min_workers=min(r.min_workers, r.max_workers or r.min_workers))
