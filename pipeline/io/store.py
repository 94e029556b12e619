"""The output folder: local disk, s3:// or gs://, through pyarrow.fs; every file appears whole or not at all.

A file is written aside and published in one step. Locally: a hidden `.partial` file, fsync and rename. On an object
store: a local temporary file, then one request where that holds it all; a larger one is uploaded under a hidden name
and copied there by the server. (pyarrow *completes* an upload that breaks off in the middle, from `close` as from its
destructor: straight under the final name, half a file would appear.)

Names are always relative to the root, with '/'. Errors are StoreErrors of one sentence, see `pipeline.io.files`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import uuid
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.faults import StoreError
from pipeline.io import drivers
from pipeline.io.files import AT_ONCE, MOST_COPIED, Files, at_fault, fix, unfinished_uploads


def below(address: str, name: str) -> str:
    """The address of a folder inside another; options behind '?' stay behind."""
    base, mark, options = address.partition("?") if "://" in address else (address, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{options}"


def folder_name(name: str) -> str:
    """Any text as the name of one folder: none that is hidden or leads upwards, at most 240 letters of ASCII."""
    found = quote(name, safe=" ,=@+~")
    if found.startswith("."):
        found = f"%2E{found[1:]}"
    if len(found) > 240:  # a file system takes 255
        cut = found[:220]
        cut = cut[: cut.rindex("%")] if "%" in cut[-2:] else cut
        found = f"{cut}~{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return found


class Store:
    """Files below one root.

    Args:
        root: a folder (created by the first write) or an `s3://bucket/prefix` / `gs://bucket/prefix`.

    epoch is the driver's (see `lock`); a store sent to a worker takes it along, and writes nothing once another driver
    has taken over. None: nobody checks.
    """

    def __init__(self, root: str):
        self.files = Files(root)
        self.root, self.uri, self.local = self.files.root, self.files.uri, self.files.local
        self.epoch: int | None = None

    @property
    def fs(self) -> pafs.FileSystem:
        return self.files.fs

    @staticmethod
    def of(out: Store | str) -> Store:
        return out if isinstance(out, Store) else Store(out)

    def __repr__(self) -> str:
        return f"Store({self.root!r})"

    def path(self, name: str) -> str:
        return self.files.path(name)

    @contextlib.contextmanager
    def writer(self, name: str) -> Iterator[IO[bytes]]:
        """A binary file that appears under `name` when the block ends well; nothing appears otherwise.

        Raises StoreError when the disk is full or the output not writable.
        """
        try:
            with self._local_writer(name) if self.local else self._remote_writer(name) as f:
                yield f
        except OSError as e:
            self._blame(e, name)
            raise

    @contextlib.contextmanager
    def _local_writer(self, name: str) -> Iterator[IO[bytes]]:
        final = Path(self.path(name))
        temp = final.with_name(f".{final.name[:80]}.{uuid.uuid4().hex[:8]}.partial")

        def publish() -> None:
            if temp.exists():  # else an earlier try did it
                temp.replace(final)
            fsync(final.parent)

        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with open(temp, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            self._fence()
            self.files.patiently("write", name, publish)
        finally:
            temp.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _remote_writer(self, name: str) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryFile() as f:  # has no name, so a killed process leaves none
            yield f
            f.flush()
            size = f.seek(0, os.SEEK_END)
            self._fence()
            if size <= AT_ONCE:
                f.seek(0)
                self.files.put(name, f.read())
                return
            if size > MOST_COPIED and self.fs.type_name == "s3":
                raise StoreError(
                    f"cannot write {self.path(name)}: its {size / 2**30:.1f} GiB are more than the 5 GiB that S3 "
                    "copies in one step; lower shards.max_bytes, or give fewer or shorter sources a unit"
                )
            folder, _, base = name.rpartition("/")
            aside = f"{folder}/.{base[:80]}.{uuid.uuid4().hex[:8]}.partial".lstrip("/")
            try:
                self.files.put_file(aside, f, name)
                if (there := self.files.info(aside).size) != size:
                    raise StoreError(
                        f"cannot write {self.path(name)}: {there} of {size} bytes arrived; run it again"
                    )
                self._fence()  # the upload may have taken long
                self.files.copy(aside, name)
            finally:
                with contextlib.suppress(StoreError):  # the next start sweeps it
                    self.files.delete(aside)

    def _fence(self) -> None:
        """Raise StoreError where another driver has taken over."""
        if self.epoch is not None:
            drivers.check(self.files, self.epoch)

    def _blame(self, e: OSError, name: str) -> None:
        """Raise StoreError where the output, and not the caller, is at fault."""
        if at_fault(e):
            where = self.path(name) if self.local else f"{tempfile.gettempdir()} (for {self.path(name)})"
            raise StoreError(f"cannot write {where}: {e.strerror}; {fix(e.errno)}") from e

    def write_bytes(self, name: str, data: bytes) -> None:
        self._whole(name, lambda f: f.write(data))

    def write_table(self, name: str, table: pa.Table) -> None:
        self._whole(name, lambda f: pq.write_table(table, f, compression="zstd"))

    def _whole(self, name: str, write: Any) -> None:
        """Write a file that is at hand; from the start again where the moment spoils it."""

        def call() -> None:
            with self.writer(name) as f:
                write(f)

        self.files.patiently("write", name, call)

    def read_bytes(self, name: str) -> bytes:
        return self.files.using(name, lambda f: f.read())

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        return self.files.using(
            name, lambda f: pq.ParquetFile(f).read(columns)
        )  # pq.read_table imports pa.dataset

    def read_some(self, name: str, columns: Collection[str]) -> pa.Table:
        """Those of the columns that a parquet file has, in its order."""

        def read(f: IO[bytes]) -> pa.Table:
            file = pq.ParquetFile(f)
            return file.read([c for c in file.schema_arrow.names if c in columns])

        return self.files.using(name, read)

    def read_schema(self, name: str) -> pa.Schema:
        """Columns and metadata of a parquet file."""
        return self.files.using(name, pq.read_schema)

    def tables(self, names: Sequence[str], schema: pa.Schema | None = None) -> Tables:
        """Many parquet files as one table. Without a schema the first one's, then there must be one."""
        return Tables(self, names, schema)

    def open(self, name: str) -> Any:
        """Random access, for byte ranges."""
        return self.files.open(name)

    def exists(self, name: str) -> bool:
        return self.files.info(name).type != pafs.FileType.NotFound

    def list(self, folder: str = "", suffix: str = "") -> list[str]:
        """Published files below a folder, relative to the root, sorted; hidden (partial) ones left out."""
        names = (i.path[len(self.root) :].lstrip("/") for i in self.files.below(folder))
        return sorted(
            n for n in names if n.endswith(suffix) and not any(p.startswith(".") for p in n.split("/"))
        )

    def size(self, name: str) -> int:
        return self.files.info(name).size

    def delete(self, name: str) -> None:
        self._fence()
        self.files.delete(name)

    def delete_folder(self, name: str) -> None:
        """Delete a folder and all below it, where there is one."""
        self._fence()
        self.files.delete_folder(name)

    def replace_folder(self, new: str, final: str, last: str) -> None:
        """`new` takes the place of `final`; called again after a kill it goes on where it stopped.

        Locally two renames. On an object store file by file, copied there: the file `last`, without which
        the folder counts as unfinished, leaves the old folder first and enters the new one last.
        """
        self._fence()
        if self.local:

            def rename() -> None:
                self.delete_folder(f"{final}.old")
                if self.exists(new):  # else an earlier try did it
                    if self.exists(final):
                        Path(self.path(final)).rename(self.path(f"{final}.old"))
                    Path(self.path(new)).rename(self.path(final))
                fsync(Path(self.root))
                self.delete_folder(f"{final}.old")

            self.files.patiently("write", final, rename)
            return
        coming = [n.removeprefix(f"{new}/") for n in self.list(new)]
        gone = {n.removeprefix(f"{final}/") for n in self.list(final)} - set(coming)
        if self.exists(f"{final}/{last}"):
            self.delete(f"{final}/{last}")
        for name in [n for n in coming if n != last] + [last]:
            if name == last:
                for old in gone:
                    self.delete(f"{final}/{old}")
            self.files.copy(f"{new}/{name}", f"{final}/{name}")
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
        """Remove what killed writers left behind: partial files, and uploads that were never completed.

        (The latter need boto3, see `unfinished_uploads`.)
        """
        for info in self.files.below(folder):
            if info.base_name.startswith(".") and info.base_name.endswith(".partial"):
                self.delete(info.path[len(self.root) :].lstrip("/"))
        for name, abort in unfinished_uploads(self.files):
            if name.startswith(folder):
                abort()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One driver at a time: a second one gets a StoreError, a dead one's place is free (see `drivers`)."""
        if not self.local:
            self.files.check_bucket()
        with drivers.driving(self.files) as self.epoch:
            try:
                yield
            finally:
                self.epoch = None


class Tables:
    """Parquet files of a store as one table, of which columns and rows are read as they are asked for."""

    def __init__(self, store: Store, names: Sequence[str], schema: pa.Schema | None):
        import pyarrow.dataset as pads

        self.store, self.name = store, names[0] if names else ""
        paths = [store.path(n) for n in names]

        def find() -> pads.Dataset:
            if not paths:
                assert schema is not None
                return pads.dataset(schema.empty_table())
            return pads.dataset(paths, schema=schema, format="parquet", filesystem=store.files.fs)

        self._dataset = store.files.patiently("read", self.name, find)
        self.schema: pa.Schema = self._dataset.schema

    def to_table(self, columns: list[str] | None = None, filter: Any = None) -> pa.Table:
        """Raises StoreError."""
        read = partial(self._dataset.to_table, columns=columns, filter=filter)
        return self.store.files.patiently("read", self.name, read)


class Ranges:
    """Byte ranges of many files of a store, the files last used kept open.

    Made where it is used: it must not cross a fork or be pickled once it has been read from. With `sha256`, the hex
    digest that the range must have, every byte is checked. Raises StoreError where a file is missing or damaged.
    """

    def __init__(self, store: Store, keep_open: int = 64):
        self.store, self.keep_open = store, keep_open
        self._files: OrderedDict[str, Any] = OrderedDict()
        self._buffer = memoryview(bytearray(1 << 20))

    def read(self, name: str, offset: int, size: int, sha256: str | None = None) -> bytes:
        data = bytearray(size)
        self._fill(name, offset, memoryview(data))
        if sha256 is not None:
            self.check(name, offset, data, sha256)
        return bytes(data)

    def check(self, name: str, offset: int, data: bytes | bytearray, sha256: str) -> None:
        """Raise StoreError where the bytes that were read from there are others than were written."""
        if (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise self._damaged(name, offset, len(data), found, sha256)

    def copy(self, name: str, offset: int, size: int, to: IO[bytes], sha256: str | None = None) -> None:
        """Append a range to a file opened for writing.

        Through one buffer that stays in the cache: for ranges that are not aligned to pages, a third
        cheaper than copy_file_range or sendfile; and it is hashed while it is there.
        """
        found, at, end = hashlib.sha256(), offset, offset + size
        while at < end:
            part = self._buffer[: min(end - at, len(self._buffer))]
            self._fill(name, at, part)
            if sha256 is not None:
                found.update(part)
            to.write(part)
            at += len(part)
        if sha256 is not None and found.hexdigest() != sha256:
            raise self._damaged(name, offset, size, found.hexdigest(), sha256, str(getattr(to, "name", "")))

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def _fill(self, name: str, offset: int, part: memoryview) -> None:
        """Read as many bytes as `part` has; where the moment spoils that, from a file opened again."""

        def call() -> int:
            done = 0
            try:
                file = self._file(name)
                while done < len(part):
                    if self.store.local:
                        more = os.preadv(file.fileno(), [part[done:]], offset + done)
                    else:
                        data = file.read_at(len(part) - done, offset + done)
                        more = len(data)
                        part[done : done + more] = data
                    if not more:
                        break
                    done += more
            except OSError:
                if name in self._files:
                    self._files.pop(name).close()
                raise
            return done

        if self.store.files.patiently("read", name, call) < len(part):
            raise StoreError(f"{self.store.path(name)} is shorter than its index says; the folder is damaged")

    def _file(self, name: str) -> Any:
        if name not in self._files:
            if self.store.local:
                f: Any = open(self.store.path(name), "rb", buffering=0)  # noqa: SIM115 (see close)
            else:
                f = self.store.fs.open_input_file(self.store.path(name))
            self._files[name] = f
            if len(self._files) > self.keep_open:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(name)
        return self._files[name]

    def _damaged(
        self, name: str, offset: int, size: int, found: str, wanted: str, to: str = ""
    ) -> StoreError:
        into = f" (on the way to {to})" if to else ""
        return StoreError(
            f"{self.store.path(name)} is damaged: bytes {offset} to {offset + size} have the sha256 {found}, "
            f"not {wanted} as they were written{into}"
        )


def fsync(path: Path) -> None:
    """Have what is in a file, or the names in a folder, on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
