"""Which recipe a run goes on with: what its folder was measured by, what it was last decided by, and the command.

A folder holds clips of one way to measure; another recipe is refused, with the keys that differ. Thresholds
are free: what `clipmill shard` set stays in force until the command itself asks for something else than it
asked for before. The three are merged key by key, as a version control system merges: what the command
changed since its last run wins, the rest is as the folder has it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from pipeline.io.store import Store, below
from pipeline.recipe import BEFORE, Recipe, RecipeError, parse
from pipeline.recipe_file import split_setting
from pipeline.run.worker import RunError

LATER = ("decide", "shards", "choose")  # sections that are about what was measured
MISSING = "nothing"  # how a key that one side lacks is shown


def read(store: Store) -> dict[str, Any] | None:
    """run.json of a folder; None where the folder is new. Raises RunError for a folder of something else."""
    if store.exists("run.json"):
        return json.loads(store.read_bytes("run.json"))
    if store.list():
        raise RunError(
            f"{store.uri} is not empty and holds no clipmill run: give a new or empty folder as --out"
        )
    return None


def in_force(run: dict[str, Any], recipe: Recipe, asked: Sequence[str], where: str) -> Recipe:
    """The recipe that a run goes on with.

    Args:
        run: its run.json.
        recipe: what the command asks for.
        asked: the command's `--set` items; one that is new wins, whatever it sets.

    Raises RunError where the folder was measured by another recipe, naming the keys and both values.
    """
    if "of" in run:
        raise RunError(f"{where} is a set of shards of {run['of']}: give another --out")
    wanted = recipe.model_dump(mode="json")
    stored = run["recipe"]
    before = run.get("asked")
    if before is not None:
        fresh = [split_setting(item)[0] for item in asked if item not in before["set"]]
        merged = dict(wanted)
        for section in LATER:
            base = _changed(before["recipe"].get(section), section, fresh)
            merged[section] = merge(base, stored.get(section), wanted[section])
        recipe = _parsed(merged, where)
    if run["measure_key"] != recipe.measure_key():
        refuse(stored, recipe, where)
    return recipe


def decided(run: dict[str, Any], asked: Sequence[str], where: str) -> Recipe:
    """The recipe that a finished run was last decided by, with those of the `--set` items that decide."""
    later = [item for item in asked if split_setting(item)[0][0] in LATER]
    return parse(run["recipe"], later, below(where, "run.json"))


def refuse(stored: dict[str, Any], recipe: Recipe, where: str) -> None:
    """Raise RunError where a folder's recipe and another measure differently.

    Keys are compared after the folder's recipe is read anew, so that options added since with a default that
    changes nothing are no difference; one that changes something counts as what was done before there was any.
    """
    then = json.loads(json.dumps(stored))
    came = _came_since(then)
    for key in came:
        section, _, name = key.partition(".")
        if BEFORE[key] is not None:
            then.setdefault(section, {})[name] = BEFORE[key]
    try:
        theirs: Any = parse(then, [], where).measured()
    except RecipeError:
        theirs = {k: stored.get(k) for k in recipe.measured()}
    differ = list(differences(theirs, recipe.measured()))
    lost = [key for key in came if BEFORE[key] is None]
    if not differ and not lost:
        return
    if lost or all(key in came for key, _, _ in differ):
        _refuse_older(lost, [d for d in differ if d[0] in came], recipe, where)
    shown = "; ".join(f"{key} is {brief(a)} there and {brief(b)} here" for key, a, b in differ[:6])
    more = f" and {len(differ) - 6} more" if len(differ) > 6 else ""
    raise RunError(
        f"{where} holds a run of another recipe ({stored['name']}): {shown}{more}; give another --out, or the same "
        f"recipe and settings (thresholds alone are changed with 'clipmill shard {shlex.quote(where)}')"
    )


def _came_since(stored: dict[str, Any]) -> list[str]:
    """The options of BEFORE that a folder's recipe lacks."""
    return [key for key in BEFORE if key.partition(".")[2] not in (stored.get(key.partition(".")[0]) or {})]


def _refuse_older(
    lost: list[str], differ: list[tuple[str, Any, Any]], recipe: Recipe, where: str
) -> NoReturn:
    """Raise RunError: a folder is of before there were these options, and today's recipe measures otherwise."""
    now = recipe.measured()
    today = [(key, _at(now, key)) for key in lost] + [(key, b) for key, _, b in differ]
    shown = ", ".join(f"{key}={brief(value)}" for key, value in today)
    if lost:
        fix = (
            f"no value of {' or '.join(lost)} measures as it did, so give another --out (thresholds of this one are "
            f"changed with 'clipmill shard {shlex.quote(where)}')"
        )
    else:
        sets = " ".join(f"--set {key}={json.dumps(a)}" for key, a, _ in differ)
        fix = f"go on as it was measured with {sets}, or give another --out"
    raise RunError(
        f"{where} is of an older clipmill, which measured before there was {shown} and otherwise than that: {fix}"
    )


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def told(recipe: Recipe, asked: Recipe, where: str) -> list[str]:
    """A line for a person where thresholds in force are not those of the command."""
    ours, theirs = recipe.model_dump(mode="json"), asked.model_dump(mode="json")
    differ = [d for s in LATER for d in differences(theirs.get(s), ours.get(s), s)]
    if not differ:
        return []
    shown = ", ".join(f"{key}={brief(b)} (recipe: {brief(a)})" for key, a, b in differ[:8])
    more = f" and {len(differ) - 8} more" if len(differ) > 8 else ""
    return [
        f"in force as last set with 'clipmill shard': {shown}{more}; back to the recipe's: "
        f"clipmill shard {shlex.quote(where)} --recipe {asked.name}"
    ]


# Trees of settings ---------------------------------------------------------------------------------


class _Gone:
    """A key that is not there."""

    def __repr__(self) -> str:
        return MISSING


GONE = _Gone()
CHANGED = object()  # a base that counts as changed, whatever stands there now


def merge(base: Any, ours: Any, theirs: Any) -> Any:
    """`theirs` where it was changed since `base`, else `ours`, key by key."""
    if base is CHANGED:
        return theirs
    if isinstance(ours, dict) and isinstance(theirs, dict):
        base = base if isinstance(base, dict) else {}
        keys = [*ours, *(k for k in theirs if k not in ours)]
        found = {k: merge(base.get(k, GONE), ours.get(k, GONE), theirs.get(k, GONE)) for k in keys}
        return {k: v for k, v in found.items() if v is not GONE}
    return ours if base == theirs else theirs


def differences(a: Any, b: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The keys, dotted, at which two trees differ, with both values; a list's items are keys by number."""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            yield from differences(a.get(key, GONE), b.get(key, GONE), f"{at}.{key}" if at else str(key))
    elif a != b:
        yield at, a, b


def _changed(base: Any, section: str, keys: Sequence[list[str]]) -> Any:
    """`base` with those of its keys that are asked for by name marked as changed."""
    base = json.loads(json.dumps(base))
    for first, *path in keys:
        if first != section:
            continue
        if not path:
            return CHANGED
        node = base
        for part in path[:-1]:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node[path[-1]] = CHANGED
    return base


def _parsed(data: dict[str, Any], where: str) -> Recipe:
    try:
        return parse(data, [], below(where, "run.json"))
    except RecipeError as e:
        raise RunError(
            f"{e}; that is what 'clipmill shard' and this command's recipe make together: choose the thresholds "
            f"with 'clipmill shard {shlex.quote(where)} --recipe …' first"
        ) from e


def brief(value: Any) -> str:
    text = MISSING if value is GONE else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:59]}…"
