"""Tasks on a Gaussian AR(1) 'video', whose exact network and every conditional are known, and on index maps."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from models.diffusion.condition import Condition
from models.diffusion.generate import (
    cascade,
    drawer,
    extend,
    extend_frames,
    interpolate,
    interpolate_frames,
    key_places,
    upsample,
    with_known,
)
from models.diffusion.noise import Cosine
from models.diffusion.objective import Process
from models.diffusion.samplers import SAMPLERS, ancestral, dpmpp_2m

RHO = 0.9
F64 = torch.float64
PROCESS = Process(Cosine(), "v")
PLAIN = Condition()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class AR1(nn.Module):
    """The exact network of videos whose every pixel is x_t = ρ x_{t−1} + √(1 − ρ²) ξ: cov(x_i, x_j) = ρ^|i − j|.

    Given known frames it is exact, too: of a Gaussian conditioned on them.
    """

    def __init__(self, may_know=True):
        super().__init__()
        self.may_know = may_know

    def forward(self, z, level, condition):
        assert self.may_know or condition.known is None
        angle = math.pi / 2 * level[0].double()
        alpha, sigma = angle.cos(), angle.sin()
        frame = torch.arange(z.shape[2])
        cov = RHO ** (frame[:, None] - frame).abs().to(F64)
        a = torch.zeros(z.shape[2], dtype=torch.bool)
        mean = torch.zeros_like(z)
        if condition.known is not None:
            a = condition.known_mask[0, 0, :, 0, 0] == 1
            gain = cov[:, a] @ torch.linalg.inv(cov[a][:, a])
            mean = torch.einsum("ij,bcjhw->bcihw", gain, condition.known[:, :, a])
            cov = cov - gain @ cov[a]
        J = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(len(cov), dtype=F64))
        x = mean + torch.einsum("ij,bcjhw->bcihw", J, z - alpha * mean)
        return (alpha * z - x) / sigma  # v


draws = partial(drawer, process=PROCESS, steps=48, spacing="logsnr", dtype=F64)


def ar1(frames, rows=16, side=16, seed=1):
    """Real videos [rows, 1, frames, side, side]."""
    noise = torch.randn(rows, 1, frames, side, side, generator=seeded(seed), dtype=F64)
    x = [noise[:, :, 0]]
    for t in range(1, frames):
        x.append(RHO * x[-1] + math.sqrt(1 - RHO**2) * noise[:, :, t])
    return torch.stack(x, dim=2)


def moment(video, lag):
    """E[x_t x_{t + lag}] for each t, over rows and pixels."""
    return (video[:, :, : video.shape[2] - lag] * video[:, :, lag:]).mean((0, 1, 3, 4))


# --- any length ---------------------------------------------------------------------------------------------------


def test_an_extended_video_keeps_the_autocorrelation_and_the_first_frames():
    """E[x_t x_{t+k}] = ρ^k across joins as within blocks; standard error ≤ √2/√n, n = 4096 videos of a pixel."""
    first = ar1(3)
    video = extend(draws(AR1(), generator=seeded()), first, 24, 8, 2, PLAIN)
    assert video.shape == (16, 1, 24, 16, 16)
    assert torch.equal(video[:, :, :3], first)
    tolerance = 4 * math.sqrt(2 / 4096)
    for lag in (0, 1, 2, 6):
        assert (moment(video, lag) - RHO**lag).abs().max() < tolerance
    # the step over a join is as small as any: E (x_{t+1} − x_t)² = 2 (1 − ρ), to a standard error of √(2/n) of it
    steps = (video.diff(dim=2) ** 2).mean((0, 1, 3, 4))
    torch.testing.assert_close(steps, torch.full_like(steps, 2 * (1 - RHO)), rtol=tolerance, atol=0)


def test_at_a_join_reconstruction_guidance_beats_replacement():
    """A network that was never told of known frames: how far the step over the join is from 2 (1 − ρ)."""
    first, sampler = ar1(2), partial(ancestral, gamma=0.3)
    step = {}
    for w in (0.0, 2.0):
        draw = draws(
            AR1(may_know=False), sampler=sampler, steps=64, spacing="time",
            tell_known=False, reconstruct=w, generator=seeded(),
        )  # fmt: skip
        video = extend(draw, first, 8, 8, 2, PLAIN)
        assert torch.equal(video[:, :, :2], first)
        step[w] = float((video[:, :, 2] - video[:, :, 1]).square().mean())
    exact = 2 * (1 - RHO)
    assert abs(step[2.0] - exact) < abs(step[0.0] - exact) / 2, step
    assert step[0.0] > 2 * exact


def counting(shape, condition):
    """A network that continues from its last known frame by ones."""
    mask = condition.known_mask[0, 0, :, 0, 0]
    last = int(mask.nonzero().max())
    x = condition.known.clone()
    for t in range(last + 1, shape[2]):
        x[:, :, t] = x[:, :, t - 1] + 1
    return x


@pytest.mark.parametrize(
    ("frames", "block", "context"), [(5, 8, 1), (20, 5, 2), (13, 4, 3), (3, 8, 3), (2, 8, 3)]
)
def test_extension_continues_from_the_last_frames_to_the_length_asked(frames, block, context):
    first = torch.arange(3.0).reshape(1, 1, 3, 1, 1)
    video = extend(counting, first, frames, block, context, PLAIN)
    assert video.flatten().tolist() == list(range(frames))


def test_impossible_extensions_are_refused():
    first = torch.zeros(1, 1, 2, 1, 1)
    with pytest.raises(ValueError, match="give 1 to 3"):
        extend(counting, first, 9, 4, 4, PLAIN)
    with pytest.raises(ValueError, match="fewer than the 3 frames of context"):
        extend(counting, first, 9, 4, 3, PLAIN)


# --- frames between -------------------------------------------------------------------------------------------------


def straight(shape, condition):
    """A network that draws straight lines between known frames, and 99 after the last."""
    assert shape[2] == condition.known.shape[2]
    at = condition.known_mask[0, 0, :, 0, 0].nonzero().flatten().numpy()
    x = np.stack([
        np.interp(np.arange(shape[2]), at, row[at], right=99.0)
        for row in condition.known[:, 0, :, 0, 0].numpy()
    ])  # fmt: skip
    return torch.from_numpy(x).to(condition.known).reshape(shape)


@pytest.mark.parametrize("window", [5, 8, 9, 13, 16, 40])
def test_interpolation_maps_T_key_frames_to_4T_minus_3_frames(window):
    keys = torch.tensor([[0.0, 4.0, -3.0, 7.0, 1.0], [5.0, 1.0, 2.0, 8.0, 0.0]]).reshape(2, 1, 5, 1, 1)
    video = interpolate(straight, keys, 4, window, PLAIN)
    assert video.shape[2] == 4 * 5 - 3
    expected = [np.interp(np.arange(17), np.arange(0, 17, 4), row) for row in keys.flatten(1).numpy()]
    np.testing.assert_allclose(video.flatten(1).numpy(), expected, atol=1e-6)
    assert torch.equal(video[:, :, list(key_places(5, 4))], keys)


def test_interpolated_frames_have_the_autocorrelation_of_the_process():
    """Keys are every 4th frame of an AR(1) video; neighbours among the new frames must have ρ again."""
    keys = ar1(13)[:, :, ::4]
    video = interpolate(draws(AR1(), generator=seeded()), keys, 4, 9, PLAIN)
    assert torch.equal(video[:, :, ::4], keys)
    tolerance = 4 * math.sqrt(2 / 4096)
    for lag in (0, 1, 3):
        assert (moment(video, lag) - RHO**lag).abs().max() < tolerance
    steps = (video.diff(dim=2) ** 2).mean((0, 1, 3, 4))
    torch.testing.assert_close(steps, torch.full_like(steps, 2 * (1 - RHO)), rtol=tolerance, atol=0)


def test_windows_hold_as_many_key_frames_as_they_can_and_what_they_share_is_drawn_once():
    """Eight steps in windows of three: the last begins earlier, and its frames that are not new are dropped."""
    seen = []

    def noting(shape, condition):
        seen.append(condition.known_mask.flatten().nonzero().flatten().tolist())
        return straight(shape, condition)

    keys = torch.arange(9.0).reshape(1, 1, 9, 1, 1) * 2
    video = interpolate(noting, keys, 2, 8, PLAIN)
    assert seen == [[0, 2, 4, 6]] * 3
    assert video.flatten().tolist() == list(range(17))


class Joining:
    """A causal 'autoencoder' whose latent of s frames is their mean, but the first frame's: that frame."""

    def __init__(self, joined):
        self.joined = joined

    def encode(self, frames):  # B T → B 1 T' 1 1
        first, rest = frames[:, :1], frames[:, 1:].unflatten(1, (-1, self.joined)).mean(2)
        return torch.cat([first, rest], dim=1)[:, None, :, None, None]

    def decode(self, z):  # rising by 1 within a latent
        z = z[:, 0, :, 0, 0]
        within = torch.arange(self.joined) - (self.joined - 1) / 2
        return torch.cat([z[:, :1], (z[:, 1:, None] + within).flatten(1)], dim=1)


@pytest.mark.parametrize(("given", "context"), [(1, 2), (6, 2), (9, 1), (9, 3)])
def test_under_a_causal_autoencoder_a_block_is_told_what_a_clip_that_begins_there_encodes_to(given, context):
    """Frames 0, 1, 2, …: all of those given are in the result, and every block goes on by the same law."""
    s, code, told = 4, Joining(4), []

    def rising(shape, condition):
        """Goes on from known latents, whose times are 0, then (s + 1)/2, then s more each."""
        mask = condition.known_mask[0, 0, :, 0, 0].bool()
        assert mask[: int(mask.sum())].all()
        told.append(condition.known[0, 0, mask, 0, 0].tolist())
        times = torch.cat([torch.zeros(1), (s + 1) / 2 + s * torch.arange(shape[2] - 1.0)])
        return (condition.known[:, :, :1] + times.reshape(1, 1, -1, 1, 1)).clone()

    first = torch.arange(float(given))[None]
    video = extend_frames(rising, code.encode, code.decode, first, 40, (1, 1, 5, 1, 1), context, s, PLAIN)
    assert video.tolist() == [list(range(40))]
    k = min(context, 1 + (given - 1) // s)
    begin = given - 1 - (k - 1) * s
    assert told[0] == [begin, *(begin + (s + 1) / 2 + s * i for i in range(k - 1))]
    assert all(len(x) == min(context, 1 + 19 // s) for x in told[1:])


def test_under_a_causal_autoencoder_key_frames_are_told_by_their_own_latents_at_the_places_they_lie_in():
    s, factor, code, seen = 2, 2, Joining(2), []

    def between(shape, condition):
        mask, held = (
            m[0, 0, :, 0, 0].nonzero().flatten().tolist() for m in (condition.known_mask, condition.held)
        )
        seen.append((mask, held))
        at = condition.known[0, 0, mask, 0, 0]
        times = np.array(
            [0.0, *(1.5 + s * np.arange(shape[2] - 1))]
        )  # of frames that a latent is the mean of
        where = [0.0, *(s * np.array(mask[1:]))]  # of the key frames: the last of each latent
        x = np.interp(times, where, at.numpy())
        return torch.from_numpy(x).float().reshape(shape)

    keys = torch.arange(6.0)[None] * 4
    video = interpolate_frames(between, code.encode, code.decode, keys, factor, (1, 1, 5, 1, 1), s, PLAIN)
    assert seen == [([0, 2, 4], [0])] * 3
    assert video.tolist() == [list(range(21))]


def test_a_window_without_two_key_frames_is_refused():
    with pytest.raises(ValueError, match="holds no two key frames 4 apart"):
        interpolate(straight, torch.zeros(1, 1, 3, 1, 1), 4, 4, PLAIN)


def test_the_cascade_interpolates_twice_by_one_network_then_decodes_then_sharpens():
    keys, order = torch.tensor([0.0, 16.0, 4.0]).reshape(1, 1, 3, 1, 1), []

    def between(latents):
        order.append(f"between {latents.shape[2]}")
        return interpolate(straight, latents, 4, 9, PLAIN)

    def decode(latents):
        order.append(f"decode {latents.shape[2]}")
        return 10 * latents

    def sharpen(video):
        order.append("sharpen")
        return video.repeat_interleave(2, -1).repeat_interleave(2, -2)

    video = cascade(lambda: keys, between, decode, sharpen)
    assert order == ["between 3", "between 9", "decode 33", "sharpen"]
    assert video.shape == (1, 1, 33, 2, 2)
    expected = 10 * np.interp(np.arange(33), [0, 16, 32], [0, 16, 4])
    np.testing.assert_allclose(video[0, 0, :, 1, 1].numpy(), expected, rtol=1e-5)
    assert cascade(lambda: keys, between, decode, times=1).shape == (1, 1, 9, 1, 1)


# --- known frames -----------------------------------------------------------------------------------------------------


def test_known_frames_lie_where_they_were_put():
    frames = torch.tensor([7.0, 8.0]).reshape(1, 1, 2, 1, 1)
    condition = with_known(Condition(images=1), frames, [4, 1], 6)
    assert condition.known.flatten().tolist() == [0, 8, 0, 0, 7, 0]
    assert condition.known_mask.flatten().tolist() == [0, 1, 0, 0, 1, 0]
    assert condition.images == 1


@pytest.mark.parametrize(
    ("at", "message"), [([0], "one place to each"), ([2, 2], "one place"), ([0, 6], "within 6")]
)
def test_known_frames_without_a_place_are_refused(at, message):
    with pytest.raises(ValueError, match=message):
        with_known(PLAIN, torch.zeros(1, 1, 2, 1, 1), at, 6)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_draws_have_the_covariance_of_the_data(sampler):
    """Unconditional 'text → video' with every sampler: E[x_i x_j] = ρ^|i − j| over 6 frames."""
    n = 16 * 16 * 16
    draw = draws(AR1(), sampler=sampler, steps=96, spacing="time", generator=seeded())
    x = draw((16, 1, 6, 16, 16), PLAIN)
    flat = x.movedim(2, 0).reshape(6, n)
    frame = torch.arange(6)
    expected = RHO ** (frame[:, None] - frame).abs().to(F64)
    torch.testing.assert_close(flat @ flat.T / n, expected, atol=4 * math.sqrt(2 / n), rtol=0)


@pytest.mark.parametrize(
    "options", [{}, {"reconstruct": 1.0}, {"tell_known": False, "reconstruct": 2.0}], ids=str
)
def test_known_frames_are_in_the_result_exactly(options):
    image = ar1(1, rows=2, side=2)
    model = AR1(may_know=options.get("tell_known", True))
    x = draws(model, generator=seeded(), **options)((2, 1, 5, 2, 2), with_known(PLAIN, image, [0], 5))
    assert torch.equal(x[:, :, :1], image)
    assert not x.requires_grad


def test_the_same_seed_draws_the_same():
    def once(seed):
        return draws(AR1(), sampler=ancestral, generator=seeded(seed))((1, 1, 3, 2, 2), PLAIN)

    assert torch.equal(once(1), once(1))
    assert not torch.equal(once(1), once(2))


# --- super-resolution -----------------------------------------------------------------------------------------------


class Enlarger(nn.Module):
    """Says that x is what it was told of the low resolution."""

    def forward(self, z, level, condition):
        self.condition = condition
        return condition.low


def test_upsampling_tells_the_low_resolution_as_it_is_or_noised_to_a_level():
    low, model = torch.full((2, 3, 4, 32, 32), 0.5), Enlarger()
    draw = drawer(model, Process(Cosine(), "x"), steps=4, sampler=dpmpp_2m, generator=seeded())
    assert torch.equal(upsample(draw, low, PLAIN), low)
    assert model.condition.low_level is None

    upsample(draw, low, PLAIN, level=0.25, generator=seeded(1))
    assert model.condition.low_level.tolist() == [0.25, 0.25]
    told, n = model.condition.low, low.numel()
    alpha, sigma = math.cos(math.pi / 8), math.sin(math.pi / 8)
    assert told.mean() == pytest.approx(0.5 * alpha, abs=4 * sigma / math.sqrt(n))
    assert told.std() == pytest.approx(sigma, abs=4 * sigma / math.sqrt(2 * n))
