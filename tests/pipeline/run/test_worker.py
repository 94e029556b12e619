"""A worker: deaths, hangs and faults in any stage cost the source that is at fault, and nobody else."""

import os
import pickle
import tempfile
import time
from pathlib import Path

import pytest

from pipeline.faults import StoreError, WorkerFault
from pipeline.io.store import Store
from pipeline.recipe import Limits
from pipeline.run import commit
from pipeline.run.child import Worker as Inside
from pipeline.run.progress import MAX_DEATHS, Ledger
from pipeline.run.worker import Blame, RunError, SetupError, StageProcess, Worker, run_local
from pipeline.stages import produced
from pipeline.watch import time_limit
from tests.fixtures.toy_stages import Toy, unit, units


def rows(store: Store) -> dict[str, dict]:
    return {r["source"]: r for n in store.list("videos") for r in store.read_table(n).to_pylist()}


def run(tmp_path, stages, *todo, limits=None) -> dict[str, dict]:
    store = Store(str(tmp_path / "out"))
    run_local([*stages, commit.CommitStage(store.uri, produced(stages))], todo, limits=limits)
    return rows(store)


def through(stages, videos, limits=None) -> dict[str, str]:
    """One unit through stages without a commit; source → its error's stage and sentence, or 'ok'."""
    process = StageProcess(pickle.dumps(stages), limits or Limits())
    try:
        ((_, done),) = Worker(process, Ledger(), last=False).run("u", pickle.dumps(videos))
        done = pickle.loads(done)
    finally:
        process.close()
    return {v.source.uri: f"[{v.error.stage}] {v.error.message}" if v.error else "ok" for v in done}


def statuses(found: dict[str, dict]) -> dict[str, str]:
    return {s: r["status"] for s, r in found.items()}


DEATHS = {
    "deadly": "killed by SIGKILL, perhaps for want of memory",
    "segv": "killed by SIGSEGV",
    "leave": "ended with exit code 0",
}


@pytest.mark.parametrize(
    ("how", "stage"),
    [
        ("deadly", "announces"),
        ("segv", "silent"),
        ("leave", "batch"),
        ("segv", "whole"),
        ("leave", "announces"),
    ],
)
def test_a_source_that_ends_its_process_becomes_an_error_that_says_how_and_its_unit_goes_on(
    tmp_path, how, stage
):
    log = tmp_path / "log"
    toy = Toy("toy", log=log, announces=stage != "silent", batch=stage == "batch", whole=stage == "whole")
    found = run(tmp_path, [Toy("before"), toy], unit("a", f"{how}@toy-x", "b"), unit("c"))
    assert statuses(found) == {"/a": "ok", f"/{how}@toy-x": "error", "/b": "ok", "/c": "ok"}
    row = found[f"/{how}@toy-x"]
    assert row["stage"] == "toy"
    assert DEATHS[how] in row["error"]
    processes = {line.split()[0] for line in log.read_text().splitlines()}
    assert len(processes) == MAX_DEATHS + 1  # three died, one did the rest


def test_each_of_two_culprits_in_two_stages_pays_for_itself(tmp_path):
    found = run(tmp_path, [Toy("s0"), Toy("s1")], unit("segv@s1-x", "a", "leave@s0-y", "b"))
    assert statuses(found) == {"/segv@s1-x": "error", "/a": "ok", "/leave@s0-y": "error", "/b": "ok"}
    assert (found["/segv@s1-x"]["stage"], found["/leave@s0-y"]["stage"]) == ("s1", "s0")


def test_a_death_that_does_not_come_again_costs_no_source(tmp_path):
    (marks := tmp_path / "marks").mkdir()
    found = run(tmp_path, [Toy(once=marks)], unit("deadly-1", "segv-2", "leave-3", "a"))
    assert set(statuses(found).values()) == {"ok"}
    assert len(list(marks.iterdir())) == 3


def test_a_unit_whose_writer_dies_whatever_it_is_given_ends_the_run(tmp_path):
    store = Store(str(tmp_path))
    with pytest.raises(RunError, match="workers die in stage 'commit' on unit unit-a whatever is left out"):
        run_local([Toy(), Killer(store.uri)], [unit("a", "b"), unit("c")])


class Killer:
    """A commit that always dies."""

    name, whole_unit = "commit", True

    def __init__(self, out):
        self.out, self.resources, self.produces = out, Toy().resources, Toy().produces

    def setup(self):
        pass

    def __call__(self, videos):
        os._exit(9)


def test_sys_exit_in_a_stage_is_the_videos_error(tmp_path):
    found = run(tmp_path, [Toy()], unit("exit-x", "a"))
    assert statuses(found) == {"/exit-x": "error", "/a": "ok"}
    assert "SystemExit" in found["/exit-x"]["error"]


FAST = Limits(stall_s=1.0)


def processes(log) -> int:
    return len({line.split()[0] for line in log.read_text().splitlines()})


@pytest.fixture
def log():
    """A file in memory: a busy disk may hold a write up for longer than these limits."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder) / "log"


@pytest.mark.parametrize("announces", [True, False])
def test_python_code_that_hangs_is_interrupted_and_becomes_the_sources_error(log, announces):
    toy = Toy(log=log, announces=announces)
    said = through([toy, Toy("next")], unit("sleep-x", "a", "sleep-y", "b"), FAST)
    why = "[toy] no progress in stage 'toy' for 1 s (limits.stall_s)"
    assert said == {"/sleep-x": why, "/a": "ok", "/sleep-y": why, "/b": "ok"}
    assert processes(log) == 1  # none died of it


@pytest.mark.parametrize("how", ["stuck", "deaf"])
def test_code_that_cannot_be_interrupted_costs_one_process(log, how, monkeypatch):
    monkeypatch.setattr("pipeline.run.worker.GRACE_S", 1.0)
    said = through([Toy(log=log)], unit("a", f"{how}-x", "b"), FAST)
    assert said.pop(f"/{how}-x").endswith(
        "it was killed because it hung: no progress in stage 'toy' for 1 s (limits.stall_s)"
    )
    assert said == {"/a": "ok", "/b": "ok"}
    assert processes(log) == 2


def test_the_time_of_all_stages_counts_against_a_source():
    said = through([Toy(f"s{i}") for i in range(6)], unit("a", "slow-x"), Limits(source_s=1.8))
    assert said.pop("/slow-x").startswith("[s3] more than 1.8 s of work in all its stages (limits.source_s)")
    assert said == {"/a": "ok"}


class LateCommit(commit.CommitStage):
    """A commit that takes longer than what is left of its source's time."""

    def __call__(self, videos):
        time.sleep(0.8)
        return super().__call__(videos)


def test_a_source_whose_time_ends_while_it_is_committed_is_committed(tmp_path):
    toy, store = Toy(), Store(str(tmp_path / "out"))
    run_local(
        [toy, LateCommit(store.uri, produced([toy]))],
        [unit("a"), unit("b", "c")],
        limits=Limits(source_s=0.5),
    )
    assert statuses(rows(store)) == {"/a": "ok", "/b": "ok", "/c": "ok"}


class Limited(Toy):
    """Works within a limit of its own, as a captioner does."""

    def harm(self, name):
        try:
            with time_limit(0.3, "too slow"):
                super().harm(name)
        except Exception as e:
            self.said = str(e)
        if name.startswith("sleep"):
            assert self.said == "too slow"


def test_a_limit_within_a_source_is_an_exception_there_and_no_more():
    said = through([Limited()], unit("sleep-x", "a"), Limits(stall_s=0.2))  # which waits for the inner one
    assert said == {"/sleep-x": "ok", "/a": "ok"}


def test_a_lost_gpu_ends_a_local_run_with_its_sentence_and_keeps_what_is_done(tmp_path):
    store = Store(str(tmp_path / "out"))
    with pytest.raises(RunError, match=r"stage 'toy': RuntimeError: CUDA error.*finished work is kept"):
        run(tmp_path, [Toy()], *units("a", "lostgpu", "b"))
    assert statuses(rows(store)) == {"/a": "ok"}


def test_a_full_output_disk_is_a_store_error(tmp_path):
    with pytest.raises(StoreError, match="No space left on device; free some space"):
        run(tmp_path, [Toy()], *units("diskfull"))


class Unready(Toy):
    def setup(self):
        if self.name == "dies":
            os._exit(3)
        if self.name == "sleeps":
            time.sleep(600)
        raise OSError("the model's file is broken")


def test_a_stage_that_cannot_be_set_up_is_one_sentence(tmp_path):
    with pytest.raises(
        SetupError, match=r"^stage 'toy' cannot be set up: OSError: the model's file is broken at"
    ):
        run(tmp_path, [Unready()], *units("a"))
    with pytest.raises(RunError, match="cannot be set up: its process ended with exit code 3"):
        run(tmp_path, [Unready("dies")], *units("a"))


def test_a_hanging_setup_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.run.worker.GRACE_S", 0.5)
    with pytest.raises(RunError, match=r"cannot be set up: it was killed because it hung: .*limits\.setup_s"):
        run(tmp_path, [Unready("sleeps")], *units("a"), limits=Limits(setup_s=1))


def test_a_library_that_crashes_on_every_source_ends_the_run_after_a_few(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.run.progress.BREAKER", 2)
    with pytest.raises(
        RunError, match=r"2 sources in a row in stage 'toy': its process was killed by SIGSEGV"
    ):
        run(tmp_path, [Toy()], *units(*[f"segv-{i}" for i in range(8)]))
    assert len(rows(Store(str(tmp_path / "out")))) <= 2


def test_culprits_between_good_sources_do_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.run.progress.BREAKER", 2)
    (marks := tmp_path / "marks").mkdir()
    names = [n for i in range(3) for n in (f"segv-{i}", f"good-{i}")]
    assert set(statuses(run(tmp_path, [Toy(once=marks)], *units(*names))).values()) == {"ok"}


def test_a_stage_that_fails_on_the_first_sources_alike_ends_the_run_but_bad_first_stages_do_not(tmp_path):
    names = [f"bug@toy-{i}" for i in range(14)]
    with pytest.raises(
        RunError, match="the first 10 sources failed alike in stage 'toy', the last with: KeyError"
    ):
        run(tmp_path, [Toy("first"), Toy("toy")], *units(*names))
    dead = run(tmp_path / "dead", [Toy("toy"), Toy("later")], *units(*names))
    assert list(statuses(dead).values()) == ["error"] * 14


def test_an_idle_process_that_is_killed_is_replaced_and_nobody_pays(tmp_path):
    process = StageProcess(pickle.dumps([Toy()]), Limits())
    worker = Worker(process, Ledger(), last=False)
    try:
        for name in ("a", "b"):
            ((_, blob),) = worker.run(f"unit-{name}", pickle.dumps(unit(name)))
            (video,) = pickle.loads(blob)
            assert video.error is None
            os.kill(process.pid, 9)
            process._process.wait()
    finally:
        process.close()


def test_a_lost_worker_is_charged_to_the_source_that_was_in_work():
    ledger = Ledger()
    assert ledger.begin(0, "u") is None
    ledger.at(0, "u", "decode", "/a")
    assert ledger.begin(0, "u") == ("decode", "/a", 1)
    ledger.at(0, "u", "cut", "/b")
    assert ledger.begin(0, "u") == ("cut", "/b", 1)
    ledger.end(0, "u", 1)
    assert ledger.begin(0, "u") is None
    assert ledger.begin(1, "u") is None  # another pool's worker on the same unit is none that was lost


@pytest.mark.parametrize("source", ["/b", ""])
def test_a_source_costs_three_workers_at_most_known_or_found_out(source):
    blame = Blame()
    assert blame.charge("toy", source, "x", 1)
    assert blame.alone == (set() if source else {"toy"})
    assert blame.charge("toy", "/b", "x", 1 + bool(source))
    assert blame.verdicts == []
    assert blame.charge("toy", "/b", "x", 2 + bool(source))
    assert [v.source for v in blame.verdicts] == ["/b"]
    assert not blame.charge("toy", "/b", "x", 4)


def test_stages_run_without_any_process_too():
    (done,) = Inside([Toy("s0"), Toy("s1")]).run(unit("a", "bad-x"))
    assert [v.error is None for v in done] == [True, False]


def test_a_worker_fault_is_no_death():
    process = StageProcess(pickle.dumps([Toy()]), Limits())
    try:
        with pytest.raises(WorkerFault, match="CUDA error"):
            Worker(process, Ledger()).run("u", pickle.dumps(unit("lostgpu-x")))
        assert process.pid is None  # the next unit gets a new one
    finally:
        process.close()
