"""What a hostile child can do with its answers: nothing but be refused."""

import contextlib
import json
import os
import pickle
import resource
import socket
import threading
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

import numpy as np
import pytest

from pipeline.io import answer
from pipeline.io.answer import HEAD, RAISED, RESULT, Of, Refused, Rows, Strings, checked
from pipeline.io.isolate import RAISED as TABLE
from pipeline.io.isolate import Failed, _exception

CALL = 7


def received(data: bytes, max_bytes: int = 1 << 20):
    """What the parent makes of raw bytes from a child."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(10)

        def write() -> None:
            with contextlib.suppress(OSError):  # nobody listens any more
                theirs.sendall(data)
                theirs.shutdown(socket.SHUT_WR)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            return answer.receive(ours, CALL, max_bytes)
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            writer.join()


def forged(header: object, blobs: bytes = b"", kind: int = RESULT, call: int = CALL) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return HEAD.pack(kind, call, len(text)) + text + blobs


def sent(value: object) -> bytes:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            answer.send(theirs, RESULT, CALL, value)
        return b"".join(iter(lambda: ours.recv(1 << 16), b""))


@pytest.mark.parametrize(
    "value",
    [
        None,
        [1, -(2**62), 0.5, True, "é\n", [], {}],
        {"a": {"b": [b"", b"\0\xff"]}, "f": Fraction(-1, 90000)},
        [Fraction(1), b"x", np.arange(6).reshape(2, 3)[:, ::2].tolist()],
    ],
)
def test_what_is_sent_arrives(value):
    assert received(sent(value)) == (RESULT, value)


@pytest.mark.parametrize("shape", [(0, 3), (5,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", sorted(answer.DTYPES))
def test_arrays_arrive_with_dtype_and_shape_and_may_be_written(dtype, shape):
    array = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    _, got = received(sent({"x": array.T, "y": b"after"}))
    np.testing.assert_array_equal(got["x"], array.T)
    assert got["x"].dtype == dtype
    assert got["x"].flags.writeable
    assert got["y"] == b"after"


def test_rows_and_strings_arrive_as_arrays_and_lists_and_are_let_go_as_they_are_sent():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3000, 27, 48, 3), dtype=np.uint8)  # 12 MB, three blocks
    words = [rng.bytes(int(n)) for n in rng.integers(0, 20_000, 1000)]
    rows, strings = Rows((27, 48, 3)), Strings()
    for p in pictures:
        rows.append(p)
    for w in words:
        strings.append(w)
    np.testing.assert_array_equal(rows.whole(), pictures)
    assert strings.whole() == words
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=answer.send, args=(theirs, RESULT, CALL, [rows, strings]))
        sender.start()
        _, (got, said) = answer.receive(ours, CALL, 1 << 30)
        sender.join()
    np.testing.assert_array_equal(got, pictures)
    assert said == words
    assert not rows.blocks
    assert not strings.blocks


class Trap:
    def __reduce__(self):
        return os.mkdir, ("/tmp/clipmill-trap",)


HOSTILE = {
    "a pickle": forged(pickle.dumps(Trap())),
    "a pickle for a head": pickle.dumps(Trap()),
    "no JSON": forged(b"{"),
    "no text": forged(b'"\xff"'),
    "half a character": forged(b'"\\ud800"'),
    "too deep": forged(b"[" * 100_000 + b"]" * 100_000),
    "a number without end": forged(b"1" * 100_000),
    "a header without end": HEAD.pack(RESULT, CALL, (1 << 32) - 1),
    "an answer to another call": forged(1, call=CALL + 1),
    "another kind": forged(1, kind=9),
    "a heartbeat with a load": HEAD.pack(answer.BEAT, CALL, 5) + b"12345",
    "an array of objects": forged({"$array": ["object", [1]]}, b"\0" * 8),
    "a dtype with code": forged({"$array": ["V8,O", [1]]}, b"\0" * 8),
    "a dtype that is no name": forged({"$array": [["u1"], [1]]}),
    "an array larger than agreed": forged({"$array": ["uint8", [1 << 40]]}),
    "many arrays larger than agreed": forged([{"$array": ["uint8", [1 << 19]]}] * 3, b"\0" * (3 << 19)),
    "a product that overflows": forged({"$array": ["uint8", [1 << 33, 1 << 33]]}),
    "a negative size": forged({"$array": ["uint8", [-1]]}),
    "two negative sizes": forged({"$array": ["uint8", [-2, -2]]}, b"\0" * 4),
    "a size that is no number": forged({"$array": ["uint8", [1.5]]}),
    "a size that is true": forged({"$array": ["uint8", [True]]}, b"\0"),
    "too many dimensions": forged({"$array": ["uint8", [1] * 40]}, b"\0"),
    "bytes larger than agreed": forged({"$bytes": 1 << 40}),
    "a list of bytes larger than agreed": forged({"$bytes": [1 << 19] * 3}, b"\0" * (3 << 19)),
    "a negative number of bytes": forged({"$bytes": -1}),
    "a fraction of nothing": forged({"$fraction": [1, 0]}),
    "a fraction of three": forged({"$fraction": [1, 2, 3]}),
    "an unknown name": forged({"$code": "import os"}),
    "mixed names": forged({"$bytes": 1, "x": 2}, b"\0"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_answer_is_refused(attack):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((Refused, EOFError)):
        received(HOSTILE[attack])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_an_answer_that_breaks_off_is_an_end():
    whole = sent({"x": np.zeros(1000), "y": "z"})
    for cut in range(0, len(whole), 97):
        with pytest.raises(EOFError):
            received(whole[:cut])


@pytest.mark.parametrize("told", [None, [], ["KeyError"], [1, "x", 0], ["KeyError", "x", 1.5], {"a": 1}])
def test_an_exception_that_is_none_is_refused(told):
    kind, value = received(forged(told, kind=RAISED))
    assert kind == RAISED
    with pytest.raises(Refused):
        _exception(value, TABLE)


@pytest.mark.parametrize(
    "name", ["SystemExit", "KeyboardInterrupt", "StoreError", "WorkerFault", "os.system", "x" * 10_000]
)
def test_a_child_cannot_raise_what_is_not_in_the_table(name):
    made = _exception([name, "\x1b[31mred\x07", 0], TABLE)
    assert type(made) is Failed
    assert len(str(made)) < 200
    assert str(made).isprintable()


@dataclass
class Found:
    name: str
    n: int
    rate: float
    at: Fraction
    counts: dict[str, int]
    words: list[str] | None
    a: Annotated[np.ndarray, Of("uint8", "n", 3)]
    b: Annotated[np.ndarray, Of("int64", "n")]


GOOD = {
    "name": "x",
    "n": 1,
    "rate": 2,
    "at": Fraction(1, 2),
    "counts": {"a": 1},
    "words": None,
    "a": np.zeros((4, 3), np.uint8),
    "b": np.zeros(4, np.int64),
}


def test_a_dataclass_is_made_of_an_answer_that_fits():
    assert checked(Found, dict(GOOD)).words is None
    assert checked(Found, GOOD | {"words": ["a"]}).words == ["a"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": 1},
        {"n": True},
        {"n": 1 << 63},
        {"n": 1.0},
        {"rate": float("nan")},
        {"rate": float("inf")},
        {"rate": "1"},
        {"at": 0.5},
        {"counts": {"a": "b"}},
        {"counts": []},
        {"words": [1]},
        {"words": "ab"},
        {"a": np.zeros((4, 3), np.int64)},
        {"a": np.zeros((4, 4), np.uint8)},
        {"a": np.zeros(12, np.uint8)},
        {"b": np.zeros(5, np.int64)},
        {"b": [0, 0, 0, 0]},
        {"more": 1},
    ],
    ids=str,
)
def test_an_answer_that_does_not_fit_is_refused(wrong):
    with pytest.raises(Refused):
        checked(Found, GOOD | wrong)


def test_a_missing_field_is_refused():
    with pytest.raises(Refused):
        checked(Found, {k: v for k, v in GOOD.items() if k != "b"})
