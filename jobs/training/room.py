"""Training that ends because its folder cannot be written, however the library in between says so."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

WHY = {
    errno.ENOSPC: "no space is left: make some",
    errno.EDQUOT: "its quota is used up: make room",
    errno.EROFS: "it is read-only: give another --out",
    errno.EACCES: "that is not allowed: give another --out",
    errno.EPERM: "that is not allowed: give another --out",
    errno.EEXIST: "it is a file: give another --out",
    errno.ENOTDIR: "a part of its path is a file: give another --out",
    errno.EIO: "its disk fails: give another --out on one that does not, or mend it",
}
LITTLE = (
    1 << 20
)  # bytes free, of a disk that counts as full where a library says only that it could not write


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raises ValueError, one sentence, in place of what comes of a folder that is full or not to be written."""
    try:
        yield
    except Exception as e:
        if (why := unwritable(e, out)) is None:
            raise
        again = "" if "--out" in why else "; the same command then goes on from the last checkpoint"
        raise ValueError(f"{out} cannot be written, {why}{again}") from e


def unwritable(error: BaseException, out: Path) -> str | None:
    """What of `WHY` it comes from; None of errors that are about something else."""
    for e in causes(error):
        if isinstance(e, OSError) and e.errno in WHY:
            named = Path(str(e.filename)) if e.filename is not None else None
            if named is not None and (named == out or out in named.parents or named in out.parents):
                return WHY[e.errno]
            if named is None and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                return WHY[e.errno]
        elif "No space left on device" in str(e):  # safetensors, TensorBoard
            return WHY[errno.ENOSPC]
        elif isinstance(e, RuntimeError) and any(
            said in str(e) for said in ("PytorchStreamWriter", "unexpected pos")
        ):
            full = out.is_dir() and shutil.disk_usage(out).free < LITTLE
            return WHY[errno.ENOSPC] if full else None
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and all that led to it, those of other ranks that torch's checkpoints gather among them."""
    left, seen = [error], set()
    while left:
        e = left.pop(0)
        if id(e) in seen:
            continue
        seen.add(id(e))
        yield e
        left += [x for x in (e.__cause__, e.__context__) if x is not None]
        left += list(getattr(e, "exceptions", ()))
        left += [failure[0] for failure in getattr(e, "failures", {}).values() if isinstance(failure, tuple)]
