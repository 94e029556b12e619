"""What a vision–language model is shown of a file that somebody hands in."""

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.training.vlm.squares import Squares
from models.language.budget import Sampling
from models.language.pixels import Pixels
from pipeline.io.store import Store
from pipeline.shards.pixels import BrokenSample
from pipeline.split import shown
from tests.fixtures import videos
from tests.fixtures.videos import cfr, made, rotated

PIXELS = Pixels(32, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def visuals():
    return Squares(PIXELS, Sampling(4), {n: n for n in range(1, 5)}, 1, as_images=False)


@pytest.mark.parametrize(
    ("maker", "options"), [(cfr, {}), (rotated, {"degrees": 90})], ids=["plain", "turned"]
)
def test_frames_of_a_file_are_those_of_a_source_of_the_mill(visuals, maker, options):
    """The turned one is also looked at upright."""
    path = str(made(maker, **options))
    found = visuals.clip(path)
    width, height = videos.SIZE[::-1] if options else videos.SIZE
    every = shown.read(path, lambda _: (height, width)).pictures
    numbers = Sampling(4).of(len(every), 1.0)
    assert torch.equal(found.frames, PIXELS.resized(every[numbers]))
    assert len(found.seconds) == 4


def test_a_photograph_is_looked_at_upright(visuals, tmp_path):
    upright = np.zeros((40, 80, 3), np.uint8)
    upright[:, :40] = 255  # white is left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(np.rot90(upright)).save(tmp_path / "photo.png", exif=exif)
    found = visuals.image(str(tmp_path / "photo.png")).frames[0].float()
    assert found[:, :, 4].mean() > 250
    assert found[:, :, -4].mean() < 5


def test_a_picture_that_would_fill_the_memory_is_a_broken_sample(visuals, tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BrokenSample):
        visuals.image(str(tmp_path / "bomb.png"))


@pytest.mark.parametrize(
    ("maker", "options"), [(cfr, {}), (rotated, {"degrees": 90})], ids=["plain", "turned"]
)
def test_a_video_on_an_object_store_looks_as_the_file_does(
    visuals, object_store, monkeypatch, maker, options
):
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    far, file = object_store.bucket(), made(maker, **options)
    Store(far).write_bytes("a.mp4", file.read_bytes())
    here, there = visuals.clip(str(file)), visuals.clip(f"{far}/a.mp4")
    assert torch.equal(there.frames, here.frames)
    assert there.seconds == here.seconds


def test_times_and_frames_are_of_the_video_and_not_of_its_cover(visuals):
    found = visuals.clip(str(made(videos.cover_then_video)))
    assert len(found.seconds) == 4
    assert len({x.numpy().tobytes() for x in found.frames}) == 4
