"""What a run says while it works: warnings on the terminal, everything in a file beside the output.

Every process of a run writes the records of the logger 'clipmill' to one file, a line a record with the
source that was in work. For an output on a local disk that is `run.log` there, appended to by every run; for
one on an object store a temporary file that becomes `log/<start>.log` when the run ends. Workers on other
machines find the file where they share the output's path, and are silent where they do not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from pipeline.faults import StoreError, sentence
from pipeline.io.store import Store
from pipeline.sources.signed import clean_text
from pipeline.watch import in_work

FILE, VERBOSE = "CLIPMILL_LOG", "CLIPMILL_VERBOSE"  # how the processes of a run know; read by `attach`
SHOWN = 3  # warnings of one kind on the terminal
TOLD = {"told": True}  # `extra` of a record that is printed anyway
log = logging.getLogger("clipmill")

# outside addresses: options of code of one's own, on a command line
SECRETS = re.compile(r"(?i)\b(\w*(?:token|api_?key|password|secret)=)[^\s&'\",}]+")


def without_secrets(text: str) -> str:
    """A text whose addresses have no signature, key or password left."""
    return SECRETS.sub(r"\1…", clean_text(text))


class _Line(logging.Formatter):
    """time level pid [source] message, on one line but for tracebacks, and without secrets."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        source = in_work()
        at = self.formatTime(record, "%Y-%m-%dT%H:%M:%SZ")
        head = f"{at} {record.levelname} {os.getpid()}" + (f" [{source}]" if source else "")
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return without_secrets(f"{head} {text}")


class _File(logging.FileHandler):
    """Appends to the run's log; that it cannot (a full disk) is no reason to stop."""

    def __init__(self, path: str):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(_Line())

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: whoever writes the output meets the same trouble and tells it."""


class _Terminal(logging.Handler):
    """The message alone, to whatever stderr is now (a live display puts its own there).

    Args:
        most: messages of one kind that are shown; the rest are in the file.
    """

    def __init__(self, level: int, most: int | None):
        super().__init__(level)
        self.most, self.shown = most, Counter[str]()

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "told", False):
            self.show(str(record.msg), record)

    def show(self, kind: str, record: logging.LogRecord) -> None:
        self.shown[kind] += 1
        times = self.shown[kind]
        if self.most is None or times <= self.most:
            text = without_secrets(record.getMessage())
        elif times == self.most + 1:
            text = "… and more of that kind, see the log"
        else:
            return
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr)


def attach() -> None:
    """Let this process, a worker, write to the run's log file; nothing where it is in none or cannot."""
    path = os.environ.get(FILE)
    if not path or any(getattr(h, "baseFilename", None) == path for h in log.handlers):
        return
    with contextlib.suppress(OSError):
        _listen(_File(path))


def heard(level: int, kind: str, text: str) -> None:
    """A warning of a worker beside this process, that is in the file already: on the terminal too."""
    record = logging.LogRecord(log.name, level, "", 0, text, None, None)
    for handler in log.handlers:
        if isinstance(handler, _Terminal) and handler.most is not None:
            handler.show(kind, record)


def _listen(handler: logging.Handler) -> None:
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False


@contextlib.contextmanager
def logging_to(store: Store, verbose: bool = False) -> Iterator[str]:
    """Log this run for the length of the block, and why it ends early; gives the name of its log in the output.

    Args:
        verbose: everything goes to the terminal too, also what workers write into the file.
    """
    name = "run.log" if store.local else time.strftime("log/%Y%m%dT%H%M%SZ.log", time.gmtime())
    folder = None if store.local else tempfile.TemporaryDirectory(prefix="clipmill-log-")
    path = store.path(name) if folder is None else f"{folder.name}/run.log"
    terminal = _Terminal(logging.DEBUG, None) if verbose else _Terminal(logging.WARNING, SHOWN)
    before = log.level, log.propagate
    try:
        file = _File(path)
    except OSError as e:
        raise StoreError(
            f"cannot write {path}: {e.strerror}; choose an output folder you may write to"
        ) from e
    _listen(file)
    _listen(terminal)
    os.environ[FILE] = path
    if verbose:
        os.environ[VERBOSE] = "1"
    try:
        with _followed(path) if verbose else contextlib.nullcontext():
            yield name
    except BaseException as e:
        stopped = (
            f"stopped by {str(e) or 'Ctrl-C'}"
            if isinstance(e, KeyboardInterrupt)
            else f"ended: {sentence(e)}"
        )
        log.error("%s", stopped, extra=TOLD)
        raise
    finally:
        for key in (FILE, VERBOSE):
            os.environ.pop(key, None)
        for handler in (file, terminal):
            log.removeHandler(handler)
            handler.close()
        log.setLevel(before[0])
        log.propagate = before[1]
        if folder is not None:
            with contextlib.suppress(OSError, StoreError), folder:  # a run does not fail for its log
                store.write_bytes(name, Path(path).read_bytes())


@contextlib.contextmanager
def _followed(path: str) -> Iterator[None]:
    """Show what other processes append to a file on stderr, for the length of the block."""
    stop = threading.Event()
    with open(path, encoding="utf-8", errors="replace") as f:
        f.seek(0, os.SEEK_END)
        thread = threading.Thread(target=_follow, args=(f, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _follow(f: TextIO, stop: threading.Event) -> None:
    ours, theirs = f" {os.getpid()} ", False
    while True:
        last = stop.is_set()
        for line in f.readlines():
            if re.match(r"\d{4}-\d\d-\d\dT", line):
                theirs = ours not in line[:48]
            if theirs:
                print(line, end="", file=sys.stderr)
        if last:
            return
        stop.wait(0.3)
