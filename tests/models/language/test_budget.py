"""Frames, sizes and tokens: against published rules and transformers' own processors."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import VideoLlama3VideoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from models.language.budget import Sampling, fitted, moving, table
from models.language.llava import ONEVISION, PRESETS, Placeholders, build
from models.language.projectors import Projector
from models.language.times import llava_next
from pipeline.samples import spread


@pytest.mark.parametrize("available", [1, 5, 8, 9, 100, 301])
def test_spread_frames_are_the_captioners_or_with_the_ends_linspace(available):
    assert Sampling(8).of(available, 30.0) == spread(range(available), 8)
    ends = Sampling(8, ends=True).of(available, 30.0)
    assert ends == np.linspace(0, available - 1, min(8, available), dtype=int).tolist()


def test_frames_a_second_up_to_a_cap_then_spread():
    one = Sampling(180, fps=1.0)
    assert one.of(300, 30.0) == list(range(0, 300, 30))
    assert one.of(301, 30.0) == [*range(0, 301, 30)]
    assert one.of(30, 29.97) == [0, 29]  # 1.001 s: the second frame is the last there is
    assert one.of(60 * 600, 60.0) == Sampling(180).of(60 * 600, 60.0)  # 10 minutes
    assert len(one.of(60 * 600, 60.0)) == 180
    assert Sampling(16, fps=1.0, least=4).of(45, 30.0) == Sampling(4).of(45, 30.0)
    assert Sampling(16, fps=60.0).of(10, 30.0) == list(range(10))


def test_frames_are_there_in_order_and_at_most_once():
    rng = random.Random(0)
    for _ in range(500):
        fps = rng.choice([None, 0.5, 1.0, 2.0, 7.3])
        sampling = Sampling(rng.randint(1, 40), fps, ends=rng.random() < 0.5)
        available, rate = rng.randint(1, 400), rng.choice([8.0, 23.976, 29.97, 60.0])
        taken = sampling.of(available, rate)
        assert 1 <= len(taken) <= sampling.frames
        assert taken == sorted(set(taken))
        assert 0 <= taken[0] <= taken[-1] < available


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="1 ≤ least ≤ frames"):
        Sampling(4, least=5)
    with pytest.raises(ValueError, match="above 0"):
        Sampling(4, fps=0.0)


def test_sizes_are_those_of_qwen2_vl():
    rng = random.Random(1)
    for _ in range(2000):
        height = rng.randint(1, 3000)
        width = rng.randint(max(1, -(-height // 200)), min(3000, 200 * height))
        most = rng.choice([28 * 28, 200_000, 1_003_520])
        assert fitted(height, width, 28, 784, most) == smart_resize(height, width, 28, 784, most)
    with pytest.raises(ValueError, match="200 times"):
        fitted(2, 500, 28, 784, 10_000)
    with pytest.raises(ValueError, match="at least one token"):
        fitted(100, 100, 28, 100, 700)


def test_static_patches_are_those_that_videollama3_drops():
    torch.manual_seed(0)
    clip = torch.rand(4, 3, 32, 48)
    clip[1] = clip[0]  # nothing moves
    clip[2] = clip[1]
    clip[2, :, 16:, :16] += 0.2  # one cell does
    clip[3] = clip[2] + 0.0003  # below a tenth of 1/255
    kept = moving(clip, (4, 2, 3))
    assert kept.sum((1, 2)).tolist() == [6, 1, 1, 1]
    assert kept[2].nonzero().tolist() == [[1, 0]]
    # as its processor sees it: patches of 8 pixels, those of a cell of 2×2 together
    patches = clip.unflatten(2, (2, 2, 8)).unflatten(5, (3, 2, 8))  # t 3 h m p w m q
    patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(4 * 24, -1)
    theirs = VideoLlama3VideoProcessor()._get_compression_mask(
        patches, torch.tensor([[4, 4, 6]]), torch.tensor([2])
    )
    assert torch.equal(kept.flatten(), theirs)
    assert moving(clip[:1], (1, 2, 3)).all()


TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 32,
    "patch_size": 8,
}


@torch.no_grad()
def test_dropped_tokens_leave_the_sequence_and_sides_need_not_be_the_towers():
    model = build(
        Placeholders(300, 301),
        **PRESETS["tiny"] | {"tower": TOWER, "layer": -1, "projector": {"map": "linear", "shuffle": 2}},
        vocabulary=302,
    ).eval()
    clip = torch.rand(3, 3, 32, 48)
    clip[2] = clip[1]
    kept = moving(clip, model.grid(3, 32, 48))
    assert kept.shape == (3, 2, 3)
    tokens = torch.cat([torch.tensor([5, 6]), torch.full((int(kept.sum()),), 301), torch.tensor([7])])
    assert model(tokens, [clip], kept=[kept]).shape == (2 + 6 + 6 + 1 + 1, 302)
    seen, whole = model.see([clip], [kept])[0], model.see([clip])[0]
    torch.testing.assert_close(seen, whole[kept.flatten()])
    assert model.tokens(3, 32, 48) == len(whole) == 18
    with pytest.raises(ValueError, match="newline: none"):
        Projector(4, 4, newline="row").grid(1, 4, 4)


def test_the_table_says_what_a_clip_costs_under_each_setting():
    onevision = Projector(4, 8, **ONEVISION)

    def tokens(frames, height, width):
        return onevision.tokens(frames, height // 14, width // 14)

    settings = {
        "8 frames": (Sampling(8), 378, 378),
        "1 fps, at most 32": (Sampling(32, fps=1.0), 378, 378),
    }
    lines = table(tokens, settings).splitlines()
    assert lines[0].split() == [
        "setting",
        "pixels",
        "2",
        "s",
        "10",
        "s",
        "60",
        "s",
        "10",
        "s",
        "clips",
        "in",
        "8,192",
    ]
    assert lines[1].split() == [
        "8",
        "frames",
        "378×378",
        "1,569",
        "(8",
        "fr.)",
        "1,569",
        "(8",
        "fr.)",
        "1,569",
        "(8",
        "fr.)",
        "5",
    ]
    assert lines[2].split()[6:] == ["393", "(2", "fr.)", "1,961", "(10", "fr.)", "6,273", "(32", "fr.)", "4"]
    assert len({len(line) for line in lines}) == 1


def test_times_are_told_as_llava_next_video_has_it():
    assert llava_next([0.0, 1.5], 3.0) == (
        "The video lasts for 3.00 seconds, and 2 frames are uniformly sampled from it. "
        "These frames are located at 0.00s,1.50s."
    )


def test_in_training_each_frame_lies_anywhere_in_its_part():
    rng = np.random.default_rng(0)
    drawn = np.array([Sampling(4).of(20, 8.0, rng.random) for _ in range(200)])
    assert (drawn // 5 == np.arange(4)).all()
    assert all(set(column % 5) == set(range(5)) for column in drawn.T)
    assert Sampling(4).of(3, 8.0, rng.random) == [0, 1, 2]
    assert Sampling(4, fps=2.0).of(20, 8.0, rng.random) == Sampling(4, fps=2.0).of(20, 8.0)
