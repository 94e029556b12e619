"""The captioner that makes one text of what others said of a clip, by any served model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import takewhile

from pipeline.caption import prompts
from pipeline.caption.served import Asking
from pipeline.faults import ClipFault
from pipeline.recipe_captions import FuseCaptioner
from pipeline.recipe_choose import Choose
from pipeline.recipe_prompts import named
from pipeline.record import Caption, Clip, Video


class Fuse(Asking):
    """See FuseCaptioner for the options. `made_from` of its captions says whose they are."""

    options: FuseCaptioner

    def said(self, video: Video, clip: Clip, stop: threading.Event) -> Caption:
        assert self.asks is not None
        sources = self._sources(clip)
        if not sources:
            return Caption(self.name, "")
        if self.options.fields:
            told = "\n".join(c.raw for c in sources)
        else:
            told = "\n".join(f"{n}. {c.text}" for n, c in enumerate(sources, 1))
        template = self.options.prompt
        context = named(template)
        asked = prompts.ask(template, video, clip, context, more={"captions": told})
        answer = self.asks.ask(clip.clip_id, self.asks.body(asked), stop)
        # its prompt without the captions: they are beside it, and to repeat them is its task
        prompt = prompts.ask(template, video, clip, context, more={"captions": "{captions}"})
        caption = self.caption_of([answer], prompt)
        caption.made_from = [c.model for c in sources]
        return caption

    def _sources(self, clip: Clip) -> list[Caption]:
        """See `sources`. Raises ClipFault where the clip has no caption of a captioner that the recipe names."""
        there = [c.model for c in clip.captions if c.model != self.name]
        for name in self.options.of:
            if name not in there:
                raise ClipFault(
                    f"fuse.of: the clip has no caption of {name!r}; its captioners so far: "
                    f"{', '.join(there) or 'none'}"
                )
        return sources(self.options, self.name, clip.captions)


def sources(options: FuseCaptioner, name: str, captions: Sequence[Caption]) -> list[Caption]:
    """The captions to be put together: those that say something and have no flag with which none is chosen.

    Args:
        name: of the fused one; where none are named, what stands behind it came later and does not count.
        captions: of the clip, in order.
    """
    if options.of:
        there = {c.model: c for c in captions}
        chosen = [there[n] for n in options.of if n in there and n != name]
    else:
        chosen = list(takewhile(lambda c: c.model != name, captions))
    avoid = set(Choose.model_fields["avoid"].default)
    sound = [c for c in chosen if c.text and c.outcome in ("ok", "truncated") and not avoid & set(c.flags)]
    return [c for c in sound if c.raw.lstrip().startswith("{")] if options.fields else sound
