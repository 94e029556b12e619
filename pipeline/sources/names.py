"""What a source is called: addresses, paths, members of tars; and what the readers of sources share."""

from __future__ import annotations

import json
import logging
import os
import posixpath
import re
import urllib.parse
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.faults import SourceFault, one_line
from pipeline.record import Source
from pipeline.sources import network
from pipeline.sources.signed import clean, clean_text, redacted, split_options

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
UNKNOWN = "unknown kind of address; use a path, file://, http(s)://, s3:// or gs://"

log = logging.getLogger("clipmill")


class SourceError(ValueError):
    """A SOURCE argument that names nothing to curate; one sentence with the argument and the fix."""


# Text ---------------------------------------------------------------------------------------------


def scheme_of(text: str) -> str:
    """'http' of 'http://…'; '' of a path."""
    head, colon, _ = text.partition("://")
    return head.lower() if colon and re.fullmatch("[A-Za-z][A-Za-z0-9+.-]*", head) else ""


def suffix_of(name: str) -> str:
    """'.mp4', lower case; of an address without its query."""
    if scheme_of(name):
        name = re.split("[?#]", name, maxsplit=1)[0]
    return posixpath.splitext(name)[1].lower()


def utf8(text: str) -> str:
    """Valid UTF-8: undecodable bytes and lone surrogates become \\udcXX."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def as_address(text: str) -> str:
    """An address with a lower-case scheme, in valid UTF-8: other bytes as %XX, which is what they mean."""
    text = scheme_of(text) + text[text.index("://") :]
    return utf8(re.sub("[\udc80-\udcff]", lambda c: f"%{ord(c[0]) & 0xFF:02X}", text))


def name_of(text: str) -> str:
    """A source's name: an address as it is, of a path what is below '/' and without '..'."""
    if not scheme_of(text):
        text = "/".join(part for part in text.split("/") if part not in ("", ".", ".."))
    return utf8(text)


def metadata(columns: dict[str, Any]) -> dict[str, str]:
    """Columns as text: numbers and nested values as JSON, empty ones left out, addresses without secrets."""
    meta = {}
    for name, value in columns.items():
        if value is None or value == "" or isinstance(value, bytes):
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        meta[utf8(name)] = utf8(clean_text(text))
    return meta


def text_of(data: bytes) -> str:
    """Text in UTF-8, or in what most other text is in."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return windows(data)


def windows(data: bytes) -> str:
    """Text in Windows-1252, or in Latin-1 where a byte means nothing there."""
    try:
        return data.decode("cp1252")
    except UnicodeDecodeError:
        return data.decode("latin-1")


SIDECARS = (".json", ".txt")
SIDECAR_BYTES = 1 << 20  # larger ones are no metadata


def sidecar(suffix: str, data: bytes) -> dict[str, str]:
    """Metadata of the file that lies beside a video: a JSON object's keys, or a text as the caption."""
    text = text_of(data)
    if suffix != ".json":
        return metadata({"caption": text.strip()})
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return metadata({"json": text})
    return metadata(values if isinstance(values, dict) else {"json": text})


CHUNK = 1 << 20
OBJECTS = ("s3://", "gs://", "gcs://")
YOUTUBE = re.compile(r"https?://([\w-]+\.)*(youtube\.com|youtu\.be|youtube-nocookie\.com)(/|$)", re.I)


@dataclass(frozen=True)
class Limits:
    """How patient and how greedy a download is."""

    timeout_s: float = 30.0  # to connect, and between two pieces of data
    total_s: float = 3600.0  # for the whole download, waits included
    max_bytes: int = 64 << 30
    tries: int = 5  # in a row that bring no new byte
    backoff_s: float = 1.0  # wait before the second try; doubled each time
    max_wait_s: float = 120.0  # a server that asks for more is given up
    youtube_height: int = 720  # pixels; Panda-70M's own size


LIMITS = Limits()


# Names: what stands in Source.uri ------------------------------------------------------------------


def uri_of(path: str) -> str:
    """The uri of a local path: the absolute path; as file:// URL where its bytes are not UTF-8.

    Symbolic links are not resolved. `path_of` is the inverse.
    """
    path = os.path.abspath(path)  # noqa: PTH100 (resolve() would follow links)
    try:
        path.encode()
    except UnicodeEncodeError:  # undecodable bytes, which neither parquet nor JSON can hold
        return "file://" + urllib.parse.quote(os.fsencode(path))
    return path


def path_of(uri: str) -> str | None:
    """The local path of a uri; None for what has to be fetched."""
    if file := re.match("file://(localhost(?=/))?", uri, re.I):
        return os.fsdecode(urllib.parse.unquote_to_bytes(uri[file.end() :]))
    return None if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", uri) else uri


def member_uri(tar: str, member: str) -> str:
    """'TAR#member': '%', '#' and undecodable bytes of the member as %XX, so that the last '#' parts them."""
    return tar + "#" + re.sub("[%#\udc80-\udcff]", lambda c: f"%{ord(c[0]) & 0xFF:02X}", member)


def tar_of(uri: str) -> str:
    """The uri of the tar that `member_uri` named."""
    return uri.rpartition("#")[0]


def located(address: str, name: str | None = None, reach: str = network.PUBLIC) -> Source:
    """The source at an address: known by it without its secrets, fetched by all of it."""
    uri = clean(address)
    return Source(uri, name or uri, address=None if address == uri else address, reach=reach)


def place_of(source: Source) -> str:
    """Where to fetch a source, secrets included; of a tar's member the tar."""
    return source.address or (source.uri if source.member is None else tar_of(source.uri))


def object_store(address: str, reach: str = network.ANY) -> tuple[pafs.FileSystem, str]:
    """File system and 'bucket/key' of an s3:// or gs:// address; the key is taken literally.

    pyarrow's options may follow the key, e.g. '?region=…' or '?endpoint_override=localhost:9000&scheme=http'.
    Raises SourceFault.
    """
    scheme, rest = address.split("://", 1)
    place, options = split_options(rest)
    bucket, slash, key = place.partition("/")
    endpoint = urllib.parse.parse_qs(options[1:]).get("endpoint_override", [""])[0]
    if endpoint and network.free_hosts(endpoint, reach) == frozenset():
        network.check_name(clean(address), network.host_of(endpoint))
    try:
        fs, _ = pafs.FileSystem.from_uri(f"{scheme}://{bucket}{options}")
    except (pa.ArrowException, OSError, ValueError) as e:
        said = redacted(one_line(e), address)
        raise SourceFault(f"{clean(address)}: {said}; write it as {scheme}://bucket/key") from None
    return fs, bucket.rpartition("@")[2] + slash + key


def number_of(n: int, what: str) -> str:
    """'1 row', '2,000 rows'."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"
