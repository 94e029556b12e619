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

import ast
import codecs
import csv
import fnmatch
import glob
import hashlib
import io
import json
import logging
import math
import os
import posixpath
import re
import tarfile
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.record import Source
from pipeline.sources import fetch
from pipeline.stages import StageError

VIDEOS = frozenset(
    ".3g2 .3gp .asf .avi .dv .f4v .flv .ivf .m2ts .m4v .mkv .mov .mp4 "  # noqa: SIM905
    ".mpeg .mpg .mts .mxf .nut .ogv .rm .ts .vob .webm .wmv .wtv .y4m".split()
)
LISTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".txt")
TAR = ".tar"
UNREADABLE = {
    ".json": "write it as JSON Lines, one object a line, and name it .jsonl",
    ".xlsx": "save it as CSV",
    ".gz": "unpack it first",
    ".tgz": "unpack it, or make it a plain .tar",
    ".zst": "unpack it first",
    ".zip": "unpack it first",
}
SIDECAR_BYTES = 1 << 20  # larger .json and .txt members of a tar are not metadata
UNKNOWN = "unknown kind of address; use a path, file://, http(s)://, s3:// or gs://"

log = logging.getLogger("clipmill")


class SourceError(ValueError):
    """A SOURCE argument that names nothing to curate; one sentence with the argument and the fix."""


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
                found[source.uri] = _joined(first, source)
            else:
                again.append(source.uri)
        if not number:
            raise SourceError(f"{arg}: the list has no rows; add a path or an address a line")
    if again:
        log.warning("%d sources are listed more than once and taken once, e.g. %s", len(again), again[0])
    sources = list(found.values())
    shared = {name for name, n in Counter(s.name for s in sources).items() if n > 1}
    return [replace(s, name=_name(s.uri)) if s.name in shared else s for s in sources] if shared else sources


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
    scheme = _scheme(arg)
    if scheme in ("http", "https"):
        found = [_Found(_address(arg), _address(arg), None)]
    elif scheme in ("s3", "gs", "gcs"):
        found = _objects(arg, recursive)
    elif scheme in ("", "file"):
        found = _local(arg, recursive)
    else:
        raise SourceError(f"{arg}: {UNKNOWN}")
    for f in found:
        try:
            yield from _file(f)
        except StageError as e:
            if len(found) == 1:  # there is nothing else in this argument to go on with
                raise SourceError(str(e)) from e
            yield Source(f.uri, _name(f.name), problem=str(e))


@dataclass(frozen=True)
class _Found:
    """A file that was found: its uri, its name below the argument, its size in bytes."""

    uri: str
    name: str
    size: int | None
    problem: str | None = None


def _file(f: _Found) -> Iterator[Source]:
    """One file by its kind: the rows of a list, the members of a tar, or a video."""
    suffix = _suffix(f.name)
    if suffix == TAR and not f.problem:
        yield from _tar(f.uri, f.name, {})
    elif suffix in LISTS and not f.problem:
        yield from _list(f.uri, suffix)
    elif suffix in UNREADABLE and not f.problem:
        raise SourceError(f"{f.uri}: a {suffix} file is not a video; {UNREADABLE[suffix]}")
    else:
        yield Source(f.uri, _name(f.name), size=f.size, problem=f.problem)


# Text ---------------------------------------------------------------------------------------------


def _scheme(text: str) -> str:
    """'http' of 'http://…'; '' of a path."""
    head, colon, _ = text.partition("://")
    return head.lower() if colon and re.fullmatch("[A-Za-z][A-Za-z0-9+.-]*", head) else ""


def _suffix(name: str) -> str:
    """'.mp4', lower case; of an address without its query."""
    if _scheme(name):
        name = re.split("[?#]", name, maxsplit=1)[0]
    return posixpath.splitext(name)[1].lower()


def _text(text: str) -> str:
    """Valid UTF-8: undecodable bytes and lone surrogates become \\udcXX."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _address(text: str) -> str:
    """An address with a lower-case scheme, in valid UTF-8: other bytes as %XX, which is what they mean."""
    text = _scheme(text) + text[text.index("://") :]
    return _text(re.sub("[\udc80-\udcff]", lambda c: f"%{ord(c[0]) & 0xFF:02X}", text))


def _name(text: str) -> str:
    """A source's name: an address as it is, of a path what is below '/' and without '..'."""
    if not _scheme(text):
        text = "/".join(part for part in text.split("/") if part not in ("", ".", ".."))
    return _text(text)


def _extensions() -> str:
    return " ".join(sorted(VIDEOS))


# Files and folders --------------------------------------------------------------------------------


def _local(arg: str, recursive: bool) -> list[_Found]:
    """What a local argument names: a file, a folder's videos, or what a glob matches."""
    path = _home(fetch.path_of(arg) or arg)
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
        raise SourceError(f"{arg}: no video matches; check the pattern (looked for {_extensions()})")
    return found


def _home(path: str) -> Path:
    """'~' and '~/…' in the home folder; '~x' is a file like any other."""
    return Path(path).expanduser() if path == "~" or path.startswith("~/") else Path(path)


def _is_video(parts: tuple[str, ...]) -> bool:
    return _suffix(parts[-1]) in VIDEOS


def _no_videos(arg: str, names: Iterable[str]) -> str:
    other = Counter(s for s in map(_suffix, names) if s == TAR or s in LISTS)
    hint = "".join(f"; to use its {s} files, pass {arg.rstrip('/')}/*{s}" for s in sorted(other))
    return f"{arg}: no videos in this folder; looked for {_extensions()}{hint}"


def _at(path: Path, name: str) -> _Found:
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError:
        size = None  # fetching it says what is wrong
    return _Found(fetch.uri_of(str(path)), name, size)


def _walk(root: Path, wanted: Callable[[tuple[str, ...]], bool], recursive: bool) -> list[_Found]:
    """Files below a folder whose path (its parts below root) is wanted, sorted by path.

    Hidden files and folders are left out. Linked folders are entered once, and not at all where they
    lead to a place that is visited anyway or back up.
    """
    found: list[_Found] = []

    def unreadable(e: OSError) -> None:
        path = Path(os.fsdecode(e.filename))
        uri = fetch.uri_of(str(path))
        name = str(path.relative_to(root)) if path != root else path.name
        found.append(_Found(uri, name, None, f"{uri}: cannot look into this folder: {e.strerror}"))

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


def _glob(pattern: str, recursive: bool) -> list[_Found]:
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
    spelt = not glob.has_magic(_suffix(pattern[-1])) and _suffix(pattern[-1]) != ""
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


def _objects(arg: str, recursive: bool) -> list[_Found]:
    """What an s3:// or gs:// argument names: one object, the videos below a prefix, or a glob's matches."""
    arg = _address(arg)
    fs, key = fetch.object_store(arg)
    key = key.rstrip("/")
    scheme, options = _scheme(arg), fetch.split_options(arg)[1]

    def below(base: str, wanted: Callable[[tuple[str, ...]], bool], recursive: bool) -> list[_Found]:
        infos = fs.get_file_info(pafs.FileSelector(base, recursive=recursive, allow_not_found=True))
        names = {i.path[len(base) :].strip("/"): i for i in infos if i.is_file}
        return [
            _Found(f"{scheme}://{info.path}{options}", name, info.size)
            for name, info in sorted(names.items())
            if wanted(parts := tuple(name.split("/"))) and not any(p.startswith(".") for p in parts)
        ]

    try:
        info = fs.get_file_info(key)
        if info.is_file:
            return [_Found(f"{scheme}://{key}{options}", key.rsplit("/", 1)[-1], info.size)]
        if glob.has_magic(key):
            base, rest = _fixed(key)
            found = below(base, _matcher(rest), len(rest) > 1 or rest == ["**"])
            problem = f"{arg}: no video matches; check the pattern (looked for {_extensions()})"
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


# WebDataset tars ----------------------------------------------------------------------------------


def _tar(uri: str, name: str, meta: dict[str, str]) -> Iterator[Source]:
    """The videos in a tar, each by its byte range, with the .json and .txt of the same key as metadata.

    Of a damaged tar the whole members are listed, then the tar itself with the problem. Raises StageError
    where it cannot be opened or holds no video.
    """
    number = 0
    problem = None
    try:
        with fetch.random_access(uri) as (f, size):
            for videos, sidecar in _samples(f, size):
                for info in videos:
                    number += 1
                    yield Source(
                        uri=fetch.member_uri(uri, info.name),
                        name=_name(f"{name}/{info.name}"),
                        meta=meta | sidecar,
                        size=info.size,
                        member=(info.offset_data, info.size),
                    )
    except (tarfile.TarError, StageError) as e:
        if isinstance(e, StageError) and not number:
            raise
        problem = f"{uri}: damaged tar, {e}; the {number} videos before are used, write the tar anew"
    if problem:
        yield Source(uri, _name(name), meta, problem=problem)
    elif not number:
        raise StageError(f"{uri}: no videos in this tar; looked for {_extensions()}")


def _samples(f: io.BufferedReader, size: int) -> Iterator[tuple[list[tarfile.TarInfo], dict[str, str]]]:
    """Runs of members that share a key (the path up to the first dot of the file's name).

    Gives the videos of each and its metadata. Raises tarfile.TarError after the last whole member.
    """
    key = ""
    videos: list[tarfile.TarInfo] = []
    meta: dict[str, str] = {}
    fault: tarfile.TarError | None = None
    headers = _headers(f, size)
    while True:
        try:
            info = next(headers, None)
        except tarfile.TarError as e:
            fault, info = e, None
        folder, _, file = info.name.rpartition("/") if info else ("", "", "")
        here = f"{folder}/{file.partition('.')[0]}"
        if info is None or here != key:
            if videos:
                yield videos, meta
            key, videos, meta = here, [], {}
        if info is None:
            break
        suffix = _suffix(file)
        if suffix in VIDEOS:
            videos.append(info)
        elif suffix in (".json", ".txt") and info.size <= SIDECAR_BYTES:
            f.seek(info.offset_data)
            text = f.read(info.size).decode("utf-8", "replace")
            meta |= _sidecar(text) if suffix == ".json" else {"caption": text.strip()}
    if fault:
        raise fault


def _headers(f: io.BufferedReader, size: int) -> Iterator[tarfile.TarInfo]:
    """The whole regular members of a tar, hidden ones left out.

    tarfile takes any bytes that are no header for the end, and so a truncated tar for a short one; here
    both raise tarfile.ReadError.
    """
    try:
        with tarfile.open(fileobj=f, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]
                if not 0 <= info.size <= size - info.offset_data:
                    raise tarfile.ReadError(f"cut off inside {_text(info.name)}")
                if info.isreg() and not info.issparse() and not PurePosixPath(info.name).name.startswith("."):
                    yield info
            f.seek(tar.offset)
            end = f.read(tarfile.BLOCKSIZE)
            if not end:
                raise tarfile.ReadError("it ends without an end mark, as if cut off")
            if end.strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except (ValueError, OverflowError) as e:  # numbers in a header that make no sense
        raise tarfile.ReadError(str(e)) from e


def _sidecar(text: str) -> dict[str, str]:
    try:
        values = json.loads(text)
    except ValueError:
        return {"json": text}
    return _meta(values) if isinstance(values, dict) else {"json": text}


# Lists --------------------------------------------------------------------------------------------

Row = dict[str, Any] | str  # the columns, or what is wrong with the row


def _list(uri: str, suffix: str) -> Iterator[Source]:
    """The rows of a list. Raises SourceError where none of it can be used."""
    source = Source(uri, uri)
    with fetch.localised(source, hash=False) as local:
        for number, row in _READERS[suffix](local.path, uri):
            try:
                if isinstance(row, str):
                    raise ValueError(row)
                yield from _row(row, uri)
            except (ValueError, StageError) as e:
                where = f"{uri}#{number}"
                yield Source(where, _name(where), problem=f"{uri}, row {number}: {e}")
    fetch.release(source)


def _row(row: dict[str, Any], list_uri: str) -> Iterator[Source]:
    """The source (of a tar: the sources) that a row names. Raises ValueError saying what is wrong with it."""
    value = row.pop("path", None) or row.pop("url", None)
    if not isinstance(value, str) or not value.strip():
        raise ValueError("neither path nor url is given")
    value = _address(value.strip()) if _scheme(value.strip()) else value
    uri = _resolve(value, list_uri)
    clips = _clips(row)
    if _suffix(value) == TAR:
        yield from _tar(uri, value, _meta(row))
    elif clips is None:
        yield Source(uri, _name(value), _meta(row))
    else:
        yield Source(uri, _name(value), _meta(row), tuple(clips), tuple(clips.values()))


def _resolve(value: str, list_uri: str) -> str:
    """The uri of a list's value; a relative path is meant from the list's folder."""
    if _scheme(value) == "file":
        return fetch.uri_of(fetch.path_of(value) or "")
    if _scheme(value):
        return value
    if value.startswith(("/", "~/")):
        return fetch.uri_of(str(_home(value)))
    if (path := fetch.path_of(list_uri)) is not None:
        return fetch.uri_of(posixpath.join(posixpath.dirname(path), value))
    if _scheme(list_uri) in ("http", "https"):
        return _address(urllib.parse.urljoin(list_uri, value))
    place, options = fetch.split_options(list_uri)
    scheme, rest = place.split("://", 1)
    return _address(
        f"{scheme}://{posixpath.normpath(posixpath.join(posixpath.dirname(rest), value))}{options}"
    )


def _clips(row: dict[str, Any]) -> dict[tuple[float, float], dict[str, str]] | None:
    """Given clips (start, end), seconds, and the metadata of each; None where the row gives none.

    The `timestamp` column holds a list of [start, end] pairs, and columns with as many items belong to
    the clips; or it holds one pair, and then the whole row belongs to that clip. What is used is taken
    out of the row. A `timestamp` that is no list is metadata. Raises ValueError.
    """
    pairs = _listed(row.get("timestamp"))
    if pairs is None:
        if str(row.get("timestamp", "")).startswith("["):
            raise ValueError("timestamp is not a list of [start, end] pairs")
        return None
    del row["timestamp"]
    one = len(pairs) == 2 and not any(isinstance(p, list | tuple) for p in pairs)
    try:
        times = [(_seconds(a), _seconds(b)) for a, b in ([pairs] if one else pairs)]
    except (ValueError, TypeError) as e:
        raise ValueError(f"timestamp is not a list of [start, end] pairs: {e}") from e
    if not times or not all(0 <= a < b < math.inf for a, b in times):
        raise ValueError("timestamp has a clip that does not end after its start, or none")
    columns = {c: [v] for c, v in row.items()} if one else {}
    for column, value in () if one else row.items():
        listed = _listed(value)
        if listed is not None and len(listed) == len(times):
            columns[column] = listed
    clips: dict[tuple[float, float], dict[str, str]] = {}
    for i, time in enumerate(times):
        clips.setdefault(time, _meta({c: values[i] for c, values in columns.items()}))
    for column in columns:
        del row[column]
    return clips


def _joined(first: Source, more: Source) -> Source:
    """One source with the clips of both."""
    new = dict(zip(more.intervals or (), more.interval_meta, strict=True))
    clips = dict(zip(first.intervals or (), first.interval_meta, strict=True))
    clips |= {time: meta for time, meta in new.items() if time not in clips}
    return replace(first, intervals=tuple(clips), interval_meta=tuple(clips.values()))


def _listed(value: Any) -> list[Any] | None:
    """A list, also one written as a Python literal, as in Panda-70M's CSV; None for anything else."""
    if isinstance(value, str) and value.startswith("["):
        # where every ' delimits a string this is JSON but for the quotes, and read ten times as fast
        plain = '"' not in value and "\\" not in value
        try:
            value = json.loads(value.replace("'", '"') if plain else value)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                return None
    return list(value) if isinstance(value, list | tuple) else None


def _seconds(value: Any) -> float:
    """12.5, '12.5', '1:02.5' or '0:01:02.5' in seconds."""
    total = 0.0
    for part in str(value).split(":"):
        total = total * 60 + float(part)
    return total


def _meta(columns: dict[str, Any]) -> dict[str, str]:
    """Columns as text: numbers and nested values as JSON, empty ones left out."""
    meta = {}
    for name, value in columns.items():
        if value is None or value == "" or isinstance(value, bytes):
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        meta[_text(name)] = _text(text)
    return meta


def _columns(names: list[str], uri: str) -> list[str]:
    """Column names, those that mean something here in lower case. Raises SourceError."""
    names = [n.strip().lower() if n.strip().lower() in ("path", "url", "timestamp") else n for n in names]
    if "path" not in names and "url" not in names:
        shown = ", ".join(repr(n[:40]) for n in names[:8]) or "none"
        raise SourceError(f"{uri}: a list needs a column named path or url; its columns are {shown}")
    return names


def _lines(path: str) -> TextIO:
    """A text list, opened; UTF-8 or, where its first bytes say so, UTF-16. Other bytes are kept as they are."""
    with open(path, "rb") as f:
        wide = f.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return open(path, encoding="utf-16" if wide else "utf-8-sig", errors="surrogateescape", newline="")


def _read_csv(path: str, uri: str, delimiter: str = ",") -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(1 << 30)  # of one video's captions; the default is 128 KiB
    with _lines(path) as f:
        rows = csv.reader(f, delimiter=delimiter, strict=True)
        columns: list[str] | None = None
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as e:
                if columns is None:
                    raise SourceError(f"{uri}: its first line is no header: {e}") from e
                yield rows.line_num, f"not well quoted: {e}"
                continue
            if columns is None:
                columns = _columns(row, uri)
            elif len(row) > len(columns):
                yield rows.line_num, f"{len(row)} fields where the header has {len(columns)}; quote them"
            elif row:
                yield rows.line_num, dict(zip(columns, row, strict=False))


def _read_tsv(path: str, uri: str) -> Iterator[tuple[int, Row]]:
    return _read_csv(path, uri, "\t")


def _read_jsonl(path: str, uri: str) -> Iterator[tuple[int, Row]]:
    known = False
    with _lines(path) as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                yield number, f"not JSON: {e}"
                continue
            if not isinstance(row, dict):
                yield number, "not a JSON object"
                continue
            if not known:
                _columns(list(row), uri)
                known = True
            yield number, {k.lower() if k.lower() in ("path", "url", "timestamp") else k: row[k] for k in row}


def _read_parquet(path: str, uri: str) -> Iterator[tuple[int, Row]]:
    try:
        file = pq.ParquetFile(path)
        plain = [f.name for f in file.schema_arrow if not _holds_bytes(f.type)]
        columns = _columns(plain, uri)
        number = 0
        for batch in file.iter_batches(batch_size=4096, columns=plain):
            for values in batch.to_pylist():
                number += 1
                yield number, dict(zip(columns, values.values(), strict=True))
    except (pa.ArrowException, OSError) as e:
        raise SourceError(f"{uri}: not readable as Parquet: {' '.join(str(e).split())}") from e


def _holds_bytes(kind: pa.DataType) -> bool:
    """Pictures and videos stored in the table are not metadata."""
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    )


def _read_txt(path: str, uri: str) -> Iterator[tuple[int, Row]]:
    with _lines(path) as f:
        for number, line in enumerate(f, 1):
            line = line.strip()
            if line and not line.startswith("#"):
                yield number, {"path": line}


_READERS: dict[str, Callable[[str, str], Iterator[tuple[int, Row]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
