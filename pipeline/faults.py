"""Kinds of fault: whose fault it is decides what happens.

| kind | whose fault | what happens |
|---|---|---|
| SourceFault | this video | its row says error, stage, sentence; the others go on |
| ClipFault | this clip, this captioner or score | kept with the clip, retried by `--retry-errors`; the others go on |
| WorkerFault | this process or node | the worker is replaced, its work goes back; many in a row end the run |
| TransientFault | the moment | tried again a few times with growing waits, then a SourceFault or StoreError |
| StoreError | the output | the run ends with one sentence; what is done is kept |

They are raised where the fault is known. `kind_of` says the kind of any other exception; `pipeline.stages`
and `pipeline.run` are the only places that act on it. The message of each is one sentence: what, why, the fix.
"""

from __future__ import annotations

import errno


class Fault(Exception):
    """Trouble whose kind is known.

    Args:
        stage: of the row, where it is not the stage that was running ('list', 'fetch').
        tried: waits and further tries lie behind it, more of them now are no use.
    """

    kind = "fault"

    def __init__(self, *args: object, stage: str = "", tried: bool = False):
        super().__init__(*args)
        self.stage, self.tried = stage, tried


class SourceFault(Fault):
    """A video that cannot be used; becomes its error row."""

    kind = "source"


class ClipFault(Fault):
    """A clip that one captioner or score cannot do; kept with the clip."""

    kind = "clip"


class OutOfTime(SourceFault):
    """A video that takes longer than the recipe's limits; raised in the midst of the work on it.

    Args:
        source: its uri; '': it is one of several that were in work at once.
    """

    def __init__(self, message: str, source: str):
        super().__init__(message)
        self.source = source


class TooLong(ClipFault):
    """A clip, or a batch of them, that takes longer than the recipe's limits."""


class WorkerFault(Fault):
    """This process or machine cannot go on (GPU lost, scratch full, no network); no video's fault."""

    kind = "worker"


class TransientFault(Fault):
    """The moment's fault (a 503, an I/O error): may well work when tried again."""

    kind = "transient"


class StoreError(Fault):
    """The output, or a folder that is read, is at fault: ends the run, never a video's error row."""

    kind = "output"


MOMENTARY = {
    *(errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.EPIPE),
    *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.EREMOTEIO),
}
EXHAUSTED = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EROFS}
LOST_GPU = ("CUDA error", "CUDNN_STATUS_EXECUTION_FAILED", "CUBLAS_STATUS_EXECUTION_FAILED")


def kind_of(e: BaseException) -> type[Fault]:
    """The kind of an exception that somebody else raised; what nobody knows is the video's fault."""
    if isinstance(e, Fault):
        return type(e)
    if isinstance(e, OSError) and e.errno in EXHAUSTED:
        return WorkerFault
    if isinstance(e, ConnectionError | TimeoutError) or (isinstance(e, OSError) and e.errno in MOMENTARY):
        return TransientFault
    if isinstance(e, RuntimeError) and str(e).startswith(LOST_GPU):
        return WorkerFault  # no call on that device works any more (out of memory is no such error)
    return SourceFault


def how_to_go_on(why: str) -> str:
    """Why a run stopped, with how to go on; said once, where the sentence itself says it already."""
    command, kept = "run the same command again", "finished work is kept"
    if kept in why:
        return why
    if why.endswith(command):
        return f"{why}, {kept}"
    return f"{why}; {kept}" if command in why else f"{why}; {command}, {kept}"


def counted(n: int, what: str) -> str:
    """'1 clip', '2,000 clips'."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def one_line(said: object) -> str:
    """Its text, with every run of white space and line ends made one space."""
    return " ".join(str(said).split())


def sentence(e: BaseException) -> str:
    """One line: a fault's own words; of a bug its type, words, file and line."""
    if isinstance(e, Fault):
        return one_line(e)
    at, frame = "", e.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is not None:
        at = f" at {frame.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.tb_lineno}"
    return one_line(f"{type(e).__name__}: {e}{at}")
