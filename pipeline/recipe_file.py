"""How a recipe is read: YAML, what it inherits, where its paths lead, `--set`, and what is said of mistakes.

    base: embedded                      # a bundled recipe or a .yaml; what is not said here is as there
    cut: {crf: 20}                      # sections are merged, key by key
    captions: [{kind: colour_motion}]   # a list takes the place of the base's, as does a section of another `kind`
    decide: {rules: {blurred: null}}    # null takes away what the base has (or is the value, where one may be null)

A base may have a base. Paths are those beside the file that they stand in; in `--set`, those of the current
folder. A key of `--set` that holds dots stands in quotes: resources."caption:Qwen/Qwen2.5-VL-7B-Instruct".gpus=0.
"""

from __future__ import annotations

import copy
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pipeline import recipe_prompts
from pipeline.recipe_schema import (
    Place,
    RecipeError,
    Section,
    below,
    items_of,
    kind_of,
    nearest,
    options,
    section_of,
    sections,
)

R = TypeVar("R", bound=Section)
SHOWN = 80  # letters of a setting in a sentence


def bundled(folder: Path) -> list[str]:
    """Names of the recipes in a folder."""
    return sorted(p.stem for p in folder.glob("*.yaml"))


def load_as(kind: type[R], name_or_file: str, overrides: list[str] | None, folder: Path) -> R:
    """The recipe of that name (in `folder`) or file, with `key=value` overrides (values are YAML).

    Raises RecipeError: one sentence with the key, what is wrong, and the fix.
    """
    path = find(name_or_file, folder)
    wrong: list[str] = []
    data = {"name": path.stem} | _layers(kind, path, folder, [], wrong)
    return parse_as(kind, data, overrides or [], str(path), wrong)


def parse_as(
    kind: type[R], data: dict[str, Any], overrides: list[str], where: str, wrong: Iterable[str] = ()
) -> R:
    """Check a recipe of any kind given as plain data, with overrides. Raises RecipeError.

    Args:
        wrong: mistakes that reading it has found; they are told with the others.
    """
    before = data
    data = copy.deepcopy(data)
    for item in overrides:
        keys, text = split_setting(item)
        try:
            value = yaml.load(text, UniqueKeys)
        except yaml.YAMLError as e:
            raise RecipeError(f"--set {item!r}: the value is not valid YAML: {_said(e)}") from e
        except RecipeError as e:
            raise RecipeError(f"--set {item!r}: {e}") from e
        put(kind, data, keys, value, item)
    if "base" in data:
        raise RecipeError(
            f"recipe {where}: base stands in a recipe's file alone; name another recipe, or a file"
        )
    found, mistakes, rest = _checked(kind, data, before, where)
    if overrides and mistakes:
        own = _checked(kind, before, before, where)[1]
        mistakes = [m if m in own else _of_setting(m, overrides) for m in mistakes]
    mistakes = [*wrong, *mistakes]
    if found is None or mistakes:
        ours = all(m.startswith("--set ") for m in mistakes)
        raise RecipeError(
            "; ".join(mistakes) if ours else "", "--set" if ours else f"recipe {where}", mistakes, rest
        )
    return found


def _checked(kind: type[R], data: Any, before: Any, where: str) -> tuple[R | None, list[str], R | None]:
    """The recipe that plain data is, what is wrong with it, and what of it holds.

    Args:
        before: the data without `--set`: what a null may take away.
    """
    mistakes: list[str] = []
    data = _located(Place(kind), _without_nulls(kind, data, before, [], mistakes), Path.cwd())
    try:
        found = kind.model_validate(data)
    except ValidationError as e:
        mistakes += [_incomplete(err, before, where) or _explain(err, kind) for err in e.errors()]
        return None, mistakes, _rest(kind, data, e.errors())
    return found, mistakes, found


def _of_setting(mistake: str, overrides: list[str]) -> str:
    """A mistake that `--set` has made, with the setting in the place of the recipe's key."""
    key = mistake.partition(": ")[0]
    related = [
        item
        for item in overrides
        for set_ in [dotted(split_setting(item)[0])]
        if f"{key}.".startswith(f"{set_}.")
        or f"{set_}.".startswith((f"{key}.", f"{key.rpartition('.')[0]}."))
    ]
    words = re.findall(r"\w+", mistake.partition(": ")[2])
    named = [
        item for item in related if split_setting(item)[0][-1] in words
    ]  # of a section whose keys do not agree
    item = (named or related or overrides)[-1]
    shown = item if len(item) <= SHOWN else f"{item[: SHOWN - 1]}…"
    same = dotted(split_setting(item)[0]) == key
    return f"--set {shlex.quote(shown)}: {mistake.partition(': ')[2] if same else mistake}"


# ---------------------------------------------------------------- files and what they inherit


def find(name_or_file: str, folder: Path, beside: Path | None = None) -> Path:
    """The file of a recipe: a bundled name, or a path (relative to `beside`). Raises RecipeError."""
    path = folder / f"{name_or_file}.yaml"
    if name_or_file.endswith((".yaml", ".yml")) or "/" in name_or_file:
        path = (beside or Path()) / Path(name_or_file).expanduser()
    if not path.is_file():
        names = bundled(folder)
        raise RecipeError(
            f"recipe {name_or_file!r} not found{nearest(name_or_file, names)}; name a .yaml file or one of "
            f"{', '.join(names)}"
        )
    return path


def read(path: Path) -> dict[str, Any]:
    """What one file says. Raises RecipeError."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise RecipeError(f"recipe {path}: not valid YAML: {_said(e)}") from e
    except RecipeError as e:
        raise RecipeError(f"recipe {path}: {e}") from e
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {path}: expected a mapping of sections, found {type(data).__name__}")
    return data


def bases(name_or_file: str, folder: Path) -> Iterator[dict[str, Any]]:
    """What a recipe's file says, then its base's, and so on; a circle ends where it closes. Raises RecipeError."""
    path, seen = find(name_or_file, folder), set[Path]()
    while path not in seen:
        seen.add(path)
        yield (data := read(path))
        if not isinstance(base := data.get("base"), str):
            return
        path = find(base, folder, path.parent)


def _said(e: Exception) -> str:
    """Where and what is no YAML (or no text), without what the library calls the text that it reads."""
    mark = getattr(e, "problem_mark", None)
    if mark is None:
        return " ".join(str(e).replace(' in "<unicode string>",', " at").split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(e, 'problem', None) or 'unreadable'}"


def _layers(
    kind: type[Section], path: Path, folder: Path, seen: list[Path], wrong: list[str]
) -> dict[str, Any]:
    """What a file says, over what its base says; paths made absolute, nulls applied, those that miss put in `wrong`.

    Paths are as seen from the file; those of a bundled recipe, beside which nobody puts anything, as seen from here.
    """
    path = _absolute(path)
    if path in seen:
        circle = " → ".join(p.name for p in [*seen[seen.index(path) :], path])
        raise RecipeError(f"recipe {seen[0]}: its base leads back to itself: {circle}; take one base away")
    data = read(path)
    base = data.pop("base", None)
    data = _located(Place(kind), data, Path() if path.parent == _absolute(folder) else path.parent)
    below_it: dict[str, Any] = {}
    if base is not None:
        if not isinstance(base, str):
            raise RecipeError(f"recipe {path}: base: name one recipe or file, not {base!r}")
        try:
            file = find(base, folder, path.parent)
        except RecipeError as e:
            raise RecipeError(f"recipe {path}: base: {e}") from e
        below_it = _layers(kind, file, folder, [*seen, path], wrong)
        below_it.pop("name", None)
    mine: list[str] = []
    found = _without_nulls(kind, _merged(below_it, data), below_it, [], mine)
    wrong += [f"its base {path}: {mistake}" for mistake in mine] if seen else mine
    return found


def _merged(base: Any, over: Any) -> Any:
    """`over` where it says something, `base` elsewhere; lists and sections of another kind are not mixed."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if "kind" in over and over["kind"] != base.get("kind", over["kind"]):
        return over
    return base | {k: _merged(base[k], v) if k in base else v for k, v in over.items()}


def _without_nulls(annotation: Any, data: Any, before: Any, keys: list[str], wrong: list[str]) -> Any:
    """Data without what a null takes away; a null that takes nothing away is put in `wrong`."""
    if isinstance(data, list):
        inner = items_of(annotation) or Place()
        return [_without_nulls(inner.annotation, v, None, [*keys, str(i)], wrong) for i, v in enumerate(data)]
    if not isinstance(data, dict):
        return data
    known = before if isinstance(before, dict) else {}
    found = {}
    for key, value in data.items():
        place = below(annotation, data, key)
        if value is None and not place.nullable:
            if place.role == "entry" and key not in known:
                there = f"; there are {', '.join(map(dotted_part, known))}" if known else ""
                wrong.append(
                    f"{dotted([*keys, str(key)])}: null takes nothing away, there is no {key!r}"
                    f"{nearest(str(key), known)}{there}"
                )
        else:
            found[key] = _without_nulls(place.annotation, value, known.get(key), [*keys, str(key)], wrong)
    return found


def _located(place: Place, data: Any, folder: Path) -> Any:
    """Data with its relative paths made absolute, as seen from `folder`."""
    if isinstance(data, dict):
        return {k: _located(below(place.annotation, data, k), v, folder) for k, v in data.items()}
    if isinstance(data, list):
        return [_located(below(place.annotation, data, i), v, folder) for i, v in enumerate(data)]
    if not (isinstance(data, str) and data and place.path) or "://" in data:
        return data
    if place.path == "words" and not recipe_prompts.is_file(data):
        return data
    name, colon, rest = data.rpartition(":") if place.path == "code" else (data, "", "")
    path = _absolute(folder / Path(name).expanduser())
    a_path = {
        "always": True,
        "words": True,
        "code": name.endswith(".py"),
        "maybe": name.startswith(("./", "../", "~", "/")) or path.exists(),
    }[place.path]
    return f"{path}{colon}{rest}" if a_path else data


def _absolute(path: Path) -> Path:
    """Without '..', symbolic links left as they are: other nodes may know the folder by that name alone."""
    return Path(os.path.normpath(path.absolute()))


class UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings name no key twice (yaml.SafeLoader silently keeps the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in seen:
                    raise RecipeError(
                        f"line {line}: the key {key.value!r} is there already, in line {seen[key.value]}; keep one"
                    )
                seen[key.value] = line
        return super().construct_mapping(node, deep)


# ---------------------------------------------------------------- --set

_PART = re.compile(r"""\s*(?:"(?P<a>[^"]+)"|'(?P<b>[^']+)'|(?P<c>[^.="']+))\s*(?P<end>\.|=|$)""")


def split_setting(item: str) -> tuple[list[str], str]:
    """'a."b.c".d=value' as (['a', 'b.c', 'd'], 'value'). Raises RecipeError."""
    keys: list[str] = []
    at, end = 0, "."
    while end == ".":
        part = _PART.match(item, at)
        if part is None:
            break
        keys.append((part["a"] or part["b"] or part["c"]).strip())
        at, end = part.end(), part["end"]
    if end != "=":
        raise RecipeError(f"--set {item!r}: write it as key=value, e.g. --set decode.sample_fps=4")
    return keys, item[at:]


def dotted_part(key: Any) -> str:
    return f'"{key}"' if re.search(r"[.=\s'\"]", str(key)) else str(key)


def dotted(keys: list[Any]) -> str:
    """Keys as one, as `--set` reads them: parts that hold dots stand in quotes."""
    return ".".join(map(dotted_part, keys))


def setting(keys: list[str], value: Any) -> str:
    """An override to paste into a shell: --set 'resources."caption:a/b.c".gpus=0'."""
    return "--set " + shlex.quote(f"{dotted(keys)}={value}")


def put(kind: type[BaseModel], data: dict[str, Any], keys: list[str], value: Any, item: str) -> None:
    """data['a']['b'] = value for keys ['a', 'b']; a number steps into a list. Raises RecipeError."""
    node: Any = data
    annotation: Any = kind
    while True:
        if isinstance(node, dict):
            n = _length(annotation, node, keys, value)
            key: Any = ".".join(keys[:n])
        elif isinstance(node, list) and keys[0].isdigit() and int(keys[0]) < len(node):
            n, key = 1, int(keys[0])
        elif isinstance(node, list):
            raise RecipeError(f"--set {item}: {keys[0]!r} is not an item of a list of {len(node)}")
        else:
            raise RecipeError(f"--set {item}: {keys[0]!r} lies below a plain value")
        keys = keys[n:]
        if not keys:
            if isinstance(node, dict):
                value = _with_what_stays(below(annotation, node, key).annotation, node.get(key), value)
            node[key] = value
            return
        place = below(annotation, node, key)
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node, annotation = node[key], place.annotation


def _with_what_stays(annotation: Any, before: Any, value: Any) -> Any:
    """A section that is set as a whole, with the options that it has until they are set themselves."""
    section = section_of(annotation, value)
    stays = getattr(section, "STAYS", ())
    if not (isinstance(before, dict) and isinstance(value, dict)):
        return value
    return {k: before[k] for k in stays if k in before} | value


def _length(annotation: Any, node: dict[str, Any], keys: list[str], value: Any) -> int:
    """How many parts of a key are one key of this mapping: a shell that ate the quotes is forgiven."""
    for n in range(len(keys), 1, -1):
        if ".".join(keys[:n]) in node:
            return n
    item = items_of(annotation) if section_of(annotation, node) is None else None
    if item is None or item.role != "entry" or item.annotation is Any or "." in keys[0]:
        return 1
    held = sections(item.annotation)
    into = len(keys) > 1 and bool(held)
    into = into and (keys[-1] in held[0].model_fields or not isinstance(value, dict | None))
    return len(keys) - 1 if into else len(keys)


# ---------------------------------------------------------------- what is said of mistakes


# pydantic's names of what is to be a text, a list or a mapping, in YAML's words
SHAPES = {
    "tuple_type": "should be a list: write it in [ ]",
    "list_type": "should be a list: write it in [ ]",
    "string_type": "should be a text: put it in quotes",
    "dict_type": "should be a mapping: write it in { }",
}


def _explain(err: Any, kind: type[Section]) -> str:
    """One of pydantic's errors, with the key as the recipe writes it."""
    keys: list[Any] = []
    annotation: Any = kind
    parent: Any = kind
    for part in err["loc"]:
        several = sections(annotation)
        chosen = [s for s in several if kind_of(s) == part]
        if len(several) > 1 and chosen:  # pydantic puts the kind into the place, too
            annotation = chosen[0]
            continue
        keys.append(part)
        parent, annotation = annotation, below(annotation, {}, part).annotation
    key = dotted(keys)
    if err["type"] == "union_tag_invalid":
        known = [kind_of(s) for s in sections(annotation)]
        said = str(err["ctx"]["tag"])
        return f"{key}.kind: there is no kind {said!r}{nearest(said, known)}; known here: {', '.join(known)}"
    if err["type"] != "extra_forbidden":
        said = SHAPES.get(err["type"]) or err["msg"].removeprefix("Value error, ")
        # what is wrong with a section as a whole names its options itself
        got = (
            ""
            if err["type"] == "value_error" and isinstance(err["input"], dict)
            else f" (got {err['input']!r})"
        )
        if not key:  # the recipe as a whole
            return f"{said}{got}"
        return f"{key}: {said[:1].lower()}{said[1:]}{got}"
    section = section_of(parent, {})
    known = list(section.model_fields) if section else []
    return f"{key}: unknown key{_meant(kind, str(keys[-1]), known)}" + (
        f"; known here: {', '.join(known)}" if known else ""
    )


def _incomplete(err: Any, before: dict[str, Any], where: str) -> str:
    """What is said of a rule of which `--set` gave a part, where there is no such rule; '' of other mistakes."""
    keys = list(err["loc"])
    if err["type"] != "missing" or keys[:2] != ["decide", "rules"] or len(keys) != 4:
        return ""
    rules = (before.get("decide") or {}).get("rules") or {}
    if keys[2] in rules:
        return ""
    name, given = dotted_part(keys[2]), err["input"]
    parts = ", ".join(f"{k}: {v}" for k, v in (given if isinstance(given, dict) else {}).items())
    this = "this run" if where.endswith("run.json") else "this recipe"
    return (
        f"decide.rules.{name}: {this} has no rule {keys[2]}{nearest(keys[2], rules)} (its rules: "
        f"{', '.join(rules) or 'none'}); give the whole rule, e.g. --set "
        f"'decide.rules.{name}={{column: duration_s{', ' if parts else ''}{parts}}}'"
    )


def _rest(kind: type[R], data: Any, errors: list[Any]) -> R | None:
    """The recipe without what pydantic finds wrong; None where that is more than a key or two of its sections."""
    data = copy.deepcopy(data)
    for place in [err["loc"] for err in errors]:
        node = data
        for part in place[:-1]:
            node = node.get(part) if isinstance(node, dict) else None
        if not place or not isinstance(node, dict) or place[-1] not in node:  # of the recipe as a whole
            return None
        del node[place[-1]]
    try:
        return kind.model_validate(data)
    except ValidationError:
        return None


def _meant(kind: type[Section], name: str, here: list[str]) -> str:
    """Where an unknown key belongs, or which it resembles."""
    if close := nearest(name, here):
        return close
    everywhere = [o for o in options(kind) if o.name not in ("NAME", "N")]
    if places := [o.key for o in everywhere if o.name == name]:
        return f" (it belongs to {' or '.join(places[:3])})"
    resembling = nearest(name, [o.name for o in everywhere])
    close_to = [o.key for o in everywhere if repr(o.name) in resembling]
    return f" (did you mean {close_to[0]}?)" if close_to else ""
