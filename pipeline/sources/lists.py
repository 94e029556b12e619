"""Lists as sources: CSV, TSV, JSONL, Parquet and text, a row a video or a clip."""

from __future__ import annotations

import codecs
import csv
import json
import os
import posixpath
import re
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.faults import SourceFault, TransientFault
from pipeline.record import Source
from pipeline.sources import network
from pipeline.sources.columns import Columns, clips_of, columns_of, described, tell_unused
from pipeline.sources.fetch import localised, release
from pipeline.sources.names import (
    TAR,
    SourceError,
    as_address,
    located,
    log,
    name_of,
    number_of,
    path_of,
    place_of,
    scheme_of,
    suffix_of,
    uri_of,
    windows,
)
from pipeline.sources.signed import clean, clean_text, split_options
from pipeline.sources.tars import videos_of


def home(path: str) -> Path:
    """'~' and '~/…' in the home folder; '~x' is a file like any other."""
    return Path(path).expanduser() if path == "~" or path.startswith("~/") else Path(path)


# Lists --------------------------------------------------------------------------------------------

Row = dict[str, Any] | str  # the columns, or what is wrong with the row


@dataclass
class _Reading:
    """One list while it is read, and what there is to tell of it."""

    uri: str
    renames: dict[str, str]
    columns: Columns | None = None
    guessed: int = 0  # cells that are not UTF-8
    known: dict[tuple[str, ...], Columns] = field(default_factory=dict)

    def head(self, names: list[str]) -> Columns:
        """The columns of the rows to come. Raises SourceError, for the first rows."""
        key = tuple(names)
        if key not in self.known:
            try:
                self.known[key] = columns_of([self.text(n) for n in names], self.uri, self.renames)
            except SourceError:
                if self.columns is None:
                    raise
                self.known[key] = Columns(list(names), None)
            if self.columns is None:
                tell_unused(self.known[key], self.uri)
        self.columns = self.known[key]
        return self.columns

    def text(self, value: str) -> str:
        """A cell; what is not UTF-8 is taken for Windows-1252."""
        if value.isascii() or not re.search("[\udc80-\udcff]", value):
            return value
        try:
            data = value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # JSON can hold other halves of letters
            return value
        self.guessed += 1
        return windows(data)


def list_rows(source: Source, suffix: str, renames: dict[str, str] | None = None) -> Iterator[Source]:
    """The rows of a list. Raises SourceError where none of it can be used."""
    reading = _Reading(source.uri, renames or {})
    bad, first = 0, ""
    try:
        with localised(source, hash=False) as local:
            for number, row in READERS[suffix](local.path, reading):
                try:
                    if isinstance(row, str):
                        raise ValueError(row)
                    yield from _row(row, source, reading)
                except (ValueError, SourceFault, TransientFault) as e:
                    where, said = f"{source.uri}#{number}", clean_text(str(e))
                    problem = f"{source.uri}, row {number}: {said}"
                    bad, first = bad + 1, first or f"row {number}: {said}"
                    passing = isinstance(e, TransientFault)
                    name = name_of(f"{source.name}#{number}")
                    yield Source(where, name, problem=problem, passing=passing)
    except OSError as e:
        raise SourceError(f"{source.uri}: cannot be read: {e.strerror or e}") from e
    except UnicodeError as e:
        raise SourceError(f"{source.uri}: not well encoded ({e}); save it as UTF-8") from e
    finally:
        release(source)
    if bad:
        become = "becomes an error:" if bad == 1 else "become errors, e.g."
        log.warning("%s: %s cannot be used and %s %s", source.uri, number_of(bad, "row"), become, first)
    if reading.guessed:
        log.warning(
            "%s: not in UTF-8: %s taken for Windows-1252 (Latin-1); save it as UTF-8 if that is wrong",
            source.uri,
            f"{number_of(reading.guessed, 'cell')} {'was' if reading.guessed == 1 else 'were'}",
        )


def _row(row: dict[str, Any], at: Source, reading: _Reading) -> Iterator[Source]:
    """The source (of a tar: the sources) that a row of the list `at` names. Raises ValueError: what is wrong."""
    value = row.pop("path", None) or row.pop("url", None)
    if not isinstance(value, str) or not value.strip():
        raise ValueError("neither path nor url is given")
    row = {k: reading.text(v) if isinstance(v, str) else v for k, v in row.items()}
    value = as_address(value.strip()) if scheme_of(value.strip()) else value
    source = _resolve(value, at, reading)
    clips = clips_of(row, reading.columns.pair if reading.columns else None)
    source = replace(source, meta=described(row))
    if suffix_of(value) == TAR:
        yield from videos_of(source)
    elif clips is None:
        yield replace(source, name=name_of(source.name))
    else:
        times, meta = tuple(clips), tuple(clips.values())
        yield replace(source, name=name_of(source.name), intervals=times, interval_meta=meta)


def _resolve(value: str, at: Source, reading: _Reading) -> Source:
    """What a list's value names; a relative path is meant from the list's folder.

    A list from elsewhere cannot name files of this machine. Raises ValueError.
    """
    scheme = scheme_of(value)
    if scheme not in ("", "file"):
        return located(value, reach=_reach(network.PUBLIC))
    base = place_of(at)
    folder = path_of(base)
    if folder is not None:
        folder = posixpath.dirname(folder)
        if scheme == "file":
            return Source(uri_of(path_of(value) or ""), value)
        value = _existing(value, folder, reading)
        return Source(uri_of(posixpath.join(folder, str(home(value)))), value)
    web = scheme_of(base) in ("http", "https")
    if scheme == "file" or value.startswith("~/") or (value.startswith("/") and not web):
        raise ValueError(
            f"{value}: a list from elsewhere cannot name files of this machine; download the list and give its path"
        )
    value = reading.text(value)
    if web:
        address = as_address(urllib.parse.urljoin(base, value))
        same = network.host_of(address) == network.host_of(base)
        return _named(located(address, reach=at.reach if same else _reach(network.PUBLIC)), value)
    place, options = split_options(base)
    head, rest = place.split("://", 1)
    key = posixpath.normpath(posixpath.join(posixpath.dirname(rest), value))
    if key.split("/")[0] != rest.split("/")[0]:
        raise ValueError(f"{value}: leads out of the list's bucket; write the whole address")
    return _named(located(as_address(f"{head}://{key}{options}"), reach=at.reach), value)


def _named(source: Source, value: str) -> Source:
    """Named by the list's own words, unless there is a secret in them."""
    return source if clean(f"x://x/{value}") != f"x://x/{value}" else replace(source, name=value)


def _reach(reach: str) -> str:
    return network.ANY if network.allowed_by_environment() else reach


def _existing(value: str, folder: str, reading: _Reading) -> str:
    """A path whose bytes are not UTF-8: as they are where there is such a file, else as text."""
    if value.isascii() or os.path.lexists(posixpath.join(folder, str(home(value)))):
        return value
    return reading.text(value)


def joined(parts: list[Source]) -> Source:
    """One source with the clips of all; of equal clips the first."""
    if len(parts) == 1:
        return parts[0]
    clips: dict[tuple[float, float], dict[str, str]] = {}
    for part in parts:
        for time, meta in zip(part.intervals or (), part.interval_meta, strict=True):
            clips.setdefault(time, meta)
    return replace(parts[0], intervals=tuple(clips), interval_meta=tuple(clips.values()))


# Files of lists -----------------------------------------------------------------------------------


def _lines(path: str) -> TextIO:
    """A text list, opened; UTF-8 or, where its first bytes say so, UTF-16. Other bytes are kept as they are."""
    with open(path, "rb") as f:
        wide = f.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return open(path, encoding="utf-16" if wide else "utf-8-sig", errors="surrogateescape", newline="")


def _read_csv(path: str, reading: _Reading, delimiter: str = ",") -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(1 << 30)  # of one video's captions; the default is 128 KiB
    with _lines(path) as f:
        rows = csv.reader(f, delimiter=delimiter, strict=True)
        columns: Columns | None = None
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as e:
                if columns is None:
                    raise SourceError(f"{reading.uri}: its first line is no header: {e}") from e
                yield rows.line_num, f"not well quoted: {e}"
                continue
            if columns is None:
                columns = reading.head(row)
            elif len(row) > len(columns.names):
                yield (
                    rows.line_num,
                    f"{len(row)} fields where the header has {len(columns.names)}; quote them",
                )
            elif row:
                yield rows.line_num, columns.row(row)


def _read_tsv(path: str, reading: _Reading) -> Iterator[tuple[int, Row]]:
    return _read_csv(path, reading, "\t")


def _read_jsonl(path: str, reading: _Reading) -> Iterator[tuple[int, Row]]:
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
            yield number, reading.head(list(row)).row(row.values())


def _read_parquet(path: str, reading: _Reading) -> Iterator[tuple[int, Row]]:
    try:
        file = pq.ParquetFile(path)
        plain = [f.name for f in file.schema_arrow if not _holds_bytes(f.type)]
        columns = reading.head(plain)
        if left := [f.name for f in file.schema_arrow if f.name not in plain]:
            log.warning("%s: columns that hold bytes are not used: %s", reading.uri, ", ".join(left))
        number = 0
        for batch in file.iter_batches(batch_size=4096, columns=plain):
            for values in batch.to_pylist():
                number += 1
                yield number, columns.row(values.values())
    except (pa.ArrowException, OSError) as e:
        if _cut_off(path):
            raise SourceError(
                f"{reading.uri}: a Parquet file that is cut off, its end is missing; copy or download it again"
            ) from e
        raise SourceError(f"{reading.uri}: not readable as Parquet: {' '.join(str(e).split())}") from e


def _cut_off(path: str) -> bool:
    """Does a file begin as Parquet and not end so?"""
    data = Path(path)
    with open(data, "rb") as f:
        begins = f.read(4) == b"PAR1"
        f.seek(max(0, data.stat().st_size - 4))
        return begins and f.read(4) != b"PAR1"


def _holds_bytes(kind: pa.DataType) -> bool:
    """Pictures and videos stored in the table are not metadata."""
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    )


def _read_txt(path: str, reading: _Reading) -> Iterator[tuple[int, Row]]:
    with _lines(path) as f:
        for number, line in enumerate(f, 1):
            line = line.strip()
            if line and not line.startswith("#"):
                yield number, {"path": line}


READERS: dict[str, Callable[[str, _Reading], Iterator[tuple[int, Row]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
