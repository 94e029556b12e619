"""Whether the weights that a recipe names are still those that clips were looked at with.

A recipe names a file or folder, and a training may have put others there since. So what is in it is kept with what was
written by it, and compared before more is. Code is not: who mends a class of his own has the rest done by it.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel

from pipeline.layers import Layered
from pipeline.recipe_schema import RecipeError, Section, below
from pipeline.stages import Stage

# Of a folder; what lies in it besides (pictures, answers of an evaluation) says nothing about the model.
OF_MODELS = {".safetensors", ".bin", ".pt", ".pth", ".onnx", ".json", ".txt", ".model", ".jinja", ".py"}

# What is read of a model: all up to 1 GiB; of more, so many blocks evenly spread, between which no projector fits
# (in 16 GB they lie a megabyte apart), in a second or two.
BLOCK, BLOCKS = 1 << 16, 1 << 14

Contents = dict[str, str]  # option that names a file or folder → sha256 of what is there


def contents(section: Section | None) -> Contents:
    """Of a section's files and folders that are on this machine; of a name that a hub knows there is nothing."""
    found = {}
    for option, path in _named(section) if section is not None else ():
        if path.is_file():
            found[option] = _of_files([path])
        elif path.is_dir():
            inside = (p for p in sorted(path.iterdir()) if p.is_file() and p.suffix in OF_MODELS)
            found[option] = _of_files([p for p in inside if not p.name.startswith(".")])
    return found


def of_stages(stages: Iterable[Stage]) -> dict[str, Contents]:
    """`contents` of those that name files, by stage."""
    found = {s.name: contents(section_of(s)) for s in stages}
    return {name: some for name, some in found.items() if some}


def section_of(stage: Stage) -> Section | None:
    """Of the recipe, that a stage was made of: of a captioner, a judge, a measure. Stages of one's own have none."""
    found = getattr(stage, "section", getattr(stage, "recipe", None))
    return found if isinstance(found, Section) else None


def check(stages: Iterable[Stage], run: Mapping[str, Contents], clips: Layered, where: str) -> None:
    """Raises RecipeError where a file or folder of a stage holds other weights than when the run first used it.

    Args:
        run: `of_stages` of what the run itself used; what it lacks is not compared.
        clips: with the layers that there are.
        where: the run's folder.
    """
    over = {layer.name: layer.contents for some in clips.over.values() for layer in some}
    for stage in stages:
        then = over.get(stage.name, run.get(stage.name, {}))
        section = section_of(stage) if then else None
        for option, now in contents(section).items():
            if then.get(option, now) != now:
                again = (
                    f"to have it said anew by these, clipmill caption {shlex.quote(where)} --remove "
                    f"{shlex.quote(stage.name)} and give this command again"
                    if stage.name in over
                    else "put back those of then, or give a captioner or judge by these a name of its own"
                )
                raise RecipeError(
                    f"{stage.name}: {option} {getattr(section, option)} holds other weights than those that the "
                    f"run's clips were looked at with: {again}"
                )


def _named(section: Section) -> Iterator[tuple[str, Path]]:
    """Options that may name a file or folder, and the path."""
    kind: type[BaseModel] = type(section)
    for option in kind.model_fields:
        value = getattr(section, option)
        if isinstance(value, str) and value and below(kind, {}, option).path in ("always", "maybe"):
            yield option, Path(value)


def _of_files(paths: list[Path]) -> str:
    """sha256 of their names, sizes and bytes, or of blocks spread over them."""
    found = hashlib.sha256()
    sizes = [path.stat().st_size for path in paths]
    step = max(BLOCK, sum(sizes) // BLOCKS)
    for path, size in zip(paths, sizes, strict=True):
        found.update(f"{path.name}\0{size}\n".encode())
        with path.open("rb") as f:
            for at in range(0, size, step):
                f.seek(at)
                found.update(f.read(BLOCK))
    return found.hexdigest()
