"""Retrieval by a selector that `clipmill train selector` wrote: no language model is asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jobs.benchmarks.items import Item
from jobs.evaluation.answers import Answers
from jobs.evaluation.looking import Tell
from jobs.evaluation.numbers import Number
from jobs.evaluation.retrieval import both_ways
from pipeline.shards.pixels import BrokenSample, clock, numbered
from pipeline.split import shown
from pipeline.split.opening import DecodeError

if TYPE_CHECKING:
    from models.choosing.chooser import Chooser

FILE = "selector.pt"


def file_of(model: str) -> Path | None:
    """The selector's file, where that is what was named: itself, or in the folder of its training."""
    path = Path(model)
    if path.is_file():
        return path
    return path / FILE if (path / FILE).is_file() else None


def look(chooser: Chooser, items: Sequence[Item], answers: Answers, tell: Tell) -> None:
    """Features of each video: {'id', 'features'}."""
    left = set(answers.missing(item.id for item in items))
    for item in items:
        if item.id not in left:
            continue
        try:
            frames = _frames(item, chooser.frames)
            features = chooser.videos(frames).tolist()
            answers.add([{"id": item.id, "features": [round(x, 6) for x in features]}])
        except (BrokenSample, DecodeError, OSError) as e:
            answers.add([{"id": item.id, "broken": " ".join(str(e).split())}])
        tell(len(answers.told), len(items))


def _frames(item: Item, n: int) -> np.ndarray:
    """n frames spread over the video, or the stretch of it, uint8 [n, H, W, 3]; some again where there are fewer."""
    media: Any = str(item.video) if isinstance(item.video, Path) else item.video()
    when = clock(media)
    start, end = item.span or (0.0, float("inf"))
    inside = [i for i, t in enumerate(when.seconds) if start <= t < end] or [0]
    chosen = [inside[int((i + 0.5) * len(inside) / n)] for i in range(n)]
    if isinstance(media, bytes):
        return numbered(media, chosen)
    return shown.read(media, None, numbers=chosen).pictures


@torch.inference_mode()
def figures(chooser: Chooser, items: Sequence[Item], answers: Answers) -> list[Number]:
    """Of the items whose video could be read; by the head where the selector judges by it, else by cosines."""
    from models.choosing.chooser import logits

    there = [item for item in items if "features" in answers.told[item.id]]
    texts = [item.captions[0] for item in there]
    features = torch.tensor([answers.told[item.id]["features"] for item in there])
    told = torch.from_numpy(chooser.texts(texts))
    v, t, scale = chooser.model(features.to(chooser.device), told.to(chooser.device))
    rows = [logits(chooser.model, v[i : i + 1], t[None], scale, chooser.saved.head)[0] for i in range(len(v))]
    scores = torch.stack(rows).cpu().numpy()
    return both_ways(scores, scores.T, texts)
