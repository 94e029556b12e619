"""Whatever clock a source has, clips hold the frames that were analysed, and none spans a restart of it."""

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pipeline.recipe import Shots
from pipeline.record import Source, Video
from pipeline.split.clock import _repaired, timeline
from pipeline.split.pictures import marks
from pipeline.split.piece import Inexact, Piece
from pipeline.split.shots import ShotStage, given_shots
from tests.fixtures.numbered import picture, write
from tests.pipeline.split.test_cut import FFMPEGS, analysed, assert_exact, clips_of, ready, some, tool

# The timeline ---------------------------------------------------------------------------------------


def line(stamps, step=10, second=250):
    found = timeline(stamps, step, second)
    return found.pts.tolist(), found.repaired, found.restarts.tolist()


def test_usable_times_stay_as_they_are():
    stamps = [-5, 0, 3, 4, 1 << 60]
    assert line(stamps, 1, 1 << 60) == (stamps, 0, [])


def test_one_wild_stamp_costs_one_stamp():
    stamps = list(range(0, 1000, 100))
    for wild in (10**9, -7, 905, None):
        assert line([*stamps[:4], wild, *stamps[5:]], 100, 2500) == (stamps, 1, [])


def test_missing_stamps_are_spread_between_their_neighbours_and_stepped_off_the_ends():
    assert line([None, None, 100, None, None, 400, 500, None], 7)[0] == list(range(-100, 700, 100))
    assert line([None] * 4, 40)[0] == [0, 40, 80, 120]


def test_stamps_out_of_order_are_no_restart():
    swapped = [s for pair in itertools.batched(range(0, 1000, 10), 2) for s in pair[::-1]] if hasattr(
        itertools, "batched") else [s for n in range(0, 1000, 20) for s in (n + 10, n)]  # fmt: skip
    pts, repaired, restarts = line(swapped)
    assert restarts == []
    assert repaired == 50
    assert (np.diff(pts) > 0).all()


@pytest.mark.parametrize("by", [-300, 300, -90, 10**6])
def test_stamps_that_leave_the_clock_for_a_while_are_no_restart(by):
    stamps = list(range(0, 1000, 10))
    assert line([*stamps[:40], *(s + by for s in stamps[40:70]), *stamps[70:]]) == (stamps, 30, [])


def test_a_clock_that_starts_again_goes_on_a_step_behind_the_part_before_it():
    long, short = list(range(0, 1000, 10)), list(range(0, 500, 10))
    assert line([*short, *long]) == (list(range(0, 1500, 10)), 0, [[50, 500, 500]])
    assert line([*long, *short]) == (list(range(0, 1500, 10)), 0, [[100, 1000, 1000]])
    assert line([*long, *short, *short])[2] == [[100, 1000, 1000], [150, 1500, 1500]]


def test_a_clock_that_falls_back_a_little_for_good_starts_again():
    assert line([*range(0, 1000, 10), *range(900, 2000, 10)])[2] == [[100, 100, 1000]]


def test_a_jump_ahead_keeps_its_stamps_and_ends_the_frame_before_it():
    stamps = [*range(0, 500, 10), *range(10**6, 10**6 + 500, 10)]
    assert line(stamps) == (stamps, 0, [[50, 0, 500]])
    slides = list(range(0, 10**6, 10**5))  # shown for 400 s each
    assert line(slides, 10**5) == (slides, 0, [])


def test_wild_stamps_within_a_part_are_repaired_on_its_own_clock():
    first, second = list(range(0, 500, 10)), [*range(0, 200, 10), 7, None, *range(220, 500, 10)]
    assert line([*first, *second]) == (list(range(0, 1000, 10)), 2, [[50, 500, 500]])


def test_a_clock_that_starts_again_all_the_time_tells_nothing():
    assert line([*range(0, 100, 10)] * 10) == (list(range(0, 1000, 10)), 99, [])


def test_repaired_times_always_increase_and_keep_as_many_stamps_as_can_be_kept():
    rng = np.random.default_rng(0)
    for _ in range(200):
        stamps = [
            None if rng.random() < 0.2 else int(s) * 20 for s in rng.integers(0, 12, rng.integers(1, 9))
        ]
        assert (np.diff(line(stamps, 5)[0]) > 0).all()
        pts, repaired, _ = _repaired(stamps, 5)  # of one part
        assert (np.diff(pts) > 0).all()
        known = [s for s in stamps if s is not None]
        longest = max(
            n
            for n in range(len(known) + 1)
            if any(all(np.diff(c) > 0) for c in itertools.combinations(known, n))
        )
        assert repaired == len(stamps) - sum(p == s for p, s in zip(pts.tolist(), stamps, strict=True))
        assert repaired <= len(stamps) - longest  # 20 ticks hold the few frames between two kept stamps


# Frames ---------------------------------------------------------------------------------------------

CFR = [512 * n for n in range(60)]
TICKS = {"pts": list(range(60)), "time_base": Fraction(1, 25)}
B_FRAMES = {"options": {"bf": "2", "g": "12"}}


def stream(suffix: str, codec: str, format: str | None = None, **options):
    """60 numbered frames, with B-frames where the codec has any."""

    def make(path: Path) -> Path:
        return write(path.with_suffix(suffix), **TICKS, codec=codec, format=format, **B_FRAMES | options)

    return make


def joined(suffix: str, codec: str, format: str | None = None, grow: int = 0):
    """Two recordings end to end: frames 0–59, and 60–119 on a clock that starts again."""

    def make(path: Path) -> Path:
        parts = []
        for i in range(2):
            part, size = path.with_suffix(f".{i}{suffix}"), (192 + grow * i, 96 + grow * i // 2)
            parts.append(
                write(part, **TICKS, codec=codec, format=format, size=size, first=60 * i, **B_FRAMES)
            )
        whole = path.with_suffix(suffix)
        whole.write_bytes(b"".join(p.read_bytes() for p in parts))
        return whole

    return make


def restamped(suffix: str, stamps: str, frames: int = 60):
    """A remux whose packets get other stamps: an expression of ffmpeg's setts."""

    def make(path: Path) -> Path:
        plain = write(
            path.with_suffix(".plain.mkv"),
            list(range(frames)),
            Fraction(1, 25),
            options={"bf": "0", "g": "12"},
        )
        tool("-i", plain, "-c", "copy", "-bsf:v", f"setts={stamps}", path.with_suffix(suffix))
        return path.with_suffix(suffix)

    return make


def holed(path: Path) -> Path:
    """A transport stream whose last half comes 20 hours later."""
    parts = [
        write(path.with_suffix(f".{i}.ts"), [t + i * 20 * 3600 * 12800 for t in CFR], first=60 * i)
        for i in range(2)
    ]
    whole = path.with_suffix(".ts")
    whole.write_bytes(b"".join(p.read_bytes() for p in parts))
    return whole


CLOCKS = {
    "MPEG-2 elementary": stream(".m2v", "mpeg2video", "mpeg2video"),
    "MPEG-2 elementary named mpg": stream(".mpg", "mpeg2video", "mpeg2video"),
    "H.264 elementary": stream(".h264", "libx264", "h264"),
    "HEVC elementary": stream(".hevc", "libx265", "hevc"),
    "MPEG-4 elementary": stream(".m4v", "mpeg4", "m4v"),
    "MPEG-2 in TS": stream(".ts", "mpeg2video"),
    "MPEG-2 in PS": stream(".mpg", "mpeg2video", "mpeg"),
    "H.264 in PS": stream(".vob", "libx264", "vob"),
    "MPEG-2 in MKV": stream(".mkv", "mpeg2video"),
    "MPEG-4 in AVI": stream(".avi", "mpeg4"),
    "H.264 in AVI": stream(".avi", "libx264"),
    "H.264 in NUT": stream(".nut", "libx264"),
    "frames shown late": restamped(".mkv", "ts='TS+200*gte(N,30)'"),
    "a stamp twice": restamped(".mkv", "ts='TS-40*eq(N,30)'"),
    "wild stamps": restamped(".nut", "pts='if(eq(N,20)+eq(N,41),PTS+900000,PTS)'"),
}
RESTARTS = {
    "joined TS": joined(".ts", "libx264"),
    "joined TS of two sizes": joined(".ts", "libx264", grow=96),
    "joined MPEG-2 TS": joined(".ts", "mpeg2video"),
    "joined PS": joined(".mpg", "mpeg2video", "mpeg"),
    "joined MKV": joined(".mkv", "libx264"),
    "20 hours ahead": holed,
    "2 hours ahead": restamped(".mkv", "ts='TS+7200000*gte(N,60)'", 120),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Video]:
    folder = tmp_path_factory.mktemp("clocks")
    return {
        kind: analysed(make(folder / kind.replace(" ", "-"))) for kind, make in (CLOCKS | RESTARTS).items()
    }


def again(video: Video) -> Video:
    frames = type(video.frames)(**vars(video.frames))
    return Video(
        **(vars(video) | {"frames": frames, "clips": [], "warnings": [], "error": None, "counts": {}})
    )


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
@pytest.mark.parametrize("kind", CLOCKS)
def test_every_clip_has_its_own_frames_whatever_the_clock(kind, exe, sources, tmp_path):
    assert len(sources[kind].frames.pts) == 60
    for seed in range(2):
        video = some(again(sources[kind]), count=4, seed=seed)
        ready(tmp_path / str(seed), exe)([video])
        assert_exact(tmp_path / str(seed), video)
        assert video.warnings == []  # the first way was right


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
@pytest.mark.parametrize("kind", RESTARTS)
def test_no_clip_spans_a_restart_of_the_clock_and_all_have_their_own_frames(kind, exe, sources, tmp_path):
    video = again(sources[kind])
    n = len(video.frames.pts)
    restart = int(video.frames.restarts[0, 0])
    assert n == 120
    assert restart == 60
    shots = ShotStage(Shots(detector="content"))
    [video] = shots([video])
    assert [(s.start_frame, s.end_frame) for s in video.shots] == [(0, 60), (60, 120)]
    clips_of(video, (0, 60), (60, 120), (55, 60), (60, 65), (3, 20), (70, 110))
    ready(tmp_path, exe)([video])
    assert video.error is None, video.error
    lasts = [c.duration_s for c in video.clips]
    np.testing.assert_allclose(lasts, [60 / 25, 60 / 25, 5 / 25, 5 / 25, 17 / 25, 40 / 25], atol=0.002)
    assert_exact(tmp_path, video)
    assert video.warnings == []


def test_a_restart_is_told_and_takes_no_time(sources):
    for kind in RESTARTS:
        video = sources[kind]
        assert video.counts["clock_restarts"] == 1
        assert any(w.startswith("the clock starts again at frame 60 (") for w in video.warnings)
        assert video.duration_s == pytest.approx(120 / 25, abs=0.05)
        assert video.fps == pytest.approx(25, rel=0.02)


def test_a_given_interval_across_a_restart_becomes_its_longer_part(sources):
    video = again(sources["joined TS"])
    start = video.time_of(0)
    shots = given_shots(video, ((start + 1, start + 4.4),))
    assert [(s.start_frame, s.end_frame) for s in shots] == [(60, 110)]
    assert "is cut short: the clock starts again in it" in video.warnings[0]


# The proof ------------------------------------------------------------------------------------------


def test_a_clip_with_its_neighbours_frames_is_never_taken():
    frames = np.stack([picture(n) for n in range(40)])
    thumbs = frames[:, 1::3, 2::4][:, :27, :48]  # any small picture of them will do
    thumbs = np.ascontiguousarray(np.pad(thumbs, ((0, 0), (0, 27 - thumbs.shape[1]), (0, 0), (0, 0))))
    video = Video(Source("a", "a"), "u")
    video.frames = analysed_frames(thumbs)
    [piece] = [Piece(clips_of(video, (10, 20)), video.clips[0], Path())]
    ends = lambda a, b: np.concatenate([thumbs[a].ravel(), thumbs[b].ravel()])  # noqa: E731
    piece.check(ends(10, 19))
    piece.check((ends(10, 19) // 2 + 40).astype(np.uint8))  # other colours, the same pictures
    for shift in (-3, -1, 1, 2):
        with pytest.raises(Inexact, match=f"came out with frame {10 + shift} in the place of 10"):
            piece.check(ends(10 + shift, 19 + shift))
    with pytest.raises(Inexact, match="frame 20 in the place of 19"):
        piece.check(ends(10, 20))
    with pytest.raises(Inexact, match="without its first or last frame"):
        piece.check(ends(10, 19)[:100])


def analysed_frames(thumbs: np.ndarray):
    from pipeline.record import Frames

    n = len(thumbs)
    none = np.empty(0, np.int64)
    return Frames(np.arange(n), n, thumbs, [], None, none, marks=marks(thumbs))


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shift_that_keeps_count_and_times_is_caught_and_mended(shift, sources, tmp_path):
    """The record's times are one frame off those ffmpeg sees, as MPEG-2 elementary streams once were."""
    video = again(sources["H.264 in NUT"])
    step = int(np.median(np.diff(video.frames.pts)))
    video.frames = type(video.frames)(**(vars(video.frames) | {"pts": video.frames.pts + shift * step}))
    ready(tmp_path)([clips_of(video, (5, 20), (31, 50))])
    assert_exact(tmp_path, video)
    assert "was cut by frame number" in video.warnings[0]


# Variable rate (PySceneDetect #431, #479, #561, #569) -----------------------------------------------


def two_shots(path: Path, codec: str, pts: list[int], time_base: Fraction) -> Path:
    """Numbered frames whose second half is inverted: one cut, at frame len(pts) // 2."""
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, options={"bf": "2", "g": "12"})
        stream.width, stream.height, stream.pix_fmt = 192, 96, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 25) if codec == "mpeg2video" else time_base
        for n, t in enumerate(pts):
            shown = picture(n).copy()
            shown[64:] = shown[64:] // 6 if n < len(pts) // 2 else 200 + shown[64:] // 6  # below the numbers
            frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
            ticks = t * time_base / stream.codec_context.time_base
            frame.pts, frame.time_base = round(ticks), stream.codec_context.time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


FILM = [1001 * n for n in range(60)]  # 24000/1001 frames a second
HELD = np.cumsum([0, *([1, 1, 3, 1, 7, 2] * 10)])[:60].tolist()  # 25ths of a second


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
@pytest.mark.parametrize(
    ("name", "codec", "pts", "tick"),
    [
        ("a.mkv", "mpeg2video", HELD, Fraction(1, 25)),
        ("a.mkv", "libx264", HELD, Fraction(1, 25)),
        ("a.mp4", "libx264", HELD, Fraction(1, 25)),
        ("a.ts", "libx264", FILM, Fraction(1, 24000)),
        ("a.mp4", "libx264", FILM, Fraction(1, 24000)),
    ],
)
def test_shots_of_a_variable_rate_end_at_the_cut_and_the_last_clip_at_the_end(
    name, codec, pts, tick, exe, tmp_path
):
    video = analysed(two_shots(tmp_path / name, codec, pts, tick))
    [video] = ShotStage(Shots(detector="content"))([video])
    spans = [(s.start_frame, s.end_frame) for s in video.shots]
    assert spans == [(0, 30), (30, 60)]
    ready(tmp_path, exe)([clips_of(video, *spans)])
    assert_exact(tmp_path, video)
    first, last = video.clips
    assert first.end_s == last.start_s == pytest.approx(video.time_of(0) + pts[30] * tick, abs=0.002)
    assert last.end_s > last.start_s
    assert last.duration_s == pytest.approx(float((pts[59] - pts[30]) * tick), abs=0.3)
