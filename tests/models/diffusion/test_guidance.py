"""Guidance on Gaussians, where every guided denoiser and sampler has a closed form."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.diffusion.condition import Condition
from models.diffusion.guidance import classifier_free, reconstruction, replacement
from models.diffusion.noise import Cosine, Flow, Linear, over
from models.diffusion.objective import Process, of
from models.diffusion.samplers import SAMPLERS, ancestral, heun, normal, timesteps

F64 = torch.float64
MEAN, SPREAD = 0.8, 0.5  # of x with a text; without, N(0, SPREAD²)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Captioned(nn.Module):
    """The exact network of x ~ N(MEAN or 0, SPREAD²), under Flow(); remembers its batch sizes."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction, self.batches = prediction, []

    def forward(self, z, level, condition):
        self.batches.append(len(z))
        mean = over(MEAN * condition.text_mask.any(1).to(z.dtype), z)
        ratio = over(torch.tan(math.pi / 2 * level), z)
        alpha, sigma = 1 / (1 + ratio), ratio / (1 + ratio)
        off = (z - alpha * mean) / (alpha**2 * SPREAD**2 + sigma**2)
        return of(self.prediction, mean + alpha * SPREAD**2 * off, sigma * off, alpha, sigma)


def captions(batch):
    return Condition(text=torch.zeros(batch, 3, 2), text_mask=torch.ones(batch, 3, dtype=torch.bool))


# --- without a classifier -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["eps", "x", "v", "flow"])
def test_classifier_free_is_the_combination_of_two_gaussian_scores_in_one_batch(prediction):
    """ε̃ = (1 + w) ε_c − w ε_∅, each σ (z − α μ)/(α² s² + σ²)."""
    model, w = Captioned(prediction), 2.5
    z, t = (
        torch.randn(4, 1, 2, 3, 3, generator=seeded(), dtype=F64),
        torch.tensor([0.1, 0.4, 0.7, 0.9]).double(),
    )
    x = classifier_free(model, Process(Flow(), prediction), captions(4), w)(z, t)
    alpha, sigma = (over(s, z) for s in Flow()(t))
    v = alpha**2 * SPREAD**2 + sigma**2
    eps = (1 + w) * sigma * (z - alpha * MEAN) / v - w * sigma * z / v
    torch.testing.assert_close((z - alpha * x) / sigma, eps, atol=1e-10, rtol=0)
    assert model.batches == [8]


def test_sampling_with_classifier_free_guidance_moves_the_mean_by_its_weight():
    """Of two Gaussians of one spread, the guided one is N(μ_∅ + (1 + w) (μ_c − μ_∅), s²)."""
    w, schedule = 1.5, Flow()
    z = torch.linspace(-2, 2, 9, dtype=F64).reshape(9, 1, 1, 1, 1)
    denoise = classifier_free(Captioned("flow"), Process(schedule, "flow"), captions(9), w)
    x = heun(denoise, z, timesteps(300, schedule), schedule)
    torch.testing.assert_close(x, (1 + w) * MEAN + SPREAD * z, atol=2e-3, rtol=0)


def test_outside_its_interval_guidance_is_the_text_alone_at_half_the_cost():
    model, process = Captioned("v"), Process(Flow(), "v")
    z = torch.randn(2, 1, 2, 3, 3, generator=seeded(), dtype=F64)
    guided = classifier_free(model, process, captions(2), 3.0, interval=(0.2, 0.6))
    always = classifier_free(model, process, captions(2), 3.0)
    plain = classifier_free(model, process, captions(2), 0.0)
    inside, outside = torch.full((2,), 0.4, dtype=F64), torch.full((2,), 0.9, dtype=F64)
    assert torch.equal(guided(z, outside), plain(z, outside))
    assert torch.equal(guided(z, inside), always(z, inside))
    assert model.batches == [2, 2, 4, 4]
    # one sample in, one out
    mixed = torch.stack([inside[0], outside[0]])
    torch.testing.assert_close(guided(z, mixed)[0], always(z, inside)[0])
    torch.testing.assert_close(guided(z, mixed)[1], plain(z, outside)[1])


@pytest.mark.parametrize("phi", [0.3, 1.0])
def test_rescaling_brings_the_spread_back_by_phi(phi):
    process, t = Process(Flow(), "flow"), torch.tensor([0.5, 0.8], dtype=F64)
    z = torch.randn(2, 2, 3, 4, 4, generator=seeded(), dtype=F64)
    z[:, 1] += 3.0  # so that guidance, which here adds a constant, is not all that differs
    model = Skewed()
    plain, guided, rescaled = (
        classifier_free(model, process, captions(2), w, rescale=r)(z, t)
        for w, r in ((0.0, 0.0), (4.0, 0.0), (4.0, phi))
    )
    for i in range(2):
        factor = plain[i].std() / guided[i].std()
        assert factor < 0.9
        torch.testing.assert_close(rescaled[i], (phi * factor + 1 - phi) * guided[i])


class Skewed(nn.Module):
    """Text makes x̂ larger."""

    def forward(self, z, level, condition):
        return z * over(1 - 0.3 * condition.text_mask.any(1).to(z.dtype), z)


def test_known_frames_and_low_resolution_reach_both_halves():
    class Spy(nn.Module):
        def forward(self, z, level, condition):
            self.condition = condition
            return z

    spy, z = Spy(), torch.randn(2, 1, 3, 2, 2, generator=seeded())
    mask = torch.zeros(2, 1, 3, 1, 1)
    condition = Condition(
        text=torch.ones(2, 3, 2), text_mask=torch.ones(2, 3, dtype=torch.bool),
        known=z, known_mask=mask, low=2 * z, low_level=torch.tensor([0.1, 0.2]), images=1,
    )  # fmt: skip
    classifier_free(spy, Process(Flow(), "v"), condition, 1.0)(z, torch.full((2,), 0.5))
    told = spy.condition
    assert torch.equal(told.known, torch.cat([z, z]))
    assert torch.equal(told.low, torch.cat([2 * z, 2 * z]))
    assert told.known_mask.shape[0] == told.text.shape[0] == 4
    assert told.low_level.tolist() == pytest.approx([0.1, 0.2, 0.1, 0.2])
    assert told.text_mask.any(1).tolist() == [True, True, False, False]
    assert told.images == 1


def test_guidance_without_a_text_mask_is_refused():
    with pytest.raises(ValueError, match="text_mask"):
        classifier_free(Skewed(), Process(Flow(), "v"), Condition(text=torch.zeros(1, 2, 2)), 1.0)


# --- by reconstruction ----------------------------------------------------------------------------------------


def covariance(size, seed=0):
    a = torch.randn(size, size, generator=seeded(seed), dtype=F64)
    return a @ a.T / size + 0.1 * torch.eye(size, dtype=F64)


def jacobian(cov, alpha, sigma):
    """J of x̂ = J z for x ~ N(0, Σ): α Σ (α² Σ + σ² I)⁻¹."""
    return alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(len(cov), dtype=F64))


def gaussian(schedule, cov):
    """x̂ of x ~ N(0, Σ), x [B, n]; all of one time, as in a sampler."""

    def denoise(z, t):
        alpha, sigma = schedule(t[0].double())
        return z @ jacobian(cov, alpha, sigma).T

    return denoise


@pytest.mark.parametrize("schedule", [Cosine(), Linear(), Flow(3.0)], ids=str)
def test_reconstruction_corrects_by_w_alpha_J_times_the_error_of_what_is_known(schedule):
    """x̃ᵇ = x̂ᵇ + w α J_ab (xᵃ − x̂ᵃ); J is symmetric."""
    cov, t, w = covariance(6), torch.full((3,), 0.6, dtype=F64), 1.7
    z, known = (torch.randn(3, 6, generator=seeded(s), dtype=F64) for s in (1, 2))
    mask = torch.tensor([1, 1, 0, 0, 1, 0], dtype=F64)
    a, b = mask == 1, mask == 0
    guided = reconstruction(gaussian(schedule, cov), schedule, mask * known, lambda x: mask * x, w)(z, t)
    alpha, sigma = schedule(t[0])
    J = jacobian(cov, alpha, sigma)
    x = z @ J.T
    expected = x[:, b] + w * alpha * (known - x)[:, a] @ J[a][:, b]
    torch.testing.assert_close(guided[:, b], expected, atol=1e-10, rtol=0)


def test_reconstruction_of_a_low_resolution_corrects_by_the_transposed_observation():
    """x̃ = x̂ + w α Jᵀ Hᵀ (y − H x̂), H the matrix of the means of 2×2 squares, built by hand."""
    schedule, cov, w, t = Cosine(), covariance(16), 2.0, torch.full((3,), 0.4, dtype=F64)
    z, low = torch.randn(3, 1, 1, 4, 4, generator=seeded(1), dtype=F64), torch.rand(3, 1, 1, 2, 2, dtype=F64)
    H = torch.zeros(4, 16, dtype=F64)
    for i in range(4):
        for j in range(4):
            H[2 * (i // 2) + j // 2, 4 * i + j] = 0.25
    flat = gaussian(schedule, cov)

    def denoise(z, t):
        return flat(z.flatten(1), t).view_as(z)

    guided = reconstruction(denoise, schedule, low, partial(F.avg_pool3d, kernel_size=(1, 2, 2)), w)(z, t)
    alpha, sigma = schedule(t[0])
    J = jacobian(cov, alpha, sigma)
    x = z.flatten(1) @ J.T
    expected = x + w * alpha * (low.flatten(1) - x @ H.T) @ H @ J
    torch.testing.assert_close(guided.flatten(1), expected, atol=1e-10, rtol=0)


def test_reconstruction_works_where_gradients_are_off_and_leaves_none_behind():
    schedule, layer = Flow(), nn.Linear(4, 4)
    with torch.no_grad():
        guided = reconstruction(lambda z, t: layer(z), schedule, torch.ones(2, 4), lambda x: x, 1.0)
        x = guided(torch.zeros(2, 4), torch.full((2,), 0.5))
    assert not x.requires_grad
    assert layer.weight.grad is None


RHO, STEPS, GAMMA = 0.9, 256, 0.3
PAIR = torch.tensor([[1, RHO], [RHO, 1]], dtype=F64)
# w_r, corrections → mean and sd of xᵇ given xᵃ = 1; exact .900 and .436
PUBLISHED = {
    (0, 0): (0.625, 0.556),
    (1, 0): (0.759, 0.479),
    (2, 0): (0.854, 0.422),
    (1, 1): (0.861, 0.447),
    (5, 0): (1.013, 0.323),
}


def propagated(w, corrections, schedule):
    """Mean and sd of xᵇ: the guided sampler is linear in z and its noise, so both go through it exactly."""
    alphas, sigmas = (v.tolist() for v in schedule(timesteps(STEPS, schedule)))
    mean, variance = 0.0, 1.0

    def x_tilde(i):
        """x̃ᵇ = p + q z_b + r ξ, with zᵃ = α xᵃ + σ ξ drawn anew."""
        J = jacobian(PAIR, alphas[i], sigmas[i])
        aa, ab = float(J[0, 0]), float(J[0, 1])
        pull = w * alphas[i] * ab
        return ab * alphas[i] + pull * (1 - aa * alphas[i]), aa - pull * ab, (ab - pull * aa) * sigmas[i]

    def affine(keep, add, p, q, r, std):
        nonlocal mean, variance
        mean = (keep + add * q) * mean + add * p
        variance = (keep + add * q) ** 2 * variance + (add * r) ** 2 + std**2

    for i in range(STEPS):
        if i == STEPS - 1:
            affine(0.0, 1.0, *x_tilde(i), 0.0)
            break
        (at, as_), (st, ss) = alphas[i : i + 2], sigmas[i : i + 2]
        e = (at * ss / as_ / st) ** 2
        std = math.sqrt(((1 - e) * ss**2) ** (1 - GAMMA) * ((1 - e) * st**2) ** GAMMA)
        affine(e * as_ / at, (1 - e) * as_, *x_tilde(i), std)
        for _ in range(corrections):
            affine(1 - 0.1 / 2, 0.1 / 2 * as_, *x_tilde(i + 1), math.sqrt(0.1) * ss)
    return mean, math.sqrt(variance)


def renoised(denoise, schedule, known, mask, generator):
    """The known part of z drawn anew from q(z | known) for each evaluation (Ho et al. 2022, sec. 3.1)."""

    def fresh(z, t):
        alpha, sigma = schedule(t)
        again = over(alpha, z) * known + over(sigma, z) * normal(z, generator)
        return denoise(torch.where(mask.bool(), again, z), t)

    return fresh


@pytest.mark.parametrize(("w", "corrections"), PUBLISHED)
def test_sampling_with_known_frames_gives_the_published_bias_of_each_method(w, corrections):
    """The closed form agrees with the table to its rounding and number of steps; the sampler with the closed
    form to four standard errors of n samples.
    """
    schedule, n = Cosine(), 8000
    exact_mean, exact_sd = propagated(w, corrections, schedule)
    assert (exact_mean, exact_sd) == pytest.approx(PUBLISHED[w, corrections], abs=0.004)

    mask, known = torch.tensor([1.0, 0.0], dtype=F64), torch.ones(n, 2, dtype=F64)
    denoise = renoised(gaussian(schedule, PAIR), schedule, known, mask, seeded(2))
    if w:
        denoise = reconstruction(denoise, schedule, mask * known, lambda x: mask * x, w)
    denoise = replacement(denoise, known, mask)
    z, times = torch.randn(n, 2, generator=seeded(1), dtype=F64), timesteps(STEPS, schedule)
    x = ancestral(denoise, z, times, schedule, seeded(3), gamma=GAMMA, corrections=corrections)
    assert (x[:, 0] == 1).all()
    assert x[:, 1].mean() == pytest.approx(exact_mean, abs=4 * exact_sd / math.sqrt(n))
    assert x[:, 1].std() == pytest.approx(exact_sd, abs=4 * exact_sd / math.sqrt(2 * n))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_replacement_ends_at_the_known_frames_with_every_sampler(sampler):
    schedule, known = Cosine(), torch.tensor([[1.0, 9.0], [-0.5, 9.0]], dtype=F64)
    denoise = replacement(gaussian(schedule, PAIR), known, torch.tensor([1.0, 0.0]))
    z = torch.randn(2, 2, generator=seeded(), dtype=F64)
    x = sampler(denoise, z, timesteps(20, schedule), schedule, seeded())
    torch.testing.assert_close(x[:, 0], known[:, 0], atol=1e-12, rtol=0)
    assert (x[:, 1] < 4).all()


def test_under_replacement_the_sampler_itself_keeps_known_frames_at_their_noise():
    """zᵃ goes along q(zᵃ | xᵃ) = N(α xᵃ, σ²) though nothing renews it."""
    schedule, n = Cosine(), 20_000
    denoise = replacement(gaussian(schedule, PAIR), torch.ones(n, 2, dtype=F64), torch.tensor([1.0, 0.0]))
    z = torch.randn(n, 2, generator=seeded(), dtype=F64)
    end = 0.4
    alpha, sigma = (float(v) for v in schedule(torch.tensor(end, dtype=F64)))
    x = ancestral(denoise, z, torch.linspace(1, end, 41, dtype=F64), schedule, seeded(1), gamma=0.0)
    assert x[:, 0].mean() == pytest.approx(alpha, abs=4 * sigma / math.sqrt(n))
    assert x[:, 0].std() == pytest.approx(sigma, abs=4 * sigma / math.sqrt(2 * n))
