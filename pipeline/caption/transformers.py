"""The captioner that puts any `transformers` model to work: chooses frames, writes the prompt, reads the answer."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from pipeline.caption import prompts
from pipeline.caption.captioner import Captioner
from pipeline.caption.text import sentences
from pipeline.faults import ClipFault
from pipeline.recipe_captions import Looking, TransformersCaptioner
from pipeline.recipe_schema import RecipeError
from pipeline.record import Caption, Clip, Sample, Video
from pipeline.samples import picture, samples, spread

if TYPE_CHECKING:
    from models.curation.vlm.loading import Wanted
    from models.curation.vlm.model import VLM, Answer, Look


class Transformers(Captioner):
    """See `models.curation.vlm` for which models work, and TransformersCaptioner for the options."""

    options: TransformersCaptioner

    def __init__(self, options: TransformersCaptioner):
        super().__init__(options)
        self.name = options.name or options.model
        self.batch = options.batch
        given = options.context
        self.context = tuple(prompts.SAID) if given is True else given or ()

    def check(self) -> str:
        return check(self.options, "captions", self.options.prompt)

    def setup(self) -> None:
        o = self.options
        self.model = load(
            o,
            self.resources.device(),
            max_new_tokens=o.max_new_tokens,
            beams=o.beams,
            temperature=o.temperature,
            top_p=o.top_p,
            seed=o.seed,
            thinking=o.thinking,
        )

    def shape(self, video: Video, clip: Clip) -> tuple[int, ...]:
        return shape_of(seen(self.model, self.options, video, clip))

    def caption_batch(self, clips: list[tuple[Video, Clip]]) -> list[str | Caption | ClipFault]:
        looks = [self._look(video, clip) for video, clip in clips]
        answers = iter(self.model([look for look in looks if not isinstance(look, ClipFault | None)]))
        return [
            look or "" if isinstance(look, ClipFault | None) else self._caption(next(answers))
            for look in looks
        ]

    def _look(self, video: Video, clip: Clip) -> Look | ClipFault | None:
        """What the model is shown and asked of a clip; none where no sampled frame lies in it."""
        chosen = seen(self.model, self.options, video, clip)
        words = self.options.prompt or self.model.prompt
        try:
            prompt = prompts.ask(words, video, clip, self.context, self.model.clean)
        except ClipFault as e:
            return e
        return look_at(video, clip, chosen, prompt) if chosen else None

    def _caption(self, answer: Answer) -> Caption:
        text, complete, raw = answer.text, answer.complete, answer.raw
        if self.options.first_sentence and (parts := sentences(text)):
            complete = complete or len(parts) > 1  # it was cut off in a later sentence
            raw = raw or (text if len(parts) > 1 else "")
            text = parts[0]
        tokens = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.new_tokens}
        cost = {name: float(n) for name, n in tokens.items()}
        caption = Caption(
            self.name, text, "ok" if complete else "truncated", answer.prompt, raw=raw, cost=cost
        )
        if not (complete or text):
            caption.reason = "it was cut off before it said anything: raise max_new_tokens"
        return caption


# ---------------------------------------------------------------- for whoever looks through such a model


def check(options: Looking, where: str, prompt: str | None = None) -> str:
    """Where the model comes from. Raises RecipeError, one sentence, where it cannot be had or used as asked."""
    from models.curation.vlm import loading
    from models.hub import MissingModel

    o = options
    try:
        return loading.check(wanted(o), _input(o), prompt, o.frames, o.max_pixels, o.tokens)
    except MissingModel as e:
        raise RecipeError(f"{where}: {e}") from e


def load(options: Looking, device: str, **more: Any) -> VLM:
    """The model. One that the process holds already, as captioner or judge, is not loaded twice."""
    import transformers

    from models.curation.vlm.model import VLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    o = options
    return VLM(
        wanted(o, device),
        input=_input(o),
        times=o.times,
        frames=o.frames,
        max_pixels=o.max_pixels,
        tokens=o.tokens,
        **more,
    )


def wanted(options: Looking, device: str = "cpu") -> Wanted:
    from models.curation.vlm.loading import Wanted

    return Wanted(options.model, options.revision, options.dtype, device, options.device_map)


def _input(options: Looking) -> Any:
    return None if options.input == "auto" else options.input


def seen(model: VLM, options: Looking, video: Video, clip: Clip) -> list[Sample]:
    """The frames of a clip that a model is shown; [] where no sampled frame lies in it."""
    inside = samples(video, clip)
    if not inside:
        return []
    return [middle(clip, inside)] if model.input == "image" else spread(inside, options.frames)


def look_at(video: Video, clip: Clip, chosen: list[Sample], prompt: str) -> Look:
    from models.curation.vlm.model import Look

    return Look(
        frames=[picture(s) for s in chosen],
        times_s=[video.time_of(s.frame) - clip.start_s for s in chosen],
        duration_s=clip.duration_s,
        prompt=prompt,
        key=clip.clip_id,
    )


def shape_of(chosen: list[Sample]) -> tuple[int, ...]:
    """How many frames, and how wide and high: what looks of one forward pass have in common."""
    from PIL import Image

    if not chosen:
        return ()
    with Image.open(io.BytesIO(chosen[0].jpeg)) as opened:  # reads the header only
        return (len(chosen), *opened.size)


def middle(clip: Clip, inside: list[Sample]) -> Sample:
    """One frame of the middle 40 % of a clip, drawn by its id: Panda-70M's frame for image models."""
    n = clip.end_frame - clip.start_frame
    low, high = clip.start_frame + 0.3 * n, clip.start_frame + 0.7 * n
    frames = [s for s in inside if low <= s.frame <= high]
    if not frames:
        return min(inside, key=lambda s: abs(s.frame - (low + high) / 2))
    return frames[int(clip.clip_id, 16) % len(frames)]
