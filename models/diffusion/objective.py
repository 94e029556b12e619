"""What a denoiser is trained to predict, at which times, weighted how; and the trained network as x̂(z, t).

A noisy latent is z = α x + σ ε, under any schedule (`models.diffusion.noise`). A network predicts one of

    eps    ε              DDPM (Ho et al. 2020)
    x      x
    v      α ε − σ x      Salimans and Ho 2022; VDM, Ho et al. 2022
    flow   ε − x          rectified flow (Liu et al. 2023)

Given z, each is a linear function of every other, so schedule, prediction, weighting and sampler are chosen
independently: samplers know nothing but x̂.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from models.diffusion import noise as noises
from models.diffusion.condition import Condition
from models.diffusion.noise import Schedule, over

Prediction = Literal["eps", "x", "v", "flow"]
Denoise = Callable[[Tensor, Tensor], Tensor]
"""(z [B, …], t [B]) → x̂ [B, …]: all that a sampler sees of a network."""


# --- conversions; α and σ broadcast to z ------------------------------------------------------------------


def of(prediction: Prediction, x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a network of that kind should say of z = α x + σ ε."""
    match prediction:
        case "eps":
            return eps
        case "x":
            return x
        case "v":
            return alpha * eps - sigma * x
        case "flow":
            return eps - x


def to_x(prediction: Prediction, p: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x̂ of a prediction p about z. From ε it needs α > 0, and errors grow by σ/α."""
    match prediction:
        case "eps":
            return (z - sigma * p) / alpha
        case "x":
            return p
        case "v":
            return (alpha * z - sigma * p) / (alpha**2 + sigma**2)
        case "flow":
            return (z - sigma * p) / (alpha + sigma)


@dataclass(frozen=True)
class Process:
    """A schedule and what is predicted: all that training and sampling share.

    Latents are [B, …], t is [B] in 0…1. Results are at least float32, whatever the network computes in.
    """

    schedule: Schedule
    prediction: Prediction

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            raise ValueError(f"prediction {self.prediction!r} is none of {', '.join(get_args(Prediction))}")

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ of t [B], shaped to scale `like`."""
        alpha, sigma = self.schedule(t)
        return over(alpha, like), over(sigma, like)

    def level(self, t: Tensor) -> Tensor:
        """What the network is told of t, [B] in 0…1."""
        return noises.level(*self.schedule(t))

    def noisy(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """z = α x + σ ε."""
        alpha, sigma = self.scales(t, x)
        return alpha * x + sigma * noise

    def target(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should say of `noisy(x, t, noise)`."""
        return of(self.prediction, x, noise, *self.scales(t, x))

    def x_hat(self, prediction: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return to_x(self.prediction, prediction, z, *self.scales(t, z))

    @property
    def start(self) -> float:
        """The t that sampling starts from: 1, or where ε is predicted the last t with α ≥ 1/200.

        x̂ = (z − σ ε̂)/α magnifies the network's error by σ/α, without bound where α(1) = 0.
        """
        if self.prediction != "eps":
            return 1.0
        t = torch.linspace(0, 1, 2001, dtype=torch.float64)
        return float(t[self.schedule(t)[0] >= 1 / 200].max())


def denoiser(model: nn.Module, process: Process, condition: Condition) -> Denoise:
    """The network as (z, t) → x̂."""

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        return process.x_hat(_at_least_float32(model(z, process.level(t), condition)), z, t)

    return denoise


# --- the loss -----------------------------------------------------------------------------------------------

Weighting = Callable[[Tensor, Process, Tensor], Tensor]
"""(error [B], process, t [B]) → loss [B]."""


def prediction_error(
    model: nn.Module, process: Process, x: Tensor, t: Tensor, noise: Tensor, condition: Condition
) -> Tensor:
    """`error_of` what the model predicts of `noisy_input`."""
    predicted = model(noisy_input(process, x, t, noise), process.level(t), condition)
    return error_of(predicted, process, x, t, noise, condition)


def noisy_input(process: Process, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """z, computed in float32 at least, in x's type."""
    return process.noisy(_at_least_float32(x), t, _at_least_float32(noise)).to(x.dtype)


def error_of(
    predicted: Tensor, process: Process, x: Tensor, t: Tensor, noise: Tensor, condition: Condition
) -> Tensor:
    """Mean square of prediction − target for each sample, [B], in float32 (float64 if x is).

    Where `condition.settled` is 1, latents are noised like the others but do not count: the network
    sees them clean in `condition.known` and is not asked for them. A sample of known frames only has error 0.
    """
    clean, noise = _at_least_float32(x), _at_least_float32(noise)
    square = (_at_least_float32(predicted) - process.target(clean, t, noise)) ** 2
    if condition.settled is None:
        return square.flatten(1).mean(1)
    asked = (1 - condition.settled.to(square)).expand_as(square)
    return (asked * square).flatten(1).sum(1) / asked.flatten(1).sum(1).clamp(min=1)


def uniform(error: Tensor, process: Process, t: Tensor) -> Tensor:
    """Every time counts the same."""
    return error


@dataclass(frozen=True)
class MinSNR:
    """min(SNR, γ) times the error of x̂, whatever is predicted (Hang et al. 2023, sec. 3.4).

    The error of x̂ is σ² h² times that of the prediction, h below. For ε this is min(γ/SNR, 1), for v of a
    variance-preserving process min(SNR, γ)/(SNR + 1).
    """

    gamma: float = 5.0

    def __call__(self, error: Tensor, process: Process, t: Tensor) -> Tensor:
        alpha, sigma = process.schedule(t)
        match process.prediction:
            case "eps":
                inverse_h = alpha
            case "x":
                inverse_h = sigma
            case "v":
                inverse_h = alpha**2 + sigma**2
            case "flow":
                inverse_h = alpha + sigma
        # min(α²/σ², γ) σ² h², finite where σ or α is 0
        return error * torch.minimum(alpha**2, self.gamma * sigma**2) / inverse_h.clamp(min=1e-12) ** 2


class Uncertainty(nn.Module):
    """error · e^(−u) + u, u learned as a function of the level (Kendall et al. 2018; EDM2, Karras et al. 2024).

    At the optimum u is the log of the error expected at that level, so that every level has the same weight
    in the gradient. u is a cosine series, 0 at first; its parameters are trained with the network's.
    """

    def __init__(self, terms: int = 16):
        super().__init__()
        self.series = nn.Parameter(torch.zeros(terms))

    def log_variance(self, level: Tensor) -> Tensor:
        """u [B] of level [B]: Σₖ cₖ cos(π k level)."""
        k = torch.arange(len(self.series), device=level.device)
        return torch.cos(math.pi * k * level[:, None]) @ self.series.to(level.dtype)

    def forward(self, error: Tensor, process: Process, t: Tensor) -> Tensor:
        u = self.log_variance(process.level(t))
        return error * torch.exp(-u) + u


# --- times: from U(0, 1) ------------------------------------------------------------------------------------


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """U(0, 1) to the logit-normal distribution, by its quantiles (Esser et al. 2024, eq. 19)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


TIMES: dict[str, Callable[[Tensor], Tensor]] = {"uniform": lambda u: u, "logit_normal": logit_normal}


def at_level(x: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """x [B, …] with noise of that angle: x cos(π level/2) + ε sin(π level/2), to noise `Condition.low`."""
    angle = over(level, x) * (math.pi / 2)
    return angle.cos() * x + angle.sin() * noise


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
