"""From SOURCE arguments to the list of sources, and from there to units of work.

A SOURCE is a video file, a folder (its videos, however deep), a glob ('**' for any depth), an http(s) or
YouTube address, an s3:// or gs:// file, prefix or glob, a WebDataset tar of videos, or a list: CSV, TSV,
JSONL or Parquet with a `path` or `url` column, or a .txt with one path or address a line. A list's other
columns are kept as metadata. A `timestamp` column of [start, end] pairs, as in Panda-70M's own CSV, names
the clips: nothing is split then, and a column with one item a clip belongs to the clips.

Listing reads folders, lists and tar headers, never a video. A SOURCE that cannot be listed is a
SourceError; a row of a list or a member of a tar that cannot be used becomes a `Source` with a `problem`,
which turns into an error row when it is fetched.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.faults import SourceFault
from pipeline.record import Source
from pipeline.sources.lists import home, joined, list_rows
from pipeline.sources.names import (
    LISTS,
    TAR,
    UNKNOWN,
    UNREADABLE,
    VIDEOS,
    Found,
    SourceError,
    as_address,
    extensions,
    log,
    name_of,
    object_store,
    path_of,
    scheme_of,
    split_options,
    suffix_of,
    uri_of,
)
from pipeline.sources.tars import videos_of


def list_sources(args: list[str], recursive: bool = True) -> list[Source]:
    """Every source the arguments name, in their order, folders sorted, each uri once.

    `Source.name` is the path below the argument (a file's own name; for a list's row or an address the
    text itself; 'TAR/member'), never absolute and without '..'. Names are unique: sources that would
    share one are named by their uri. Both are valid UTF-8, whatever bytes the file system holds.

    Raises SourceError.
    """
    if not args:
        raise SourceError("no SOURCE given: name a video, a folder, a glob, a list or an address")
    found: dict[str, Source] = {}
    again: list[str] = []
    for arg in args:
        number = 0
        for source in _expand(arg, recursive):
            number += 1
            first = found.setdefault(source.uri, source)
            if first is source:
                continue
            if first.intervals and source.intervals:  # a list with one row a clip
                found[source.uri] = joined(first, source)
            else:
                again.append(source.uri)
        if not number:
            raise SourceError(f"{arg}: the list has no rows; add a path or an address a line")
    if again:
        log.warning("%d sources are listed more than once and taken once, e.g. %s", len(again), again[0])
    sources = list(found.values())
    shared = {name for name, n in Counter(s.name for s in sources).items() if n > 1}
    return (
        [replace(s, name=name_of(s.uri)) if s.name in shared else s for s in sources] if shared else sources
    )


def units(sources: list[Source], max_bytes: int = 64 << 20, max_sources: int = 16) -> list[list[Source]]:
    """Contiguous groups of sources, each committed at once; a source above `max_bytes` stands alone.

    A source of unknown size counts as nothing, so only `max_sources` bounds a group of them.
    """
    groups: list[list[Source]] = []
    filled = 0
    for source in sources:
        size = source.size or 0
        if not groups or len(groups[-1]) == max_sources or filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(source)
        filled += size
    return groups


def unit_name(sources: list[Source]) -> str:
    """16 hex digits from the uris of a group."""
    return hashlib.sha256("\0".join(s.uri for s in sources).encode()).hexdigest()[:16]


def _expand(arg: str, recursive: bool) -> Iterator[Source]:
    """The sources of one argument; none only for a list without rows."""
    scheme = scheme_of(arg)
    if scheme in ("http", "https"):
        found = [Found(as_address(arg), as_address(arg), None)]
    elif scheme in ("s3", "gs", "gcs"):
        found = _objects(arg, recursive)
    elif scheme in ("", "file"):
        found = _local(arg, recursive)
    else:
        raise SourceError(f"{arg}: {UNKNOWN}")
    for f in found:
        try:
            yield from _file(f)
        except SourceFault as e:
            if len(found) == 1:  # there is nothing else in this argument to go on with
                raise SourceError(str(e)) from e
            yield Source(f.uri, name_of(f.name), problem=str(e))


def _file(f: Found) -> Iterator[Source]:
    """One file by its kind: the rows of a list, the members of a tar, or a video."""
    suffix = suffix_of(f.name)
    if suffix == TAR and not f.problem:
        yield from videos_of(f.uri, f.name, {})
    elif suffix in LISTS and not f.problem:
        yield from list_rows(f.uri, suffix)
    elif suffix in UNREADABLE and not f.problem:
        raise SourceError(f"{f.uri}: a {suffix} file is not a video; {UNREADABLE[suffix]}")
    else:
        yield Source(f.uri, name_of(f.name), size=f.size, problem=f.problem)


# Files and folders --------------------------------------------------------------------------------


def _local(arg: str, recursive: bool) -> list[Found]:
    """What a local argument names: a file, a folder's videos, or what a glob matches."""
    path = home(path_of(arg) or arg)
    if path.is_dir():
        found = _walk(path, _is_video, recursive)
        if not found:
            raise SourceError(_no_videos(arg, (p.name for p in path.iterdir())))
        return found
    if os.path.lexists(path):
        return [_at(path, path.name)]
    if not glob.has_magic(str(path)):
        raise SourceError(f"{arg}: no such file or folder; check the path")
    found = _glob(str(path), recursive)
    if not found:
        raise SourceError(f"{arg}: no video matches; check the pattern (looked for {extensions()})")
    return found


def _is_video(parts: tuple[str, ...]) -> bool:
    return suffix_of(parts[-1]) in VIDEOS


def _no_videos(arg: str, names: Iterable[str]) -> str:
    other = Counter(s for s in map(suffix_of, names) if s == TAR or s in LISTS)
    hint = "".join(f"; to use its {s} files, pass {arg.rstrip('/')}/*{s}" for s in sorted(other))
    return f"{arg}: no videos in this folder; looked for {extensions()}{hint}"


def _at(path: Path, name: str) -> Found:
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError:
        size = None  # fetching it says what is wrong
    return Found(uri_of(str(path)), name, size)


def _walk(root: Path, wanted: Callable[[tuple[str, ...]], bool], recursive: bool) -> list[Found]:
    """Files below a folder whose path (its parts below root) is wanted, sorted by path.

    Hidden files and folders are left out. Linked folders are entered once, and not at all where they
    lead to a place that is visited anyway or back up.
    """
    found: list[Found] = []

    def unreadable(e: OSError) -> None:
        path = Path(os.fsdecode(e.filename))
        uri = uri_of(str(path))
        name = str(path.relative_to(root)) if path != root else path.name
        found.append(Found(uri, name, None, f"{uri}: cannot look into this folder: {e.strerror}"))

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
        found += [
            _at(folder / name, "/".join((*below, name)))
            for name in files
            if not name.startswith(".") and wanted((*below, name))
        ]
    return sorted(found, key=lambda f: f.name)


def _glob(pattern: str, recursive: bool) -> list[Found]:
    """Local files that match, sorted; a folder that matches stands for its videos."""
    base, rest = _fixed(pattern)
    if "**" in rest:  # not by the glob module, which runs in circles where links do
        return _walk(Path(base), _matcher(rest), recursive=True)
    found = []
    for match in sorted(map(Path, glob.glob(pattern))):  # noqa: PTH207 (Path.glob takes no absolute pattern)
        name = str(match.relative_to(base))
        if match.is_dir():
            found += [replace(f, name=f"{name}/{f.name}") for f in _walk(match, _is_video, recursive)]
        elif _matcher(rest)(match.relative_to(base).parts):
            found.append(_at(match, name))
    return found


def _fixed(pattern: str) -> tuple[str, list[str]]:
    """The folder before the first wildcard, and the parts of the pattern below it."""
    parts = pattern.split("/")
    n = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base = "/".join(parts[:n]) or ("/" if pattern.startswith("/") else ".")
    return base, [part for part in parts[n:] if part]


def _matcher(pattern: list[str]) -> Callable[[tuple[str, ...]], bool]:
    """Does a path match the parts of a pattern? '**' stands for any number of folders.

    The file must also be a video, unless the pattern spells its extension out ('*.tar', '*.csv').
    """
    spelt = not glob.has_magic(suffix_of(pattern[-1])) and suffix_of(pattern[-1]) != ""
    if pattern[-1] == "**":
        pattern = [*pattern, "*"]

    def match(parts: tuple[str, ...], wanted: list[str]) -> bool:
        if not wanted or not parts:
            return not wanted and not parts
        if wanted[0] == "**":
            return match(parts, wanted[1:]) or match(parts[1:], wanted)
        return fnmatch.fnmatchcase(parts[0], wanted[0]) and match(parts[1:], wanted[1:])

    return lambda parts: match(parts, pattern) and (spelt or _is_video(parts))


# Object stores ------------------------------------------------------------------------------------


def _objects(arg: str, recursive: bool) -> list[Found]:
    """What an s3:// or gs:// argument names: one object, the videos below a prefix, or a glob's matches."""
    arg = as_address(arg)
    fs, key = object_store(arg)
    key = key.rstrip("/")
    scheme, options = scheme_of(arg), split_options(arg)[1]

    def below(base: str, wanted: Callable[[tuple[str, ...]], bool], recursive: bool) -> list[Found]:
        infos = fs.get_file_info(pafs.FileSelector(base, recursive=recursive, allow_not_found=True))
        names = {i.path[len(base) :].strip("/"): i for i in infos if i.is_file}
        return [
            Found(f"{scheme}://{info.path}{options}", name, info.size)
            for name, info in sorted(names.items())
            if wanted(parts := tuple(name.split("/"))) and not any(p.startswith(".") for p in parts)
        ]

    try:
        info = fs.get_file_info(key)
        if info.is_file:
            return [Found(f"{scheme}://{key}{options}", key.rsplit("/", 1)[-1], info.size)]
        if glob.has_magic(key):
            base, rest = _fixed(key)
            found = below(base, _matcher(rest), len(rest) > 1 or rest == ["**"])
            problem = f"{arg}: no video matches; check the pattern (looked for {extensions()})"
        elif info.type == pafs.FileType.NotFound:
            raise SourceError(f"{arg}: no such object or prefix; check the bucket and the key")
        else:
            found = below(key, _is_video, recursive)
            problem = _no_videos(arg, (i.path for i in fs.get_file_info(pafs.FileSelector(key))))
    except (pa.ArrowException, OSError) as e:
        raise SourceError(f"{arg}: cannot be listed: {' '.join(str(e).split())}") from e
    if not found:
        raise SourceError(problem)
    return found
