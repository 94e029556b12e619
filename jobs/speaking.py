"""Whatever answers in words about videos and pictures, as `clipmill chat` and `clipmill eval vlm` ask it.

vision–language models   jobs/training/vlm/speaker.py
world models             jobs/training/world/speaker.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from jobs.training.data.media import Media, Visual
    from models.language.chat import Message


class Speaking(Protocol):
    """prompts: how captions are asked for, the first being the one to use. most: tokens of an answer."""

    prompts: list[str]
    most: int

    @property
    def converses(self) -> bool:
        """Whether it was trained on conversations; otherwise it goes on from what it is shown and told."""

    @property
    def most_frames(self) -> int:
        """Of a video, at most."""

    def protocol(self) -> dict[str, Any]:
        """What decides its answers beside its weights and what it is asked, plain values; 'frames' among them."""

    def refuses(self, what: str, by: str) -> str:
        """Why it cannot be asked for captions, their probability, retrieval, questions or needle by letter, likelihood
        or words: one sentence; '' where it can."""

    # ------------------------------------------------------------ what it is shown

    def look_at(self, frames: int | None, fps: float | None) -> None:
        """Of a video, other frames than in its training; none: as there."""

    def frames(self, video: Media) -> Visual:
        """What is looked at of a video. Raises BrokenSample, and ValueError where it can be shown none."""

    def stretch(self, video: Media, start: float, end: float) -> Visual:
        """Of a video from one time to another, in seconds. Raises likewise."""

    def end_to_end(self, clips: Sequence[Media], frames: int) -> Visual:
        """Clips as one video, of each so many frames. Raises likewise."""

    def image(self, picture: Media) -> Visual:
        """Of a picture. Raises likewise."""

    def beyond(self, frames: int) -> str:
        """That a video of so many is longer than any document that it was trained on; '' where it is not, or not
        known."""

    # ------------------------------------------------------------ what it is asked

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

    def reply(
        self,
        conversation: Sequence[Message],
        visuals: Sequence[Visual],
        *,
        most: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str | Visual]:
        """The same of one conversation, and what the assistant shows, in turn."""

    def log_likelihood(
        self, conversation: Sequence[Message], visuals: Sequence[Visual], answers: Sequence[str]
    ) -> list[tuple[float, int]]:
        """Of each answer (Σ log p of its tokens and its end, how many these are), the conversation given."""


def load(folder: str, device: str, located: Mapping[str, str] | None = None) -> Speaking:
    """From a folder that `clipmill train vlm`, `clipmill train world` or `clipmill export` wrote, or of a published
    LLaVA or Qwen-VL.

    Args:
        located: see `jobs.training.paths.located`; of a world model.

    Raises ValueError, one sentence with the fix.
    """
    from jobs.sample_world import is_world

    if Path(folder).is_dir() and is_world(folder):
        from jobs.training.world import speaker

        return speaker.load_speaker(folder, device, located)
    if located:
        raise ValueError(
            f"--locate: {folder} is no world model, which alone has parts elsewhere: leave it out"
        )
    from jobs.training.vlm.speaker import load_speaker

    return load_speaker(folder, device)
