"""Judges: how well each caption of a clip fits what is seen, as a score of that caption.

A judge of your own is a class in a file of yours and a line in the recipe; nothing else changes:

    # brief.py
    from pipeline.captions import Judge

    class Brief(Judge):
        name = "brevity"

        def score(self, video, clip, texts):
            return [1 / len(text.split()) for text in texts]

    # recipe.yaml
    choose: {judges: [{kind: python, judge: brief.py:Brief}], method: brevity}

`score` gives a number a text, in their order, higher for better; None where it cannot tell; a `Judged` to say it of
each sentence too. `setup` loads a model once a worker (on `self.resources.device()`), `options` holds what the recipe
gives; `scores` serves models that like batches; `embeddings` names vectors of each clip that it leaves in
`clip.embeddings`, and their lengths: columns `emb_*`. A clip that it fails on keeps its captions without that score,
and its source a warning. Judges that come with clipmill: `caption/judges.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, SupportsFloat

from pipeline import own_code, recipe_choose
from pipeline.caption.choose import put
from pipeline.faults import ClipFault, OutOfTime, StoreError, WorkerFault, kind_of
from pipeline.io.store import Store
from pipeline.recipe_schema import RecipeError
from pipeline.record import Clip, Video
from pipeline.stages import Produces, Resources, patiently


@dataclass(frozen=True)
class Judged:
    """What a judge thinks of a text."""

    score: float
    support: list[float] = field(default_factory=list)  # of each sentence (pipeline.caption.text.sentences)


Verdict = float | Judged | None


@dataclass(frozen=True)
class Told:
    """What was said of one clip."""

    video: Video
    clip: Clip
    texts: list[str]  # none empty; of a clip that nobody said anything of [], for a judge with embeddings


class Judge:
    """What a judge does; a subclass has a `name` and `score` (or `scores`).

    Args:
        options: the judge's section of the recipe; for `kind: python` its `options` mapping.
    """

    name: str  # of the score
    resources = Resources()
    embeddings: Mapping[str, int] = MappingProxyType({})  # of clips: name → length
    batch = 1  # clips that its model is given at once, of any videos
    store: Store | None = None  # the run's output, from before `setup` on; none: it is run without one

    def __init__(self, options: Any = None):
        self.options = options

    def check(self) -> str:
        """Where its model comes from. Raises RecipeError with the fix when it cannot be had."""
        return "needs no model"

    def setup(self) -> None:
        """Once a worker: load the model."""

    def score(self, video: Video, clip: Clip, texts: list[str]) -> Sequence[Verdict]:
        """A verdict on each of the texts of one clip."""
        raise NotImplementedError

    def scores(self, told: list[Told]) -> Sequence[Sequence[Verdict]]:
        """Verdicts on the texts of each clip; for models that like batches."""
        return [self.score(t.video, t.clip, t.texts) for t in told]


class JudgeStage:
    """Has one judge score every caption; called again, it replaces what it wrote."""

    def __init__(self, section: recipe_choose.Judge, out: Store | str | None = None):
        judge = build(section)
        self.section, self.score, self.batch = section, judge.name, judge.batch
        self.store = Store.of(out) if out else None
        self.name = f"judge:{judge.name}"
        self.resources = judge.resources
        self.produces = Produces(embeddings=dict(judge.embeddings))

    def setup(self) -> None:
        self.judge = build(self.section)  # not in __init__: a class from a file cannot go to a worker
        self.judge.resources, self.judge.store = self.resources, self.store
        if isinstance(self.section, recipe_choose.PythonJudge):
            own_code.set_up(self.judge, f"judge {self.section.judge!r}")
        else:
            self.judge.setup()

    def __call__(self, videos: list[Video]) -> list[Video]:
        told = []
        for video in videos:
            video.warnings = [w for w in video.warnings if not w.startswith(f"{self.name}: ")]
            for clip in video.clips:
                put(clip.captions, self.score, [None] * len(clip.captions))
                for caption in clip.captions:
                    caption.support.pop(self.score, None)
                texts = [c.text for c in clip.captions if c.text]
                if texts or self.produces.embeddings:
                    told.append(Told(video, clip, texts))
        for t, verdicts in zip(told, self._verdicts(told), strict=True):
            captions = [c for c in t.clip.captions if c.text]
            put(captions, self.score, [v.score if isinstance(v, Judged) else v for v in verdicts])
            for caption, v in zip(captions, verdicts, strict=True):
                if isinstance(v, Judged) and v.support:
                    caption.support[self.score] = v.support
        return videos

    def _verdicts(self, told: list[Told]) -> list[Sequence[Verdict]]:
        """Of every clip; those of one that the judge fails on are None."""
        if not told:
            return []
        try:
            with own_code.heard(self.name):
                return patiently(lambda: self._asked(told))
        except (Exception, SystemExit) as e:
            if issubclass(kind_of(e), StoreError | WorkerFault) or isinstance(e, OutOfTime):
                raise
            if len(told) > 1:  # find the culprit
                return [v for t in told for v in self._verdicts([t])]
            why = own_code.reason(e, own_code.file_of(self.judge))
            told[0].video.warnings.append(f"{self.name}: clip {told[0].clip.clip_id}: {why}")
            own_code.log_failed(f"{self.name} clip {told[0].clip.clip_id}", e, own_code.file_of(self.judge))
            return [[None] * len(told[0].texts)]

    def _asked(self, told: list[Told]) -> list[Sequence[Verdict]]:
        found: list[Sequence[Verdict]] = []
        for t, verdicts in zip(told, self.judge.scores(told), strict=True):
            if isinstance(verdicts, str) or not hasattr(verdicts, "__iter__"):
                raise ClipFault(f"score gave {verdicts!r:.60}, not a list with a number for each text")
            found.append(list(verdicts))
            if len(found[-1]) != len(t.texts):
                raise ClipFault(f"score gave {len(found[-1])} numbers for {len(t.texts)} texts")
        return [[_sound(v) for v in verdicts] for verdicts in found]


def _sound(v: Any) -> Verdict:
    """A verdict in Python's own numbers, whatever library's it came in. Raises ClipFault."""
    if v is None:
        return None
    if isinstance(v, Judged):
        return Judged(_number(v.score), [_number(x) for x in v.support])
    return _number(v)


def _number(v: Any) -> float:
    try:
        if isinstance(v, SupportsFloat) and math.isfinite(number := float(v)):
            return number
    except (TypeError, ValueError):  # an array of several
        pass
    raise ClipFault(f"a verdict is a finite number, None or a Judged, not {v!r:.60}")


BUILT_IN = {
    "visual_fit": "pipeline.caption.judges:VisualFit",
    "clip_score": "pipeline.caption.judges:ClipScore",
    "p_yes": "pipeline.caption.judges_vlm:Yes",
    "pac_s": "pipeline.caption.judges:PacS",
    "emscore": "pipeline.caption.judges:EMScore",
    "selector": "pipeline.caption.judges:Selector",
    "consensus_by": "pipeline.caption.judges:ConsensusBy",
    "served_yes": "pipeline.caption.served:ServedYes",
}


def judge_stages(judges: Sequence[recipe_choose.Judge], out: Store | str | None = None) -> list[JudgeStage]:
    """A stage a judge, in the recipe's order. Raises RecipeError when two have one name."""
    stages = [JudgeStage(section, out) for section in judges]
    names = [stage.score for stage in stages]
    for i, name in enumerate(names):
        if name in ("consensus", "order", "weights", *names[:i]):
            raise RecipeError(f"choose.judges.{i}: the name {name!r} is taken")
    return stages


def build(section: recipe_choose.Judge) -> Judge:
    """The judge of a recipe's section, not yet set up. Raises RecipeError when there is no such class."""
    if not isinstance(section, recipe_choose.PythonJudge):
        made: Judge = own_code.load_class(BUILT_IN[section.kind], "judge")(section)
        return made
    return own_code.built(section.judge, "judge", Judge, section.options)
