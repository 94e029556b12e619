"""What is measured while training: sums on the device, read when they are shown, and a line of progress."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jobs.training.distributed import World
from jobs.training.task import Losses, Summed

LEVELS = 10  # bins of the loss by noise level


class Metrics:
    """Of the steps since the last `read`; nothing here waits for the device but `read`.

    Args:
        phases: names; with one, its figures are plain 'loss', 'lr', 'grad_norm', else '<phase>/loss', …
        device: of the losses.
    """

    def __init__(self, phases: list[str], device: torch.device):
        self.phases, self.device = phases, device
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}  # name → sum over parts, on the device
        self.parts: dict[str, int] = defaultdict(int)  # name → parts
        self.weights: dict[str, dict[str, float]] = {}  # loss of a phase → those it is made of
        self.norms: dict[str, list[Tensor]] = defaultdict(list)
        self.levels = torch.zeros(2, LEVELS, device=self.device)  # sums of losses, counts
        self.begin = time.perf_counter()
        self.steps = self.tokens = self.samples = self.skipped = 0
        self.flops = self.waited = self.aside = 0.0

    def batch(self, tokens: int, flops: float, samples: int, skipped: int, waited: float) -> None:
        """A micro-batch of this rank came, after so many seconds; flops: of the model, forward and backward."""
        self.tokens, self.samples, self.flops = (
            self.tokens + tokens,
            self.samples + samples,
            self.flops + flops,
        )
        self.skipped, self.waited = self.skipped + skipped, self.waited + waited

    def losses(
        self, phase: str, losses: Losses, counts: Mapping[str, int], weights: Mapping[str, float]
    ) -> None:
        """Of a micro-batch; counts: its parts of each kind, weights: of each kind's mean in the loss."""
        name = self._name("loss", phase)
        kinds = {name if len(weights) == 1 else f"{name}/{kind}": kind for kind in losses.sums}
        self.weights[name] = {n: weights[kind] for n, kind in kinds.items() if n != name}
        found = {n: Summed(losses.sums[kind].detach(), counts[kind]) for n, kind in kinds.items()}
        for n, (value, parts) in (found | losses.report).items():
            self.sums[n] = self.sums[n] + value.float() if n in self.sums else value.float()
            self.parts[n] += parts
        if losses.levels is not None and losses.errors is not None:
            bins = (losses.levels.detach() * LEVELS).long().clamp(0, LEVELS - 1)
            errors = losses.errors.detach().float()
            self.levels[0].index_add_(0, bins, errors)
            self.levels[1].index_add_(0, bins, torch.ones_like(errors))

    def step(self, phase: str, norm: Tensor) -> None:
        """A phase was updated; norm: of its gradient before clipping, a scalar on the device."""
        self.norms[self._name("grad_norm", phase)].append(norm)

    def _name(self, what: str, phase: str) -> str:
        return what if len(self.phases) == 1 else f"{phase}/{what}"

    def read(self, world: World, rates: dict[str, float], peak: float) -> dict[str, float]:
        """All figures, over all ranks, and begin anew.

        Args:
            rates: learning rate by phase.
            peak: FLOP/s of one device.
        """
        mine = {name: (float(x), self.parts[name]) for name, x in self.sums.items()}
        levels = self.levels.tolist()
        seconds = time.perf_counter() - self.begin - self.aside
        counts = (self.tokens, self.flops, self.samples, self.skipped, self.waited / seconds / world.size)
        found: dict[str, float] = {}
        everyone = world.gather((mine, levels, counts, peak_memory(self.device)))
        for name in mine:
            total = [sums.get(name, (0.0, 0)) for sums, *_ in everyone]
            found[name] = sum(x for x, _ in total) / max(sum(n for _, n in total), 1)
        for name, weights in self.weights.items():
            if weights:
                found[name] = sum(w * found[part] for part, w in weights.items())
        for i in range(LEVELS):
            error, count = (sum(e[1][row][i] for e in everyone) for row in (0, 1))
            if count:
                found[f"loss/level_{i}"] = error / count
        for name, norms in self.norms.items():
            found[name] = float(torch.stack(norms).mean())
        tokens, flops, samples, skipped, waited = (
            sum(column) for column in zip(*(e[2] for e in everyone), strict=True)
        )
        found |= {self._name("lr", phase): rate for phase, rate in rates.items()}
        found |= {
            "tokens_per_second": tokens / seconds,
            "samples_per_second": samples / seconds,
            "step_seconds": seconds / max(self.steps, 1),
            "mfu": flops / seconds / (peak * world.size),
            "data_wait": waited,
            "skipped": skipped,
            "peak_memory_gb": max(e[3] for e in everyone) / 1e9,
        }
        self._clear()
        return found


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's tensors, or of this process, at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Progress:
    """A bar in a terminal, elsewhere a plain line every few seconds; a context manager."""

    def __init__(self, first: int, last: int, enabled: bool, every_s: float = 10.0):
        self.first, self.last, self.enabled, self.every_s = first, last, enabled, every_s
        self.start = self.line = time.monotonic()
        self.settled: tuple[int, float] | None = (
            None  # when the first steps, which compile and warm up, were over
        )
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("step"),
                BarColumn(24),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
            )
            self.bar = Bar(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task("", total=self.last, completed=self.first)
            self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, step: int, figures: dict[str, float]) -> None:
        """After a step; figures: the newest that were read."""
        now = time.monotonic()
        if self.settled is None and step - self.first >= min(3, self.last - self.first):
            self.settled = step, now
            if self.enabled and step < self.last:
                each = (now - self.start) / (step - self.first)
                self._say(f"{each:.3g} s a step at first: about {clock(each * (self.last - step))} left")
        if not self.enabled:
            return
        if self.bar:
            self.bar.update(self.task, completed=step, description=self._text(step, now, figures))
        elif step == self.last or now - self.line >= self.every_s:
            self.line = now
            print(f"step {step}/{self.last}{self._text(step, now, figures)}", file=sys.stderr, flush=True)

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True) if not self.bar else self.bar.console.print(text)

    def _text(self, step: int, now: float, figures: dict[str, float]) -> str:
        since, then = self.settled or (self.first, self.start)
        parts = [f"{name} {figures[name]:.4g}" for name in figures if name.endswith("loss")]
        if step > since:
            each = (now - then) / (step - since)
            parts += [f"{1 / each:.3g} steps/s", f"{clock(each * (self.last - step))} left"]
        if figures.get("mfu"):
            parts.append(f"MFU {figures['mfu']:.1%}")
        if figures.get("data_wait", 0) > 0.05:
            parts.append(f"waits for data {figures['data_wait']:.0%}")
        return "".join(f"  {part}" for part in parts)


def clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
