"""Who is in work and for how long: what the code of a stage tells whoever runs it.

Whoever runs stages puts a `Watch` in place with `watched_by`; without one nothing is watched and nothing is
limited. Imports nothing, so that any file may tell its progress.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

T = TypeVar("T")


class Watch:
    """Watches nothing."""

    def at(self, source: str) -> None:
        """`source` (its uri; '': several at once) is in work from now on."""

    def back_at(self, source: str) -> None:
        """As `at`: the work that was announced is done, and who was in work before is again."""

    def progress(self) -> None:
        """The source in work gets on."""

    def limit(self, seconds: float | None, why: str) -> AbstractContextManager[None]:
        """See `time_limit`."""
        return contextlib.nullcontext()


_watch = Watch()  # one a process
_in_work = ""


def watched_by(watch: Watch | None) -> None:
    """From now on `watch` is told; None: nobody."""
    global _watch
    _watch = watch or Watch()


def at(source: str) -> str:
    """Tell who is in work (a source's uri; '': several at once); returns who was before."""
    global _in_work
    before, _in_work = _in_work, source
    _watch.at(source)
    return before


def back_at(source: str) -> None:
    """Tell that what `at` announced is done; `source`: what it returned."""
    global _in_work
    _in_work = source
    _watch.back_at(source)


def in_work() -> str:
    """The uri of the source in work, for the log; '' where there are several or none."""
    return _in_work


def progress() -> None:
    """Tell that the work gets on: called as often as it likes by what may take minutes for one source."""
    _watch.progress()


def telling(items: Iterable[T]) -> Iterator[T]:
    """The items, each a sign of progress."""
    for item in items:
        progress()
        yield item


def time_limit(seconds: float | None, why: str) -> AbstractContextManager[None]:
    """The block may take so long; None: as long as it likes.

    Beyond that faults.TooLong(why) is raised in it, and where Python cannot (C code that hangs) the process is ended
    and the source in work is at fault.
    """
    return _watch.limit(seconds, why)
