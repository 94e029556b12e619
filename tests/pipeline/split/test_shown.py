"""What is read of a video that is handed in: the frames that ffmpeg's own player shows, at the times it shows them."""

from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.split import shown, sought
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


# ---------------------------------------------------------------- frames by number, from the nearest keyframe


X264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p")
OPEN_GOP = "open-gop=1:keyint=12:min-keyint=12:bframes=3:scenecut=0"
X265 = ("-c:v", "libx265", "-x265-params", f"{OPEN_GOP}:log-level=0")
ENCODED = {
    "bframes.mp4": (*X264, "-g", "12", "-bf", "3"),
    "open.mp4": (*X264, "-x264-params", OPEN_GOP),
    "open.mkv": (*X264, "-x264-params", OPEN_GOP),
    "cra.mp4": X265,
    "cra.mkv": X265,
    "every.mp4": (*X264, "-g", "1"),
    "pairs.mp4": (*X264, "-g", "2", "-bf", "1"),
    "fragments.mp4": (*X264, "-g", "12", "-bf", "3", "-movflags", "frag_keyframe+empty_moov"),
    "a.webm": ("-c:v", "libvpx-vp9", "-g", "12", "-deadline", "realtime", "-cpu-used", "8"),
    "hidden.webm": ("-c:v", "libvpx", "-g", "12", "-auto-alt-ref", "1", "-lag-in-frames", "8"),
    "a.ts": (*X264, "-g", "12", "-bf", "3"),
    "packed.avi": ("-c:v", "mpeg4", "-g", "12", "-bf", "2"),
    "fields.mp4": ("-vf", "tinterlace=4", *X264, "-flags", "+ildct+ilme", "-g", "12"),
}
ELSEWHERE = {"hidden.webm", "a.ts", "packed.avi", "fields.mp4", "edit-list.mp4"}  # read from the beginning
PARTS = [[0], [30], [5, 13, 35], [11, 12, 23, 24, 99], [36, 37]]


def encoded(path: Path, name: str) -> Path:
    made_of = "testsrc2=size=96x64:rate=25:duration=" + ("2.4" if name == "fields.mp4" else "1.6")
    ffmpeg("-f", "lavfi", "-i", made_of, *ENCODED[name], str(path))
    return path


def of_name(name: str, folder: Path) -> Path:
    if name in ENCODED:
        return made(encoded, suffix=Path(name).suffix, name=name)
    if name == "edit-list.mp4":  # begins in the midst of a group: its first frames are decoded and not shown
        ffmpeg("-ss", "0.2", "-i", str(of_name("bframes.mp4", folder)), "-c", "copy", str(folder / name))
        return folder / name
    return made(getattr(videos, name))


@pytest.mark.parametrize(
    "name",
    [
        *ENCODED,
        *(
            "edit-list.mp4",
            "vfr",
            "rotated",
            "delayed_start",
            "no_duration",
            "size_change",
            "cover_then_video",
        ),
        *("clock_reset", "truncated", "corrupt", "one_frame", "ten_bit", "non_square"),
    ],
)
def test_sought_frames_are_those_of_decoding_it_all(name, tmp_path):
    path = str(of_name(name, tmp_path))
    for numbers in PARTS:
        whole = shown._from_the_beginning(path, None, numbers=numbers)
        assert np.array_equal(read(path, None, numbers=numbers).pictures, whole.pictures)
        if name in ENCODED or name in ELSEWHERE:
            with pytest.raises(sought.Unsure) if name in ELSEWHERE else nullcontext():
                shown._sought(path, None, numbers)


def test_what_lies_before_the_nearest_keyframe_is_not_decoded(tmp_path):
    path = of_name("bframes.mp4", tmp_path)
    damaged = tmp_path / "damaged.mp4"
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size, p.pts) for p in container.demux(container.streams.video[0]) if p.size]
    first, second, *_ = sorted(pts for *_, pts in packets)
    step = second - first
    for pos, size, pts in packets:
        if 8 * step <= pts - first < 24 * step:  # the first frame tells how it all is shown
            data[pos + 5 : pos + size] = bytes(size - 5)
    damaged.write_bytes(data)
    assert np.array_equal(
        read(str(damaged), None, numbers=[25, 37]).pictures, read(str(path), None, numbers=[25, 37]).pictures
    )
