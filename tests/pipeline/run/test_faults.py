"""A run survives a fault at any I/O call: the same command again ends as an undisturbed run does, every caption on its
clip. A few of all calls here; all of them: bench/faults.py."""

import os
import signal

import pytest

from bench.faults import trouble
from tests.fixtures.faulty import Mill
from tests.fixtures.object_store import Proxy, environment

pytestmark = pytest.mark.slow

SHARES = [0.17, 0.33, 0.5, 0.66, 0.8, 0.95]  # of the calls of a run


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    with Mill(tmp_path_factory.mktemp("faults")) as mill:
        calm = mill.run("calm")
        assert calm.status == 0, calm.said
        yield mill, mill.outcome("calm"), sum(calm.calls.values())


@pytest.mark.parametrize("share", SHARES)
def test_after_a_fault_on_disk_the_same_command_ends_as_if_nothing_had_been(disk, share):
    mill, expected, total = disk
    how = ("EIO", "ENOSPC", "kill", "kill both")[SHARES.index(share) % 4]
    hurt = mill.run(f"hurt{share}", round(share * total), how)
    assert hurt.met, "no call was met"
    assert trouble(mill, hurt, expected, hurt.met, f"hurt{share}") == ""


def test_the_comparison_would_see_a_wrong_byte(disk):
    mill, *_ = disk
    name = "wrong"
    mill.run(name)
    (tar, *_) = sorted((mill.folder / name / "media").glob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(AssertionError, match=tar.name):
        mill.outcome(name)


@pytest.fixture(scope="module")
def bucket(object_store, tmp_path_factory):
    with Proxy(object_store.address) as proxy:
        where = object_store.environment(proxy.address)
        with environment(where), Mill(tmp_path_factory.mktemp("s3"), where, object_store.bucket()) as mill:
            calm = mill.run("calm")
            assert calm.status == 0, calm.said
            total = len(proxy.requests)
            yield mill, proxy, mill.outcome("calm"), total


@pytest.mark.parametrize(("share", "how"), [(0.3, "503"), (0.55, "kill"), (0.8, "reset")])
def test_after_an_object_store_went_away_the_same_command_ends_as_if_nothing_had_been(bucket, share, how):
    mill, proxy, expected, total = bucket
    pids: list[int] = []
    mill.started = pids.append
    if how == "kill":
        proxy.at_fault = lambda: os.kill(pids[-1], signal.SIGKILL)
    proxy.fail(round(share * total), "503" if how == "kill" else how, times=10**6)
    hurt = mill.run(f"hurt{share}")
    assert proxy.hurt
    proxy.at_fault = None
    proxy.sound()
    assert hurt.status != 0
    assert trouble(mill, hurt, expected, how, f"hurt{share}") == ""
