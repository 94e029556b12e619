"""The store: a file appears whole or not at all, whatever happens while it is written."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.faults import StoreError
from pipeline.io.store import Store, folder_name


def test_a_file_appears_only_when_its_block_ends(tmp_path):
    store = Store(str(tmp_path / "out"))
    with store.writer("a/b.bin") as f:
        f.write(b"12")
        assert store.list() == []
        assert not (tmp_path / "out/a/b.bin").exists()
    assert store.read_bytes("a/b.bin") == b"12"
    assert store.list() == ["a/b.bin"]


def test_an_exception_leaves_the_old_file_and_no_partial_one(tmp_path):
    store = Store(str(tmp_path))
    store.write_bytes("x", b"old")
    with pytest.raises(RuntimeError), store.writer("x") as f:
        f.write(b"new")
        raise RuntimeError
    assert store.read_bytes("x") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_killed_writer_leaves_nothing_under_the_final_name_and_sweep_clears_the_rest(tmp_path):
    code = (
        "import sys, time\nfrom pipeline.io.store import Store\n"
        f"with Store({str(tmp_path)!r}).writer('x.tar') as f:\n"
        "    f.write(b'0' * 9999); f.flush(); print('go', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    store = Store(str(tmp_path))
    assert store.list() == []
    assert len(list(tmp_path.iterdir())) == 1
    store.sweep()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_with_the_fix(tmp_path, monkeypatch, code):
    def full(fd):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    store = Store(str(tmp_path))
    with pytest.raises(StoreError, match="free some space and run the same command again"):
        store.write_bytes("x", b"1")
    assert list(tmp_path.iterdir()) == []


def test_a_really_full_disk_is_a_store_error():
    """/dev/full accepts no byte, as a full disk does."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    store = Store("/dev/shm")
    with pytest.raises(StoreError, match="No space left"), store.writer("clipmill-test"):
        open("/dev/full", "wb", buffering=0).write(b"1")  # noqa: SIM115


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose an output folder"):
        Store(str(tmp_path / "file/out")).write_bytes("x", b"")
    with pytest.raises(StoreError, match="choose an output folder"), Store(str(tmp_path / "file/out")).lock():
        pass


def test_a_second_driver_is_refused_and_a_dead_ones_lock_is_free(tmp_path):
    code = (
        "import time\nfrom pipeline.io.store import Store\n"
        f"with Store({str(tmp_path)!r}).lock():\n    print('go', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    with pytest.raises(StoreError, match="in use"), Store(str(tmp_path)).lock():
        pass
    child.kill()
    child.wait()
    time.sleep(0.1)
    with Store(str(tmp_path)).lock():
        pass


def test_any_text_names_one_folder_of_its_own(tmp_path):
    names = [
        "a/b",
        "a b",
        ".",
        "..",
        ".hidden",
        "模型/" * 60,
        "模型/" * 61,
        "x" * 300,
        "x" * 301,
        "é%2F",
        "a%2Fb",
        "a:b",
    ]
    names += ["y" * (218 + n) + "/" * 30 for n in range(4)]
    folders = [folder_name(name) for name in names]
    assert len(set(folders)) == len(names)
    for n, folder in enumerate(folders):
        assert not folder.startswith(".")
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{n}").touch()
    assert len(list(tmp_path.iterdir())) == len(names)
