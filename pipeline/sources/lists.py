"""Lists as sources: CSV, TSV, JSONL, Parquet and text, a row a video or a clip."""

from __future__ import annotations

import ast
import codecs
import csv
import json
import math
import posixpath
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.faults import SourceFault
from pipeline.record import Source
from pipeline.sources.fetch import localised, release
from pipeline.sources.names import (
    TAR,
    SourceError,
    as_address,
    metadata,
    name_of,
    path_of,
    scheme_of,
    split_options,
    suffix_of,
    uri_of,
)
from pipeline.sources.tars import videos_of


def home(path: str) -> Path:
    """'~' and '~/…' in the home folder; '~x' is a file like any other."""
    return Path(path).expanduser() if path == "~" or path.startswith("~/") else Path(path)


# Lists --------------------------------------------------------------------------------------------

Row = dict[str, Any] | str  # the columns, or what is wrong with the row


def list_rows(uri: str, suffix: str) -> Iterator[Source]:
    """The rows of a list. Raises SourceError where none of it can be used."""
    source = Source(uri, uri)
    with localised(source, hash=False) as local:
        for number, row in READERS[suffix](local.path, uri):
            try:
                if isinstance(row, str):
                    raise ValueError(row)
                yield from _row(row, uri)
            except (ValueError, SourceFault) as e:
                where = f"{uri}#{number}"
                yield Source(where, name_of(where), problem=f"{uri}, row {number}: {e}")
    release(source)


def _row(row: dict[str, Any], list_uri: str) -> Iterator[Source]:
    """The source (of a tar: the sources) that a row names. Raises ValueError saying what is wrong with it."""
    value = row.pop("path", None) or row.pop("url", None)
    if not isinstance(value, str) or not value.strip():
        raise ValueError("neither path nor url is given")
    value = as_address(value.strip()) if scheme_of(value.strip()) else value
    uri = _resolve(value, list_uri)
    clips = _clips(row)
    if suffix_of(value) == TAR:
        yield from videos_of(uri, value, metadata(row))
    elif clips is None:
        yield Source(uri, name_of(value), metadata(row))
    else:
        yield Source(uri, name_of(value), metadata(row), tuple(clips), tuple(clips.values()))


def _resolve(value: str, list_uri: str) -> str:
    """The uri of a list's value; a relative path is meant from the list's folder."""
    if scheme_of(value) == "file":
        return uri_of(path_of(value) or "")
    if scheme_of(value):
        return value
    if value.startswith(("/", "~/")):
        return uri_of(str(home(value)))
    if (path := path_of(list_uri)) is not None:
        return uri_of(posixpath.join(posixpath.dirname(path), value))
    if scheme_of(list_uri) in ("http", "https"):
        return as_address(urllib.parse.urljoin(list_uri, value))
    place, options = split_options(list_uri)
    scheme, rest = place.split("://", 1)
    return as_address(
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
        clips.setdefault(time, metadata({c: values[i] for c, values in columns.items()}))
    for column in columns:
        del row[column]
    return clips


def joined(first: Source, more: Source) -> Source:
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


READERS: dict[str, Callable[[str, str], Iterator[tuple[int, Row]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
