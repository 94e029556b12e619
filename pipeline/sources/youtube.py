"""Videos from YouTube, through yt-dlp."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

from pipeline.faults import SourceFault
from pipeline.sources.names import Limits, one_line


def download(uri: str, to: Path, limits: Limits) -> None:
    """Through yt-dlp, best streams up to `youtube_height`, joined as mp4."""
    try:
        import yt_dlp
    except ImportError as e:
        raise SourceFault(f"{uri}: YouTube videos need yt-dlp; pip install clipmill[youtube]") from e
    from pipeline.io import ffmpeg

    deadline = time.monotonic() + limits.total_s

    def in_time(_: dict[str, Any]) -> None:
        if time.monotonic() > deadline:
            raise SourceFault(f"{uri}: not downloaded in {limits.total_s:g} s; the server is too slow")

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
            download.download([uri])
        files = sorted(folder.glob("video.*"))
        if len(files) != 1:
            raise SourceFault(f"{uri}: yt-dlp brought no video, or more than {limits.max_bytes} bytes")
        files[0].replace(to)
    except yt_dlp.utils.YoutubeDLError as e:
        raise SourceFault(f"{uri}: {one_line(e).removeprefix('ERROR: ')}") from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)
