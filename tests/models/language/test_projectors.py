"""Projectors: what is known of the number of tokens and of where in the picture they look."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.language.projectors import Projector, QFormer, pixel_shuffle, projector


def test_llava_next_video_has_210_tokens_a_frame_and_llava_15_has_576():
    pooled = Projector(4, 8, pool=2, newline="row")
    assert pooled.tokens(1, 27, 27) == 210
    assert pooled.tokens(64, 27, 27) == 64 * 210
    assert Projector(4, 8).tokens(1, 24, 24) == 576
    assert Projector(4, 8, map="linear", shuffle=4).tokens(1, 32, 32) == 64  # nanoVLM


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"map": "linear", "shuffle": 2},
        {"pool": 2, "newline": "row"},
        {"pool": 2, "mode": "average", "newline": "frame", "temporal": 2},
        {"pool": 2, "newline": "clip", "whole_images": True},
        {"temporal": 3, "shuffle": 2},
        {"map": "qformer", "queries": 3, "heads": 2},
        {"map": "qformer", "queries": 3, "heads": 2, "per_frame": True},
    ],
)
def test_there_are_as_many_tokens_as_are_told_beforehand(options, frames):
    made = projector(6, 8, options)
    assert made(torch.randn(2, frames, 6, 4, 6)).shape == (2, made.tokens(frames, 6, 4), 8)


def test_pixel_shuffle_is_torchs_pixel_unshuffle_with_channels_last():
    x = torch.randn(2, 3, 6, 4, 5)
    theirs = F.pixel_unshuffle(x.flatten(0, 1).permute(0, 3, 1, 2), 2)  # channel c of offset k at 4 c + k
    theirs = theirs.permute(0, 2, 3, 1).unflatten(-1, (5, 4)).transpose(-1, -2).flatten(-2)
    assert torch.equal(pixel_shuffle(x, 2).flatten(0, 1), theirs)
    with pytest.raises(ValueError, match="shuffle=4 does not divide the grid of 6×4"):
        pixel_shuffle(x, 4)


@pytest.mark.parametrize("mode", ["bilinear", "average"])
def test_pooling_by_two_is_the_mean_of_four_neighbours(mode):
    """Which bilinear interpolation to half the side is, as well."""
    made = Projector(3, 4, map="linear", pool=2, mode=mode)
    x = torch.randn(1, 2, 4, 6, 3)
    means = x.unflatten(2, (2, 2)).unflatten(4, (3, 2)).mean((3, 5)).flatten(1, 3)
    torch.testing.assert_close(made(x), made.linear_1(means))


def test_bilinear_pooling_of_an_odd_grid_is_weighted_by_overlap_of_centres():
    """27 → 14 as LLaVA-NeXT-Video has it: output i looks at (i + ½) · 27/14 − ½."""
    made = Projector(1, 1, map="linear", pool=2)
    ramp = torch.arange(27.0).view(1, 1, 1, 27, 1).expand(1, 1, 27, 27, 1)
    got = ((made(ramp) - made.linear_1.bias) / made.linear_1.weight).view(14, 14)
    at = ((torch.arange(14) + 0.5) * 27 / 14 - 0.5).clamp(min=0)
    torch.testing.assert_close(got[5], at)


def test_newlines_stand_after_each_row_frame_and_clip():
    for where, ends in (("row", [2, 5, 8, 11]), ("frame", [4, 9]), ("clip", [8])):
        made = Projector(3, 4, newline=where)
        tokens = made(torch.randn(1, 2, 2, 2, 3))[0]
        same = (tokens == made.newline).all(-1)
        assert same.nonzero()[:, 0].tolist() == ends


def test_temporal_pooling_is_the_mean_of_frames_that_follow_each_other():
    made = Projector(3, 4, map="linear", temporal=2)
    x = torch.randn(1, 5, 2, 2, 3)
    means = torch.cat([x[:, :4].unflatten(1, (2, 2)).mean(2), x[:, 4:]], dim=1)
    torch.testing.assert_close(made(x), made.linear_1(means).flatten(1, 3))


@torch.no_grad()
def test_a_q_former_told_the_time_knows_frames_in_order_and_one_a_frame_does_not_mix_them():
    torch.manual_seed(0)
    made = QFormer(3, 4, queries=2, heads=2)
    x = torch.randn(1, 3, 2, 2, 3)
    torch.testing.assert_close(made(x), made(x.flip(1)))  # positions of frames begin at 0
    made.time.normal_()
    assert not torch.allclose(made(x), made(x.flip(1)), atol=1e-3)
    apart = QFormer(3, 4, queries=2, heads=2, per_frame=True)
    torch.testing.assert_close(apart(x), torch.cat([apart(x[:, i : i + 1]) for i in range(3)], dim=1))
    with pytest.raises(ValueError, match="positions for 2: raise"):
        QFormer(3, 4, frames=2, heads=2)(x)
