"""Which of the candidate captions stands for the clip.

It goes by one of the captions' scores, by several with weights, or by a list of captioners. `consensus` is always
there: mean similarity to what the other captioners said. A statement that several models make on their own is rarely
made up; but shared mistakes win too, so look at it beside a score of a judge (`pipeline.caption.judge`), who sees the
pictures.

`best` is the choice itself. It needs nothing but the captions' rows, so that `clipmill shard` makes it again
without a model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pipeline.caption.hygiene import FLAGS
from pipeline.caption.text import words
from pipeline.recipe_choose import Choose
from pipeline.recipe_schema import RecipeError, nearest
from pipeline.record import Caption, Video
from pipeline.stages import Produces, Resources, each

DIGITS = 6  # kept of a score: what is left of float noise must not decide between equals


def best(captions: Sequence[Mapping[str, Any]], choose: Choose) -> int | None:
    """Index of the caption that stands for the clip; none when all are empty.

    Args:
        captions: rows of clips/*.parquet `captions`, in the recipe's order: `model`, `text`, `outcome`, `flags` and
            `scores` (a mapping or pairs).

    A caption that breaks off ('truncated'), or has a flag of `choose.avoid`, stands only where no other does. Equal
    scores go to the earlier captioner; captions without that score, or with none that is finite, come last.
    """

    def rank(i: int) -> tuple[bool, bool, float, int]:
        scores = dict(captions[i]["scores"] or {})

        def known(name: str) -> float | None:
            found: float | None = scores.get(name)
            return None if found is None or not math.isfinite(found) else found

        score = known(choose.method)
        if choose.method == "order":
            model = captions[i]["model"]
            score = -choose.order.index(model) if model in choose.order else -math.inf
        elif choose.method == "weights":
            score = math.fsum(w * (known(name) or 0.0) for name, w in choose.weights.items())
        if score is None:
            score = -math.inf
        sound = not set(choose.avoid) & set(captions[i].get("flags") or ())
        return sound, captions[i]["outcome"] != "truncated", score, -i

    usable = [i for i, c in enumerate(captions) if c["text"] and c["outcome"] in ("ok", "truncated")]
    return max(usable, key=rank, default=None)


def check_names(section: Choose, captioners: Sequence[str]) -> None:
    """Raises RecipeError for a preferred captioner that the run does not have, and for a flag that is misspelt.

    Captioners may give flags of their own, so one like none that is known stands.
    """
    for flag in section.avoid:
        if flag not in FLAGS and (meant := nearest(flag, FLAGS)):
            raise RecipeError(f"choose.avoid: no flag {flag!r}{meant}; there are {', '.join(FLAGS)}")
    for name in section.order if section.method == "order" else ():
        if name not in captioners:
            raise RecipeError(
                f"choose.order: no captioner {name!r}{nearest(name, captioners)}; there are {', '.join(captioners)}"
            )


# ---------------------------------------------------------------- agreement


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
    """Writes how far every candidate agrees with the others; after all captioners."""

    name = "choose"
    resources = Resources()
    sees_samples = False

    def __init__(self) -> None:
        self.produces = Produces()

    def setup(self) -> None:
        pass

    def __call__(self, videos: list[Video]) -> list[Video]:
        for video in each(videos):
            for clip in video.clips:
                put(clip.captions, "consensus", consensus([c.text for c in clip.captions]))
        return videos


def put(captions: Sequence[Caption], name: str, scores: Sequence[float | None]) -> None:
    """Give captions a score of that name; those that get none lose it."""
    for caption, score in zip(captions, scores, strict=True):
        caption.scores.pop(name, None)
        if score is not None:
            caption.scores[name] = round(score, DIGITS)
