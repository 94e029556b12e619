"""The captioner that puts any `transformers` model to work: chooses frames, writes the prompt, reads the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.caption.captioner import Captioner
from pipeline.caption.text import sentences
from pipeline.recipe_captions import TransformersCaptioner
from pipeline.recipe_schema import RecipeError
from pipeline.record import Caption, Clip, Sample, Video
from pipeline.samples import picture, samples, spread

if TYPE_CHECKING:
    from models.curation.vlm_captioner import Answer, Look

CONTEXT = {"title": "Title", "description": "Description", "subtitles": "Subtitles"}
CONTEXT_LENGTH = 1000  # characters of each


class Transformers(Captioner):
    """See `models.curation.vlm_captioner` for which models work, and TransformersCaptioner for the options."""

    options: TransformersCaptioner

    def __init__(self, options: TransformersCaptioner):
        super().__init__(options)
        self.name = options.name or options.model
        self.batch = options.batch

    def check(self) -> str:
        from models.curation.vlm_captioner import check
        from models.hub import MissingModel

        try:
            return check(self.options.model, self.options.revision, self.options.input)
        except MissingModel as e:
            raise RecipeError(f"captions: {e}") from e

    def setup(self) -> None:
        import transformers

        from models.curation.vlm_captioner import VLMCaptioner

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        o = self.options
        self.model = VLMCaptioner(
            o.model,
            revision=o.revision,
            input=o.input,
            dtype=o.dtype,
            device=self.resources.device(),
            max_new_tokens=o.max_new_tokens,
            beams=o.beams,
        )

    def caption_batch(self, clips: list[tuple[Video, Clip]]) -> list[str | Caption]:
        looks = [self._look(video, clip) for video, clip in clips]
        answers = iter(self.model([look for look in looks if look]))
        return [self._caption(next(answers)) if look else "" for look in looks]

    def _caption(self, answer: Answer) -> Caption:
        text, complete = answer.text, answer.complete
        if self.options.first_sentence and (parts := sentences(text)):
            complete = complete or len(parts) > 1  # it was cut off in a later sentence
            text = parts[0]
        return Caption(self.name, text, "ok" if complete else "truncated", answer.prompt)

    def _look(self, video: Video, clip: Clip) -> Look | None:
        """What the model is shown of a clip; none where no sampled frame lies in it."""
        from models.curation.vlm_captioner import Look

        inside = samples(video, clip)
        if not inside:
            return None
        one = self.options.input == "image"
        chosen = [middle(clip, inside)] if one else spread(inside, self.options.frames)
        return Look(
            frames=[picture(s) for s in chosen],
            times_s=[video.time_of(s.frame) - clip.start_s for s in chosen],
            duration_s=clip.duration_s,
            prompt=self.options.prompt,
            context=context(video.source.meta) if self.options.context else "",
        )


def middle(clip: Clip, inside: list[Sample]) -> Sample:
    """One frame of the middle 40 % of a clip, drawn by its id: Panda-70M's frame for image models."""
    n = clip.end_frame - clip.start_frame
    low, high = clip.start_frame + 0.3 * n, clip.start_frame + 0.7 * n
    frames = [s for s in inside if low <= s.frame <= high]
    if not frames:
        return min(inside, key=lambda s: abs(s.frame - (low + high) / 2))
    return frames[int(clip.clip_id, 16) % len(frames)]


def context(meta: dict[str, str]) -> str:
    """What the list said of the source, for the prompt; '' if it said nothing."""
    lines = [
        f"{label}: {' '.join(meta[key].split())[:CONTEXT_LENGTH]}"
        for key, label in CONTEXT.items()
        if meta.get(key, "").strip()
    ]
    if not lines:
        return ""
    return "\n".join(["This is said of the whole source and may not fit this part of it:", *lines])
