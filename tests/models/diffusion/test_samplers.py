"""Samplers against closed forms, exact ODEs, other libraries' schedulers and known distributions."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from models.diffusion.noise import Cosine, Flow, Linear, logsnr
from models.diffusion.samplers import (
    SAMPLERS,
    ancestral,
    ddim,
    dpmpp_2m,
    euler,
    heun,
    langevin,
    timesteps,
)

SCHEDULES = [Cosine(), Cosine(shift=-1.0), Linear(), Flow(), Flow(3.0)]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(schedule, spread, mean=0.0):
    """x̂ of x ~ N(mean, spread²)."""

    def denoise(z, t):
        alpha, sigma = (s[:, None] for s in schedule(t))
        return mean + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (z - alpha * mean)

    return denoise


WEIGHT, SPREAD = 0.3, 0.15


def mixture(schedule):
    """x̂ of .3 N(−1, .15²) + .7 N(1, .15²)."""

    def denoise(z, t):
        alpha, sigma = (s[:, None] for s in schedule(t))
        variance = alpha**2 * SPREAD**2 + sigma**2
        right = torch.sigmoid(2 * alpha * z / variance + math.log((1 - WEIGHT) / WEIGHT))
        mean = 2 * right - 1
        return mean + alpha * SPREAD**2 / variance * (z - alpha * mean)

    return denoise


def quantiles(count):
    """N(0, 1) as its quantiles, [count, 1]."""
    return torch.as_tensor(scipy.stats.norm.ppf((np.arange(count) + 0.5) / count))[:, None]


# --- known distributions --------------------------------------------------------------------------------------


def test_ancestral_recovers_a_mixture_and_its_spread_converges_in_the_number_of_steps():
    """Few steps make modes too narrow or too wide, by γ; the published table is T = 64.

    Standard errors at n = 40 000 and 20 000: .0005 and .0008 of the spread, .0023 and .0032 of the weight,
    .0014 and .0019 of the mean of the rarer mode.
    """
    schedule = Cosine()
    published = {0.0: (0.133, 0.149), 0.3: (0.139, 0.149), 1.0: (0.158, 0.150)}
    for gamma, at in published.items():
        spreads = []
        for steps, n in ((64, 40_000), (1024, 20_000)):
            z = quantiles(n).float()
            x = ancestral(
                mixture(schedule), z, timesteps(steps, schedule), schedule, seeded(1), gamma=gamma
            ).double()
            left, right = x[x < 0], x[x > 0]
            assert len(left) / n == pytest.approx(WEIGHT, abs=0.009)
            assert left.mean() == pytest.approx(-1, abs=0.006)
            assert right.mean() == pytest.approx(1, abs=0.006)
            spreads.append(float(torch.cat([left - left.mean(), right - right.mean()]).std()))
        assert spreads[0] == pytest.approx(at[0], abs=0.003)
        assert spreads[1] == pytest.approx(at[1], abs=0.003)
        assert abs(spreads[1] - SPREAD) < abs(spreads[0] - SPREAD) / 4


@pytest.mark.parametrize(
    ("sampler", "steps", "tolerance"),
    [(ddim, 512, 0.02), (euler, 512, 0.02), (heun, 64, 0.02), (dpmpp_2m, 64, 0.02)],
)
def test_ode_samplers_map_quantiles_of_noise_to_quantiles_of_a_mixture(sampler, steps, tolerance):
    """In one dimension the probability-flow ODE is monotone, so it is the map between quantiles."""
    schedule, z = Flow(), quantiles(99)

    def cdf(x):
        return WEIGHT * scipy.stats.norm.cdf(x, -1, SPREAD) + (1 - WEIGHT) * scipy.stats.norm.cdf(
            x, 1, SPREAD
        )

    exact = [scipy.optimize.brentq(lambda x, u=u: cdf(x) - u, -3, 3) for u in scipy.stats.norm.cdf(z[:, 0])]
    x = sampler(mixture(schedule), z, timesteps(steps, schedule), schedule)
    error = (x[:, 0] - torch.tensor(exact, dtype=F64)).abs()
    # the quantiles beside the empty gap between the modes differ most
    assert error.mean() < tolerance / 4
    assert error.max() < tolerance * 5


def test_langevin_keeps_the_stationary_distribution():
    """z ~ N(0, v): a step is z (1 − δ σ²/2v) + √δ σ ξ, so its variance ends at v/(1 − δ σ²/4v), v as δ → 0."""
    schedule, t, spread, n = Cosine(), 0.4, 0.5, 20_000
    alpha, sigma = (float(s) for s in schedule(torch.tensor(t, dtype=F64)))
    v = alpha**2 * spread**2 + sigma**2
    for delta in (0.1, 0.02):
        g, z = seeded(2), math.sqrt(v) * torch.randn(n, 1, generator=seeded(3), dtype=F64)
        for _ in range(60):
            z = langevin(gaussian(schedule, spread), z, t, schedule, g, delta=delta)
        stationary = v / (1 - delta * sigma**2 / (4 * v))
        assert z.var() == pytest.approx(stationary, rel=4 * math.sqrt(2 / n))
        assert z.mean() == pytest.approx(0, abs=4 * math.sqrt(v / n))
    # and it draws what is elsewhere there
    z = torch.zeros(n, 1, dtype=F64)
    for _ in range(200):
        z = langevin(gaussian(schedule, spread, 2.0), z, t, schedule, g)
    assert z.mean() == pytest.approx(2 * alpha, abs=4 * math.sqrt(v / n))


def test_predictor_corrector_recovers_a_gaussian():
    schedule, n = Cosine(), 40_000
    z = torch.randn(n, 1, generator=seeded(4), dtype=F64)
    times = timesteps(128, schedule)
    x = SAMPLERS["predictor_corrector"](gaussian(schedule, 0.5, 2.0), z, times, schedule, seeded(5))
    assert x.mean() == pytest.approx(2, abs=0.01)
    assert x.std() == pytest.approx(0.5, rel=0.03)


# --- single steps and whole paths in closed form ----------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize(("t", "s"), [(0.9, 0.85), (0.6, 0.3), (0.2, 0.05)])
def test_ancestral_step_is_the_gaussian_posterior(schedule, t, s):
    """(z_s, z_t) given x are jointly Gaussian; condition on z_t by numpy."""
    (alpha_t, alpha_s), (sigma_t, sigma_s) = (v.tolist() for v in schedule(torch.tensor([t, s], dtype=F64)))
    x, z = 0.7, -0.4
    onward = alpha_t / alpha_s  # z_t = onward z_s + noise of the rest of σ_t²
    cov = np.array([[sigma_s**2, onward * sigma_s**2], [onward * sigma_s**2, sigma_t**2]])
    mean = alpha_s * x + cov[0, 1] / cov[1, 1] * (z - alpha_t * x)
    lower = cov[0, 0] - cov[0, 1] ** 2 / cov[1, 1]
    upper = sigma_t**2 - onward**2 * sigma_s**2
    for gamma in (0.0, 0.3, 1.0):
        start, times = torch.full((5, 1), z, dtype=F64), torch.tensor([t, s], dtype=F64)
        got = ancestral(lambda z, t: torch.full_like(z, x), start, times, schedule, seeded(), gamma=gamma)
        noise = torch.randn(5, 1, generator=seeded(), dtype=F64)
        std = math.sqrt(lower ** (1 - gamma) * upper**gamma)
        torch.testing.assert_close(got, mean + std * noise, atol=1e-12, rtol=1e-12)


@every_schedule
def test_ddim_with_eta_1_is_ancestral_with_gamma_0(schedule):
    z, times, d = quantiles(9), timesteps(12, schedule), gaussian(schedule, 0.5, 1.0)
    torch.testing.assert_close(
        ddim(d, z, times, schedule, seeded(), eta=1.0), ancestral(d, z, times, schedule, seeded(), gamma=0.0)
    )


def test_ddim_on_the_flow_path_is_textbook_euler():
    schedule, z = Flow(), quantiles(9)
    times, d = timesteps(10, schedule), mixture(schedule)
    x = z
    for t, s in pairwise(times):
        x_hat = d(x, t.expand(9))
        velocity = (x - (1 - t) * x_hat) / t - x_hat
        x = x + (s - t) * velocity
    torch.testing.assert_close(ddim(d, z, times, schedule), x, atol=1e-12, rtol=0)
    torch.testing.assert_close(euler(d, z, times, schedule), x, atol=1e-12, rtol=0)


@every_schedule
@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (euler, 1), (heun, 2), (dpmpp_2m, 2)])
def test_order_of_convergence_against_the_exact_ode(sampler, order, schedule):
    """Of a Gaussian, the probability-flow ODE scales z − α μ by the ratio of its standard deviations."""
    spread, mean, z = 0.5, 0.3, torch.tensor([[1.2], [-0.4]], dtype=F64)
    ends = torch.tensor([0.9, 0.15], dtype=F64)
    (alpha_1, alpha_0), (sigma_1, sigma_0) = (v.tolist() for v in schedule(ends))
    scale = math.sqrt((alpha_0**2 * spread**2 + sigma_0**2) / (alpha_1**2 * spread**2 + sigma_1**2))
    exact = alpha_0 * mean + scale * (z - alpha_1 * mean)
    denoise = gaussian(schedule, spread, mean)
    coarse, fine = (
        (sampler(denoise, z, torch.linspace(*ends, n + 1, dtype=F64), schedule) - exact).abs().max()
        for n in (100, 200)
    )
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


# --- other libraries --------------------------------------------------------------------------------------------


class Table:
    """diffusers' DDPM: ᾱ of its 1000 steps, t = (step + 1)/1000."""

    def __init__(self, alphas_cumprod):
        self.alpha_bar = torch.cat([torch.ones(1, dtype=F64), alphas_cumprod.double()])

    def __call__(self, t):
        alpha_bar = self.alpha_bar[(t * 1000).round().long()]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def linear_eps(z):
    """A denoiser linear in z, as ε̂."""
    return 0.8 * z + 0.1


def theirs(scheduler, z, steps=None, **step):
    for t in scheduler.timesteps[:steps]:
        z = scheduler.step(linear_eps(z), t, z, **step).prev_sample
    return z


def ours(sampler, scheduler, z, steps=None, **options):
    schedule = Table(scheduler.alphas_cumprod)

    def denoise(z, t):
        alpha, sigma = (s[:, None] for s in schedule(t))
        return (z - sigma * linear_eps(z)) / alpha

    times = [(int(t) + 1) / 1000 for t in scheduler.timesteps] + [0.0]
    times = torch.tensor(times if steps is None else times[: steps + 1], dtype=F64)
    return sampler(denoise, z, times, schedule, seeded(), **options)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers(eta):
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    expected = theirs(scheduler, quantiles(9), eta=eta, generator=seeded())
    torch.testing.assert_close(ours(ddim, scheduler, quantiles(9), eta=eta), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("gamma", "variance"), [(0.0, "fixed_small"), (1.0, "fixed_large")])
def test_ancestral_equals_diffusers_ddpm_with_either_variance(gamma, variance):
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing", variance_type=variance)
    scheduler.set_timesteps(20)
    # without the last step: 'fixed_large' adds noise to data, too
    expected = theirs(scheduler, quantiles(9), steps=19, generator=seeded())
    got = ours(ancestral, scheduler, quantiles(9), steps=19, gamma=gamma)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [5, 20])
def test_dpmpp_2m_equals_diffusers(steps):
    scheduler = DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="trailing"
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    expected = theirs(scheduler, quantiles(9))
    torch.testing.assert_close(ours(dpmpp_2m, scheduler, quantiles(9)), expected, rtol=1e-4, atol=1e-4)


def test_euler_equals_diffusers_flow_matching_with_its_shift():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigmas = timesteps(10, Flow())[:-1].numpy()
    scheduler.set_timesteps(sigmas=sigmas)
    z = expected = quantiles(9)
    for t in scheduler.timesteps:
        expected = scheduler.step(linear_eps(expected), t, expected).prev_sample  # linear_eps as ε − x
    schedule = Flow(3.0)
    got = euler(
        lambda z, t: z - schedule(t)[1][:, None] * linear_eps(z), z, timesteps(10, schedule), schedule
    )
    torch.testing.assert_close(got, expected.double(), rtol=1e-5, atol=1e-5)


# --- what every sampler keeps -------------------------------------------------------------------------------------

every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


@every_schedule
@every_sampler
def test_the_last_step_to_data_returns_x_hat(sampler, schedule):
    """Under every schedule, also those whose σ(0) is not 0."""
    z = quantiles(5)
    answer = torch.linspace(-1, 1, 5, dtype=F64)[:, None]
    for spacing in ("time", "logsnr"):
        x = sampler(lambda z, t: answer, z, timesteps(6, schedule, spacing), schedule, seeded())
        torch.testing.assert_close(x, answer, atol=1e-12, rtol=0)


@every_sampler
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_inputs_are_left_alone_and_types_kept(sampler, dtype):
    schedule, z, asked = Flow(), quantiles(5).to(dtype), []
    before = z.clone()

    def denoise(z, t):
        asked.append(t)
        return z / (2 + t[:, None])

    x = sampler(denoise, z, timesteps(7, schedule), schedule, seeded())
    assert torch.equal(z, before)
    assert x.dtype == dtype
    assert all(t.shape == (5,) and t.dtype == dtype and (t == t[0]).all() for t in asked)
    evaluations = {"heun": 13, "predictor_corrector": 13}.get(sampler.__name__, 7)
    assert len(asked) == evaluations


@pytest.mark.parametrize("sampler", [ancestral, partial(ddim, eta=1.0), SAMPLERS["predictor_corrector"]])
def test_noise_comes_from_the_generator_alone(sampler):
    schedule = Cosine()
    run = partial(sampler, gaussian(schedule, 0.5), quantiles(5), timesteps(8, schedule), schedule)
    first = run(seeded(1))
    torch.manual_seed(99)
    assert torch.equal(first, run(seeded(1)))
    assert not torch.equal(first, run(seeded(2)))


# --- times ----------------------------------------------------------------------------------------------------------


@every_schedule
def test_logsnr_spacing_has_equal_steps_in_logsnr(schedule):
    times = timesteps(9, schedule, "logsnr", logsnr_range=(-8.0, 8.0))
    assert len(times) == 10
    assert times[-1] == 0
    torch.testing.assert_close(
        logsnr(*schedule(times[:-1])), torch.linspace(-8, 8, 9, dtype=F64), atol=1e-6, rtol=0
    )


def test_time_spacing_runs_evenly_from_start_to_0():
    torch.testing.assert_close(timesteps(3, Flow(), start=0.9), torch.tensor([0.9, 0.6, 0.3, 0.0], dtype=F64))


def test_times_that_do_not_decrease_are_refused():
    for times in ([0.0, 1.0], [1.0], [1.2, 0.0], [0.5, 0.5, 0.0]):
        with pytest.raises(ValueError, match="do not decrease"):
            ddim(gaussian(Flow(), 1.0), quantiles(2), torch.tensor(times), Flow())
    with pytest.raises(ValueError, match="at least 1"):
        timesteps(0, Flow())
