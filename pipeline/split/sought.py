"""Frames of a video by their numbers, each decoded from the nearest keyframe before it and not from the beginning.

They are those that decoding it all would give, or there is none: where packets do not tell the frames' numbers for
certain, or what comes out is not what they said, `Unsure` is raised, and it is decoded from the beginning. What is
passed over is not looked at; where it is damaged, its frames count all the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.split.packets import SEEKABLE, begins_afresh

# Every packet of these is a frame that is shown, in order of PTS (VP8 and MPEG-4 have some that are not).
A_FRAME_EACH = {"h264", "hevc", "vp9", "av1"}


class Unsure(Exception):
    """It is to be decoded from its beginning."""


@dataclass(frozen=True)
class Places:
    """Where a video's frames lie. stamps: their PTS, in order; keys: numbers of those at which decoding may begin."""

    stamps: list[int]
    keys: list[int]
    targets: list[int]  # by which containers find the keys

    @classmethod
    def of(cls, container: Any, stream: Any) -> Places:
        """By its packets; nothing is decoded. Raises Unsure."""
        from av.error import FFmpegError

        codec = stream.codec_context.codec.canonical_name
        if container.format.name not in SEEKABLE or codec not in A_FRAME_EACH:
            raise Unsure
        stamps: list[int] = []
        fresh: list[tuple[int, int]] = []  # PTS, and what is sought for: some containers go by DTS
        try:
            for packet in container.demux(stream):
                if not packet.size:
                    continue
                if packet.pts is None or packet.is_discard or packet.is_corrupt:
                    raise Unsure
                stamps.append(packet.pts)
                if packet.is_keyframe and begins_afresh(packet, stream, codec):
                    fresh.append(
                        (packet.pts, packet.pts if packet.dts is None else min(packet.pts, packet.dts))
                    )
        except FFmpegError as e:
            raise Unsure from e
        first = stamps[0] if stamps else None
        stamps.sort()
        if not fresh or not first == stamps[0] == fresh[0][0] or len(set(stamps)) < len(stamps):
            raise Unsure
        number = {pts: n for n, pts in enumerate(stamps)}
        return cls(stamps, [number[pts] for pts, _ in fresh], [target for _, target in fresh])


def frames(container: Any, stream: Any, places: Places, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """(number, frame) of the wanted ones, which are in increasing order. Raises Unsure."""
    decoded: Iterator[Any] = iter(())
    at = -1
    for number in wanted:
        k = bisect_right(places.keys, number) - 1
        if at < 0 or places.keys[k] > at + 1:  # else it is as near to go on
            decoded, at = _from(container, stream, places, k), places.keys[k] - 1
        while at < number:
            frame = next(decoded, None)
            at += 1
            if frame is None or frame.pts != places.stamps[at] or frame.is_corrupt or frame.interlaced_frame:
                raise Unsure  # interlaced: fields may be packets, and neighbours are looked at
        yield number, frame


def _from(container: Any, stream: Any, places: Places, k: int) -> Iterator[Any]:
    """Frames from the k-th key on. Raises Unsure where it is not found."""
    from av.error import FFmpegError

    stamp, found = places.stamps[places.keys[k]], False
    try:
        container.seek(places.targets[k], stream=stream, backward=True)
        for packet in container.demux(stream):
            found |= bool(packet.size) and packet.pts == stamp
            if found:
                for frame in stream.codec_context.decode(packet):
                    if frame.pts is None or frame.pts >= stamp:  # before it: of what was not decoded
                        yield frame
            elif packet.is_keyframe and packet.pts is not None and packet.pts > stamp:
                raise Unsure
    except FFmpegError as e:
        raise Unsure from e
