"""Videos from YouTube, through yt-dlp."""

from __future__ import annotations

import logging
import re
import shutil
import socket
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.faults import Fault, SourceFault, TransientFault, WorkerFault, one_line
from pipeline.record import Source
from pipeline.sources import network
from pipeline.sources.names import YOUTUBE, Limits, SourceError, number_of, place_of
from pipeline.sources.signed import redacted

INSTALL = "pip install -e '.[youtube]' in the clone of clipmill"
# what YouTube or the network says that another time or place may better
PASSING = re.compile(
    r"HTTP Error (408|429|5\d\d)|not a bot|timed out|Connection (reset|refused|aborted)|Remote end closed|"
    r"IncompleteRead|EOF occurred|Temporary failure|bytes read",
    re.I,
)
NO_HOST = re.compile(r"Name or service not known|Failed to resolve|getaddrinfo|No address associated", re.I)


def check(sources: Iterable[Source]) -> None:
    """Before any work: raises SourceError where there are YouTube videos and no yt-dlp."""
    n = sum(YOUTUBE.match(s.uri) is not None for s in sources)
    if n and find_spec("yt_dlp") is None:
        raise SourceError(f"{number_of(n, 'source')} from YouTube, for which yt-dlp is needed: {INSTALL}")


def download(source: Source, to: Path, limits: Limits) -> None:
    """Through yt-dlp, best streams up to `youtube_height`, joined as mp4.

    Raises SourceFault, TransientFault, WorkerFault (no yt-dlp, no network).
    """
    uri = source.uri
    try:
        import yt_dlp
    except ImportError as e:
        raise WorkerFault(f"{uri}: YouTube videos need yt-dlp: {INSTALL}") from e
    from pipeline.io import ffmpeg

    deadline = time.monotonic() + limits.total_s

    def in_time(_: dict[str, Any]) -> None:
        if time.monotonic() > deadline:
            raise TransientFault(
                f"{uri}: not downloaded in {limits.total_s:g} s; the server is too slow", tried=True
            )

    said = logging.getLogger("clipmill.yt_dlp")
    said.disabled = True  # it says on the terminal what it also raises
    height = f"[height<={limits.youtube_height}]"
    folder = to.with_suffix(".youtube")
    shutil.rmtree(folder, ignore_errors=True)
    options = {
        "paths": {"home": str(folder)},
        "outtmpl": "video.%(ext)s",
        "format": f"bv*{height}+ba/b{height}/bv*+ba/b",
        "merge_output_format": "mp4",
        "ffmpeg_location": ffmpeg.find(),
        "noplaylist": True,
        "allowed_extractors": ["youtube.*"],  # or a redirect of YouTube's would lead anywhere
        "quiet": True,
        "no_warnings": True,
        "noprogress": True,
        "logger": said,
        "retries": limits.tries,
        "fragment_retries": limits.tries,
        "socket_timeout": limits.timeout_s,
        "max_filesize": limits.max_bytes,
        "progress_hooks": [in_time],
    }
    try:
        with yt_dlp.YoutubeDL(options) as download:
            download.download([place_of(source)])
        files = sorted(folder.glob("video.*"))
        if len(files) != 1:
            raise SourceFault(f"{uri}: yt-dlp brought no video, or more than {limits.max_bytes} bytes")
        files[0].replace(to)
    except yt_dlp.utils.YoutubeDLError as e:
        raise _fault(source, one_line(e).removeprefix("ERROR: ")) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fault(source: Source, said: str) -> Fault:
    """Whose fault it is, by what yt-dlp says; its exceptions do not tell."""
    said = redacted(said, source.address)
    if NO_HOST.search(said):
        return network.fault_of(source.uri, said, socket.gaierror(socket.EAI_AGAIN, said))
    if PASSING.search(said):
        return TransientFault(f"{source.uri}: {said}; the next run tries it again", tried=True)
    return SourceFault(f"{source.uri}: {said}")
