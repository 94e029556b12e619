"""Averages of the weights over training, of any length, chosen after training (Karras et al. 2024, "EDM2").

An average with a power-function profile weighs what the weights were at step τ of t by τ^γ:

    θ̂_γ(t) = (γ + 1) / t^{γ+1} ∫₀ᵗ τ^γ θ(τ) dτ                                  (eq. 2)

so its width grows with training: it is the share σ_rel of it, whatever t is. It costs one line a step,

    θ̂_γ(t) = β_γ(t) θ̂_γ(t − 1) + (1 − β_γ(t)) θ(t),   β_γ(t) = (1 − 1/t)^{γ+1}   (eq. 3)

which is exact for weights that stand still between steps, and forgets the initial weights at t = 1.
Two lengths, stored now and then, span others: a profile that nobody kept is the least-squares combination
of those that were (sec. 3.2 and app. C).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

LONGEST = 12**-0.5  # σ_rel of γ = 0, the plain mean


class Profile(NamedTuple):
    """An average of length σ_rel = `length` at step `step`."""

    step: int
    length: float


@functools.cache
def exponent(length: float) -> float:
    """γ of σ_rel = (γ + 1)^½ (γ + 2)⁻¹ (γ + 3)^{−½}, the profile's standard deviation over t (eq. 126).

    Raises ValueError where σ_rel is not in 0…0.288, where γ ≥ 0.
    """
    if not 0 < length <= LONGEST:
        raise ValueError(f"σ_rel = {length}: give one above 0 and at most {LONGEST:.3f}")
    w = length**-2  # (γ + 2)² (γ + 3) = w (γ + 1)
    return float(np.roots([1, 7, 16 - w, 12 - w]).real.max())


def beta(step: int, length: float) -> float:
    """Share of the old average that step number `step` (from 1) keeps (eq. 3)."""
    return (1 - 1 / step) ** (exponent(length) + 1)


class PowerEMA:
    """The averages of a module's parameters, one a length, kept beside it in float32.

    Frozen parameters and buffers are not averaged. Sharded parameters (DTensor) are averaged shard by shard.
    """

    def __init__(self, module: nn.Module, lengths: Sequence[float]):
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.averages: dict[float, dict[str, Tensor]] = {
            length: {name: p.detach().clone().float() for name, p in self.parameters.items()}
            for length in lengths
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step number `step`, counted from 1."""
        now = [local(p).float() for p in self.parameters.values()]
        for length, average in self.averages.items():
            torch._foreach_lerp_([local(a) for a in average.values()], now, 1 - beta(step, length))

    @contextlib.contextmanager
    def applied(self, length: float) -> Iterator[None]:
        """Inside, the module has this average for weights; one parameter's memory is needed for it."""
        self._swap(self.averages[length])
        try:
            yield
        finally:
            self._swap(self.averages[length])

    @torch.no_grad()
    def _swap(self, average: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            p, a = local(parameter), local(average[name])
            held = p.clone()
            p.copy_(a)
            a.copy_(held)


def local(x: Tensor) -> Tensor:
    """This rank's shard of a DTensor; the tensor itself where it is none."""
    return x.to_local() if hasattr(x, "to_local") else x.detach()


# ---------------------------------------------------------------- after training


def overlap(a: Profile, b: Profile) -> float:
    """∫ p_a(τ) p_b(τ) dτ of two profiles, each of which integrates to 1 (app. C.2).

    = (γ_a + 1)(γ_b + 1) / (γ_a + γ_b + 1) · m^{γ_a+γ_b+1} / (t_a^{γ_a+1} t_b^{γ_b+1}), m = min(t_a, t_b).
    """
    if a.step > b.step:
        a, b = b, a
    p, q = exponent(a.length), exponent(b.length)
    return (p + 1) * (q + 1) / (p + q + 1) * (a.step / b.step) ** q / b.step


def combination(stored: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """Weights x of the stored profiles that make Σ x_i p_i nearest to the wanted one in L², float64 [n].

    Solves the normal equations A x = b of overlaps. Raises ValueError where nothing is stored up to the
    wanted step.
    """
    if wanted in stored:  # exact, whatever the conditioning of A
        return np.array([float(s == wanted) for s in stored])
    usable = np.array([s.step <= wanted.step for s in stored], dtype=bool)
    if not usable.any():
        raise ValueError(f"no average is stored up to step {wanted.step}")
    known = [s for s, ok in zip(stored, usable, strict=True) if ok]
    a = np.array([[overlap(i, j) for j in known] for i in known])
    b = np.array([overlap(i, wanted) for i in known])
    x = np.zeros(len(stored))
    x[usable] = np.linalg.lstsq(a, b, rcond=1e-12)[0]
    return x


def error(stored: Sequence[Profile], wanted: Profile) -> float:
    """‖Σ x_i p_i − p‖ / ‖p‖ of that combination: how far the profile is from the wanted one."""
    x = combination(stored, wanted)
    norm = overlap(wanted, wanted)
    cross = np.array([overlap(s, wanted) for s in stored])
    gram = np.array([[overlap(i, j) for j in stored] for i in stored])
    return float(np.sqrt(max(x @ gram @ x - 2 * x @ cross + norm, 0.0) / norm))
