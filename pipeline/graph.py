"""The curation graph: which stages a recipe names, in the order the data flows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from pipeline.caption.captioner import CaptionStage, caption_stages
from pipeline.caption.choose import ChooseStage
from pipeline.caption.judge import judge_stages
from pipeline.decide.columns import check_choice, check_rules, check_scores, scores_asked
from pipeline.io.store import Store
from pipeline.layers import layers
from pipeline.own_stage import placed
from pipeline.recipe import Recipe, RecipeError, nearest, parse
from pipeline.recipe_captions import FuseCaptioner
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
        stages += [*captioners, ChooseStage(), *judge_stages(recipe.choose.judges, out)]
    stages = placed(stages, recipe.stages)
    let_go_of_samples(stages)
    divide_after(stages, recipe.limits.chunk_s)
    return stages


def check(recipe: Recipe, out: Store | str = "") -> list[Stage]:
    """The stages of a recipe, with all that can be told of it before any work.

    Args:
        out: the folder to write to; what a run there has, by its own recipe and its layers, may be asked for too.

    Raises RecipeError, with every mistake.
    """
    stages = build(recipe, out)
    had = _had(out) if out else Had()
    columns = produced(stages)
    schema = clip_schema([*columns.scores, *had.scores], columns.embeddings | had.embeddings)
    names = [*(s.name for s in stages), "commit"]
    checks: list[Callable[[], None]] = [
        partial(check_rules, recipe.decide.rules, schema),
        partial(_check_resources, recipe, names),
    ]
    if had.known:
        checks.append(partial(_check_fused, stages, _named("caption:", had.stages)))
    captioners = _named("caption:", [*names, *had.stages])
    if captioners and had.known:
        scores = ["consensus", *_named("judge:", [*names, *had.stages])]
        checks.append(partial(check_choice, recipe.choose, captioners, scores))
        checks.append(partial(check_scores, scores_asked(recipe.decide.rules), scores))
    if mistakes := list(_mistakes(checks)):
        raise RecipeError(mistakes[0] if len(mistakes) == 1 else "", f"recipe {recipe.name}", mistakes)
    return stages


def _mistakes(checks: Iterable[Callable[[], None]]) -> Iterator[str]:
    """What each of them raises RecipeError for."""
    for check in checks:
        try:
            check()
        except RecipeError as e:
            yield from e.mistakes or [str(e)]


def _named(prefix: str, stages: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(s.removeprefix(prefix) for s in stages if s.startswith(prefix)))


@dataclass
class Had:
    """What a run has: stages by name ('caption:…', 'judge:…'), score_* and emb_* columns of its layers."""

    stages: list[str] = field(default_factory=list)
    scores: list[str] = field(default_factory=list)
    embeddings: dict[str, int] = field(default_factory=dict)
    known: bool = True  # its recipe can still be read


def _had(out: Store | str) -> Had:
    store, had = Store.of(out), Had()
    if not store.exists("run.json"):
        return had
    for layer in layers(store):
        had.stages.append(layer.name)
        had.scores += layer.scores
        had.embeddings |= layer.embeddings
    try:
        run = json.loads(store.read_bytes("run.json"))
        had.stages += [s.name for s in build(parse(run["recipe"], [], "run.json"), store)]
    except RecipeError:  # code of the user's own that is gone, an older recipe
        had.known = False
    return had


def _check_fused(stages: Sequence[Stage], there: Iterable[str]) -> None:
    """Raise RecipeError where a captioner fuses those of one that is neither before it nor in the run.

    Args:
        there: captioners of the run.
    """
    before = list(there)
    for stage in stages:
        if not isinstance(stage, CaptionStage):
            continue
        for name in stage.section.of if isinstance(stage.section, FuseCaptioner) else ():
            others = [n for n in before if n != stage.model]
            if name not in others:
                raise RecipeError(
                    f"captioner {stage.model!r}: of: no captioner {name!r} before it{nearest(name, others)}; there "
                    f"{'are' if len(others) > 1 else 'is'} {', '.join(others) or 'none'}"
                )
        before.append(stage.model)


def _check_resources(recipe: Recipe, names: Sequence[str]) -> None:
    for name in recipe.resources:
        if name not in names:
            raise RecipeError(
                f"{dotted(['resources', name])}: no such stage{nearest(name, names)}; stages of this recipe: "
                f"{', '.join(names)}"
            )
