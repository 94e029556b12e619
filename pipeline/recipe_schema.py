"""What may stand where in a recipe, read from the pydantic classes of its sections: types, limits, paths, meanings.

Knows no option of any recipe. A field that names a file says so (`PATH`, `MAYBE_PATH`, `WORDS`, `CODE` as its
`json_schema_extra`); everything else follows from types and descriptions.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

PATH: dict[str, Any] = {"path": "always"}  # a file or folder
MAYBE_PATH: dict[str, Any] = {"path": "maybe"}  # a file or folder, or a name that somebody else knows
WORDS: dict[str, Any] = {"path": "words"}  # a .txt file, or a text itself
CODE: dict[str, Any] = {"path": "code"}  # 'file.py:Class', or 'package.module:Class'


class RecipeError(ValueError):
    """A recipe that cannot be run; the message is one sentence that names the key and the fix.

    Args:
        where: of the mistakes: 'recipe mine.yaml'.
        mistakes: where there may be several, each of them; the message has them all.
        rest: what holds without the mistaken parts, to look for more of them.
    """

    def __init__(
        self, message: str = "", where: str = "", mistakes: Iterable[str] = (), rest: Section | None = None
    ):
        self.where, self.mistakes, self.rest = where, list(mistakes), rest
        super().__init__(message or f"{where}: {'; '.join(self.mistakes)}")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean …?)' for the known word most like this one; '' where none is."""
    found = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""


# ---------------------------------------------------------------- what may stand where


@dataclass(frozen=True)
class Place:
    """What may stand at one place: below a key of a section or mapping, or as an item of a list."""

    annotation: Any = Any
    role: Literal["field", "entry", "item", "extra", "unknown", "free"] = "free"
    path: str = ""  # 'always', 'maybe', 'words' or 'code'

    @property
    def nullable(self) -> bool:
        """Whether a null may stand here; where not, a null takes away what was there."""
        if self.role in ("field", "entry", "item"):
            return any(a in (None, type(None), Any) for a in alternatives(self.annotation))
        return self.role != "extra"


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union, without Annotated around them."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [a for arg in get_args(annotation) for a in alternatives(arg)]
    return [annotation]


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that may stand somewhere; several where `kind` tells which."""
    return [a for a in alternatives(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]


def kind_of(section: type[BaseModel]) -> str:
    """The `kind` that marks one of several sections; '' where it is the only one."""
    field = section.model_fields.get("kind")
    values = get_args(field.annotation) if field is not None else ()
    return str(values[0]) if len(values) == 1 else ""


def section_of(annotation: Any, data: Any) -> type[BaseModel] | None:
    """The section that data of a place is; none where that cannot be told."""
    found = sections(annotation)
    if len(found) > 1 and isinstance(data, dict):
        found = [s for s in found if kind_of(s) == data.get("kind")]
    return found[0] if len(found) == 1 else None


def items_of(annotation: Any) -> Place | None:
    """What a mapping's values or a list's items may be; none for anything else."""
    for a in alternatives(annotation):
        if get_origin(a) is dict:
            return Place(get_args(a)[1], "entry")
        if get_origin(a) in (tuple, list):
            return Place(get_args(a)[0], "item")
    return None


def below(annotation: Any, data: Any, key: Any) -> Place:
    """What may stand at data[key]."""
    section = section_of(annotation, data)
    if section is None:
        return items_of(annotation) or Place()
    field = section.model_fields.get(key)
    if field is not None:
        return Place(field.annotation, "field", _mark(field))
    if section.model_config.get("extra") == "allow":
        return Place(role="extra", path=getattr(section, "PATHS", {}).get(key, ""))
    return Place(role="unknown")


def _mark(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra.get("path", "")) if isinstance(extra, dict) else ""


# ---------------------------------------------------------------- every option


@dataclass(frozen=True)
class Option:
    """One option of a recipe, or a section of it."""

    key: str  # as --set takes it; NAME and N stand for a name and a place in a list
    meaning: str
    type: str = ""  # '' for a section
    default: str = ""

    @property
    def name(self) -> str:
        return self.key.rsplit(".", 1)[-1]


def options(kind: type[BaseModel], prefix: str = "") -> Iterator[Option]:
    """Every option of a recipe of that kind, in the order of the classes; of a section its own options first."""
    inner: list[Option] = []
    for name, field in kind.model_fields.items():
        key, meaning = f"{prefix}{name}", field.description or ""
        held, item = sections(field.annotation), items_of(field.annotation)
        if item is not None and (held := sections(item.annotation)):
            key += ".N" if item.role == "item" else ".NAME"
        if not held:
            yield Option(key, meaning, said_type(field.annotation, field.metadata), _default(field))
        for section in held:
            only = f" (kind: {kind_of(section)})" if len(held) > 1 else ""
            inner.append(Option(key, (meaning if not only else "") or first_line(section) + only))
            inner += options(section, f"{key}.")
    yield from inner


def first_line(section: type[BaseModel]) -> str:
    """What a section is for."""
    return (section.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ")


NUMBERS = {int: "whole number", float: "number", bool: "true or false", str: "text"}
LIMITS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": "items ≥"}


def said_type(annotation: Any, limits: Iterable[Any] = ()) -> str:
    """A type in words: 'number, > 0', 'one of a, b', 'text or null'."""
    words = []
    for a in alternatives(annotation):
        if get_origin(a) is Literal:
            words.append("one of " + ", ".join(map(str, get_args(a))))
        elif (item := items_of(a)) is not None:
            said = said_type(item.annotation)
            many = f"list of some of {said[7:]}" if said.startswith("one of ") else f"list of {said}s"
            words.append("mapping" if item.role == "entry" else many)
        else:
            words.append({type(None): "null", Any: "anything"}.get(a) or NUMBERS.get(a, str(a)))
    bounds = [
        f"{sign} {value:g}"
        for limit in limits
        for name, sign in LIMITS.items()
        if isinstance(value := getattr(limit, name, None), int | float)
    ]
    return ", ".join([" or ".join(words), " and ".join(bounds)] if bounds else [" or ".join(words)])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.default
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value) if value != "" else "''"
