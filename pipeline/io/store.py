"""The output folder: local disk, s3:// or gs://, through pyarrow.fs; every file appears whole or not at all.

A file is written aside and published in one step: locally a hidden `.partial` file, fsync and rename;
on an object store a local temporary file and one upload, which becomes visible when it completes.
Names are always relative to the root, with '/'.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.faults import StoreError


class Store:
    """Files below one root.

    Args:
        root: a folder (created by the first write) or an `s3://bucket/prefix` / `gs://bucket/prefix`.
    """

    def __init__(self, root: str):
        self.local = "://" not in root
        if self.local:
            self.root = self.uri = str(Path(root).absolute())
            self.fs: pafs.FileSystem = pafs.LocalFileSystem()
        else:
            self.uri = root
            try:
                self.fs, self.root = pafs.FileSystem.from_uri(root)
            except (pa.ArrowException, OSError, ValueError) as e:
                raise StoreError(f"output {root}: {e}; use a folder, s3://bucket/… or gs://bucket/…") from e

    def __repr__(self) -> str:
        return f"Store({self.root!r})"

    def path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    @contextlib.contextmanager
    def writer(self, name: str) -> Iterator[IO[bytes]]:
        """A binary file that appears under `name` when the block ends well; nothing appears otherwise.

        Raises StoreError when the disk is full or the output not writable.
        """
        final = Path(self.path(name))
        temp: Path | None = None
        try:
            if self.local:
                final.parent.mkdir(parents=True, exist_ok=True)
                temp = final.with_name(f".{final.name[:80]}.{uuid.uuid4().hex[:8]}.partial")
            else:
                temp = Path(tempfile.mkdtemp(prefix="clipmill-")) / "upload.partial"
            with open(temp, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            if self.local:
                temp.replace(final)
                _fsync_dir(final.parent)
            else:
                with open(temp, "rb") as src, self.fs.open_output_stream(self.path(name)) as dst:
                    shutil.copyfileobj(src, dst, 8 << 20)
        except OSError as e:
            self._blame(e, name)
            raise
        finally:
            if temp is not None:
                temp.unlink(missing_ok=True)
                if not self.local:
                    temp.parent.rmdir()

    def _blame(self, e: OSError, name: str) -> None:
        """Raise StoreError where the output, and not the caller, is at fault."""
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise StoreError(f"cannot write {self.path(name)}: {e.strerror}; {_fix(e.errno)}") from e

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.writer(name) as f:
            f.write(data)

    def write_table(self, name: str, table: pa.Table) -> None:
        with self.writer(name) as f:
            pq.write_table(table, f, compression="zstd")

    def read_bytes(self, name: str) -> bytes:
        with self.fs.open_input_file(self.path(name)) as f:
            return f.read()

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        with self.fs.open_input_file(self.path(name)) as f:
            return pq.ParquetFile(f).read(columns)  # pq.read_table would import all of pyarrow.dataset

    def open(self, name: str) -> pa.NativeFile:
        """Random access, for byte ranges."""
        return self.fs.open_input_file(self.path(name))

    def exists(self, name: str) -> bool:
        return self.fs.get_file_info(self.path(name)).type != pafs.FileType.NotFound

    def list(self, folder: str = "", suffix: str = "") -> list[str]:
        """Published files below a folder, relative to the root, sorted; hidden (partial) ones left out."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True, recursive=True)
        names = (i.path[len(self.root) :].lstrip("/") for i in self.fs.get_file_info(selector) if i.is_file)
        return sorted(n for n in names if n.endswith(suffix) and not n.rsplit("/", 1)[-1].startswith("."))

    def size(self, name: str) -> int:
        return self.fs.get_file_info(self.path(name)).size

    def delete(self, name: str) -> None:
        self.fs.delete_file(self.path(name))

    def delete_folder(self, name: str) -> None:
        """Delete a folder and all below it, where there is one."""
        if self.fs.get_file_info(self.path(name)).type == pafs.FileType.Directory:
            self.fs.delete_dir(self.path(name))

    def replace_folder(self, new: str, final: str, last: str) -> None:
        """`new` takes the place of `final`; called again after a kill it goes on where it stopped.

        Locally two renames. On an object store file by file, copied there: the file `last`, without which
        the folder counts as unfinished, leaves the old folder first and enters the new one last.
        """
        if self.local:
            self.delete_folder(f"{final}.old")
            if self.exists(final):
                Path(self.path(final)).rename(self.path(f"{final}.old"))
            Path(self.path(new)).rename(self.path(final))
            _fsync_dir(Path(self.root))
            self.delete_folder(f"{final}.old")
            return
        coming = [n.removeprefix(f"{new}/") for n in self.list(new)]
        gone = {n.removeprefix(f"{final}/") for n in self.list(final)} - set(coming)
        if self.exists(f"{final}/{last}"):
            self.delete(f"{final}/{last}")
        for name in [n for n in coming if n != last] + [last]:
            if name == last:
                for old in gone:
                    self.delete(f"{final}/{old}")
            self.fs.copy_file(self.path(f"{new}/{name}"), self.path(f"{final}/{name}"))
        self.delete_folder(new)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[IO[bytes]]:
        """A nameless temporary file, on the output's disk where that is local; gone when the block ends."""
        try:
            if self.local:
                Path(self.root).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root if self.local else None) as f:
                yield f
        except OSError as e:
            self._blame(e, "a temporary file")
            raise

    def sweep(self, folder: str = "") -> None:
        """Remove what killed writers left behind (local only; object stores leave nothing visible)."""
        if self.local and Path(self.path(folder)).is_dir():
            for path in Path(self.path(folder)).rglob(".*.partial"):
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One driver at a time (local only): a second one gets a StoreError, a dead one's lock is gone."""
        if not self.local:
            yield
            return
        try:
            Path(self.root).mkdir(parents=True, exist_ok=True)
            f = open(Path(self.root) / ".lock", "a")  # noqa: SIM115 (closed below, after the lock is tried)
        except OSError as e:
            raise StoreError(f"cannot write to {self.root}: {e.strerror}; {_fix(e.errno)}") from e
        with f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise StoreError(f"{self.root} is in use by another clipmill; wait for it or stop it") from e
            yield


class Ranges:
    """Byte ranges of many files of a store, the files last used kept open.

    Made where it is used: it must not cross a fork or be pickled once it has been read from.
    """

    def __init__(self, store: Store, keep_open: int = 64):
        self.store, self.keep_open = store, keep_open
        self._files: OrderedDict[str, Any] = OrderedDict()
        self._buffer = memoryview(bytearray(1 << 20))

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Raises StoreError where the file is missing or ends before the range does."""
        f = self._file(name)
        data = os.pread(f.fileno(), size, offset) if self.store.local else f.read_at(size, offset)
        while self.store.local and len(data) < size:
            more = os.pread(f.fileno(), size - len(data), offset + len(data))
            if not more:
                break
            data += more
        if len(data) < size:
            raise self._short(name)
        return data

    def copy(self, name: str, offset: int, size: int, to: IO[bytes]) -> None:
        """Append a range to a file opened for writing. Raises StoreError as `read` does.

        Through one buffer that stays in the cache: for ranges that are not aligned to pages, a third
        cheaper than copy_file_range or sendfile.
        """
        source, end = self._file(name), offset + size
        while offset < end:
            wanted = min(end - offset, len(self._buffer))
            if self.store.local:
                done = os.preadv(source.fileno(), [self._buffer[:wanted]], offset)
                to.write(self._buffer[:done])
            else:
                done = to.write(source.read_at(wanted, offset))
            if not done:
                raise self._short(name)
            offset += done

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def _file(self, name: str) -> Any:
        if name not in self._files:
            try:
                if self.store.local:
                    f: Any = open(self.store.path(name), "rb", buffering=0)  # noqa: SIM115 (see close)
                else:
                    f = self.store.open(name)
                self._files[name] = f
            except FileNotFoundError as e:
                raise StoreError(f"{self.store.path(name)} is missing; the folder is incomplete") from e
            if len(self._files) > self.keep_open:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(name)
        return self._files[name]

    def _short(self, name: str) -> StoreError:
        return StoreError(f"{self.store.path(name)} is shorter than its index says; the folder is damaged")


def _fix(code: int | None) -> str:
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "free some space and run the same command again, finished work is kept"
    return "choose an output folder you may write to"


def _fsync_dir(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
