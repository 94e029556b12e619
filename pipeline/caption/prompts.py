"""What a model is asked about a clip: a prompt, with what is known of the clip put where the prompt wants it.

A prompt may hold `{title}`, `{description}`, `{subtitles}` (what the list says, but where the recipe's `context` keeps
it out), `{meta.KEY}` (any column of the list), `{on_screen_text}` (what OCR read), `{camera}` (the measured motion in
words), `{duration}` ('4.2 seconds'), and whatever else a captioner gives it. A line that holds such names, all of which
say nothing, is left out, so one file serves clips with and without a title. Other braces are the prompt's own: JSON
needs no quoting.

`text` (from pipeline.recipe_prompts) says which words a recipe's `prompt:` names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from pipeline.caption import baselines
from pipeline.faults import ClipFault
from pipeline.recipe_prompts import PLACE, text
from pipeline.record import Clip, Video

__all__ = ["ask", "known", "render", "text"]

SAID = {"title": "Title", "description": "Description", "subtitles": "Subtitles"}  # columns of the list
LENGTH = 1000  # characters of each


def render(template: str, /, **context: str) -> str:
    """A template with each `{name}` that the context has replaced by its value.

    A line whose names all have empty values is left out; names that the context lacks stay as they are written.
    """
    lines = []
    for line in template.split("\n"):
        names = [name for name in PLACE.findall(line) if name in context]
        if names and not any(context[name] for name in names):
            continue
        lines.append(PLACE.sub(lambda m: context.get(m[1], m[0]), line))
    return "\n".join(lines).strip()


def known(video: Video, clip: Clip, context: Collection[str] = tuple(SAID)) -> dict[str, str]:
    """What is known of a clip, for `render`; '' for what is not, or is not in `context` of what the list says."""
    meta = video.source.meta | clip.meta
    said = {name: _line(meta.get(name, "")) if name in context else "" for name in SAID}
    return said | {
        "on_screen_text": _line("; ".join(clip.text)),
        "camera": baselines.camera(clip.scores),
        "duration": f"{clip.duration_s:.1f} seconds",
    }


def ask(
    template: str,
    video: Video,
    clip: Clip,
    context: Collection[str] = (),
    clean: Callable[[str], str] = str,
    more: Mapping[str, str] | None = None,
) -> str:
    """The whole prompt for a clip.

    Args:
        context: which of title, description and subtitles may be told; those that the template has no place for
            come after it.
        clean: takes from a value what must not stand in a prompt (a model's control tokens).
        more: other values for names of the template; they are not cleaned.

    Raises ClipFault where nothing is left of it: a model that is asked nothing says anything.
    """
    placed = set(PLACE.findall(template))
    meta = video.source.meta | clip.meta
    columns = {name: _line(meta.get(name[5:], "")) for name in placed if name.startswith("meta.")}
    values = {name: clean(value) for name, value in (known(video, clip, context) | columns).items()}
    rest = [f"{label}: {values[name]}" for name, label in SAID.items() if values[name] and name not in placed]
    prompt = render(template, **values | dict(more or {}))
    if template and not prompt:
        names = ", ".join(f"{{{name}}}" for name in sorted(placed))
        raise ClipFault(
            f"nothing is left of the prompt: each of its lines needs {names}, which say nothing of this clip"
        )
    if not rest:
        return prompt
    return "\n".join([prompt, "This is said of the whole source and may not fit this part of it:", *rest])


def _line(text: str) -> str:
    return " ".join(text.split())[:LENGTH]
