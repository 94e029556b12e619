"""Functions run in a child process, which may hang, crash or eat memory without harming the caller.

libav parses whatever strangers made, in C, so one file in a million takes the process with it. A `Child` is
a fresh interpreter (never a fork: the parent has threads) that stays up between calls:

    with Child(max_memory_gb=8) as child:
        result = child.call("pipeline.split.decode:analyse", path, options, stall_s=60)

The function gets a keyword argument `beat`, to be called as often as it likes: slow work that beats is
never taken for hung work. Parent and child talk over a socket of their own; the child's stdin, stdout and
stderr are /dev/null, so nothing that C code prints can get between the messages.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

# A message is a count of parts, their sizes and the parts: a pickle, then the buffers that it refers to (arrays
# travel uncopied). A count of 0 is a heartbeat.
_COUNT = struct.Struct("!I")
_SIZE = struct.Struct("!Q")

_BEAT_S = 0.5  # a beat is sent at most this often

# argv: socket, parent's pid, bytes of memory, then the parent's sys.path
_BOOT = "import sys; sys.path[:] = sys.argv[4:]; from pipeline.io.isolate import serve; serve(*map(int, sys.argv[1:4]))"


class ChildError(Exception):
    """The child hung or died; the message is a clause that says how."""


class Stalled(ChildError):
    """No heartbeat for `stall_s` seconds: the child was killed."""


class Crashed(ChildError):
    """The child ended in the middle of a call, by a signal or by exit."""


class Child:
    """A process that runs one function at a time, started at the first call and again after it died.

    It is killed by `close`, when the object is collected, and by the kernel when its parent dies. (Linux
    counts the *thread* that started it as its parent; if that thread ends, the next call starts another.)

    Args:
        max_memory_gb: address space the child may take, GiB; beyond it allocation fails. None: no limit.
    """

    def __init__(self, max_memory_gb: float | None = None):
        self._max_bytes = int((max_memory_gb or 0) * 2**30)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._end: weakref.finalize | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Of the running child; none before the first call and after a failure."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def call(self, function: str, *args: Any, stall_s: float, **kwargs: Any) -> Any:
        """Run 'module:function' with those arguments and a `beat` callable in the child.

        Whatever the function raises is raised here. Arguments, result and exception must be picklable.

        Raises:
            Stalled: nothing was heard for `stall_s` seconds.
            Crashed: the child died. After either, the next call starts a new child.
        """
        if self.pid is None:
            self._start()
        assert self._socket is not None
        assert self._process is not None
        self._socket.settimeout(stall_s)
        try:
            _send(self._socket, (function, args, kwargs, min(_BEAT_S, stall_s / 4)))
            while (message := _receive(self._socket)) is None:
                pass
        except TimeoutError as e:
            self.close()
            raise Stalled(f"no sign of life for {stall_s:g} s") from e
        except (EOFError, ConnectionError) as e:
            process = self._process
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)  # the socket closes a moment before the exit status is there
            self.close()
            raise Crashed(_cause_of_death(process.returncode)) from e
        except BaseException:
            self.close()  # interrupted between request and reply: the next call must not get this one's
            raise
        done, result = message
        if not done:
            raise result
        return result

    def close(self) -> None:
        """Kill the child, if there is one. A later call starts another."""
        if self._end is not None:
            self._end()
        self._process = self._socket = self._end = None

    def _start(self) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _BOOT,
                    *map(str, (theirs.fileno(), os.getpid(), self._max_bytes)),
                    *sys.path,
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        self._socket = ours
        self._end = weakref.finalize(self, _kill, self._process, ours)


def _kill(process: subprocess.Popen[bytes], pipe: socket.socket) -> None:
    pipe.close()
    process.kill()
    process.wait()


def _cause_of_death(status: int | None) -> str:
    if status is None or status >= 0:
        return f"its process ended with exit code {status}"
    name = signal.Signals(-status).name
    hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{hint}"


def serve(fd: int, parent: int, max_bytes: int) -> None:
    """The child's side: answer calls until the parent goes away."""
    pipe = socket.socket(fileno=fd)
    _die_with(parent, fd)
    for stop in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # sent to the whole group; the parent handles them, and we go with it
        signal.signal(stop, signal.SIG_IGN)
    if max_bytes:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    while True:
        try:
            message = _receive(pipe)
        except (EOFError, ConnectionError):
            return
        assert message is not None
        function, args, kwargs, interval = message
        try:
            module, _, name = function.partition(":")
            run = getattr(importlib.import_module(module), name)
            reply = (True, run(*args, **kwargs, beat=_heartbeat(pipe, interval)))
        except Exception as e:
            reply = (False, _portable(e))
        _send(pipe, reply)


def _heartbeat(pipe: socket.socket, interval: float) -> Callable[[], None]:
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= interval:
            last = now
            pipe.sendall(_COUNT.pack(0))

    return beat


def _portable(e: Exception) -> Exception:
    """The exception, or where pickling would lose or break it, its name and message."""
    try:
        copy = pickle.loads(pickle.dumps(e))
        if isinstance(copy, type(e)) and str(copy) == str(e):
            return e
    except Exception:  # whatever a strange exception's own pickling raises
        pass
    return RuntimeError(f"{type(e).__name__}: {e}")


def _die_with(parent: int, fd: int) -> None:
    """End this process when the parent is gone, even while C code is hanging."""
    if sys.platform == "linux":
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:  # where there is no prctl, and for a parent that lives but has dropped its end
        poll = select.poll()
        poll.register(fd, 0)  # no events but hang-up
        poll.poll()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    if os.getppid() != parent:  # it died before prctl
        os._exit(0)


def _send(pipe: socket.socket, value: Any) -> None:
    buffers: list[pickle.PickleBuffer] = []
    parts: list[Any] = [pickle.dumps(value, protocol=5, buffer_callback=buffers.append)]
    parts += [b.raw() for b in buffers]
    sizes = [memoryview(p).nbytes for p in parts]
    pipe.sendall(_COUNT.pack(len(parts)) + b"".join(map(_SIZE.pack, sizes)))
    for part in parts:
        for at in range(
            0, memoryview(part).nbytes, 1 << 20
        ):  # a time limit holds for each MiB, not for a GiB
            pipe.sendall(memoryview(part)[at : at + (1 << 20)])


def _receive(pipe: socket.socket) -> Any:
    """The next message, None for a heartbeat. Raises EOFError when the other side is gone."""
    (count,) = _COUNT.unpack(_read(pipe, _COUNT.size))
    if not count:
        return None
    sizes = [size for (size,) in _SIZE.iter_unpack(_read(pipe, count * _SIZE.size))]
    head, *buffers = [_read(pipe, size) for size in sizes]
    return pickle.loads(head, buffers=buffers)


def _read(pipe: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = pipe.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return data
