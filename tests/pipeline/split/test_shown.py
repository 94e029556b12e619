"""What is read of a video that is handed in: the frames that ffmpeg's own player shows, at the times it shows them."""

from fractions import Fraction

import av
import numpy as np
import pytest

from pipeline.split.opening import DecodeError
from pipeline.split.shown import read
from tests.fixtures import videos
from tests.fixtures.videos import cfr, ffmpeg, made, mirrored, non_square, rotated, vfr


@pytest.mark.parametrize(
    ("maker", "options", "size"),  # size of the picture as it is shown, halved
    [
        (cfr, {}, (videos.SIZE[1] // 2, videos.SIZE[0] // 2)),
        (rotated, {"degrees": 90}, (videos.SIZE[0] // 2, videos.SIZE[1] // 2)),
        (rotated, {"degrees": 180}, (videos.SIZE[1] // 2, videos.SIZE[0] // 2)),
        (rotated, {"degrees": 270}, (videos.SIZE[0] // 2, videos.SIZE[1] // 2)),
        (mirrored, {}, (videos.SIZE[1] // 2, videos.SIZE[0] // 2)),
        (non_square, {"sar": "2/1"}, (videos.SIZE[1] // 2, videos.SIZE[0])),
    ],
    ids=["plain", "90", "180", "270", "mirrored", "wide-pixels"],
)
def test_pictures_are_upright_and_in_square_pixels_as_ffmpeg_shows_them(maker, options, size):
    path = made(maker, **options)
    aspects = []

    def chosen(aspect: float) -> tuple[int, int]:
        aspects.append(aspect)
        return size

    found = read(str(path), chosen, most=5)
    assert aspects == [pytest.approx(size[1] / size[0], rel=0.02)]
    scaled = f"scale={size[1]}:{size[0]}:flags=bicubic+full_chroma_int+accurate_rnd"
    raw = ffmpeg("-i", str(path), "-vf", scaled, "-frames:v", "5", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    expected = np.frombuffer(raw, np.uint8).reshape(5, *size, 3)
    assert found.pictures.shape == expected.shape
    error = np.abs(found.pictures.astype(int) - expected).mean()
    assert error < 4  # chroma is rounded otherwise
    turned = [
        np.abs(found.pictures.astype(int) - expected[:, ::y, ::x]).mean() for y, x in ((1, -1), (-1, 1))
    ]
    assert min(turned) > 10 * error


@pytest.mark.parametrize("fps", [None, 3.0, 8.0, 30.0])
def test_what_is_seen_at_a_rate_is_the_newest_frame_at_each_time_while_the_video_lasts(fps):
    path = made(vfr, frames=20)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        base = stream.time_base
    times = [(f.pts - frames[0].pts) * base for f in frames]
    end = times[-1] + frames[-1].duration * base
    every = read(str(path), lambda _: (24, 32)).pictures
    assert len(every) == 20
    found = read(str(path), lambda _: (24, 32), fps)
    if fps is None:
        assert found.fps == pytest.approx(float(19 / times[-1]), rel=1e-6)
        return
    wanted = []
    while Fraction(len(wanted)) / Fraction(fps) < end:
        at = Fraction(len(wanted)) / Fraction(fps)
        wanted.append(max(i for i, t in enumerate(times) if t <= at + base / 2))
    assert found.fps == fps
    assert np.array_equal(found.pictures, every[wanted])
    assert np.array_equal(read(str(path), lambda _: (24, 32), fps, most=3).pictures, every[wanted[:3]])


def test_a_picture_of_another_shape_is_cropped_at_the_centre():
    path = made(cfr)
    width, height = videos.SIZE
    whole = read(str(path), lambda _: (height, width), most=1).pictures[0]
    tall = read(str(path), lambda _: (height, height), most=1).pictures[0]
    left = (width - height) // 2
    assert np.array_equal(tall, whole[:, left : left + height])


@pytest.mark.parametrize("degrees", [0, 90])
def test_frames_are_found_by_their_numbers_in_the_videos_own_size(degrees):
    path = made(rotated, degrees=degrees)
    width, height = videos.SIZE[::-1] if degrees else videos.SIZE
    every = read(str(path), lambda _: (height, width)).pictures
    found = read(str(path), None, numbers=[0, 3, 4, len(every) + 9]).pictures
    assert np.array_equal(found, every[[0, 3, 4, -1]])


def test_what_is_no_video_is_one_sentence(tmp_path):
    with pytest.raises(DecodeError):
        read(str(made(videos.text)), lambda _: (16, 16))
