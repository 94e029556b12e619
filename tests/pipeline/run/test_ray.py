"""On Ray: no deadlock, dead workers in several pools, lost clusters, and trouble that ends a run clearly."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.faults import StoreError
from pipeline.io.store import Store
from pipeline.recipe import Limits
from pipeline.run import commit
from pipeline.run.progress import Display
from pipeline.run.ray import ANSWER_S, check_address, run_ray
from pipeline.run.worker import RunError
from pipeline.stages import Resources, produced
from tests.fixtures.toy_stages import Toy, unit, units


def ray_run(tmp_path, stages, todo, limits=None):
    pytest.importorskip("ray")
    store = Store(str(tmp_path / "out"))
    stages = [*stages, commit.CommitStage(store.uri, produced(stages))]
    needs: dict[str, Resources] = {s.name: s.resources for s in stages}
    run_ray(stages, needs, todo, Display([s.name for s in stages], len(todo)), None, limits)
    return {r["source"]: r for n in store.list("videos") for r in store.read_table(n).to_pylist()}


def toys(*cpus: float, **more) -> list[Toy]:
    return [Toy(f"s{i}", c, **more) for i, c in enumerate(cpus)]


def test_more_pools_than_cpus_do_not_deadlock(tmp_path):
    names = [f"n{i}" for i in range(6)]
    rows = ray_run(tmp_path, toys(1, 2, 1, 2, 1), units(*names, "bad"))
    assert {s: r["status"] for s, r in rows.items()} == {f"/{n}": "ok" for n in names} | {"/bad": "error"}


def test_culprits_in_any_pool_become_error_rows_and_their_unit_mates_finish(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # a run without --address follows nobody's address
    log = tmp_path / "log"
    stages = toys(1, 2, 1, log=log)
    todo = [
        unit("a", "deadly@s0-x", "b"),
        unit("leave@s1-x", "c"),
        unit("d", "segv@s2-x"),
        unit("sleep@s1-x", "e"),
        unit("f"),
    ]
    rows = ray_run(tmp_path, stages, todo, Limits(stall_s=20))
    assert sorted(s for s, r in rows.items() if r["status"] == "ok") == ["/a", "/b", "/c", "/d", "/e", "/f"]
    bad = {s: f"[{r['stage']}] {r['error']}" for s, r in rows.items() if r["status"] == "error"}
    assert "[s0] deadly@s0-x: the worker process died 3 times" in bad["/deadly@s0-x"]
    assert "[s1] leave@s1-x: the worker process died 3 times" in bad["/leave@s1-x"]
    assert "[s2] segv@s2-x: the worker process died 3 times" in bad["/segv@s2-x"]
    assert "no progress in stage 's1' for 20 s" in bad["/sleep@s1-x"]


def test_a_lost_actor_is_replaced_and_its_unit_is_not_lost(tmp_path):
    (marks := tmp_path / "marks").mkdir()
    rows = ray_run(tmp_path, toys(1, 2, once=marks), units("parent@s0-x", "parent@s1-y", "a"))
    assert {s: r["status"] for s, r in rows.items()} == {
        "/parent@s0-x": "ok",
        "/parent@s1-y": "ok",
        "/a": "ok",
    }
    assert len(list(marks.iterdir())) == 2


def test_a_full_disk_in_a_worker_ends_the_run_with_its_sentence(tmp_path):
    with pytest.raises(StoreError, match="No space left on device; free some space"):
        ray_run(tmp_path, [Toy()], units("diskfull"))


def test_a_gpu_that_stays_lost_ends_the_run_after_a_few_workers_and_a_lost_one_does_not(tmp_path):
    (marks := tmp_path / "marks").mkdir()
    rows = ray_run(tmp_path, toys(1, once=marks), units("lostgpu-x", "a"))
    assert {s: r["status"] for s, r in rows.items()} == {"/lostgpu-x": "ok", "/a": "ok"}
    start = time.monotonic()
    with pytest.raises(RunError, match=r"stage 'toy': RuntimeError: CUDA error.*\(5 times in a row\)"):
        ray_run(tmp_path / "2", [Toy()], units("lostgpu-x"))
    assert time.monotonic() - start < 120


class Unready(Toy):
    def setup(self):
        raise OSError("the model's file is broken")


def test_a_stage_that_cannot_be_set_up_ends_the_run_at_once(tmp_path):
    with pytest.raises(RunError, match=r"^stage 'toy' cannot be set up: OSError: the model's file is broken"):
        ray_run(tmp_path, [Unready()], units("a", "b"))


@pytest.mark.parametrize(
    "address", ["nonsense", "127.0.0.1", "127.0.0.1:99999", "http://x:1", "ray://", "a b:1", ""]
)
def test_an_address_that_is_none_is_one_sentence(address):
    with pytest.raises(RunError, match=r"no address of a cluster; give auto, host:port or ray://host:port"):
        check_address(address)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "no-such-host.invalid:6379"])
def test_an_address_where_nobody_listens_is_one_sentence(address):
    with pytest.raises(RunError, match=f"no Ray cluster at {address}"):
        check_address(address)


def test_something_else_that_listens_there_is_one_sentence_within_half_a_minute(monkeypatch):
    pytest.importorskip("ray")
    assert ANSWER_S + 5 < 30
    monkeypatch.setattr("pipeline.run.ray.ANSWER_S", 5.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        start = time.monotonic()
        with pytest.raises(RunError, match="no Ray cluster answers at"):
            check_address(f"127.0.0.1:{server.getsockname()[1]}")
        assert time.monotonic() - start < 30


def test_the_file_of_a_dead_cluster_is_not_followed(tmp_path):
    pytest.importorskip("ray")
    with_file = Path(f"/tmp/clipmill-ray-{os.getpid()}")  # a socket's path must be short
    with_file.mkdir()
    try:
        (with_file / "ray_current_cluster").write_text("127.0.0.1:1")
        code = "from pipeline.run.ray import connect; import ray; connect(None); print(len(ray.nodes()))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"RAY_TMPDIR": str(with_file)},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.stdout.strip().endswith("1"), done.stderr
    finally:
        subprocess.run(["rm", "-rf", str(with_file)], check=True)
