"""Interlaced video is told and shown without combs; the closed form of a moving picture is the reference."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pipeline.split import pictures
from pipeline.tables import video_row
from tests.pipeline.split.test_cut import FFMPEGS, assert_exact, clips_of, ready
from tests.pipeline.split.test_geometry import analysed, cut, encode, psnr, seen

W, H, N = 192, 96, 12


def moving(time: float) -> np.ndarray:
    """float [H, W, 3]: vertical waves that move 5 pixels to the right in a unit of time."""
    y, x = np.mgrid[:H, :W]
    wave = np.sin(2 * np.pi * (x - 5 * time) / 32)
    return np.repeat(
        (128 + 80 * wave + y / 4)[..., None], 3, -1
    )  # grey: making 4:2:0 would mix fields of colour


def interlaced(path: Path, top_first: bool = True, mixed: bool = False, pictures: int = N) -> Path:
    """Frame n: one field of time 2n, the other of 2n + 1; with `mixed` only from the middle on."""
    frames = []
    for n in range(pictures):
        frame, later = moving(2 * n), moving(2 * n + 1)
        if not (mixed and n < pictures // 2):
            frame[top_first::2] = later[top_first::2]
        frames.append(frame)
    order = "tff" if top_first else "bff"
    flags = ("-flags", "+ilme+ildct")
    filters = f"setfield={order}"
    if mixed:
        half = pictures // 2
        filters = (
            f"split[a][b];[a]trim=end_frame={half},setfield=prog[p];"
            f"[b]trim=start_frame={half},setpts=PTS-STARTPTS,{filters}[i];[p][i]concat"
        )  # FFV1 has a flag a frame
        return encode(path, frames, "-c:v", "ffv1", "-pix_fmt", "yuv420p", filters=filters)
    return encode(path, frames, *codec(*flags), filters=filters)


def codec(*flags: str) -> tuple[str, ...]:
    return ("-c:v", "libx264", "-crf", "6", "-bf", "0", "-pix_fmt", "yuv420p", *flags)


def combs(rgb: np.ndarray) -> float:
    """Share of pixels that differ from the rows above and below in the same direction."""
    g = rgb.astype(float).mean(2)
    d = g[1:] - g[:-1]
    return float((d[:-1] * d[1:] < -200).mean())


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
@pytest.mark.parametrize("top_first", [True, False])
def test_interlaced_video_is_told_and_shown_at_the_time_of_its_first_field(top_first, exe, tmp_path):
    video = analysed(interlaced(tmp_path / "i.mp4", top_first), sample_fps=25)
    row = video_row(video)
    assert (row["interlaced"], row["field_order"]) == (1.0, "top" if top_first else "bottom")
    [got] = cut(video, tmp_path, exe)
    assert len(got.pictures) == len(seen(video)) == N
    assert got.times == [n * Fraction(1, 25) for n in range(N)]
    for n in range(1, N - 1):  # at the ends bwdif lacks a neighbour
        for rgb in (seen(video)[n], got.pictures[n]):
            assert psnr(rgb, moving(2 * n)) > 30
            assert combs(rgb) < 0.005


def test_interlaced_video_may_be_kept_as_it_is(tmp_path):
    video = analysed(interlaced(tmp_path / "i.mp4"), sample_fps=25, deinterlace=False)
    assert video.interlaced == 1
    [got] = cut(video, tmp_path, FFMPEGS[0])
    assert combs(seen(video)[5]) > 0.05
    assert combs(got.pictures[5]) > 0.05


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
def test_only_the_frames_that_are_flagged_are_deinterlaced(exe, tmp_path):
    video = analysed(interlaced(tmp_path / "i.mkv", mixed=True, pictures=20), sample_fps=25)
    assert video.interlaced == 0.5
    [got] = cut(video, tmp_path, exe)
    assert [s.frame for s in video.frames.samples] == list(range(20))
    assert len(got.pictures) == 20
    for n in (1, 4, 8, 9, 11, 14, 18):
        assert psnr(seen(video)[n], moving(2 * n)) > 30
        assert psnr(got.pictures[n], moving(2 * n)) > 30


def test_clips_of_interlaced_video_are_frame_exact(tmp_path):
    from tests.fixtures.numbered import write

    options = {"flags": "+ilme+ildct", "x264-params": "tff=1"}
    video = analysed(write(tmp_path / "n.mp4", [512 * n for n in range(60)], options=options))
    assert video.interlaced == 1
    ready(tmp_path)([clips_of(video, (0, 1), (3, 20), (20, 21), (33, 60))])
    assert_exact(tmp_path, video)


def test_a_progressive_video_goes_through_no_filter(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("a filter graph was made")

    monkeypatch.setattr(pictures, "_graph", never)
    video = analysed(encode(tmp_path / "p.mp4", [moving(n) for n in range(N)], *codec()))
    assert (video.interlaced, video.field_order, video.geometry.deinterlace) == (0, "", False)
