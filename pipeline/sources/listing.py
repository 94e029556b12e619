"""From SOURCE arguments to the list of sources, and from there to units of work.

A SOURCE is a video file, a folder (its videos, however deep), a glob ('**' for any depth), an http(s) or
YouTube address, an s3:// or gs:// file, prefix or glob, a WebDataset tar of videos, or a list: CSV, TSV,
JSONL or Parquet with a `path` or `url` column, or a .txt with one path or address a line. A list's other
columns are kept as metadata, as is what lies beside a local video or in its tar under the same name (.json, .txt).
Columns `start` and `end` make a clip of each row; a `timestamp` column of [start, end] pairs, as in Panda-70M's
own CSV, names several. Nothing is split then; a column with one item a clip belongs to the clips.

Listing reads folders, lists, tar headers and what lies beside a video, of a video at most the first bytes (where
its name does not say what it is). What it leaves out it tells, with counts. A SOURCE that cannot be listed is a
SourceError; a row of a list or a member of a tar that cannot be used becomes a `Source` with a `problem`,
which turns into an error row when it is fetched.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.faults import SourceFault, TransientFault, WorkerFault, one_line
from pipeline.record import Source
from pipeline.sources import network
from pipeline.sources.folders import at_path, fixed, glob_files, matcher, walk, why_none
from pipeline.sources.kinds import LOOKED_FOR, counted, why_not
from pipeline.sources.lists import home, joined, list_rows
from pipeline.sources.names import (
    LISTS,
    TAR,
    UNKNOWN,
    UNREADABLE,
    SourceError,
    as_address,
    located,
    log,
    name_of,
    number_of,
    object_store,
    path_of,
    scheme_of,
    suffix_of,
)
from pipeline.sources.signed import clean, redacted, split_options
from pipeline.sources.tars import videos_of


def list_sources(
    args: list[str], recursive: bool = True, columns: dict[str, str] | None = None
) -> list[Source]:
    """Every source the arguments name, in their order, folders sorted, each uri once.

    Args:
        columns: of lists, what to call some of them: {'my_col': 'path', 'text': 'caption'}.

    `Source.name` is the path below the argument (a file's own name; for a list's row or an address the
    text itself; 'TAR/member'), never absolute and without '..'. Names are unique: sources that would
    share one are named by their uri. Both are valid UTF-8, whatever bytes the file system holds.

    Raises SourceError.
    """
    if not args:
        raise SourceError("no SOURCE given: name a video, a folder, a glob, a list or an address")
    found: dict[str, list[Source]] = {}
    again: list[str] = []
    resigned: list[str] = []
    for arg in args:
        number = 0
        for source in _expand(arg, recursive, columns or {}):
            number += 1
            parts = found.setdefault(source.uri, [])
            if not parts or (parts[0].intervals and source.intervals):  # a list with one row a clip
                parts.append(source)
            elif parts[0].address != source.address:
                resigned.append(source.uri)
            else:
                again.append(source.uri)
        if not number:
            raise SourceError(f"{clean(arg)}: the list has no rows; add a path or an address a line")
    if again:
        log.warning("%s listed more than once and taken once, e.g. %s", _are(again), again[0])
    if resigned:
        log.warning(
            "%s listed again with another signature or token in the address and taken once, e.g. %s",
            _are(resigned),
            resigned[0],
        )
    sources = [joined(parts) for parts in found.values()]
    shared = {name for name, n in Counter(s.name for s in sources).items() if n > 1}
    return (
        [replace(s, name=name_of(s.uri)) if s.name in shared else s for s in sources] if shared else sources
    )


def _are(uris: list[str]) -> str:
    return f"{number_of(len(uris), 'source')} {'is' if len(uris) == 1 else 'are'}"


UNKNOWN_BYTES = 16 << 20  # a guess at a source of unknown size: a minute of 720p


def units(
    sources: list[Source], max_bytes: int = 64 << 20, max_sources: int = 16, short: int = 16
) -> list[list[Source]]:
    """Contiguous groups of sources, each committed at once; a source above `max_bytes` stands alone.

    A source of unknown size counts as UNKNOWN_BYTES. How long sources are shows only when they are decoded: see
    `pipeline.run.chunks` for units that turn out long.

    Args:
        short: from so many sources on a group holds no more than SHORT_S seconds, as far as sizes tell.
    """
    groups: list[list[Source]] = []
    filled = seconds = 0.0
    for source in sources:
        size = UNKNOWN_BYTES if source.size is None else source.size
        long = _seconds(source)
        full = bool(groups) and len(groups[-1]) >= short and seconds + long > SHORT_S
        if not groups or len(groups[-1]) == max_sources or filled + size > max_bytes or full:
            groups.append([])
            filled = seconds = 0.0
        groups[-1].append(source)
        filled, seconds = filled + size, seconds + long
    return groups


SHORT_S = 60.0


def _seconds(source: Source) -> float:
    """A guess at how much of a source becomes clips: its given intervals, or its bytes at a minute of 720p's."""
    bytes_ = source.bytes
    whole = 60.0 * (UNKNOWN_BYTES if bytes_ is None else bytes_) / UNKNOWN_BYTES
    return whole if source.intervals is None else min(whole, sum(b - a for a, b in source.intervals))


def unit_name(sources: list[Source]) -> str:
    """16 hex digits from the uris of a group."""
    return hashlib.sha256("\0".join(s.uri for s in sources).encode()).hexdigest()[:16]


def _expand(arg: str, recursive: bool, columns: dict[str, str]) -> Iterator[Source]:
    """The sources of one argument; none only for a list without rows."""
    scheme = scheme_of(arg)
    reach = network.ANY if network.allowed_by_environment() else network.HOST  # a person typed it
    if scheme in ("http", "https"):
        found = [located(as_address(arg), reach=reach)]
    elif scheme in ("s3", "gs", "gcs"):
        found = _objects(as_address(arg), recursive, reach)
    elif scheme in ("", "file"):
        found = _local(arg, recursive)
    else:
        raise SourceError(f"{clean(arg)}: {UNKNOWN}")
    for f in found:
        try:
            yield from _file(f, columns)
        except WorkerFault as e:
            raise SourceError(str(e)) from e
        except (SourceFault, TransientFault) as e:
            if len(found) == 1:  # there is nothing else in this argument to go on with
                raise SourceError(str(e)) from e
            passing = isinstance(e, TransientFault)
            yield replace(f, name=name_of(f.name), size=None, problem=str(e), passing=passing)


def _file(f: Source, columns: dict[str, str]) -> Iterator[Source]:
    """One file by its kind: the rows of a list, the members of a tar, or a video."""
    suffix = suffix_of(f.name)
    if suffix == TAR and not f.problem:
        yield from videos_of(f)
    elif suffix in LISTS and not f.problem:
        yield from list_rows(f, suffix, columns)
    elif suffix in UNREADABLE and not f.problem:
        raise SourceError(f"{f.uri}: a {suffix} file is not a video; {UNREADABLE[suffix]}")
    else:
        yield replace(f, name=name_of(f.name))


def _tell(arg: str, taken: int, left: Counter[str]) -> None:
    if n := left.total():
        found, others = number_of(taken, "video"), number_of(n, "other file")
        log.warning("%s: %s; left out %s: %s", clean(arg), found, others, counted(left))


def _local(arg: str, recursive: bool) -> list[Source]:
    """What a local argument names: a file, a folder's videos, or what a glob matches."""
    path = home(path_of(arg) or arg)
    left: Counter[str] = Counter()
    if path.is_dir():
        found = walk(path, recursive, left)
        if not found:
            raise SourceError(why_none(arg, left))
    elif os.path.lexists(path):
        return [at_path(path, path.name)]
    elif not glob.has_magic(str(path)):
        raise SourceError(f"{arg}: no such file or folder; check the path")
    else:
        found = glob_files(str(path), recursive, left)
        if not found:
            raise SourceError(f"{arg}: no video matches; check the pattern ({LOOKED_FOR})")
    _tell(arg, len(found), left)
    return found


def _objects(arg: str, recursive: bool, reach: str) -> list[Source]:
    """What an s3:// or gs:// argument names: one object, the videos below a prefix, or a glob's matches."""
    try:
        fs, key = object_store(arg, reach)
    except SourceFault as e:
        raise SourceError(str(e)) from e
    key = key.rstrip("/")
    place, options = split_options(arg)
    scheme, rest = place.split("://", 1)
    login = rest.split("/")[0].rpartition("@")[:2]
    left: Counter[str] = Counter()

    def at(path: str, name: str, size: int | None) -> Source:
        return replace(located(f"{scheme}://{''.join(login)}{path}{options}", name, reach), size=size)

    def below(base: str, wanted: Callable[[tuple[str, ...]], bool], recursive: bool) -> list[Source]:
        infos = fs.get_file_info(pafs.FileSelector(base, recursive=recursive, allow_not_found=True))
        names = {i.path[len(base) :].strip("/"): i for i in infos if i.is_file}
        beside: dict[str, set[str]] = {}
        for name in names:
            folder, _, file = name.rpartition("/")
            beside.setdefault(folder, set()).add(file)
        found = []
        for name, info in sorted(names.items()):
            folder, _, file = name.rpartition("/")
            parts = tuple(name.split("/"))
            if any(p.startswith(".") for p in parts) or not wanted(parts):
                continue
            why = why_not(file, beside[folder], spelt=spelt)
            if why is None:
                found.append(at(info.path, name, info.size))
            else:
                left[why] += 1
        return found

    try:
        info = fs.get_file_info(key)
        if info.is_file:
            return [at(key, key.rsplit("/", 1)[-1], info.size)]
        if glob.has_magic(key):
            base, pattern = fixed(key)
            wanted, spelt = matcher(pattern)
            found = below(base, wanted, len(pattern) > 1 or pattern == ["**"])
            problem = f"{clean(arg)}: no video matches; check the pattern ({LOOKED_FOR})"
        elif info.type == pafs.FileType.NotFound:
            raise SourceError(f"{clean(arg)}: no such object or prefix; check the bucket and the key")
        else:
            spelt = ""
            found = below(key, lambda _: True, recursive)
            problem = why_none(clean(arg), left)
    except (pa.ArrowException, OSError) as e:
        said = redacted(one_line(e), arg)
        raise SourceError(f"{clean(arg)}: cannot be listed: {said}") from None
    if not found:
        raise SourceError(problem)
    _tell(arg, len(found), left)
    return found
