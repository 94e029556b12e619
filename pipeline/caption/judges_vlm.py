"""The judge that asks a vision-language model whether a caption is true."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from pipeline.caption import prompts
from pipeline.caption import transformers as vlm
from pipeline.caption.judge import Judge, Judged, Told, Verdict
from pipeline.caption.text import sentences
from pipeline.recipe_choose import YesJudge

if TYPE_CHECKING:
    from models.curation.vlm.model import Look


DIGITS = 4


class Yes(Judge):
    """`p_yes`: P(yes | frames, 'Does this show "…"?'), see `VLM.yes`; texts of all clips share forward passes.

    With a captioner of the same model, revision and dtype in its process, the weights are there once.
    """

    options: YesJudge

    def __init__(self, options: YesJudge):
        super().__init__(options)
        self.name, self.batch = options.name, options.batch

    def check(self) -> str:
        return vlm.check(self.options, "choose.judges")

    def setup(self) -> None:
        self.model = vlm.load(self.options, self.resources.device())

    def scores(self, told: list[Told]) -> list[Sequence[Verdict]]:
        asked = [self._asked(t) for t in told]  # [clip][text][whole, *sentences]
        order = [
            (vlm.shape_of(vlm.seen(self.model, self.options, t.video, t.clip)), t, text)
            for t, texts in zip(told, asked, strict=True)
            for parts in texts
            for text in parts
        ]
        found: dict[tuple[int, str], float] = {}
        todo = sorted((i for i, (shape, _, _) in enumerate(order) if shape), key=lambda i: order[i][0])
        for i in range(0, len(todo), self.options.batch):
            # those of a batch that differ in shape are told apart again by the model
            some = [order[j][1:] for j in todo[i : i + self.options.batch]]
            looks = [self._look(t, text) for t, text in some]
            # digits that depend on what else is in the batch are none of the score's
            found |= {
                (id(t), text): round(p, DIGITS)
                for (t, text), p in zip(some, self.model.yes(looks), strict=True)
            }
        return [
            [self._verdict([found.get((id(t), part)) for part in parts]) for parts in texts]
            for t, texts in zip(told, asked, strict=True)
        ]

    def _asked(self, t: Told) -> list[list[str]]:
        """Of each text the whole, and its sentences where there are several and they are asked for."""
        return [
            [text, *(parts if self.options.sentences and len(parts := sentences(text)) > 1 else [])]
            for text in t.texts
        ]

    def _verdict(self, found: list[float | None]) -> Verdict:
        if found[0] is None:
            return None
        support = [p for p in islice(found, 1, None) if p is not None]
        return Judged(found[0], support or [found[0]] if self.options.sentences else [])

    def _look(self, t: Told, text: str) -> Look:
        chosen = vlm.seen(self.model, self.options, t.video, t.clip)
        question = prompts.render(self.options.question, caption=self.model.clean(text))
        return vlm.look_at(t.video, t.clip, chosen, question)
