"""Samplers: from noise to data by a denoiser's x̂(z, t), each a short pure function.

    sampler(denoise, z, times, schedule, generator=None, …) → x

    denoise    (z [B, …], t [B]) → x̂
    z          noise of times[0], [B, …]; float32 or float64
    times      [N + 1] decreasing in 0…1; denoise is called at all but the last. Where that is 0 the last
               step returns x̂: t = 0 is data, α = 1 and σ = 0, also where a schedule stops just short of it
    schedule   t → (α, σ) with z = α x + σ ε, any of `models.diffusion.noise`
    generator  of the noise that is added, on any device; the samplers of an ODE draw none

Scalars are Python floats, so float64 throughout. Below, t is the time of z and s < t that of the next z.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from models.diffusion.noise import Schedule, logsnr
from models.diffusion.objective import Denoise


class Sampler(Protocol):
    def __call__(
        self,
        denoise: Denoise,
        z: Tensor,
        times: Tensor,
        schedule: Schedule,
        generator: torch.Generator | None = None,
    ) -> Tensor: ...


# --- stochastic ---------------------------------------------------------------------------------------------


def ancestral(
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    *,
    gamma: float = 0.3,
    corrections: int = 0,
    delta: float = 0.1,
) -> Tensor:
    """z_s ~ q(z_s | z_t, x = x̂), its variance between the posterior's (γ = 0) and q(z_t | z_s)'s (γ = 1).

    VDM's sampler (Ho et al. 2022, eq. 6); γ = 0 is DDPM's lower bound. With corrections it is VDM's
    predictor–corrector: after each step so many Langevin steps of size δ at the new time.
    """
    for (t, alpha_t, sigma_t), (s, alpha_s, sigma_s) in _steps(times, schedule):
        x = denoise(z, _batch(t, z))
        e = (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2  # exp(λ_t − λ_s)
        # e α_s/α_t, written so that α_t may be 0
        z = alpha_t / alpha_s * (sigma_s / sigma_t) ** 2 * z + (1 - e) * alpha_s * x
        if s > 0:
            std = math.sqrt(1 - e) * sigma_s ** (1 - gamma) * sigma_t**gamma
            z = z + std * normal(z, generator)
            for _ in range(corrections):
                z = langevin(denoise, z, s, schedule, generator, delta=delta)
    return z


def langevin(
    denoise: Denoise,
    z: Tensor,
    t: float,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    *,
    delta: float = 0.1,
) -> Tensor:
    """One corrector step at a fixed t: z − ½ δ σ ε̂ + √δ σ ξ (Ho et al. 2022, sec. 3; Song et al. 2021).

    −ε̂/σ is the score, so this is Langevin dynamics of step δ σ²; its stationary distribution is z's at t,
    to first order in δ.
    """
    _, alpha, sigma = _point(t, schedule)
    eps = (z - alpha * denoise(z, _batch(t, z))) / sigma
    return z - 0.5 * delta * sigma * eps + math.sqrt(delta) * sigma * normal(z, generator)


def predictor_corrector(
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    *,
    gamma: float = 0.3,
    delta: float = 0.1,
) -> Tensor:
    """`ancestral` with one Langevin step after each; two evaluations a step."""
    return ancestral(denoise, z, times, schedule, generator, gamma=gamma, corrections=1, delta=delta)


def ddim(
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    *,
    eta: float = 0.0,
) -> Tensor:
    """α_s x̂ + √(σ_s² − η² τ²) ε̂ + η τ ξ, τ² the posterior's variance (Song, Meng and Ermon 2021, eq. 12).

    η = 0 is deterministic and first order; η = 1 is `ancestral` with γ = 0.
    """
    for (t, alpha_t, sigma_t), (_, alpha_s, sigma_s) in _steps(times, schedule):
        x = denoise(z, _batch(t, z))
        eps = (z - alpha_t * x) / sigma_t
        e = (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2
        std = eta * math.sqrt(1 - e) * sigma_s
        z = alpha_s * x + math.sqrt(sigma_s**2 - std**2) * eps
        if std > 0:
            z = z + std * normal(z, generator)
    return z


# --- of the probability-flow ODE --------------------------------------------------------------------------------
#
# Divided by α + σ, every process is the straight path y = (1 − τ) x + τ ε with τ = σ/(α + σ), and its ODE is
# dy/dτ = ε̂ − x̂, which is bounded from noise (α = 0) to data.


def euler(
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    schedule: Schedule,
    generator: torch.Generator | None = None,
) -> Tensor:
    """First order, along the straight path: rectified flow's sampler (Liu et al. 2023)."""
    for (t, alpha_t, sigma_t), (_, alpha_s, sigma_s) in _steps(times, schedule):
        u = _flow(denoise(z, _batch(t, z)), z, alpha_t, sigma_t)
        here, there = alpha_t + sigma_t, alpha_s + sigma_s
        z = there * (z / here + (sigma_s / there - sigma_t / here) * u)
    return z


def heun(
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    schedule: Schedule,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Second order: an Euler step, and again with the mean of both ends' directions (Karras et al. 2022, alg. 1).

    Two evaluations a step, one in a last step to t = 0, where ε̂ is undefined.
    """
    for (t, alpha_t, sigma_t), (s, alpha_s, sigma_s) in _steps(times, schedule):
        u = _flow(denoise(z, _batch(t, z)), z, alpha_t, sigma_t)
        here, there = alpha_t + sigma_t, alpha_s + sigma_s
        step = sigma_s / there - sigma_t / here
        guess = there * (z / here + step * u)
        if s > 0:
            u = (u + _flow(denoise(guess, _batch(s, z)), guess, alpha_s, sigma_s)) / 2
            z = there * (z / here + step * u)
        else:
            z = guess
    return z


def dpmpp_2m(
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    schedule: Schedule,
    generator: torch.Generator | None = None,
) -> Tensor:
    """DPM-Solver++(2M): second order with one evaluation a step (Lu et al. 2022, alg. 2).

    Exact in z; x̂ is extrapolated linearly in log(α/σ) from this and the previous time. The first step and
    a last one to t = 0 have no finite step in log(α/σ), or none before, and are first order.
    """
    before: Tensor | None = None
    h_before = math.inf
    for (t, alpha_t, sigma_t), (s, alpha_s, sigma_s) in _steps(times, schedule):
        x = denoise(z, _batch(t, z))
        h = math.log(alpha_s * sigma_t / (sigma_s * alpha_t)) if sigma_s * alpha_t > 0 else math.inf
        ahead = x if before is None or s == 0 else x + h / (2 * h_before) * (x - before)
        z = sigma_s / sigma_t * z + (alpha_s - alpha_t * sigma_s / sigma_t) * ahead
        before, h_before = x, h
    return z


SAMPLERS: dict[str, Sampler] = {
    "ancestral": ancestral,
    "predictor_corrector": predictor_corrector,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
}


def named(name: str, options: Mapping[str, float] | None = None) -> Sampler:
    """A sampler of `SAMPLERS` (auto: DPM-Solver++(2M)) with its options bound.

    Raises ValueError for a name or an option that there is not.
    """
    if name != "auto" and name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is none of auto, {', '.join(SAMPLERS)}")
    sampler = SAMPLERS["dpmpp_2m" if name == "auto" else name]
    taken = {
        key: p.default for key, p in inspect.signature(sampler).parameters.items() if p.kind is p.KEYWORD_ONLY
    }
    bound: dict[str, float] = {}
    for key, value in (options or {}).items():
        if key not in taken:
            what = f"only {', '.join(taken)}" if taken else "no options"
            raise ValueError(f"sampler {name} has no option {key!r}: it has {what}")
        if value < 0 or (isinstance(taken[key], int) and value != int(value)):
            kind = "a whole number" if isinstance(taken[key], int) else "a number"
            raise ValueError(f"{key} of sampler {name} is {value:g}: give {kind} of 0 or more")
        bound[key] = type(taken[key])(value)
    return partial(sampler, **bound) if bound else sampler  # type: ignore[arg-type]


# --- times ------------------------------------------------------------------------------------------------------


def timesteps(
    count: int,
    schedule: Schedule,
    spacing: Literal["time", "logsnr"] = "time",
    start: float = 1.0,
    logsnr_range: tuple[float, float] = (-10.0, 10.0),
) -> Tensor:
    """[count + 1] float64 times for so many steps, from `start` down to 0.

    Args:
        spacing: equal steps in t, or in λ = log(α²/σ²).
        logsnr_range: 'logsnr' cuts λ to it, since λ may be infinite at both ends; outside of −10…10 z is
            noise, or data, to within 0.7 % of its scale. The last step is from the largest λ to t = 0.
    """
    if count < 1:
        raise ValueError(f"{count} steps: a sampler needs at least 1")
    if spacing == "time":
        return torch.linspace(start, 0, count + 1, dtype=torch.float64)
    low, high = logsnr_range
    first = float(logsnr(*schedule(torch.tensor(start, dtype=torch.float64))))
    wanted = torch.linspace(max(low, first), high, count, dtype=torch.float64)
    t = _time_of(wanted, schedule).clamp(max=start)
    return torch.cat([t, t.new_zeros(1)])


def _time_of(wanted: Tensor, schedule: Schedule) -> Tensor:
    """t with λ(t) = wanted, by bisection: λ falls with t under every schedule."""
    low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
    for _ in range(60):
        middle = (low + high) / 2
        above = logsnr(*schedule(middle)) > wanted
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


# --- shared -----------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    t: float
    alpha: float
    sigma: float


def _point(t: float, schedule: Schedule) -> Point:
    alpha, sigma = schedule(torch.tensor(t, dtype=torch.float64))
    return Point(t, float(alpha), float(sigma)) if t > 0 else Point(0.0, 1.0, 0.0)


def _steps(times: Tensor, schedule: Schedule) -> Iterator[tuple[Point, Point]]:
    ts = times.tolist()
    if len(ts) < 2 or ts[0] > 1 or ts[-1] < 0 or any(s >= t for t, s in pairwise(ts)):
        raise ValueError(f"times {ts} do not decrease within 1…0: give at least two, as `timesteps` does")
    return pairwise(_point(t, schedule) for t in ts)


def _batch(t: float, z: Tensor) -> Tensor:
    """t as [B]; float32 at least, where bfloat16 could not tell neighbouring times apart."""
    return torch.full((len(z),), t, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)


def _flow(x: Tensor, z: Tensor, alpha: float, sigma: float) -> Tensor:
    """ε̂ − x̂"""
    return (z - alpha * x) / sigma - x


def normal(z: Tensor, generator: torch.Generator | None) -> Tensor:
    """N(0, 1) of z's shape, type and device, drawn on the generator's device."""
    device = z.device if generator is None else generator.device
    return torch.randn(z.shape, generator=generator, device=device, dtype=z.dtype).to(z.device)
