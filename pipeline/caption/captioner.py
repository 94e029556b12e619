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

`caption` gives the sentence, or '' or None when there is nothing it can truly say; that is recorded as outcome
'empty', an exception as 'error' with its reason, and neither harms another clip or captioner. What it prints and
logs is shown with the clip's id by `--verbose` and kept in the run's log, tracebacks too. `setup` loads a model
once a worker (on `self.resources.device()`), `options` holds what the recipe gives, `batch` and `caption_batch` serve
models that like batches.
A `ClipFault` (pipeline.faults) is a clip it cannot do, a `TransientFault` is tried again, a `WorkerFault` says that
this process cannot go on. A caption must depend on its own clip and source alone, never on chance or on the
other sources of a unit.

Captioners that come with clipmill: `caption/baselines.py` (embedded, no download), `caption/transformers.py` (any
image- or video-text-to-text model of `transformers`), `caption/served.py` (any model behind an OpenAI-compatible
server) and `caption/fuse.py` (one text of several captions).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from pipeline import own_code, recipe_captions
from pipeline.caption import hygiene
from pipeline.faults import ClipFault, OutOfTime, StoreError, TooLong, WorkerFault, kind_of
from pipeline.io.store import Store
from pipeline.recipe_schema import RecipeError
from pipeline.record import Caption, Clip, Video
from pipeline.stages import Produces, Resources, each, patiently
from pipeline.watch import time_limit

OUTCOMES = ("ok", "empty", "truncated", "error")
_WORDS, _NUMBERS = TypeAdapter(str), TypeAdapter(dict[str, FiniteFloat])
_LIST = TypeAdapter(list[str])
# What a Caption of somebody's own code holds beside its text and outcome
HELD: dict[str, TypeAdapter[Any]] = {
    "prompt": _WORDS, "reason": _WORDS, "raw": _WORDS, "scores": _NUMBERS, "cost": _NUMBERS, "flags": _LIST,
    "made_from": _LIST, "support": TypeAdapter(dict[str, list[FiniteFloat]]),
}  # fmt: skip


Said = str | Caption | ClipFault | None


class Captioner:
    """What a captioner does; a subclass has a `name` and `caption` (or `caption_batch`).

    Args:
        options: the captioner's section of the recipe; for `kind: python` its `options` mapping.
    """

    name: str  # who wrote the caption, in the output
    batch = 1  # clips given to `caption_batch` at once, of any videos
    resources = Resources()
    store: Store | None = None  # the run's output, from before `setup` on; none: it is run without one
    bounded = False  # it sees to it itself that no clip takes too long

    def __init__(self, options: Any = None):
        self.options = options

    def check(self) -> str:
        """Where its model comes from. Raises RecipeError with the fix when it cannot be had."""
        return "needs no model"

    def setup(self) -> None:
        """Once a worker: load the model."""

    def caption(self, video: Video, clip: Clip) -> str | Caption | None:
        """One clip's sentence; '' or None where there is nothing to say; a Caption to say more (outcome, prompt)."""
        raise NotImplementedError

    def caption_batch(self, clips: list[tuple[Video, Clip]]) -> Sequence[Said]:
        """A sentence a clip, in their order, or the ClipFault of one; for models that like batches."""
        return [self.caption(video, clip) for video, clip in clips]

    def shape(self, video: Video, clip: Clip) -> Any:
        """What clips of one forward pass have in common; those of equal shape come to `caption_batch` together."""
        return 0


class CaptionStage:
    """Has one captioner write a caption for every clip; called again, it replaces what it wrote.

    Args:
        limit_s: the captioner may take so long for a clip, or a batch of them; none: as long as it likes.
        out: the run's output, where there is one.
    """

    def __init__(
        self,
        section: recipe_captions.Captioner,
        limit_s: float | None = None,
        out: Store | str | None = None,
    ):
        captioner = build(section)
        self.section = section
        self.limit_s = None if captioner.bounded else limit_s
        self.store = Store.of(out) if out else None
        self.model, self.batch = captioner.name, captioner.batch
        self.name = f"caption:{self.model}"
        self.resources = captioner.resources
        self.produces = Produces()

    def setup(self) -> None:
        self.captioner = build(self.section)  # not in __init__: a class from a file cannot go to a worker
        self.captioner.resources, self.captioner.store = self.resources, self.store
        if isinstance(self.section, recipe_captions.PythonCaptioner):
            own_code.set_up(self.captioner, f"captioner {self.section.captioner!r}")
        else:
            self.captioner.setup()

    def __call__(self, videos: list[Video]) -> list[Video]:
        for video in videos:
            video.warnings = [w for w in video.warnings if not w.startswith(f"{self.name}: ")]
        alone = type(self.captioner).caption_batch is Captioner.caption_batch
        if alone or self.captioner.batch == 1:
            for video in each(videos):
                for clip in video.clips:
                    self._do([(video, clip)])
            return videos
        # clips of all videos together, or a model would wait for a source of three clips
        by_shape: dict[Any, list[tuple[Video, Clip]]] = {}
        for video in videos:
            for clip in video.clips:
                try:
                    by_shape.setdefault(self.captioner.shape(video, clip), []).append((video, clip))
                except Exception as e:
                    if issubclass(kind_of(e), StoreError | WorkerFault):
                        raise
                    _assign(clip, self._failed(video, clip, e))
        for clips in by_shape.values():
            for i in range(0, len(clips), self.captioner.batch):
                self._do(clips[i : i + self.captioner.batch])
        return videos

    def _do(self, clips: list[tuple[Video, Clip]]) -> None:
        for (_, clip), caption in zip(clips, self._captions(clips), strict=True):
            _assign(clip, caption)

    def _captions(self, clips: list[tuple[Video, Clip]]) -> list[Caption]:
        """Their captions; what is the fault of a clip or of the captioner becomes outcome 'error'."""
        try:
            with self._heard(clips), self._limited():
                return patiently(lambda: self._asked(clips))
        except (Exception, SystemExit) as e:
            if issubclass(kind_of(e), StoreError | WorkerFault) or isinstance(e, OutOfTime):
                raise
            if len(clips) == 1 or isinstance(e, TooLong):
                return [self._failed(video, clip, e) for video, clip in clips]
            if isinstance(e, WrongNumber):
                for video in {id(v): v for v, _ in clips}.values():
                    video.warnings.append(f"{self.name}: {e}; they were captioned one by one")
            # find the culprit, and what a smaller batch can still do
            return [c for clip in clips for c in self._captions([clip])]

    def _limited(self) -> contextlib.AbstractContextManager[None]:
        return time_limit(self.limit_s, f"no caption after {self.limit_s or 0:g} s (limits.caption_s)")

    def _heard(self, clips: list[tuple[Video, Clip]]) -> contextlib.AbstractContextManager[None]:
        if not isinstance(self.section, recipe_captions.PythonCaptioner):
            return contextlib.nullcontext()
        return own_code.heard(f"{self.name} clip {' '.join(c.clip_id for _, c in clips)}")

    def _asked(self, clips: list[tuple[Video, Clip]]) -> list[Caption]:
        said = self.captioner.caption_batch(clips)
        if isinstance(said, str | Caption) or not hasattr(said, "__iter__"):
            raise ClipFault(f"caption_batch gave {_a(said)}, not a list with a text for each clip")
        said = list(said)
        if len(said) != len(clips):
            raise WrongNumber(f"caption_batch gave {len(said)} captions for {len(clips)} clips")
        captions = []
        for (video, clip), one in zip(clips, said, strict=True):
            if isinstance(one, ClipFault):
                captions.append(self._failed(video, clip, one))
            else:
                captions.append(caption := self._caption(one))
                hygiene.tidy(caption, video, clip)
        return captions

    def _failed(self, video: Video, clip: Clip, e: BaseException) -> Caption:
        file = own_code.file_of(self.captioner)
        why = own_code.reason(e, file)
        video.warnings.append(f"{self.name}: clip {clip.clip_id}: {why}")
        own_code.log_failed(f"{self.name} clip {clip.clip_id} of {video.source.name}", e, file)
        return Caption(self.model, "", "error", reason=why)

    def _caption(self, said: str | Caption | None) -> Caption:
        if not isinstance(said, str | Caption | None):
            raise ClipFault(f"the caption is {_a(said)}; give a text, None, or a pipeline.record.Caption")
        caption = (
            replace(said, model=self.model) if isinstance(said, Caption) else Caption(self.model, said or "")
        )
        if not isinstance(caption.text, str) or caption.outcome not in OUTCOMES:
            raise ClipFault(
                f"a Caption has the text {caption.text!r} and the outcome {caption.outcome!r}; the text is to be a "
                f"str, the outcome one of {', '.join(OUTCOMES)}"
            )
        for name, kind in HELD.items():
            try:
                setattr(caption, name, kind.validate_python(getattr(caption, name)))
            except ValidationError as e:
                raise ClipFault(
                    f"a Caption's {name} is {_a(getattr(caption, name))}: {e.errors()[0]['msg']}"
                ) from e
        for name in ("text", "prompt", "reason", "raw"):  # no file holds half a character
            setattr(caption, name, getattr(caption, name).encode("utf-8", "replace").decode())
        caption.text = " ".join(caption.text.split())
        if not caption.text and caption.outcome == "ok":
            caption.outcome = "empty"
        return caption


class WrongNumber(ClipFault):
    """More or fewer captions than clips."""


def _a(value: object) -> str:
    return "None" if value is None else f"{own_code.a(type(value).__name__)} ({value!r:.60})"


def _assign(clip: Clip, caption: Caption) -> None:
    for i, old in enumerate(clip.captions):
        if old.model == caption.model:
            clip.captions[i] = caption
            return
    clip.captions.append(caption)


def caption_stages(
    captioners: Sequence[recipe_captions.Captioner],
    limit_s: float | None = None,
    out: Store | str | None = None,
) -> list[CaptionStage]:
    """A stage a captioner, in the recipe's order. Raises RecipeError when two have one name."""
    stages = [CaptionStage(section, limit_s, out) for section in captioners]
    names = [stage.model for stage in stages]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise RecipeError(
                f"captions.{i}: {name!r} is there already; a captioner by a model takes a name: of its own"
            )
    return stages


BUILT_IN = {
    "tags": "pipeline.caption.baselines:Tags",
    "colour_motion": "pipeline.caption.baselines:ColourMotion",
    "on_screen_text": "pipeline.caption.baselines:OnScreenText",
    "plain": "pipeline.caption.plain:Plain",
    "given": "pipeline.caption.baselines:Given",
    "transformers": "pipeline.caption.transformers:Transformers",
    "served": "pipeline.caption.served:Served",
    "fuse": "pipeline.caption.fuse:Fuse",
}


def build(section: recipe_captions.Captioner) -> Captioner:
    """The captioner of a recipe's section, not yet set up. Raises RecipeError when there is no such class."""
    if not isinstance(section, recipe_captions.PythonCaptioner):
        made: Captioner = own_code.load_class(BUILT_IN[section.kind], "captioner")(section)
        return made
    captioner = own_code.built(section.captioner, "captioner", Captioner, section.options)
    if not (isinstance(captioner.batch, int) and captioner.batch >= 1):
        raise RecipeError(
            f"captioner {section.captioner!r}: its batch is to be a whole number from 1 on, not {captioner.batch!r}"
        )
    return captioner
