"""What `prompt:` of a recipe may say: the words themselves, a bundled prompt by its name, or a .txt file.

    prompt: Describe the main subject in one sentence.    # the words
    prompt: one-sentence                                  # recipes/prompts/one-sentence.txt
    prompt: mine.txt                                      # a file, beside the recipe that names it

A recipe holds the words from then on: a run writes down what was asked, and no worker needs the file.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ValidationInfo

from pipeline.recipe_schema import RecipeError, nearest

FOLDER = Path(__file__).parent.parent / "recipes" / "prompts"
# What a prompt may hold of a clip (pipeline.caption.prompts), and of what captioners and judges give it
PLACES = (
    "title",
    "description",
    "subtitles",
    "on_screen_text",
    "camera",
    "duration",
    "schema",
    "captions",
    "caption",
)
PLACE = re.compile(r"\{([a-z_]+|meta\.[^{}\n]+)\}")  # meta.KEY: any column of the list
_NAME = re.compile(r"[a-z0-9]+([-_][a-z0-9]+)*")


def bundled() -> list[str]:
    """Names of the prompts that come with clipmill."""
    return sorted(p.stem for p in FOLDER.glob("*.txt"))


def text(prompt: str) -> str:
    """The words of a prompt. Raises RecipeError where a file cannot be read, or a name is nearly one that is known."""
    words = _found(prompt.strip())
    for name in PLACE.findall(words):
        # braces may be the prompt's own, so only what is one or two letters off is taken for a slip
        if name not in PLACES and (meant := difflib.get_close_matches(name, PLACES, 1, 0.8)):
            raise RecipeError(f"the prompt has {{{name}}}, did you mean {{{meant[0]}}}? It may hold {told()}")
    return words


def told() -> str:
    return ", ".join(f"{{{name}}}" for name in (*PLACES, "meta.KEY"))


def _found(prompt: str) -> str:
    if _NAME.fullmatch(prompt):
        if prompt in bundled():
            return _read(FOLDER / f"{prompt}.txt")
        if meant := nearest(prompt, bundled()):
            raise RecipeError(f"there is no prompt {prompt!r}{meant}; there are {', '.join(bundled())}")
    if is_file(prompt):
        return _read(Path(prompt).expanduser())
    if not prompt:
        raise RecipeError("a prompt cannot be empty")
    return prompt


def is_file(prompt: str) -> bool:
    """Whether a prompt names a file rather than saying something."""
    return prompt.endswith(".txt") and "\n" not in prompt


def _read(path: Path) -> str:
    try:
        words = path.read_text(encoding="utf-8-sig").strip()  # some editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is not UTF-8"
        raise RecipeError(f"prompt file {path} cannot be read ({why})") from e
    if not words:
        raise RecipeError(f"prompt file {path} is empty")
    return words


Prompt = Annotated[str, AfterValidator(text)]


SAID = ("title", "description", "subtitles")  # what a list may say of a source


def named(prompt: str | None) -> tuple[str, ...]:
    """Those of SAID that a prompt has a place for."""
    places = set(PLACE.findall(prompt or ""))
    return tuple(name for name in SAID if name in places)


def _as_named(context: bool | tuple[str, ...] | None, info: ValidationInfo) -> bool | tuple[str, ...]:
    """What a captioner is told where its section does not say: what its prompt asks for."""
    return (named(info.data.get("prompt")) or False) if context is None else context


# Of a section that has its prompt before it; None becomes what the prompt names
Context = Annotated[
    bool | tuple[Literal["title", "description", "subtitles"], ...] | None, AfterValidator(_as_named)
]
