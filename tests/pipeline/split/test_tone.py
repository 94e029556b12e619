"""HDR becomes BT.709 by one curve, the same for models and clips; the curve against published values and ffmpeg."""

import subprocess
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.geometry import MATRICES
from pipeline.split import tone
from pipeline.tables import video_row
from tests.pipeline.split.test_cut import FFMPEGS
from tests.pipeline.split.test_geometry import H, W, analysed, cut, encode, psnr, scene, seen

TRANSFERS = {"pq": ("smpte2084", 16), "hlg": ("arib-std-b67", 18)}


def signal(width: int = W, height: int = H) -> np.ndarray:
    """R'G'B' in [0, 1], as PQ or HLG reads it: from black to highlights."""
    return scene(width, height) / 255 * 0.75


def hdr_video(path: Path, hdr: str, pix_fmt: str = "yuv420p10le", tag: str = "bt2020nc") -> Path:
    """The signal in BT.2020, losslessly."""
    matrix = "" if pix_fmt.startswith("gbr") else f":colorspace={tag}"
    to = "" if pix_fmt.startswith("gbr") else ":out_color_matrix=bt2020nc:out_range=tv"
    filters = (
        f"scale=flags=accurate_rnd+full_chroma_int{to},format={pix_fmt},"
        f"setparams=color_primaries=bt2020:color_trc={TRANSFERS[hdr][0]}{matrix}"
    )
    return encode(path, [signal() * 255] * 8, "-c:v", "ffv1", "-pix_fmt", pix_fmt, filters=filters)


@pytest.mark.parametrize(
    ("light", "code"),
    [(0, 0), (0.1, 0.0623), (1, 0.1499), (100, 0.5081), (203, 0.5807), (1000, 0.7518), (10_000, 1)],
)
def test_pq_has_the_values_of_st_2084(light, code):
    """BT.2408, table 1, and the standard's own curve."""
    assert tone.light_to_pq(light) == pytest.approx(code, abs=6e-4)
    assert tone.pq_to_light(tone.light_to_pq(light)) == pytest.approx(light, rel=1e-6, abs=1e-6)


def test_hlg_has_the_values_of_bt_2100():
    """BT.2408: on a display of 1000 cd/m² 75 % is HDR's reference white of 203 cd/m², 38 % is 26 cd/m²."""
    grey = np.repeat(np.array([0, 0.38, 0.75, 1.0])[:, None], 3, 1)
    assert tone.hlg_to_light(grey)[:, 0] == pytest.approx([0, 26, 203, 1000], rel=0.02, abs=1e-3)


@pytest.mark.parametrize("hdr", TRANSFERS)
def test_the_light_is_the_one_that_zscale_finds(hdr):
    rng = np.random.default_rng(0)
    code = rng.integers(0, 48_000, (8, 8, 3), np.uint16)  # below saturation
    if hdr == "hlg":
        code[...] = code[..., :1]  # of colours zscale takes the OOTF channel by channel, BT.2100 by luminance
    planes = code[..., [1, 2, 0]].transpose(2, 0, 1)
    tags = f"setparams=color_primaries=bt2020:color_trc={TRANSFERS[hdr][0]}:colorspace=gbr:range=pc"
    chain = f"{tags},zscale=t=linear:npl=100,format=gbrpf32le"
    source = ["-f", "rawvideo", "-pix_fmt", "gbrp16le", "-s", "8x8", "-i", "-"]
    command = [FFMPEGS[0], "-v", "error", *source, "-vf", chain, "-f", "rawvideo", "-"]
    done = subprocess.run(command, input=planes.tobytes(), capture_output=True, check=True)
    found = np.frombuffer(done.stdout, np.float32).reshape(3, 8, 8).transpose(1, 2, 0)[..., [2, 0, 1]] * 100
    light = {"pq": tone.pq_to_light, "hlg": tone.hlg_to_light}[hdr](code / 65535)
    np.testing.assert_allclose(found, light, rtol=0.01, atol=0.05)


def test_dark_and_middle_tones_stay_and_highlights_roll_off_without_a_step():
    light = np.linspace(0, 1500, 6001)
    shown = tone.rolled_off(light)
    assert np.allclose(shown[light < 85], light[light < 85])
    assert (np.diff(shown) >= -1e-9).all()
    assert np.diff(shown).max() < 1.001 * np.diff(light).max()
    assert shown[light >= 1000] == pytest.approx(203)


def test_greys_stay_grey_and_primaries_are_bt_709s():
    grey = np.repeat(np.linspace(0, 1, 50)[:, None], 3, 1)
    for hdr in TRANSFERS:
        shown = tone.to_709(grey, hdr, 9)
        assert np.ptp(shown, axis=1).max() < 1e-3
        assert shown[[0, -1], 0] == pytest.approx([0, 1], abs=1e-6)
    # BT.709's red in BT.2020's terms (BT.2087, inverse of equation 3) at 50 cd/m²
    red = tone.light_to_pq(50 * np.array([0.6274, 0.0691, 0.0164]))
    assert tone.to_709(red, "pq", 9) == pytest.approx([(50 / 203) ** (1 / 2.4), 0, 0], abs=0.03)


@pytest.mark.parametrize("hdr", TRANSFERS)
def test_the_cube_holds_the_curve(hdr, tmp_path):
    tone.write_cube(tmp_path / "a.cube", hdr, 9)
    head, *rows = (tmp_path / "a.cube").read_text().splitlines()
    assert head == f"LUT_3D_SIZE {tone.LUT_SIZE}"
    n = tone.LUT_SIZE
    red, green, blue = 3, 11, 20
    point = np.array([red, green, blue]) / (n - 1)
    got = [float(v) for v in rows[red + n * green + n * n * blue].split()]
    assert got == pytest.approx(tone.to_709(point, hdr, 9).tolist(), abs=1e-5)


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "gbrp10le"])
@pytest.mark.parametrize("hdr", TRANSFERS)
def test_models_and_clips_see_hdr_by_the_same_curve(hdr, pix_fmt, exe, tmp_path):
    video = analysed(hdr_video(tmp_path / "hdr.mkv", hdr, pix_fmt))
    [got] = cut(video, tmp_path, exe)
    meant = tone.to_709(signal(), hdr, 9) * 255
    assert psnr(seen(video)[0], meant) > 34
    assert psnr(got.pictures[0], meant) > 33
    assert got.stream.pix_fmt == "yuv420p"
    assert video_row(video)["hdr"] == hdr
    (tmp_path / "clip.mp4").write_bytes(got.data)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_primaries, frame.color_trc) == (1, 1, 1)
    thumb = video.frames.thumbs[0]
    small = tone.to_709(signal(48, 27), hdr, 9) * 255
    assert psnr(thumb, small) > 30
    grey = video.frames.grey[0]
    meant_grey = tone.to_709(signal(*grey.shape[::-1]), hdr, 9) @ [0.2126, 0.7152, 0.0722] * 255
    assert psnr(grey, meant_grey) > 30


@pytest.mark.parametrize("exe", FFMPEGS, ids=lambda exe: Path(exe).name)
def test_hdr_may_be_kept_with_its_tags(exe, tmp_path):
    video = analysed(hdr_video(tmp_path / "hdr.mkv", "pq"), hdr="keep")
    [got] = cut(video, tmp_path, exe)
    assert got.stream.pix_fmt == "yuv420p10le"
    assert psnr(got.pictures[0], signal() * 255) > 34  # the signal, not what it shows
    assert psnr(seen(video)[0], tone.to_709(signal(), "pq", 9) * 255) > 34  # models see it as people do
    (tmp_path / "clip.mp4").write_bytes(got.data)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frame = next(container.decode(video=0))
    assert (MATRICES[frame.colorspace], frame.color_primaries, frame.color_trc) == ("bt2020nc", 9, 16)
    with_matrix_untold = analysed(hdr_video(tmp_path / "untold.mkv", "pq", tag="unknown"))
    assert with_matrix_untold.geometry.colours.matrix == 9
