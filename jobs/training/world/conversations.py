"""Conversations of a world model: words, pictures and videos in turn, of which what the assistant says is learnt.

    <s> USER: <vision> … </vision> What is it? ASSISTANT: A ball. USER: Draw one. ASSISTANT: <vision> … </vision> </s>

Pictures and videos stand where <image> and <video> do in the messages, the user's or the assistant's; where no message
has such a mark, before the first words of the user's. All have the size of the recipe's buckets; a video has as many
frames as the longest bucket that it fills. A conversation ends with its last answer: what is said after that would
teach to stop at words of the user's, and an empty answer to give none.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from jobs.training.data.media import Media, as_shown, at_hand
from jobs.training.recipe_core import Data
from models.language.chat import MARKS, Message
from models.language.exported import IMAGE, VIDEO
from models.language.layout import Part
from pipeline.shards.mixture import Sample
from pipeline.shards.pixels import BrokenSample, Clock, clock, decode, picture

SPEAKERS = {"system": "", "user": "USER: ", "assistant": "ASSISTANT: "}


class Looked(NamedTuple):
    """What is looked at of a video: frames uint8 [T, 3, H, W], when they are and how long it lasts, in seconds."""

    pixels: np.ndarray
    seconds: list[float]
    duration: float


@dataclass(frozen=True)
class Looks:
    """How pictures and videos are looked at. size: (height, width). frames: of a video, one of these.

    fps: frames a second; None spreads them over the whole.
    """

    size: tuple[int, int]
    frames: tuple[int, ...]
    fps: float | None

    @classmethod
    def of(cls, data: Data) -> Looks:
        bucket = data.buckets[0]
        return cls((bucket.height, bucket.width), tuple(sorted({b.frames for b in data.buckets})), data.fps)

    def image(self, media: Media) -> np.ndarray:
        """Upright, scaled to cover the size and cropped at the centre, uint8 [1, 3, H, W]. Raises BrokenSample."""
        from PIL import Image, ImageOps

        upright = Image.fromarray(picture(at_hand(media))[0])
        fitted = ImageOps.fit(upright, self.size[::-1], Image.Resampling.BICUBIC)
        return np.asarray(fitted).transpose(2, 0, 1)[None]

    def video(self, media: Media, span: tuple[float, float] | None = None) -> Looked:
        """From the middle of it, scaled and cropped likewise; of bytes, a clip of shards, the frames that training has
        of those that it holds out. Raises BrokenSample.

        Args:
            span: of the video, in seconds, which is looked at as if it were all.
        """
        found = at_hand(media)
        when = clock(found)
        start, end = span or (0.0, when.duration)
        times = self.times(when, start, end)
        if isinstance(media, bytes) and span is None:
            pixels = decode(media, len(times), self.fps, self.size, at=0.5)
        else:
            numbers = [max(0, bisect_right(when.seconds, start + t + 1e-6) - 1) for t in times]
            pixels = as_shown(found, numbers, lambda _: self.size)
        return Looked(pixels.transpose(0, 3, 1, 2), times, end - start)

    def times(self, when: Clock, start: float, end: float) -> list[float]:
        """Of the frames that are looked at of a stretch of a video, in seconds from its begin."""
        length = max(0.0, min(end, when.duration) - start)
        inside = sum(start <= t < end for t in when.seconds)
        lasts = inside if self.fps is None else round(length * self.fps)
        count = max((n for n in self.frames if n <= lasts), default=self.frames[0])
        if self.fps is None:
            return [(i + 0.5) * length / count for i in range(count)]
        begin = max(0.0, length - count / self.fps) / 2
        return [begin + i / self.fps for i in range(count)]


def laid_out(
    sample: Sample, looks: Looks | None, frame: int, stride: int
) -> tuple[list[Part], list[np.ndarray]]:
    """A conversation's parts, with places for codes, and the pixels [T, 3, H, W] that these will be made of, in order.

    Args:
        sample: of `pipeline.shards.chat.ChatReader`.
        looks: None: there are no codes. frame: codes of a frame. stride: frames that each but the first stands for.

    Raises BrokenSample, also where nothing is answered, and ValueError, one sentence, where marks and pictures do not
    fit, or there are no codes.
    """
    messages, images, video = sample["messages"], sample["images"], sample["video"]
    if (images or video) and looks is None:
        raise ValueError(
            f"{sample['key']} shows pictures, of which nothing makes codes: set vq.path, or leave such lines out"
        )
    asked = [mark for m in messages for mark in MARKS.findall(m["content"])]
    wanted = [IMAGE] * len(images) + [VIDEO] * bool(video)
    if asked and wanted and sorted(asked) != sorted(wanted):
        raise ValueError(
            f"{sample['key']} has {asked.count(IMAGE)} {IMAGE} and {asked.count(VIDEO)} {VIDEO} in its messages, but "
            f"{len(images)} images and {int(bool(video))} videos: give as many marks, or none"
        )
    pixels: list[np.ndarray] = []
    pictures = iter(images)

    def shown(mark: str) -> torch.Tensor:
        assert looks is not None
        pixels.append(looks.image(next(pictures)) if mark == IMAGE else looks.video(video).pixels)
        return torch.zeros(1 + (len(pixels[-1]) - 1) // stride, frame, dtype=torch.long)

    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and _says(m["content"], wanted)]
    if not answers:
        raise BrokenSample(f"{sample['key']}: nothing is answered")
    said = messages[: answers[-1] + 1]
    if asked:
        wanted = wanted if any(MARKS.search(m["content"]) for m in said) else []
    elif wanted and all(m["role"] != "user" for m in said):
        raise BrokenSample(f"{sample['key']}: its pictures would be shown after the last answer")
    return in_turn(said, wanted, shown), pixels


def in_turn(
    messages: Sequence[Message],
    wanted: Sequence[str],
    shown: Callable[[str], torch.Tensor],
    named: bool = True,
) -> list[Part]:
    """Who speaks, words and codes, one after the other.

    Args:
        wanted: the marks of what is shown. shown: codes [N, frame] of the next of it, by its mark.
        named: False: nobody is named, and nothing stands between the messages.
    """
    parts: list[Part] = []
    left = [] if any(MARKS.search(m["content"]) for m in messages) else wanted
    for i, message in enumerate(messages):
        mine = message["role"] == "assistant"
        if named:
            parts.append(Part(f"{' ' if i else ''}{SPEAKERS[message['role']]}", learnt=False))
        if message["role"] == "user":
            parts += [Part(shown(mark), learnt=False) for mark in left]
            left = []
        for j, piece in enumerate(MARKS.split(message["content"])):
            if j % 2 and wanted:
                parts.append(Part(shown(piece), mine))
            elif not j % 2 and piece:
                parts.append(Part(piece, mine))
    return parts


def _says(content: str, wanted: Sequence[str]) -> bool:
    """Whether there are words, or pictures."""
    return bool(MARKS.sub("", content).strip() or (wanted and MARKS.search(content)))


def together(pixels: Sequence[np.ndarray]) -> dict[str, Any]:
    """What an item holds of them: `pixels` uint8 [F, 3, H, W] or None, `clips` the frames of each."""
    return {"pixels": np.concatenate(pixels) if pixels else None, "clips": [len(x) for x in pixels]}
