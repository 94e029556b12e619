"""Captions: every captioner of the recipe says what it sees in every clip.

A captioner of your own is a class in a file of yours and a line in the recipe; nothing else changes:

    # shape.py
    from pipeline.captions import Captioner
    from pipeline.samples import pictures

    class Shape(Captioner):
        name = "shape-baseline"

        def caption(self, video, clip):
            height, width = pictures(video, clip, 1)[0].shape[:2]
            return f"A {'wide' if width > height else 'tall'} picture."

    # recipe.yaml
    captions: [{kind: python, captioner: shape.py:Shape}]

`caption` gives the sentence, or '' when there is nothing it can truly say; that is recorded as outcome
'empty', an exception as 'error', and neither harms another clip or captioner. `setup` loads a model once a
worker (on `self.resources.device()`), `options` holds what the recipe gives, `batch` and `caption_batch` serve models
that like batches.
A caption must depend on its own clip and source alone, never on chance or on the other sources of a unit.

Captioners that come with clipmill: `caption/baselines.py` (embedded, no download) and
`caption/transformers.py` (any image- or video-text-to-text model of `transformers`).
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import recipe
from pipeline.record import Caption, Clip, Video
from pipeline.stages import Produces, Resources, each


class Captioner:
    """What a captioner does; a subclass has a `name` and `caption` (or `caption_batch`).

    Args:
        options: the captioner's section of the recipe; for `kind: python` its `options` mapping.
    """

    name: str  # who wrote the caption, in the output
    batch = 1  # clips given to `caption_batch` at once, all of one video
    resources = Resources()

    def __init__(self, options: Any = None):
        self.options = options

    def check(self) -> str:
        """Where its model comes from. Raises RecipeError with the fix when it cannot be had."""
        return "needs no model"

    def setup(self) -> None:
        """Once a worker: load the model."""

    def caption(self, video: Video, clip: Clip) -> str | Caption:
        """One clip's sentence, or ''; or a Caption that says more (outcome, prompt)."""
        raise NotImplementedError

    def caption_batch(self, video: Video, clips: list[Clip]) -> Sequence[str | Caption]:
        return [self.caption(video, clip) for clip in clips]


class CaptionStage:
    """Has one captioner write a caption for every clip; called again, it replaces what it wrote."""

    def __init__(self, section: recipe.Captioner):
        if isinstance(section, recipe.PythonCaptioner) and ".py:" in section.captioner:
            section = section.model_copy(update={"captioner": str(Path(section.captioner).absolute())})
        captioner = build(section)
        self.section = section
        self.model = captioner.name
        self.name = f"caption:{self.model}"
        self.resources = captioner.resources
        self.produces = Produces()

    def setup(self) -> None:
        self.captioner = build(self.section)  # not in __init__: a class from a file cannot go to a worker
        self.captioner.resources = self.resources
        self.captioner.setup()

    def __call__(self, videos: list[Video]) -> list[Video]:
        for video in each(videos):
            video.warnings = [w for w in video.warnings if not w.startswith(f"{self.name}: ")]
            # batches of one video's clips only: the size of a batch can change the last bits of a score
            for i in range(0, len(video.clips), self.captioner.batch):
                clips = video.clips[i : i + self.captioner.batch]
                for clip, caption in zip(clips, self._captions(video, clips), strict=True):
                    _assign(clip, caption)
        return videos

    def _captions(self, video: Video, clips: list[Clip]) -> list[Caption]:
        try:
            said = self.captioner.caption_batch(video, clips)
            return [self._caption(s) for s, _ in zip(said, clips, strict=True)]
        except Exception as e:
            if len(clips) > 1:  # find the culprit, and what a smaller batch can still do
                return [c for clip in clips for c in self._captions(video, [clip])]
            why = " ".join(f"{type(e).__name__}: {e}".split())
            video.warnings.append(f"{self.name}: clip {clips[0].clip_id}: {why}")
            return [Caption(self.model, "", "error")]

    def _caption(self, said: str | Caption) -> Caption:
        caption = Caption(self.model, said) if isinstance(said, str) else replace(said, model=self.model)
        caption.text = " ".join(caption.text.split())
        if not caption.text and caption.outcome != "error":
            caption.outcome = "empty"
        return caption


def _assign(clip: Clip, caption: Caption) -> None:
    for i, old in enumerate(clip.captions):
        if old.model == caption.model:
            clip.captions[i] = caption
            return
    clip.captions.append(caption)


def caption_stages(captioners: Sequence[recipe.Captioner]) -> list[CaptionStage]:
    """A stage a captioner, in the recipe's order. Raises RecipeError when two have one name."""
    stages = [CaptionStage(section) for section in captioners]
    names = [stage.model for stage in stages]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise recipe.RecipeError(
                f"captions.{i}: {name!r} is there already; a transformers captioner takes a name: of its own"
            )
    return stages


BUILT_IN = {
    "tags": "pipeline.caption.baselines:Tags",
    "colour_motion": "pipeline.caption.baselines:ColourMotion",
    "on_screen_text": "pipeline.caption.baselines:OnScreenText",
    "given": "pipeline.caption.baselines:Given",
    "transformers": "pipeline.caption.transformers:Transformers",
}


def build(section: recipe.Captioner) -> Captioner:
    """The captioner of a recipe's section, not yet set up. Raises RecipeError when there is no such class."""
    if not isinstance(section, recipe.PythonCaptioner):
        return _load(BUILT_IN[section.kind])(section)
    captioner = _load(section.captioner)(section.options)
    if not getattr(captioner, "name", ""):
        raise recipe.RecipeError(f"captioner {section.captioner!r} has no name: give its class one")
    return captioner


def _load(name: str) -> type[Captioner]:
    """The class that 'package.module:Class' or 'file.py:Class' names."""
    where, _, class_name = name.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except (ImportError, OSError, SyntaxError, ValueError) as e:
        raise recipe.RecipeError(
            f"captioner {name!r} cannot be imported ({type(e).__name__}: {e}); write 'file.py:Class' or "
            "'package.module:Class'"
        ) from e
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Captioner)):
        raise recipe.RecipeError(
            f"captioner {name!r}: {where} has no class {class_name!r} made from pipeline.caption.captioner.Captioner"
        )
    return found


# ---------------------------------------------------------------- what captioners say

# A full stop after these, or after a single capital, ends no sentence.
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Mt|No|vs|etc|e\.g|i\.e|approx)\.$")


def sentences(text: str) -> list[str]:
    """A text's sentences, without the white space between them."""
    found, start = [], 0
    for end in re.finditer(r"[.!?…]+[\"')\]”’]*\s+|[。！？]+[」』”]*\s*", text):
        if not _ABBREVIATION.search(text[start : end.end()].rstrip()):
            found.append(text[start : end.end()].strip())
            start = end.end()
    return [*found, *([text[start:].strip()] if text[start:].strip() else [])]
