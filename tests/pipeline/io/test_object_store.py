"""The store on a real S3 server, and behind a proxy that errs: whole objects or none, sentences, one driver."""

import json
import os
import signal
import subprocess
import sys
import time
from urllib.parse import parse_qs

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from pipeline.faults import StoreError
from pipeline.io import drivers, files
from pipeline.io.store import Ranges, Store, below
from tests.fixtures.object_store import Proxy

LARGE = 12 << 20  # two parts


@pytest.fixture
def uri(object_store, monkeypatch):
    """An empty output on the server, with the keys in the environment."""
    monkeypatch.setattr(files, "BACKOFF_S", 0.02)
    monkeypatch.setattr(files, "SDK_TRIES", 1)  # its waits are seconds
    monkeypatch.setattr(files, "TRIES", 3)
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    return object_store.bucket() + "/run"


@pytest.fixture
def proxy(object_store, uri, monkeypatch):
    with Proxy(object_store.address) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.address}")
        yield proxy


def everything(object_store, uri) -> list[str]:
    """Every object of the bucket, hidden ones too."""
    selector = pafs.FileSelector(uri.removeprefix("s3://").split("/")[0], recursive=True)
    return [i.path.split("/", 2)[2] for i in object_store.files().get_file_info(selector) if i.is_file]


@pytest.mark.parametrize("size", [3, LARGE])
def test_an_object_appears_only_when_its_block_ends(object_store, uri, size):
    store = Store(uri)
    data = os.urandom(size)
    with store.writer("a/x") as f:
        f.write(data)
        assert not store.exists("a/x")
    assert store.read_bytes("a/x") == data
    assert store.list() == store.list("a") == ["a/x"]
    assert everything(object_store, uri) == ["a/x"]
    with pytest.raises(RuntimeError), store.writer("a/y") as f:
        f.write(data)
        raise RuntimeError
    assert everything(object_store, uri) == ["a/x"]


def test_what_pyarrow_does_with_a_broken_upload_is_why_large_ones_go_aside(object_store, uri):
    """If this fails one day, uploads may go straight to their name."""
    bucket = uri.removeprefix("s3://")
    with pytest.raises(RuntimeError), object_store.files().open_output_stream(f"{bucket}/half") as f:
        f.write(bytes(LARGE))
        raise RuntimeError
    assert Store(uri).exists("half")


@pytest.mark.parametrize("how", ["503", "reset", "half"])
@pytest.mark.parametrize("size", [3, LARGE])
def test_an_upload_that_fails_for_good_leaves_the_old_object(object_store, uri, proxy, size, how):
    store = Store(uri)
    store.write_bytes("x", b"old")
    proxy.fail_where("/run/", how, times=999)
    with pytest.raises(StoreError, match=r"cannot write s3://.*/run/x.*run the same command again"):
        store.write_bytes("x", os.urandom(size))
    proxy.sound()
    assert store.read_bytes("x") in (
        [b"old"] if how != "reset" or size == LARGE else [b"old", store.read_bytes("x")]
    )
    assert store.size("x") in (3, size)
    store.sweep()
    assert everything(object_store, uri) == ["x"]
    assert list(files.unfinished_uploads(store.files)) == []


@pytest.mark.parametrize("part", ["partNumber=2", "uploads", "uploadId", "copy"])
def test_a_large_upload_that_breaks_anywhere_once_succeeds(object_store, uri, proxy, part):
    store = Store(uri)
    data = os.urandom(LARGE)
    for how in ("503", "reset", "half"):
        proxy.fail_where(part if part != "copy" else "PUT /" + store.root + "/x", how, times=2)
        store.write_bytes("x", data)
        assert proxy.hurt >= 1, "the fault was not met"
        proxy.sound()
        assert store.read_bytes("x") == data
        assert everything(object_store, uri) == ["x"]


def test_a_killed_upload_is_never_visible_and_is_swept(object_store, uri, proxy):
    pytest.importorskip("boto3")
    proxy.stall_s = 60
    proxy.fail_where("partNumber=2", "stall", times=99)
    code = f"from pipeline.io.store import Store\nStore({uri!r}).write_bytes('a/x', bytes({LARGE}))"
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 30
        while proxy.hurt == 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert proxy.hurt
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    proxy.sound()
    store = Store(uri)
    assert everything(object_store, uri) == []
    assert [name.split(".")[0] for name, _ in files.unfinished_uploads(store.files)] == ["a/"]
    store.sweep()
    assert list(files.unfinished_uploads(store.files)) == []


def test_a_hidden_object_of_a_killed_writer_is_no_file_and_is_swept(object_store, uri):
    store = Store(uri)
    store.files.put("media/.u.tar.12345678.partial", b"half")
    store.write_bytes("media/u.tar", b"whole")
    assert store.list() == ["media/u.tar"]
    store.sweep()
    assert everything(object_store, uri) == ["media/u.tar"]


# ---------------------------------------------------------------- every error is a sentence


def calls(store: Store) -> dict:
    """Every way to ask a store."""
    return {
        "list": lambda: store.list("videos"),
        "look up": lambda: store.exists("x"),
        "read": lambda: store.read_bytes("x"),
        "table": lambda: store.read_table("x"),
        "range": lambda: Ranges(store).read("x", 0, 1),
        "write": lambda: store.write_bytes("x", b"1"),
        "large": lambda: store.write_bytes("x", bytes(LARGE)),
        "delete": lambda: store.delete("x"),
        "lock": lambda: store.lock().__enter__(),
    }


def said(call) -> str:
    with pytest.raises(StoreError) as e:
        call()
    assert "\n" not in str(e.value)
    return str(e.value)


def test_a_missing_bucket_is_named(uri):
    for how, call in calls(Store("s3://no-such-bucket/run")).items():
        if how not in ("look up", "delete", "read", "table", "range"):  # to these it is as a missing file
            assert "there is no" in said(call), how
            assert "no-such-bucket" in said(call), how


def test_wrong_keys_are_told_from_forbidden_writes(object_store, uri, monkeypatch):
    Store(uri).write_bytes("x", b"1")
    for name, value in object_store.environment(who="reader").items():
        monkeypatch.setenv(name, value)
    reader = Store(uri)
    assert reader.read_bytes("x") == b"1"
    for how in ("write", "large", "delete", "lock"):
        assert "access is denied" in said(calls(reader)[how])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for how, call in calls(Store(uri)).items():
        assert "keys" in said(call), how


def test_an_endpoint_that_is_away_is_named_after_bounded_patience(uri, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(files, "SDK_TRIES", 3)
    start = time.monotonic()
    assert "does not answer (Could not connect to server)" in said(lambda: Store(uri).exists("x"))
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("how", ["list", "look up", "read", "range", "write", "delete"])
def test_a_503_is_survived_a_few_times_and_then_told(uri, proxy, how):
    store = Store(uri)
    store.write_bytes("x", b"1")
    proxy.fail(1, "503", times=2)
    calls(store)[how]()
    assert proxy.hurt == 2
    if how == "delete":
        store.write_bytes("x", b"1")
    proxy.fail(1, "503", times=999)
    assert "overloaded" in said(calls(store)[how])
    assert proxy.hurt <= files.SDK_TRIES * files.TRIES


def test_a_reading_that_breaks_off_is_done_again(uri, proxy):
    store = Store(uri)
    store.write_table("t", pa.table({"x": range(100_000)}))
    data = store.read_bytes("t")
    for k in range(1, 5):
        proxy.fail(k, "reset", times=2)
        assert store.read_bytes("t") == data
        proxy.fail(k, "reset", times=2)
        assert Ranges(store).read("t", 5, 70_000) == data[5:70_005]
        proxy.fail(k, "reset", times=2)
        assert store.read_table("t").num_rows == 100_000


def test_another_region_is_named(uri, proxy):
    proxy.moved = True
    assert "another region" in said(lambda: Store(uri).list("x"))


def test_an_address_with_options_and_keys_works_and_never_shows_them(object_store, uri, monkeypatch):
    for name in object_store.environment():
        monkeypatch.delenv(name)
    address = object_store.uri_with_endpoint(uri)
    assert parse_qs(address.split("?")[1])["endpoint_override"] == [object_store.address]
    store = Store(address)
    store.write_bytes("shards/x", b"1")
    inside = Store(below(address, "shards"))
    assert inside.list() == ["x"]
    for shown in (store.uri, inside.uri, repr(store), said(lambda: store.read_bytes("none"))):
        assert "not-a-secret" not in shown


# ---------------------------------------------------------------- one driver


def test_a_second_driver_is_refused_and_the_first_ones_end_frees_the_output(uri):
    with Store(uri).lock():
        assert "in use by another clipmill (process" in said(Store(uri).lock().__enter__)
    with Store(uri).lock():
        pass


def test_the_place_of_a_driver_that_was_killed_here_is_free_at_once(uri):
    code = (
        "import time\nfrom pipeline.io.store import Store\n"
        f"with Store({uri!r}).lock():\n    print('go', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    assert "in use" in said(Store(uri).lock().__enter__)
    child.kill()
    child.wait()
    store = Store(uri)
    with store.lock():
        assert store.epoch == 2


def test_the_place_of_a_driver_elsewhere_is_free_after_its_lease(uri, monkeypatch):
    store = Store(uri)
    store.files.put(f"{drivers.FOLDER}/00000007-abc", json.dumps({"host": "elsewhere", "pid": 1}).encode())
    assert "if it is dead, this works in" in said(store.lock().__enter__)
    monkeypatch.setattr(drivers, "LEASE_S", 0.0)
    with store.lock():
        assert store.epoch == 8


def test_a_driver_in_another_container_of_this_machine_is_not_taken_for_dead(uri):
    """It shares name and boot, and its process number means nothing here."""
    store = Store(uri)
    who = drivers._who() | {"pid": 2**22 + 1, "born": "1"}
    claim = f"{drivers.FOLDER}/00000001-abc"
    store.files.put(claim, json.dumps(who | {"space": "pid:[1]"}).encode())
    assert "in use" in said(store.lock().__enter__)
    store.files.put(claim, json.dumps(who).encode())
    with store.lock():
        assert store.epoch == 2


def test_a_driver_that_beats_keeps_its_place_beyond_the_lease(uri, monkeypatch):
    monkeypatch.setattr(drivers, "BEAT_S", 0.2)
    monkeypatch.setattr(drivers, "LEASE_S", 3.0)
    monkeypatch.setattr(drivers, "_dead", lambda who, me: False)
    with Store(uri).lock():
        time.sleep(4.5)
        assert "in use" in said(Store(uri).lock().__enter__)


def test_of_many_that_begin_at_once_at_most_one_goes_on(uri):
    code = (
        "import sys\nfrom pipeline.io.store import Store\nfrom pipeline.faults import StoreError\n"
        f"store = Store({uri!r}); print('ready', flush=True); sys.stdin.readline()\n"
        "try:\n    with store.lock():\n        print('mine', flush=True); sys.stdin.readline()\n"
        "except StoreError: print('refused', flush=True)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    children = [subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) for _ in range(4)]
    try:
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        assert sum(child.stdout.readline() == "mine\n" for child in children) <= 1
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_a_worker_of_a_dead_driver_publishes_and_deletes_nothing_once_another_has_begun(uri, tmp_path):
    import pickle

    for address in (uri, str(tmp_path / "run")):
        first = Store(address)
        with first.lock():
            worker = pickle.loads(pickle.dumps(first))
            worker.write_bytes("clips/u.parquet", b"1")
        second = Store(address)
        with second.lock():
            second.write_bytes("clips/u.parquet", b"2")
            for act in (
                lambda w=worker: w.write_bytes("clips/u.parquet", b"1"),
                lambda w=worker: w.write_bytes("videos/u.parquet", bytes(LARGE)),
                lambda w=worker: w.delete("clips/u.parquet"),
                lambda w=worker: w.delete_folder("clips"),
                lambda w=worker: w.replace_folder("a", "b", "c"),
            ):
                assert "another clipmill has taken over" in said(act)
            assert second.list() == ["clips/u.parquet"]
            assert second.read_bytes("clips/u.parquet") == b"2"
        assert "taken over" in said(lambda w=worker: w.write_bytes("x", b""))
