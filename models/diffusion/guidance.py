"""Guidance: a network's x̂(z, t) bent towards a text, or towards frames and pixels that are given.

Each function makes or takes a `Denoise` and returns one, so they nest, and every sampler takes the result:

    denoise = classifier_free(model, process, condition, weight=3)
    denoise = reconstruction(denoise, process.schedule, known, observe=lambda x: mask * x, weight=2)
    denoise = replacement(denoise, known, mask)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.diffusion.condition import Condition
from models.diffusion.noise import Schedule, over
from models.diffusion.objective import Denoise, Process, denoiser


def classifier_free(
    model: nn.Module,
    process: Process,
    condition: Condition,
    weight: float,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Denoise:
    """(1 + w) ε_c − w ε_∅ (Ho and Salimans 2022), both halves in one batch of twice the size.

    Said of x̂, which is the same: for given z and t, ε̂ is affine in x̂. A condition without text is not guided.

    Args:
        weight: w ≥ 0; 0 is no guidance, and costs nothing.
        interval: levels (0 data, 1 noise) that are guided; at others the text alone is used, at the cost of
            one half (Kynkäänniemi et al. 2024).
        rescale: φ in 0…1, how far each sample's standard deviation is brought back to that without guidance,
            against overexposure (Lin et al. 2024, sec. 3.4); of x̂, whatever the network predicts.
    """
    plain = denoiser(model, process, condition)
    if weight == 0 or condition.text is None:
        return plain
    if condition.text_mask is None:
        raise ValueError("guidance needs condition.text_mask, whose empty rows mean 'no text'")
    both = denoiser(model, process, _joined(condition, condition.without_text()))

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        level = process.level(t)
        inside = (interval[0] <= level) & (level <= interval[1])
        if not inside.any():
            return plain(z, t)
        with_text, without = both(torch.cat([z, z]), torch.cat([t, t])).chunk(2)
        guided = with_text + weight * (with_text - without)
        if rescale:
            std, std_guided = (x.flatten(1).std(1, correction=0) for x in (with_text, guided))
            guided = guided * over(1 - rescale + rescale * std / std_guided, guided)
        return torch.where(over(inside, z), guided, with_text)

    return denoise


def reconstruction(
    denoise: Denoise,
    schedule: Schedule,
    observed: Tensor,
    observe: Callable[[Tensor], Tensor],
    weight: float,
) -> Denoise:
    """x̃ = x̂ − (w_r α/2) ∇_z ‖observed − observe(x̂)‖² (Ho et al. 2022, eqs. 7–8).

    The step that a Gaussian likelihood of the observation, N(observe(x̂), σ²/α² /w_r), adds to the score.
    Costs a backward pass through the network at each evaluation; not under `torch.inference_mode`.

    Args:
        observed: xᵃ, [B, …] of any shape.
        observe: what is seen of x [B, C, T, h, w], a linear map to observed's shape: `lambda x: mask * x` for
            frames that are given, of which `replacement` outside of it sets the known part; a mean of squares for
            super-resolution.
        weight: w_r; 1 is the likelihood's own, larger ones work better as x̂ is not certain (ibid., sec. 3.1).
    """

    def guided(z: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            x = denoise(z, t)
            error = (observed - observe(x)).square().sum()
            (gradient,) = torch.autograd.grad(error, z)
        alpha = over(schedule(t)[0], z)
        return x.detach() - 0.5 * weight * alpha * gradient

    return guided


def replacement(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """x̂ with what is known put in its place, where mask (broadcastable to known) is 1.

    A sampler then moves the known part of z along q(z | known) by itself, and ends at it exactly. Alone this
    is the replacement method (Song et al. 2021, sec. 5), which makes the rest fit only loosely: x̂ of the rest
    is not told of the known part itself, only of a noisy one (Ho et al. 2022, sec. 3.1).
    """

    def replaced(z: Tensor, t: Tensor) -> Tensor:
        return torch.where(mask.bool(), known.to(z.dtype), denoise(z, t))

    return replaced


def _joined(first: Condition, second: Condition) -> Condition:
    """Two batches' conditions as one batch's; both have the same fields."""
    tensors: dict[str, Any] = {
        field.name: torch.cat([value, getattr(second, field.name)])
        for field in fields(first)
        if isinstance(value := getattr(first, field.name), Tensor)
    }
    return replace(first, **tensors)
