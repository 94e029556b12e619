"""The parts of a diffusion system and the whole, from a recipe or from what training saved."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jobs.training.diffusion.network import Network, blocks_of
from jobs.training.diffusion.recipe import Autoencoder as AutoencoderRecipe
from jobs.training.diffusion.recipe import DiffusionRecipe, Objective
from jobs.training.diffusion.recipe import Text as TextRecipe
from jobs.training.diffusion.system import System, knows_frames
from jobs.training.distributed import device_of
from jobs.training.exported import CheckpointError, Trained, load_model, longest_average
from jobs.training.lora import adapt, merge
from jobs.training.parallelize import make
from jobs.training.paths import missing
from jobs.training.recipe_core import import_spec
from models.attention import choose_kernel
from models.autoencoders.latents import Autoencoder, BlockDCT, Normalizer
from models.diffusion.noise import Cosine, Flow, Linear, ScaledLinear, Schedule
from models.diffusion.objective import MinSNR, Process, Uncertainty, Weighting, uniform
from models.encoders.pipeline_text import PipelineText
from models.encoders.text import PretrainedText, WordText


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
    recipe: DiffusionRecipe,
    device: torch.device,
    normalizer: Normalizer | None = None,
    fresh: bool = True,
    made_on: torch.device | None = None,
) -> System:
    """With new weights, the same for the same seed; without a normaliser, latents as they are.

    Args:
        fresh: see `build_network`.
        made_on: device of the network; none: the other. On the meta device it has no weights.

    Raises ValueError or models.curation.embed.MissingModel: one sentence with the fix.
    """
    autoencoder = build_autoencoder(recipe.autoencoder, device)
    if normalizer is None:
        normalizer = Normalizer(torch.zeros(autoencoder.channels), torch.ones(autoencoder.channels))
    text = build_text(recipe.text, device)
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(recipe.seed)
        made_on = made_on or device
        build = partial(build_network, recipe, autoencoder.channels, text, fresh and made_on.type != "meta")
        network = make(build, made_on)
    return System(recipe, autoencoder, normalizer.to(device), text, network, device)


def load_system(recipe: DiffusionRecipe, state: dict[str, Any], device: torch.device) -> System:
    """The system of a checkpoint's recipe and `state`; its network's weights are for the caller to load."""
    system = build_system(recipe, device, normalizer_of(state), fresh=False)
    system.trained = [(t, h, w) for t, h, w in state.get("trained", [])]
    return system


def check_encoders(system: System, state: dict[str, Any], what: str, fix: str) -> None:
    """Raise ValueError where a network was trained with other encoders than the system has, wherever they lie.

    Args:
        what: was trained. fix: what is to be done, before the key that says where an encoder lies.
    """
    recipe = system.recipe
    places = {
        "autoencoder": ("autoencoder.path", recipe.autoencoder.path),
        "text": ("text.model", recipe.text.model),
    }
    for name, x in system.encoders.items():
        if state["encoders"].get(name) != x:
            key, path = places[name]
            raise ValueError(
                f"{what} was trained with other weights of its {name} than {path} holds: {fix} {key}"
            )


def normalizer_of(state: dict[str, Any]) -> Normalizer:
    """That of `System.state()`."""
    saved = state["normalizer"]
    return Normalizer(torch.tensor(saved["mean"]), torch.tensor(saved["std"]))


def trained_at(
    folder: str, ema: float | None = None, located: Mapping[str, str] | None = None
) -> tuple[Trained, float]:
    """What training a diffusion model left, and σ_rel of the average that it is.

    Args:
        ema: σ_rel; 0 the last weights, None the longest kept.
        located: key of the recipe → path, where what it names lies today.

    Raises ValueError or CheckpointError.
    """
    path = Path(folder)
    if ema is None:
        ema = longest_average(path)
    trained = load_model(path, ema or None, located)
    if trained.state.get("trains") != "diffusion":
        raise ValueError(f"{folder} holds no diffusion model: give one that 'clipmill train diffusion' wrote")
    return trained, ema


def give_weights(network: Network, trained: Trained, recipe: DiffusionRecipe) -> None:
    """A trained model's weights to a network that was made from its recipe, adapters folded in."""
    if recipe.lora:
        adapt(network, blocks_of(network.denoiser), recipe.lora, recipe.seed)
    trained.load_into(network, "diffusion")
    if recipe.lora:
        merge(network)


def load_trained(
    folder: str, ema: float | None, device: str | None, located: Mapping[str, str] | None = None
) -> System:
    """A trained system with its weights, in eval mode. Args: see `trained_at`.

    Raises ValueError, CheckpointError or MissingModel; where its encoders are others by now, too.
    """
    trained, ema = trained_at(folder, ema, located)
    recipe = DiffusionRecipe.model_validate(trained.recipe)
    named = {
        "autoencoder.path": recipe.autoencoder.path,
        "text.model": recipe.text.model,
        "model.spatial": recipe.model.options().get("spatial"),
    }
    for sentence in missing(named, trained.folder, trained.was):
        raise CheckpointError(sentence)
    system = load_system(recipe, trained.state, device_of(device))
    check_encoders(system, trained.state, folder, "say where those are, --locate")
    system.step, system.ema = trained.step, ema
    give_weights(system.network, trained, recipe)
    system.network.eval()
    return system
