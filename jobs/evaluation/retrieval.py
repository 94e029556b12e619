"""Which text is a video's, and which video a text's, among all of a set: R@1, R@5, R@10 both ways.

    by a selector       cosine of the features that `clipmill train selector` learnt
    by likelihood       of the texts under a vision–language model, log p(text | video)

By likelihood, videos are ranked for a text as they are; texts for a video by log p(text | video) − log p(text), the
second without any video, as long and rare texts are improbable whatever is shown.
A video has one text here, its first. Equal texts are each other's right answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jobs.benchmarks.items import Item
from jobs.evaluation.answers import Answers
from jobs.evaluation.looking import Tell, seen
from jobs.evaluation.numbers import Number, number, share
from models.measures.retrieval import places

if TYPE_CHECKING:
    from jobs.speaking import Speaking

PRIOR = ""  # id of the row that has log p of each text without a video
KS = (1, 5, 10)


def weigh(speaker: Speaking, items: Sequence[Item], answers: Answers, *, prompt: str, tell: Tell) -> None:
    """log p of every text for each video: {'id', 'log_p': [texts]}."""
    texts = [item.captions[0] for item in items]
    unlike = list(dict.fromkeys(texts))
    asked = [{"role": "user", "content": prompt}]

    def each(shown: list[Any]) -> list[float]:
        known = dict(zip(unlike, speaker.log_likelihood(asked, shown, unlike), strict=True))
        return [round(known[text][0], 4) for text in texts]

    left = set(answers.missing([PRIOR, *(item.id for item in items)]))
    if PRIOR in left:
        answers.add([{"id": PRIOR, "log_p": each([])}])
    todo = [item for item in items if item.id in left]
    for found, broken in seen(speaker, todo, 1):
        rows: list[dict[str, Any]] = [{"id": id, "broken": why} for id, why in broken.items()]
        answers.add([*rows, *({"id": item.id, "log_p": each([visual])} for item, visual in found)])
        tell(len(answers.told) - 1, len(items))


def figures(items: Sequence[Item], answers: Answers) -> list[Number]:
    """Of the items whose video could be read."""
    there = [i for i, item in enumerate(items) if "log_p" in answers.told[item.id]]
    given = np.array([answers.told[items[i].id]["log_p"] for i in there])[:, there]  # [videos, texts]
    prior = np.array(answers.told[PRIOR]["log_p"])[there]
    texts = [items[i].captions[0] for i in there]
    return [
        *both_ways(given - prior, given.T, texts),
        *_one_way("text of a video, by log p alone", given, texts, KS[:1]),
    ]


def both_ways(texts_of: np.ndarray, videos_of: np.ndarray, texts: Sequence[str]) -> list[Number]:
    """Args:
    texts_of: [videos, texts] scores by which texts are ranked for each video. videos_of: [texts, videos].
    texts: of each video, by which it is known which are the same.
    """
    return [
        *_one_way("text of a video", texts_of, texts, KS),
        *_one_way("video of a text", videos_of, texts, KS),
    ]


def _one_way(name: str, scores: np.ndarray, texts: Sequence[str], ks: Sequence[int]) -> list[Number]:
    right = [[a == b for b in texts] for a in texts]
    found_at = places(torch.from_numpy(scores), torch.tensor(right))
    by_chance = sum(map(sum, right)) / len(texts) ** 2
    found = []
    for k in ks:
        row = share(f"{name}, R@{k}", (found_at <= k).tolist())
        found.append(row | ({"chance": by_chance} if k == 1 else {}))
    if len(ks) > 1:
        found.append(number(f"{name}, median rank", float(found_at.double().quantile(0.5)), len(texts)))
    return found
