"""A child's faults stay the child's; what it answers arrives whole."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pipeline.io.isolate import Child, Crashed, Failed, Stalled

AT = "tests.fixtures.misbehave:"


@pytest.fixture
def child():
    with Child() as c:
        yield c


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def gone_within(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_arguments_and_results_arrive_as_they_were_sent(child):
    sent = ({"k": [1, None, "é"]}, np.zeros((0, 3)), np.arange(6).reshape(2, 3)[:, ::2])
    args, kwargs = child.call(AT + "echo", *sent, word=b"\0\1", stall_s=20)
    assert args[0] == sent[0]
    assert args[0]["k"][1] is None
    np.testing.assert_array_equal(args[1], sent[1])
    np.testing.assert_array_equal(args[2], sent[2])
    assert kwargs == {"word": b"\0\1"}
    assert child.call(AT + "echo", (1, Fraction(2, 3)), stall_s=20) == [[[1, Fraction(2, 3)]], {}]


def test_large_arrays_arrive_whole_and_writable(child):
    got = child.call(AT + "squares", 3_000_000, stall_s=20)
    np.testing.assert_array_equal(got, np.arange(3_000_000, dtype=np.int64) ** 2)
    got[0] = 7


def test_the_child_is_another_process_and_stays_for_the_next_call(child):
    first = child.call(AT + "pid", stall_s=20)
    assert first == child.call(AT + "pid", stall_s=20) == child.pid != os.getpid()


def test_the_child_is_a_fresh_interpreter_without_the_heavy_packages(child):
    loaded = child.call("tests.fixtures.misbehave:modules", stall_s=20)
    assert not {"av", "cv2", "pyarrow", "pydantic", "torch", "ray", "pytest"} & set(loaded)


def test_decoding_loads_no_more_than_it_needs(child):
    with pytest.raises(Failed, match="DecodeError: cannot be read"):
        child.call("pipeline.split.decode:gather", "/nonexistent", None, stall_s=60)
    loaded = set(child.call(AT + "modules", stall_s=60))
    assert "pipeline.split.decode" in loaded
    assert not {"pyarrow", "pydantic", "torch", "ray"} & loaded


def test_exceptions_of_the_function_are_raised_here_and_the_child_lives_on(child):
    before = child.call(AT + "pid", stall_s=20)
    with pytest.raises(KeyError, match="no such thing"):
        child.call(AT + "fail", "no such thing", raises=(KeyError,), stall_s=20)
    assert child.call(AT + "pid", stall_s=20) == before


def test_an_exception_that_is_in_no_table_keeps_its_name_and_words(child):
    with pytest.raises(Failed, match="Awkward: this: that"):
        child.call(AT + "fail_awkwardly", stall_s=20)
    with pytest.raises(Failed, match="KeyError: 'no such thing'"):
        child.call(AT + "fail", "no such thing", stall_s=20)


def test_of_errors_of_the_system_only_those_of_a_file_are_believed(child):
    with pytest.raises(OSError, match="Input/output") as e:
        child.call(AT + "fail_with", errno.EIO, stall_s=20)
    assert e.value.errno == errno.EIO
    with pytest.raises(Failed, match="OSError: No space left"):  # else a video could end the run
        child.call(AT + "fail_with", errno.ENOSPC, stall_s=20)


def test_a_result_that_cannot_be_said_is_an_error_and_the_child_lives_on(child):
    before = child.call(AT + "pid", stall_s=20)
    with pytest.raises(Failed, match="a set cannot be part of an answer"):
        child.call(AT + "a_set", stall_s=20)
    assert child.call(AT + "pid", stall_s=20) == before


def test_a_hanging_function_is_killed_after_the_time_without_a_beat(child):
    victim = child.call(AT + "pid", stall_s=20)
    start = time.monotonic()
    with pytest.raises(Stalled, match=r"0\.7 s"):
        child.call(AT + "hang", stall_s=0.7)
    assert time.monotonic() - start < 10
    assert gone_within(victim, 5)
    assert child.call(AT + "pid", stall_s=20) != victim


def test_a_slow_function_that_beats_is_left_alone(child):
    child.call(AT + "pid", stall_s=20)
    assert child.call(AT + "slow", 4.0, stall_s=2.0) == "done"


@pytest.mark.parametrize(
    ("function", "args", "words"),
    [
        ("segfault", (), "SIGSEGV"),
        ("kill_self", (signal.SIGABRT,), "SIGABRT"),
        ("kill_self", (signal.SIGKILL,), "SIGKILL, perhaps for want of memory"),
        ("leave", (3,), "exit code 3"),
    ],
)
def test_a_crash_is_an_error_that_says_how_and_the_next_call_gets_a_new_child(child, function, args, words):
    with pytest.raises(Crashed, match=words):
        child.call(AT + function, *args, stall_s=20)
    assert child.pid is None
    assert child.call(AT + "echo", 1, stall_s=20) == [[1], {}]


def test_a_child_that_died_between_calls_is_replaced(child):
    victim = child.call(AT + "pid", stall_s=20)
    os.kill(victim, signal.SIGKILL)
    end = time.monotonic() + 5
    while child.pid is not None and time.monotonic() < end:  # its threads die one after the other
        time.sleep(0.02)
    assert child.call(AT + "pid", stall_s=20) != victim


def test_what_is_printed_does_not_get_into_the_answers(child, capfd):
    assert child.call(AT + "noise", stall_s=20) == "quiet"
    assert child.call(AT + "echo", 2, stall_s=20) == [[2], {}]
    assert capfd.readouterr() == ("", "")


def test_memory_is_limited_in_the_child_alone():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with Child(max_memory_gb=0.75) as small:
        with pytest.raises(MemoryError):
            small.call(AT + "hog", 0.8, stall_s=20)
        assert small.call(AT + "hog", 0.1, stall_s=20) == int(0.1 * 2**30)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_child_killed_from_outside_in_the_middle_of_a_call_is_a_crash(child):
    victim = child.call(AT + "pid", stall_s=20)
    threading.Timer(0.3, os.kill, (victim, signal.SIGKILL)).start()
    with pytest.raises(Crashed, match="SIGKILL"):
        child.call(AT + "hang", stall_s=60)


def test_a_closed_child_is_gone_and_may_be_called_again():
    child = Child()
    victim = child.call(AT + "pid", stall_s=20)
    child.close()
    assert child.pid is None
    assert not alive(victim)
    assert child.call(AT + "pid", stall_s=20) != victim
    child.close()


def test_a_forgotten_child_ends():
    child = Child()
    pid = child.call(AT + "pid", stall_s=20)
    del child
    assert gone_within(pid, 5)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
@pytest.mark.parametrize("doing", ["hang", "hang_in_c", "idle"])
def test_the_child_goes_when_its_parent_is_killed(doing):
    code = (
        "import time; from pipeline.io.isolate import Child; c = Child();"
        f"print(c.call('{AT}pid', stall_s=60), flush=True);"
        + ("time.sleep(1000)" if doing == "idle" else f"c.call('{AT}{doing}', stall_s=1000)")
    )
    root = Path(__file__).parents[3]
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    assert alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone_within(pid, 5)
