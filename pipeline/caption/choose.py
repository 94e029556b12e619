"""Which of the candidate captions stands for the clip.

Two ways to judge, both written into each caption's `scores`, and one that needs none:

- `consensus`: mean similarity to what the other captioners said. A statement that several models make on
  their own is rarely made up; but shared mistakes win too, so look at it beside a visual score.
- `clip_score`: how well the text fits the pictures (`models.measures.clip_score`), where the recipe asks for it.
- `order`: the first of a list of captioners that says something.

`best` is the choice itself. It needs nothing but the captions' rows, so that `clipmill shard` makes it again
without a model.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pipeline.caption.captioner import sentences
from pipeline.recipe_captions import Choose
from pipeline.recipe_schema import RecipeError, nearest
from pipeline.record import Caption, Video
from pipeline.samples import gathered
from pipeline.stages import Produces, Resources, each

SCORE = {"consensus": "consensus", "open_clip": "clip_score"}  # what a method goes by
DIGITS = 6  # kept of a score: what is left of float noise must not decide between equals


def best(captions: Sequence[Mapping[str, Any]], method: str, order: Sequence[str] = ()) -> int | None:
    """Index of the caption that the method prefers; none when all are empty.

    Args:
        captions: rows of clips/*.parquet `captions`, in the recipe's order: `model`, `text`, `outcome` and
            `scores` (a mapping or pairs).
        method: 'consensus' or 'open_clip', the highest score; 'order', the first of `order`.
        order: names of captioners, the preferred first; those it does not name come after them.

    A caption that breaks off ('truncated') stands only where no complete one does. Equal scores go to the
    earlier captioner; captions without that score come last.
    """

    def rank(i: int) -> tuple[bool, float, int]:
        if method == "order":
            model = captions[i]["model"]
            score: float | None = -order.index(model) if model in order else -math.inf
        else:
            score = dict(captions[i]["scores"] or {}).get(SCORE[method])
        if score is None or math.isnan(score):
            score = -math.inf
        return captions[i]["outcome"] != "truncated", score, -i

    usable = [i for i, c in enumerate(captions) if c["text"] and c["outcome"] in ("ok", "truncated")]
    return max(usable, key=rank, default=None)


def check_order(section: Choose, captioners: Sequence[str]) -> None:
    """Raises RecipeError for a preferred captioner that the run does not have."""
    for name in section.order if section.method == "order" else ():
        if name not in captioners:
            raise RecipeError(
                f"choose.order: no captioner {name!r}{nearest(name, captioners)}; there are {', '.join(captioners)}"
            )


# ---------------------------------------------------------------- agreement

# Words that carry the sentence rather than say what is seen.
_STOP_WORDS = """
    a an the this that these those it its is are was were be been being has have had do does did can could may
    might will would and or but nor so as if then than there here who which what when where while with without
    within of in on at to from by for into onto through between about he she they them his her their him we you
    i our your my some any no not very more most other another each also just only both such same one
    video clip picture image scene footage frame shot show shows showing shown see seen appears
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


def words(text: str) -> list[str]:
    """The words that say something, in lower case; an English plural counts as its singular."""
    found = (w for w in re.findall(r"\w+(?:['’]\w+)?", text.lower()) if w not in STOP_WORDS)
    return [w[:-1] if len(w) > 3 and w[-1] == "s" and w[-2] not in "sui" else w for w in found]


def weights(text: str) -> dict[tuple[str, ...], float]:
    """A text as a unit vector over its words and pairs of neighbouring words; empty if it says nothing.

    TF-IDF, 1 + ln(count), with the inverse document frequency of a corpus replaced by a list of stop
    words: how alike two captions are must not depend on which other videos are at hand.
    """
    w = words(text)
    raw = {gram: 1 + math.log(n) for gram, n in Counter([*((x,) for x in w), *pairwise(w)]).items()}
    norm = math.sqrt(math.fsum(x * x for x in raw.values()))
    return {gram: x / norm for gram, x in raw.items()}


def similarity(a: str, b: str) -> float:
    """Cosine of two texts' `weights`, 0 to 1; symmetric to the last bit."""
    u, v = weights(a), weights(b)
    return math.fsum(u[gram] * v[gram] for gram in u.keys() & v.keys())


def consensus(texts: Sequence[str]) -> list[float | None]:
    """Each text's mean similarity to the others; none for an empty text and for one without others.

    The mean of this over a clip's captions is the agreement of its captioners.
    """
    told = [i for i, text in enumerate(texts) if text]
    scores: list[float | None] = [None] * len(texts)
    if len(told) > 1:
        for i in told:
            total = math.fsum(similarity(texts[i], texts[j]) for j in told if j != i)
            scores[i] = total / (len(told) - 1)
    return scores


# ---------------------------------------------------------------- the stage


class ChooseStage:
    """Writes every candidate's scores; after all captioners, and before the frames go."""

    name = "choose"
    resources = Resources()

    def __init__(self, section: Choose):
        self.section = section
        self.sees_samples = section.clip_score
        self.produces = Produces()

    def setup(self) -> None:
        if self.section.clip_score:
            from models.measures.clip_score import ClipScorer

            section, device = self.section, self.resources.device()
            self.scorer = ClipScorer(section.model, section.pretrained, device, self.resources.batch)

    def __call__(self, videos: list[Video]) -> list[Video]:
        for video in each(videos):
            for clip in video.clips:
                _put(clip.captions, SCORE["consensus"], consensus([c.text for c in clip.captions]))
        if self.section.clip_score:
            self._clip_scores(videos)
        return videos

    def _clip_scores(self, videos: list[Video]) -> None:
        """CLIPScore of every caption; pictures and sentences of the whole unit share the forward passes."""
        for clip in (clip for video in videos for clip in video.clips):
            _put(clip.captions, SCORE["open_clip"], [None] * len(clip.captions))
        looks, frames = gathered(videos, self.section.frames)
        told = [[c for c in clip.captions if c.text] for clip, _ in looks]
        texts = [[sentences(c.text) for c in captions] for captions in told]
        found = self.scorer(frames, [(n, of) for (_, n), of in zip(looks, texts, strict=True)])
        for captions, scores in zip(told, found, strict=True):
            _put(captions, SCORE["open_clip"], scores)


def _put(captions: list[Caption], name: str, scores: Sequence[float | None]) -> None:
    for caption, score in zip(captions, scores, strict=True):
        caption.scores.pop(name, None)
        if score is not None:
            caption.scores[name] = round(score, DIGITS)


def check(section: Choose) -> str:
    """Where the judge's weights come from, made sure of before any work and without loading them.

    Raises RecipeError: one sentence with the fix.
    """
    if not section.clip_score:
        return "needs no model"
    from models.hub import MissingModel, open_clip_weights

    try:
        return open_clip_weights(section.model, section.pretrained)
    except MissingModel as e:
        raise RecipeError(f"choose: {e}") from e
