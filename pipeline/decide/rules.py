"""What to keep: the recipe's rules, near-duplicates and the choice of a caption, over measured tables.

Nothing is measured here. The inputs are the columns of `clips/*.parquet` that the recipe names, read a
unit at a time; the output is one row a clip. For a million clips that is about 1 GB, most of it captions
and source names, and for the duplicate search 4 bytes × the embedding's length more a clip that passes
the rules (5 GB for 1280 numbers).

Order of the decisions:

1. every rule of the recipe on its own, so `dropped_by` names each one a clip fails, in recipe order;
2. 'no_caption', where the run has captioners and none of them could say anything;
3. 'duplicate', among the clips that pass 1 and 2 only: a clip that is dropped anyway must not take the
   one kept copy of itself along, and a looser rule can only bring clips back.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.caption.choose import best
from pipeline.decide.columns import (
    CHOICE,
    CHOSEN,
    META,
    REPEATS,
    Seen,
    check_rules,
    listed_asked,
    no_number,
    number_in,
    scores_asked,
)
from pipeline.decide.duplicates import near_duplicates
from pipeline.io.store import Store
from pipeline.layers import Layered
from pipeline.recipe import Decide, Duplicates, Recipe, Rule
from pipeline.recipe_choose import Choose
from pipeline.tables import DECISION_SCHEMA

log = logging.getLogger("clipmill")

NO_CAPTION, DUPLICATE = "no_caption", "duplicate"  # names of rules that no recipe may use
SIGNATURE = "emb_signature"  # column of pipeline.score.signature
WORDS = "emb_visual_words"  # of the judge visual_fit: what a clip shows in words, too coarse to tell copies
RANKED = ["width", "height", "duration_s", "score_sharpness"]  # the better of two near-duplicates


@dataclass
class Decided:
    """Decisions and where the clips they are about were measured.

    `decisions` has DECISION_SCHEMA, sorted by source and time, with null shard, offset and size; row i
    was measured in row `row[i]` of `clips.files[file[i]]`.
    """

    decisions: pa.Table
    clips: Layered
    file: np.ndarray  # int32 [n]
    row: np.ndarray  # int32 [n]


@dataclass(frozen=True)
class Drop:
    """One line of the funnel."""

    rule: str
    alone: int  # clips that fail this rule, whatever else they fail
    in_order: int  # clips that fail this rule and none before it
    left: int  # clips left after this rule and all before it


def decide(store: Store, recipe: Recipe) -> Decided:
    """Decide on every clip of the committed units, by `recipe.decide` and `recipe.choose`.

    Two rows of one clip id (the same file given under two SOURCE arguments) are one clip, that of the
    source first by name; a warning says so. Raises RecipeError for a rule on a column that was not measured.
    """
    clips = Layered(store)
    rules = recipe.decide.rules
    if clips.files:
        check_rules(rules, clips.schema())
    measured = _measured(clips, recipe)

    fails = np.array([_fails(name, rule, measured) for name, rule in rules.items()], bool)
    fails = fails.reshape(len(rules), len(measured))
    names = list(rules)
    captioned = recipe.captions or any(layer.captions for layer in clips.layers)
    if captioned and recipe.decide.need_caption:
        fails = np.vstack([fails, measured["caption"].is_null().to_numpy()])
        names.append(NO_CAPTION)
    passing = np.logical_not(fails.any(axis=0))
    repeats = np.full(len(measured), -1, np.int64)
    if recipe.decide.duplicates.enabled and len(measured):
        repeats = _duplicates(clips, measured, passing, recipe.decide.duplicates)
        fails = np.vstack([fails, repeats >= 0])
        names.append(DUPLICATE)
    decisions = _decisions(measured, names, fails, repeats, recipe.decide)
    file, row = (measured[name].to_numpy().astype(np.int32) for name in ("file", "row"))
    return Decided(decisions, clips, file, row)


def funnel(decisions: pa.Table) -> list[Drop]:
    """How many clips each rule drops, alone and in order, from a table that `decide` made."""
    names: list[str] = json.loads(decisions.schema.metadata[b"rules"])
    position = {name: i for i, name in enumerate(names)}
    dropped = decisions["dropped_by"].to_pylist()
    alone, in_order = np.zeros(len(names), int), np.zeros(len(names), int)
    for rules in filter(None, dropped):
        in_order[position[rules[0]]] += 1
        for rule in rules:
            alone[position[rule]] += 1
    left = len(dropped) - np.cumsum(in_order)
    return [Drop(*line) for line in zip(names, alone.tolist(), in_order.tolist(), left.tolist(), strict=True)]


def _measured(clips: Layered, recipe: Recipe) -> pa.Table:
    """The columns that the rules name of every clip, its chosen caption, and where it was measured, sorted.

    Numbers are float64; texts are strings, and so is what a list says (meta.KEY). Raises RecipeError for a
    rule, or a choice, by what no clip has.
    """
    rules = recipe.decide.rules
    asked = {r.column for r in rules.values()}
    scores, keys = scores_asked(rules), listed_asked(rules)
    plain = sorted((asked | set(RANKED)) - {*scores, *keys, *CHOICE, REPEATS})
    plain = [c for c in plain if c in clips.schema().names] if clips.files else plain
    fixed = ["clip_id", "source", "start_frame"]
    seen = Seen()
    parts = []
    for i, name in enumerate(clips.files):
        wanted = dict.fromkeys([*fixed, *plain, "captions", *(["meta"] if keys else [])])
        table = clips.read(name, list(wanted))
        candidates = [captions or [] for captions in table["captions"].to_pylist()]
        chosen = [_chosen(captions, recipe.choose) for captions in candidates]
        seen.captions(candidates, chosen)
        part = {c: table[c] for c in fixed} | {c: _column(table[c]) for c in plain if c not in fixed}
        part["caption"] = pa.array([c["text"] if c else None for c in chosen], pa.string())
        part["caption_model"] = pa.array([c["model"] if c else None for c in chosen], pa.string())
        part["caption_flags"] = pa.array(
            [" ".join(c.get("flags") or []) if c else None for c in chosen], pa.string()
        )
        for s in scores:
            values = [dict(c["scores"] or {}).get(s.removeprefix(CHOSEN)) if c else None for c in chosen]
            part[s] = pa.array(values, pa.float64())
        if keys:
            metas = [dict(m or {}) for m in table["meta"].to_pylist()]
            seen.meta |= {key for m in metas for key in m}
            part |= {k: pa.array([m.get(k.removeprefix(META)) for m in metas], pa.string()) for k in keys}
        part["file"] = pa.array(np.full(len(table), i, np.int32))
        part["row"] = pa.array(np.arange(len(table), dtype=np.int32))
        parts.append(pa.table(part))
    seen.check(recipe, scores, keys if any(map(len, parts)) else [])
    if not parts:
        parts = [_empty([*plain, *scores], keys)]
    all_ = pa.concat_tables(parts)
    keys_of_order = [(name, "ascending") for name in ("source", "start_frame", "clip_id")]
    all_ = all_.take(pc.sort_indices(all_, keys_of_order))  # Table.sort_by would import all of pyarrow.acero
    code = all_["clip_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    first = np.unique(code, return_index=True)[1]
    if len(first) < len(all_):
        _tell_repeated(all_, first)
    all_ = all_.take(np.sort(first)) if len(first) < len(all_) else all_
    said = all_["caption"].combine_chunks()
    code = said.dictionary_encode().indices.fill_null(0).to_numpy()
    repeats = np.bincount(code, minlength=1)[code] if len(code) else code
    return all_.append_column(
        REPEATS, pa.array(np.where(said.is_null(), 0, repeats).astype(float))
    ).combine_chunks()


def _tell_repeated(measured: pa.Table, first: np.ndarray) -> None:
    """Say which sources' clips are left out, as others have their ids."""
    again = np.setdiff1d(np.arange(len(measured)), first)
    names = sorted(set(measured["source"].take(pa.array(again)).to_pylist()))
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    log.warning(
        "clips with the id of another, of one content under one name: counted once, %d left out, of %s",
        len(again),
        shown,
    )


def _column(values: pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """A measured column as a rule compares it: float64, or text; of lists (on-screen text) a line an item."""
    if pa.types.is_string(values.type):
        return values
    if pa.types.is_list(values.type):
        return pa.array(["\n".join(v or []) for v in values.to_pylist()], pa.string())
    return values.cast(pa.float64())


def _empty(numbers: list[str], texts: list[str]) -> pa.Table:
    text = dict.fromkeys(["clip_id", "source", *CHOICE, *texts], pa.string())
    rest = dict.fromkeys(numbers, pa.float64()) | dict.fromkeys(["start_frame", "file", "row"], pa.int64())
    return pa.schema(list((text | rest).items())).empty_table()


def _chosen(captions: list[dict], choose: Choose) -> dict | None:
    i = best(captions, choose)
    return None if i is None else captions[i]


def _fails(name: str, rule: Rule, measured: pa.Table) -> np.ndarray:
    """bool [n]: outside the rule's bounds (null and NaN pass), or not what it asks of a text (null is empty)."""
    column = measured[rule.column]
    if rule.textual:
        asked = _text_test(rule)
        return np.array([not asked(text or "") for text in column.to_pylist()], bool)
    values = _values(name, rule, column)
    _tell_numberless(name, rule, measured, np.isnan(values))
    fails = np.zeros(len(values), bool)
    if rule.min is not None:
        fails |= values < rule.min
    if rule.max is not None:
        fails |= values > rule.max
    return fails


def _values(name: str, rule: Rule, column: pa.ChunkedArray) -> np.ndarray:
    """float64 [n], NaN where there is no number. Raises RecipeError for a column of texts none of which is one."""
    if not pa.types.is_string(column.type):
        return column.to_numpy().astype(np.float64)  # null → NaN, and NaN compares false
    texts = column.to_pylist()
    values = np.array([number_in(t) for t in texts], np.float64)
    if len(values) and np.isnan(values).all():
        raise no_number(name, rule, next((t for t in texts if t), ""))
    return values


def _tell_numberless(name: str, rule: Rule, measured: pa.Table, none: np.ndarray) -> None:
    """Say once how many clips a rule lets pass as the list gives no number for them, where it does for others.

    Of measures that is nothing to tell: a still clip has no watermark to look for.

    Args:
        none: bool [n].
    """
    n = int(none.sum())
    if not rule.column.startswith(META) or not n or n == len(none):
        return
    texts = measured[rule.column].filter(pa.array(none)).to_pylist()
    example = next((f" (e.g. {t!r:.40})" for t in texts if t), "")
    clips, they = ("1 clip has", "it passes") if n == 1 else (f"{n:,} clips have", "they pass")
    log.warning("%s no number in %s%s; %s rule %r", clips, rule.column, example, they, name)


def _text_test(rule: Rule) -> Callable[[str], bool]:
    """Whether a text is what the rule asks for; capitals do not matter."""
    contains, excludes = [t.casefold() for t in rule.contains], [t.casefold() for t in rule.excludes]
    finds = [
        (re.compile(pattern, re.IGNORECASE), wanted)
        for pattern, wanted in ((rule.matches, True), (rule.not_matches, False))
        if pattern is not None
    ]

    def test(text: str) -> bool:
        low = text.casefold()
        return (
            (not contains or any(t in low for t in contains))
            and not any(t in low for t in excludes)
            and all((find.search(text) is not None) == wanted for find, wanted in finds)
        )

    return test


def _duplicates(clips: Layered, measured: pa.Table, passing: np.ndarray, limits: Duplicates) -> np.ndarray:
    """int64 [n]: the row of the kept clip that a clip repeats, −1 for the others.

    Within one source a clip that looks like a better one is redundant (Panda-70M drops events within a
    distance of 0.3 of an earlier one, cosine 0.955). Across sources a duplicate is the same footage, so
    the signatures must agree too, where the run has them.

    The best of look-alikes is kept: most pixels, then longest, then sharpest, then smallest clip id.
    """
    order = np.flatnonzero(passing)
    if len(order):
        best_first = {name: -_numbers(measured, name)[order] for name in RANKED}
        pixels = -best_first["width"] * best_first["height"]
        ids = np.asarray(measured["clip_id"].to_pylist())[order]
        order = order[np.lexsort((ids, best_first["score_sharpness"], best_first["duration_s"], pixels))]
    kinds, within, across = _kinds(clips, limits)
    repeats = np.full(len(measured), -1, np.int64)
    if not kinds:
        return repeats
    vectors, has = _vectors(clips, kinds, measured, order)
    order = order[has]
    source = measured["source"].combine_chunks().dictionary_encode().indices.to_numpy()[order]
    found = near_duplicates(vectors, source, within, across)
    repeats[order[found >= 0]] = order[found[found >= 0]]
    return repeats


def _numbers(measured: pa.Table, column: str) -> np.ndarray:
    """float64 [n]; what was not measured is 0."""
    if column not in measured.column_names:
        return np.zeros(len(measured))
    return np.nan_to_num(measured[column].to_numpy().astype(np.float64))


def _kinds(clips: Layered, limits: Duplicates) -> tuple[list[str], list[float], list[float]]:
    """The embedding columns that near-duplicates must agree in, and the least cosines of each."""
    names = [n for n in clips.schema().names if n.startswith("emb_")]
    semantic = [n for n in names if n not in (SIGNATURE, WORDS)][
        :1
    ]  # in the order of the stages: the events' embedder
    kinds, within, across = semantic, [limits.within] * len(semantic), [limits.across] * len(semantic)
    if SIGNATURE in names:  # within a source it decides only where it is the sole witness
        kinds, across = [*kinds, SIGNATURE], [*across, limits.signature]
        within = [*within, -1.0 if semantic else limits.signature]
    return kinds, within, across


def _vectors(
    clips: Layered, kinds: list[str], measured: pa.Table, rows: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    """Embeddings of some clips.

    Returns for each kind float32 [m, d], unit rows in the order of `rows` without those that lack one
    of the kinds, and bool [n], who has all.
    """
    file, row = measured["file"].to_numpy()[rows], measured["row"].to_numpy()[rows]
    has = np.ones(len(rows), bool)
    found: dict[str, np.ndarray] = {}
    for i, path in enumerate(clips.files):
        wanted = np.flatnonzero(file == i)
        if not len(wanted):
            continue
        table = clips.read(path, kinds).take(pa.array(row[wanted]))
        for kind in kinds:
            column = table[kind].combine_chunks()
            size = column.type.list_size
            x = found.setdefault(kind, np.zeros((len(rows), size), np.float32))
            there = column.is_valid().to_numpy(zero_copy_only=False)
            x[wanted[there]] = column.drop_null().flatten().to_numpy().reshape(-1, size)
            has[wanted[~there]] = False
    vectors = []
    for kind in kinds:
        x = found.pop(kind, np.zeros((len(rows), 1), np.float32))
        x = x if has.all() else x[has]
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        vectors.append(x)
    return vectors, has


def _decisions(
    measured: pa.Table, names: list[str], fails: np.ndarray, repeats: np.ndarray, recipe: Decide
) -> pa.Table:
    """DECISION_SCHEMA without the shards; names of the rules and the recipe go into its metadata.

    Args:
        names: of the rules, in order; fails: bool [rules, n].
    """
    n = len(measured)
    which = np.nonzero(fails.T)  # (clip, rule) pairs, by clip and then in order of the rules
    offsets = np.concatenate([[0], np.cumsum(fails.sum(0))]).astype(np.int32)
    labels = pa.DictionaryArray.from_arrays(
        pa.array(which[1].astype(np.int32)), pa.array(names, pa.string())
    ).cast(pa.string())
    ids = measured["clip_id"].combine_chunks()
    columns = {
        "clip_id": ids,
        "source": measured["source"],
        "keep": pa.array(~fails.any(0)),
        "dropped_by": pa.ListArray.from_arrays(pa.array(offsets), labels),
        "duplicate_of": ids.take(pa.array(repeats, mask=repeats < 0)),
        "caption": measured["caption"],
        "caption_model": measured["caption_model"],
    }
    columns |= {f.name: pa.nulls(n, f.type) for f in DECISION_SCHEMA if f.name not in columns}
    metadata = {"rules": json.dumps(names), "decide": recipe.model_dump_json()}
    table = pa.table([columns[f.name] for f in DECISION_SCHEMA], DECISION_SCHEMA)
    return table.replace_schema_metadata(metadata)
