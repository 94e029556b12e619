"""All that is trained of a diffusion model, as DDP and FSDP wrap it, and what it is asked while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.diffusion.condition import Condition
from models.diffusion.objective import (
    Process,
    Weighting,
    error_of,
    noisy_input,
    uniform,
)
from models.encoders.text import WordText


@dataclass(frozen=True)
class Question:
    """What the network is asked of B clips of one shape while it trains.

    x, noise: [B, C, T, h, w]; t: [B] in 0…1. texts: captions that the network's own encoder reads, or None.
    dropped: bool [B], rows that are trained on without their text.
    """

    x: Tensor
    t: Tensor
    noise: Tensor
    condition: Condition
    texts: list[str] | None
    dropped: Tensor


class Answer(NamedTuple):
    """Of each clip, [B]: what is minimised, and the plain error, detached."""

    loss: Tensor
    error: Tensor


class Network(nn.Module):
    """All that is trained: the denoiser, a text encoder trained along, the weighting's own parameters.

    DDP and FSDP act around `forward` alone, so everything is asked through it: `network(Network.losses, …)`,
    `network(Network.predict, …)`, `network(Network.read, texts)`.
    """

    def __init__(
        self, denoiser: nn.Module, text: WordText | None, process: Process, weighting: Weighting = uniform
    ):
        super().__init__()
        self.denoiser, self.text, self.process = denoiser, text, process
        self.weighting = weighting

    def forward(self, method: Callable[..., Any], *args: Any) -> Any:
        return method(self, *args)

    def predict(self, z: Tensor, level: Tensor, condition: Condition) -> Tensor:
        """z [B, C, T, h, w], level [B] → prediction of z's shape."""
        return self.denoiser(z, level, condition)

    def read(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Features [B, L, D] and mask [B, L] of the text encoder that is trained along."""
        assert self.text is not None
        return self.text(texts)

    def losses(self, questions: Sequence[Question], packed: bool = False) -> list[Answer]:
        """The loss of each question's samples; `packed`: all of them in one sequence, which changes no number."""
        conditions = [self._condition(q) for q in questions]
        latents = [noisy_input(self.process, q.x, q.t, q.noise) for q in questions]
        levels = [self.process.level(q.t) for q in questions]
        if packed:
            packing: Any = self.denoiser
            predicted = packing.packed(latents, levels, conditions)
        else:
            predicted = [self.denoiser(*asked) for asked in zip(latents, levels, conditions, strict=True)]
        answers = []
        for q, condition, p in zip(questions, conditions, predicted, strict=True):
            error = error_of(p, self.process, q.x, q.t, q.noise, condition)
            answers.append(Answer(self.weighting(error, self.process, q.t), error.detach()))
        return answers

    def _condition(self, question: Question) -> Condition:
        """With the text that is read here, and without that of dropped captions."""
        condition = question.condition
        if question.texts is not None:
            features, mask = self.read(question.texts)
            condition = replace(condition, text=features, text_mask=mask)
        return condition.without_text(question.dropped)


def blocks_of(denoiser: nn.Module) -> Iterator[nn.Module]:
    """A denoiser's repeated blocks: its `repeated()`, or its list `blocks`."""
    repeated: Any = getattr(denoiser, "repeated", None)
    return repeated() if repeated is not None else iter(denoiser.blocks)  # type: ignore[arg-type]
