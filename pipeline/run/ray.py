"""The stages on Ray Data: the one file that knows it."""

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
from dataclasses import dataclass, replace
from typing import Any

from pipeline.faults import StoreError
from pipeline.record import Video
from pipeline.run.progress import Display, Ledger
from pipeline.run.worker import RunError, Worker
from pipeline.stages import Resources, Stage

SILENCE_S = 1800.0  # no worker heard of for so long: the cluster is lost


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
        with _quiet(), _own_sigterm():
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


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Leave SIGTERM as it is: while it starts, Ray has it end the driver on the spot."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


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
