"""What the one decode finds, against ffmpeg's own full decode, filters and PIL."""

import io
import json
import math
import os
import re
import socket
import threading
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.geometry import Orientation
from pipeline.io.answer import Refused
from pipeline.io.isolate import Child, Stalled
from pipeline.recipe import Decode
from pipeline.record import Source, Video
from pipeline.split.clock import NO_PTS
from pipeline.split.decode import Analysis, DecodeStage, analyse
from pipeline.split.opening import DecodeError
from pipeline.split.pictures import fitted
from pipeline.stages import run_stage
from tests.fixtures import videos as make
from tests.fixtures.videos import made

SHARED = Path(__file__).parents[3] / "shared" / "videos"
OPTIONS = Decode()

# maker, suffix, options: everything that decodes and whose times need no repair
SOUND = [
    (make.cfr, ".mp4", {}),
    (make.cfr, ".ts", {}),
    (make.cfr, ".mp4", {"fps": "30000/1001"}),
    (make.cfr, ".gif", {"codec": "gif", "pix_fmt": "rgb8"}),
    (make.bframes, ".mp4", {}),
    (make.bframes, ".mkv", {}),
    (make.vfr, ".mp4", {}),
    (make.vfr, ".mkv", {}),
    (make.rotated, ".mp4", {"degrees": 90}),
    (make.rotated, ".mp4", {"degrees": 180}),
    (make.rotated, ".mp4", {"degrees": 270}),
    (make.mirrored, ".mp4", {}),
    (make.delayed_start, ".mp4", {}),
    (make.delayed_start, ".mkv", {}),
    (make.non_square, ".mp4", {}),
    (make.odd_size, ".mp4", {}),
    (make.ten_bit, ".mp4", {}),
    (make.alpha, ".mov", {}),
    (make.one_frame, ".mp4", {}),
    (make.one_pixel, ".mp4", {}),
    (make.no_duration, ".mkv", {}),
    (make.zero_duration, ".mp4", {}),
    (make.failing_audio, ".mp4", {}),
    (make.cover_then_video, ".mp4", {}),
]
FLAWED = [
    (make.packed_avi, ".avi", {}),
    (make.size_change, ".ts", {}),
    (make.truncated, ".mp4", {}),
    (make.corrupt, ".mp4", {}),
]


def named(case):
    maker, suffix, options = case
    return "-".join([maker.__name__ + suffix, *map(str, options.values())])


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=named)


def video_of(case) -> Path:
    maker, suffix, options = case
    return made(maker, suffix=suffix, **options)


def full_decode(path: Path) -> tuple[list[int], Fraction]:
    """PTS of every frame and their time base, by ffmpeg -copyts."""
    said = make.ffmpeg(
        *("-copyts", "-i", f"file:{path}", "-map", "0:V:0", "-fps_mode", "passthrough"),
        *("-enc_time_base", "demux", "-c:v", "rawvideo", "-f", "framecrc", "-"),
    ).decode()
    base = next(Fraction(line.split(": ")[1]) for line in said.splitlines() if line.startswith("#tb 0"))
    return [int(line.split(",")[2]) for line in said.splitlines() if not line.startswith("#")], base


def pictures(path: Path, width: int, height: int, pix_fmt: str = "rgb24") -> np.ndarray:
    """Every frame, upright, scaled by ffmpeg's scale filter (bicubic): [n, h, w(, 3)].

    Chroma is sited left, as H.264 has it unless it says otherwise; the filter would take it for centred.
    """
    scale = f"scale={width}:{height}:flags=bicubic:in_chroma_loc=left"
    raw = make.ffmpeg(
        *("-i", f"file:{path}", "-map", "0:V:0", "-fps_mode", "passthrough"),
        *("-vf", scale, "-pix_fmt", pix_fmt, "-f", "rawvideo", "-"),
    )
    colours = (3,) if pix_fmt == "rgb24" else ()
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, *colours)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference in grey levels."""
    assert a.shape == b.shape
    return float(np.abs(a.astype(float) - b).mean())


# Frames and times ----------------------------------------------------------------------------------


@each(SOUND + FLAWED)
def test_frames_and_pts_are_those_of_a_full_decode_by_ffmpeg(case):
    found = analyse(str(video_of(case)), OPTIONS)
    pts, base = full_decode(video_of(case))
    assert [p * found.time_base for p in found.pts.tolist()] == [p * base for p in pts]
    assert found.counts["frames"] == len(pts)


@each(SOUND)
def test_sound_videos_have_no_warnings(case):
    found = analyse(str(video_of(case)), OPTIONS)
    assert found.warnings == []
    assert found.counts["timestamps_repaired"] == 0


def test_variable_rate_times_are_exact_and_the_rate_is_their_mean():
    found = analyse(str(made(make.vfr)), OPTIONS)
    times = make.vfr_times(50)
    assert [t * found.time_base * 1000 for t in found.pts.tolist()] == times
    assert found.fps == pytest.approx(49 / (times[-1] / 1000))


def test_a_delayed_start_stays_in_the_pts_and_out_of_the_duration():
    found = analyse(str(made(make.delayed_start)), OPTIONS)
    assert float(found.pts[0] * found.time_base) == pytest.approx(3.2, abs=1e-3)
    assert found.duration_s == pytest.approx(2.0)


@pytest.mark.parametrize("maker", [make.no_duration, make.zero_duration, make.cfr, make.bframes])
def test_duration_and_rate_come_from_the_frames_whatever_the_header_says(maker):
    suffix = ".mkv" if maker is make.no_duration else ".mp4"
    found = analyse(str(made(maker, suffix=suffix)), OPTIONS)
    assert found.duration_s == pytest.approx(2.0)
    assert found.fps == pytest.approx(25.0)


def test_one_frame_lasts_a_frame():
    found = analyse(str(made(make.one_frame)), OPTIONS)
    assert (found.counts["frames"], found.fps, found.duration_s) == (
        1,
        pytest.approx(25),
        pytest.approx(0.04),
    )


def test_packets_are_those_of_the_file_in_decode_order():
    path = made(make.bframes)
    with av.open(str(path)) as container:
        expected = [(p.pts, p.dts, p.is_keyframe) for p in container.demux(video=0) if p.size]
    np.testing.assert_array_equal(analyse(str(path), OPTIONS).packets, expected)
    assert any(dts != pts for pts, dts, _ in expected)


def test_packets_without_pts_say_so():
    assert (analyse(str(made(make.packed_avi, suffix=".avi")), OPTIONS).packets[:, 0] == NO_PTS).any()


# Pictures ------------------------------------------------------------------------------------------

PICTURED = [c for c in SOUND if c[0] is not make.one_pixel]
UNTURNED = [c for c in PICTURED if c[0] not in (make.rotated, make.mirrored)]  # their chroma is scaled across


@each(UNTURNED)
def test_thumbs_are_ffmpegs_scaled_upright_frames(case):
    found = analyse(str(video_of(case)), OPTIONS)
    assert found.thumbs.shape == (len(found.pts), 27, 48, 3)
    assert found.thumbs.dtype == np.uint8
    assert apart(found.thumbs, pictures(video_of(case), 48, 27)) < 0.1


@each(PICTURED)
def test_grey_frames_are_ffmpegs_scaled_upright_luma(case):
    found = analyse(str(video_of(case)), OPTIONS)
    n, height, width = found.grey.shape
    assert n == len(found.grey_frame)
    expected = pictures(video_of(case), width, height, "gray")[found.grey_frame]
    assert apart(found.grey, expected) < 2


@each(PICTURED)
def test_samples_are_jpegs_of_the_frames_they_name(case):
    path = video_of(case)
    found = analyse(str(path), OPTIONS)
    for frame, jpeg in found.samples:
        image = Image.open(io.BytesIO(jpeg))
        assert image.format == "JPEG"
        assert image.mode == "RGB"
        expected = Image.fromarray(pictures(path, *image.size)[frame])
        assert apart(np.asarray(image.convert("L")), np.asarray(expected.convert("L"))) < 3


def test_samples_agree_with_pil_down_scaling():
    path = made(make.cfr, size=(640, 360), frames=5, filters="gblur=sigma=3")
    found = analyse(str(path), Decode(sample_size=256))
    image = Image.open(io.BytesIO(found.samples[0][1]))
    assert image.size == (256, 144)
    full = Image.fromarray(pictures(path, 640, 360)[0]).resize(image.size, Image.Resampling.BICUBIC)
    assert apart(np.asarray(image), np.asarray(full)) < 2


@each([(make.cfr, ".mp4", {}), (make.vfr, ".mp4", {}), (make.delayed_start, ".mp4", {})])
@pytest.mark.parametrize("rate", [0.7, 2.0, 8.0, 100.0])
def test_kept_frames_are_the_first_at_or_after_each_step_of_the_grid(case, rate):
    found = analyse(str(video_of(case)), Decode(sample_fps=rate, grey_fps=rate))
    seconds = [(p - int(found.pts[0])) * found.time_base for p in found.pts.tolist()]
    steps = [k / Fraction(rate).limit_denominator(1000) for k in range(math.ceil(rate * seconds[-1]) + 1)]
    expected = sorted({min(i for i, s in enumerate(seconds) if s >= t) for t in steps if t <= seconds[-1]})
    assert [frame for frame, _ in found.samples] == expected
    assert found.grey_frame.tolist() == expected


@pytest.mark.parametrize(
    ("size", "sar", "longest", "expected"),
    [
        ((1920, 1080), "1", 512, (512, 288)),
        ((1080, 1920), "1", 512, (288, 512)),
        ((100, 60), "1", 512, (100, 60)),
        ((704, 576), "16/11", 512, (512, 288)),
        ((720, 576), "8/9", 10_000, (640, 576)),
        ((1, 1), "1", 512, (1, 1)),
        ((4000, 1), "1", 100, (100, 1)),
    ],
)
def test_model_size_has_square_pixels_and_is_never_enlarged(size, sar, longest, expected):
    assert fitted(*size, Fraction(sar), longest) == expected


def test_a_pixel_shape_is_reported_upright_and_corrected_in_the_samples():
    found = analyse(str(made(make.non_square, sar="2/1")), OPTIONS)
    assert (found.sar, found.width, found.height) == (2, 160, 96)
    assert Image.open(io.BytesIO(found.samples[0][1])).size == (160, 48)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_makes_the_marked_corner_go_where_turning_takes_it(tmp_path, degrees):
    marked = np.zeros((96, 160, 3), np.uint8)
    marked[:48, :80] = (255, 0, 0)  # top left as stored
    plain = make.from_pictures(tmp_path / "plain.mp4", [marked] * 5)
    path = tmp_path / "turned.mp4"
    make.ffmpeg("-display_rotation", str(degrees), "-i", str(plain), "-c", "copy", str(path))
    found = analyse(str(path), OPTIONS)
    assert found.rotation == degrees
    assert (found.width, found.height) == ((96, 160) if degrees % 180 else (160, 96))
    expected = np.asarray(Image.fromarray(marked).rotate(degrees, expand=True))  # PIL turns counter-clockwise
    image = np.asarray(Image.open(io.BytesIO(found.samples[0][1])))
    assert apart(image, expected) < 6
    assert apart(found.thumbs[0], np.asarray(Image.fromarray(expected).resize((48, 27)))) < 8


@pytest.mark.parametrize("flip", [(), ("-display_hflip",), ("-display_vflip",)])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_every_display_matrix_gives_the_picture_that_ffmpeg_shows(tmp_path, degrees, flip):
    path = tmp_path / "shown.mp4"
    source = make.from_pictures(tmp_path / "plain.mp4", make.moving(3))
    make.ffmpeg("-display_rotation", str(degrees), *flip, "-i", str(source), "-c", "copy", str(path))
    found = analyse(str(path), OPTIONS)
    height, width = found.grey.shape[1:]
    assert apart(found.grey, pictures(path, width, height, "gray")[found.grey_frame]) < 2
    shown = pictures(path, 48, 27)
    assert apart(found.thumbs, shown) < 6  # chroma is scaled before turning here, after it there
    assert min(apart(found.thumbs[:, ::-1], shown), apart(found.thumbs[:, :, ::-1], shown)) > 12


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("flips", [(False, False), (True, True), (True, False), (False, True)])
def test_rotation_and_a_mirror_image_compose_to_the_orientation(transpose, flips):
    orientation = Orientation(transpose, *flips)
    picture = np.arange(6).reshape(1, 2, 3)
    turned = np.rot90(picture, orientation.rotation // 90, axes=(1, 2))
    mirrored = sum((transpose, *flips)) % 2
    np.testing.assert_array_equal(orientation.upright(picture), turned[:, :, ::-1] if mirrored else turned)


def test_transparency_is_dropped_not_blended():
    path = made(make.alpha, suffix=".mov")
    found = analyse(str(path), OPTIONS)
    opaque = analyse(str(made(make.cfr, frames=25, codec="png", pix_fmt="rgb24", suffix=".mov")), OPTIONS)
    assert found.pix_fmt == "rgba"
    assert abs(found.thumbs.mean() - opaque.thumbs.mean()) < 1
    assert (
        apart(found.thumbs, opaque.thumbs) < 5
    )  # swscale reads the two formats with different chroma filters


@pytest.mark.parametrize("matrix", [8, 10, 11, 12, 13, 14])
def test_colours_that_cannot_be_converted_are_approximated_with_a_warning(matrix):
    found = analyse(str(made(make.strange_colours, matrix=matrix)), OPTIONS)
    assert found.warnings == ["the colour matrix is not supported and was taken for BT.601"]
    assert apart(found.thumbs, analyse(str(made(make.cfr, frames=5)), OPTIONS).thumbs) < 1


def test_a_change_of_size_is_a_warning_and_all_pictures_have_one_shape():
    found = analyse(str(made(make.size_change, suffix=".ts")), OPTIONS)
    assert found.thumbs.shape[0] == 50
    assert (found.width, found.height) == make.SIZE
    assert found.warnings == ["the picture size changes from 160x96 to 320x192 at frame 25"]
    assert {Image.open(io.BytesIO(jpeg)).size for _, jpeg in found.samples} == {make.SIZE}
    second = analyse(str(made(make.cfr, frames=25, size=(320, 192))), OPTIONS)
    assert apart(found.thumbs[25:], second.thumbs) < 3


# Trouble -------------------------------------------------------------------------------------------


def test_a_truncated_file_gives_the_frames_it_has_and_a_warning():
    found = analyse(str(made(make.truncated)), OPTIONS)
    assert 10 < found.counts["frames"] < 90
    assert any("pictures end after" in w and "4.00 s" in w for w in found.warnings)


def test_noise_in_mid_stream_costs_the_frames_it_hit_and_a_warning():
    found = analyse(str(made(make.corrupt)), OPTIONS)
    assert 80 < found.counts["frames"] <= 100
    assert any("could not be decoded" in w or "damaged" in w for w in found.warnings)
    whole = analyse(str(made(make.bframes, frames=100, options=("-movflags", "+faststart"))), OPTIONS)
    assert set(found.pts) <= set(whole.pts)
    assert found.end_pts == whole.end_pts


@pytest.mark.parametrize(
    ("maker", "words"),
    [
        (make.headless, "not a readable video"),
        (make.text, "not a readable video"),
        (make.empty, "empty"),
        (make.audio_only, "no video stream .only audio"),
        (make.cover_picture, "no video stream .only a cover picture"),
    ],
)
def test_what_is_no_video_is_refused_with_the_reason(maker, words):
    with pytest.raises(DecodeError, match=words) as e:
        analyse(str(made(maker)), OPTIONS)
    assert "\n" not in str(e.value)


def test_an_image_is_no_video(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "image.mp4", "PNG")
    with pytest.raises(DecodeError, match="png_pipe"):
        analyse(str(tmp_path / "image.mp4"), OPTIONS)


def test_a_missing_file_a_folder_and_a_pipe_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(DecodeError, match="No such file"):
        analyse(str(tmp_path / "missing.mp4"), OPTIONS)
    for name in ("", "pipe.mp4"):
        with pytest.raises(DecodeError, match="not a regular file"):
            analyse(str(tmp_path / name), OPTIONS)


def test_pictures_of_which_none_decodes_are_an_error(tmp_path):
    data = bytearray(made(make.cfr, options=("-movflags", "+faststart")).read_bytes())
    start = data.index(b"mdat") + 4
    data[start:] = bytes(len(data) - start)
    (tmp_path / "zeros.mp4").write_bytes(data)
    with pytest.raises(DecodeError, match="no frame can be decoded"):
        analyse(str(tmp_path / "zeros.mp4"), OPTIONS)


def test_too_large_pictures_and_too_long_sources_are_refused():
    with pytest.raises(DecodeError, match=r"160x96 .* decode\.max_pixels=1000;"):
        analyse(str(made(make.cfr)), Decode(max_pixels=1000))
    for maker, suffix in ((make.cfr, ".mp4"), (make.no_duration, ".mkv"), (make.zero_duration, ".mp4")):
        with pytest.raises(DecodeError, match=r"longer than decode\.max_duration_s=1;"):
            analyse(str(made(maker, suffix=suffix)), Decode(max_duration_s=1.0))
    with pytest.raises(DecodeError):
        analyse(str(made(make.cfr, suffix=".ts")), Decode(max_pixels=1000))


@pytest.mark.parametrize("name", make.WEIRD_NAMES)
def test_a_name_is_only_a_name(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(made(make.one_frame).read_bytes())
    assert analyse(str(path), OPTIONS).counts["frames"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_metadata_that_is_no_utf_8_does_no_harm(tmp_path):
    data = made(make.cfr, options=("-metadata", "title=MARKER")).read_bytes()
    (tmp_path / "latin.mp4").write_bytes(data.replace(b"MARKER", b"\xff\xfe\xe9$()"))
    assert analyse(str(tmp_path / "latin.mp4"), OPTIONS).counts["frames"] == 50


# Playlists -----------------------------------------------------------------------------------------

DISGUISES = [
    (make.hls_playlist, ".mp4"),
    (make.hls_playlist, ".m3u8"),
    (make.concat_playlist, ".mp4"),
    (make.dash_manifest, ".mp4"),
    (make.dash_manifest, ".mpd"),
]


@pytest.mark.parametrize(("maker", "suffix"), DISGUISES)
def test_a_playlist_is_refused_and_the_file_it_names_is_not_opened(tmp_path, maker, suffix):
    secret = tmp_path / "secret.mp4"
    os.mkfifo(secret)  # who opens it waits for a writer for ever
    path = maker(tmp_path / f"list{suffix}", target=str(secret))
    with Child() as child:
        child.call("tests.fixtures.misbehave:pid", stall_s=60)
        with pytest.raises(DecodeError, match="playlist"):
            child.call("pipeline.split.decode:gather", str(path), OPTIONS, stall_s=20, raises=(DecodeError,))


@pytest.mark.parametrize(("maker", "suffix"), DISGUISES)
def test_a_playlist_does_not_reach_the_network(tmp_path, maker, suffix):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        path = maker(tmp_path / f"list{suffix}", target=f"http://127.0.0.1:{port}/secret.ts")
        with pytest.raises(DecodeError, match="playlist"):
            analyse(str(path), OPTIONS)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_without_the_white_lists_the_same_playlist_does_reach_it(tmp_path):
    """The control: what the two tests above would see if nothing were refused."""
    reached = threading.Event()

    def answer(server: socket.socket) -> None:
        server.accept()[0].close()
        reached.set()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/secret.ts"
        path = make.hls_playlist(tmp_path / "list.m3u8", url)
        with pytest.raises(av.error.FFmpegError):
            av.open(str(path), options={"protocol_whitelist": "file,http,tcp"}, timeout=5)
        assert reached.wait(5)


# The stage -----------------------------------------------------------------------------------------


def listed(path: Path) -> Video:
    return Video(Source(uri=str(path), name=path.name), unit="u")


@pytest.fixture
def stage():
    stage = DecodeStage(OPTIONS)
    stage.setup()
    yield stage
    stage.child.close()


def test_the_stage_fills_the_record(stage):
    path = made(make.rotated, degrees=90)
    (video,) = run_stage(stage, [listed(path)])
    found = analyse(str(path), OPTIONS)
    assert video.error is None
    assert len(video.sha256) == 64
    assert (video.codec, video.pix_fmt, video.rotation) == ("h264", "yuv420p", 90)
    assert (video.width, video.height) == make.SIZE[::-1]
    assert (video.fps, video.duration_s, video.sar) == (25.0, 1.0, 1)
    assert video.frames is not None
    np.testing.assert_array_equal(video.frames.thumbs, found.thumbs)
    np.testing.assert_array_equal(video.frames.pts, found.pts)
    assert [(s.frame, s.jpeg) for s in video.frames.samples] == found.samples
    assert video.time_of(0) == 0.0
    assert video.time_of(25) == 1.0


def test_a_bad_video_is_its_own_error_row_and_the_others_are_decoded_once(stage):
    good, bad, other = (listed(made(m)) for m in (make.cfr, make.text, make.bframes))
    run_stage(stage, [good, bad, other])
    assert good.error is None
    assert other.error is None
    assert bad.error is not None
    assert bad.error.stage == "decode"
    assert bad.error.message.startswith("text.mp4: not a readable video")
    assert len(bad.sha256) == 64
    assert set(good.seconds) == {"decode"}


def test_a_second_call_gives_what_one_gave(stage):
    video = listed(made(make.corrupt))
    stage([video])
    once = (list(video.warnings), dict(video.counts), video.frames.thumbs.copy())
    stage([video])
    assert (video.warnings, video.counts) == once[:2]
    np.testing.assert_array_equal(video.frames.thumbs, once[2])


class Instead(Child):
    """A child that runs another function than the one it is asked to."""

    def __init__(self, function, *args, **limits):
        super().__init__(**limits)
        self.instead = f"tests.fixtures.misbehave:{function}", args

    def call(self, function, *args, stall_s, **kwargs):
        name, args = self.instead
        return super().call(name, *args, stall_s=stall_s)


@pytest.mark.parametrize(
    ("child", "words"),
    [
        (Instead("hang"), r"cfr\.mp4: no frame for 1\.5 s; .*decode\.stall_s"),
        (Instead("segfault"), r"cfr\.mp4: the decoder crashed .*SIGSEGV"),
        (Instead("hog", 0.8, max_memory_gb=0.75), r"cfr\.mp4: .*decode\.max_memory_gb"),
    ],
)
def test_hangs_crashes_and_greed_of_the_decoder_are_error_rows(child, words):
    stage = DecodeStage(Decode(stall_s=1.5))
    stage.setup()
    with child:
        child._start()
        stage.child = child
        (video,) = run_stage(stage, [listed(made(make.cfr))])
    assert video.error is not None
    assert re.search(words, video.error.message)


def _changed(**fields):
    """What the child answers of a good video, with some fields of its choice."""
    answer = vars(analyse(str(made(make.cfr)), OPTIONS)) | fields
    return {name: value for name, value in answer.items() if value is not None}


@pytest.mark.parametrize(
    "forged",
    [
        {"thumbs": np.zeros((49, 27, 48, 3), np.uint8)},  # one less than there are frames
        {"thumbs": np.zeros((50, 27, 48, 3), np.int64)},
        {"pts": np.zeros(50, np.int64)},
        {"pts": np.arange(0, -50, -1)},
        {"end_pts": 0},
        {"grey_frame": np.arange(100, 116)},
        {"grey": np.zeros((3, 72, 128), np.uint8)},
        {"sample_jpeg": [b"no picture"] * 4},
        {"sample_jpeg": []},
        {"width": 0},
        {"rotation": 45},
        {"fps": float("nan")},
        {"warnings": [1]},
        {"codec": None},
        {"more": 1},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_a_forged_analysis_is_the_videos_error(forged):
    stage = DecodeStage(OPTIONS)
    with Instead("echo_first", _changed(**forged)) as child:
        stage.child = child
        (video,) = run_stage(stage, [listed(made(make.cfr))])
    assert video.error is not None
    assert "the decoder crashed on this file (its answer" in video.error.message


def test_the_control_of_the_forged_ones_is_taken():
    stage = DecodeStage(OPTIONS)
    with Instead("echo_first", _changed()) as child:
        stage.child = child
        (video,) = run_stage(stage, [listed(made(make.cfr))])
    assert video.error is None


def test_a_sample_that_claims_to_be_huge_is_refused():
    _, jpeg = cv2.imencode(".jpg", np.zeros((8, 600, 3), np.uint8))
    answer = _changed() | {"sample_jpeg": [jpeg.tobytes()] * 4}
    with pytest.raises(Refused, match="picture"):
        Analysis.of(answer, 512)


def test_decoding_beats_while_it_works():
    beats = []
    analyse(str(made(make.cfr)), OPTIONS, beat=lambda: beats.append(1))
    assert len(beats) >= 50
    with Child() as child, pytest.raises(Stalled):
        child.call("tests.fixtures.misbehave:hang", stall_s=1)


def test_a_longer_video_takes_no_more_memory_than_what_is_kept_of_it():
    def peak_mb(frames: int) -> float:
        path = made(make.cfr, frames=frames, size=(640, 360), options=("-preset", "ultrafast"))
        with Child() as child:
            child.call("pipeline.split.decode:gather", str(path), OPTIONS, stall_s=60)
            status = Path(f"/proc/{child.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    # 500 more frames: 165 MB as decoded; 2 MB as thumbs, 2 MB as grey and samples
    assert peak_mb(550) - peak_mb(50) < 25


# Real footage --------------------------------------------------------------------------------------


def manifest() -> list[dict]:
    if not SHARED.is_dir():
        return []
    rows = [json.loads(line) for line in (SHARED / "manifest.jsonl").read_text().splitlines()]
    panda = [r for r in rows if r["file"].startswith("panda70m/")][::29]
    return [r for r in rows if r["file"].startswith("odd/") or r["file"] == "multi_shot/fades.mp4"] + panda


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared videos are not here")
@pytest.mark.parametrize("row", manifest(), ids=lambda r: r["file"])
def test_real_videos_are_what_their_manifest_says(row):
    found = analyse(str(SHARED / row["file"]), OPTIONS)
    assert [p * found.time_base for p in found.pts.tolist()] == [
        p * base for pts, base in [full_decode(SHARED / row["file"])] for p in pts
    ]
    if "error" in row:  # damaged: what decodes is used, with a warning
        assert found.warnings
        return
    assert found.counts["frames"] == row["frames"]
    stored = (found.height, found.width) if found.rotation % 180 else (found.width, found.height)
    assert stored == (row["width"], row["height"])
    assert found.duration_s == pytest.approx(row["seconds"], abs=0.05)
