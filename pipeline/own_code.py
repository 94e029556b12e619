"""Code of your own in the mill: a class from a file, what it prints and logs, and where in it something went wrong.

`captions: [{kind: python, captioner: shape.py:Shape}]` and `stages: [{stage: bright.py:Bright}]` name classes;
workers load them from the same path. Everything that they say goes to the logger 'clipmill'.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import io
import logging
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pipeline.faults import Fault, WorkerFault, one_line
from pipeline.recipe_schema import RecipeError, nearest
from pipeline.stages import Resources

log = logging.getLogger("clipmill")
T = TypeVar("T")


# ---------------------------------------------------------------- a class from a file


def load_class(name: str, what: str) -> type:
    """The class that 'package.module:Class' or 'file.py:Class' names.

    Args:
        what: it is to be, for the message: 'captioner' or 'stage'.

    Raises RecipeError: one sentence, with the file's line where the file is at fault.
    """
    where, colon, class_name = name.rpartition(":")
    try:
        if not colon:
            raise ImportError("no class is named")
        module = _file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (Exception, SystemExit) as e:
        log.debug("%s %s", what, name, exc_info=e)
        raise RecipeError(
            f"{what} {name!r} cannot be imported ({reason(e, where)}); write 'file.py:Class' or 'package.module:Class'"
        ) from e
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [
            n for n, c in vars(module).items() if isinstance(c, type) and c.__module__ == module.__name__
        ]
        raise RecipeError(
            f"{what} {name!r}: {where} has no class {class_name!r}{nearest(class_name, classes)}"
        )
    return found


def _file(path: Path) -> ModuleType:
    """A module from a file, read once a process as long as it says the same."""
    text = path.read_bytes()
    name = f"{path.stem}_{hashlib.sha256(str(path.absolute()).encode() + text).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    folder = str(path.absolute().parent)
    if folder not in sys.path:  # for the files beside it; last, so that it hides nothing
        sys.path.append(folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def make(cls: type, name: str, what: str, *args: Any, **options: Any) -> Any:
    """An object of a class from `load_class`. Raises RecipeError where it cannot be made of these options."""
    try:
        return cls(*args, **options)
    except (Exception, SystemExit) as e:
        given = f" with options {options or args[0]}" if options or (args and args[0]) else ""
        raise RecipeError(f"{what} {name!r} cannot be made{given}: {reason(e, file_of(cls))}") from e


def check_resources(thing: Any, said: str) -> Resources:
    """What a worker of it takes. Raises RecipeError."""
    resources = getattr(thing, "resources", Resources())
    if not isinstance(resources, Resources):
        raise RecipeError(f"{said}: its resources are to be a pipeline.stages.Resources, not {resources!r}")
    return resources


def set_up(thing: Any, said: str) -> None:
    """Call its `setup`, where it has one. Raises WorkerFault: without its model a worker is no use."""
    try:
        with heard(f"{said} setup"):
            getattr(thing, "setup", lambda: None)()
    except Fault:
        raise
    except (Exception, SystemExit) as e:
        log.error("%s cannot be set up\n%s", said, trace(e, file_of(thing)))
        raise WorkerFault(f"{said} cannot be set up: {reason(e, file_of(thing))}") from e


# ---------------------------------------------------------------- what it says


class _Lines(io.TextIOBase):
    """What is printed, as records of the log, a line each."""

    def __init__(self, about: str):
        self.about, self.rest = about, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            log.info("%s: %s", self.about, line)
        return len(text)

    def end(self) -> None:
        if self.rest:
            self.write("\n")


class _Forward(logging.Handler):
    """What is logged, as records of the logger 'clipmill'."""

    def __init__(self, about: str):
        super().__init__()
        self.about = about

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.split(".")[0] != log.name:
            log.log(record.levelno, "%s: %s", self.about, record.getMessage(), exc_info=record.exc_info)


@contextlib.contextmanager
def heard(about: str) -> Iterator[None]:
    """What is printed and logged in here goes to the logger 'clipmill', after `about`."""
    lines, handler, root = _Lines(about), _Forward(about), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(min(level, logging.INFO))
    try:
        with contextlib.redirect_stdout(lines):
            yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        lines.end()


# ---------------------------------------------------------------- where it went wrong


def built(name: str, what: str, base: type[T], options: Any) -> T:
    """An object of the class that `name` gives, made with `options`; of that base class, with a name.

    Args:
        what: 'captioner' or 'judge', for messages.

    Raises RecipeError.
    """
    where, cls = f"{what} {name!r}", load_class(name, what)
    if not issubclass(cls, base):
        raise RecipeError(
            f"{where}: {cls.__name__} is not made from {base.__name__}: write class {cls.__name__}({base.__name__}), "
            "from pipeline.captions"
        )
    found: T = make(cls, name, what, options)
    if not (isinstance(getattr(found, "name", None), str) and found.name):  # type: ignore[attr-defined]
        raise RecipeError(f"{where} has no name: give its class one")
    check_resources(found, where)
    return found


def file_of(thing: Any) -> str:
    """The file in which an object's class is written; '' where there is none."""
    try:
        return inspect.getfile(thing if isinstance(thing, type) else type(thing))
    except (TypeError, OSError):
        return ""


def reason(e: BaseException, file: str) -> str:
    """One line: a fault's own words; else type and words, with the line of `file` that it came from."""
    if isinstance(e, Fault):
        return one_line(e)
    if isinstance(e, SyntaxError) and e.filename:
        return f"SyntaxError: {e.msg} at {Path(e.filename).name}:{e.lineno}"
    frames = traceback.extract_tb(e.__traceback__)
    theirs = [f for f in frames if _same(f.filename, file)] or frames[-1:]
    at = f" at {Path(theirs[-1].filename).name}:{theirs[-1].lineno}" if theirs and _shown(e) else ""
    return one_line(f"{type(e).__name__}: {e}{at}")


def trace(e: BaseException, file: str) -> str:
    """The traceback from where it enters `file`; where it never does, the error alone."""
    start = e.__traceback__
    while start is not None and not _same(start.tb_frame.f_code.co_filename, file):
        start = start.tb_next
    return "".join(traceback.format_exception(type(e), e, start, chain=start is not None)).rstrip()


def log_failed(about: str, e: BaseException, file: str) -> None:
    """A failure, to the terminal and the log: a bug of `file` with its traceback; of a fault or an exit that is in the
    log alone."""
    if isinstance(e, Fault | SystemExit):
        log.warning("%s failed: %s", about, reason(e, file))
        log.debug("%s failed\n%s", about, trace(e, file))
    else:
        log.warning("%s failed\n%s", about, trace(e, file))


def a(noun: str) -> str:
    """'an int', 'a list'."""
    return f"{'an' if noun[:1].lower() in tuple('aeiou') else 'a'} {noun}"


def _same(path: str, file: str) -> bool:
    return bool(file) and Path(path).absolute() == Path(file).absolute()


def _shown(e: BaseException) -> bool:
    """Where something is missing the place that missed it says nothing."""
    return not isinstance(e, ImportError | FileNotFoundError)
