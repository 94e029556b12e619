"""The training loop of every model: `train(recipe, data, out)`, alone or as one of several processes.

One step: `data.micro_batches` micro-batches, shared by the ranks, forward and backward; losses are sums over parts
(clips, words), divided by the number of parts in the whole step, which the ranks agree on first; gradients are
clipped once, applied, averaged. A step depends on the seed, the step's number and its data, on nothing else: a
resumed run goes on as if it had never stopped, and two ranks train as one that accumulates twice as much.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jobs.training import checkpoint, exported
from jobs.training.distributed import World, connect
from jobs.training.page.metrics import Metrics, Progress
from jobs.training.parallelize import gradient_norm, made_on, parallelize
from jobs.training.plan import autocast, make_plan
from jobs.training.recipe_core import Optimizer, TrainRecipe
from jobs.training.resume import resume_point
from jobs.training.room import writing
from jobs.training.signals import Signals
from jobs.training.task import (
    COUNTS,
    Batch,
    Evaluation,
    Loader,
    Losses,
    Phase,
    Start,
    Step,
    Task,
    part_weights,
    seed_torch,
    tensors_of,
    to_device,
)
from models.ema import PowerEMA, local
from pipeline.faults import one_line

Build = Callable[[TrainRecipe, Start], tuple[Task, Loader]]


class TrainError(ValueError):
    """Training cannot start or go on; one sentence with the fix."""


@dataclass(frozen=True)
class Outcome:
    """step: the last one taken; it is saved. signal: number of the one that ended training early."""

    step: int
    signal: int | None = None


def train(
    recipe: TrainRecipe,
    data: str,
    out: Path,
    *,
    device: str | None = None,
    build: Build | None = None,
    monitor: Callable[..., Any] | None = None,
) -> Outcome:
    """Train until step `recipe.run.steps`, from the last good checkpoint in `out` where there is one.

    Every process of a launch calls this with the same arguments. SIGTERM or SIGINT end the step, save and
    return; a second one stops at once.

    Args:
        data: folder of a run with shards.
        device: see `connect`.
        build: makes task and loader; jobs/training/<recipe.trains>/task.py has the default one.
        monitor: makes what is told of the progress; default: `jobs.training.page.monitor.Monitor`.

    Raises ValueError (TrainError, CheckpointError) or StoreError, with one sentence.
    """
    build = build or import_module(f"jobs.training.{recipe.trains}.task").build
    monitor = monitor or import_module("jobs.training.page.monitor").Monitor
    out = Path(out)
    with (
        writing(out),
        Signals() as signals,
        connect(device, recipe.compute.context) as world,
        checkpoint.lock(out, world),
    ):
        torch.manual_seed(recipe.seed)
        trainer = Trainer(recipe, data, out, world, build)
        if trainer.step >= recipe.run.steps:
            return Outcome(trainer.step)
        watch = monitor(out, recipe, enabled=world.rank == 0)
        try:
            return trainer.run(watch, signals)
        except torch.OutOfMemoryError as e:
            raise TrainError(trainer.out_of_memory()) from e
        except RuntimeError as e:  # torch raises it wherever the main thread is just then
            if "DataLoader worker" not in str(e):
                raise
            raise TrainError(
                f"a process that decodes was ended from outside ({one_line(e)}): if memory ran out, set data.workers "
                f"below {recipe.data.workers}; the same command goes on from the last checkpoint"
            ) from e
        finally:
            watch.close()


class Finite(NamedTuple):
    """Whether a loss (kind 0) or gradient (kind 1) was finite, on the device: of each clip, or of all in one."""

    step: int
    kind: int
    keys: list[str]
    finite: Tensor

    def bad(self) -> tuple[int, int, list[str]]:
        """Step, kind, and the clips whose loss is not finite."""
        fine = self.finite.expand(len(self.keys)).tolist()
        return self.step, self.kind, [key for key, fine in zip(self.keys, fine, strict=True) if not fine]


class Trainer:
    """The state of one process; see `train`."""

    def __init__(self, recipe: TrainRecipe, data: str, out: Path, world: World, build: Build):
        self.recipe, self.out, self.world = recipe, out, world
        self.micro_batches = share_of_step(recipe.data.micro_batches, world)  # of this rank
        folder = resume_point(recipe, out, world)
        saved = checkpoint.read_task(folder) if folder else None
        frozen = exported.read_meta(folder)["frozen"] if folder else {}
        given = folder is not None and not any(frozen.values())
        start = Start(data, out, world, saved, made_on(recipe.compute, world, given))
        self.task, self.loader = world.agree(lambda: build(recipe, start))
        self.step, self.loader_state = 0, self.loader.state_dict()
        if folder:
            meta = exported.read_meta(folder)
            self.step, self.loader_state = meta["step"], meta["loader"]
            self.loader.load_state_dict(self.loader_state)
        self.folder = folder
        self.batch: Batch = {}  # the newest, for messages
        self.metrics = Metrics([p.name for p in self.task.phases], world.device)
        self.rates = {p.name: [group["lr"] for group in p.optimizer.param_groups] for p in self.task.phases}
        self.unread: list[Finite] = []
        self.uncompiled: list[str] = []  # sentences about blocks that run as they are

    # ------------------------------------------------------------ before

    def _prepare(self) -> None:
        """Measure on a micro-batch of each shape, then parallelize the phases and read the checkpoint."""
        self.batches: Any = iter(self.loader)
        phases = self.task.phases
        if self.folder:
            expected = exported.read_meta(self.folder)["frozen"]
            self.world.agree(lambda: exported.restore_frozen(self.out, phases, expected))
        elif self.world.rank == 0:
            exported.write_frozen(self.out, phases)
        self.frozen = exported.digests(phases) if self.world.rank == 0 else {}
        seed_torch(self.recipe.seed, 0)
        self.plan = self.world.first(lambda: make_plan(self.recipe, self.task, self._examples(), self.world))
        self.models: dict[str, nn.Module] = {
            phase.name: parallelize(
                phase.module,
                self.task.blocks(phase.module),
                phase.optimizer,
                self.recipe.compute,
                self.world,
                self.uncompiled,
            )
            for phase in self.task.phases
        }
        self.averages = {
            p.name: PowerEMA(p.module, self.recipe.ema.lengths)
            for p in self.task.phases
            if p.ema and self.recipe.ema.lengths
        }
        if self.folder:
            checkpoint.restore(self.folder, self.task.phases, self.averages, self.world)

    def _examples(self) -> Iterator[Batch]:
        for batch in self.loader.examples():
            self.batch = to_device(batch, self.world.device)
            yield self.batch

    # ------------------------------------------------------------ the loop

    def run(self, watch: Any, signals: Signals) -> Outcome:
        run = self.recipe.run
        self._prepare()
        self.saver = checkpoint.Saver(self.out, run.keep, self.world)
        if self.folder:
            watch.resume(self.step)
        announced = "\n".join(filter(None, (self.loader.table(), self.plan.text)))
        watch.plan(announced)
        if self.world.rank == 0:
            since = f"from step {self.step} " if self.step else ""
            print(f"{self.recipe.name}: {since}to {run.steps}\n{announced}", file=sys.stderr, flush=True)
        figures: dict[str, float] = {}
        saved = self.step if self.folder else 0
        self.metrics.read(self.world, {}, 1)
        try:
            with Progress(self.step, run.steps, self.world.rank == 0) as progress:
                while self.step < run.steps:
                    found = self._fetch(signals)
                    if found is None:
                        break
                    self.take_step(*found)
                    if self.step % run.log_every == 0 or self.step == run.steps:
                        self.check()
                        rates = {p.name: p.optimizer.param_groups[0]["lr"] for p in self.task.phases}
                        figures = self.metrics.read(self.world, rates, self.plan.peak.flops)
                        watch.scalars(self.step, figures)
                    progress.update(self.step, figures)
                    start = time.perf_counter()
                    if self.step % run.save_every == 0:
                        self._save()
                        saved = self.step
                    if run.sample_every and (self.step % run.sample_every == 0 or self.step == run.steps):
                        watch.evaluation(self.step, self._evaluate())
                    self.metrics.aside += time.perf_counter() - start
            if self.step > saved:
                self._save()
            return Outcome(self.step, signals.caught if self.step < run.steps else None)
        finally:
            self.batches.close()  # ends the processes that decode
            self.saver.close()

    def _fetch(self, signals: Signals) -> tuple[list[Batch], dict[str, float]] | None:
        """The micro-batches of a step on the device, and how many parts of each kind it has over all ranks.

        None where a rank was told to stop. Raises TrainError on all ranks where a loader fails on one, so that none
        waits for another.
        """
        found: list[Batch] = []
        failed: Exception | None = None
        mine = dict.fromkeys(self.task.weights, 0)
        if signals.caught is None:
            try:
                found = [self._next() for _ in range(self.micro_batches)]
                for batch in found:
                    mine |= {kind: mine[kind] + n for kind, n in batch[COUNTS].items()}
            except Exception as e:  # whatever reading and decoding may raise
                failed = e
        stop, broken, plain, *counts = self.world.sum(
            signals.caught is not None, failed is not None, bool(self.uncompiled), *mine.values()
        )
        if plain:
            self._stop_uncompiled()
        if stop:  # a signal to the whole process group ends the workers too: not their failure
            signals.caught = signals.caught or signal.SIGTERM
            return None
        if failed:
            raise failed
        if broken:
            raise TrainError("another rank could not read its data; its message says why")
        return found, dict(zip(mine, counts, strict=True))

    def _next(self) -> Batch:
        start = time.perf_counter()
        batch = next(self.batches, None)
        if batch is None:
            raise TrainError("the loader has ended, though it must go on epoch after epoch")
        waited = time.perf_counter() - start
        batch = to_device(batch, self.world.device)
        counts, tokens = self.task.counts(batch), self.task.tokens(batch)
        flops = self.plan.flops(batch, tokens) / self.world.context_size
        samples, skipped = len(batch["key"]), len(batch.get("skipped", ()))
        if self.world.context_rank:  # the first of those who share a batch counts it
            counts, tokens, samples, skipped = dict.fromkeys(counts, 0), 0, 0, 0
        batch[COUNTS] = counts
        self.metrics.batch(tokens, flops, samples, skipped, waited)
        return batch

    def take_step(self, batches: list[Batch], counts: dict[str, float]) -> None:
        """Every phase once, on the same micro-batches.

        Args:
            counts: parts of each kind in the micro-batches of all ranks.
        """
        self.step += 1
        recipe, world = self.recipe, self.world
        before = (self.step - 1) * recipe.data.micro_batches
        numbers = [before + a * world.data_size + world.data_rank for a in range(len(batches))]
        weights = part_weights(self.task.weights, counts)
        factor = rate_factor(recipe.optimizer, self.step, recipe.run.steps)
        for phase in self.task.phases:
            for group, rate in zip(phase.optimizer.param_groups, self.rates[phase.name], strict=True):
                group["lr"] = rate * factor
            step = Step(
                phase,
                self.models[phase.name],
                batches,
                numbers,
                weights,
                seed=recipe.seed,
                world=world,
                autocast=partial(autocast, recipe, world.device),
                begin=self._begun,
                tell=partial(self._told, phase.name),
            )
            self.task.backward(step)
            self.metrics.step(phase.name, self._apply(phase, batches))
            if phase.name in self.averages:
                self.averages[phase.name].update(self.step)
        self.task.after_step()
        self.metrics.steps += 1
        self.loader_state = self.loader.state_dict()

    def _begun(self, batch: Batch) -> None:
        self.batch = batch

    def _told(self, phase: str, batch: Batch, losses: Losses, total: Tensor) -> None:
        fine = torch.isfinite(total)
        if losses.each is not None:  # by clip, unless it is the sum alone that is not finite
            each = torch.isfinite(losses.each)
            fine = each & (fine | ~each.all())
        self.unread.append(Finite(self.step, 0, batch["key"], fine))
        self.metrics.losses(phase, losses, batch[COUNTS], self.task.weights)

    def _apply(self, phase: Phase, batches: list[Batch]) -> Tensor:
        """Clip, update; gives the gradient's norm before clipping."""
        optimizer = phase.optimizer
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        if not gradients:
            return torch.zeros((), device=self.world.device)
        norm = gradient_norm(gradients)
        clip = (self.recipe.optimizer.clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local(g) for g in gradients], clip)
        keys = [key for batch in batches for key in batch["key"]]
        self.unread.append(Finite(self.step, 1, keys, torch.isfinite(norm)))
        if (
            self.world.device.type == "cpu"
        ):  # the answers are there; what a GPU does until it is asked is not saved
            self.check()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def check(self) -> None:
        """Raises TrainError, on all ranks, where a loss or gradient since the last check was not finite, or a block was
        not compiled."""
        unread, self.unread = self.unread, []
        if not unread:
            return
        fine = torch.stack([x.finite.all() for x in unread]).tolist()
        mine = next((x.bad() for x, fine in zip(unread, fine, strict=True) if not fine), None)
        infinite, plain = self.world.sum(mine is not None, bool(self.uncompiled))
        if plain:
            self._stop_uncompiled()
        if not infinite:
            return
        self.saver.wait()
        everyone = [found for found in self.world.gather(mine) if found]
        first = min(found[:2] for found in everyone)  # a loss says more than the gradient, which all share
        keys = [key for *where, own in everyone if tuple(where) == first for key in own]
        what = "the gradient" if first[1] else "the loss"
        kept = checkpoint.checkpoints(self.out)
        last = f"step {max(kept)} is kept" if kept else "nothing was saved yet"
        raise TrainError(
            f"step {first[0]}: {what} is not finite, on the clips {', '.join(keys)}; {last}; "
            "lower optimizer.lr, lengthen optimizer.warmup, or look at those clips"
        )

    def _stop_uncompiled(self) -> None:
        self.saver.wait()
        raise TrainError(
            "; ".join(sorted({said for rank in self.world.gather(self.uncompiled) for said in rank}))
        )

    # ------------------------------------------------------------ what is kept and shown

    def _save(self) -> None:
        self.check()
        meta = {
            "step": self.step,
            "recipe": self.recipe.model_dump(mode="json"),
            "loader": self.loader.joined(self.world.gather(self.loader_state)),
            "frozen": self.frozen,
            "out": str(self.out.absolute()),
        }
        self.saver.save(meta, self.task.phases, self.averages, self.task.state())

    @contextlib.contextmanager
    def _shown(self) -> Iterator[nn.Module]:
        """The first phase's module as it is looked at: in eval mode, with its longest average for weights."""
        phase = self.task.phases[0]
        ema = self.averages.get(phase.name)
        with ema.applied(max(ema.averages)) if ema else contextlib.nullcontext(), torch.no_grad():
            training = phase.module.training
            phase.module.eval()
            with autocast(self.recipe, self.world.device):
                yield phase.module
            phase.module.train(training)

    def _evaluate(self) -> Evaluation:
        with self._shown() as module:
            return self.task.evaluate(module, self.step)

    def out_of_memory(self) -> str:
        shapes = {k: "×".join(map(str, v.shape)) for k, v in tensors_of(self.batch).items()}
        tokens = self.task.tokens(self.batch) if self.batch else 0
        fixes = [f"data.tokens {tokens // 2}", f"data.batch {max(len(self.batch.get('key', ())) // 2, 1)}"]
        fixes.pop(-1 if self.recipe.data.batch is None else 0)
        if self.recipe.compute.activation_checkpointing != "full":
            fixes.append("compute.activation_checkpointing full")
        if self.recipe.compute.precision == "fp32":
            fixes.append("compute.precision bf16")
        what = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        return (
            f"out of memory on {self.world.device} at step {self.step}, on a micro-batch of {what} "
            f"({tokens:,} tokens); set {' or '.join(fixes)}"
        )


def share_of_step(micro_batches: int, world: World) -> int:
    """How many of a step's micro-batches a rank does. Raises TrainError where they do not go round."""
    if micro_batches % world.data_size:
        may = " or ".join(str(n) for n in range(1, micro_batches + 1) if micro_batches % n == 0)
        more = -(-micro_batches // world.data_size) * world.data_size
        raise TrainError(
            f"data.micro_batches {micro_batches} cannot be shared by {world.data_size} processes: start {may}, "
            f"or set it to {more}, which makes a step's batch larger"
        )
    return micro_batches // world.data_size


def rate_factor(optimizer: Optimizer, step: int, steps: int) -> float:
    """Of the learning rate at a step, counted from 1: linear warm-up, then decay to 0 just after `decay_until`.

    Args:
        steps: of the run; what `decay_until` is where it is not given.
    """
    steps = optimizer.decay_until or steps
    warm = min(1.0, step / optimizer.warmup) if optimizer.warmup else 1.0
    done = min(max(step - 1 - optimizer.warmup, 0) / max(steps - optimizer.warmup, 1), 1.0)
    if optimizer.decay == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * done))
    return warm * (1 - done) if optimizer.decay == "linear" else warm
