"""What the models see and what is written is the same picture: the one meant, whatever container and codec say of it.

The picture is a closed form over the shown part, upright; sources hide it behind crops, turns, pixel shapes and
colours. Run with each ffmpeg that CLIPMILL_FFMPEGS names (bench/ffmpegs.py).
"""

import hashlib
import struct
import subprocess
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest

from pipeline.geometry import Geometry
from pipeline.io import ffmpeg
from pipeline.recipe import Decode
from pipeline.record import Source, Video
from pipeline.samples import picture
from pipeline.split.cropping import container_crop
from pipeline.split.decode import analyse
from tests.pipeline.split.test_cut import FFMPEGS, Written, clips_of, read, ready

W, H = 160, 96


def scene(width: int, height: int) -> np.ndarray:
    """float [height, width, 3] RGB, 0 to 255: different in every corner and along each side."""
    y, x = (np.mgrid[:height, :width] + 0.5) / np.array([height, width]).reshape(2, 1, 1)
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * (1.5 * x + y))
    corner = 1 / (
        1 + np.exp(30 * (np.hypot(x - 0.1, 1.2 * (y - 0.15)) - 0.12))
    )  # a light spot at the top left
    rgb = np.stack([50 + 150 * x, 50 + 150 * y, 60 + 120 * wave], -1)
    return rgb + corner[..., None] * (235 - rgb)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, ((np.float64(a) - b) ** 2).mean())))


def encode(path: Path, pictures: list[np.ndarray], *output: object, filters: str = "null") -> Path:
    """Pictures [h, w, 3] RGB at 25 a second; `filters` give them their colours."""
    h, w = pictures[0].shape[:2]
    raw = b"".join(p.round().clip(0, 255).astype(np.uint8).tobytes() for p in pictures)
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{w}x{h}", "-r", "25", "-i", "-"]
    command = [FFMPEGS[0], "-v", "error", "-y", *source, "-vf", filters, *map(str, output), str(path)]
    subprocess.run(command, input=raw, check=True)
    return path


H264 = ("-c:v", "libx264", "-crf", "4", "-pix_fmt", "yuv420p", "-bf", "0")


def still(path: Path, stored: np.ndarray, *more: object) -> Path:
    return encode(path, [stored] * 8, *H264, *more)


def margined(left: int, top: int, right: int, bottom: int, shown: tuple[int, int] = (W, H)) -> np.ndarray:
    """The scene with a chequered margin that must not be seen."""
    w, h = shown
    y, x = np.mgrid[: h + top + bottom, : w + left + right] // 4
    stored = np.repeat(255.0 * ((x + y) % 2)[..., None], 3, 2)
    stored[top : top + h, left : left + w] = scene(w, h)
    return stored


def with_clap(
    path: Path, crop: tuple[int, int, int, int], shown: tuple[int, int] = (W, H), *more: object
) -> Path:
    """An mp4 whose sample entry has a clean aperture (ISO/IEC 14496-12, 12.1.4)."""
    left, top, right, bottom = crop
    data = bytearray(still(path, margined(*crop, shown), *more).read_bytes())
    half = (right - left, bottom - top)  # the aperture's centre lies so many half pixels off
    clap = struct.pack(">I4s8i", 40, b"clap", shown[0], 1, shown[1], 1, -half[0], 2, -half[1], 2)
    at = data.index(b"avcC") - 4
    data[at:at] = clap
    for box in (b"avc1", b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        i = data.rindex(box, 0, at) - 4
        data[i : i + 4] = struct.pack(">I", struct.unpack(">I", data[i : i + 4])[0] + 40)
    path.write_bytes(data)
    return path


def copied(source: Path, path: Path, *before: object, after: tuple[object, ...] = ()) -> Path:
    command = [FFMPEGS[0], "-v", "error", "-y", *before, "-i", source, "-c", "copy", *after, path]
    subprocess.run(list(map(str, command)), check=True)
    return path


def turned(path: Path, degrees: float, flips: tuple[str, ...] = (), nearest: int | None = None) -> Path:
    """Stored such that turning it by `nearest` (else `degrees`) counter-clockwise, then flipping, shows the scene."""
    upright = scene(W, H)
    if "-display_hflip" in flips:
        upright = upright[:, ::-1]
    if "-display_vflip" in flips:
        upright = upright[::-1]
    stored = np.rot90(upright, -(degrees if nearest is None else nearest) // 90)
    plain = still(path.with_suffix(".plain.mp4"), np.ascontiguousarray(stored))
    return copied(plain, path.with_suffix(".mp4"), "-display_rotation", degrees, *flips)


def resized(path: Path, *looks: tuple[int, int, str]) -> Path:
    """Stored width, height and pixel shape change in mid-stream, every 8 frames (a transport stream)."""
    parts = [
        still(
            path.with_suffix(f".{i}.ts"),
            scene(w, h),
            *("-bf", 2, "-muxdelay", 0, "-output_ts_offset", i * 8 / 25),
            *("-bsf:v", f"h264_metadata=sample_aspect_ratio={sar}"),
        )
        for i, (w, h, sar) in enumerate(looks)
    ]
    joined = path.with_suffix(".ts")
    joined.write_bytes(b"".join(p.read_bytes() for p in parts))
    return joined


SHAPES = {
    "plain": lambda p: still(p.with_suffix(".mp4"), scene(W, H)),
    "odd sides": lambda p: encode(
        p.with_suffix(".mp4"), [scene(W + 1, H + 1)] * 8, *H264[:4], "-pix_fmt", "yuv444p"
    ),
    "clap": lambda p: with_clap(p.with_suffix(".mp4"), (40, 16, 24, 8)),
    "clap at odd places": lambda p: with_clap(p.with_suffix(".mp4"), (7, 3, 12, 6), (W + 1, H + 1)),
    "PixelCrop": lambda p: copied(with_clap(p.with_suffix(".mp4"), (40, 16, 24, 8)), p.with_suffix(".mkv")),
    "clap and turned": lambda p: copied(
        with_clap(p.with_suffix(".1.mp4"), (40, 16, 24, 8)), p.with_suffix(".mp4"), "-display_rotation", 180
    ),
    "codec's crop": lambda p: copied(
        still(p.with_suffix(".1.mp4"), margined(6, 10, 10, 6)),
        p.with_suffix(".mp4"),
        after=("-bsf:v", "h264_metadata=crop_left=6:crop_top=10:crop_right=10:crop_bottom=6"),
    ),
    **{f"turned {a}": (lambda p, a=a: turned(p, a)) for a in (90, 180, 270)},
    "turned 30": lambda p: turned(p, 30, nearest=0),
    "turned 61": lambda p: turned(p, 61, nearest=90),
    "turned -100": lambda p: turned(p, -100, nearest=270),
    "mirrored": lambda p: turned(p, 0, ("-display_hflip",)),
    "upside down": lambda p: turned(p, 0, ("-display_vflip",)),
    "turned and mirrored": lambda p: turned(p, 90, ("-display_hflip",)),
}


def stored_as(pix_fmt: str, matrix: str = "unknown", span: str = "tv", codec: str = "ffv1"):
    """The scene in a pixel format, matrix and range, tagged as such."""

    def make(path: Path) -> Path:
        filters = f"format={pix_fmt}"
        if pix_fmt.startswith(("yuv", "gray")):
            to = (
                ""
                if pix_fmt.startswith("gray")
                else f":out_color_matrix={matrix.replace('unknown', 'bt601')}"
            )
            scale = f"scale=out_range={span}{to}:flags=accurate_rnd+full_chroma_int"
            filters = f"{scale},{filters},setparams=range={span}:colorspace={matrix}"
        output = ("-c:v", codec, "-pix_fmt", pix_fmt, "-q:v", 1)
        return encode(path.with_suffix(".mkv"), [scene(W, H)] * 8, *output, filters=filters)

    return make


def claims(matrix: int):
    def make(path: Path) -> Path:
        plain = still(path.with_suffix(".1.mp4"), scene(W, H))
        said = f"h264_metadata=matrix_coefficients={matrix}"
        return copied(plain, path.with_suffix(".mp4"), after=("-bsf:v", said))

    return make


COLOURS = {
    "BT.709": stored_as("yuv420p", "bt709"),
    "SMPTE 240M": stored_as("yuv420p", "smpte240m"),
    "FCC": stored_as("yuv420p", "fcc"),
    "BT.2020": stored_as("yuv420p10le", "bt2020nc"),
    "no word": stored_as("yuv420p"),
    "full range": stored_as("yuv420p", "bt709", "pc"),
    "yuvj": stored_as("yuvj420p", "smpte170m", "pc", "mjpeg"),
    "full range 10 bit 4:2:2": stored_as("yuv422p10le", "bt709", "pc"),
    "4:4:4": stored_as("yuv444p", "bt709"),
    "4:1:1": stored_as("yuv411p", "smpte170m"),
    "12 bit": stored_as("yuv444p12le", "bt709"),
    "alpha": stored_as("yuva420p", "bt709"),
    "grey": stored_as("gray", span="pc"),
    "grey 10 bit": stored_as("gray10le", span="pc"),
    "RGB": stored_as("bgr0"),
    "planar RGB": stored_as("gbrp10le"),
    "RGB with alpha": stored_as("rgba", codec="png"),
    "palette": stored_as("pal8", codec="png"),
    "YCgCo": claims(8),
    "ICtCp": claims(14),
    "reserved": claims(3),
}


def analysed(path: Path, **options) -> Video:
    video = Video(Source(str(path), path.name), "unit-0")
    analyse(str(path), SimpleNamespace(**Decode(**options).model_dump())).fill(video)
    video.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return video


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Video]:
    folder = tmp_path_factory.mktemp("geometry")
    kinds = SHAPES | COLOURS
    return {kind: analysed(kinds[kind](folder / f"{n}")) for n, kind in enumerate(kinds)}


def cut(video: Video, out: Path, exe: str, **recipe) -> list[Written]:
    """The whole of it as one clip, as a reader finds it."""
    assert video.frames is not None
    fresh = Video(**(vars(video) | {"clips": [], "warnings": [], "error": None}))
    clips_of(fresh, (0, len(video.frames.pts)))
    ready(out, exe, crf=4, **recipe)([fresh])
    assert fresh.error is None, fresh.error
    return read(out, fresh)


def seen(video: Video) -> list[np.ndarray]:
    assert video.frames is not None
    return [picture(s) for s in video.frames.samples]


def on_grey(rgb: np.ndarray) -> np.ndarray:
    return np.repeat((rgb @ [0.299, 0.587, 0.114])[..., None], 3, -1)


def shown_by(exe: str, path: Path) -> np.ndarray:
    """uint8 [h, w, 3]: the first picture as an ffmpeg shows it when left to itself."""
    command = [exe, "-v", "error", "-i", str(path), "-frames:v", "1", "-f", "image2pipe", "-c:v", "png", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    return cv2.imdecode(np.frombuffer(done.stdout, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
@pytest.mark.parametrize("kind", SHAPES)
def test_models_and_clips_show_the_part_and_the_side_up_that_are_meant(kind, exe, sources, tmp_path):
    video = sources[kind]
    [got] = cut(video, tmp_path, exe)
    odd = video.width % 2
    meant = scene(W + odd, H + odd)
    if kind == "clap and turned":
        meant = meant[::-1, ::-1]
    assert (video.width, video.height) == (W + odd, H + odd)
    for view in seen(video):
        assert psnr(view, meant) > 32
    for shown in got.pictures:
        assert psnr(shown, meant[:H, :W]) > 32
    assert got.stream.rotation == 0
    askew = kind in ("turned 30", "turned 61", "turned -100")
    assert any("odd angle" in w for w in video.warnings) == askew


@pytest.mark.parametrize(
    "kind", ["clap", "PixelCrop", "codec's crop", "turned 90", "clap and turned", "upside down"]
)
def test_ffmpeg_left_to_itself_shows_the_same(kind, sources):
    video = sources[kind]
    [own] = [exe for exe in FFMPEGS[:1] if ffmpeg.version(exe) >= (7, 1)] or [
        pytest.skip("it does not crop yet")
    ]
    shown = shown_by(own, Path(video.source.uri))
    assert shown.shape[:2] == (video.height, video.width)
    assert psnr(shown, seen(video)[0]) > 32


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
@pytest.mark.parametrize("kind", COLOURS)
def test_models_and_clips_show_the_colours_that_are_meant(kind, exe, sources, tmp_path):
    video = sources[kind]
    if kind == "reserved" and ffmpeg.version(exe)[:2] == (7, 0):
        pytest.skip("ffmpeg 7.0 makes no filters for it")
    [got] = cut(video, tmp_path, exe)
    meant = on_grey(scene(W, H)) if kind.startswith("grey") else scene(W, H)
    least = 25 if kind == "palette" else 32
    for rgb in (seen(video)[0], got.pictures[3]):
        assert psnr(rgb, meant) > least
        # and no cast: every quarter has the colour it should have
        for half in (
            (rgb[:48, :80], meant[:48, :80]),
            (rgb[48:, 80:], meant[48:, 80:]),
            (rgb[:48, 80:], meant[:48, 80:]),
        ):
            assert np.abs(half[0].mean((0, 1)) - half[1].mean((0, 1))).max() < (
                5 if kind == "palette" else 2.5
            )
    assert psnr(seen(video)[0], got.pictures[0]) > least
    assert got.stream.pix_fmt == "yuv420p"
    assert any("colour matrix" in w for w in video.warnings) == (kind in ("YCgCo", "ICtCp"))


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
@pytest.mark.parametrize(
    ("kind", "matrix"),
    [("BT.709", 1), ("full range", 1), ("BT.2020", 9), ("RGB", 6), ("no word", 2), ("ICtCp", 2), ("grey", 2)],
)
def test_a_clips_tags_say_what_its_numbers_mean(kind, matrix, exe, sources, tmp_path):
    [got] = cut(sources[kind], tmp_path, exe)
    path = tmp_path / "clip.mp4"
    path.write_bytes(got.data)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    assert frame.colorspace == matrix
    assert frame.color_range in (0, 1)  # limited


def test_a_geometry_is_the_same_after_its_way_through_plain_values(sources):
    for video in sources.values():
        assert Geometry.of(video.geometry.plain()) == video.geometry


@pytest.mark.parametrize("kind", ["clap", "mirrored", "turned 180", "turned and mirrored", "full range"])
def test_what_a_copied_stream_would_not_carry_is_encoded(kind, sources, tmp_path):
    [got] = cut(sources[kind], tmp_path, FFMPEGS[0], mode="copy")
    assert psnr(got.pictures[0], scene(W, H)) > 32
    assert got.stream.rotation == 0
    assert (got.stream.width, got.stream.height) == (W, H)


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
def test_each_part_of_a_source_that_changes_is_shown_in_its_own_shape(exe, tmp_path):
    looks = [(W, H, "1/1"), (W, H, "4/3"), (2 * W, 2 * H, "4/3"), (96, W, "1/1")]
    video = analysed(resized(tmp_path / "a.ts", *looks), sample_fps=25)
    assert video.breaks() == [8, 24]  # between them only the size changes: a clip may span that
    assert "changes from 160x96 to 160x96 (pixels 4:3) at frame 8 and 2 more times" in video.warnings[0]
    clips_of(video, (0, 8), (8, 16), (10, 24), (24, 32))
    ready(tmp_path, exe, crf=4)([video])
    assert video.error is None
    sizes = [(W, H, 1), (W, H, Fraction(4, 3)), (2 * W, 2 * H, Fraction(4, 3)), (96, W, 1)]
    for clip, got, (w, h, sar) in zip(video.clips, read(tmp_path, video), sizes, strict=True):
        assert (got.stream.width, got.stream.height, got.stream.sar or 1) == (w, h, sar)
        assert len(got.pictures) == clip.end_frame - clip.start_frame
        for shown in got.pictures:
            assert psnr(shown, scene(w, h)) > 32
        views = [picture(s) for s in video.frames.samples if clip.start_frame <= s.frame < clip.end_frame]
        assert len({v.shape for v in views}) == 1
        for view in views:
            assert abs(view.shape[1] / view.shape[0] / float(w * sar / h) - 1) < 0.02
            assert psnr(view, scene(*view.shape[1::-1])) > 32


def test_a_part_that_changed_is_not_copied(tmp_path):
    video = analysed(resized(tmp_path / "a.ts", (W, H, "1/1"), (W, H, "2/1")))
    [got] = cut(video, tmp_path, FFMPEGS[0], mode="copy")
    assert len(got.pictures) == 16


@pytest.mark.parametrize("mode", ["reencode", "copy"])
@pytest.mark.parametrize("codec", ["1/1", "4/3"])
@pytest.mark.parametrize("container", ["", "2:1", "40:33"])
def test_the_containers_pixel_shape_goes_before_the_codecs(container, codec, mode, tmp_path):
    source = still(tmp_path / "a.mp4", scene(W, H), "-bsf:v", f"h264_metadata=sample_aspect_ratio={codec}")
    shape = Fraction(codec)
    if container:
        shape = Fraction(container.replace(":", "/"))
        aspect = shape * W / H
        source = copied(
            source, tmp_path / "b.mp4", after=("-aspect", f"{aspect.numerator}:{aspect.denominator}")
        )
    video = analysed(source)
    [got] = cut(video, tmp_path, FFMPEGS[0], mode=mode)
    assert video.sar == got.stream.sar == shape
    view = seen(video)[0]
    assert abs(view.shape[1] / view.shape[0] - float(shape) * W / H) < 0.02 * float(shape) * W / H
    assert psnr(view, scene(*view.shape[1::-1])) > 32


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 64, b"\x1a\x45\xdf\xa3", b"\0\0\0\x10moov\0\0\0\1trak", b"\xff" * 99]
)
@pytest.mark.parametrize("name", ["mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts"])
def test_a_header_that_is_none_crops_nothing(name, data, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(data)
    assert container_crop(str(path), name, 0, (W, H)) == (0, 0, 0, 0)


@pytest.mark.parametrize("crop", [(W, 0, 0, 0), (0, H, 0, 0), (-1, 0, 1, 0)])
def test_a_crop_that_leaves_nothing_or_reaches_outside_is_none(crop, tmp_path):
    source = with_clap(tmp_path / "a.mp4", (8, 8, 8, 8))
    data = bytearray(source.read_bytes())
    at = data.index(b"clap") + 4
    left, top, right, bottom = crop
    w, h = W + 16 - left - right, H + 16 - top - bottom
    data[at : at + 32] = struct.pack(
        ">8i", w * 0 if left == W else w, 1, h * 0 if top == H else h, 1, left - right, 2, 0, 1
    )
    source.write_bytes(data)
    assert container_crop(str(source), "mov,mp4", 0, (W + 16, H + 16)) == (0, 0, 0, 0)
