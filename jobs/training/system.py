"""Everything between a caption and a video, made from a recipe: what training and sampling share.

captions ─ text encoder ─┐
noise ───────── network(z, level, condition) ─ sampler ─ normaliser⁻¹ ─ autoencoder ─ pixels
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.training.distributed import device_of
from jobs.training.exported import load_model
from jobs.training.recipe import Autoencoder as AutoencoderRecipe
from jobs.training.recipe import Bucket, DiffusionRecipe, Objective, Run, Tasks, import_spec
from jobs.training.recipe import Text as TextRecipe
from models.attention import choose_kernel
from models.autoencoders.latents import Autoencoder, BlockDCT, Normalizer, Posterior, latent_shape
from models.diffusion.condition import Condition
from models.diffusion.generate import Draw, drawer
from models.diffusion.noise import Cosine, Flow, Linear, ScaledLinear, Schedule, shift_of, shifted
from models.diffusion.objective import (
    MinSNR,
    Process,
    Uncertainty,
    Weighting,
    error_of,
    noisy_input,
    uniform,
)
from models.diffusion.samplers import named
from models.encoders.pipeline_text import PipelineText
from models.encoders.text import PretrainedText, WordText
from models.measures.features import weights_hash
from pipeline.shards.buckets import Shape

LOW_NOISE = 0.5  # highest level of noise in the low-resolution videos of super-resolution


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


@dataclass
class System:
    """Everything between a caption and a video. Made by `build_system` or `load_system`.

    text: the frozen text encoder; None where there is none, or one in the network.
    """

    recipe: DiffusionRecipe
    autoencoder: Autoencoder
    normalizer: Normalizer
    text: PretrainedText | PipelineText | None
    network: Network
    device: torch.device
    trained: list[Shape] = field(default_factory=list)  # buckets that clips fill
    step: int = 0  # of training, of loaded weights
    ema: float = 0.0  # σ_rel of their average; 0: the last themselves

    @property
    def process(self) -> Process:
        return self.network.process

    def condition(self, texts: list[str], network: nn.Module | None = None) -> Condition:
        """A condition with the texts' features; empty texts are 'no text'. `network`: as it is wrapped, or its own."""
        network = network or self.network
        if self.text is not None:
            return self.read(texts)
        if self.network.text is None:
            return Condition()
        features, mask = network(Network.read, texts)
        return Condition(text=features, text_mask=mask)

    def read(self, texts: list[str]) -> Condition:
        """What the frozen text encoder makes of them."""
        assert self.text is not None
        if not isinstance(self.text, PipelineText):
            features, mask = self.text(texts)
            return Condition(text=features.float(), text_mask=mask)
        features, pooled = self.text.encode(texts)
        mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        told = Condition(
            text=features.float(), text_mask=mask, pooled=None if pooled is None else pooled.float()
        )
        return self.with_nothing(told)

    def with_nothing(self, condition: Condition) -> Condition:
        """With the encoding of 'no text', where the image model was trained with one."""
        if not isinstance(self.text, PipelineText):
            return condition
        assert condition.text is not None
        rows = len(condition.text)
        features, pooled = (
            None if x is None else x.float().expand(rows, *x.shape[1:]) for x in self.text.nothing
        )
        return replace(condition, no_text=features, no_pooled=pooled)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Posterior:
        """[B, 3, T, H, W] in −1…1 → what the autoencoder says of it, float32, not normalised.

        Never under autocast: published autoencoders give NaN in bfloat16.
        """
        with torch.autocast(self.device.type, enabled=False):
            posterior = self.autoencoder.encode(video)
        logvar = None if posterior.logvar is None else posterior.logvar.float()
        return Posterior(posterior.mean.float(), logvar)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, T, h, w] → uint8 [B, T, H, W, 3]."""
        with torch.autocast(self.device.type, enabled=False):
            videos = [self.autoencoder.decode(z) for z in self.normalizer.inverse(latents.float()).split(1)]
        return to_bytes(torch.cat(videos))

    def draw(
        self,
        network: nn.Module | None = None,
        *,
        run: Run | None = None,
        seed: int = 0,
        reconstruct: float = 0.0,
    ) -> Draw:
        """(shape, condition) → latents, as `models.diffusion.generate` takes it.

        Args:
            network: as it is wrapped, or its own.
            run: sampler, steps and guidance, in place of the recipe's.
            reconstruct: weight of reconstruction guidance, for a network that was trained without known
                frames; one that was trained with them is told them as well.
        """
        run = run or self.recipe.run
        return drawer(
            partial(network or self.network, Network.predict),  # type: ignore[arg-type]
            self.process,
            sampler=named(run.sampler, run.sampler_options),
            steps=run.sample_steps,
            spacing=run.spacing,
            guidance=run.guidance,
            interval=run.guidance_interval,
            rescale=run.guidance_rescale,
            tell_known=knows_frames(self.recipe.tasks),
            reconstruct=reconstruct,
            retime=self.shifted,
            generator=torch.Generator(self.device).manual_seed(seed),
            device=self.device,
        )

    def drawn_with(self, run: Run) -> dict[str, Any]:
        """What decides a sample beside its condition, shape and seed, with its names and numbers in words."""
        low, high = run.guidance_interval
        return {
            "step": self.step,
            "ema": self.ema,
            "sampler": "dpmpp_2m" if run.sampler == "auto" else run.sampler,
            **run.sampler_options,
            "steps": run.sample_steps,
            "spacing": run.spacing,
            "guidance": run.guidance,
            **({"guidance_interval": f"{low:g}…{high:g}"} if (low, high) != (0, 1) else {}),
            **({"guidance_rescale": run.guidance_rescale} if run.guidance_rescale else {}),
        }

    def shifted(self, t: Tensor, shape: Sequence[int]) -> Tensor:
        """Times of latents [B, C, T, h, w] as objective.shift auto has them, float32 at least."""
        return shifted(t, shift_of(*shape[2:])) if self.recipe.objective.shift == "auto" else t

    @property
    def bucket(self) -> Bucket:
        """The longest that it was trained on: what is sampled."""
        return max(self.filled, key=lambda b: b.frames)

    @property
    def filled(self) -> list[Bucket]:
        """The buckets that it was trained on."""
        every = self.recipe.data.buckets
        return [b for b in every if (b.frames, b.height, b.width) in self.trained] or list(every)

    def bucket_like(self, aspect: float) -> Bucket:
        """The longest of those that are nearest in shape to pictures of an aspect, width ÷ height."""
        return min(self.filled, key=lambda b: (abs(math.log(b.width / b.height / aspect)), -b.frames))

    def shape(
        self, count: int, frames: int | None = None, bucket: Bucket | None = None
    ) -> tuple[int, int, int, int, int]:
        """[B, C, T, h, w] of so many videos of a bucket (`bucket`); `frames`: of pixels, in place of its own."""
        b = bucket or self.bucket
        t, h, w = latent_shape(self.autoencoder, frames or b.frames, b.height, b.width)
        return count, self.autoencoder.channels, t, h, w

    def mean(self, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] in −1…1 → normalised latents [B, C, T, h, w], without drawing."""
        return self.normalizer(self.encode(video).mean)

    def weights(self) -> dict[str, str]:
        """Hashes of the frozen encoders' weights, by whose latents and features a network is trained."""
        frozen = {"autoencoder": self.autoencoder, "text": self.text}
        return {f"{name}_weights": weights_hash(m) for name, m in frozen.items() if isinstance(m, nn.Module)}

    def state(self) -> dict[str, Any]:
        """What `load_system` needs beside the network's weights; plain values."""
        return {
            "trains": "diffusion",
            "recipe": self.recipe.model_dump(mode="json"),
            "trained": [list(shape) for shape in self.trained],
            "normalizer": {"mean": self.normalizer.mean.tolist(), "std": self.normalizer.std.tolist()},
        }


def to_unit(video: Tensor) -> Tensor:
    """uint8 0…255 → float32 −1…1."""
    return video.float() / 127.5 - 1


def to_bytes(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] in −1…1 → uint8 [B, T, H, W, 3]."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)


# ---------------------------------------------------------------- the parts, from a recipe


def build_autoencoder(recipe: AutoencoderRecipe, device: torch.device) -> Autoencoder:
    """Frozen. Raises ValueError or models.curation.embed.MissingModel: one sentence with the fix."""
    if recipe.kind == "none":
        return BlockDCT(1, 1)  # of one pixel a block: the pixels, their colours decorrelated
    if recipe.kind == "dct":
        return BlockDCT(recipe.patch, recipe.keep)
    if not recipe.path:
        what = "a checkpoint of 'clipmill train'" if recipe.kind == "vae" else "a folder or hub id"
        raise ValueError(f"autoencoder.kind {recipe.kind} needs autoencoder.path: name {what}")
    found: Any
    if recipe.kind == "diffusers":
        from models.autoencoders.published import load

        found = load(recipe.path)
    else:
        from models.autoencoders.vae import build

        trained = load_model(Path(recipe.path))
        if "vae" not in trained.weights:
            raise ValueError(f"autoencoder.path {recipe.path} holds no autoencoder: train one, trains: vae")
        found = build(**trained.state["vae"])
        trained.load_into(found, "vae")
    return found.to(device).requires_grad_(False).eval()


def build_text(recipe: TextRecipe, device: torch.device) -> PretrainedText | PipelineText | None:
    """The frozen text encoder; None for the others. Raises ValueError or models.hub.MissingModel."""
    if recipe.kind not in ("transformers", "diffusers"):
        return None
    if not recipe.model:
        what = (
            "a folder or hub id of CLIP, T5, Qwen, …"
            if recipe.kind == "transformers"
            else "a pipeline's folder"
        )
        raise ValueError(f"text.kind {recipe.kind} needs text.model: name {what}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if recipe.kind == "transformers":
        return PretrainedText(recipe.model, recipe.length, dtype=dtype).to(device)
    found = PipelineText(recipe.model, dtype)
    if recipe.length != found.length:
        raise ValueError(
            f"text.length {recipe.length}: {recipe.model} reads {found.length} places: give that"
        )
    return found.to(device)


def build_process(recipe: Objective) -> Process:
    shift = 1.0 if recipe.shift == "auto" else recipe.shift  # auto: `System.shifted`
    schedules: dict[str, Schedule] = {
        "cosine": Cosine(shift=-math.log(shift)),
        "linear": Linear(),
        "scaled_linear": ScaledLinear(),
        "flow": Flow(shift),
    }
    return Process(schedules[recipe.schedule], recipe.prediction)


def build_network(
    recipe: DiffusionRecipe,
    channels: int,
    frozen_text: PretrainedText | PipelineText | None,
    fresh: bool = True,
) -> Network:
    """Raises ValueError where the model's options do not fit together.

    Args:
        fresh: with the published weights that the recipe begins with; False where a checkpoint's take their place.
    """
    options = recipe.model.options()
    if not fresh:
        options.pop("weights", None)
    if options.get("learn_sigma"):
        raise ValueError("model.learn_sigma: no trainer learns the variance: leave it out")
    build = import_spec(recipe.model.kind).build
    taken = inspect.signature(build).parameters
    for name, wanted in (("context", knows_frames(recipe.tasks)), ("upsample", recipe.tasks.upsampling > 0)):
        if wanted and name not in taken:
            raise ValueError(
                f"model.kind {recipe.model.kind} cannot be given frames ({name}): turn off those tasks"
            )
        if wanted:
            options[name] = True
    if spatial := options.get("spatial"):
        _check_spatial(recipe, spatial)
    own = None
    if recipe.text.kind == "words":
        own = WordText(recipe.text.length, recipe.text.width, recipe.text.depth, recipe.text.rows)
    width = own.width if own else frozen_text.width if frozen_text else None
    weighting: Weighting = uniform
    if recipe.objective.weighting == "min_snr":
        weighting = MinSNR(recipe.objective.min_snr_gamma)
    elif recipe.objective.weighting == "uncertainty":
        weighting = Uncertainty()
    network = Network(build(channels, width, **options), own, build_process(recipe.objective), weighting)
    choose_kernel(network, recipe.compute.attention)
    return network


def _check_spatial(recipe: DiffusionRecipe, folder: str) -> None:
    """Raises ValueError where an image model would not see what it was trained on."""
    objective = recipe.objective
    if objective.schedule == "flow":
        raise ValueError(
            "objective.schedule flow: the image model of model.spatial was trained on α² + σ² = 1: give scaled_linear"
        )
    if recipe.text.kind == "transformers":
        raise ValueError(
            "text.kind transformers: the image model of model.spatial was trained to attend to all of its text, "
            f"and to an encoding of no text: give text.kind diffusers, with text.model {folder}"
        )
    scheduler = Path(folder) / "scheduler" / "scheduler_config.json"
    said = (
        json.loads(scheduler.read_text()).get("prediction_type", "epsilon") if scheduler.is_file() else None
    )
    predicts = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}.get(str(said))
    if predicts and predicts != objective.prediction:
        raise ValueError(
            f"objective.prediction {objective.prediction}: the model of model.spatial predicts {predicts}: give that"
        )


def build_system(
    recipe: DiffusionRecipe, device: torch.device, normalizer: Normalizer | None = None, fresh: bool = True
) -> System:
    """With new weights, the same for the same seed; without a normaliser, latents as they are.

    Args:
        fresh: see `build_network`.

    Raises ValueError or models.curation.embed.MissingModel: one sentence with the fix.
    """
    autoencoder = build_autoencoder(recipe.autoencoder, device)
    if normalizer is None:
        normalizer = Normalizer(torch.zeros(autoencoder.channels), torch.ones(autoencoder.channels))
    text = build_text(recipe.text, device)
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(recipe.seed)
        network = build_network(recipe, autoencoder.channels, text, fresh).to(device)
    return System(recipe, autoencoder, normalizer.to(device), text, network, device)


def load_system(state: dict[str, Any], device: torch.device) -> System:
    """The system of a checkpoint's `state`; its network's weights are for the caller to load."""
    recipe = DiffusionRecipe.model_validate(state["recipe"])
    system = build_system(recipe, device, normalizer_of(state), fresh=False)
    system.trained = [(t, h, w) for t, h, w in state.get("trained", [])]
    return system


def normalizer_of(state: dict[str, Any]) -> Normalizer:
    """That of `System.state()`."""
    saved = state["normalizer"]
    return Normalizer(torch.tensor(saved["mean"]), torch.tensor(saved["std"]))


def load_trained(folder: str, ema: float | None, device: str | None) -> System:
    """A trained system with its weights, in eval mode. ema: σ_rel; 0 the last weights, None the longest kept.

    Raises ValueError, CheckpointError or MissingModel.
    """
    trained = load_model(Path(folder))
    if trained.state.get("trains") != "diffusion":
        raise ValueError(f"{folder} holds no diffusion model: give one that 'clipmill train diffusion' wrote")
    lengths = trained.recipe["ema"]["lengths"]
    if ema is None:
        ema = max(lengths, default=0.0)
    if ema:
        trained = load_model(Path(folder), ema)
    system = load_system(trained.state, device_of(device))
    system.step, system.ema = trained.step, ema
    trained.load_into(system.network, "diffusion")
    system.network.eval()
    return system


def knows_frames(tasks: Tasks) -> bool:
    return tasks.first_frame + tasks.prediction + tasks.interpolation > 0


def blurred(video: Tensor, factor: int) -> Tensor:
    """[B, C, T, H, W] seen at 1/factor of its size and enlarged again, as super-resolution is given it."""
    return enlarged(F.avg_pool3d(video, (1, factor, factor)), factor)


def enlarged(video: Tensor, factor: int) -> Tensor:
    """[B, C, T, h, w] → [B, C, T, h · factor, w · factor], linearly between pixels."""
    return F.interpolate(video, scale_factor=(1, factor, factor), mode="trilinear", align_corners=False)
