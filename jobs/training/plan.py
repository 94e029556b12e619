"""What a run will take, said before it begins: parameters, memory, FLOPs a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jobs.training.distributed import World
from jobs.training.parallelize import SAVED
from jobs.training.recipe_core import TrainRecipe
from jobs.training.task import Batch, Draws, Phase, Task, tensors_of
from models.flops import Peak, cost, peak

MOMENTS = 2  # that Adam keeps of a parameter
SMALL = 2e9  # parameters · positions of a micro-batch that is computed rather than called on shapes

Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of a batch's tensors, by name


@dataclass(frozen=True)
class Plan:
    """Of one device.

    counted: FLOPs of all phases' modules, forward and backward, of a micro-batch of each shape.
    """

    text: str
    counted: dict[Shapes, int]
    a_token: float  # of the costliest
    peak: Peak

    def flops(self, batch: Batch, tokens: int) -> float:
        """Of a micro-batch; of a shape that was not counted, in proportion to its tokens."""
        return self.counted.get(shapes(batch), self.a_token * tokens)


def shapes(batch: Batch) -> Shapes:
    return tuple((name, tuple(x.shape)) for name, x in sorted(tensors_of(batch).items()))


def autocast(recipe: TrainRecipe, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 where the recipe says so; parameters stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.compute.precision == "bf16")


def make_plan(recipe: TrainRecipe, task: Task, examples: Iterable[Batch], world: World) -> Plan:
    """Count a micro-batch of each shape on shapes alone, before anything is parallelized: see `models.flops.cost`.

    As of the run's end, when all that the recipe turns on later is on.

    Raises ValueError where several processes would wait for the gradient of a parameter that takes no part.
    """
    device, compute = world.device, recipe.compute
    draws = Draws(recipe.seed, recipe.run.steps * recipe.data.micro_batches, device)
    counted: dict[Shapes, int] = {}
    flops = tokens = saved = beside = 0  # of the costliest
    modules = [phase.module for phase in task.phases]
    parameters = sum(p.numel() for module in modules for p in module.parameters())
    for batch in examples:
        costs = aside = 0
        for phase in task.phases:

            def loss(phase: Phase = phase, batch: Batch = batch) -> Tensor:
                with autocast(recipe, device):
                    losses = task.loss(phase.name, phase.module, batch, draws)
                return torch.stack(list(losses.sums.values())).sum()

            own = [phase.module, *(m for m in modules if m is not phase.module)]
            small = parameters * task.tokens(batch) <= SMALL
            found = cost(loss, own, task.blocks(phase.module), device, SAVED.__contains__, small)
            if found.unused and world.size > 1:
                raise ValueError(
                    f"{found.unused[0]} takes no part in a step of {_told(batch)}, so processes cannot agree on its "
                    "gradient: let the model use it, at least times 0, or freeze it"
                )
            costs += found.flops
            aside += found.beside
            kept = {"none": found.saved, "selective": found.selective, "full": found.full}
            saved = max(saved, kept[compute.activation_checkpointing])
        counted[shapes(batch)] = costs
        if costs >= flops:
            flops, tokens, beside = costs, task.tokens(batch), aside
    most = peak(device, torch.bfloat16 if compute.precision == "bf16" else torch.float32)
    shards = world.size if compute.parallel == "fsdp" else 1
    every = [(p, phase) for phase in task.phases for p in phase.module.parameters()]
    trained = sum(p.numel() for p, _ in every if p.requires_grad)
    frozen = sum(p.numel() for p, _ in every if not p.requires_grad)
    averaged = sum(p.numel() for p, phase in every if p.requires_grad and phase.ema)
    weights = sum(p.numel() * p.element_size() for p, _ in every) / shards
    gradients = 4 * trained / shards
    moments = MOMENTS * gradients
    averages = 4 * averaged * len(recipe.ema.lengths) / shards
    total = weights + gradients + moments + averages + saved
    a_step, more = (n * recipe.data.micro_batches for n in (flops, beside))
    lines = [
        f"parameters   {_count(trained)} trained" + (f", {_count(frozen)} frozen" if frozen else ""),
        f"weights      {_bytes(weights)}, gradients {_bytes(gradients)}",
        f"optimizer    {_bytes(moments)} (estimated: {MOMENTS} float32 moments a parameter)",
        f"averages     {_bytes(averages)} ({len(recipe.ema.lengths)} lengths)",
        f"activations  {_bytes(saved)} (what autograd kept of one micro-batch of {tokens:,} tokens"
        + (", less what is recomputed)" if compute.activation_checkpointing != "none" else ")"),
        f"memory       {_bytes(total)} in sum a device"
        + (f", of {_bytes(_there(device))}" if _there(device) else ""),
        f"a step       {a_step / 1e12:.3g} TFLOP, forward and backward (counted; "
        f"{recipe.data.micro_batches} micro-batches on {world.size} × {device.type})",
        *([f"beside it    {more / 1e12:.3g} TFLOP of what is not trained (not in MFU)"] if more else []),
        f"peak         {most.flops / 1e12:.3g} TFLOP/s a device ({most.source}): "
        f"{a_step / world.size / most.flops:.3g} s a step at best",
    ]
    return Plan("\n".join(lines), counted, flops / max(tokens, 1), most)


def _told(batch: Batch) -> str:
    return ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in shapes(batch))


def _there(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def _count(n: float) -> str:
    return f"{n / 1e6:,.1f} M" if n >= 1e5 else f"{n:,}"


def _bytes(n: float) -> str:
    for unit in ("kB", "MB"):
        n /= 1000
        if n < 1000:
            return f"{n:.3g} {unit}"
    return f"{n / 1000:,.3g} GB"
