"""A vision–language model that answers: from a training's folder, or one that `clipmill export` wrote.

    speaker = load_speaker("model/", "cpu")
    clip = speaker.frames("ball.mp4")
    speaker.answer([[{"role": "user", "content": "What moves?"}]], [[clip]])     # ['a ball']

Frames, pixels, marks and prompts are made as in training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jobs.training.data.media import Media, Visual
from jobs.training.exported import Trained
from jobs.training.vlm.visuals import Planned, Visuals
from models.hub import MissingModel
from models.language.budget import Sampling
from models.language.chat import Chat, Message
from models.language.loss import log_likelihoods, side_by_side
from models.language.seeing import Seeing
from pipeline.faults import one_line
from pipeline.shards.pixels import clock

SETTINGS = "clipmill.json"  # beside an exported model: which frames it is shown, what it is asked
TOGETHER = 8  # answers at a time


class Speaker:
    """A `jobs.speaking.Speaking`.

    Args:
    model: a `Seeing`, on its device, in eval mode; as it is wrapped, where it is sharded (then `together` is set: all
        ranks answer at once, each its own).
    prompts: how captions were asked for, the first being the one to use. most: tokens of an answer.
    """

    def __init__(
        self,
        model: nn.Module,
        chat: Chat,
        visuals: Visuals,
        prompts: Sequence[str] = ("Describe this video in one sentence.",),
        most: int = 64,
        together: bool = False,
        device: torch.device | None = None,
    ):
        self.model, self.chat, self.visuals = model, chat, visuals
        self.prompts, self.most, self.together = list(prompts), most, together
        self.device = device or next(model.parameters()).device

    @property
    def converses(self) -> bool:
        return True

    @property
    def most_frames(self) -> int:
        return self.sampling.frames

    def protocol(self) -> dict[str, Any]:
        return {"frames": str(self.sampling)}

    def refuses(self, what: str, by: str) -> str:
        return ""

    def beyond(self, frames: int) -> str:
        return ""

    def look_at(self, frames: int | None, fps: float | None) -> None:
        """Of a video, other frames than in its training."""
        old = self.sampling
        if frames is not None or fps is not None:
            new = replace(old, frames=frames or old.frames, fps=fps or old.fps, least=1)
            self.visuals = self.visuals.with_sampling(self.model, new)

    @property
    def sampling(self) -> Sampling:
        """Which frames of a clip it is shown."""
        return self.visuals.sampling

    def frames(
        self,
        video: Media | np.ndarray | Tensor,
        seconds: Sequence[float] = (),
        duration: float | None = None,
        text: str = "",
    ) -> Visual:
        """What is looked at of an mp4 (its name, or bytes), or of decoded frames, uint8 [T, H, W, 3], all of which
        are.

        Args:
            seconds: of decoded frames, from the clip's beginning; duration: of the clip.
            text: what is written about it, for a model that reads.

        Raises `pipeline.shards.pixels.BrokenSample`.
        """
        if isinstance(video, str | bytes):
            return replace(self.visuals.clip(video), text=text)
        return replace(self.visuals.decoded(video, seconds, duration), text=text)

    def stretch(self, video: Media, start: float, end: float) -> Visual:
        """Of a video from one time to another, in seconds. Raises BrokenSample."""
        when = clock(video)
        # the frame that is shown at the start belongs to it
        before = max((i for i, t in enumerate(when.seconds) if t <= start), default=0)
        inside = [i for i, t in enumerate(when.seconds) if t < end and i >= before] or [before]
        chosen = [inside[n] for n in self.sampling.of(len(inside), when.rate)]
        seconds = tuple(max(0.0, when.seconds[n] - start) for n in chosen)
        return self.visuals.loaded(Planned(video, tuple(chosen), seconds, end - start))

    def end_to_end(self, clips: Sequence[Media], frames: int) -> Visual:
        """Clips as one, of each so many frames, at the times they have there, all of the first one's size.

        Raises BrokenSample.
        """
        pictures: list[Tensor] = []
        seconds: list[float] = []
        before, sides = 0.0, None
        for media in clips:
            when = clock(media)
            numbers = Sampling(frames).of(len(when.seconds), when.rate)
            times = tuple(before + when.seconds[n] for n in numbers)
            plan = Planned(media, tuple(numbers), times, when.duration, sides=sides)
            sides = self.visuals.measured(plan).sides
            pictures.append(self.visuals.loaded(replace(plan, sides=sides)).frames)
            seconds += times
            before += when.duration
        return Visual(torch.cat(pictures), tuple(seconds), before)

    def image(self, picture: Media) -> Visual:
        """Of a picture's name or bytes. Raises BrokenSample."""
        return self.visuals.image(picture)

    @torch.no_grad()
    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        visuals: Sequence[Sequence[Visual]],
        *,
        most: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """What the assistant says next in each conversation, the visuals of which are given in their order.

        Args:
            most: tokens of an answer. temperature: 0: always the likeliest token. seed: of drawing.
        """
        found: list[str] = []
        for at in range(0, len(conversations), TOGETHER):
            chosen = slice(at, at + TOGETHER)
            found += self._answers(conversations[chosen], visuals[chosen], most, temperature, seed + at)
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
        """The same, of one."""
        return [*self.answer([conversation], [visuals], most=most, temperature=temperature, seed=seed)]

    def caption(self, visuals: Sequence[Visual], prompt: str | None = None) -> list[str]:
        """Captions of clips."""
        asked = [{"role": "user", "content": prompt or self.prompts[0]}]
        return self.answer([asked] * len(visuals), [[v] for v in visuals])

    def _answers(
        self,
        conversations: Sequence[Sequence[Message]],
        visuals: Sequence[Sequence[Visual]],
        most: int | None,
        temperature: float,
        seed: int,
    ) -> list[str]:
        asked = [self._asked(c, v) for c, v in zip(conversations, visuals, strict=True)]
        longest = max(map(len, asked))
        tokens = torch.full((len(asked), longest), self.chat.tokenizer.pad_token_id)
        there = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, ids in enumerate(asked):
            tokens[row, longest - len(ids) :] = torch.tensor(ids)
            there[row, longest - len(ids) :] = True
        every = [v for some in visuals for v in some]
        drawn = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        options = {
            "max_new_tokens": most or self.most,
            "eos_token_id": self.chat.tokenizer.eos_token_id,
            "pad_token_id": self.chat.tokenizer.pad_token_id,
            "synced_gpus": self.together,
            **drawn,
        }
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            answers = self.model(
                tokens.to(self.device),
                self._tensors(every),
                kept=self._kept(every),
                texts=self._texts(every),
                answer={"there": there.to(self.device), **self.visuals.timing(every), **options},
            )
        return [self.chat.said(row) for row in answers.tolist()]

    @torch.no_grad()
    def log_likelihood(
        self, conversation: Sequence[Message], visuals: Sequence[Visual], answers: Sequence[str]
    ) -> list[tuple[float, int]]:
        """Of each answer (Σ log p of its tokens and its end, how many these are), the conversation given."""
        model: Any = self.model
        if not isinstance(model, Seeing):
            raise TypeError("log_likelihood needs a whole model, not a wrapped one")
        tokens = torch.tensor([self._asked(conversation, visuals)], device=self.device)
        told = {"kept": self._kept(visuals), "texts": self._texts(visuals)}
        told = {name: x for name, x in told.items() if x is not None} | self.visuals.timing(visuals)
        found: list[tuple[float, int]] = []
        for at in range(0, len(answers), TOGETHER):
            rows = [self.chat.answered(text) for text in answers[at : at + TOGETHER]]
            ids = side_by_side(rows).to(self.device)
            logits = model.following(tokens, ids, self._tensors(visuals), **told)
            found += log_likelihoods(logits, ids, rows)
        return found

    def _asked(self, conversation: Sequence[Message], visuals: Sequence[Visual]) -> list[int]:
        seen = [self.visuals.seen(v, self.visuals.kept(v)) for v in visuals]
        return self.chat.asked(self.visuals.timed(conversation, visuals), seen)

    def _tensors(self, visuals: Sequence[Visual]) -> list[Tensor]:
        if not visuals:
            return []
        counts = [n for v in visuals for n in self.visuals.counts(v)]
        return self.visuals.tensors(self.visuals.joined([v.frames for v in visuals]).to(self.device), counts)

    def _kept(self, visuals: Sequence[Visual]) -> list[Tensor | None] | None:
        if self.visuals.static is None:
            return None
        found = [self.visuals.kept(v) for v in visuals]
        return [None if x is None else x.to(self.device) for x in found]

    def _texts(self, visuals: Sequence[Visual]) -> list[Tensor] | None:
        if not self.visuals.written:
            return None
        ids = (self.chat.plain(v.text, self.visuals.written) for v in visuals)
        return [torch.tensor(x, dtype=torch.long, device=self.device) for x in ids]


def load_speaker(folder: str | Path, device: str | torch.device = "cpu") -> Speaker:
    """From a folder that `clipmill train vlm` or `clipmill export` wrote, or of a published LLaVA or Qwen-VL.

    Of a training, the longest average of the weights, where one was kept. Raises ValueError, one sentence with the fix.
    """
    where, on = Path(folder), torch.device(device)
    try:
        if (where / "model.json").is_file():
            from jobs.training.vlm.model import trained_at

            return of_training(trained_at(str(where)), on)
        return _of_export(str(folder), on)
    except MissingModel as e:
        raise ValueError(str(e)) from e


def of_training(trained: Trained, device: torch.device) -> Speaker:
    """Raises ValueError, CheckpointError, MissingModel."""
    from jobs.training.vlm.kinds import kind
    from jobs.training.vlm.model import model_of, visuals_of

    model, recipe = model_of(trained)
    chat = kind(recipe.model.kind).chat(trained.state["tokenizer"])
    return Speaker(model.to(device), chat, visuals_of(model, recipe), recipe.prompts, recipe.answer)


def _of_export(folder: str, device: torch.device) -> Speaker:
    from jobs.training.vlm.kinds import kind_of_folder

    file = Path(folder) / SETTINGS
    of = kind_of_folder(folder)
    try:
        model, chat, visuals = of.load(folder)
        told: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        sampling = Sampling(**told.get("frames", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(
            f"{folder}: its processor or {SETTINGS} cannot be read ({one_line(e)}): copy it again"
        ) from e
    more = {name: told[name] for name in ("prompts", "most") if name in told}
    return Speaker(model.eval().to(device), chat, visuals(sampling, told.get("times", "none")), **more)
