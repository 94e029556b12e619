"""A stage of your own: a class in a file of yours and a line in the recipe; nothing else changes.

    # brightness.py
    from pipeline.samples import pictures
    from pipeline.stages import Produces

    class Brightness:
        name, produces = "brightness", Produces(scores=["brightness"])

        def __call__(self, videos):
            for video in videos:
                for clip in video.clips:
                    for picture in pictures(video, clip, 1):  # none where a clip holds no sampled frame
                        clip.scores["brightness"] = picture.mean() / 255

    # recipe.yaml
    base: embedded
    stages: [{stage: brightness.py:Brightness, after: scores}]
    decide: {rules: {dark: {column: score_brightness, min: 0.1}}}

`clips/` gets a column `score_<name>` or `emb_<name>` for everything that `produces` names, the report draws it,
and rules may use it. `setup` loads a model once a worker, `resources` says what a worker takes, `options` of the
recipe are the class's keyword arguments. It sees one video at a time, of a
long one a chunk's clips unless the class says `whole_source = True`. What it raises becomes that video's error.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pipeline import own_code, recipe
from pipeline.faults import SourceFault, kind_of
from pipeline.record import Clip, Video
from pipeline.stages import Produces, Stage, each, fail, patiently


class OwnStage:
    """Runs a class of the user's as a stage, and looks at what it leaves behind."""

    def __init__(self, section: recipe.OwnStage):
        stage = build(section)
        self.section = section
        self.name: str = stage.name
        self.resources = own_code.check_resources(stage, f"stage {section.stage!r}")
        self.produces: Produces = stage.produces
        self.whole_source: bool = getattr(stage, "whole_source", False)

    def setup(self) -> None:
        self.stage = build(self.section)  # not in __init__: a class from a file cannot go to a worker
        self.stage.resources = self.resources
        self.file = own_code.file_of(self.stage)
        own_code.set_up(self.stage, f"stage {self.section.stage!r}")

    def __call__(self, videos: list[Video]) -> list[Video]:
        for video in each(videos):
            about = f"{self.name} {video.source.name}"
            known = [set(clip.scores) for clip in video.clips]
            try:
                with own_code.heard(about):
                    patiently(partial(self.stage, [video]))
                for clip, before in zip(video.clips, known, strict=False):
                    self._check(video, clip, set(clip.scores) - before)
            except (Exception, SystemExit) as e:
                own_code.log_failed(about, e, self.file)
                fault = SourceFault(own_code.reason(e, self.file)) if kind_of(e) is SourceFault else e
                fail(video, self.name, fault)
        return videos

    def _check(self, video: Video, clip: Clip, new: set[str]) -> None:
        """What it wrote is what it said it would. Raises SourceFault."""
        for name in self.produces.scores:
            if (value := clip.scores.get(name)) is not None:
                clip.scores[name] = _number(value, name)
        for name, length in self.produces.embeddings.items():
            if (vector := clip.embeddings.get(name)) is not None:
                clip.embeddings[name] = _vector(vector, name, length)
        for name in sorted(new - set(self.produces.scores)):
            said = f"{self.name}: the score {name!r} is not kept, its class's produces does not name it"
            if said not in video.warnings:
                video.warnings.append(said)


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as e:
        raise SourceFault(f"the score {name!r} is to be a number, not {value!r}") from e


def _vector(value: Any, name: str, length: int) -> np.ndarray:
    found = np.asarray(value, np.float32)
    if found.shape != (length,):
        raise SourceFault(f"the embedding {name!r} is to have {length} numbers, not the shape {found.shape}")
    return found


def build(section: recipe.OwnStage) -> Any:
    """The stage of a recipe's line, not yet set up. Raises RecipeError."""
    where = f"stage {section.stage!r}"
    cls = own_code.load_class(section.stage, "stage")
    stage = own_code.make(cls, section.stage, "stage", **section.options)
    if not (isinstance(getattr(stage, "name", None), str) and stage.name):
        raise recipe.RecipeError(f"{where} has no name: give its class one, e.g. name = 'brightness'")
    if not isinstance(getattr(stage, "produces", None), Produces):
        raise recipe.RecipeError(
            f"{where} does not say what it produces: give its class produces = Produces(scores=[…]), "
            "from pipeline.stages"
        )
    if not callable(stage):
        raise recipe.RecipeError(f"{where} cannot be called: give its class a __call__(self, videos)")
    return stage


def placed(stages: list[Stage], own: tuple[recipe.OwnStage, ...]) -> list[Stage]:
    """The stages with the user's put in after those that they name, in the recipe's order. Raises RecipeError."""
    stages = list(stages)
    behind: dict[str, str] = {}  # the last one that was put after a stage
    for i, section in enumerate(own):
        names = [s.name for s in stages]
        if section.after not in names:
            raise recipe.RecipeError(
                f"stages.{i}.after: this recipe has no stage {section.after!r}"
                f"{recipe.nearest(section.after, names)}; it has {', '.join(names)}"
            )
        stage = OwnStage(section)
        if stage.name in names:
            raise recipe.RecipeError(
                f"stages.{i}: the name {stage.name!r} is taken by another stage; choose another"
            )
        for other in stages:
            if taken := set(stage.produces.scores) & set(other.produces.scores):
                raise recipe.RecipeError(
                    f"stages.{i}: stage '{other.name}' makes the score {min(taken)!r} already; choose another name"
                )
        at = behind.get(section.after, section.after)
        stages.insert(names.index(at) + 1, stage)
        behind[section.after] = stage.name
    return stages
