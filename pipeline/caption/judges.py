"""The judges that come with clipmill."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.caption.judge import Judge, Told, Verdict
from pipeline.caption.text import sentences
from pipeline.recipe_schema import RecipeError
from pipeline.samples import pictures


class ClipScore(Judge):
    """`clip_score`, see `models.measures.clip_score`; pictures and sentences of the unit share forward passes."""

    name = "clip_score"

    def check(self) -> str:
        from models.hub import MissingModel, open_clip_weights

        try:
            return open_clip_weights(self.options.model, self.options.pretrained)
        except MissingModel as e:
            raise RecipeError(f"choose.judges: {e}") from e

    def setup(self) -> None:
        from models.measures.clip_score import ClipScorer

        o = self.options
        self.scorer = ClipScorer(o.model, o.pretrained, self.resources.device(), self.resources.batch)

    def scores(self, told: list[Told]) -> list[Sequence[Verdict]]:
        seen = [pictures(t.video, t.clip, self.options.frames) for t in told]
        texts = [
            [sentences(text) for text in t.texts] if frames else []
            for t, frames in zip(told, seen, strict=True)
        ]
        frames = (f for of_clip in seen for f in of_clip)
        found = self.scorer(frames, [(len(s), t) for s, t in zip(seen, texts, strict=True)])
        return [v or [None] * len(t.texts) for v, t in zip(found, told, strict=True)]
