"""A source's packets: where decoding can begin, what can be copied, and writing them as an mp4."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import numpy as np

from pipeline.faults import SourceFault
from pipeline.geometry import Colours
from pipeline.io import ffmpeg
from pipeline.record import Video
from pipeline.split.piece import Piece

# Containers whose index leads to a keyframe and whose packets all carry a PTS, and codecs whose keyframes
# start afresh (H.264 and HEVC are looked at more closely): where ffmpeg may seek.
SEEKABLE = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
FRESH = {"h264", "hevc", "vp8", "vp9", "av1", "mpeg4"}
COPYABLE = {"h264", "hevc", "vp9", "av1", "mpeg4"}  # what players expect in an mp4


class Index:
    """What is known of a source's packets: where decoding can begin, and what can be copied.

    Args:
        container: the source, opened by PyAV; only demuxed here, never decoded.
    """

    def __init__(self, container: Any, video: Video):
        self.container, self.video = container, video
        self.stream = ffmpeg.picture_stream(container)
        if self.stream is None or video.frames is None:
            raise SourceFault(f"{video.source.uri}: has no frames to cut")
        none = np.empty((0, 3), np.int64)
        packets = video.frames.packets
        self.packets = none if packets is None or container.format.name not in SEEKABLE else packets
        self.codec = self.stream.codec_context.codec.canonical_name
        self.audio = any(s.type == "audio" for s in container.streams)

    @property
    def copyable(self) -> bool:
        """Whether an mp4 player would show a copied stream just as the encoded clips."""
        g = self.video.geometry
        plain = (
            self.video.pix_fmt == "yuv420p"
            and not g.colours.full_range
            and not self.video.counts.get("picture_changes")
        )
        return self.codec in COPYABLE and plain and g.as_stored

    def seek(self, piece: Piece) -> str | None:
        """Seconds (decimal) of a keyframe from which a clip's frames decode just as from the beginning.

        None where none is known or the file begins with it.
        """
        if self.codec not in FRESH or not len(self.packets):
            return None
        keys = self.packets[self.packets[:, 2] == 1, 0]
        before = np.sort(keys[keys <= piece.pts[0]])
        if len(before) < 2 or before[-1] <= 0:
            return None
        key = int(before[-1])
        packet = next(self._from(key), None)
        if packet is None or not begins_afresh(packet, self.stream, self.codec):
            return None
        micros = math.ceil(key * self.video.time_base * 1_000_000)
        return f"{micros // 1_000_000}.{micros % 1_000_000:06d}"

    def _from(self, pts: int) -> Iterator[Any]:
        """Packets in decode order from the keyframe with that PTS on; none where it is not found."""
        from av import FFmpegError

        dts = self.packets[self.packets[:, 0] == pts, 1].max(initial=pts)
        found = False
        try:
            self.container.seek(pts, stream=self.stream, backward=True)
            for packet in self.container.demux(self.stream):
                found |= packet.pts == pts and packet.is_keyframe
                if found and packet.size:
                    yield packet
                elif packet.dts is None or packet.dts > dts:
                    return
        except FFmpegError:  # damaged further on than the packets that are needed
            return

    def copy(self, piece: Piece) -> bool:
        """Remux a clip that is a keyframe and what follows it in decode order, no more and no less."""
        from av import FFmpegError

        first = np.flatnonzero((self.packets[:, 0] == piece.pts[0]) & (self.packets[:, 2] == 1))
        if not len(first):
            return False
        wanted = self.packets[first[0] : first[0] + len(piece.pts), 0]
        if not np.array_equal(np.sort(wanted), piece.pts):
            return False
        packets = [p for p, _ in zip(self._from(int(piece.pts[0])), wanted, strict=False)]
        if not np.array_equal([p.pts for p in packets], wanted) or not begins_afresh(
            packets[0], self.stream, self.codec
        ):
            return False
        try:
            mux(piece, self.stream, packets)
        except (FFmpegError, ValueError):  # mp4 cannot hold it as it is
            return False
        return self._shown_alike(piece)

    def _shown_alike(self, piece: Piece) -> bool:
        """Whether a copy says of its pictures what the source's geometry does; a container's word may be lost."""
        import av

        c = self.video.geometry.colours
        with av.open(f"file:{piece.path}") as copy:
            stream = copy.streams.video[0]
            said = stream.codec_context
            colours = Colours.of(c.model, said.colorspace, said.color_primaries, said.color_trc, c.full_range)
            return (stream.sample_aspect_ratio or 1) == self.video.sar and colours == c


def begins_afresh(packet: Any, stream: Any, codec: str) -> bool:
    """Whether a keyframe forgets all that came before: containers also mark recovery points as keyframes.

    H.264: an IDR slice, type 5 (ITU-T H.264, table 7-1); HEVC: an IRAP picture, types 16–23 (H.265, table 7-1). Other
    codecs of FRESH have no other keyframes.
    """
    if codec not in ("h264", "hevc"):
        return True
    types = set()
    for nal in _nals(bytes(packet), stream.codec_context.extradata or b"", codec):
        types.add(nal & 0x1F if codec == "h264" else nal >> 1 & 0x3F)
    if codec == "h264":
        return 5 in types and not types & {1, 2, 3, 4}
    return bool(types & set(range(16, 24))) and not types & set(range(16))


def _nals(data: bytes, extradata: bytes, codec: str) -> Iterator[int]:
    """First byte of every NAL unit of an H.264 or HEVC packet, in Annex B or in mp4 form."""
    at = 4 if codec == "h264" else 21  # of lengthSizeMinusOne in avcC and hvcC (ISO/IEC 14496-15)
    if extradata[:1] == b"\1" and len(extradata) > at:
        size = (extradata[at] & 3) + 1
        pos = 0
        while pos + size < len(data):
            yield data[pos + size]
            pos += size + int.from_bytes(data[pos : pos + size], "big")
    else:
        pos = data.find(b"\0\0\1")
        while 0 <= pos < len(data) - 3:
            yield data[pos + 3]
            pos = data.find(b"\0\0\1", pos + 3)


def mux(piece: Piece, template: Any, packets: list[Any]) -> None:
    """Write packets and the piece's sound as its mp4, with the source's times from 0 on; notes the picture's size.

    Args:
        template: the stream that the packets were read from.
        packets: one a frame, in decode order.
    """
    import av

    edges, tick = piece.edges * piece.video.time_base.numerator, piece.video.time_base.denominator
    lasts = np.diff(edges)  # how long each frame is shown
    rank = np.argsort(np.argsort([p.pts for p in packets]))  # place in presentation order
    # A packet is decoded when the frame `delay` places before it is shown. The first ones, decoded before 0, are
    # spaced like the last ones shown, so that the packets together last as long as the frames do.
    delay = int((np.arange(len(packets)) - rank).max())
    tail = np.delete(lasts, rank[-1])[len(lasts) - 1 - delay :]
    before = -np.cumsum(tail[::-1])[::-1]
    dts = np.concatenate([before, edges[:-1]])[: len(packets)]
    # the movie's clock is the track's: the usual 1 ms would round the length of the edit list
    options = {"movie_timescale": str(tick), "video_track_timescale": str(tick)}
    options |= {"movflags": "+faststart", "fflags": "+bitexact"}
    with (
        av.open(f"file:{piece.path}", "w", format="mp4", options=options) as out,
        av.open(io.BytesIO(piece.sound), "r", format="mp4") if piece.sound else nullcontext() as sound,
    ):
        picture = out.add_stream_from_template(template, opaque=True)
        picture.time_base = Fraction(1, tick)
        for packet, r, t in zip(packets, rank, dts, strict=True):
            packet.stream, packet.time_base = picture, picture.time_base
            packet.pts, packet.dts, packet.duration = int(edges[r]), int(t), int(lasts[r])
        if sound is not None:
            track = out.add_stream_from_template(sound.streams.audio[0], opaque=True)
            heard = [p for p in sound.demux(audio=0) if p.size]
            for packet in heard:
                packet.stream = track
            packets = sorted([*packets, *heard], key=lambda p: float(p.dts * p.time_base))
        for packet in packets:
            out.mux(packet)
    piece.width, piece.height = template.width, template.height
