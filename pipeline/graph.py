"""The curation graph: which stages a recipe names, in the order the data flows."""

from __future__ import annotations

from pipeline.caption.captioner import caption_stages
from pipeline.caption.choose import ChooseStage, check_order
from pipeline.caption.judge import judge_stages
from pipeline.decide.rules import check_rules
from pipeline.io.store import Store
from pipeline.own_stage import placed
from pipeline.recipe import Recipe, RecipeError, nearest
from pipeline.recipe_file import dotted
from pipeline.score.aesthetic import AestheticStage
from pipeline.score.signature import SignatureStage
from pipeline.score.stage import ScoreStage
from pipeline.score.text import TextStage
from pipeline.split.cut import CutStage
from pipeline.split.decode import DecodeStage
from pipeline.split.events import EventStage
from pipeline.split.shots import ShotStage
from pipeline.stages import Stage, divide_after, let_go_of_samples, produced
from pipeline.tables import clip_schema


def build(recipe: Recipe, out: Store | str) -> list[Stage]:
    """The stages of a recipe, in the order the data flows, not yet set up. Raises RecipeError."""
    stages: list[Stage] = [
        DecodeStage(recipe.decode),
        ShotStage(recipe.shots),
        EventStage(recipe.events, whole=recipe.shots.detector == "whole"),
        ScoreStage(
            recipe.scores
        ),  # before the cut: what needs all of a source comes before what needs its clips
        CutStage(recipe.cut, out),
        SignatureStage(),
    ]
    if recipe.scores.text.enabled:
        stages.append(TextStage(recipe.scores.text))
    if recipe.scores.aesthetic.weights:
        stages.append(AestheticStage(recipe.scores.aesthetic))
    captioners = caption_stages(recipe.captions, recipe.limits.caption_s, out)
    if captioners:
        check_order(recipe.choose, [stage.model for stage in captioners])
        stages += [*captioners, ChooseStage(), *judge_stages(recipe.choose.judges, out)]
    stages = placed(stages, recipe.stages)
    let_go_of_samples(stages)
    divide_after(stages, recipe.limits.chunk_s)
    return stages


def check(recipe: Recipe, out: Store | str = "") -> list[Stage]:
    """The stages of a recipe, with all that can be told of it before any work. Raises RecipeError."""
    stages = build(recipe, out)
    columns = produced(stages)
    check_rules(recipe.decide.rules, clip_schema(columns.scores, columns.embeddings))
    names = [*(s.name for s in stages), "commit"]
    for name in recipe.resources:
        if name not in names:
            raise RecipeError(
                f"{dotted(['resources', name])}: no such stage{nearest(name, names)}; stages of this recipe: "
                f"{', '.join(names)}"
            )
    return stages
