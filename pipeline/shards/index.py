"""Where every sample of a folder of shards lies and what it measures, by row, for tens of millions of rows.

`index.parquet` is read a row group at a time into columns of their final size, of bytes and numbers. A small index is
kept in memory. A large one (SHARED_FROM rows) is written out as plain files below the folder for temporary files of
this machine (TMPDIR), once for each version of it, and mapped from there: so all ranks and workers of a machine share
one copy, which the system may drop and read again, and only the first to start waits for the parquet to be read.
"""

from __future__ import annotations

import binascii
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.faults import StoreError
from pipeline.io.files import fix
from pipeline.io.store import Store

UNREAD = {"meta"}  # columns of the index that no reader needs
AT_ONCE = 1 << 20  # rows that are hashed together
SHARED_FROM = 1 << 20  # rows from which an index is mapped from a file
FORMAT = 1  # of those files

# Of the columns in memory: how a number that is missing is told, and its type.
NUMBERS: dict[str, tuple[Any, str]] = {
    "offset": (0, "int64"),
    "size": (0, "uint32"),
    "json_offset": (0, "int64"),
    "json_size": (0, "uint32"),
    "text_offset": (0, "int64"),
    "text_size": (0, "uint32"),
    "width": (1, "int32"),
    "height": (1, "int32"),
    "duration_s": (0.0, "float64"),
}
HASHES = ("media_sha256", "text_sha256")  # 32 bytes a row, 0 where there is none
NAMES = ("tar", "bucket")  # few, repeated: the number of each


def read_index(folder: str, columns: Collection[str] | None = None) -> pa.Table:
    """Where every sample of a folder of shards lies: clip_id, bucket, tar, offset, size, json_offset, json_size, …

    From `index.parquet`, of which `columns` alone where they are given; without one, from the headers of the tars
    below the folder (any WebDataset of mp4 and json). Raises StoreError where there is neither.
    """
    return pa.concat_tables(row_groups(folder, columns))


def row_groups(folder: str, columns: Collection[str] | None = None) -> Iterator[pa.Table]:
    """The same a row group at a time, one after the other. Raises StoreError."""
    store = Store(folder)
    if store.exists("index.parquet"):
        count = store.files.using("index.parquet", lambda f: pq.ParquetFile(f).num_row_groups)
        for number in range(count):
            yield store.files.using("index.parquet", partial(_group, number=number, columns=columns))
            pa.default_memory_pool().release_unused()
        if not count:
            yield store.read_schema("index.parquet").empty_table()
        return
    rows = [row for name in store.list(suffix=".tar") for row in _scan(store, name)]
    if not rows:
        raise StoreError(
            f"{folder} holds neither index.parquet nor tars with mp4 files; give a folder of shards"
        )
    scanned = pa.Table.from_pylist(rows)
    yield scanned if columns is None else scanned.select([n for n in scanned.column_names if n in columns])


def _group(f: IO[bytes], number: int, columns: Collection[str] | None) -> pa.Table:
    file = pq.ParquetFile(f)
    names = file.schema_arrow.names
    wanted = [n for n in names if n not in UNREAD and (columns is None or n in columns)]
    return file.read_row_group(number, wanted)


def _scan(store: Store, name: str) -> Iterator[dict[str, Any]]:
    """The samples of one tar; a sample is a run of members with one name up to the first dot."""
    row: dict[str, Any] = {}
    with store.open(name) as f, tarfile.open(fileobj=f, mode="r:") as tar:
        for member in tar:
            folder, _, base = member.name.rpartition("/")
            stem, _, kind = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if key != row.get("clip_id"):
                if "offset" in row:
                    yield row
                row = {"clip_id": key, "bucket": name.rpartition("/")[0], "tar": name}
                row |= {"json_offset": None, "json_size": None}
            if kind == "mp4":
                row |= {"offset": member.offset_data, "size": member.size}
            elif kind == "json":
                row |= {"json_offset": member.offset_data, "json_size": member.size}
    if "offset" in row:
        yield row


def digest(tables: Iterable[pa.Table], *more: np.ndarray) -> str:
    """A hash of the values of a table that comes in parts, and of arrays, in their order."""
    found: dict[str, list[Any]] = {}
    for rows in tables:
        for name in rows.column_names:
            data, ends = bytes_of(rows[name])
            lengths, values = found.setdefault(name, [hashlib.blake2b(), hashlib.blake2b()])
            lengths.update(np.diff(ends, prepend=0).data)
            values.update(data.data)
    told = hashlib.blake2b(digest_size=16)
    for name, each in found.items():
        told.update(name.encode())
        for hashed in each:
            told.update(hashed.digest())
    for array in more:
        for at in range(0, len(array), AT_ONCE):
            told.update(array[at : at + AT_ONCE].astype(np.int64).data)
    return told.hexdigest()


def only(tables: Iterable[pa.Table], used: np.ndarray) -> Iterator[pa.Table]:
    """The rows that are used, bool [n]."""
    at = 0
    for rows in tables:
        yield rows.filter(pa.array(used[at : at + len(rows)]))
        at += len(rows)


def rows_where(folder: str, where: pc.Expression) -> np.ndarray:
    """Rows of the index of which it is true."""
    found, at = [np.zeros(0, np.int64)], 0
    for rows in row_groups(folder):
        numbered = rows.append_column("row", pa.array(np.arange(at, at + len(rows))))
        found.append(numbered.filter(where)["row"].to_numpy())
        at += len(rows)
    return np.concatenate(found)


# ---------------------------------------------------------------- columns


class Texts(Sequence[str]):
    """Texts as their bytes one after the other, uint8 [sum], and where each ends, int64 [n].

    rows: which of them these are; none: all.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray, rows: np.ndarray | None = None):
        self.data, self.ends, self.rows = data, ends, rows

    def __len__(self) -> int:
        return len(self.ends if self.rows is None else self.rows)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        at = i if self.rows is None else int(self.rows[i])
        return bytes(self.data[self.ends[at - 1] if at else 0 : self.ends[at]]).decode()


class Index:
    """Columns of an index; of those that it has not, `columns` has none.

    keys: clip ids. columns: by name, as NUMBERS and HASHES say, uint8 [n, 32] of these; of NAMES int32 [n], numbers
    into `names`.
    """

    def __init__(
        self, columns: dict[str, np.ndarray], names: dict[str, list[str]], folder: Path | None = None
    ):
        self.columns, self.names, self.folder = columns, names, folder
        self.keys = Texts(columns["keys"], columns["key_ends"])

    def __len__(self) -> int:
        return len(self.keys)

    def kept(self, what: str, make: Callable[[], str]) -> str:
        """What was made of this version of the index before, by another process of this machine, or is made now.

        Args:
            what: names it, and all that it depends on beside the index.
        """
        if self.folder is None:
            return make()
        file = self.folder / hashlib.blake2b(what.encode(), digest_size=8).hexdigest()
        if not file.exists():
            aside = file.with_name(f".{file.name}.{os.getpid()}")
            aside.write_text(make())
            aside.rename(file)
        return file.read_text()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ if self.folder is None else {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["folder"] is None:
            self.__dict__.update(state)
        else:
            self.__dict__.update(mapped(state["folder"]).__dict__)


def open_index(folder: str) -> Index:
    """Of a folder of shards, as `read_index` finds it. Raises StoreError."""
    store = Store(folder)
    if store.exists("index.parquet"):
        rows = store.files.using("index.parquet", lambda f: pq.ParquetFile(f).metadata.num_rows)
        if rows >= SHARED_FROM:
            return _shared(folder)
    return _read(folder, lambda name, dtype: _Memory(dtype))


class _Memory:
    """A column as it is read."""

    def __init__(self, dtype: str):
        self.dtype = np.dtype(dtype)
        self.parts: list[np.ndarray] = []

    def add(self, part: np.ndarray) -> None:
        self.parts.append(part.astype(self.dtype))

    def whole(self) -> np.ndarray:
        return np.concatenate(self.parts) if self.parts else np.zeros(0, self.dtype)


class _File(_Memory):
    """The same on its way to a file."""

    def __init__(self, path: Path, dtype: str):
        super().__init__(dtype)
        self.path, self.file = path, open(path, "wb")  # noqa: SIM115 (closed when the column is whole)

    def add(self, part: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(part.astype(self.dtype, copy=False)).data)

    def whole(self) -> np.ndarray:
        self.file.close()
        return _mapped(self.path, self.dtype)


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    if not path.stat().st_size:  # which cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r")


def _read(folder: str, column: Callable[[str, str], _Memory]) -> Index:
    """All columns of an index, a row group at a time."""
    found: dict[str, _Memory] = {"keys": column("keys", "uint8"), "key_ends": column("key_ends", "int64")}
    numbers: dict[str, dict[str, int]] = {name: {} for name in NAMES}
    end = 0
    for rows in row_groups(folder, {"clip_id", *NUMBERS, *HASHES, *NAMES}):
        data, ends = bytes_of(rows["clip_id"])
        found["keys"].add(data)
        found["key_ends"].add(ends + end)
        end += len(data)
        for name in rows.column_names:
            if name in NUMBERS:
                missing, dtype = NUMBERS[name]
                values = rows[name].fill_null(missing).to_numpy()
            elif name in HASHES:
                dtype, values = "uint8", from_hex(rows[name]).ravel()
            elif name in NAMES:
                dtype, values = "int32", _numbered(rows[name], numbers[name])
            else:
                continue
            if name not in found:
                found[name] = column(name, dtype)
            found[name].add(values)
    columns = {name: each.whole() for name, each in found.items()}
    return Index(_shaped(columns), {name: list(each) for name, each in numbers.items()})


def _shaped(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: x.reshape(-1, 32) if name in HASHES else x for name, x in columns.items()}


def bytes_of(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """(bytes of all texts, where each ends in them) of a column; '' where one is missing."""
    data, ends, end = [], [], 0
    for chunk in column.cast(pa.large_string()).fill_null("").chunks:
        at = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        data.append(np.frombuffer(chunk.buffers()[2] or b"", np.uint8)[at[0] : at[-1]])
        ends.append(at[1:] - at[0] + end)
        end += int(at[-1] - at[0])
    return np.concatenate([np.zeros(0, np.uint8), *data]), np.concatenate([np.zeros(0, np.int64), *ends])


def _numbered(column: pa.ChunkedArray, numbers: dict[str, int]) -> np.ndarray:
    """The number of each name, those not yet known being added."""
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    known = [numbers.setdefault(name, len(numbers)) for name in encoded.dictionary.to_pylist()]
    return np.array(known, np.int32)[encoded.indices.to_numpy()]


def from_hex(column: pa.ChunkedArray) -> np.ndarray:
    """Hashes as bytes, half as long as their digits: uint8 [n, 32], 0 where there is none."""
    found = []
    for chunk in column.cast(pa.string()).chunks:
        full = chunk.fill_null("0" * 64) if chunk.null_count else chunk
        if (pc.binary_length(full).to_numpy() != 64).any():
            raise StoreError("the index of the shards has hashes that are no SHA-256: pack the shards again")
        digits = memoryview(full.buffers()[2] or b"")[64 * full.offset : 64 * (full.offset + len(full))]
        found.append(np.frombuffer(binascii.unhexlify(digits), np.uint8).reshape(-1, 32))
    return np.concatenate([np.zeros((0, 32), np.uint8), *found])


# ---------------------------------------------------------------- shared by a machine


def _shared(address: str) -> Index:
    """Mapped from this machine's copy, which the first that asks for it makes. Raises StoreError."""
    store = Store(address)
    place = hashlib.blake2b(store.uri.encode(), digest_size=8).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"clipmill-index-{os.getuid()}"
    try:
        _make_own(folder)
        with open(folder / f"{place}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait here
            final = folder / f"{place}-{_version(store)}"
            if not final.exists():
                for old in folder.glob(f"{place}-*"):  # whoever has one mapped keeps it
                    shutil.rmtree(old)
                _write(address, final)
    except OSError as e:
        wanted = "set TMPDIR to a folder with room for some hundred bytes a clip"
        raise StoreError(f"cannot write {folder}: {e.strerror}; {fix(e.errno)}, or {wanted}") from e
    return mapped(final)


def _version(store: Store) -> str:
    """Of the bytes of index.parquet: another one has another time, size or footer."""
    info = store.files.info("index.parquet")

    def footer(f: IO[bytes]) -> bytes:
        f.seek(max(0, info.size - (1 << 20)))
        return f.read()

    told = f"{FORMAT} {info.size} {info.mtime_ns}".encode() + store.files.using("index.parquet", footer)
    return hashlib.blake2b(told, digest_size=8).hexdigest()


def _make_own(folder: Path) -> None:
    """A folder that nobody else may change. Raises StoreError, OSError."""
    folder.mkdir(mode=0o700, exist_ok=True)
    there = folder.lstat()
    if there.st_uid != os.getuid() or not stat.S_ISDIR(there.st_mode) or there.st_mode & 0o022:
        raise StoreError(f"{folder} belongs to somebody else: set TMPDIR to a folder of your own")


def _write(address: str, final: Path) -> None:
    aside = final.with_name(f".{final.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        index = _read(address, lambda name, dtype: _File(aside / name, dtype))
        types = {name: x.dtype.name for name, x in index.columns.items()}
        (aside / "index.json").write_text(json.dumps({"types": types, "names": index.names}))
        aside.rename(final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def mapped(folder: Path) -> Index:
    """An index from its files."""
    told = json.loads((folder / "index.json").read_text())
    columns = {name: _mapped(folder / name, dtype) for name, dtype in told["types"].items()}
    return Index(_shaped(columns), told["names"], folder)
