"""What a process that nobody trusts may answer: data, never code, and no more than was agreed.

An answer is a fixed head, a header in JSON and the raw bytes that the header refers to, in its order. In the
header plain values stand for themselves, and a mapping with a single key that begins with '$' for the rest:

    {"$array": ["uint8", [n, 27, 48, 3]]}    {"$bytes": [17, 4]}    {"$fraction": [1, 90000]}

`Rows` and `Strings` are sent block by block, and each block is let go once it is sent: sender and receiver
together hold a large answer once. `checked` makes a dataclass of an answer by the types of its fields.
"""

from __future__ import annotations

import json
import math
import mmap
import socket
import struct
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from fractions import Fraction
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

T = TypeVar("T")

HEAD = struct.Struct("!BQI")  # kind, number of the call, bytes of the header
BEAT, RESULT, RAISED = range(3)
MAX_HEADER = 4 << 20  # bytes; what JSON makes of one is some twenty times as much
DTYPES = {"uint8", "int32", "int64", "float32", "float64"}
BLOCK = 4 << 20  # bytes of memory taken and given back at a time
SLICE = 1 << 20  # bytes sent at a time: a time limit holds for each of these


class Refused(Exception):
    """An answer that breaks the rules; the message is a clause that says how."""


# Large values in blocks ------------------------------------------------------------------------------


class Rows:
    """An array [n, …] that grows by rows, in blocks of memory that go back to the system one by one."""

    def __init__(self, shape: tuple[int, ...], dtype: str = "uint8"):
        self.row, self.dtype, self.n = shape, np.dtype(dtype), 0
        self.nbytes = math.prod(shape) * self.dtype.itemsize  # of a row
        self.each = max(1, BLOCK // self.nbytes)
        self.blocks: list[np.ndarray] = []

    def __len__(self) -> int:
        return self.n

    def append(self, row: np.ndarray) -> None:
        if self.n == self.each * len(self.blocks):
            # not from malloc, which keeps what is freed
            memory = mmap.mmap(-1, self.each * self.nbytes)
            self.blocks.append(np.frombuffer(memory, self.dtype).reshape(self.each, *self.row))
        self.blocks[-1][self.n % self.each] = row
        self.n += 1

    def whole(self) -> np.ndarray:
        """A copy in one piece."""
        return np.concatenate([*self.blocks, np.empty((0, *self.row), self.dtype)])[: self.n]

    def taken(self) -> Iterator[memoryview]:
        """The bytes, block by block; each is gone when the next is asked for."""
        left, self.blocks, self.n = self.n, self.blocks[::-1], 0
        while self.blocks:
            block = self.blocks.pop()[:left]
            left -= len(block)
            yield block.reshape(-1).view(np.uint8).data


class Strings:
    """A list of bytes, in blocks of memory as those of `Rows`."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.blocks: list[mmap.mmap] = []
        self.free = 0  # bytes left of the last block

    def append(self, string: bytes) -> None:
        self.sizes.append(len(string))
        rest = memoryview(string)
        while rest:
            if not self.free:
                self.blocks.append(mmap.mmap(-1, BLOCK))
                self.free = BLOCK
            part, rest = rest[: self.free], rest[self.free :]
            self.blocks[-1][BLOCK - self.free : BLOCK - self.free + len(part)] = bytes(part)
            self.free -= len(part)

    def whole(self) -> list[bytes]:
        data, at, found = b"".join(memoryview(b) for b in self.blocks), 0, []
        for size in self.sizes:
            found.append(data[at : at + size])
            at += size
        return found

    def taken(self) -> Iterator[memoryview]:
        left, self.blocks, self.sizes = sum(self.sizes), self.blocks[::-1], []
        while self.blocks:
            block = memoryview(self.blocks.pop())[:left]
            left -= len(block)
            yield block


def whole(value: Any) -> Any:
    """Rows as an array, Strings as a list, anything else as it is."""
    return value.whole() if isinstance(value, Rows | Strings) else value


# Sending ---------------------------------------------------------------------------------------------


def send(pipe: socket.socket, kind: int, call: int, value: Any) -> None:
    """Send one answer. Raises TypeError for what cannot be said, before anything is sent."""
    blobs: list[Any] = []
    header = json.dumps(_plain(value, blobs)).encode()
    if len(header) > MAX_HEADER:
        raise TypeError(f"an answer's header of {len(header)} bytes is more than {MAX_HEADER}")
    del value
    pipe.sendall(HEAD.pack(kind, call, len(header)) + header)
    blobs.reverse()
    while blobs:
        blob = blobs.pop()
        for block in blob.taken() if isinstance(blob, Rows | Strings) else [memoryview(blob)]:
            for at in range(0, len(block), SLICE):
                pipe.sendall(block[at : at + SLICE])


def _plain(value: Any, blobs: list[Any]) -> Any:
    """What JSON says of a value; appends the bytes that go with it."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, np.bool_ | np.integer | np.floating):
        return value.item()
    if isinstance(value, Fraction):
        return {"$fraction": [value.numerator, value.denominator]}
    if isinstance(value, Rows):
        blobs.append(value)
        return {"$array": [value.dtype.name, [value.n, *value.row]]}
    if isinstance(value, Strings):
        blobs.append(value)
        return {"$bytes": value.sizes}
    if isinstance(value, bytes):
        blobs.append(value)
        return {"$bytes": len(value)}
    if isinstance(value, np.ndarray) and value.dtype.name in DTYPES:
        blobs.append(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
        return {"$array": [value.dtype.name, list(value.shape)]}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), blobs) for f in fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(v, blobs) for v in value]
    if isinstance(value, dict) and all(isinstance(k, str) and k[:1] != "$" for k in value):
        return {k: _plain(v, blobs) for k, v in value.items()}
    raise TypeError(f"a {type(value).__name__} cannot be part of an answer")


# Receiving -------------------------------------------------------------------------------------------


def receive(pipe: socket.socket, call: int, max_bytes: int) -> tuple[int, Any]:
    """The next message's kind and value (lists for tuples, a mapping for a dataclass).

    Args:
        call: the number it must carry; an answer to another call is refused.
        max_bytes: of all that it refers to; nothing larger is allocated.

    Raises Refused, and EOFError when the other side is gone.
    """
    kind, number, size = HEAD.unpack(read(pipe, HEAD.size))
    if kind not in (BEAT, RESULT, RAISED) or number != call or size > MAX_HEADER:
        raise Refused("it sent what is no answer to this call")
    if kind == BEAT:
        if size:
            raise Refused("it sent what is no answer to this call")
        return kind, None
    text = bytes(read(pipe, size))
    try:
        return kind, _Blobs(pipe, max_bytes).value(json.loads(text))
    except (ValueError, TypeError, RecursionError) as e:
        raise Refused(f"its answer cannot be read ({type(e).__name__})") from e


class _Blobs:
    """Reads the bytes that a header refers to, in its order."""

    def __init__(self, pipe: socket.socket, max_bytes: int):
        self.pipe, self.left = pipe, max_bytes

    def value(self, plain: Any) -> Any:
        if isinstance(plain, list):
            return [self.value(v) for v in plain]
        if isinstance(plain, str):
            plain.encode()  # half a surrogate pair, which JSON can spell, cannot be stored
        if not isinstance(plain, dict):
            return plain
        (name, *others) = plain or ("",)
        if name[:1] != "$":
            return {self.value(k): self.value(v) for k, v in plain.items()}
        what = plain[name]
        if others:
            raise Refused("its answer mixes names")
        if name == "$fraction":
            numerator, denominator = (_whole(n, -(1 << 62)) for n in what)
            if denominator <= 0:
                raise Refused("its answer holds no fraction")
            return Fraction(numerator, denominator)
        if name == "$bytes":
            if not isinstance(what, list):
                return self.string(what)
            return [self.string(size) for size in what]
        if name == "$array":
            dtype, shape = what
            return self.array(dtype, tuple(_whole(n) for n in shape))
        raise Refused(f"its answer holds a {name[:20]}")

    def array(self, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        if dtype not in DTYPES or len(shape) > 8:
            raise Refused("its answer holds an array of another kind")
        self.take(math.prod(shape) * np.dtype(dtype).itemsize)
        array = np.empty(shape, dtype)  # of a large one the system gives no memory before bytes arrive
        _fill(self.pipe, array.reshape(-1).view(np.uint8).data)
        return array

    def string(self, size: Any) -> bytes:
        self.take(_whole(size))
        if size <= SLICE:
            return bytes(read(self.pipe, size))
        data = np.empty(size, np.uint8)
        _fill(self.pipe, data.data)
        return data.tobytes()

    def take(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise Refused("its answer is larger than it may be")


def _whole(n: Any, least: int = 0) -> int:
    if type(n) is not int or not least <= n < 1 << 62:
        raise Refused("its answer holds a size that is none")
    return n


def read(pipe: socket.socket, size: int) -> bytearray:
    """So many bytes. Raises EOFError when the other side is gone."""
    data = bytearray(size)
    _fill(pipe, memoryview(data))
    return data


def _fill(pipe: socket.socket, view: memoryview) -> None:
    while view:
        got = pipe.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]


# Checking --------------------------------------------------------------------------------------------


class Of:
    """Dtype and shape of an array field: `Annotated[np.ndarray, Of("uint8", "n", 27, 48, 3)]`.

    A letter stands for one number throughout a dataclass, '*' for any.
    """

    def __init__(self, dtype: str, *shape: int | str):
        self.dtype, self.shape = dtype, shape


def checked(kind: type[T], answer: Any) -> T:
    """A dataclass from an answer; fields are str, int, float, bool, bytes, Fraction, arrays `Of` a shape, and
    lists, mappings and unions of those.

    Raises Refused for a missing or unknown field, a wrong type, dtype or shape, and a float that is not finite.
    """
    hints = get_type_hints(kind, include_extras=True)
    wanted = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(answer, dict) or set(answer) != set(wanted):
        raise Refused(f"its answer is no {kind.__name__}")
    sizes: dict[str, int] = {}
    for name in wanted:
        if not _fits(answer[name], hints[name], sizes):
            raise Refused(f"its answer's {name} is not what it should be")
    return kind(**answer)


def _fits(value: Any, hint: Any, sizes: dict[str, int]) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        (of,) = (a for a in args[1:] if isinstance(a, Of))
        return (
            isinstance(value, np.ndarray)
            and value.dtype == of.dtype
            and value.ndim == len(of.shape)
            and all(
                size == want if isinstance(want, int) else want == "*" or sizes.setdefault(want, size) == size
                for size, want in zip(value.shape, of.shape, strict=True)
            )
        )
    if origin in (Union, UnionType):
        return any(_fits(value, a, sizes) for a in args)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, args[0], sizes) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(k, args[0], sizes) and _fits(v, args[1], sizes) for k, v in value.items()
        )
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint is NoneType:
        return value is None
    if hint not in (str, int, bool, bytes, Fraction):
        raise TypeError(f"{hint} is no type of an answer")
    return type(value) is hint and (hint is not int or abs(value) < 1 << 63)
