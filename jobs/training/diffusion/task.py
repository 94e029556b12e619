"""Latent video diffusion as a task of the training loop.

pixels ─ autoencoder, frozen ─ normaliser ─ x            captions ─ text encoder ─┐
                               z = α x + σ ε ──────── network(z, level, condition) ─ loss

The parts are `jobs.training.diffusion.system`'s. Here is what only training needs: which times, which frames are
known, which captions are left out. From a cache, autoencoder and frozen text encoder are not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from jobs.training.data.loader import Loader, build_loader, check_cache, sources_of
from jobs.training.data.pixels import to_unit
from jobs.training.diffusion.build import build_system, check_encoders, normalizer_of
from jobs.training.diffusion.finetune import begin_with
from jobs.training.diffusion.frechet import FrechetInLoop
from jobs.training.diffusion.network import Answer, Network, Question, blocks_of
from jobs.training.diffusion.recipe import DiffusionRecipe, Tasks
from jobs.training.diffusion.system import LOW_NOISE, System, blurred, knows_frames
from jobs.training.lora import adapt
from jobs.training.recipe_core import TrainRecipe
from jobs.training.task import PARTS, Batch, Draws, Evaluation, Losses, Phase, Start, Summed, Task, parts_of
from models.autoencoders.latents import Normalizer, Posterior, Statistics, latent_shape
from models.diffusion.condition import Condition
from models.diffusion.objective import TIMES, at_level
from models.encoders.pipeline_text import PipelineText
from models.encoders.text import PretrainedText
from models.hub import MissingModel
from pipeline.shards.latents import statistics
from pipeline.shards.reader import ShardReader

SHOWN = 4  # captions of the data that are sampled where the recipe has no prompts
MEASURED = 64  # clips whose latents the normaliser is measured on, at least (or an epoch)

# Streams of `Draws`, one for each thing that is drawn.
NOISE, TIME, POSTERIOR, KNOWN, CONTEXT, DROPPED, LOW, LOW_LEVEL = range(8)


def measure(system: System, loader: Loader) -> Normalizer:
    """From the cache's statistics, or the first micro-batches of the loader's list, the same on every rank."""
    if cache := system.recipe.data.cache:
        caches = [cache, *(mixed.cache for mixed in system.recipe.data.mixture if mixed.cache)]
        return mixed_normalizer([statistics(cache) for cache in caches], loader.mixture.shares)
    measured, clips = Statistics(system.autoencoder.channels), 0
    streams = (
        loader.mixture.together
    )  # a source gives so many in a row: one of each row first, to see all sources
    for number in (i + k for i in range(streams) for k in range(0, loader.epoch_length, streams)):
        for batch in parts_of(loader.batch(loader.stills + number)):
            posterior = system.encode(to_unit(batch["video"].to(system.device)))
            measured.add(posterior.mean)
            if posterior.logvar is not None:  # the variance of what will be sampled: that of the mean, and σ²
                measured.squares += posterior.logvar.exp().double().sum((0, 2, 3, 4)).cpu()
            clips += len(batch["key"])
        if clips >= MEASURED:
            break
    return measured.normalizer()


def mixed_normalizer(found: Sequence[dict[str, Any]], shares: Sequence[float]) -> Normalizer:
    """From the statistics of several caches, each of which gives its share."""
    weights = torch.tensor(shares, dtype=torch.float64)[:, None]
    means, stds = (
        torch.tensor([each[name] for each in found], dtype=torch.float64) for name in ("mean", "std")
    )
    mean = (weights * means).sum(0)
    if len(found) == 1:
        return Normalizer(mean.float(), stds[0].float())
    return Normalizer(mean.float(), ((weights * (stds**2 + means**2)).sum(0) - mean**2).sqrt().float())


@torch.no_grad()
def as_published(system: System) -> Normalizer | None:
    """Where the denoiser begins with published weights, what it knows: the scale of latents that its autoencoder has.

    And 'no text' becomes what the text encoder makes of '', where the denoiser has a token for it. None where there are
    no such weights, or no such scale.
    """
    options = system.recipe.model.options()
    if options.get("weights") is None and options.get("spatial") is None:
        return None
    if isinstance(system.text, PretrainedText) and options.get("weights") is not None:
        denoiser: Any = system.network.denoiser
        features, _ = system.text([""])
        ends = len(system.text.tokenizer("").input_ids) > 0  # with T5 '' is one token, the end
        denoiser.caption.null.copy_(features[0, 0] if ends else torch.zeros_like(features[0, 0]))
    return getattr(system.autoencoder, "normalizer", None)


def build(recipe: TrainRecipe, start: Start) -> tuple[Diffusion, Loader]:
    """The task and this rank's loader.

    Raises ValueError or StoreError: one sentence with the fix.
    """
    assert isinstance(recipe, DiffusionRecipe)
    _check(recipe, begins=not start.saved)
    world = start.world
    if recipe.compute.attention == "flex" and world.device.type == "cpu":
        raise ValueError("compute.attention flex has no gradients on a CPU: use auto")
    try:
        system = build_system(
            recipe, world.device, fresh=not (start.saved or recipe.start), made_on=start.device
        )
    except MissingModel as e:
        raise ValueError(str(e)) from e
    if recipe.data.pack and not hasattr(system.network.denoiser, "packed"):
        raise ValueError(
            f"data.pack: model.kind {recipe.model.kind} takes one shape at a time: set it to false, or use sora"
        )
    if recipe.data.cache and recipe.tasks.interpolation and system.autoencoder.stride[0] > 1:
        raise ValueError(
            "tasks.interpolation: under an autoencoder that joins frames key frames are encoded alone, which no cache "
            "holds: leave data.cache out"
        )
    if recipe.data.cache and isinstance(system.text, PipelineText) and system.text.pooled_width:
        raise ValueError("data.cache keeps no pooled text, which the image model takes: leave it out")
    for alone, folder in sources_of(recipe, start.data):
        if recipe.data.cache:
            assert isinstance(alone, DiffusionRecipe)
            check_cache(alone, folder, system.weights)
    loader = build_loader(recipe, start.data, system.autoencoder, world)
    system.trained = [shape for shape, clips in loader.buckets.items() if clips]
    if start.saved:  # measured when the run began, and a part of it from then on
        check_encoders(system, start.saved, str(start.out), "name those in")
        system.normalizer = normalizer_of(start.saved).to(world.device)
    elif recipe.start:
        begin_with(system, recipe.start)
    else:
        system.normalizer = (as_published(system) or measure(system, loader)).to(world.device)
    if recipe.lora:
        adapt(system.network, blocks_of(system.network.denoiser), recipe.lora, recipe.seed)
    return Diffusion(system, loader, start), loader


def _check(recipe: DiffusionRecipe, begins: bool) -> None:
    """Raises ValueError. Args: begins: it goes on from no checkpoint."""
    factor, cached = recipe.tasks.upsampling, recipe.data.cache
    if recipe.lora and begins and not (recipe.start or recipe.model.options().get("weights")):
        raise ValueError(
            "lora adapts a network that was trained: name the folder of one in start, or leave lora out"
        )
    if factor and recipe.run.frechet:
        raise ValueError("run.frechet: a model that upsamples has no videos of its own: set it to 0")
    if factor and cached:
        raise ValueError("tasks.upsampling makes its low-resolution videos from pixels: leave data.cache out")
    for b in recipe.data.buckets:
        if factor and (b.height % factor or b.width % factor):
            raise ValueError(
                f"tasks.upsampling {factor} does not divide the bucket {b.width}×{b.height}: give multiples of it"
            )


# ---------------------------------------------------------------- training


class Diffusion(Task):
    """A task of one phase."""

    def __init__(self, system: System, loader: Loader, start: Start):
        self.system, self.recipe, self.loader, self.start = system, system.recipe, loader, start
        self.frechet: FrechetInLoop | None = None  # made when it is first asked for
        self.phases = [Phase.of("diffusion", system.network, self.recipe.optimizer)]
        if self.recipe.model.options().get("spatial") and not self.recipe.start:
            self.phases[0].published = ("denoiser.spatial.",)

    def loss(self, phase: str, model: nn.Module, batch: Batch, draws: Draws) -> Losses:
        """Clips and the images beside them go through the network one after the other.

        That is what one pass over T frames with n images appended and masked computes (Ho et al. 2022, sec.
        3.1), where frames meet in attention alone; but each image has its own caption and noise level, and
        nothing is spent on masked pairs. A sample's loss is the mean over its T + n frames.
        """
        if PARTS in batch:
            return self._packed_loss(model, batch, draws)
        questions = [self.question(batch, draws)]
        images = images_of(batch)
        if images:
            questions.append(self.question(images, replace(draws, part=1)))
        answers = model(Network.losses, questions)
        frames = [q.x.shape[2] for q in questions]
        loss, error = (mean_over_frames(values, frames) for values in zip(*answers, strict=True))
        return self._losses(questions, answers, loss, error)

    def _packed_loss(self, model: nn.Module, batch: Batch, draws: Draws) -> Losses:
        """Clips and pictures of all shapes in one sequence; each counts once, whatever its length."""
        questions = [self.question(part, replace(draws, part=i)) for i, part in enumerate(batch[PARTS])]
        answers = model(Network.losses, questions, True)
        loss, error = (torch.cat(values) for values in zip(*answers, strict=True))
        return self._losses(questions, answers, loss, error)

    def _losses(
        self, questions: list[Question], answers: list[Answer], loss: Tensor, error: Tensor
    ) -> Losses:
        levels = torch.cat([self.system.process.level(q.t).detach() for q in questions])
        errors = torch.cat([answer.error for answer in answers])
        return Losses(
            {"clips": loss.sum()}, {"error": Summed(error.sum(), len(error))}, loss.detach(), levels, errors
        )

    def question(self, batch: Batch, draws: Draws) -> Question:
        """What the network is asked of a batch of one shape."""
        x = self.latents(batch, draws)
        o = self.recipe.objective
        u = (draws.uniform(len(x), TIME) - o.pure_noise) / (1 - o.pure_noise)  # below 0: pure noise
        t = self.system.shifted(torch.where(u < 0, 1.0, TIMES[o.times](u.clamp(min=0))), x.shape)
        dropped = draws.uniform(len(x), DROPPED) < self.recipe.text.dropout
        texts = batch["caption"] if self.system.network.text is not None else None
        return Question(x, t, draws.normal(x, NOISE), self.condition(x, batch, draws), texts, dropped)

    def latents(self, batch: Batch, draws: Draws) -> Tensor:
        """Normalised latents of the clips, [B, C, T, h, w]."""
        posterior = self._cached(batch) if "mean" in batch else self._encode(batch)
        if posterior.logvar is None:
            return self.system.normalizer(posterior.mean)
        return self.system.normalizer(posterior.sample(draws.normal(posterior.mean, POSTERIOR)))

    def _cached(self, batch: Batch) -> Posterior:
        found = (batch.get(k) for k in ("mean", "logvar"))
        return Posterior(*(x if x is None else self._here(x).float() for x in found))  # type: ignore[arg-type]

    def _encode(self, batch: Batch, seen: Callable[[Tensor], Tensor] = lambda video: video) -> Posterior:
        """Posterior of what is seen of the clips."""
        return self.system.encode(seen(to_unit(self._here(batch["video"]))))

    def _here(self, x: Tensor) -> Tensor:
        return x.to(self.system.device, non_blocking=True)

    def condition(self, x: Tensor, batch: Batch, draws: Draws) -> Condition:
        """What is known beside the noisy latents of x [B, C, T, h, w], but for a text read in the network."""
        found = Condition()
        if "text" in batch:
            text, mask = self._here(batch["text"]), self._here(batch["text_mask"])
            found = self.system.with_nothing(replace(found, text=text.float(), text_mask=mask))
        elif self.system.text is not None:
            found = self.system.read(batch["caption"])
        if knows_frames(self.recipe.tasks):
            kind, more = draws.uniform(len(x), KNOWN), draws.uniform(len(x), CONTEXT)
            mask = known_frames(self.recipe.tasks, x.shape[2], kind, more)
            mask = mask.to(x.dtype)[:, None, :, None, None]  # B 1 T 1 1
            found = replace(found, known=mask * x, known_mask=mask)
            if self.system.autoencoder.stride[0] > 1 and self.recipe.tasks.interpolation and x.shape[2] > 1:
                found = self._key_frames(found, batch, is_interpolation(self.recipe.tasks, kind))
        if factor := self.recipe.tasks.upsampling:
            low = self.system.normalizer(self._encode(batch, partial(blurred, factor=factor)).mean)
            level = LOW_NOISE * draws.uniform(len(x), LOW_LEVEL)
            found = replace(found, low=at_level(low, level, draws.normal(low, LOW)), low_level=level)
        return found

    def _key_frames(self, condition: Condition, batch: Batch, rows: Tensor) -> Condition:
        """Where frames are put between (bool [B]), key frames after the first by the latents they have alone.

        A latent that joins frames knows its neighbours in time, which are not given when frames are put between.
        """
        known, mask = condition.known, condition.known_mask
        assert known is not None
        assert mask is not None
        held = mask.expand(len(known), -1, -1, -1, -1).clone()
        places = range(self.recipe.tasks.stride, known.shape[2], self.recipe.tasks.stride)
        for place in places if rows.any() else ():
            frame = place * self.system.autoencoder.stride[0]  # the last that the latent stands for
            keys = to_unit(self._here(batch["video"][:, :, frame : frame + 1]))[rows]
            known[rows, :, place] = self.system.mean(keys)[:, :, 0]
            held[rows, :, place] = 0
        return replace(condition, known=known, held=held)

    def blocks(self, module: nn.Module) -> Iterator[nn.Module]:
        network: Any = getattr(module, "module", module)  # as DDP wraps it
        return blocks_of(network.denoiser)

    def tokens(self, batch: Batch) -> int:
        if PARTS in batch:
            return sum(map(self.tokens, batch[PARTS]))
        where = batch["mean" if "mean" in batch else "video"]
        t, h, w = where.shape[2:]
        if "mean" not in batch:
            t, h, w = latent_shape(self.system.autoencoder, t, h, w)
        return (len(where) * t + len(batch.get("image_key", ()))) * h * w

    @torch.no_grad()
    def evaluate(self, model: nn.Module, step: int) -> Evaluation:
        """A video a prompt, from the same noise each time, and with run.frechet its distance to real ones."""
        found = Evaluation(videos=self._samples(model))
        if n := self.recipe.run.frechet:
            if self.frechet is None:
                self.frechet = self._frechet(n)
            world = self.start.world
            found.scalars = self.frechet((i, self._generated(model, i)) for i in world.share(n))
        return found

    def _samples(self, model: nn.Module) -> dict[str, Tensor]:
        """Of the recipe's prompts or captions of the data; of super-resolution, of clips of the data."""
        system, world, seed = self.system, self.start.world, self.recipe.seed
        batch = self.loader.batch(self.loader.stills)
        prompts = list(self.recipe.run.prompts or batch["caption"][:SHOWN])
        factor = self.recipe.tasks.upsampling
        if factor:
            batch = parts_of(batch)[0]
            prompts = batch["caption"][:SHOWN]
        mine: dict[int, Tensor] = {}
        for i in world.share(len(prompts)):
            condition, (_, c, t, h, w) = system.condition([prompts[i]], model), system.shape(1)
            if factor:
                low = system.mean(blurred(to_unit(batch["video"][i : i + 1].to(system.device)), factor))
                condition = replace(condition, low=low, low_level=low.new_zeros(1))
                t, h, w = low.shape[2:]
            mine[i] = system.decode(system.draw(model, seed=seed + i)((1, c, t, h, w), condition))[0].cpu()
        every = {i: video for share in world.gather(mine) for i, video in share.items()}
        names = [p if prompts.index(p) == i else f"{p} ({i + 1})" for i, p in enumerate(prompts)]
        return {name: every[i] for i, name in enumerate(names)}

    def _frechet(self, n: int) -> FrechetInLoop:
        from models.measures.features import load_features

        start, recipe = self.start, self.recipe
        features = load_features(recipe.run.features, str(start.world.device))
        protocol = {"data": start.data, "seed": recipe.seed, **recipe.data.model_dump(mode="json")}
        return FrechetInLoop(start.out, features, self._real, n, start.world, protocol)

    def _real(self) -> Iterator[Tensor]:
        """The clips of the bucket that is sampled, in an order of the seed; of a cache as they decode."""
        for reader, row in self._measured:
            clip = reader.sound(row)
            if "mean" in clip:
                mean = torch.from_numpy(clip["mean"]).float().to(self.system.device)
                yield self.system.decode(self.system.normalizer(mean[None])).cpu()
            else:
                yield torch.from_numpy(clip["video"]).permute(1, 2, 3, 0)[None]  # 1 T H W 3

    def _generated(self, model: nn.Module, i: int) -> Tensor:
        """A video with the caption of the i-th of `_real` and noise of its own, uint8 [1, T, H, W, 3]."""
        clips = self._measured
        reader, row = clips[i % len(clips)]
        condition = self.system.condition([reader.sound(row)["caption"]], model)
        draw = self.system.draw(model, seed=self.recipe.seed + i)
        return self.system.decode(draw(self.system.shape(1), condition)).cpu()

    @cached_property
    def _measured(self) -> list[tuple[ShardReader, int]]:
        b = self.system.bucket
        clips = self.loader.of_shape(
            (b.frames, b.height, b.width), 2 * self.recipe.run.frechet, self.recipe.seed
        )
        if not clips:
            raise ValueError(
                f"run.frechet: no clip fills the bucket {b.frames}×{b.height}×{b.width}: set it to 0"
            )
        return clips

    def state(self) -> dict[str, Any]:
        return self.system.state()


def images_of(batch: Batch) -> Batch:
    """The images beside the clips of a batch, as a batch of clips of one frame; {} where there are none."""
    return {k.removeprefix("image_"): v for k, v in batch.items() if k.startswith("image_")}


def mean_over_frames(values: Sequence[Tensor], frames: Sequence[int]) -> Tensor:
    """Of each clip [B], the mean over its frames and those of its images.

    Args:
        values: of clips [B], then of images [B · n] where there are any; frames: of one of each, T and 1.
    """
    clips = len(values[0])
    shown = sum(len(v) * t for v, t in zip(values, frames, strict=True)) / clips  # T + n
    return torch.stack(
        [v.view(clips, -1).sum(1) * (t / shown) for v, t in zip(values, frames, strict=True)]
    ).sum(0)


def known_frames(tasks: Tasks, frames: int, kind: Tensor, more: Tensor) -> Tensor:
    """Which latent frames are known, bool [B, frames]; at least one never is.

    Args:
        kind: [B] in 0…1, which task: the recipe's chances laid side by side, text → video above them.
        more: [B] in 0…1, how many of the context frames of `prediction`: the first of as many parts, one.
    """
    place = torch.arange(frames, device=kind.device)[None]  # 1 T
    first, prediction = tasks.first_frame, tasks.first_frame + tasks.prediction
    between, kind = is_interpolation(tasks, kind)[:, None], kind[:, None]
    most = max(1, min(tasks.context, frames - 1))
    context = 1 + (more * tasks.context).floor().clamp(max=most - 1)[:, None]  # B 1
    known = (kind < first) & (place < 1)
    known |= (kind >= first) & (kind < prediction) & (place < context)
    known |= between & (place % tasks.stride == 0)
    return known if frames > 1 else torch.zeros_like(known)


def is_interpolation(tasks: Tasks, kind: Tensor) -> Tensor:
    """Whether frames are to be put between, bool [B], of `kind` as in `known_frames`."""
    start = tasks.first_frame + tasks.prediction
    return (kind >= start) & (kind < start + tasks.interpolation)
