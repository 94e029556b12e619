"""Opening a file that nobody vouches for: the stream of its pictures, or why it cannot be used."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.io.ffmpeg import OPEN, picture_stream

if TYPE_CHECKING:  # the child has no need of pyarrow and pydantic
    from av.container import InputContainer
    from av.video.stream import VideoStream

    from pipeline.recipe import Decode


ENCRYPTED = "its pictures are encrypted (DRM); give a copy without encryption"
PLAYLISTS = (
    b"#EXTM3U",
    b"ffconcat",
    b"<MPD",
    b"<SmoothStreamingMedia",
    b"[playlist]",
    b"[Reference]",
    b"v=0",
)


class DecodeError(Exception):
    """A file that cannot be used; the message is a sentence that lacks only the file's name."""


@contextlib.contextmanager
def opened(path: str, options: Decode) -> Iterator[InputContainer]:
    import av

    _check_regular(path)
    limits = {"max_pixels": str(options.max_pixels)}  # for the decoders that look for the stream's parameters
    av.logging.set_level(av.logging.ERROR)  # libav's own words go into the exception
    try:
        with av.logging.Capture():
            container = av.open("file:" + path, "r", options=OPEN | limits, metadata_errors="replace")
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError as e:
        raise DecodeError(_why_not(path, e)) from e
    finally:
        av.logging.set_level(None)
    with container:
        yield container


def _check_regular(path: str) -> None:
    try:
        info = Path(path).stat()
    except OSError as e:
        raise DecodeError(f"cannot be read: {e.strerror}; check the path") from e
    if not stat.S_ISREG(info.st_mode):
        raise DecodeError("not a regular file; give a video file")
    if not info.st_size:
        raise DecodeError("the file is empty; fetch it again")


def _why_not(path: str, e: Any) -> str:
    """What is wrong with a file that libav did not open."""
    _, demuxer, words = e.log or (0, "", "")
    with open(path, "rb") as f:
        head = f.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")
    if demuxer in ("hls", "concat", "dash", "sdp") or any(
        mark in head if mark[:1] == b"<" else head.startswith(mark) for mark in PLAYLISTS
    ):
        return "it is a playlist, which could open other files or the network; give the video itself"
    if "whitelist" in words:
        return f"its format, {demuxer}, is not a video file's; give a video file"
    reason = words.strip().lower() if words.strip() else e.strerror.lower()
    return f"not a readable video ({reason}); it is damaged, incomplete or something else"


def video_stream(container: InputContainer, options: Decode) -> VideoStream:
    stream = picture_stream(container)
    if stream is not None and "enc_key_id" in stream.metadata:
        raise DecodeError(ENCRYPTED)
    if stream is None:
        kinds = {s.type for s in container.streams}
        has = "only a cover picture" if "video" in kinds else f"only {', '.join(sorted(kinds)) or 'nothing'}"
        raise DecodeError(f"no video stream ({has}); give a file with pictures")
    if stream.codec_context is None:
        raise DecodeError("no decoder for its video codec; re-encode it, say to H.264")
    stream.thread_type = "NONE"
    stream.thread_count = 1
    # cropping by the codec's word to the pixel, as ffmpeg does it since 7.1
    stream.codec_context.options = {"max_pixels": str(options.max_pixels), "flags": "+unaligned"}
    return stream


def scrambled(path: str) -> bool:
    """Whether most packets of an MPEG transport stream with content are scrambled (ISO/IEC 13818-1, 2.4.3.3)."""
    with open(path, "rb") as f:
        data = np.frombuffer(f.read(4 << 20), np.uint8)
    for size in (188, 192, 204):
        for start in range(min(size, len(data))):
            heads = data[start::size]
            if len(heads) > 3 and (heads[: len(heads) // 2] == 0x47).all():
                packets = data[start : start + len(data[start:]) // size * size].reshape(-1, size)
                carrying = packets[(packets[:, 0] == 0x47) & (packets[:, 3] & 0x10 > 0)]
                return bool((carrying[:, 3] & 0xC0 > 0).mean() > 0.5)
    return False


def claimed_duration(container: InputContainer, stream: VideoStream) -> float | None:
    """Seconds, by the header; none where it does not say."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration else None


def check_limits(width: int, height: int, seconds: float | None, options: Decode) -> None:
    if width * height > options.max_pixels:
        raise DecodeError(
            f"its pictures of {width}x{height} are larger than decode.max_pixels={options.max_pixels}; "
            "scale it down or raise the limit"
        )
    if seconds is not None and seconds > options.max_duration_s:
        raise DecodeError(
            f"it lasts {seconds:.0f} s or more, longer than decode.max_duration_s={options.max_duration_s:g}; "
            "cut it up or raise the limit"
        )
