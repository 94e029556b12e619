"""Clips are frame-exact, whatever the source and the ffmpeg; the tar says where each lies."""

import hashlib
import io
import itertools
import os
import random
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from pipeline.faults import WorkerFault
from pipeline.io import ffmpeg
from pipeline.recipe import Cut, Decode, RecipeError
from pipeline.record import Source, Video
from pipeline.samples import samples
from pipeline.split import piece as piece_module
from pipeline.split.cut import CutStage
from pipeline.split.decode import analyse
from pipeline.split.packets import Index
from pipeline.split.piece import groups
from tests.fixtures.numbered import number, picture, write

SHARED = Path(__file__).parents[3] / "shared" / "videos"
FFMPEGS = [ffmpeg.find(), *filter(None, os.environ.get("CLIPMILL_FFMPEGS", "").split(":"))]

CFR = [512 * n for n in range(90)]  # 25 frames a second at the default 1/12800 s


def irregular(n: int, seed: int = 0) -> list[int]:
    """PTS of a variable frame rate."""
    steps = random.Random(seed).choices([90, 333, 512, 1024, 5000], k=n - 1)
    return np.cumsum([0, *steps]).tolist()


def tool(*args: object) -> None:
    """The bundled ffmpeg, to make test videos with."""
    subprocess.run([FFMPEGS[0], "-v", "error", "-y", *map(str, args)], check=True, stdin=subprocess.DEVNULL)


def delayed(path: Path) -> Path:
    return write(path.with_suffix(".mp4"), [70_001 + t for t in CFR])


def edit_list(path: Path) -> Path:
    """Begins within a group of pictures: the first packets are decoded but, by the edit list, not shown."""
    whole = write(path.with_suffix(".whole.mp4"), CFR, options={"g": "40", "bf": "3"})
    tool("-ss", 1.0, "-i", whole, "-c", "copy", path.with_suffix(".mp4"))
    return path.with_suffix(".mp4")


def negative(path: Path) -> Path:
    """The first PTS is below zero."""
    return write(path.with_suffix(".mkv"), [t - 800 for t in range(0, 90 * 40, 40)], Fraction(1, 1000))


def turned(degrees: int):
    def make(path: Path) -> Path:
        plain = write(path.with_suffix(".plain.mp4"), CFR, turned=degrees)
        tool("-display_rotation", degrees, "-i", plain, "-c", "copy", path.with_suffix(".mp4"))
        return path.with_suffix(".mp4")

    return make


def resized(path: Path) -> Path:
    """The picture size changes in mid-stream."""
    parts = [
        write(path.with_suffix(f".{i}.ts"), [512 * (at + n + 8 * i) for n in range(45)], size=size, first=at)
        for i, (at, size) in enumerate([(0, (192, 96)), (45, (288, 144))])
    ]
    joined = path.with_suffix(".ts")
    joined.write_bytes(parts[0].read_bytes() + parts[1].read_bytes())
    return joined


def made(suffix: str, pts: list[int] = CFR, **options):
    return lambda path: write(path.with_suffix(suffix), pts, **options)


OPEN_GOP = {"x264-params": "open-gop=1:keyint=15:min-keyint=8:bframes=3:b-pyramid=2:scenecut=0"}
SOURCES = {
    "constant rate, B-frames": made(".mp4", options={"bf": "3", "g": "25"}),
    "variable rate": made(".mp4", irregular(90)),
    "variable rate in ms": made(".mkv", [t // 12 for t in irregular(90)], time_base=Fraction(1, 1000)),
    "NTSC": made(".mp4", [1001 * n for n in range(90)], time_base=Fraction(1, 30000)),
    "open GOP": made(".mp4", options=OPEN_GOP),
    "no B-frames": made(".mp4", options={"bf": "0"}),
    "10 bit": made(".mp4", pix_fmt="yuv420p10le"),
    "odd sides": made(".mp4", size=(195, 97), pix_fmt="yuv444p"),
    "transport stream": made(".ts", options={"g": "12"}),
    "Flash": made(".flv", [40 * n for n in range(90)], time_base=Fraction(1, 1000)),
    "MPEG-4 in AVI": made(
        ".avi", list(range(90)), time_base=Fraction(1, 25), codec="mpeg4", options={"bf": "2"}
    ),
    "VP9": made(".webm", [40 * n for n in range(60)], time_base=Fraction(1, 1000), codec="libvpx-vp9"),
    "HEVC": made(".mkv", [40 * n for n in range(60)], time_base=Fraction(1, 1000), codec="libx265"),
    "delayed start": delayed,
    "edit list": edit_list,
    "negative start": negative,
    "turned 90": turned(90),
    "turned 180": turned(180),
    "turned 270": turned(270),
}


def analysed(path: Path, unit: str = "unit-0") -> Video:
    """What the decode stage makes of a file."""
    video = Video(Source(str(path), path.name), unit)
    analyse(str(path), SimpleNamespace(**Decode().model_dump())).fill(video)
    video.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return video


def ready(out: Path, exe: str = FFMPEGS[0], **recipe) -> CutStage:
    stage = CutStage(Cut(**recipe), str(out))
    with pytest.MonkeyPatch.context() as env:
        env.setenv("CLIPMILL_FFMPEG", exe)
        stage.setup()
    return stage


def clips_of(video: Video, *ranges: tuple[int, int]) -> Video:
    video.clips = [video.clip(start, end) for start, end in ranges]
    return video


def some(video: Video, count: int = 5, seed: int = 0) -> Video:
    """Give it random clips that may touch, of one frame at least, among them its first and last frames."""
    assert video.frames is not None
    n = len(video.frames.pts)
    inner = sorted(random.Random(seed).sample(range(3, n - 3), 2 * count - 2))
    cuts = [0, 1, *inner, n - 2, n]
    return clips_of(video, *zip(cuts[::2], cuts[1::2], strict=True))


@dataclass
class Written:
    """A clip as a reader finds it."""

    data: bytes
    pictures: list[np.ndarray]  # uint8 [h, w, 3]
    times: list[Fraction]  # seconds
    lasts: Fraction  # seconds, of the stream
    stream: SimpleNamespace


def read(out: Path, video: Video) -> list[Written]:
    found = []
    for clip in video.clips:
        assert clip.media is not None
        with open(out / clip.media.tar, "rb") as f:
            f.seek(clip.media.offset)
            data = f.read(clip.media.size)
        assert hashlib.sha256(data).hexdigest() == clip.media.sha256
        with av.open(io.BytesIO(data)) as container:
            s = container.streams.video[0]
            known = SimpleNamespace(
                codec=s.codec_context.codec.canonical_name,
                width=s.width,
                height=s.height,
                sar=s.sample_aspect_ratio,
                pix_fmt=s.pix_fmt,
                sound=[p.size for a in container.streams.audio for p in container.demux(a) if p.size],
            )
            container.seek(0)
            frames = list(container.decode(s))
            known.rotation = frames[0].rotation
            found.append(
                Written(
                    data,
                    [f.to_ndarray(format="rgb24") for f in frames],
                    [f.pts * s.time_base for f in frames],
                    s.duration * s.time_base,
                    known,
                )
            )
    return found


def assert_exact(out: Path, video: Video, first: int = 0) -> None:
    """Every clip shows just its own frames, by their numbers, at the source's times; `first`: of the source."""
    assert video.error is None, video.error
    for clip, got in zip(video.clips, read(out, video), strict=True):
        frames = range(clip.start_frame, clip.end_frame)
        assert [number(p) for p in got.pictures] == [first + n for n in frames]
        assert got.times == [(video.pts_of(n) - video.pts_of(frames[0])) * video.time_base for n in frames]
        assert got.lasts == (video.end_of(clip.end_frame) - video.pts_of(clip.start_frame)) * video.time_base
        assert got.stream.rotation == 0
        assert got.stream.pix_fmt == "yuv420p"
        assert (clip.media.width, clip.media.height) == (got.stream.width, got.stream.height)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Video]:
    """Every kind of source, analysed."""
    folder = tmp_path_factory.mktemp("sources")
    return {kind: analysed(make(folder / kind.replace(" ", "-"))) for kind, make in SOURCES.items()}


def fresh(video: Video) -> Video:
    """The same source before it is cut; stages change the record."""
    return Video(**(vars(video) | {"clips": [], "warnings": [], "error": None}))


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
@pytest.mark.parametrize("kind", SOURCES)
def test_every_clip_shows_just_its_own_frames_at_their_times(kind, exe, sources, tmp_path):
    video = some(fresh(sources[kind]))
    ready(tmp_path, exe)([video])
    assert_exact(tmp_path, video, first=25 if kind == "edit list" else 0)
    assert video.warnings == []  # no second way was needed


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
def test_clips_may_overlap_and_come_in_any_order(exe, sources, tmp_path):
    video = clips_of(fresh(sources["variable rate"]), (40, 80), (10, 60), (10, 60), (0, 90))
    ready(tmp_path, exe)([video])
    assert_exact(tmp_path, video)


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
@pytest.mark.parametrize(
    "kind", ["constant rate, B-frames", "variable rate in ms", "edit list", "HEVC", "VP9"]
)
def test_a_clips_bytes_depend_on_its_own_frames_only(kind, exe, sources, tmp_path, monkeypatch):
    ranges = [(3, 9), (12, 30), (30, 31), (33, 58)]
    together = clips_of(fresh(sources[kind]), *ranges)
    ready(tmp_path / "together", exe)([together])
    monkeypatch.setattr(piece_module, "MOST", 1)
    apart = clips_of(fresh(sources[kind]), *ranges)
    ready(tmp_path / "apart", exe)([apart])
    monkeypatch.setattr(Index, "seek", lambda *_: None)
    unsought = clips_of(fresh(sources[kind]), *ranges[::-1])
    ready(tmp_path / "unsought", exe)([unsought])
    digests = [c.media.sha256 for c in together.clips]
    assert [c.media.sha256 for c in apart.clips] == digests
    assert [c.media.sha256 for c in unsought.clips] == digests[::-1]


@pytest.mark.parametrize(
    ("kind", "sought"),
    [("constant rate, B-frames", True), ("HEVC", False), ("open GOP", False), ("transport stream", False)],
)
def test_ffmpeg_seeks_only_to_keyframes_that_forget_the_past(kind, sought, sources):
    # x265's default keyframe distance is longer than the test video, x264's open GOPs begin with recovery points
    video = clips_of(fresh(sources[kind]), (57, 60))
    with av.open(video.source.uri, options=ffmpeg.OPEN) as container:
        piece = piece_module.Piece(video, video.clips[0], Path())
        seek = Index(container, video).seek(piece)
    assert (seek is not None) == sought
    if sought:
        assert seek == "2.000000"  # frame 50


def test_a_process_is_bounded_in_memory_and_does_not_decode_long_gaps():
    def pieces(width: int, height: int, *starts: float) -> list:
        video = Video(Source("a", "a"), "u", width=width, height=height)
        clip = SimpleNamespace
        shown = SimpleNamespace(size=(width, height))
        return [
            SimpleNamespace(video=video, geometry=shown, clip=clip(start_s=s, end_s=s + 5)) for s in starts
        ]

    close = [6.0 * n for n in range(40)]
    assert [len(g) for g in groups(pieces(640, 360, *close))] == [16, 16, 8]
    assert [len(g) for g in groups(pieces(1280, 720, *close))] == [8] * 5
    assert [len(g) for g in groups(pieces(1920, 1080, *close))] == [3] * 13 + [1]
    assert [len(g) for g in groups(pieces(7680, 4320, *close))] == [1] * 40
    assert [len(g) for g in groups(pieces(640, 360, 0, 6, 12, 100, 106))] == [3, 2]


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
def test_clips_of_a_source_that_changes_its_size_have_the_size_of_their_largest_frame(exe, tmp_path):
    video = clips_of(analysed(resized(tmp_path / "resized")), (0, 1), (3, 20), (30, 60), (70, 90))
    warnings = list(video.warnings)
    ready(tmp_path, exe)([video])
    assert_exact(tmp_path, video)
    assert [c.media.width for c in video.clips] == [192, 192, 288, 288]
    assert video.warnings == warnings


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
def test_frames_are_counted_where_ffmpegs_times_are_not_the_records(exe, sources, tmp_path):
    video = fresh(sources["constant rate, B-frames"])
    pts = video.frames.pts + np.arange(90) % 2  # times that ffmpeg does not know
    video.frames = type(video.frames)(**(vars(video.frames) | {"pts": pts}))
    ready(tmp_path, exe)([clips_of(video, (5, 20), (31, 60))])
    assert_exact(tmp_path, video)
    assert "cut by frame number" in video.warnings[0]


def test_sides_become_even_and_the_pixel_shape_stays(tmp_path):
    wide = write(tmp_path / "wide.mp4", CFR[:9], size=(251, 121), pix_fmt="yuv444p")
    tool("-i", wide, "-c", "copy", "-aspect", "40:11", tmp_path / "sar.mp4")
    video = clips_of(analysed(tmp_path / "sar.mp4"), (0, 9))
    ready(tmp_path)([video])
    [got] = read(tmp_path, video)
    assert (got.stream.width, got.stream.height) == (250, 120)
    assert got.stream.sar == video.sar != 1
    inside = picture(0, 251, 121)[:120, :250].astype(float)
    assert psnr(got.pictures[0], inside) > 30


def test_one_pixel_is_a_video_too(tmp_path):
    source = tmp_path / "-one pixel's.mp4"
    tool("-f", "lavfi", "-i", "color=red:size=2x2:rate=5:duration=1", "-vf", "crop=1:1:exact=1", "-pix_fmt",
         "yuv444p", source)  # fmt: skip
    video = clips_of(analysed(source), (0, 2), (3, 5))
    ready(tmp_path)([video])
    assert [g.pictures[0].shape for g in read(tmp_path, video)] == [(2, 2, 3), (2, 2, 3)]


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
@pytest.mark.parametrize(
    ("kind", "height", "size"),
    [
        ("constant rate, B-frames", 48, (96, 48)),
        ("turned 90", 48, (96, 48)),
        ("constant rate, B-frames", 960, (192, 96)),
    ],
    ids=["shorter side", "of the upright picture", "never enlarged"],
)
def test_height_scales_the_shorter_side_down(kind, height, size, exe, sources, tmp_path):
    video = clips_of(fresh(sources[kind]), (7, 30))
    ready(tmp_path, exe, height=height)([video])
    assert_exact(tmp_path, video)
    assert (video.clips[0].media.width, video.clips[0].media.height) == size


# Stream copies ---------------------------------------------------------------------------------------


def packets(data: bytes | Path) -> list[bytes]:
    with av.open(io.BytesIO(data) if isinstance(data, bytes) else str(data)) as container:
        return [bytes(p) for p in container.demux(video=0) if p.size]


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
@pytest.mark.parametrize(
    "kind", ["constant rate, B-frames", "no B-frames", "VP9", "HEVC", "open GOP", "edit list"]
)
def test_copies_are_as_exact_as_encoded_clips(kind, exe, sources, tmp_path):
    video = clips_of(fresh(sources[kind]), (0, 25), (25, 50), (30, 45), (50, 55), (0, 50))
    ready(tmp_path, exe, mode="copy")([video])
    assert_exact(tmp_path, video, first=25 if kind == "edit list" else 0)


def test_what_is_a_run_of_packets_from_a_keyframe_is_copied_and_nothing_else(sources, tmp_path):
    video = clips_of(
        fresh(sources["constant rate, B-frames"]), (0, 25), (25, 50), (26, 50), (25, 75), (25, 48)
    )
    ready(tmp_path, mode="copy")([video])
    source = packets(Path(video.source.uri))
    copied = [packets(got.data) for got in read(tmp_path, video)]
    assert copied[0] == source[:25]
    assert copied[1] == source[25:50]
    assert copied[3] == source[25:75]
    assert copied[2] != source[26:50]  # begins within a group of pictures
    assert_exact(tmp_path, video)


def test_a_recovery_point_is_not_taken_for_a_keyframe(sources, tmp_path):
    video = fresh(sources["open GOP"])
    keys = video.frames.packets[video.frames.packets[:, 2] == 1, 0]
    assert len(keys) > 3  # the container calls them keyframes
    starts = np.searchsorted(video.frames.pts, keys)
    ready(tmp_path, mode="copy")([clips_of(video, *itertools.pairwise(starts[1:]))])
    assert_exact(tmp_path, video)
    source = set(packets(Path(video.source.uri)))
    assert not any(set(packets(got.data)) & source for got in read(tmp_path, video))


@pytest.mark.parametrize("kind", ["10 bit", "turned 90", "odd sides"])
def test_what_an_encoded_clip_would_look_unlike_is_not_copied(kind, sources, tmp_path):
    video = clips_of(fresh(sources[kind]), (0, 90))
    ready(tmp_path, mode="copy")([video])
    assert_exact(tmp_path, video)


# Sound -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def beeping(tmp_path_factory) -> Path:
    """A source that is loud in the first half of every second only."""
    folder = tmp_path_factory.mktemp("sound")
    silent = write(folder / "silent.mp4", CFR, options={"g": "25"})
    tool("-i", silent, "-f", "lavfi", "-i", "aevalsrc='lt(mod(t,1),0.5)*sin(2*PI*440*t)':s=48000:d=3.6", "-c:v",
         "copy", "-c:a", "aac", folder / "beeping.mp4")  # fmt: skip
    return folder / "beeping.mp4"


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
def test_sound_begins_and_ends_with_the_picture(exe, beeping, tmp_path):
    video = clips_of(
        analysed(beeping), (10, 60)
    )  # 0.4 to 2.4 s: loud until 0.1, from 0.6 to 1.1 and from 1.6
    ready(tmp_path, exe, audio=True)([video])
    assert_exact(tmp_path, video)
    [got] = read(tmp_path, video)
    with av.open(io.BytesIO(got.data)) as container:
        rate = container.streams.audio[0].rate
        wave = np.zeros(3 * rate)
        for frame in container.decode(audio=0):
            at = round(frame.time * rate)
            samples = frame.to_ndarray()[0][max(0, -at) :]
            wave[max(0, at) : max(0, at) + len(samples)] = samples
    loud = np.abs(wave).reshape(-1, rate // 100).max(1) > 0.2  # every 10 ms
    edges = np.flatnonzero(np.diff(loud.astype(int))) + 1
    np.testing.assert_allclose(edges, [10, 60, 110, 160, 200], atol=3)


def test_sound_does_not_depend_on_the_neighbours_either(beeping, tmp_path, monkeypatch):
    ranges = [(2, 20), (50, 60), (60, 88)]
    together = clips_of(analysed(beeping), *ranges)
    ready(tmp_path / "together", audio=True)([together])
    monkeypatch.setattr(piece_module, "MOST", 1)
    apart = clips_of(analysed(beeping), *ranges)
    ready(tmp_path / "apart", audio=True)([apart])
    assert [c.media.sha256 for c in together.clips] == [c.media.sha256 for c in apart.clips]


def test_without_audio_there_is_no_sound_track(beeping, tmp_path):
    video = clips_of(analysed(beeping), (10, 60))
    ready(tmp_path)([video])
    assert read(tmp_path, video)[0].stream.sound == []


def test_a_sound_track_that_fails_costs_the_sound_only(beeping, tmp_path):
    """The sound is of a codec that nothing decodes."""
    broken = tmp_path / "broken.mkv"
    tool("-i", beeping, "-c", "copy", broken)
    broken.write_bytes(broken.read_bytes().replace(b"A_AAC", b"A_ZZZ"))
    video = clips_of(analysed(broken), (10, 60))
    ready(tmp_path, audio=True)([video])
    assert_exact(tmp_path, video)
    assert video.warnings == [
        "no sound: no decoder for it",
        "1 of 1 clips have no sound, the first at 0.400 s",
    ]


# The tar, the unit -----------------------------------------------------------------------------------


def test_the_tar_is_the_same_every_time_and_sorted_by_source_and_start(sources, tmp_path):
    def run(out: Path, order: int) -> tuple[list[Video], Path]:
        videos = [fresh(sources["variable rate"]), fresh(sources["NTSC"])][::order]
        for video in videos:
            clips_of(video, *[(40, 50), (3, 9), (12, 30)][::order])
        stage = ready(out)
        stage(videos)
        stage(videos)  # called again, as after a failure further on
        (tar,) = (out / "media").glob("unit-0.*.tar")
        return videos, tar

    (videos, first), (_, second) = run(tmp_path / "a", 1), run(tmp_path / "b", -1)
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as tar:
        members = tar.getmembers()
    assert all(m.isreg() and (m.mtime, m.uid, m.gid, m.uname, m.gname) == (0, 0, 0, "", "") for m in members)
    assert tar.format == tarfile.USTAR_FORMAT or not tar.pax_headers
    by_start = [(v.source.uri, c.start_frame, c) for v in videos for c in v.clips]
    ordered = [c for *_, c in sorted(by_start, key=lambda row: row[:2])]
    names = [[f"{c.clip_id}.mp4", *([f"{c.clip_id}.jpgs"] if c.media.stills else [])] for c in ordered]
    assert [m.name for m in members] == [n for of_clip in names for n in of_clip]
    clips, stills = ([m for m in members if m.name.endswith(kind)] for kind in (".mp4", ".jpgs"))
    assert [(m.offset_data, m.size) for m in clips] == [(c.media.offset, c.media.size) for c in ordered]
    kept = [(c, c.media.stills) for c in ordered if c.media.stills]
    assert kept
    assert [(m.offset_data, m.size) for m in stills] == [(s.offset, sum(s.sizes)) for _, s in kept]
    data = first.read_bytes()
    for clip, s in kept:
        (shown,) = (b"".join(x.jpeg for x in samples(v, clip)) for v in videos if clip in v.clips)
        assert data[s.offset : s.offset + sum(s.sizes)] == shown
        assert hashlib.sha256(shown).hexdigest() == s.sha256


def test_a_source_that_fails_does_not_hold_up_the_others(sources, tmp_path):
    good, bad, gone = (fresh(sources[k]) for k in ("NTSC", "variable rate", "open GOP"))
    for video in (good, bad, gone):
        clips_of(video, (3, 9))
    bad.sha256 = "0" * 64
    gone.source = Source(str(tmp_path / "gone.mp4"), "gone.mp4")
    ready(tmp_path)([bad, good, gone])
    assert_exact(tmp_path, good)
    assert bad.error is not None
    assert bad.error.stage == "cut"
    assert "changed while it was being curated" in bad.error.message
    assert gone.error is not None
    assert bad.clips == gone.clips == []
    with tarfile.open(tmp_path / good.clips[0].media.tar) as tar:
        assert len(tar.getmembers()) == 1


def test_without_clips_there_is_no_tar(sources, tmp_path):
    ready(tmp_path)([fresh(sources["NTSC"])])
    assert not (tmp_path / "media").exists()


def test_frames_that_are_not_there_are_an_error_that_tells_the_clip(sources, tmp_path):
    video = fresh(sources["NTSC"])
    pts = np.append(video.frames.pts, video.frames.pts[-1] + 1001 * np.arange(1, 11))
    video.frames = type(video.frames)(**(vars(video.frames) | {"pts": pts}))
    ready(tmp_path)([clips_of(video, (80, 100))])
    assert video.error is not None
    assert video.error.message.endswith("the clip at 2.669–3.003 s came out with 10 frames instead of 20")


def test_a_full_disk_ends_the_run_and_leaves_nothing(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    stage = ready(tmp_path / "out")
    fake = tmp_path / "ffmpeg"
    fake.write_text("#!/bin/sh\necho 'av_interleaved_write_frame(): No space left on device' >&2\nexit 1\n")
    fake.chmod(0o755)
    stage.exe = str(fake)
    video = clips_of(fresh(sources["NTSC"]), (3, 9))
    with pytest.raises(WorkerFault, match="free some space there or set TMPDIR"):
        stage([video])
    assert video.error is None
    assert list((tmp_path / "scratch").iterdir()) == []
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_ffmpeg_lacks_is_an_error_before_any_work(tmp_path):
    with pytest.raises(RecipeError, match=r"cut\.codec libnosuch: ffmpeg .* choose another, e\.g\. libx264"):
        ready(tmp_path, codec="libnosuch")


@pytest.mark.parametrize("codec", ["libx265", "libsvtav1", "libaom-av1", "libvpx-vp9", "mpeg4"])
def test_other_encoders_are_frame_exact_too(codec, sources, tmp_path):
    try:
        stage = ready(tmp_path, codec=codec, crf=12)
    except RecipeError as e:
        pytest.skip(str(e))
    video = clips_of(fresh(sources["variable rate"]), (3, 9), (40, 60))
    stage([video])
    assert_exact(tmp_path, video)


# Real footage ----------------------------------------------------------------------------------------


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.square(a.astype(float) - b).mean()
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def upright_grey(path: Path, wanted: set[int], rotation: int) -> dict[int, np.ndarray]:
    """uint8 [h, w] of some frames of a source, decoded by PyAV."""
    with av.open(str(path), options=ffmpeg.OPEN) as container:
        frames = enumerate(container.decode(video=0))
        return {n: np.rot90(f.to_ndarray(format="gray"), rotation // 90) for n, f in frames if n in wanted}


REAL = [
    "multi_shot/structuralize.mp4",
    "odd/mma_test.avi",
    "odd/unordered.mov",
    "odd/rotated_90.mov",
    "odd/delayed_start.mp4",
    "odd/transparent.webm",
    "single_shot/arm_wrestling.mp4",
]


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
@pytest.mark.parametrize("name", REAL)
def test_first_and_last_frames_of_real_clips_are_the_sources(name, exe, tmp_path):
    if not (SHARED / name).exists():
        pytest.skip(f"no ../shared/videos/{name}")
    video = analysed(SHARED / name)
    n = len(video.frames.pts)
    inner = sorted(random.Random(1).sample(range(1, n), min(n - 1, 3) // 2 * 2))
    clips_of(video, *zip([0, *inner][::2], [*inner, n][::2], strict=False))
    ready(tmp_path, exe)([video])
    assert video.error is None, video.error
    edges = {f for c in video.clips for f in (c.start_frame, c.end_frame - 1)}
    source = upright_grey(SHARED / name, {f + d for f in edges for d in (-1, 0, 1)}, video.rotation)
    for clip, got in zip(video.clips, read(tmp_path, video), strict=True):
        assert len(got.pictures) == clip.end_frame - clip.start_frame
        with av.open(io.BytesIO(got.data)) as container:
            grey = [f.to_ndarray(format="gray") for f in container.decode(video=0)]
        for at, frame in ((0, clip.start_frame), (-1, clip.end_frame - 1)):
            assert psnr(grey[at], source[frame]) >= 35
            for other in (frame - 1, frame + 1):
                if other in source and psnr(source[other], source[frame]) < 35:  # it moves
                    assert psnr(grey[at], source[other]) < psnr(grey[at], source[frame]) - 3


def test_the_shared_video_with_failing_sound_is_cut(tmp_path):
    source = SHARED / "odd" / "video_with_failing_audio.mp4"
    if not source.exists():
        pytest.skip("no ../shared/videos/odd/video_with_failing_audio.mp4")
    shutil.copy(source, tmp_path / "copy.mp4")
    video = clips_of(analysed(tmp_path / "copy.mp4"), (10, 60), (100, 140))
    ready(tmp_path, audio=True)([video])
    assert video.error is None, video.error
    assert [len(g.pictures) for g in read(tmp_path, video)] == [50, 40]
