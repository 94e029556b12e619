"""A clip's sound is in step with its picture, whatever the sound track's time stamps do (20 ms)."""

import io
import wave
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.record import Video
from tests.fixtures.numbered import write
from tests.pipeline.split.test_cut import analysed, clips_of, ready, tool

RATE, SECONDS, FPS = 48000, 8, 5
STEP = 0.020


def beeps(path: Path, channels: int = 1, rate: int = RATE) -> Path:
    """In second k a beep of 400 + 100 k Hz from k + 0.475 to k + 0.525 s."""
    t = np.arange(SECONDS * rate) / rate
    k = np.floor(t)
    x = np.where(np.abs(t - k - 0.5) < 0.025, np.sin(2 * np.pi * (400 + 100 * k) * t), 0) * 0.8
    with wave.open(str(path), "wb") as f:
        f.setnchannels(channels)
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes(np.repeat((x * 32767).astype("<i2")[:, None], channels, 1).tobytes())
    return path


def heard(data: bytes, start_s: float) -> dict[int, float]:
    """Which beep (its second) is heard at which second of the source's clock."""
    with av.open(io.BytesIO(data)) as m:
        if not m.streams.audio:
            return {}
        rate = m.streams.audio[0].rate
        resampler = av.AudioResampler("flt", "mono", rate)
        first, parts = None, []
        for f in m.decode(audio=0):
            first = float(f.pts * f.time_base) if first is None else first
            parts += [g.to_ndarray()[0] for g in resampler.resample(f)]
    y = np.concatenate(parts)
    at = np.flatnonzero(np.abs(y) > 0.2)
    found = {}
    for g in np.split(at, np.flatnonzero(np.diff(at) > rate // 10) + 1):
        if len(g) and g[-1] - g[0] > rate // 100:
            seg = y[g[0] : g[-1] + 1]
            tone = np.abs(np.fft.rfft(seg * np.hanning(len(seg)), rate)).argmax()
            found[round((tone - 400) / 100)] = (g[0] + g[-1]) / 2 / rate + first + start_s
    return found


def clips(out: Path, video: Video) -> list[dict[int, float]]:
    """What is heard of each clip, in seconds from the source's first frame."""
    found = []
    for clip in video.clips:
        with open(out / clip.media.tar, "rb") as f:
            f.seek(clip.media.offset)
            found.append(heard(f.read(clip.media.size), clip.start_s - video.time_of(0)))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """8 s of numbered frames, 5 a second, with the beeps as AAC."""
    folder = tmp_path_factory.mktemp("sound")
    picture = write(folder / "p.mp4", [2560 * n for n in range(FPS * SECONDS)], options={"g": "5", "bf": "0"})
    tool("-i", picture, "-i", beeps(folder / "b.wav"), "-c:v", "copy", "-c:a", "aac", folder / "whole.mp4")
    return folder / "whole.mp4"


def changed(whole: Path, suffix: str, *options: object):
    path = whole.with_name(f"{abs(hash(options))}{suffix}")
    tool("-i", whole, "-c", "copy", *options, path)
    return path


def cut(path: Path, out: Path, *ranges: tuple[int, int]) -> tuple[Video, list[dict[int, float]]]:
    video = clips_of(analysed(path), *(ranges or [(0, 40), (12, 28), (22, 38)]))
    ready(out, audio=True)([video])
    assert video.error is None, video.error
    return video, clips(out, video)


SPANS = [(0, 8), (2.4, 5.6), (4.4, 7.6)]


def assert_in_step(found: list[dict[int, float]], lost: set[int] = frozenset()) -> None:
    for (start, end), beeps in zip(SPANS, found, strict=True):
        inside = {k for k in range(SECONDS) if start < k + 0.45 and k + 0.55 < end}
        assert set(beeps) == inside - lost
        for k, when in beeps.items():
            assert abs(when - (k + 0.5)) < STEP, f"the beep of {k + 0.5} s is heard at {when:.3f} s"


TROUBLE = {  # suffix, options of a stream copy, beeps lost, words of the warning
    "none": (".mp4", (), set(), ""),
    "in MKV": (".mkv", (), set(), ""),
    "in TS": (".ts", ("-muxdelay", "0"), set(), ""),
    "a gap": (".mkv", ("-bsf:a", "noise=drop='between(pts*tb,2,4.3)'"), {2, 3}, ""),
    "two gaps": (
        ".mkv",
        ("-bsf:a", "noise=drop='between(pts*tb,1.2,1.3)+between(pts*tb,5.9,6.2)'"),
        set(),
        "",
    ),
    "it ends early": (".mkv", ("-bsf:a", "noise=drop='gt(pts*tb,5.2)'"), {5, 6, 7}, ""),
    "it starts late": (".mkv", ("-bsf:a", "noise=drop='lt(pts*tb,3.2)'"), {0, 1, 2}, ""),
    "no stamps": (".avi", ("-c:a", "pcm_s16le"), set(), ""),
    "packets of noise": (
        ".mkv",
        ("-bsf:a", "noise=amount='if(between(pts*tb,3.2,4.2),1,0)'"),
        {3},
        "packets of the sound could not be decoded and are silent",
    ),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_sound_stays_in_step_with_the_picture(kind, made, tmp_path):
    suffix, options, lost, words = TROUBLE[kind]
    video, found = cut(changed(made, suffix, *options), tmp_path)
    assert_in_step(found, lost)
    assert words in " ".join(video.warnings)
    if not words:
        assert video.warnings == []


def pieced(whole: Path, *parts: tuple[int, float]) -> Path:
    """A transport stream of parts that end at a second, with so much added to the stamps of their sound."""
    joined, start = whole.with_name(f"{abs(hash(parts))}.ts"), 0
    with open(joined, "wb") as out:
        for end, late in parts:
            part = whole.with_name("part.ts")
            moved = ("-c", "copy", "-bsf:a", f"setts=ts='TS+({late})/TB'", "-muxdelay", "0", "-copyts")
            tool("-ss", start, "-to", end, "-i", whole, *moved, part)
            out.write(part.read_bytes())
            start = end
    return joined


def test_sound_whose_stamps_fall_for_a_while_stays_where_it_was(made, tmp_path):
    video, found = cut(pieced(made, (2, 0), (4, -1.2), (8, 0)), tmp_path)
    assert_in_step(found)
    assert "timestamps of the sound were made up" in video.warnings[0]


def test_sound_whose_stamps_leap_for_a_while_stays_where_it_was(made, tmp_path):
    video, found = cut(pieced(made, (3, 0), (4, 20), (8, 0)), tmp_path)
    assert_in_step(found)
    assert "timestamps of the sound were made up" in video.warnings[0]


def test_sound_that_falls_back_for_good_is_where_its_stamps_say_and_that_is_told(made, tmp_path):
    """Half a second is taken back at 4 s: what follows is heard half a second earlier, as players do."""
    video, [found, *_] = cut(pieced(made, (4, 0), (8, -0.5)), tmp_path)
    for k, when in found.items():
        assert abs(when - (k + 0.5 - 0.5 * (k >= 4))) < STEP
    assert set(found) >= {0, 1, 2, 3, 5, 6, 7}
    assert "the sound's clock falls back at " in video.warnings[0]


def test_sound_follows_the_pictures_over_a_restart_of_the_clock(made, tmp_path):
    part = changed(made, ".ts", "-muxdelay", "0", "-t", "4")
    joined = tmp_path / "joined.ts"
    joined.write_bytes(part.read_bytes() * 2)
    video = analysed(joined)
    restart = int(video.frames.restarts[0, 0])
    first, second = cut(joined, tmp_path / "out", (0, restart), (restart, 2 * restart))[1]
    later = video.time_of(restart) - video.time_of(0)
    for k in range(3):
        assert abs(first[k] - k - 0.5) < STEP
        assert abs(second[k] - later - k - 0.5) < STEP


def test_a_clip_without_any_sound_has_no_track_and_that_is_told(made, tmp_path):
    path = changed(made, ".mkv", "-bsf:a", "noise=drop='gt(pts*tb,5.2)'")
    video, found = cut(path, tmp_path, (0, 12), (30, 38))
    assert set(found[0]) == {0, 1}
    assert found[1] == {}
    assert video.warnings == ["1 of 2 clips have no sound, the first at 6.000 s"]


@pytest.mark.parametrize(
    ("codec", "suffix", "more"),
    [
        ("pcm_s16le", ".mov", ()),
        ("libmp3lame", ".mkv", ()),
        ("libopus", ".mkv", ()),
        ("ac3", ".ts", ("-ac", 6)),
        ("mp2", ".mpg", ()),
        ("aac", ".mp4", ("-ar", 8000)),
        ("aac", ".mp4", ("-ac", 2, "-ar", 44100)),
    ],
)
def test_sound_of_other_codecs_rates_and_layouts_is_in_step(codec, suffix, more, made, tmp_path):
    path = tmp_path / f"other{suffix}"
    video_codec = "mpeg2video" if suffix == ".mpg" else "copy"
    tool("-i", made, "-c:v", video_codec, "-q:v", 2, "-c:a", codec, *more, path)
    video = clips_of(analysed(path), (0, 40), (12, 28), (22, 38))
    ready(tmp_path, audio=True)([video])
    assert video.error is None, video.error
    assert_in_step(clips(tmp_path, video))
    assert video.warnings == []


def test_sound_lasts_as_long_as_the_picture(made, tmp_path):
    path = changed(made, ".mkv", "-bsf:a", "noise=drop='gt(pts*tb,5.2)'")
    video, _ = cut(path, tmp_path, (22, 38))
    media = video.clips[0].media
    data = (tmp_path / media.tar).read_bytes()[media.offset : media.offset + media.size]
    with av.open(io.BytesIO(data)) as m:
        frames = list(m.decode(audio=0))
    assert frames[-1].time + frames[-1].samples / RATE == pytest.approx(16 / 5, abs=0.025)
