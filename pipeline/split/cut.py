"""Write the clips of a unit of work as mp4 into one staging tar, frame-exactly.

A frame is picked by its PTS: one ffmpeg decodes a source once and hands every clip its frames, so no time
is rounded and no frame counted. Whatever an ffmpeg of any age makes of the times of encoded frames, the clip
is muxed anew with the source's own, taken to begin at 0. The encoder starts afresh with every clip and
runs on one thread, so a clip's bytes depend on its own frames only, not on its neighbours.

What came out is checked by demuxing: as many frames as were asked for, at the times that were asked for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.io import ffmpeg
from pipeline.io.store import Store, StoreError
from pipeline.recipe import Cut, RecipeError
from pipeline.record import Clip, Media, Video
from pipeline.stages import Produces, Resources, StageError, fail

# An x264 encoder with its lookahead takes about 70 bytes a pixel: a process stays below 0.6 GB.
PIXELS = 8 * 1280 * 720  # of all clips that one process encodes
MOST = 16  # clips a process, however small
GAP_S = 20.0  # from one clip to the next: rather seek in a new process than decode what nobody wants

# Containers whose index leads to a keyframe and whose packets all carry a PTS, and codecs whose keyframes
# start afresh (H.264 and HEVC are looked at more closely): where ffmpeg may seek.
SEEKABLE = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
FRESH = {"h264", "hevc", "vp8", "vp9", "av1", "mpeg4"}
COPYABLE = {"h264", "hevc", "vp9", "av1", "mpeg4"}  # what players expect in an mp4

SCRATCH = "clipmill-cut-"  # how the names of scratch folders begin

PRESETS = (  # x264's, from the slowest
    *("placebo", "veryslow", "slower", "slow", "medium"),
    *("fast", "faster", "veryfast", "superfast", "ultrafast"),
)


class Inexact(Exception):
    """A clip did not come out as asked."""


@dataclass
class Piece:
    """One clip on its way into the tar."""

    video: Video
    clip: Clip
    path: Path  # of its mp4
    width: int = 0  # of the encoded picture, pixels
    height: int = 0

    @property
    def pts(self) -> np.ndarray:
        """PTS of its frames, int64 [n], ticks of the source's time base."""
        assert self.video.frames is not None
        return self.video.frames.pts[self.clip.start_frame : self.clip.end_frame]

    @property
    def edges(self) -> np.ndarray:
        """When each frame appears and the last one ends, int64 [n + 1], ticks from the clip's start."""
        end = self.video.pts_of(self.clip.end_frame)
        return np.append(self.pts, end) - self.pts[0]

    def __str__(self) -> str:
        return f"the clip at {self.clip.start_s:.3f}–{self.clip.end_s:.3f} s"


class CutStage:
    """Writes `media/<unit>.tar` and sets `clip.media`; a source it fails on does not hold up the others."""

    name = "cut"

    def __init__(self, recipe: Cut, out: str):
        self.recipe = recipe
        self.store = Store(out)
        self.resources = Resources(cpus=1)
        self.produces = Produces()

    def setup(self) -> None:
        """Find ffmpeg and try the encoder. Raises RecipeError."""
        try:
            self.exe = ffmpeg.find()
            self.version = ffmpeg.version(self.exe)
        except ffmpeg.FFmpegError as e:
            raise RecipeError(str(e)) from e
        with scratch() as folder:
            test = ["-f", "lavfi", "-i", "color=size=256x256:rate=25:duration=0.2", "-pix_fmt", "yuv420p"]
            options = [str(a) for k, v in encoder(self.recipe, 25.0).items() for a in (f"-{k}", v)]
            try:
                ffmpeg.run([self.exe, *test, *options, "-f", "mp4", f"{folder}/trial.mp4"], 60)
            except ffmpeg.FFmpegError as e:
                raise RecipeError(
                    f"cut.codec {self.recipe.codec}: ffmpeg {'.'.join(map(str, self.version))} cannot encode "
                    f"with it ({e}); choose another, e.g. libx264, or name another ffmpeg in CLIPMILL_FFMPEG"
                ) from e

    def __call__(self, videos: list[Video]) -> list[Video]:
        from pipeline.sources.fetch import localised, release

        pieces: list[Piece] = []
        with scratch() as folder:
            for n, video in enumerate(videos):
                if not video.clips:
                    continue
                try:
                    with localised(video.source) as local:
                        if local.sha256 != video.sha256:
                            raise StageError(
                                f"{video.source.uri}: changed while it was being curated; run the same command "
                                "again once nothing writes to it"
                            )
                        pieces += self._cut(video, local.path, folder / str(n))
                except StoreError:
                    raise
                except OSError as e:
                    if e.errno in (errno.ENOSPC, errno.EDQUOT):
                        raise scratch_full() from e
                    fail(video, self.name, e)
                except Exception as e:
                    fail(video, self.name, e)
            if pieces:
                self._pack(f"media/{videos[0].unit}.tar", pieces)
        for video in videos:
            release(video.source)  # no later stage reads it
        return videos

    # One source --------------------------------------------------------------------------------------

    def _cut(self, video: Video, path: str, folder: Path) -> list[Piece]:
        """Write every clip of a source. Raises StageError."""
        import av

        folder.mkdir()
        clips = sorted(video.clips, key=lambda c: (c.start_frame, c.end_frame))
        pieces = [Piece(video, clip, folder / f"{n}.mp4") for n, clip in enumerate(clips)]
        with av.open(f"file:{path}", options=ffmpeg.OPEN, metadata_errors="replace") as container:
            index = Index(container, video)
            copied = self._copy(path, index, pieces) if self.recipe.mode == "copy" else []
            done = {id(piece) for piece in copied}
            for group in groups([p for p in pieces if id(p) not in done]):
                self._encode(path, index, group)
        return pieces

    def _encode(self, path: str, index: Index, group: list[Piece]) -> None:
        """Encode a few clips of one source; when that goes wrong, one by one in ever surer ways.

        Raises StageError when none of the ways gives the frames that were asked for.
        """
        audio = self.recipe.audio and index.audio
        seek = index.seek(group[0])
        ways = [(seek, "pts", audio)]
        if len(group) == 1:
            ways += [(seek, "pts", False), (None, "pts", False), (None, "number", False)]
        trouble: Exception | None = None
        for seek, by, sound in dict.fromkeys(ways):
            try:
                self._try(path, seek, by, [self._mp4(piece, index, sound) for piece in group], group)
            except ffmpeg.Stalled as e:
                raise StageError(f"{index.video.source.uri}: {e}") from e
            except (ffmpeg.FFmpegError, Inexact) as e:
                trouble = e
                continue
            if audio and not sound:
                index.audio = False
                _warn(index.video, f"clips from {group[0].clip.start_s:.3f} s on have no sound: {trouble}")
            if by == "number":
                _warn(index.video, f"{group[0]} was cut by frame number: {trouble}")
            return
        if len(group) == 1:
            raise StageError(f"{index.video.source.uri}: {trouble}") from trouble
        for piece in group:
            self._encode(path, index, [piece])

    def _try(
        self, path: str, seek: str | None, by: str, options: list[dict[str, Any]], group: list[Piece]
    ) -> None:
        """Encode a group in one way and check it. Raises FFmpegError, Inexact."""
        import av

        raw = [piece.path.with_suffix(".raw.mp4") for piece in group]
        self._run(path, seek, by, group, options, raw)
        for piece, file in zip(group, raw, strict=True):
            # without the edit list, which leaves out the last frame where an old ffmpeg gives it no duration
            with av.open(f"file:{file}", options={"advanced_editlist": "0"}) as container:
                picture = container.streams.video[0]
                packets = [p for p in container.demux(picture) if p.size]
                if len(packets) != len(piece.pts):
                    raise Inexact(f"{piece} came out with {len(packets)} frames instead of {len(piece.pts)}")
                if by == "pts":
                    assert picture.time_base is not None
                    tick = piece.video.time_base / picture.time_base
                    times = np.sort([p.pts for p in packets])
                    if (times * tick.denominator != piece.edges[:-1] * tick.numerator).any():
                        raise Inexact(f"{piece} came out with other times than the source's")
                sound = None
                if container.streams.audio:
                    container.seek(0)
                    sound = [p for p in container.demux(container.streams.audio[0]) if p.size]
                mux(piece, picture, packets, sound)
            file.unlink()

    def _run(
        self,
        path: str,
        seek: str | None,
        by: str,
        group: list[Piece],
        options: list[dict[str, Any]],
        files: list[Path],
    ) -> None:
        """Decode `path` once, from `seek` (seconds) on, and hand each clip's frames to its own output.

        Args:
            by: 'pts' picks frames by PTS, 'number' by counting them from the first (without `seek`); 'all' does not.
            options: of each output; one with an audio encoder also gets the clip's sound.
        """
        import ffmpeg as graph  # ffmpeg-python

        source = ffmpeg.source(path)
        opened = sounds = graph.input(**source)
        if seek is not None:
            # lands on the keyframe at or before; sound is decoded from the beginning, as some decoders carry state
            opened = graph.input(**source, ss=seek, seek_timestamp=1, noaccurate_seek=None)
            sounds = graph.input(**source, vn=None)
        branches = opened["V:0"].filter_multi_output("split", len(group))
        outputs = []
        for n, (piece, file) in enumerate(zip(group, files, strict=True)):
            frames, first, last = branches[n], int(piece.pts[0]), int(piece.pts[-1])
            if by == "pts":
                frames = frames.filter("trim", start_pts=first, end_pts=last + 1)
                frames = frames.filter("setpts", f"PTS-({first})")
            elif by == "number":
                spacing = max(1, int(piece.edges[-1]) // len(piece.pts))
                frames = frames.filter(
                    "trim", start_frame=piece.clip.start_frame, end_frame=piece.clip.end_frame
                )
                frames = frames.filter("setpts", f"N*{spacing}")
            for name, args, named in picture_filters(piece.video, self.recipe.height):
                frames = frames.filter(name, *args, **named)
            streams = [frames]
            if "c:a" in options[n]:
                start, end = (float(t * piece.video.time_base) for t in (first, first + int(piece.edges[-1])))
                sound = sounds["a:0"].filter("atrim", start=f"{start:.6f}", end=f"{end:.6f}")
                streams.append(sound.filter("asetpts", f"PTS-({start:.6f})/TB"))
            passthrough = {"fps_mode": "passthrough"} if self.version >= (5, 1) else {"vsync": "0"}
            outputs.append(graph.output(*streams, f"file:{file}", **passthrough, **options[n]))
        command = [self.exe, "-y", "-copyts", "-filter_complex_threads", "1"]
        ffmpeg.run(graph.merge_outputs(*outputs).compile(cmd=command), self.recipe.stall_s)

    def _mp4(self, piece: Piece, index: Index, sound: bool) -> dict[str, Any]:
        """Options of an output that encodes a clip."""
        tick = piece.video.time_base
        options = encoder(self.recipe, piece.video.fps) | {
            "format": "mp4",
            "enc_time_base": f"{tick.numerator}:{tick.denominator}",
            "video_track_timescale": tick.denominator,
            "map_metadata": -1,
            "map_chapters": -1,
            "fflags": "+bitexact",
            "flags:v": "+bitexact",
        }
        if self.version < (5,):  # newer ones hand the colours of the frames on
            options |= index.colours
        if sound:
            options |= {"c:a": "aac", "b:a": "128k", "flags:a": "+bitexact", "max_muxing_queue_size": 9999}
        return options

    # Stream copies -----------------------------------------------------------------------------------

    def _copy(self, path: str, index: Index, pieces: list[Piece]) -> list[Piece]:
        """Copy the packets of those clips that are exactly a run of packets, and prove it by decoding.

        Returns the clips written; the others are left to be encoded. Sound is not copied: with
        `audio: true` every clip is encoded.
        """
        v = index.video
        asis = picture_size(v, self.recipe.height) == (v.width, v.height)
        if self.recipe.audio or not asis or not index.copyable:
            return []
        copied = [piece for piece in pieces if index.copy(piece)]
        exact: list[Piece] = []
        for group in groups(copied):
            wanted = [piece.path.with_suffix(".source") for piece in group]
            framemd5 = {"format": "framemd5", "c:v": "rawvideo"}
            try:
                self._run(path, index.seek(group[0]), "pts", group, [framemd5] * len(group), wanted)
                for piece, source in zip(group, wanted, strict=True):
                    decoded = piece.path.with_suffix(".copy")
                    self._run(str(piece.path), None, "all", [piece], [framemd5], [decoded])
                    if _digests(decoded) == _digests(source) and len(_digests(source)) == len(piece.pts):
                        exact.append(piece)
            except ffmpeg.FFmpegError:
                continue  # what is not proven exact is encoded
        return exact

    # The tar -----------------------------------------------------------------------------------------

    def _pack(self, name: str, pieces: list[Piece]) -> None:
        """Write the unit's clips as one USTAR tar, sorted by source and time, and say where each lies."""
        pieces = [p for p in pieces if p.video.error is None]
        pieces.sort(key=lambda p: (p.video.source.uri, p.clip.start_frame, p.clip.end_frame))
        with (
            self.store.writer(name) as out,
            tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for piece in pieces:
                with open(piece.path, "rb") as f:
                    header = tarfile.TarInfo(f"{piece.clip.clip_id}.mp4")  # uid, gid and mtime are 0
                    header.size = piece.path.stat().st_size
                    sha256 = hashlib.file_digest(f, "sha256").hexdigest()
                    f.seek(0)
                    offset = tar.offset + tarfile.BLOCKSIZE
                    tar.addfile(header, f)
                piece.clip.media = Media(name, offset, header.size, sha256, piece.width, piece.height)


class Index:
    """What is known of a source's packets: where decoding can begin, and what can be copied.

    Args:
        container: the source, opened by PyAV; only demuxed here, never decoded.
    """

    def __init__(self, container: Any, video: Video):
        self.container, self.video = container, video
        self.stream = ffmpeg.picture_stream(container)
        if self.stream is None or video.frames is None:
            raise StageError(f"{video.source.uri}: has no frames to cut")
        none = np.empty((0, 3), np.int64)
        packets = video.frames.packets
        self.packets = none if packets is None or container.format.name not in SEEKABLE else packets
        self.codec = self.stream.codec_context.codec.canonical_name
        self.audio = any(s.type == "audio" for s in container.streams)

    @property
    def colours(self) -> dict[str, int]:
        """ffmpeg's options for what is known of the colours (numbers of ITU-T H.273)."""
        c = self.stream.codec_context
        known = {"colorspace": c.colorspace, "color_primaries": c.color_primaries, "color_trc": c.color_trc}
        return {name: int(value) for name, value in known.items() if value not in (0, 2)}  # RGB, unknown

    @property
    def copyable(self) -> bool:
        """Whether an mp4 player would show a copied stream just as the encoded clips."""
        v = self.video
        return self.codec in COPYABLE and v.pix_fmt == "yuv420p" and v.rotation == 0

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
        if packet is None or not self._fresh(packet):
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

    def _fresh(self, packet: Any) -> bool:
        """Whether a keyframe forgets all that came before: containers also mark recovery points as keyframes.

        H.264: an IDR slice, type 5 (ITU-T H.264, table 7-1); HEVC: an IRAP picture, types 16–23 (H.265,
        table 7-1). Other codecs have no other keyframes.
        """
        if self.codec not in ("h264", "hevc"):
            return True
        types = set()
        for nal in _nals(bytes(packet), self.stream.codec_context.extradata or b"", self.codec):
            types.add(nal & 0x1F if self.codec == "h264" else nal >> 1 & 0x3F)
        if self.codec == "h264":
            return 5 in types and not types & {1, 2, 3, 4}
        return bool(types & set(range(16, 24))) and not types & set(range(16))

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
        if not np.array_equal([p.pts for p in packets], wanted) or not self._fresh(packets[0]):
            return False
        try:
            mux(piece, self.stream, packets)
        except (FFmpegError, ValueError):  # mp4 cannot hold it as it is
            return False
        return True


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


def groups(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Runs of neighbouring clips that one process decodes and encodes, bounded in memory."""
    group: list[Piece] = []
    for piece in pieces:
        v = piece.video
        most = max(1, min(MOST, PIXELS // (v.width * v.height)))
        if group and (len(group) >= most or piece.clip.start_s - max(p.clip.end_s for p in group) > GAP_S):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def picture_size(video: Video, height: int | None) -> tuple[int, int]:
    """Width and height of a clip: even, as 4:2:0 needs, and with `height` the shorter side scaled down to it."""
    w, h = (max(2, side - side % 2) for side in (video.width, video.height))
    if height is None or height >= min(w, h):
        return w, h
    ratio = height / min(w, h)
    return max(2, 2 * round(w * ratio / 2)), max(2, 2 * round(h * ratio / 2))


def picture_filters(video: Video, height: int | None) -> list[tuple[str, list[Any], dict[str, Any]]]:
    """Filters (name, arguments, options) from the upright source picture to the clip's.

    An odd column or row is cut off, a single one doubled; the pixel shape stays. A source that changes its
    size in mid-stream keeps the first (for all others the first filter does nothing).
    """
    w, h = video.width, video.height
    size = picture_size(video, height)
    filters: list[tuple[str, list[Any], dict[str, Any]]] = [("scale", [w, h], {})]
    if w == 1 or h == 1:
        filters = [("scale", list(size), {"flags": "neighbor"})]
    elif w % 2 or h % 2:
        filters.append(("crop", [w - w % 2, h - h % 2, 0, 0], {}))
    if size[0] < w - 1:
        filters.append(("scale", list(size), {}))
    return [
        *filters,
        ("setsar", [f"{video.sar.numerator}/{video.sar.denominator}"], {"max": 65535}),
        ("format", ["yuv420p"], {}),
    ]


def encoder(cut: Cut, fps: float) -> dict[str, Any]:
    """ffmpeg's options for an encoder at constant quality, on one thread where it runs on the CPU.

    Args:
        fps: the source's mean rate, for the distance between keyframes and the header.
    """
    rate = Fraction(fps).limit_denominator(1001) or Fraction(25)
    name = cut.codec
    options: dict[str, Any] = {"c:v": name, "g": max(1, round(cut.keyframe_s * rate)), "threads:v": 1}
    speed = PRESETS.index(cut.preset) if cut.preset in PRESETS else None  # 0, slowest, to 9
    if name == "libx264":
        # The time base is no frame rate, but some ffmpeg take it for one and write an absurd level. And x264 takes
        # detail from fast, busy pictures (32 dB at CRF 18 in an aerial view at 60 fps): no more than this.
        x264 = f"fps={rate}:qpmax={min(51, cut.crf + 7)}"
        return options | {"preset": cut.preset, "crf": cut.crf, "x264-params": x264}
    if name == "libx265":
        x265 = "pools=none:frame-threads=1:log-level=error"
        return options | {"preset": cut.preset, "crf": cut.crf, "x265-params": x265, "tag:v": "hvc1"}
    if name == "libsvtav1":
        number = cut.preset if speed is None else min(12, 3 + speed)
        return options | {"preset": number, "crf": cut.crf, "svtav1-params": "lp=1"}
    if name in ("libaom-av1", "libvpx-vp9", "libvpx"):
        number = cut.preset if speed is None else min(8 if name == "libaom-av1" else 5, speed)
        return options | {"cpu-used": number, "crf": cut.crf, "b:v": 0}
    if name.endswith("_nvenc"):
        number = (
            "p4"
            if speed is None and not cut.preset
            else cut.preset
            if speed is None
            else f"p{max(1, 7 - speed)}"
        )
        return options | {"preset": number, "rc": "vbr", "cq": cut.crf, "b:v": 0}
    return options | {"q:v": cut.crf}


def mux(piece: Piece, template: Any, packets: list[Any], sound: list[Any] | None = None) -> None:
    """Write packets as the piece's mp4, with the source's times from 0 on; notes the size of the picture.

    Args:
        template: the stream that the packets were read from.
        packets: one a frame, in decode order.
        sound: packets of a sound track whose times already fit.
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
    with av.open(f"file:{piece.path}", "w", format="mp4", options=options) as out:
        picture = out.add_stream_from_template(template, opaque=True)
        picture.time_base = Fraction(1, tick)
        for packet, r, t in zip(packets, rank, dts, strict=True):
            packet.stream, packet.time_base = picture, picture.time_base
            packet.pts, packet.dts, packet.duration = int(edges[r]), int(t), int(lasts[r])
        if sound:
            track = out.add_stream_from_template(sound[0].stream, opaque=True)
            for packet in sound:
                packet.stream = track
            packets = sorted([*packets, *sound], key=lambda p: float(p.dts * p.time_base))
        for packet in packets:
            out.mux(packet)
    piece.width, piece.height = template.width, template.height


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for unfinished clips, gone afterwards. Raises StoreError where none can be made.

    Also removes those that killed workers have left: nobody holds their lock any more.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError), _locked(old):
            if time.time() - old.stat().st_mtime > 60:  # a new one may not be locked yet
                shutil.rmtree(old)
    try:
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH))
    except OSError as e:
        raise scratch_full() from e
    with _locked(folder):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which the kernel drops when its holder dies. Raises BlockingIOError."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def scratch_full() -> StoreError:
    return StoreError(
        f"cannot write to {tempfile.gettempdir()}: no space left on it; free some space there or set TMPDIR to "
        "another disk, then run the same command again"
    )


def _digests(framemd5: Path) -> list[str]:
    """The digest of every frame in a file of ffmpeg's framemd5 format."""
    return [line.rsplit(",", 1)[1].strip() for line in framemd5.read_text().splitlines() if line[:1] != "#"]


def _warn(video: Video, text: str) -> None:
    if text not in video.warnings:  # the stage may be called again
        video.warnings.append(text)
