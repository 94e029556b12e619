"""The folder of downloads: within its bounds, and without leftovers."""

import fcntl
import os
import tempfile
import threading
import time
from pathlib import Path

import pytest

from pipeline.faults import SourceFault, WorkerFault
from pipeline.sources import scratch

MB = 1_000_000


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "STEP", MB // 10)
    scratch._sweep_once.cache_clear()
    return scratch.folder()


@pytest.fixture
def three_megabytes(monkeypatch):
    monkeypatch.setenv(scratch.VARIABLE, "0.003")


def fetched(key: str, size: int) -> int:
    """Download so many bytes, use them and let them lie; returns how many downloads it took."""
    times = []

    def fetch(to: Path) -> None:
        times.append(1)
        with scratch.writer(to, key) as out:
            for _ in range(size // 10_000):
                out.write(b"x" * 10_000)

    with scratch.cached(key, fetch, key) as f:
        assert len(f.read()) == size
    return len(times)


def held(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.suffix)


def test_what_nobody_uses_makes_room_the_longest_unused_first(folder, three_megabytes):
    for n, key in enumerate("abc"):
        assert fetched(key, 900_000) == 1
        os.utime(folder / key, (n, n))
    os.utime(folder / "a", (9, 9))  # used again
    assert fetched("d", 900_000) == 1
    assert held(folder) <= 3 * MB
    assert "d" in names(folder)
    assert "b" not in names(folder)
    assert fetched("b", 900_000) == 1  # whoever wants it again fetches it again
    assert fetched("b", 900_000) == 0


def test_a_file_in_use_is_not_taken_and_a_download_waits_for_it(folder, three_megabytes, caplog):
    fetched("a", 2 * MB)
    waited = []

    def use() -> None:
        with scratch.locked(folder / "a", fcntl.LOCK_SH):
            time.sleep(1.5)
            waited.append((folder / "a").exists())

    thread = threading.Thread(target=use)
    thread.start()
    time.sleep(0.2)
    fetched("b", 2 * MB)
    thread.join()
    assert waited == [True]
    assert names(folder) == ["b"]
    assert sum("waiting for room" in r.message for r in caplog.records) == 1


def test_without_room_for_long_it_is_the_workers_fault_with_the_fix(folder, three_megabytes, monkeypatch):
    monkeypatch.setattr(scratch, "WAIT_S", 0.5)
    fetched("a", 2 * MB)
    with (
        scratch.locked(folder / "a", fcntl.LOCK_SH),
        pytest.raises(WorkerFault, match=rf"others take the 0\.003 GB .* set {scratch.VARIABLE}"),
    ):
        fetched("b", 2 * MB)
    assert sorted(p.name for p in folder.iterdir()) == ["a", "a.lock"]


def test_a_source_larger_than_all_is_its_own_fault_and_leaves_nothing(folder, three_megabytes):
    with pytest.raises(SourceFault, match=rf"huge: is larger than all downloads .* set {scratch.VARIABLE}"):
        fetched("huge", 4 * MB)
    assert not list(folder.iterdir())


def test_the_default_is_a_share_of_the_free_disk(folder, monkeypatch):
    monkeypatch.delenv(scratch.VARIABLE, raising=False)
    free = os.statvfs(folder)
    assert scratch.limit() == pytest.approx(scratch.SHARE * free.f_bavail * free.f_frsize, rel=0.05)


@pytest.mark.parametrize("told", ["much", "0", "-1", "nan", "inf"])
def test_a_variable_that_is_no_size_is_said(monkeypatch, told):
    monkeypatch.setenv(scratch.VARIABLE, told)
    with pytest.raises(WorkerFault, match=f"{scratch.VARIABLE}={told} is no number"):
        scratch.limit()


def test_a_torn_download_of_a_dead_worker_is_swept_at_once_and_one_in_work_is_not(folder):
    for key in "ab":
        (folder / f"{key}.partial").write_bytes(b"x")
        (folder / f"{key}.lock").touch()
    with scratch.locked(folder / "a", fcntl.LOCK_EX):
        scratch.sweep()
    assert sorted(p.name for p in folder.iterdir()) == ["a.lock", "a.partial"]
    scratch.sweep()
    assert not list(folder.iterdir())
