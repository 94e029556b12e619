"""Local folders and globs: which files are taken, with what lies beside them, and which are left out."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import os
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from pipeline.record import Source
from pipeline.sources.kinds import HEAD, LOOKED_FOR, PIECE, UNSURE, VIDEOS, sidecars_of, why_not
from pipeline.sources.names import (
    LISTS,
    SIDECAR_BYTES,
    SIDECARS,
    TAR,
    log,
    sidecar,
    suffix_of,
    uri_of,
)

MAYBE = VIDEOS | UNSURE
Wanted = Callable[[tuple[str, ...]], bool]  # of the parts of a path below its folder


def at_path(path: Path, name: str, beside: Collection[str] | None = None) -> Source:
    """A local file, with what lies beside it; `beside` are the names in its folder, where they are known."""
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError:
        size = None  # fetching it says what is wrong
    meta: dict[str, str] = {}
    if suffix_of(name) in MAYBE:
        if beside is None:
            beside = [path.stem + s for s in SIDECARS if (path.parent / (path.stem + s)).is_file()]
        for other in sidecars_of(path.name, beside):
            data = _start_of(path.parent / other, SIDECAR_BYTES + 1)
            if len(data) <= SIDECAR_BYTES:
                meta |= sidecar(suffix_of(other), data)
            else:
                log.warning("%s: larger than 1 MiB, so not taken as metadata", path.parent / other)
    return Source(uri_of(str(path)), name, meta, size=size)


def _start_of(path: Path, size: int = HEAD) -> bytes:
    """A file's first bytes; none of what is no regular file."""
    with contextlib.suppress(OSError, ValueError):
        if path.is_file():
            with open(path, "rb") as f:
                return f.read(size)
    return b""


def why_none(arg: str, left: Counter[str]) -> str:
    """The sentence for a folder without videos."""
    other = [label for label in left if label == TAR or label in LISTS]
    hint = "".join(f"; to use its {s} files, pass {arg.rstrip('/')}/*{s}" for s in sorted(other))
    return f"{arg}: no videos in this folder{hint} ({LOOKED_FOR})"


def walk(
    root: Path,
    recursive: bool,
    left: Counter[str],
    wanted: Wanted = lambda _: True,
    spelt: str = "",
) -> list[Source]:
    """Videos below a folder whose path (its parts below root) is wanted, sorted by path.

    Hidden files and folders are left out. Linked folders are entered once, and not at all where they
    lead to a place that is visited anyway or back up.

    Args:
        left: counts the files that are wanted and no videos.
        spelt: see `why_not`.
    """
    found: list[Source] = []

    def unreadable(e: OSError) -> None:
        path = Path(os.fsdecode(e.filename))
        uri = uri_of(str(path))
        name = str(path.relative_to(root)) if path != root else path.name
        found.append(Source(uri, name, problem=f"{uri}: cannot look into this folder: {e.strerror}"))

    top = root.resolve()
    entered: set[Path] = set()

    def enter(folder: Path) -> bool:
        if folder.name.startswith("."):
            return False
        if folder.is_symlink():
            real = folder.resolve()
            if real in entered or real.is_relative_to(top) or top.is_relative_to(real):
                return False
            entered.add(real)
        return True

    for at, folders, files in os.walk(root, onerror=unreadable, followlinks=True):
        folder = Path(at)
        folders[:] = [name for name in sorted(folders) if recursive and enter(folder / name)]
        below = folder.relative_to(root).parts
        beside = set(files)
        said = {s for name in files if suffix_of(name) in VIDEOS for s in sidecars_of(name, beside)}
        for name in files:
            if not wanted((*below, name)):
                continue
            if name.startswith("."):
                left["hidden"] += suffix_of(name) in VIDEOS
                continue
            if (why := _why_not(folder / name, beside, spelt)) is None:
                found.append(at_path(folder / name, "/".join((*below, name)), beside))
            elif name not in said:
                left[why] += 1
    return sorted(found, key=lambda f: f.name)


def _why_not(path: Path, beside: Collection[str], spelt: str) -> str | None:
    return why_not(path.name, beside, partial(_start_of, path), spelt)


def glob_files(pattern: str, recursive: bool, left: Counter[str]) -> list[Source]:
    """Local files that match, sorted; a folder that matches stands for its videos."""
    base, rest = fixed(pattern)
    wanted, spelt = matcher(rest)
    if "**" in rest:  # not by the glob module, which runs in circles where links do
        return walk(Path(base), True, left, wanted, spelt)
    found = []
    for match in sorted(map(Path, glob.glob(pattern))):  # noqa: PTH207 (Path.glob takes no absolute pattern)
        name = str(match.relative_to(base))
        if match.is_dir():
            below = walk(match, recursive, left)
            found += [
                Source(f.uri, f"{name}/{f.name}", f.meta, size=f.size, problem=f.problem) for f in below
            ]
            continue
        beside = [p.name for p in match.parent.iterdir()] if PIECE.search(match.name) else []
        if (why := _why_not(match, beside, spelt)) is None:
            found.append(at_path(match, name))
        elif not (suffix_of(name) in SIDECARS and _is_said(match)):
            left[why] += 1
    return found


def _is_said(path: Path) -> bool:
    """Does a .json or .txt lie beside a video?"""
    return any(path.with_suffix(s).exists() for s in VIDEOS)


def fixed(pattern: str) -> tuple[str, list[str]]:
    """The folder before the first wildcard, and the parts of the pattern below it."""
    parts = pattern.split("/")
    n = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base = "/".join(parts[:n]) or ("/" if pattern.startswith("/") else ".")
    return base, [part for part in parts[n:] if part]


def matcher(pattern: list[str]) -> tuple[Wanted, str]:
    """Does a path match the parts of a pattern ('**' stands for any number of folders)?

    And its last part if that spells an extension out ('*.tar', '*.csv'), else ''.
    """
    last = pattern[-1]
    spelt = last if suffix_of(last) and not glob.has_magic(suffix_of(last)) else ""
    if last == "**":
        pattern = [*pattern, "*"]

    def match(parts: tuple[str, ...], wanted: list[str]) -> bool:
        if not wanted or not parts:
            return not wanted and not parts
        if wanted[0] == "**":
            return match(parts, wanted[1:]) or match(parts[1:], wanted)
        return fnmatch.fnmatchcase(parts[0], wanted[0]) and match(parts[1:], wanted[1:])

    return lambda parts: match(parts, pattern), spelt
