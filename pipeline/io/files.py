"""A file system whose every call is patient, and whose every error is a sentence.

`pyarrow.fs` gives one code path for disks, S3 and GCS, but raises plain OSErrors with a page of text, gives up
at once on GCS and only after minutes on S3, and turns a missing bucket into an empty listing. Here:

- what the moment spoils (a 503, a reset, an endpoint that is away, EIO) is tried TRIES times, with growing waits;
- then, and for everything else, a StoreError says what failed, why, and the fix.

All calls below are safe to repeat: reads, whole-object writes under one name, copies, deletes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.faults import Fault, StoreError, TransientFault, WorkerFault, kind_of

T = TypeVar("T")

TRIES = 4  # calls that the moment spoils, before the store is at fault
BACKOFF_S = 0.5  # wait before the second call, doubled for each after it
SDK_TRIES = 3  # requests that the S3 client makes of one call by itself
AT_ONCE = 8 << 20  # bytes that S3 takes in one request (pyarrow makes parts of 10 MiB); whole or not at all
MOST_COPIED = 5 << 30  # bytes that S3 copies in one request


class Files:
    """The file system below an address.

    Args:
        address: a folder, `s3://bucket/prefix` or `gs://bucket/prefix`; with `?region=`, `?endpoint_override=`
            and `?scheme=` for S3 (or AWS_ENDPOINT_URL and AWS_REGION in the environment).

    uri is what may be shown: the address without keys.
    """

    def __init__(self, address: str):
        self.local = "://" not in address
        if self.local:
            self.fs: pafs.FileSystem = pafs.LocalFileSystem()
            self.root = self.uri = str(Path(address).absolute())
            return
        self.uri = re.sub(r"^(\w+://)[^/@]*@", r"\1", address)
        try:
            self.fs, self.root = (
                _s3(address) if address.startswith("s3://") else pafs.FileSystem.from_uri(address)
            )
        except (pa.ArrowException, OSError, ValueError) as e:
            said = _told(str(e), self.uri) or f"{e}; use a folder, s3://bucket/… or gs://bucket/…"
            raise StoreError(f"{self.uri}: {said}") from e

    def path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    # ------------------------------------------------------------ calls

    def patiently(self, doing: str, name: str, call: Callable[[], T]) -> T:
        """What `call` returns. Raises StoreError: 'cannot <doing> <name>: why; fix'."""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(BACKOFF_S * 2 ** (attempt - 1))
            try:
                return call()
            except (OSError, pa.ArrowException) as e:
                fault = self.fault(e, doing, name)
                if not isinstance(fault, TransientFault) or attempt == TRIES - 1:
                    raise (fault if isinstance(fault, StoreError) else StoreError(str(fault))) from e
        raise AssertionError

    def fault(self, e: Exception, doing: str, name: str) -> Fault:
        """The sentence for an error of the file system: a TransientFault where the moment is at fault."""
        what = f"cannot {doing} {self._shown(name)}"
        if isinstance(e, FileNotFoundError):
            return StoreError(f"{what}: it is missing; the folder is incomplete")
        if isinstance(e, pa.ArrowException) and not isinstance(e, OSError):
            return StoreError(f"{what}: {_first(e)}; it is damaged")
        said = None if self.local else _told(str(e), self.uri)
        if said is not None:
            kind: type[Fault] = TransientFault if said.startswith("~") else StoreError
            return kind(f"{what}: {said.lstrip('~')}")
        assert isinstance(e, OSError)
        why = e.strerror or _first(e)
        if kind_of(e) is TransientFault:
            return TransientFault(f"{what}: {why}; run the same command again, finished work is kept")
        return StoreError(f"{what}: {why}; {fix(e.errno, doing)}")

    def _shown(self, name: str) -> str:
        return f"{self.uri.split('?')[0].rstrip('/')}/{name}" if name else self.uri

    def info(self, name: str) -> pafs.FileInfo:
        return self.patiently("look up", name, lambda: self.fs.get_file_info(self.path(name)))

    def below(self, folder: str) -> list[pafs.FileInfo]:
        """Every file below a folder, at any depth. Raises StoreError where the bucket is missing."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True, recursive=True)
        found = self.patiently("list", folder, lambda: self.fs.get_file_info(selector))
        if not found and self.fs.type_name in ("s3", "gcs"):
            self.check_bucket()
        return [i for i in found if i.is_file]

    def check_bucket(self) -> None:
        """Raise StoreError where there is no such bucket, which a listing does not tell."""
        bucket = self.root.split("/", 1)[0]
        there = self.patiently("look up", "", lambda: self.fs.get_file_info(bucket))
        if there.type == pafs.FileType.NotFound:
            raise StoreError(f"{self.uri}: there is no bucket '{bucket}'; make it, or correct the address")

    def open(self, name: str) -> Any:
        """A file for random access; its own reads may raise OSError."""
        if self.local:
            return self.patiently("read", name, lambda: open(self.path(name), "rb"))
        return self.patiently("read", name, lambda: self.fs.open_input_file(self.path(name)))

    def using(self, name: str, use: Callable[[Any], T]) -> T:
        """What `use` makes of an opened file; opened and used again where the moment spoils it."""

        def call() -> T:
            with contextlib.closing(
                open(self.path(name), "rb") if self.local else self.fs.open_input_file(self.path(name))
            ) as f:
                return use(f)

        return self.patiently("read", name, call)

    def put(self, name: str, data: bytes) -> None:
        """An object in one request, which appears whole or not at all (object stores only)."""

        def call() -> None:
            with self.fs.open_output_stream(self.path(name)) as f:
                f.write(data)

        self.patiently("write", name, call)

    def put_file(self, name: str, file: IO[bytes], said: str) -> None:
        """A local file as an object, in parts. After an error half of it may appear under `name`; `said`: in errors."""

        def call() -> None:
            file.seek(0)
            with self.fs.open_output_stream(self.path(name)) as f:
                while data := file.read(AT_ONCE):
                    f.write(data)

        self.patiently("write", said, call)

    def copy(self, name: str, to: str) -> None:
        """Inside of the object store, in one step."""
        self.patiently("write", to, lambda: self.fs.copy_file(self.path(name), self.path(to)))

    def delete(self, name: str) -> None:
        def call() -> None:
            with contextlib.suppress(FileNotFoundError):  # the answer to an earlier try may have been lost
                self.fs.delete_file(self.path(name))

        self.patiently("delete", name, call)

    def delete_folder(self, name: str) -> None:
        """A folder and all below it, where there is one."""

        def call() -> None:
            with contextlib.suppress(FileNotFoundError):
                if self.fs.get_file_info(self.path(name)).type == pafs.FileType.Directory:
                    self.fs.delete_dir(self.path(name))

        self.patiently("delete", name, call)


def fix(code: int | None, doing: str = "write") -> str:
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "free some space and run the same command again, finished work is kept"
    if code is not None and kind_of(OSError(code, "")) is WorkerFault:
        return "mend that and run the same command again, finished work is kept"
    if doing in ("write", "delete"):
        return "choose an output folder you may write to"
    return "choose a folder you may read"


def at_fault(e: OSError) -> bool:
    """Whether an error met while writing is about the disk or the folder, whoever was writing."""
    return e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR)


# ---------------------------------------------------------------- S3


def _s3(address: str) -> tuple[pafs.S3FileSystem, str]:
    """As FileSystem.from_uri, with bounded retries, and with small objects written in one request."""
    uri = urlsplit(address)
    bucket = uri.netloc.rpartition("@")[2]
    options: dict[str, Any] = {k: v[-1] for k, v in parse_qs(uri.query, keep_blank_values=True).items()}
    known = {"region", "scheme", "endpoint_override", "allow_bucket_creation"}
    if not bucket or set(options) - known:
        wrong = f"option '{min(set(options) - known)}' is unknown" if bucket else "the bucket is missing"
        raise ValueError(f"{wrong}; write s3://bucket/folder, perhaps with ?region=… or ?endpoint_override=…")
    named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if named and "endpoint_override" not in options:
        scheme, _, place = named.rpartition("://")
        options |= {"endpoint_override": place.rstrip("/"), "scheme": scheme or "https"}
    options["allow_bucket_creation"] = options.get("allow_bucket_creation", "false").lower() in ("true", "1")
    if uri.username:
        options |= {"access_key": unquote(uri.username), "secret_key": unquote(uri.password or "")}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if "region" not in options and not region and "endpoint_override" not in options:
        options["region"] = pafs.resolve_s3_region(bucket)
    fs = pafs.S3FileSystem(
        **options,
        allow_delayed_open=True,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=SDK_TRIES),
    )
    return fs, f"{bucket}{uri.path}".rstrip("/")


# What S3 and GCS say, and what a person needs to hear; '~': the moment's fault, worth another try.
_SAYINGS = [
    (r"NO_SUCH_BUCKET|bucket does not exist", "there is no such bucket; make it, or correct the address"),
    (
        r"HTTP status 301|PERMANENT_?REDIRECT|AuthorizationHeaderMalformed|is located in",
        "the bucket is in another region; name it: ?region=… behind the address, or AWS_REGION",
    ),
    (
        r"SIGNATURE_DOES_NOT_MATCH|INVALID_ACCESS_KEY_ID|InvalidAccessKeyId|UNRECOGNIZED_CLIENT|EXPIRED|InvalidToken|"
        r"INVALID_CLIENT_TOKEN|UNAUTHENTICATED|MISSING_AUTHENTICATION|NOT_SIGNED_UP|HTTP status 401",
        "the keys are not accepted; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile",
    ),
    (
        r"ACCESS_DENIED|PERMISSION_DENIED|HTTP status 403|Forbidden",
        "access is denied; check the keys and what they may do in this bucket",
    ),
    (
        r"HTTP status 5\d\d|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|INTERNAL_ERROR|THROTTLING|REQUEST_TIMEOUT|"
        r"Status\((UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED)",
        "~the object store is overloaded or unwell ({said}); run the same command again, finished work is kept",
    ),
    (
        r"NETWORK_CONNECTION|curlCode|timed? ?out|Connection reset|truncated",
        "~the object store does not answer ({said}); check the address and the network, then run the same command "
        "again, finished work is kept",
    ),
]


def _told(said: str, uri: str) -> str | None:
    """The clause for an object store's message; None for one that is not known."""
    for pattern, clause in _SAYINGS:
        if found := re.search(pattern, said, re.I):
            detail = re.search(r"curlCode: \d+, ([^;]+)", said)
            return clause.replace("{said}", detail[1] if detail else found[0])
    return None


def _first(e: Exception) -> str:
    lines = str(e).strip().splitlines() or [type(e).__name__]
    return lines[0][:200].rstrip(".")


def unfinished_uploads(files: Files) -> Iterator[tuple[str, Callable[[], object]]]:
    """Multipart uploads below the root that no one completed, as (name, how to abort it).

    They are invisible but paid for. pyarrow cannot list them; boto3 can, where it is installed
    (`pip install -e '.[s3]'`), with the keys of the environment. Without it there are none here, and a life cycle
    rule of the bucket (AbortIncompleteMultipartUpload) does the same.
    """
    if files.local or files.fs.type_name != "s3":
        return
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return
    uri = urlsplit(files.uri)
    query = parse_qs(uri.query)
    place = query.get("endpoint_override")
    bucket, _, prefix = files.root.partition("/")
    try:
        client = boto3.client(
            "s3",
            endpoint_url=f"{query.get('scheme', ['https'])[0]}://{place[0]}" if place else None,
            region_name=query["region"][0] if "region" in query else None,
            config=Config(retries={"total_max_attempts": SDK_TRIES}, connect_timeout=5, read_timeout=20),
        )
        where = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
        for page in client.get_paginator("list_multipart_uploads").paginate(**where):
            for upload in page.get("Uploads", []):
                one = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                yield upload["Key"][len(prefix) :].lstrip("/"), partial(client.abort_multipart_upload, **one)
    except (BotoCoreError, ClientError):
        return  # they may be listed by others only; nothing depends on it
