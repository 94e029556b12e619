"""Where the files lie that a model's recipe names, after its folder was moved, or looked for from elsewhere.

A recipe keeps absolute paths, and what training left knows the folder that it was written in. A path that is not
there any more is looked for where it would lie had it moved along: /old/vae of /old/model is beside /new/model.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.recipe_schema import Place, Section

KEYS = (
    "autoencoder.path",
    "text.model",
    "model.spatial",
    "vq.path",
    "text.tokenizer",
)  # what a trained model is used with


def found_again(
    kind: type[Section], recipe: dict[str, Any], was: str, now: Path, located: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A recipe as plain data, with the paths that lie elsewhere by now; those found nowhere stay as they are.

    Args:
        was: the folder that training wrote into, '' where that is not known; now: the folder it is today.
        located: key → path, in place of what the recipe says.
    """
    from pipeline.recipe_schema import Place, below

    given = dict(located or {})

    def renewed(place: Place, data: Any, key: str) -> Any:
        if isinstance(data, dict):
            under = f"{key}." if key else ""
            return {k: renewed(below(place.annotation, data, k), v, f"{under}{k}") for k, v in data.items()}
        if not place.path or place.path not in ("always", "maybe"):
            return data
        if key in given:
            return given[key]
        if is_path(data) and not Path(data).exists() and was and beside(data, was, now).exists():
            return str(beside(data, was, now))
        return data

    return renewed(Place(kind), recipe, "")


def is_path(value: Any) -> bool:
    """Not a name that a hub knows, which is relative."""
    return isinstance(value, str) and Path(value).is_absolute()


def beside(path: str, was: str, now: Path) -> Path:
    """Where it lies if it was moved together with the folder `was`, which is `now`."""
    return Path(os.path.normpath(now.absolute() / os.path.relpath(path, was)))


def missing(keys: Mapping[str, str | None], folder: Path, was: str) -> Iterator[str]:
    """A sentence for each key → path of which nothing is there, with what gives it anew."""
    for key, path in keys.items():
        if is_path(path) and not Path(str(path)).exists():
            moved = beside(str(path), was, folder) if was else Path(str(path))
            there = f"nor at {moved}" if str(moved) != path else "and nothing was moved along"
            yield (
                f"{folder}: {key} {path}, which it was trained with, is not there, {there}: bring it back, or say "
                f"where it is, --locate {key}=FOLDER"
            )


def as_written(path: str) -> str:
    """A path of a recipe for a person: from here on, where it lies below, as recipes and commands have it."""
    here = Path.cwd()
    return os.path.relpath(path, here) if is_path(path) and Path(path).is_relative_to(here) else path


def add_locate(parser: ArgumentParser) -> None:
    """The option of every command that uses a trained model; see `located`."""
    parser.add_argument(
        "--locate",
        action="append",
        default=[],
        metavar="KEY=PATH",
        help="where a part lies that the model names but has lost: autoencoder.path=vae/",
    )


def located(settings: list[str]) -> dict[str, str]:
    """KEY=PATH … of a command line, as `found_again` takes them, absolute. Raises ValueError."""
    found = {}
    for text in settings:
        key, is_, path = text.partition("=")
        if key not in KEYS or not is_:
            raise ValueError(
                f"--locate {text}: give {', '.join(f'{k}=PATH' for k in KEYS[:-1])} or {KEYS[-1]}=PATH"
            )
        if not Path(path).expanduser().exists():
            raise ValueError(f"--locate {text}: {path} is not there")
        found[key] = str(Path(path).expanduser().absolute())
    return found
