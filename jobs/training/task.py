"""What the training loop asks of a task, and nothing more: the loop knows no model, a task no loop.

batch = next(loader)                       data, prepared by workers
losses = task.loss(phase, model, batch)    sums, not means
loop: (losses.total / global count).backward(), clip, optimizer.step(), EMA, metrics, checkpoint
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jobs.training.recipe import Optimizer

Batch = dict[str, Any]


@dataclass
class Losses:
    """Of one micro-batch.

    total: differentiable sum of what is minimised, over `count` equal parts (samples, tokens). The loop
        divides by the count of all ranks and micro-batches of the step, so that uneven batches weigh what
        they hold.
    report: detached scalars to log, summed like `total`; averaged by `count` over the step.
    levels, errors: detached [n], noise level (0…1) and loss of single parts, for the loss by noise level.
    """

    total: Tensor
    count: int
    report: dict[str, Tensor] = field(default_factory=dict)
    levels: Tensor | None = None
    errors: Tensor | None = None


@dataclass
class Phase:
    """Parameters with an optimizer of their own; a step runs every phase once, in order.

    Diffusion has one; an autoencoder with a discriminator has two. `module` is what DDP or FSDP wraps and
    what `Task.loss` is called with; its forward is the only way to its parameters.
    """

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    ema: bool = True

    @classmethod
    def of(cls, name: str, module: nn.Module, o: Optimizer, ema: bool = True) -> Phase:
        """With AdamW over what of the module is trained."""
        trained = [p for p in module.parameters() if p.requires_grad]
        adamw = torch.optim.AdamW(trained, o.lr, o.betas, weight_decay=o.weight_decay, fused=True)
        return cls(name, module, adamw, ema)


class Loader(Protocol):
    """Micro-batches of one rank, without end (epoch after epoch), resumable between any two of them.

    The m-th micro-batch of rank r is number m · world + r of a list that does not depend on ranks, workers
    or machines; every rank has as many. `state_dict` counts those handed out, and is the same on all ranks.
    """

    def __iter__(self) -> Iterator[Batch]: ...

    def examples(self) -> Iterable[Batch]:
        """A micro-batch of each shape, the same on every rank; they are not taken from the list."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Task(Protocol):
    """Diffusion, autoencoder, VLM.

    Made by `build(recipe, data, device, rank, world) -> (Task, Loader)` of jobs/training/<trains>.py, where
    `data` is the folder of a run. A batch holds at least 'key': list[str], the clips' ids.

    Randomness comes from `draws` below alone, so that a step depends on the seed and its place in the run,
    not on the number of ranks or what ran before.
    """

    phases: list[Phase]

    def loss(self, phase: str, model: nn.Module, batch: Batch, draws: Draws) -> Losses:
        """Loss of one micro-batch under `model`, the wrapped module of that phase."""
        ...

    def blocks(self, module: nn.Module) -> Iterator[nn.Module]:
        """The repeated blocks of a module: what is compiled, checkpointed and sharded one by one."""
        ...

    def tokens(self, batch: Batch) -> int:
        """Latent positions (or words) in a micro-batch, for tokens/s."""
        ...

    def samples(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        """Videos to look at, name → uint8 [T, H, W, 3]; {} where the task has none."""
        ...

    def real(self) -> Iterator[Tensor]:
        """Real videos in the shape of those that are generated, uint8 [B, T, H, W, 3], for `run.frechet`.

        Raises ValueError where the task makes no videos of its own.
        """
        ...

    def generate(self, model: nn.Module, which: Iterable[int]) -> Iterator[Tensor]:
        """Videos of those numbers, each the same whoever makes it, uint8 [B, T, H, W, 3]."""
        ...

    def state(self) -> dict[str, Any]:
        """What else a checkpoint must hold to use the model without the run (recipe, normaliser, vocabulary)."""
        ...


@dataclass(frozen=True)
class Draws:
    """Random numbers of a micro-batch, a stream for each of its samples.

    micro: the micro-batch's number over all ranks and the whole run, (step · accumulate + a) · world + rank.
    So two ranks draw what one rank that accumulates two micro-batches does.
    part: of the micro-batch, where it has several (clips, images beside them).
    """

    seed: int
    micro: int
    device: torch.device
    part: int = 0

    def normal(self, like: Tensor, stream: int = 0) -> Tensor:
        """N(0, 1) of like's shape and type [B, …]."""
        rows = [
            torch.randn(like.shape[1:], generator=self._generator(i, stream), device=self.device)
            for i in range(len(like))
        ]
        return torch.stack(rows).to(like.dtype)

    def uniform(self, count: int, stream: int = 1) -> Tensor:
        """U(0, 1), float32 [count], one a sample."""
        rows = [
            torch.rand((), generator=self._generator(i, stream), device=self.device) for i in range(count)
        ]
        return torch.stack(rows)

    def _generator(self, sample: int, stream: int) -> torch.Generator:
        words = torch.tensor([self.seed, self.micro, self.part, sample, stream]).numpy()
        seed = int.from_bytes(_hash(words.tobytes()), "little") >> 1
        return torch.Generator(self.device).manual_seed(seed)


def _hash(data: bytes) -> bytes:
    from hashlib import blake2b

    return blake2b(data, digest_size=8).digest()
