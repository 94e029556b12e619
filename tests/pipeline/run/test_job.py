"""The runner: pools that always fit, no deadlock, dead workers, and trouble that ends a run clearly."""

import pytest

from pipeline.faults import StoreError
from pipeline.io.store import Store
from pipeline.run import commit
from pipeline.run.progress import Display, Ledger, _clock
from pipeline.run.ray import Pool, fit, pools, run_ray
from pipeline.run.worker import RunError, Worker
from pipeline.stages import Resources, produced
from tests.fixtures.toy_stages import Toy, units


def toys(*cpus: float) -> list[Toy]:
    return [Toy(f"s{i}", c) for i, c in enumerate(cpus)]


def needs(stages) -> dict[str, Resources]:
    return {s.name: s.resources for s in stages}


def test_consecutive_cpu_stages_of_equal_need_share_a_pool():
    stages = toys(1, 1, 2, 2, 1)
    assert [[s.name for s in p.stages] for p in pools(stages, needs(stages))] == [
        ["s0", "s1"],
        ["s2", "s3"],
        ["s4"],
    ]


def test_a_gpu_stage_has_its_pool_to_itself():
    stages = toys(1, 1, 1, 1)
    r = needs(stages) | {"s1": Resources(1, gpus=0.5), "s2": Resources(1, gpus=0.5)}
    assert [[s.name for s in p.stages] for p in pools(stages, r)] == [["s0"], ["s1"], ["s2"], ["s3"]]


@pytest.mark.parametrize("cpus", [1, 2, 4, 64])
@pytest.mark.parametrize("shape", [(1,), (1, 2), (1, 2, 1, 2, 1, 2, 1), (8, 1, 16)])
def test_the_smallest_size_of_all_pools_fits_every_machine(cpus, shape):
    fitted = fit(pools(stages := toys(*shape), needs(stages)), cpus, 0)
    assert sum(p.resources.cpus * p.resources.min_workers for p in fitted) <= 0.9 * cpus + 1e-9


def test_a_lone_pool_can_still_use_every_cpu():
    stages = toys(1)
    assert int(4 / fit(pools(stages, needs(stages)), 4, 0)[0].resources.cpus) == 4


def test_a_gpu_that_is_not_there_is_an_error_that_names_the_stage():
    with pytest.raises(RunError, match=r"s0 need 1 GPUs and the cluster has 0"):
        fit([Pool(toys(1), Resources(1, gpus=1))], 2, 0)


def test_a_source_on_which_three_workers_died_becomes_an_error_and_its_unit_goes_on():
    (a,), (b,) = units("a", "b")
    b.unit = a.unit
    ledger = Ledger()
    for _ in range(3):
        ledger.begin(a.unit)
        ledger.working(a.unit, b.source.uri, "toy")
    Worker([Toy()]).run([a, b], ledger)
    assert a.error is None
    assert "died 3 times in stage 'toy'" in b.error.message


def test_deaths_are_counted_for_the_source_that_was_in_work():
    ledger = Ledger()
    assert ledger.begin("u") is None
    ledger.working("u", "/a", "decode")
    assert ledger.begin("u") == ("/a", "decode", 1)
    ledger.working("u", "/b", "cut")
    assert ledger.begin("u") == ("/b", "cut", 1)
    ledger.end("u")
    assert ledger.begin("u") is None


def test_plain_progress_lines_state_counts_rates_and_time_left(capsys):
    ledger, display = Ledger(), Display(["decode", "commit"], total=4, every_s=0)
    ledger.add("decode", 2, 0, 20.0, 1.0)
    ledger.add("commit", 1, 3, 10.0, 0.1, errors=1)
    display.start -= 5
    with display:
        display.update(ledger.stages, ledger.errors)
    line = capsys.readouterr().err
    assert "[0:05] 1/4 sources, 3 clips, 1 errors, 2.0× real time, 0:08 left (decode 2)" in line


def test_clocks():
    assert [_clock(s) for s in (0, 59.6, 61, 3600, 7325)] == ["0:00", "1:00", "1:01", "1:00:00", "2:02:05"]


def ray_run(tmp_path, stages, names):
    pytest.importorskip("ray")
    store = Store(str(tmp_path))
    stages = [*stages, commit.CommitStage(store.uri, produced(stages))]
    run_ray(stages, needs(stages), units(*names), Display([s.name for s in stages], len(names)), None)
    return {r["source"]: r for n in store.list("videos") for r in store.read_table(n).to_pylist()}


def test_more_pools_than_cpus_do_not_deadlock(tmp_path):
    names = [f"n{i}" for i in range(6)]
    rows = ray_run(tmp_path, toys(1, 2, 1, 2, 1), [*names, "bad"])
    assert {s: r["status"] for s, r in rows.items()} == {f"/{n}": "ok" for n in names} | {"/bad": "error"}


def test_a_source_that_kills_its_worker_is_an_error_row_and_the_others_finish(tmp_path):
    rows = ray_run(tmp_path, [Toy("toy")], ["a", "deadly", "b", "c"])
    assert {s: r["status"] for s, r in rows.items()} == {
        "/a": "ok",
        "/b": "ok",
        "/c": "ok",
        "/deadly": "error",
    }
    assert "died 3 times" in rows["/deadly"]["error"]


def test_a_full_disk_in_a_worker_ends_the_run_with_its_sentence(tmp_path):
    with pytest.raises(StoreError, match="No space left on device; free some space"):
        ray_run(tmp_path, [Toy()], ["diskfull"])
