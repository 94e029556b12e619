"""Predictions, losses and times against the definitions solved as linear systems, and against closed forms."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from models.diffusion.condition import Condition
from models.diffusion.noise import Cosine, Flow, Linear, logsnr, over
from models.diffusion.objective import (
    MinSNR,
    Process,
    Uncertainty,
    at_level,
    denoiser,
    logit_normal,
    of,
    prediction_error,
    to_x,
    uniform,
)
from models.diffusion.samplers import dpmpp_2m, timesteps

SCHEDULES = [Cosine(), Cosine(shift=-1.0), Linear(), Flow(), Flow(3.0)]
PREDICTIONS = ["eps", "x", "v", "flow"]
every_process = pytest.mark.parametrize(
    "process", [Process(s, p) for s in SCHEDULES for p in PREDICTIONS], ids=str
)
PLAIN = Condition()


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loss_of(model, process, x, t, eps, condition, weighting=uniform):
    return weighting(prediction_error(model, process, x, t, eps, condition), process, t)


class Recorder(nn.Module):
    """Says what it is given to say, and keeps what it was asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, z, level, condition):
        self.z, self.level = z, level
        return self.answer


class GaussianModel(nn.Module):
    """The exact denoiser of x ~ N(0, spread²), in any prediction: E[x | z] = α s² z/(α² s² + σ²)."""

    def __init__(self, process, spread):
        super().__init__()
        self.process, self.spread = process, spread

    def forward(self, z, level, condition):
        ratio = over(torch.tan(math.pi / 2 * level), z)  # σ/α
        norm = 1 + ratio if isinstance(self.process.schedule, Flow) else torch.sqrt(1 + ratio**2)
        alpha, sigma = 1 / norm, ratio / norm
        variance = alpha**2 * self.spread**2 + sigma**2
        x, eps = alpha * self.spread**2 / variance * z, sigma / variance * z
        return of(self.process.prediction, x, eps, alpha, sigma)


@every_process
def test_conversions_round_trip_for_every_schedule_and_prediction(process):
    x, eps, t = normal(50, 7), normal(50, 7, seed=1), torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    z, p = process.noisy(x, t, eps), process.target(x, t, eps)
    torch.testing.assert_close(process.x_hat(p, z, t), x, atol=1e-9, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conversions_solve_the_two_defining_equations(prediction):
    """z = α x + σ ε and p = a x + b ε, for any α and σ, solved by numpy."""
    for alpha, sigma in [(0.8, 0.6), (0.3, 0.7), (1.4, 0.2), (0.9, 2.0)]:
        row = {"eps": (0, 1), "x": (1, 0), "v": (-sigma, alpha), "flow": (-1, 1)}[prediction]
        z, p = 0.37, -1.9
        x, _ = np.linalg.solve([[alpha, sigma], row], [z, p])
        args = [torch.tensor(v, dtype=torch.float64) for v in (p, z, alpha, sigma)]
        assert float(to_x(prediction, *args)) == pytest.approx(x, rel=1e-12)


def test_v_of_a_variance_preserving_process_is_vdms():
    process, t = Process(Cosine(), "v"), torch.tensor([0.3], dtype=torch.float64)
    z, v = normal(1, 5), normal(1, 5, seed=1)
    alpha, sigma = Cosine()(t)
    torch.testing.assert_close(process.x_hat(v, z, t), alpha * z - sigma * v)


def test_what_is_held_does_not_count_and_what_is_only_told_does():
    process, x, eps = Process(Flow(), "flow"), normal(2, 1, 4, 1, 1), normal(2, 1, 4, 1, 1, seed=1)
    t = torch.full((2,), 0.5, dtype=torch.float64)
    mask, held = torch.zeros(2, 2, 1, 4, 1, 1, dtype=torch.float64)
    mask[:, :, [0, 2]], held[:, :, 0] = 1, 1
    for condition, asked in (
        (Condition(known=x, known_mask=mask), [1, 3]),
        (Condition(known=x, known_mask=mask, held=held), [1, 2, 3]),
    ):
        error = prediction_error(Recorder(torch.zeros_like(x)), process, x, t, eps, condition)
        torch.testing.assert_close(error, (eps - x)[:, 0, asked, 0, 0].square().mean(1))


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="'score' is none of eps, x, v, flow"):
        Process(Cosine(), "score")


# --- the loss -----------------------------------------------------------------------------------------------


@every_process
def test_loss_is_the_mean_square_error_of_the_target(process):
    x, eps, said = normal(3, 2, 4, 5, 5), normal(3, 2, 4, 5, 5, seed=1), normal(3, 2, 4, 5, 5, seed=2)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    model = Recorder(said)
    loss = loss_of(model, process, x, t, eps, PLAIN)
    for i in range(3):
        alpha, sigma = (float(s) for s in process.schedule(t[i]))
        a, b = {"eps": (0, 1), "x": (1, 0), "v": (-sigma, alpha), "flow": (-1, 1)}[process.prediction]
        target = (a * x[i] + b * eps[i]).numpy()
        assert float(loss[i]) == pytest.approx(np.mean((said[i].numpy() - target) ** 2))
        np.testing.assert_allclose(model.z[i].numpy(), (alpha * x[i] + sigma * eps[i]).numpy())
        assert float(model.level[i]) == pytest.approx(2 / math.pi * math.atan2(sigma, alpha))


def test_known_frames_are_noised_but_do_not_count():
    process, t = Process(Flow(), "flow"), torch.tensor([0.3, 0.8], dtype=torch.float64)
    x, eps, said = normal(2, 2, 4, 3, 3), normal(2, 2, 4, 3, 3, seed=1), normal(2, 2, 4, 3, 3, seed=2)
    mask = torch.zeros(2, 1, 4, 1, 1)
    mask[0, :, :2] = mask[1, :, ::3] = 1
    model = Recorder(said)
    error = prediction_error(model, process, x, t, eps, Condition(known=mask * x, known_mask=mask))
    square = ((said - (eps - x)) ** 2).numpy()
    np.testing.assert_allclose(error.numpy(), [square[0, :, 2:].mean(), square[1, :, 1:3].mean()])
    torch.testing.assert_close(model.z, process.noisy(x, t, eps))

    everything = Condition(known=x, known_mask=torch.ones(2, 1, 4, 1, 1))
    assert (prediction_error(model, process, x, t, eps, everything) == 0).all()


def test_loss_is_computed_in_float32_whatever_the_network_computes_in():
    x = normal(4, 1, 2, 8, 8, dtype=torch.bfloat16)
    eps, said = normal(4, 1, 2, 8, 8, seed=1, dtype=torch.bfloat16), torch.zeros_like(x)
    model = Recorder(said)
    t = torch.tensor([0.501, 0.502, 0.503, 0.504])  # one number in bfloat16
    loss = prediction_error(model, Process(Flow(), "flow"), x, t, eps, PLAIN)
    assert model.z.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ((eps.float() - x.float()) ** 2).flatten(1).mean(1))
    assert model.level.unique().numel() == 4


@every_process
def test_the_posterior_mean_minimises_the_loss(process):
    """x ~ N(0, s²): among predictions c z the expected loss is least at the exact denoiser's c.

    E (c z − p)² is a parabola in c, so its vertex is E[z p]/E[z²]; here from the loss's gradient at a sample.
    """
    spread, n = 0.7, 200_000
    x, eps = spread * normal(n, 1), normal(n, 1, seed=1)
    t = torch.full((n,), 0.4, dtype=torch.float64)
    exact = GaussianModel(process, spread)
    c = exact(torch.ones(1, 1, dtype=torch.float64), process.level(t[:1]), PLAIN).clone().requires_grad_()
    loss_of(Linearly(c), process, x, t, eps, PLAIN).mean().backward()
    z, p = process.noisy(x, t, eps), process.target(x, t, eps)
    standard_error = (2 * z * (c.detach() * z - p)).std() / math.sqrt(n)
    assert c.grad.abs() < 4 * standard_error


class Linearly(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c

    def forward(self, z, level, condition):
        return self.c * z


@every_process
def test_min_snr_is_min_of_snr_and_gamma_times_the_error_of_x(process):
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    x, eps, wrong = normal(25, 6), normal(25, 6, seed=1), normal(25, 6, seed=2)
    z, p = process.noisy(x, t, eps), process.target(x, t, eps) + wrong
    loss = loss_of(Recorder(p), process, x, t, eps, PLAIN, MinSNR(5.0))
    snr = logsnr(*process.schedule(t)).exp()
    error_of_x = (process.x_hat(p, z, t) - x).square().mean(1)
    torch.testing.assert_close(loss, torch.clamp(snr, max=5.0) * error_of_x, rtol=1e-7, atol=0)


@every_process
def test_min_snr_is_finite_from_data_to_noise(process):
    t = torch.tensor([0.0, 1.0])
    weight = MinSNR()(torch.ones(2), process, t)
    assert weight.isfinite().all()
    assert (weight >= 0).all()


def test_min_snr_weights_are_the_papers():
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    one, snr = torch.ones_like(t), logsnr(*Cosine()(t)).exp()
    torch.testing.assert_close(MinSNR(5)(one, Process(Cosine(), "eps"), t), (5 / snr).clamp(max=1))
    torch.testing.assert_close(MinSNR(5)(one, Process(Cosine(), "x"), t), snr.clamp(max=5))
    torch.testing.assert_close(MinSNR(5)(one, Process(Cosine(), "v"), t), snr.clamp(max=5) / (snr + 1))


def test_uncertainty_is_uniform_at_first_and_learns_the_log_of_the_error():
    process, t = Process(Flow(), "flow"), torch.linspace(0, 1, 200, dtype=torch.float64)
    weighting = Uncertainty().double()
    expected = 0.05 + 2 * process.level(t) ** 2  # no finite cosine series
    torch.testing.assert_close(weighting(expected, process, t), expected)
    optimizer = torch.optim.LBFGS(weighting.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        total = weighting(expected, process, t).mean()
        total.backward()
        return total

    optimizer.step(loss)
    u = weighting.log_variance(process.level(t)).detach()
    torch.testing.assert_close(u, expected.log(), atol=0.03, rtol=0)


# --- the network as x̂ -----------------------------------------------------------------------------------------


@every_process
def test_denoiser_of_the_exact_network_is_the_posterior_mean(process):
    t, z = torch.linspace(0.05, 0.95, 10, dtype=torch.float64), normal(10, 3)
    alpha, sigma = (s[:, None] for s in process.schedule(t))
    x = denoiser(GaussianModel(process, 0.6), process, PLAIN)(z, t)
    torch.testing.assert_close(x, alpha * 0.36 / (alpha**2 * 0.36 + sigma**2) * z, atol=1e-9, rtol=0)


@every_process
def test_sampling_from_start_recovers_the_spread_for_every_schedule_and_prediction(process):
    """z at the start has sd 1 for √(α² s² + σ²), which is within .3 % of it where α ≤ 1/100."""
    z = torch.as_tensor(scipy.stats.norm.ppf((np.arange(999) + 0.5) / 999))[:, None]
    times = timesteps(100, process.schedule, "logsnr", process.start)
    x = dpmpp_2m(denoiser(GaussianModel(process, 0.6), process, PLAIN), z, times, process.schedule)
    torch.testing.assert_close(x, 0.6 * z, rtol=0.01, atol=1e-3)


def test_sampling_starts_at_noise_but_where_eps_hides_x():
    assert all(Process(s, p).start == 1 for s in SCHEDULES for p in ("x", "v", "flow"))
    assert Process(Linear(), "eps").start == 1
    assert Process(Flow(), "eps").start == pytest.approx(1 - 1 / 200, abs=5e-4)
    assert Process(Cosine(), "eps").start == pytest.approx(1 - 2 / math.pi / 200, abs=5e-4)


# --- times ----------------------------------------------------------------------------------------------------


def test_logit_normal_times_are_the_distributions_quantiles():
    u = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    expected = 1 / (1 + np.exp(-scipy.stats.norm.ppf(u.numpy(), 0.4, 1.3)))
    np.testing.assert_allclose(logit_normal(u, 0.4, 1.3).numpy(), expected, rtol=1e-9)
    assert logit_normal(torch.zeros(1)).isfinite().all()


def test_at_level_mixes_by_the_angle():
    x, noise, level = normal(3, 4), normal(3, 4, seed=1), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    mixed = at_level(x, level, noise)
    torch.testing.assert_close(mixed[0], x[0])
    torch.testing.assert_close(mixed[1], (x[1] + noise[1]) / math.sqrt(2))
    torch.testing.assert_close(mixed[2], noise[2])
