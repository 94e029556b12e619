"""Schedules against their published formulas and against diffusers."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from models.diffusion.noise import Cosine, Flow, Linear, from_logsnr, level, logsnr, over

T = torch.linspace(0, 1, 101, dtype=torch.float64)


def test_cosine_logsnr_runs_from_20_to_minus_20():
    ends = logsnr(*Cosine()(torch.tensor([0.0, 1.0], dtype=torch.float64)))
    torch.testing.assert_close(ends, torch.tensor([20.0, -20.0], dtype=torch.float64), atol=1e-6, rtol=0)


def test_cosine_between_the_ends_is_minus_2_log_tan():
    b = math.atan(math.exp(-10))
    a = math.atan(math.exp(10)) - b
    for t in (0.1, 0.5, 0.93):
        alpha, sigma = Cosine()(torch.tensor(t, dtype=torch.float64))
        assert float(sigma / alpha) == pytest.approx(math.tan(a * t + b), rel=1e-12)


@pytest.mark.parametrize("schedule", [Cosine(), Cosine(shift=-0.7), Linear()])
def test_cosine_and_linear_preserve_variance(schedule):
    alpha, sigma = schedule(T)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(T), atol=1e-14, rtol=0)


def test_level_is_t_for_the_unclipped_cosine():
    torch.testing.assert_close(level(*Cosine(-80, 80)(T)), T, atol=1e-12, rtol=0)


def test_level_means_the_same_snr_under_every_schedule():
    for schedule in (Cosine(), Linear(), Flow(), Flow(3.0)):
        alpha, sigma = schedule(T[1:-1])
        told = level(alpha, sigma)
        torch.testing.assert_close(torch.tan(math.pi / 2 * told), sigma / alpha, rtol=1e-9, atol=0)
        assert (told.diff() > 0).all()


def test_cosine_shift_scales_the_snr():
    ratio = logsnr(*Cosine(shift=math.log(64 / 256))(T)) - logsnr(*Cosine()(T))
    torch.testing.assert_close(ratio, torch.full_like(T, 2 * math.log(0.25)), atol=1e-5, rtol=0)


def test_flow_shift_multiplies_the_odds_of_t():
    t = T[1:-1]
    alpha, sigma = Flow(3.0)(t)
    torch.testing.assert_close(sigma / alpha, 3.0 * t / (1 - t), rtol=1e-12, atol=0)
    torch.testing.assert_close(alpha + sigma, torch.ones_like(t), rtol=1e-14, atol=0)
    torch.testing.assert_close(Flow()(t)[1], t, rtol=1e-14, atol=0)


def test_linear_is_the_limit_of_diffusers_ddpm():
    """log ᾱ_n = Σ log(1 − β) = −Σ β − ½ Σ β² − …: the first sum is the integral, the second what discrete steps add.

    What is left is the sum's offset of half a step (≤ .0025) and ⅓ Σ β³ (≤ .0007).
    """
    ddpm = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha, _ = Linear(eps=0.0)(t)
    discrete = ddpm.alphas_cumprod.double().log() + ddpm.betas.double().square().cumsum(0) / 2
    assert (2 * alpha.log() - discrete).abs().max() < 0.0035


def test_logsnr_inverts_from_logsnr():
    wanted = torch.linspace(-30, 30, 61, dtype=torch.float64)
    torch.testing.assert_close(logsnr(*from_logsnr(wanted)), wanted, atol=1e-11, rtol=0)


def test_over_scales_each_sample():
    x = torch.ones(2, 3, 4, 5, 6)
    scaled = over(torch.tensor([2.0, 3.0]), x) * x
    assert (scaled[0] == 2).all()
    assert (scaled[1] == 3).all()
