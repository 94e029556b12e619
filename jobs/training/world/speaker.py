"""A world model that answers, in the layout of the documents that it was trained on.

    speaker = load_speaker("world/")
    speaker.answer([[{"role": "user", "content": "What moves?"}]], [[speaker.frames("ball.mp4")]])

One that was trained on conversations (`documents.chat`) is asked in theirs; see conversations.py:

    <s> USER: <vision> … </vision> What moves? ASSISTANT: → A ball. </s>

Any other goes on from what it is shown and told, with nothing around it: a clip alone is followed by its caption.

    <s> <vision> … </vision> → two red circles move left on black </s>
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.training.data.media import Media, Visual
from jobs.training.world.conversations import SPEAKERS, Looks, in_turn
from jobs.training.world.system import LONGEST, WorldSystem, load_world
from models.hub import MissingModel
from models.language.chat import MARKS, Message
from models.language.exported import IMAGE, VIDEO
from models.language.generate import Sampling, go_on
from models.language.layout import Part
from models.language.loss import log_likelihoods, side_by_side

TOGETHER = 8  # answers at a time
FPS = 8.0  # of videos that it shows, where its recipe has none
ANSWER = Part(f" {SPEAKERS['assistant']}", learnt=False)


class WorldSpeaker:
    """A `jobs.speaking.Speaking`."""

    def __init__(self, system: WorldSystem):
        self.system, self.most = system, LONGEST
        self.looks = None if system.vq is None else Looks.of(system.recipe.data)
        self.prompts = ["Describe this video in one sentence." if self.converses else ""]

    @property
    def converses(self) -> bool:
        wanted = self.system.recipe.documents
        return wanted.chat is not None and wanted.text > 0

    @property
    def most_frames(self) -> int:
        return max(self._looks.frames)

    @property
    def _looks(self) -> Looks:
        if self.looks is None:
            raise ValueError(
                "a model of text alone, without a VQ autoencoder (vq.path), can be shown no picture or video: leave "
                "it out"
            )
        return self.looks

    def protocol(self) -> dict[str, Any]:
        frames = " or ".join(map(str, self._looks.frames))
        rate = "spread over all" if self._looks.fps is None else f"at {self._looks.fps:g} fps from the middle"
        asked = "USER: clip prompt ASSISTANT:" if self.converses else "clip, then its text"
        return {"frames": f"{frames} {rate}", "asked": asked}

    def refuses(self, what: str, by: str) -> str:
        wanted = self.system.recipe.documents
        if self.looks is None:
            return "a model of text alone, without a VQ autoencoder (vq.path), can be asked about no video"
        if self.converses:
            return ""
        if what == "questions" or (what == "needle" and by != "words"):
            return (
                f"it was trained on no conversations (documents.chat), so {what} by {by} cannot be asked of it: ask "
                "for captions, probability, or needle --by words"
            )
        first = "text" in wanted.prompts and (wanted.text_to_video or wanted.text_to_image)
        if what == "retrieval" and not (first or wanted.text):
            return (
                "retrieval weighs texts without a video too, and it was trained on none that a document begins with "
                "(documents.text, or text in documents.prompts): ask for probability"
            )
        return ""

    # ------------------------------------------------------------ what it is shown

    def look_at(self, frames: int | None, fps: float | None) -> None:
        """Raises ValueError for a number of frames that its VQ autoencoder has no codes of."""
        if frames is None and fps is None:
            return
        if frames is not None:
            self.system.frames(frames)
        given = self._looks.frames if frames is None else (frames,)
        self.looks = replace(self._looks, frames=given, fps=fps or self._looks.fps)

    def frames(self, video: Media) -> Visual:
        """Of a file as conversations of training show it, of a clip of shards as documents of clips do."""
        return self._seen(*self._looks.video(video))

    def stretch(self, video: Media, start: float, end: float) -> Visual:
        return self._seen(*self._looks.video(video, (start, end)))

    def end_to_end(self, clips: Sequence[Media], frames: int) -> Visual:
        """The last frame is there more than once where codes stand for several and it takes that to fill them."""
        looks = replace(self._looks, frames=(frames,))
        pixels: list[np.ndarray] = []
        seconds: list[float] = []
        before = 0.0
        for media in clips:
            seen = looks.video(media)
            pixels.append(seen.pixels)
            seconds += [before + t for t in seen.seconds]
            before += seen.duration
        lacking = (1 - sum(map(len, pixels))) % self._vq.stride[0]
        return self._seen(np.concatenate([*pixels, *[pixels[-1][-1:]] * lacking]), seconds, before)

    def beyond(self, frames: int) -> str:
        cost = self.system.layout.cost(-(-(frames - 1) // self._vq.stride[0]) + 1)
        most = self.system.recipe.longest
        if cost <= most:
            return ""
        return f"Videos of {frames:,} frames are {cost:,} tokens: longer than the {most:,} it was trained on."

    def image(self, picture: Media) -> Visual:
        return self._seen(self._looks.image(picture))

    @property
    def _vq(self) -> Any:
        return self.system.vq

    def _seen(self, pixels: np.ndarray, seconds: Sequence[float] = (), duration: float = 0.0) -> Visual:
        frames = torch.from_numpy(np.ascontiguousarray(pixels))
        codes = self.system.encode(frames, [len(frames)]).cpu()
        return Visual(frames, tuple(seconds), duration, codes=codes)

    # ------------------------------------------------------------ what it is asked

    def document(self, conversation: Sequence[Message], visuals: Sequence[Visual]) -> list[Part]:
        """Up to where it answers. Raises ValueError where marks and visuals do not fit."""
        marks = [VIDEO if v.seconds else IMAGE for v in visuals]
        asked = [mark for m in conversation for mark in MARKS.findall(m["content"])]
        if asked and visuals and asked != marks:
            raise ValueError(
                f"{len(asked)} marks of pictures and videos, but {len(visuals)} of these: give as many"
            )
        codes = iter(visuals)

        def shown(_: str) -> Tensor:
            found = next(codes).codes
            assert found is not None
            return found

        parts = in_turn(conversation, marks, shown, self.converses)
        return [*parts, ANSWER] if self.converses else parts

    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        visuals: Sequence[Sequence[Visual]],
        *,
        most: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """See `WorldSystem.tell`; the seed of each is by one more than that of the one before it."""
        found: list[str] = []
        asked = [self.document(c, v) for c, v in zip(conversations, visuals, strict=True)]
        how = Sampling(temperature=temperature)
        for at in range(0, len(asked), TOGETHER):
            some = asked[at : at + TOGETHER]
            found += self.system.tell(some, most=most or self.most, how=how, seed=seed + at)
        return found

    def reply(
        self,
        conversation: Sequence[Message],
        visuals: Sequence[Visual],
        *,
        most: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str | Visual]:
        """What it shows is drawn as its recipe has it of frames after the first (`run.rest`), without guidance, and has
        no more frames than the longest that it was trained on."""
        if self.looks is None:
            return [*self.answer([conversation], [visuals], most=most, temperature=temperature, seed=seed)]
        rest = self.system.recipe.run.rest
        said = go_on(
            self.system.model,
            self.system.layout,
            self.document(conversation, visuals),
            most or self.most,
            self.system.frames(self.system.bucket.frames),
            seed,
            text=Sampling(temperature=temperature),
            vision=Sampling(temperature=rest.temperature, top_k=rest.top_k),
        )
        texts = [part if isinstance(part, str) else self._drawn(part) for part in said]
        if texts and isinstance(texts[0], str):
            texts[0] = texts[0].lstrip()
        if texts and isinstance(texts[-1], str):
            texts[-1] = texts[-1].rstrip()
        return [part for part in texts if part != ""]

    def _drawn(self, codes: Tensor) -> Visual:
        frames = self.system.decode(codes).permute(0, 3, 1, 2).cpu()
        if len(frames) == 1:
            return Visual(frames, codes=codes.cpu())
        fps = self.system.recipe.data.fps or FPS
        return Visual(
            frames, tuple(i / fps for i in range(len(frames))), len(frames) / fps, codes=codes.cpu()
        )

    @torch.no_grad()
    def log_likelihood(
        self, conversation: Sequence[Message], visuals: Sequence[Visual], answers: Sequence[str]
    ) -> list[tuple[float, int]]:
        """What comes before is gone through once for all."""
        layout, model, device = self.system.layout, self.system.model, self.system.device
        before = layout.lay_out(self.document(conversation, visuals), end=False)
        rows = [[*layout.encode(text), layout.end] for text in answers]
        cache = model.cache(before.length + max(map(len, rows)))
        said = model(before.tokens[None].to(device), before.vision[None].to(device), cache=cache, last=True)
        found: list[tuple[float, int]] = []
        for at in range(0, len(rows), TOGETHER):
            some = rows[at : at + TOGETHER]
            ids = side_by_side(some).to(device)
            logits = said.text.expand(len(some), -1, -1)
            if ids.shape[1] > 1:
                later = model(ids[:, :-1], cache=cache.copies(len(some))).text
                logits = torch.cat([logits, later], dim=1)
            found += log_likelihoods(logits, ids, some)
        return found


def load_speaker(
    folder: str, device: str | None = None, located: Mapping[str, str] | None = None
) -> WorldSpeaker:
    """Of a folder that `clipmill train world` wrote; of a training in stages, its last one.

    Raises ValueError, one sentence with the fix.
    """
    try:
        return WorldSpeaker(load_world(folder, device=device, located=located))
    except MissingModel as e:
        raise ValueError(str(e)) from e
