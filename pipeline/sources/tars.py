"""WebDataset tars as sources: each video by its byte range, with what lies beside it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath

from pipeline.faults import SourceFault, TransientFault
from pipeline.record import Source
from pipeline.sources.fetch import random_access
from pipeline.sources.kinds import LOOKED_FOR, VIDEOS
from pipeline.sources.names import (
    SIDECAR_BYTES,
    SIDECARS,
    member_uri,
    name_of,
    sidecar,
    suffix_of,
    utf8,
)


def videos_of(tar: Source) -> Iterator[Source]:
    """The videos in a tar, each by its byte range, with the .json and .txt of the same key as metadata.

    Of a damaged tar the whole members are listed, then the tar itself with the problem. Raises SourceFault
    where it cannot be opened or holds no video, TransientFault and WorkerFault as fetching does.
    """
    number = 0
    problem = None
    passing = False
    try:
        with random_access(tar) as (f, size):
            for videos, beside in _samples(f, size):
                for info in videos:
                    number += 1
                    yield replace(
                        tar,
                        uri=member_uri(tar.uri, info.name),
                        name=name_of(f"{tar.name}/{info.name}"),
                        meta=tar.meta | beside,
                        size=info.size,
                        member=(info.offset_data, info.size),
                    )
    except (tarfile.TarError, SourceFault, TransientFault) as e:
        if not isinstance(e, tarfile.TarError) and not number:
            raise
        passing = isinstance(e, TransientFault)
        trouble = "could not be read on" if passing else "damaged tar"
        problem = f"{tar.uri}: {trouble}, {e}; the {number} videos before are used" + (
            "" if passing else ", write the tar anew"
        )
    if problem:
        yield replace(tar, name=name_of(tar.name), size=None, problem=problem, passing=passing)
    elif not number:
        raise SourceFault(f"{tar.uri}: no videos in this tar ({LOOKED_FOR})")


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
        suffix = suffix_of(file)
        if suffix in VIDEOS:
            videos.append(info)
        elif suffix in SIDECARS and info.size <= SIDECAR_BYTES:
            f.seek(info.offset_data)
            meta |= sidecar(suffix, f.read(info.size))
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
                    raise tarfile.ReadError(f"cut off inside {utf8(info.name)}")
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
