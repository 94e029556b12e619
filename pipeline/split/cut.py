"""Write the clips of a unit of work as mp4 into one staging tar, frame-exactly.

A frame is picked by its PTS: one ffmpeg decodes a source once and hands every clip its frames, so no time
is rounded and no frame counted. Where some PTS are not the frames' own (elementary streams, clocks that start
again, repaired stamps), ffmpeg may see others, and frames are counted from the first. Whatever an ffmpeg of any
age makes of the times of encoded frames, the clip is muxed anew with the source's own, taken to begin at 0. The
encoder starts afresh with every clip and runs on one thread, so a clip's bytes depend on its own frames only,
not on its neighbours.

What came out is checked: as many frames as were asked for, at the times that were asked for, and the first and
the last look more like the frames analysed under their numbers than like the neighbours of those.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline.faults import SourceFault, TransientFault, WorkerFault
from pipeline.io import ffmpeg
from pipeline.io.answer import Refused, checked
from pipeline.io.isolate import Child, ChildError
from pipeline.io.store import Store
from pipeline.recipe import Cut, RecipeError
from pipeline.record import Media, Stills, Video
from pipeline.samples import samples
from pipeline.split import tone
from pipeline.split.cropping import forget_turn
from pipeline.split.encode import as_stored, colour_options, encoder, picture_filters, picture_size
from pipeline.split.packets import Index, mux
from pipeline.split.pictures import THUMB
from pipeline.split.piece import Inexact, Piece, groups
from pipeline.split.sound import Heard
from pipeline.stages import Produces, Resources, each, fail, patiently

SCRATCH = "clipmill-cut-"  # how the names of scratch folders begin
SOUND_GB = 4.0  # address space of the process that decodes sound


class CutStage:
    """Writes `media/<unit>.<hash>.tar` and sets `clip.media`; a source it fails on does not hold up the others."""

    name = "cut"
    whole_unit = True
    lets_go = ("packets", "marks")

    def __init__(self, recipe: Cut, out: Store | str):
        self.recipe = recipe
        self.store = Store.of(out)
        self.resources = Resources(cpus=1)
        self.produces = Produces()
        self.child = Child(SOUND_GB)  # decodes sound

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
                trial = [self.exe, *test, *options, "-f", "mp4", f"{folder}/trial.mp4"]
                patiently(lambda: ffmpeg.run(trial, 60))
            except ffmpeg.FFmpegError as e:
                raise RecipeError(
                    f"cut.codec {self.recipe.codec}: ffmpeg {'.'.join(map(str, self.version))} cannot encode "
                    f"with it ({e}); choose another, e.g. libx264, or name another ffmpeg in CLIPMILL_FFMPEG"
                ) from e

    def __call__(self, videos: list[Video]) -> list[Video]:
        from pipeline.sources.fetch import release

        pieces: list[Piece] = []
        try:
            with scratch() as folder:
                for n, video in enumerate(each(videos)):
                    if video.clips:
                        try:
                            pieces += patiently(partial(self._source, video, folder / str(n)))
                        except Exception as e:
                            fail(video, self.name, e)
                if pieces:
                    self._pack(videos[0].unit, pieces)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise scratch_full() from e
            raise
        finally:
            for video in videos:
                release(video.source)  # no later stage reads it
        return videos

    # One source --------------------------------------------------------------------------------------

    def _source(self, video: Video, folder: Path) -> list[Piece]:
        """Every clip of a source as a file in `folder`, which is emptied first. Raises SourceFault, TransientFault."""
        from pipeline.sources.fetch import localised

        shutil.rmtree(folder, ignore_errors=True)
        with localised(video.source) as local:
            if local.sha256 != video.sha256:
                raise TransientFault(
                    f"{video.source.uri}: changed while it was being curated; run the same command again once "
                    "nothing writes to it"
                )
            return self._cut(video, local.path, folder)

    def _cut(self, video: Video, path: str, folder: Path) -> list[Piece]:
        """Write every clip of a source. Raises SourceFault."""
        import av

        folder.mkdir()
        try:
            path.encode()
        except UnicodeEncodeError:  # ffmpeg-python cannot pass such a name on
            (folder / "source").symlink_to(path)
            path = str(folder / "source")
        clips = sorted(video.clips, key=lambda c: (c.start_frame, c.end_frame))
        pieces = [Piece(video, clip, folder / f"{n}.mp4") for n, clip in enumerate(clips)]
        with av.open(f"file:{path}", options=ffmpeg.OPEN, metadata_errors="replace") as container:
            index = Index(container, video)
            if self.recipe.audio and index.audio:
                self._hear(path, video, pieces)
            copied = self._copy(path, index, pieces) if self.recipe.mode == "copy" else []
            done = {id(piece) for piece in copied}
            for group in groups([p for p in pieces if id(p) not in done]):
                self._encode(path, index, group)
        return pieces

    def _hear(self, path: str, video: Video, pieces: list[Piece]) -> None:
        """Give every piece its sound; where there is none, a warning says so."""
        assert video.frames is not None
        tick = video.time_base
        spans = [(int(p.pts[0]) * tick, (int(p.pts[0]) + int(p.edges[-1])) * tick) for p in pieces]
        shifts = np.append(0, video.frames.restarts[:, 1])
        shifts = shifts[1:][np.diff(shifts) != 0]  # a clock that jumped ahead keeps its stamps
        try:
            moved = [int(s) * tick for s in shifts]
            function, stall_s = "pipeline.split.sound:extract", self.recipe.stall_s
            heard = checked(Heard, self.child.call(function, path, spans, moved, stall_s=stall_s))
            if len(heard.clips) != len(pieces):
                raise Refused("its answer contradicts itself")
        except (ChildError, Refused, MemoryError) as e:
            self.child.close()  # it may no longer be itself
            heard = Heard([None] * len(pieces), [f"no sound: its decoder crashed or hung ({e})"])
        warnings = heard.warnings
        for piece, sound in zip(pieces, heard.clips, strict=True):
            piece.sound = sound
        silent = [p for p in pieces if p.sound is None]
        if silent:
            starts = f"{len(silent)} of {len(pieces)} clips have no sound, the first at"
            warnings.append(f"{starts} {silent[0].clip.start_s:.3f} s")
        for text in warnings:
            _warn(video, text)

    def _encode(self, path: str, index: Index, group: list[Piece]) -> None:
        """Encode a few clips of one source; when that goes wrong, one by one in ever surer ways.

        Raises SourceFault when none of the ways gives the frames that were asked for.
        """
        frames = index.video.frames
        assert frames is not None
        seek = index.seek(group[0])
        ways = [(None, "number")] if frames.by_number else [(seek, "pts")]
        if len(group) == 1:
            ways += (
                [(None, "number"), (None, "pts")] if frames.by_number else [(None, "pts"), (None, "number")]
            )
        trouble: Exception | None = None
        for seek, by in dict.fromkeys(ways):
            try:
                self._try(path, index, seek, by, group)
            except ffmpeg.Stalled as e:
                raise SourceFault(f"{index.video.source.uri}: {e}") from e
            except (ffmpeg.FFmpegError, Inexact) as e:
                trouble = e
                continue
            if trouble and by == "number":
                _warn(index.video, f"{group[0]} was cut by frame number: {trouble}")
            return
        if len(group) == 1:
            raise SourceFault(f"{index.video.source.uri}: {trouble}") from trouble
        for piece in group:
            self._encode(path, index, [piece])

    def _try(self, path: str, index: Index, seek: str | None, by: str, group: list[Piece]) -> None:
        """Encode a group in one way and check it. Raises FFmpegError, Inexact."""
        import av

        raw = [piece.path.with_suffix(".raw.mp4") for piece in group]
        seen = [piece.path.with_suffix(".seen") for piece in group]
        self._run(path, seek, by, group, [self._mp4(piece, index) for piece in group], raw, seen)
        for piece, file, ends in zip(group, raw, seen, strict=True):
            if self.version < (7,):
                forget_turn(file)
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
                piece.check(np.fromfile(ends, np.uint8))
                mux(piece, picture, packets)
            file.unlink()
            ends.unlink()

    def _run(
        self,
        path: str,
        seek: str | None,
        by: str,
        group: list[Piece],
        options: list[dict[str, Any]],
        files: list[Path],
        seen: list[Path] | None = None,
    ) -> None:
        """Decode `path` once, from `seek` (seconds) on, and hand each clip's frames to its own output.

        Args:
            by: 'pts' picks frames by PTS, 'number' by counting them from the first (without `seek`); 'all' does not.
            options: of each output.
            seen: also write the first and the last frame of each clip, small, as raw RGB: what Piece.check takes.
        """
        import ffmpeg as graph  # ffmpeg-python

        source = ffmpeg.source(path) | as_stored(self.version)
        sought = {} if seek is None else {"ss": seek, "seek_timestamp": 1, "noaccurate_seek": None}
        opened = graph.input(**source, **sought)  # lands on the keyframe at or before
        passthrough = {"fps_mode": "passthrough"} if self.version >= (5, 1) else {"vsync": "0"}
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
            filters = picture_filters(
                piece.geometry, piece.video.time_base, self.recipe.height, self._lut(piece)
            )
            for name, args, named in filters:
                frames = frames.filter(name, *args, **named)
            if seen is not None:
                both = frames.filter_multi_output("split", 2)
                frames = both[0]
                ends = both[1].filter("select", f"eq(n,0)+eq(n,{len(piece.pts) - 1})")
                ends = ends.filter("scale", *THUMB, flags="bicubic").filter("format", "rgb24")
                raw = {"format": "rawvideo", "c:v": "rawvideo"}
                outputs.append(graph.output(ends, f"file:{seen[n]}", **passthrough, **raw))
            outputs.append(graph.output(frames, f"file:{file}", **passthrough, **options[n]))
        command = [self.exe, "-y", "-copyts", "-filter_complex_threads", "1"]
        ffmpeg.run(graph.merge_outputs(*outputs).compile(cmd=command), self.recipe.stall_s)

    def _lut(self, piece: Piece) -> Path | None:
        """The .cube file of a source of high dynamic range that is to be tone-mapped, beside its clips."""
        g = piece.video.geometry
        if not g.tone_map:
            return None
        path = piece.path.with_name("tone.cube")
        if not path.exists():
            tone.write_cube(path, g.colours.hdr, g.colours.primaries)
        return path

    def _mp4(self, piece: Piece, index: Index) -> dict[str, Any]:
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
            options |= colour_options(piece.video.geometry)
        return options

    # Stream copies -----------------------------------------------------------------------------------

    def _copy(self, path: str, index: Index, pieces: list[Piece]) -> list[Piece]:
        """Copy the packets of those clips that are exactly a run of packets, and prove it by decoding.

        Returns the clips written; the others are left to be encoded. Sound is not copied: with
        `audio: true` every clip is encoded.
        """
        v = index.video
        asis = picture_size(v.geometry, self.recipe.height) == v.geometry.size
        if self.recipe.audio or not asis or not index.copyable or (v.frames and v.frames.by_number):
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

    def _pack(self, unit: str, pieces: list[Piece]) -> None:
        """Write the unit's clips as one USTAR tar, sorted by source and time, and say where each lies.

        The tar's name holds a hash of what is in it, so another attempt at the unit, which perhaps still goes on
        elsewhere, writes the same bytes or another file. Raises TransientFault where a clip's file has changed.
        """
        pieces = [p for p in pieces if p.video.error is None]
        pieces.sort(key=lambda p: (p.video.source.uri, p.clip.start_frame, p.clip.end_frame))
        sha256 = [_sha256(p.path) for p in pieces]
        stills = [[s.jpeg for s in samples(p.video, p.clip)] if self.recipe.stills else [] for p in pieces]
        hashes = [hashlib.sha256(b"".join(jpegs)).hexdigest() if jpegs else "" for jpegs in stills]
        inside = "".join(
            f"{p.clip.clip_id} {h}{s and f' {s}'}\n" for p, h, s in zip(pieces, sha256, hashes, strict=True)
        )
        name = f"media/{unit}.{hashlib.sha256(inside.encode()).hexdigest()[:12]}.tar"
        with (
            self.store.writer(name) as out,
            tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for piece, wanted, jpegs, hashed in zip(pieces, sha256, stills, hashes, strict=True):
                header = tarfile.TarInfo(f"{piece.clip.clip_id}.mp4")  # uid, gid and mtime are 0
                header.size = size = piece.path.stat().st_size
                offset = tar.offset + tarfile.BLOCKSIZE
                with open(piece.path, "rb") as f:
                    copied = _Hashed(f)
                    tar.addfile(header, copied)
                if (found := copied.sha256.hexdigest()) != wanted:
                    raise TransientFault(
                        f"{piece.path} changed from sha256 {wanted} to {found} while it was copied to {name}"
                    )
                still = None
                if jpegs:
                    still = Stills(tar.offset + tarfile.BLOCKSIZE, tuple(map(len, jpegs)), hashed)
                    header = tarfile.TarInfo(f"{piece.clip.clip_id}.jpgs")
                    header.size = sum(still.sizes)
                    tar.addfile(header, io.BytesIO(b"".join(jpegs)))
                piece.clip.media = Media(name, offset, size, wanted, piece.width, piece.height, still)


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class _Hashed(io.RawIOBase):
    """A file that knows the hash of what was read from it so far."""

    def __init__(self, file: IO[bytes]):
        self.file, self.sha256 = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.sha256.update(data)
        return data


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for unfinished clips, gone afterwards. Raises WorkerFault where none can be made.

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


def scratch_full() -> WorkerFault:
    return WorkerFault(
        f"cannot write to {tempfile.gettempdir()}: no space left on it; free some space there or set TMPDIR to "
        "another disk, then run the same command again"
    )


def _digests(framemd5: Path) -> list[str]:
    """The digest of every frame in a file of ffmpeg's framemd5 format."""
    return [line.rsplit(",", 1)[1].strip() for line in framemd5.read_text().splitlines() if line[:1] != "#"]


def _warn(video: Video, text: str) -> None:
    if text not in video.warnings:  # the stage may be called again
        video.warnings.append(text)
