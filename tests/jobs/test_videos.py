"""Videos to look at: every frame once, at its time, in its colours; sheets that show them."""

import av
import numpy as np
import pytest

from jobs.videos import contact_sheet, write_mp4
from tests.fixtures import numbered


def decoded(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@pytest.mark.parametrize(("count", "fps"), [(1, 8.0), (17, 8.0), (30, 23.976)])
def test_an_mp4_has_every_frame_once_at_its_time(tmp_path, count: int, fps: float):
    frames = np.stack([numbered.picture(i) for i in range(count)])
    write_mp4(tmp_path / "x.mp4", frames, fps, 128)
    assert numbered.numbers(tmp_path / "x.mp4") == list(range(count))
    with av.open(str(tmp_path / "x.mp4")) as container:
        times = [float(f.pts * f.time_base) for f in container.decode(video=0)]
    np.testing.assert_allclose(times, np.arange(count) / fps, atol=1e-3)


def test_small_pictures_keep_the_colour_of_every_pixel(tmp_path):
    """Halved chroma would mix neighbours; enlarged by whole pixels it does not."""
    colours = np.array([[230, 60, 50], [60, 120, 230], [60, 200, 90], [230, 200, 40]], np.uint8)
    small = colours[np.random.default_rng(0).integers(0, 4, (2, 16, 24))]
    write_mp4(tmp_path / "x.mp4", small, 8, 128)
    with av.open(str(tmp_path / "x.mp4")) as container:
        found = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert found.shape[1:3] == (128, 192)
    centres = found[:, 4::8, 4::8].astype(int)
    assert np.abs(centres - small.astype(int)).mean() < 4


@pytest.mark.parametrize(
    ("side", "size", "colours"), [(1, (129, 131), "yuv444p"), (128, (258, 262), "yuv420p")]
)
def test_odd_sides_are_kept_and_doubled_where_a_browser_is_to_show_them(tmp_path, side, size, colours):
    write_mp4(tmp_path / "x.mp4", np.zeros((3, 129, 131, 3), np.uint8), 8, side)
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        assert ((stream.height, stream.width), stream.pix_fmt) == (size, colours)


def test_pictures_are_nearly_unchanged_at_their_own_size(tmp_path):
    ramp = np.linspace(40, 200, 7).astype(np.uint8)[:, None, None, None] + np.zeros((48, 64, 3), np.uint8)
    write_mp4(tmp_path / "ramp.mp4", ramp, 7.5)
    found = decoded(tmp_path / "ramp.mp4")
    assert found.shape == (7, 48, 64, 3)
    assert np.abs(found.astype(int) - ramp.astype(int)).max() <= 3
    write_mp4(tmp_path / "odd.mp4", ramp[:, :47, :63], 7.5)
    assert decoded(tmp_path / "odd.mp4").shape == (7, 47, 63, 3)


def test_a_contact_sheet_shows_frames_from_first_to_last_with_words_below():
    frames = np.arange(15, dtype=np.uint8)[:, None, None, None] * np.full((1, 96, 96, 3), 16, np.uint8)
    sheet = np.asarray(contact_sheet({"a long caption " * 12: frames, "b": frames[:3]}))
    row = sheet[8 + 48]  # through the middle of the first row of pictures
    shown = [int(row[8 + 98 * i + 48, 0]) for i in range(8)]
    assert shown == [0, 32, 64, 96, 128, 160, 192, 224]
    below = sheet[8 + 96 + 2 : 8 + 96 + 22, :, 0]
    assert (below < 128).any()  # black letters
    assert (sheet[:, -4:] == 255).all()  # which do not run off the sheet


def test_videos_of_another_kind_are_refused(tmp_path):
    for wrong in (np.zeros((3, 3, 8, 8), np.uint8), np.zeros((3, 8, 8, 3)), np.zeros((0, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"give uint8 \[T, H, W, 3\]"):
            contact_sheet({"a": wrong})
        with pytest.raises(ValueError, match=r"give uint8 \[T, H, W, 3\]"):
            write_mp4(tmp_path / "x.mp4", wrong, 8)
