"""Functions run in a child process, which may hang, crash, eat memory or turn hostile without harming the caller.

libav parses whatever strangers made, in C, so one file in a million takes the process with it, and one may be
made to take it over. A `Child` is a fresh interpreter (never a fork: the parent has threads) that stays up
between calls:

    with Child(max_memory_gb=8) as child:
        result = child.call("pipeline.split.decode:gather", path, options, stall_s=60)

The function gets a keyword argument `beat`, to be called as often as it likes: slow work that beats is
never taken for hung work. Parent and child talk over a socket of their own; the child's stdin, stdout and
stderr are /dev/null, so nothing that C code prints can get between the messages.

The child is confined (`pipeline.io.sandbox`) and not trusted: the request is a pickle, the answer is data that
cannot execute, of a bounded size (`pipeline.io.answer`), and exceptions are raised by name from a fixed table.
"""

from __future__ import annotations

import contextlib
import errno
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

from pipeline.io import answer, sandbox
from pipeline.watch import progress

_SIZE = struct.Struct("!Q")  # of the request, a pickle
_BEAT_S = 0.5  # a beat is sent at most this often
_MOST = 8 << 30  # bytes of an answer, where the child's memory has no limit

# What a child's exceptions may become here, and those that the caller of `call` names. Of OSErrors only such as a
# file can cause: a child must not be able to say that this machine's disk is full.
RAISED: tuple[type[Exception], ...] = (MemoryError, OSError)
NUMBERS = {errno.ENOENT, errno.EACCES, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR}

# argv: socket, parent's pid, bytes of memory, then the parent's sys.path
_BOOT = "import sys; sys.path[:] = sys.argv[4:]; from pipeline.io.isolate import serve; serve(*map(int, sys.argv[1:4]))"


class ChildError(Exception):
    """The child hung, died or broke the rules; the message is a clause that says how."""


class Stalled(ChildError):
    """No heartbeat for `stall_s` seconds: the child was killed."""


class Crashed(ChildError):
    """The child ended in the middle of a call, by a signal or by exit."""


class Killed(Crashed):
    """By SIGKILL, which no call does to itself: somebody outside, or the kernel for want of memory."""


class Failed(ChildError):
    """The function raised what is in no table; the message has the exception's name and words, and where it was."""


class Forged(ChildError):
    """The child sent what is no answer to the call, or a larger one than it may be: it was killed."""


class Child:
    """A process that runs one function at a time, started at the first call and again after it died.

    It is killed by `close`, when the object is collected, and by the kernel when its parent dies. (Linux
    counts the *thread* that started it as its parent; if that thread ends, the next call starts another.)

    Args:
        max_memory_gb: address space the child may take, GiB; beyond it allocation fails. None: no limit.
            An answer may not be larger either (without a limit: 8 GiB).
    """

    def __init__(self, max_memory_gb: float | None = None):
        self._max_bytes = int((max_memory_gb or 0) * 2**30)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._end: weakref.finalize | None = None
        self._call = 0

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Of the running child; none before the first call and after a failure."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def call(
        self,
        function: str,
        *args: Any,
        stall_s: float,
        raises: tuple[type[Exception], ...] = (),
        **kwargs: Any,
    ) -> Any:
        """Run 'module:function' with those arguments and a `beat` callable in the child; returns what it answers.

        Arguments must be picklable. An answer is made of what `pipeline.io.answer` can say; tuples arrive as
        lists, dataclasses as mappings (see `answer.checked`). An exception is raised here as the one of RAISED or
        `raises` that has its name, with its message.

        Raises:
            Failed: the function raised any other exception.
            Stalled: nothing was heard for `stall_s` seconds.
            Crashed: the child died.
            Forged: it sent what is no answer. After any of the three, the next call starts a new child.
        """
        if self.pid is None:
            self._start()
        assert self._socket is not None
        assert self._process is not None
        self._socket.settimeout(stall_s)
        self._call = int.from_bytes(
            os.urandom(8)
        )  # not to be guessed, so that nothing is answered beforehand
        request = pickle.dumps((self._call, function, args, kwargs, min(_BEAT_S, stall_s / 4)), protocol=5)
        try:
            self._socket.sendall(_SIZE.pack(len(request)) + request)
            kind = answer.BEAT
            while kind == answer.BEAT:
                kind, value = answer.receive(self._socket, self._call, self._max_bytes or _MOST)
                progress()
            raised = None if kind == answer.RESULT else _exception(value, (*RAISED, *raises))
        except TimeoutError as e:
            self.close()
            raise Stalled(f"no sign of life for {stall_s:g} s") from e
        except (EOFError, ConnectionError) as e:
            process = self._process
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)  # the socket closes a moment before the exit status is there
            self.close()
            end = Killed if process.returncode == -signal.SIGKILL else Crashed
            raise end(cause_of_death(process.returncode)) from e
        except answer.Refused as e:
            self.close()
            raise Forged(str(e)) from e
        except BaseException:
            self.close()  # interrupted between request and reply: the next call must not get this one's
            raise
        if raised is not None:
            raise raised
        return value

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
                env=sandbox.environment() | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        self._socket = ours
        self._end = weakref.finalize(self, _kill, self._process, ours)


def _kill(process: subprocess.Popen[bytes], pipe: socket.socket) -> None:
    pipe.close()
    process.kill()
    process.wait()


def cause_of_death(status: int | None) -> str:
    if status is None or status >= 0:
        return f"its process ended with exit code {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # a real-time signal
        name = f"signal {-status}"
    hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{hint}"


def _exception(told: Any, table: tuple[type[Exception], ...]) -> Exception:
    """What a child's exception becomes here. Raises answer.Refused."""
    name, message, number = _told(told)
    kind = next((k for k in table if k.__name__ == name), None)
    if kind is OSError and number in NUMBERS:
        return OSError(number, message)
    return Failed(f"{name}: {message}") if kind in (None, OSError) else kind(message)


def _told(told: Any) -> tuple[str, str, int]:
    if not (isinstance(told, list) and [type(t) for t in told] == [str, str, int]):
        raise answer.Refused("it sent no exception that can be read")
    name, message, number = told
    printable = "".join(c if c.isprintable() or c == "\n" else " " for c in message)  # no escape sequences
    return "".join(c for c in name if c.isidentifier() or c.isdigit())[:100], printable[:10_000], number


# The child's side ------------------------------------------------------------------------------------


def serve(fd: int, parent: int, max_bytes: int) -> None:
    """Answer calls until the parent goes away."""
    pipe = socket.socket(fileno=fd)
    die_with(parent)
    for stop in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: they are the parent's to handle
        signal.signal(stop, signal.SIG_IGN)
    sys.dont_write_bytecode = True
    if max_bytes:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    sandbox.confine()
    threading.Thread(target=watch_for_hang_up, args=(fd,), daemon=True).start()
    while True:
        try:
            call, function, args, kwargs, interval = _request(pipe)
        except (EOFError, ConnectionError):
            return
        try:
            module, _, name = function.partition(":")
            run = getattr(importlib.import_module(module), name)
            kind, value = answer.RESULT, run(*args, **kwargs, beat=_heartbeat(pipe, call, interval))
        except Exception as e:
            kind, value = answer.RAISED, _named(e)
        try:
            answer.send(pipe, kind, call, value)
        except TypeError as e:  # a result that cannot be said
            answer.send(pipe, answer.RAISED, call, _named(e))
        del value


def _request(pipe: socket.socket) -> Any:
    (size,) = _SIZE.unpack(answer.read(pipe, _SIZE.size))
    return pickle.loads(answer.read(pipe, size))


def _named(e: Exception) -> list[Any]:
    """An exception as its name, message and errno; MemoryError and OSError also where a subclass was raised."""
    number = e.errno if isinstance(e, OSError) and isinstance(e.errno, int) else 0
    kind = next((k for k in RAISED if isinstance(e, k)), type(e))
    message = str(e.strerror if number and isinstance(e, OSError) and e.strerror else e)
    return [kind.__name__, message[:10_000], number]


def _heartbeat(pipe: socket.socket, call: int, interval: float) -> Callable[[], None]:
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= interval:
            last = now
            pipe.sendall(answer.HEAD.pack(answer.BEAT, call, 0))

    return beat


def die_with(parent: int) -> None:
    """Be killed when the parent is gone, even while C code is hanging."""
    if sys.platform == "linux":
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before prctl
        os._exit(0)


def watch_for_hang_up(fd: int) -> None:
    """End this process where there is no prctl, and when a parent that lives has dropped its end."""
    poll = select.poll()
    poll.register(fd, 0)  # no events but hang-up
    poll.poll()
    os._exit(0)
