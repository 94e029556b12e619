"""Running the stages: the one file that knows Ray Data.

`curate` lists the sources, leaves out what is committed, groups the rest into units of work and sends
the units through the stages, on Ray Data or in this process; then it decides and packs the shards.

Consecutive CPU stages of equal need share one worker process (a pool), so frames cross processes only
on their way to a GPU and back. A pool is a Ray Data `map_batches` over an autoscaling actor pool.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.decide.rules import check_rules
from pipeline.graph import build
from pipeline.io.store import Store, StoreError
from pipeline.recipe import Recipe
from pipeline.record import Source, Video, clip_schema
from pipeline.run import commit
from pipeline.run.progress import Display, Ledger
from pipeline.sources import listing as sources
from pipeline.stages import Resources, Stage, StageError, fail, produced, run_stage

MAX_DEATHS = 3  # a source on which so many worker processes died becomes an error
SILENCE_S = 1800.0  # no worker heard of for so long: the cluster is lost


class RunError(Exception):
    """The run cannot start or go on; the message is one sentence with the fix."""


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
            run_local(stages, units, display)
        else:
            run_ray(stages, resources, units, display, address)


def _resources(stage: Stage, recipe: Recipe, workers: int | None) -> Resources:
    """The stage's own needs, with what the recipe overrides and the bound of the command line."""
    asked = recipe.resources.get(stage.name)
    r = replace(stage.resources, **(asked.model_dump(exclude_none=True) if asked else {}))
    if workers is not None:
        r = replace(r, max_workers=min(workers, r.max_workers or workers))
    return replace(r, min_workers=min(r.min_workers, r.max_workers or r.min_workers))


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
                        StageError(f"the worker process died {deaths} times in stage '{stage}' here"),
                    )
        for stage in self.stages:
            whole = stage.name in ("cut", "commit")  # these write one file a unit
            for group in [videos] if whole or died is None else [[v] for v in videos]:
                ledger.working(unit, group[0].source.uri, stage.name)
                errors = sum(v.error is not None for v in group)
                start = time.perf_counter()
                run_stage(stage, group) if stage.name != "commit" else stage(group)
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


# ---------------------------------------------------------------- on Ray Data


@dataclass
class Pool:
    """Consecutive stages that share one actor pool."""

    stages: list[Stage]
    resources: Resources


def pools(stages: list[Stage], resources: dict[str, Resources]) -> list[Pool]:
    """Fuse consecutive CPU stages of equal needs; a stage on a GPU has its pool to itself."""
    found: list[Pool] = []
    for stage in stages:
        r = resources[stage.name]
        if found and r.gpus == 0 and found[-1].resources == r:
            found[-1].stages.append(stage)
        else:
            found.append(Pool([stage], r))
    return found


def fit(found: list[Pool], cpus: float, gpus: float) -> list[Pool]:
    """Shrink the pools' shares so that the smallest size of all of them fits the cluster at once.

    Actors that wait for one another's CPUs would hang the run (ray #44687); a tenth is left to Ray's
    own tasks. Raises RunError when a stage asks for a GPU and there is none.
    """
    need_gpu = sum(p.resources.gpus * p.resources.min_workers for p in found)
    if need_gpu > gpus:
        names = ", ".join(s.name for p in found if p.resources.gpus for s in p.stages)
        raise RunError(
            f"stages {names} need {need_gpu:g} GPUs and the cluster has {gpus:g}: lower resources.<stage>.gpus"
        )
    need = sum(p.resources.cpus * p.resources.min_workers for p in found)
    share = min(1.0, 0.9 * cpus / need)
    if len(found) == 1:  # let a lone pool use every CPU all the same
        share = min(share, 0.9)
    return [Pool(p.stages, replace(p.resources, cpus=p.resources.cpus * share)) for p in found]


def run_ray(
    stages: list[Stage],
    resources: dict[str, Resources],
    units: list[list[Video]],
    display: Display,
    address: str | None,
) -> None:
    """Every unit through every stage on Ray Data. Raises RunError when the cluster is lost or a worker fails."""
    import ray
    import ray.data

    try:
        with _quiet():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **LOCAL if address is None else {},
            )
    except (ConnectionError, ray.exceptions.RayError) as e:
        raise RunError(
            f"no Ray cluster at {address}: {' '.join(str(e).split())}; start one with 'ray start --head'"
        ) from e
    try:
        total = ray.cluster_resources()
        fitted = fit(pools(stages, resources), total.get("CPU", 1), total.get("GPU", 0))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        for name in ("ray", "ray.data"):  # the ledger tells what a person wants to know
            logging.getLogger(name).setLevel(logging.CRITICAL)
        ledger = ray.remote(Ledger).options(num_cpus=0, max_restarts=-1).remote()
        rows = [{"unit": pickle.dumps(u, protocol=5)} for u in units]
        ds: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 10_000))
        for pool in fitted:
            r = pool.resources
            ds = ds.map_batches(
                RayWorker,
                fn_constructor_args=(pickle.dumps(pool.stages), ledger, pool is fitted[-1]),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(
                    min_size=min(r.min_workers, len(rows)),
                    max_size=min(r.max_workers or len(rows), len(rows)),
                    max_tasks_in_flight_per_actor=2,
                ),
                num_cpus=r.cpus,
                num_gpus=r.gpus or None,
            )
        _consume(ds, ledger, display)
    finally:
        ray.shutdown()


# A cluster of its own on this machine: one thread a worker, no web page.
LOCAL: dict[str, Any] = {
    "include_dashboard": False,
    "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}},
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Ray's C++ side prints of itself while it starts from the terminal."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class RayWorker:
    """A `Worker` as a Ray Data callable: one pickled unit in, one out (the last pool sends back nothing)."""

    def __init__(self, stages: bytes, ledger: Any, last: bool):
        import ray

        self.last = last
        self.ledger = RemoteLedger(ledger, ray)
        threading.Thread(target=self._beat, daemon=True).start()  # first: a model may take long to load
        self.worker = Worker(pickle.loads(stages))

    def _beat(self) -> None:
        while True:
            self.ledger.alive()
            time.sleep(5)

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa

        try:
            videos = self.worker.run(pickle.loads(batch["unit"][0].as_py()), self.ledger)
        except StoreError as e:
            self.ledger.stop(str(e))
            raise
        blob = b"" if self.last else pickle.dumps(videos, protocol=5)
        return pa.table({"unit": pa.array([blob], pa.large_binary())})


class RemoteLedger:
    """A Ledger in another process. Counts are not waited for, and a lost ledger stops no worker."""

    def __init__(self, actor: Any, ray: Any):
        self.actor, self.ray = actor, ray

    def _ask(self, method: str, *args: Any) -> Any:
        try:
            return self.ray.get(getattr(self.actor, method).remote(*args), timeout=60)
        except (self.ray.exceptions.RayError, TimeoutError):
            return None

    def begin(self, unit: str) -> tuple[str, str, int] | None:
        return self._ask("begin", unit)

    def stop(self, why: str) -> None:
        self._ask("stop", why)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: getattr(self.actor, name).remote(*args) and None


def _consume(ds: Any, ledger: Any, display: Display) -> None:
    """Pull the data set through while drawing progress; stop when no worker has been heard of for long."""
    import ray

    problem: list[BaseException] = []

    def pull() -> None:
        try:
            for _ in ds.iter_batches(batch_size=1, batch_format="pyarrow"):
                pass
        except BaseException as e:
            problem.append(e)

    thread = threading.Thread(target=pull, daemon=True)
    thread.start()
    heard, fatal = time.monotonic(), None
    while thread.is_alive():
        thread.join(0.5)
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            stages, errors, silence, fatal = ray.get(ledger.snapshot.remote(), timeout=10)
            display.update(stages, errors, final=not thread.is_alive())
            heard = time.monotonic() - silence
        if time.monotonic() - heard > SILENCE_S:
            raise RunError(
                f"no worker was heard of for {SILENCE_S:.0f} s: the Ray cluster is lost; run the same command again, "
                "finished work is kept"
            )
    if fatal:
        raise StoreError(fatal)
    if problem:
        lines = str(problem[0]).strip().splitlines() or [type(problem[0]).__name__]
        raise RunError(
            f"the run stopped: {lines[-1]}; run the same command again, finished work is kept"
        ) from problem[0]
