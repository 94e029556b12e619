"""What the training loop asks of a task, and nothing more: the loop knows no model, a task no loop.

batches = micro-batches of a step            data, prepared by workers
counts = task.counts(batch), over all ranks  clips, words, visual tokens …: known before the first forward pass
task.backward(step)                          Σ_kind w_kind · Σ losses ÷ count, as gradients
loop: clip, optimizer.step(), EMA, metrics, checkpoint
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from jobs.training.distributed import World
from jobs.training.parallelize import local_gradients
from jobs.training.recipe_core import Optimizer

Batch = dict[str, Any]

COUNTS = "counts"  # of a batch on the device: what `Task.counts` says of it, put there by the loop
PARTS = "parts"  # of a batch whose samples have several shapes: batches of one shape each


def parts_of(batch: Batch) -> list[Batch]:
    """Batches of one shape each, in the order of the batch's samples."""
    return batch.get(PARTS, [batch])


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """Every tensor of a batch, by name; of parts with their number."""
    found = {name: x for name, x in batch.items() if isinstance(x, Tensor)}
    for i, part in enumerate(batch.get(PARTS, ())):
        found |= {f"{name} {i + 1}": x for name, x in tensors_of(part).items()}
    return found


def to_device(batch: Batch, device: torch.device) -> Batch:
    moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return moved | {PARTS: [to_device(part, device) for part in batch[PARTS]]} if PARTS in batch else moved


class Summed(NamedTuple):
    """Something to log: its mean over parts is sum ÷ parts, over all ranks and micro-batches."""

    sum: Tensor  # detached scalar
    parts: int


@dataclass
class Losses:
    """Of one micro-batch.

    sums: kind of part (a name in `Task.counts`) → differentiable sum of what is minimised over its parts; where
        several ranks share the micro-batch's sequences, over this rank's share of them.
    report: what else is to be logged.
    each: detached [len(batch['key'])], the loss of each clip, by which one that is not finite is named.
    levels, errors: detached [n], noise level (0…1) and loss of single parts, for the loss by noise level.
    """

    sums: dict[str, Tensor]
    report: dict[str, Summed] = field(default_factory=dict)
    each: Tensor | None = None
    levels: Tensor | None = None
    errors: Tensor | None = None


class Told(NamedTuple):
    """Of a clip what a model should say and what it says. frames: uint8 [T, H, W, 3], what it saw."""

    wanted: str
    said: str
    frames: Tensor | None = None


@dataclass
class Evaluation:
    """What a model can do by now: scalars get charts; videos, uint8 [T, H, W, 3], are shown by name."""

    scalars: dict[str, float] = field(default_factory=dict)
    videos: dict[str, Tensor] = field(default_factory=dict)
    texts: list[Told] = field(default_factory=list)


@dataclass
class Phase:
    """Parameters with an optimizer of their own; a step runs every phase once, in order.

    Diffusion has one; an autoencoder with a discriminator has two. `module` is what DDP or FSDP wraps and
    what `Task.loss` is called with; its forward is the only way to its parameters.

    published: beginnings of names of frozen parameters that files of others, named in the recipe, give again.
    """

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    ema: bool = True
    published: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, module: nn.Module, o: Optimizer, ema: bool = True) -> Phase:
        """With AdamW over what of the module is trained, see `parameter_groups`."""
        groups = parameter_groups(module, o)
        adamw = torch.optim.AdamW(groups, o.lr, o.betas, weight_decay=o.weight_decay, fused=True)
        return cls(name, module, adamw, ema)


def parameter_groups(module: nn.Module, o: Optimizer) -> list[dict[str, Any]]:
    """The trained parameters by learning rate and weight decay, as an optimizer takes them.

    Only matrices that mix features decay: norms, biases, gates (one axis or none) and embeddings, of which a step
    sees a few rows, do not. `o.rates` has the rate of parts of the network, by the beginning of their names; that of a
    part that is frozen waits for a stage that trains it.

    Raises ValueError for a part that the network does not have.
    """
    tables = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    every = [name for name, _ in module.named_parameters()]
    for part in o.rates:
        if not any(_within(name, part) for name in every):
            parts = sorted({name.partition(".")[0] for name in every})
            raise ValueError(
                f"optimizer.rates: nothing is called {part!r}; the network has {', '.join(parts)}"
            )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in trained.items():
        parts = [part for part in o.rates if _within(name, part)]
        rate = o.rates[max(parts, key=len)] if parts else o.lr
        decay = o.weight_decay if p.ndim > 1 and id(p) not in tables else 0.0
        groups.setdefault((rate, decay), []).append(p)
    return [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


class Loader(Protocol):
    """Micro-batches of one rank, without end (epoch after epoch), resumable between any two of them.

    The m-th micro-batch of rank r is number m · world + r of a list that does not depend on ranks, workers
    or machines; every rank has as many. `state_dict` says which were handed out, as far as this rank knows.
    """

    def __iter__(self) -> Iterator[Batch]: ...

    def examples(self) -> Iterable[Batch]:
        """A micro-batch of each shape, the same on every rank; they are not taken from the list."""
        ...

    def table(self) -> str:
        """Lines that say what of the data is trained on, and how."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def joined(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One state, for any number of ranks to go on from, of those that all ranks have after the same step."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Start:
    """What a task is made from, beside its recipe.

    data: folder of a run with shards. out: folder of the training, where what is measured once may be kept.
    saved: `Task.state()` of the checkpoint that it goes on from; none: a new training.
    made_on: device on which this rank makes the networks that are trained, see `parallelize.made_on`; none: the
        world's. On the meta device they have no weights, and are given them later.
    """

    data: str
    out: Path
    world: World
    saved: dict[str, Any] | None = None
    made_on: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """Where networks that are trained are made."""
        return self.made_on or self.world.device


class Task:
    """What diffusion, autoencoder and VLM are to the loop; a subclass has `phases`, `loss`, `blocks` and `tokens`.

    Made by `build(recipe, start) -> (Task, Loader)` of jobs/training/<trains>/task.py. A batch holds at least
    'key': list[str], the clips' ids.

    Randomness comes from `Draws` alone, so that a step depends on the seed and its place in the run,
    not on the number of ranks or what ran before.
    """

    phases: list[Phase]
    weights: ClassVar[Mapping[str, float]] = {"clips": 1.0}  # of the mean loss of each kind of part

    def counts(self, batch: Batch) -> dict[str, int]:
        """Parts of each kind in a micro-batch, told on the host before anything is computed."""
        return {"clips": len(batch["key"])}

    def loss(self, phase: str, model: nn.Module, batch: Batch, draws: Draws) -> Losses:
        """Losses of one micro-batch under `model`, the wrapped module of that phase."""
        raise NotImplementedError

    def backward(self, step: Step) -> None:
        """Add the gradients of a step to a phase's parameters.

        Here each micro-batch goes forward and backward by itself. A loss over all of a step's samples (contrastive
        learning) goes over `step.micro_batches()` twice.
        """
        for batch, draws in step.micro_batches():
            with step.autocast():
                losses = self.loss(step.phase.name, step.model, batch, draws)
            total = step.total(batch, losses)
            if total.requires_grad:
                total.backward()

    def after_step(self) -> None:
        """On every rank, once all phases are updated: for what is updated without a gradient (a codebook)."""

    def blocks(self, module: nn.Module) -> Iterator[nn.Module]:
        """The repeated blocks of a module: what is compiled, checkpointed and sharded one by one."""
        raise NotImplementedError

    def tokens(self, batch: Batch) -> int:
        """Latent positions (or words) in a micro-batch, for tokens/s."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, step: int) -> Evaluation:
        """Look at the first phase's model, in eval mode with its averaged weights; rank 0's answer is kept.

        Every rank is asked, and passes through the model as often as any other: a sharded one needs all of them
        for each pass. See `World.share`.
        """
        return Evaluation()

    def state(self) -> dict[str, Any]:
        """What else a checkpoint must hold, to go on and to use the model without the run (normaliser, vocabulary)."""
        return {}


class Step:
    """One phase of one optimizer step, as `Task.backward` is given it.

    Args:
        model: the phase's module, as it is wrapped.
        batches: this rank's micro-batches; numbers: their places among all of the run, see `Draws`.
        weights: kind of part → what the loss of one part weighs in the step.
        begin: is told of each micro-batch before it is computed, tell: of its losses.
    """

    def __init__(
        self,
        phase: Phase,
        model: nn.Module,
        batches: list[Batch],
        numbers: list[int],
        weights: Mapping[str, float],
        *,
        seed: int,
        world: World,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        begin: Callable[[Batch], None] = lambda batch: None,
        tell: Callable[[Batch, Losses, Tensor], None] = lambda batch, losses, total: None,
    ):
        self.phase, self.model, self.batches, self.numbers = phase, model, batches, numbers
        self.weights, self.seed, self.world = weights, seed, world
        self.autocast, self.begin, self.tell = autocast, begin, tell

    def micro_batches(self) -> Iterator[tuple[Batch, Draws]]:
        """Each with its draws, and torch's own generator (dropout) as its place in the run has it.

        Between the first and the last, gradients are summed on this rank only; the last sums them over all.
        """
        for i, (batch, number) in enumerate(zip(self.batches, self.numbers, strict=True)):
            self.begin(batch)
            seed_torch(self.seed, number)
            with local_gradients(self.model, i + 1 < len(self.batches)):
                yield batch, Draws(self.seed, number, self.world.device)

    def factor(self, kind: str) -> float:
        """Of a sum of losses of that kind: DDP and FSDP give the mean of the ranks' gradients, the loss is a sum."""
        return self.weights[kind] * self.world.size

    def total(self, batch: Batch, losses: Losses) -> Tensor:
        """What is to be differentiated."""
        every = [x * self.factor(kind) for kind, x in losses.sums.items()]
        total = torch.stack(every).sum()
        self.tell(batch, losses, total.detach())
        return total


def part_weights(weights: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    """Kind → its weight by its count; a kind of which a step has no part adds nothing."""
    return {kind: w / counts[kind] if counts[kind] else 0.0 for kind, w in weights.items()}


def seed_torch(seed: int, number: int) -> None:
    """Torch's own generator, from the place in the run alone."""
    words = f"{seed} {number}".encode()
    torch.manual_seed(int.from_bytes(blake2b(words, digest_size=7).digest(), "little"))


@dataclass(frozen=True)
class Draws:
    """Random numbers of a micro-batch, a stream for each of its samples.

    micro: the micro-batch's number over all ranks and the whole run: step · data.micro_batches + a · world + rank,
    a being its place among the rank's own. So two ranks draw what one that accumulates two micro-batches does.
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

    def order(self, count: int, weights: Tensor | None = None, stream: int = 2) -> Tensor:
        """0 … count − 1 in random order, int64 [count]; with weights [count], each place goes to one of those left
        with a chance ∝ its weight (Efraimidis & Spirakis 2006)."""
        generator = self._generator(0, stream)
        if weights is None:
            return torch.randperm(count, generator=generator, device=self.device)
        waits = torch.empty(count, device=self.device).exponential_(generator=generator)
        return (waits / weights.clamp(min=1e-30)).argsort()

    def _generator(self, sample: int, stream: int) -> torch.Generator:
        words = np.array([self.seed, self.micro, self.part, sample, stream], dtype=np.int64)
        seed = int.from_bytes(_hash(words.tobytes()), "little") >> 1
        return torch.Generator(self.device).manual_seed(seed)


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=8).digest()
