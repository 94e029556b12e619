"""The stages on Ray Data: the one file that knows it.

Each pool of workers is a `map_batches` over an autoscaling actor pool; an actor holds a `Worker`, whose stages run in
a process of their own, so that actors outlive what kills stages. Actors end when they are killed from outside, when
their node is lost, or when they leave after a fault that is no source's; Ray starts each again and gives it its
unit again. They leave by a signal, as Ray never replaces one that exits (ray #62746).
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from pipeline.faults import StoreError, WorkerFault, how_to_go_on
from pipeline.recipe import Limits
from pipeline.record import Video
from pipeline.run.log import FILE, VERBOSE
from pipeline.run.place import Node, Pool, fit, no_place, place, pools
from pipeline.run.progress import Display, Ledger, Snapshot
from pipeline.run.worker import RunError, StageProcess, Worker
from pipeline.stages import Resources, Stage

SILENCE_S = (
    180.0  # a worker that works says so every few seconds; none heard of for so long: the cluster is lost
)
LOST_S = 60.0  # the ledger does not answer, or the nodes left have no place for the workers, for so long
ANSWER_S = 20.0  # a cluster answers within this


def run_ray(
    stages: list[Stage],
    resources: dict[str, Resources],
    units: list[list[Video]],
    display: Display,
    address: str | None,
    limits: Limits | None = None,
) -> None:
    """Every unit through every stage on Ray Data.

    Raises RunError when the cluster is lost, has no place for the workers, or they fail alike; StoreError.
    """
    with _own_sigterm():
        import ray
        import ray.data

    # a thread of Ray Data's that outlives the run must not start Ray once more
    ray._private.auto_init_hook.enable_auto_connect = False
    connect(address)
    try:
        nodes = cluster_nodes()
        small = {n: replace(r, min_workers=min(r.min_workers, len(units))) for n, r in resources.items()}
        fitted = fit(pools(stages, small), nodes)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_consecutive_actor_init_deaths = 10  # killed from outside while it started
        for name in ("ray", "ray.data"):  # the ledger tells what a person wants to know
            logging.getLogger(name).setLevel(logging.CRITICAL)
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        ledger = (
            ray.remote(Ledger)
            .options(num_cpus=0, max_restarts=-1, max_task_retries=3, scheduling_strategy=here)
            .remote(first=stages[0].name)
        )
        rows = [{"name": u[0].unit, "unit": pickle.dumps(u, protocol=5)} for u in units]
        ds: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 10_000))
        for n, pool in enumerate(fitted):
            r = pool.resources
            ds = ds.map_batches(
                RayWorker,
                fn_constructor_args=(
                    pickle.dumps(pool.stages),
                    limits or Limits(),
                    ledger,
                    n,
                    n == len(fitted) - 1,
                    {k: os.environ[k] for k in (FILE, VERBOSE) if k in os.environ},
                ),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(
                    min_size=r.min_workers,
                    max_size=min(r.max_workers or len(rows), len(rows)),
                    max_tasks_in_flight_per_actor=2,
                ),
                num_cpus=r.cpus,
                num_gpus=r.gpus or None,
            )
        _consume(ds, ledger, display, fitted)
    finally:
        ray.shutdown()


# ---------------------------------------------------------------- the cluster

# A cluster of its own on this machine has no web page, and its workers one thread each. By the environment, not by
# Ray's runtime_env: for that Ray would leave the workers it has started already unused, and start others.
LOCAL: dict[str, Any] = {"include_dashboard": False}
WORKERS = {
    "OMP_NUM_THREADS": "1",
    "RAY_memory_monitor_refresh_ms": "0",
}  # the kernel knows the hungry one better


def connect(address: str | None) -> None:
    """Join the cluster at `address`, or start one here; none: whatever RAY_ADDRESS or an old cluster's file says.

    Raises RunError within half a minute where no cluster answers.
    """
    import ray

    if address not in (None, "local"):
        check_address(address)
    here = address in (None, "local")
    for again in (here, False):  # on a busy machine Ray's own patience may be too short
        try:
            with _quiet(), _own_sigterm(), _environment(WORKERS if here else {}):
                ray.init(
                    address=address or "local",
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **LOCAL if here else {},
                )
            return
        except Exception as e:  # it raises anything, Exception itself too
            ray.shutdown()
            if not again:
                where = "cannot start Ray here" if here else f"no Ray cluster at {address}"
                fix = "run the same command again, or with --runner local" if here else START
                raise RunError(f"{where}: {' '.join(str(e).split())}; {fix}") from e


START = "start one with 'ray start --head', or leave --address out to run on this machine"


def check_address(address: str) -> None:
    """Raises RunError where no cluster answers at an address."""
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address_or_die

        try:
            with _quiet():
                address = canonicalize_bootstrap_address_or_die("auto")
        except Exception as e:  # ConnectionError, ValueError, whatever its discovery meets
            raise RunError(f"--address auto: no Ray cluster is running on this machine; {START}") from e
    found = re.fullmatch(r"(ray://)?(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})", address)
    if not found or not 0 < int(found[3]) < 65536:
        raise RunError(
            f"--address {address}: no address of a cluster; give auto, host:port or ray://host:port"
        )
    try:
        socket.create_connection((found[2].strip("[]"), int(found[3])), timeout=5).close()
    except OSError as e:
        raise RunError(f"no Ray cluster at {address} ({e.strerror or e}); {START}") from e
    if found[1]:
        return  # Ray's client gives up by itself
    # in a process of its own: Ray waits for minutes, and may end the process that asks
    ask = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run([*ask, "--skip-version-check"], capture_output=True, timeout=ANSWER_S)
        answers = done.returncode == 0
    except subprocess.TimeoutExpired:
        answers = False
    if not answers:
        raise RunError(f"no Ray cluster answers at {address}, though something listens there; {START}")


def cluster_nodes() -> list[Node]:
    """The nodes that are there."""
    import ray

    alive = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    return [Node(r.get("CPU", 0.0), int(r.get("GPU", 0))) for r in alive]


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
def _environment(values: dict[str, str]) -> Iterator[None]:
    """With those environment variables where there are none of that name."""
    mine = values.keys() - os.environ.keys()
    os.environ.update({k: values[k] for k in mine})
    try:
        yield
    finally:
        for k in mine:
            del os.environ[k]


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep SIGTERM until the end, then leave it to whom it belongs; a second one is passed on at once.

    While it starts, Ray would have it end the driver on the spot: by a Python handler, and by one of its C++ side.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def keep(signum: int, frame: Any) -> None:
        nonlocal came
        signal.alarm(0)  # Ray's C++ side would abort in three seconds, then passes the signal on to this
        if came and callable(before):
            before(signum, frame)
        came = True

    def set_none(handler: Any) -> None:
        """Ray's Python handler is not set."""

    signal.signal(signal.SIGTERM, keep)
    utils: Any = sys.modules.get("ray._private.utils")
    rays = getattr(utils, "set_sigterm_handler", None)
    if rays:
        utils.set_sigterm_handler = set_none
    try:
        yield
    finally:
        if rays:
            utils.set_sigterm_handler = rays
        signal.signal(signal.SIGTERM, before)
        if came:
            signal.raise_signal(signal.SIGTERM)


# ---------------------------------------------------------------- workers


class RayWorker:
    """A `Worker` as a Ray Data callable: one pickled unit in, what it became out (the last pool sends back nothing)."""

    def __init__(
        self, stages: bytes, limits: Limits, ledger: Any, pool: int, last: bool, log: dict[str, str]
    ):
        import ray

        os.environ.update(log)  # a cluster that was there already does not know where
        self.ledger = RemoteLedger(ledger, ray)
        self.pool = pool
        self.me = str(ray.get_runtime_context().get_actor_id())  # stays when it is restarted
        process = StageProcess(stages, limits)
        process.start()
        self.worker = Worker(process, self.ledger, pool, last)

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa

        name = batch["name"][0].as_py()
        try:
            units = self._run(name, batch["unit"][0].as_buffer())
        except (StoreError, RunError) as e:
            self.ledger.stop(str(e), isinstance(e, StoreError))
            raise
        names, blobs = zip(*units or [(name, b"")], strict=True)
        return pa.table({"name": pa.array(names), "unit": pa.array(blobs, pa.large_binary())})

    def _run(self, name: str, unit: Any) -> list[tuple[str, bytes]]:
        """A unit through the stages; after two faults in a row the actor leaves, to be started anew."""
        while True:
            try:
                return self.worker.run(name, unit)
            except WorkerFault as e:
                times = self.ledger.fault(self.pool, self.me, str(e))
                if why := self.ledger.reason():
                    raise RunError(why) from e
                time.sleep(min(60.0, 2.0 ** (times - 1)))
                if times > 1:
                    os.kill(os.getpid(), signal.SIGKILL)


class RemoteLedger:
    """A Ledger in another process. Counts are not waited for, and a lost ledger stops no worker."""

    def __init__(self, actor: Any, ray: Any):
        self.actor, self.ray = actor, ray
        self.mine: Counter[str] = Counter()  # counts for when the ledger does not answer

    def _ask(self, method: str, *args: Any) -> Any:
        try:
            return self.ray.get(getattr(self.actor, method).remote(*args), timeout=30)
        except (self.ray.exceptions.RayError, TimeoutError):
            return None

    def begin(self, pool: int, unit: str) -> tuple[str, str, int] | None:
        return self._ask("begin", pool, unit)

    def died(self, pool: int, unit: str, stage: str, source: str, how: str) -> int:
        self.mine[source or unit] += 1
        return self._ask("died", pool, unit, stage, source, how) or self.mine[source or unit]

    def fault(self, pool: int, worker: str, why: str) -> int:
        self.mine["fault"] += 1
        return self._ask("fault", pool, worker, why) or self.mine["fault"]

    def end(self, pool: int, unit: str, good: int) -> str | None:
        return self._ask(
            "end", pool, unit, good
        )  # waited for: the next loss must not be charged to this unit

    def reason(self) -> str | None:
        return self._ask("reason")

    def stop(self, why: str, store: bool = False) -> None:
        self._ask("stop", why, store)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: getattr(self.actor, name).remote(*args) and None


# ---------------------------------------------------------------- the driver


def _consume(ds: Any, ledger: Any, display: Display, found: list[Pool]) -> None:
    """Pull the data set through while drawing progress; stop when the run or the cluster cannot go on."""
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
    cluster = Cluster(found)
    answered = time.monotonic()
    while thread.is_alive():
        thread.join(0.5)
        try:
            said: Snapshot = ray.get(ledger.snapshot.remote(), timeout=10)
        except (ray.exceptions.RayError, TimeoutError) as e:
            if time.monotonic() - answered > LOST_S:
                raise RunError(LOST_CLUSTER) from e
            continue
        answered = time.monotonic()
        display.update(said, final=not thread.is_alive())
        if said.fatal:
            thread.join(10)  # the worker that met it raises too, and Ray Data ends in order
            raise StoreError(said.fatal) if said.store else RunError(said.fatal)
        if thread.is_alive():
            cluster.check(said)
    if problem:
        lines = str(problem[0]).strip().splitlines() or [type(problem[0]).__name__]
        raise RunError(how_to_go_on(f"the run stopped: {lines[-1]}")) from problem[0]


LOST_CLUSTER = (
    "the Ray cluster is lost: it does not answer any more; run the same command again, finished work is kept"
)


class Cluster:
    """Watches whether there is a place for the workers, and whether they work."""

    def __init__(self, found: list[Pool]):
        self.found, self.nodes = found, cluster_nodes()
        self.looked = self.placed = time.monotonic()

    def check(self, said: Snapshot) -> None:
        """Raises RunError."""
        now = time.monotonic()
        if now - self.looked > 5:
            self.looked, nodes = now, cluster_nodes()
            if len(nodes) < len(self.nodes):
                lost = len(self.nodes) - len(nodes)
                print(
                    f"{lost} of {len(self.nodes)} nodes of the cluster were lost; their work goes to the others",
                    file=sys.stderr,
                )
            self.nodes = nodes
            demands = [(p.resources.cpus, p.resources.gpus) for p in self.found]  # one worker each will do
            if place(demands, nodes) is not False:
                self.placed = now
            elif now - self.placed > LOST_S:
                raise RunError(
                    f"nodes were lost, and {no_place(self.found, nodes)}; run the same command again when they are "
                    "back, finished work is kept"
                )
        if said.silence > SILENCE_S:
            absent = [str(p) for n, p in enumerate(self.found) if n not in said.pools]
            raise RunError(
                f"no worker was heard of for {SILENCE_S:.0f} s"
                + (f", and none ever of these stages: {'; '.join(absent)}" if absent else "")
                + ": the Ray cluster is lost or has no place for them; run the same command again, finished work "
                "is kept"
            )
