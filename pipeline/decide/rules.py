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

from pipeline.caption.choose import best, check_order
from pipeline.decide.duplicates import near_duplicates
from pipeline.io.store import Store
from pipeline.layers import Layered
from pipeline.recipe import Decide, Duplicates, Recipe, RecipeError, Rule, nearest
from pipeline.recipe_captions import Choose
from pipeline.tables import DECISION_SCHEMA

log = logging.getLogger("clipmill")

NO_CAPTION, DUPLICATE = "no_caption", "duplicate"  # names of rules that no recipe may use
SIGNATURE = "emb_signature"  # column of pipeline.score.signature
WORDS = "emb_visual_words"  # of the judge visual_fit: what a clip shows in words, too coarse to tell copies
CHOSEN = "caption."  # prefix of a rule's column: a score of the chosen caption
META = "meta."  # prefix of a rule's column: a column of the list that a source came from
# Of what is chosen: its text, who wrote it, its flags with spaces between; columns of a rule, too
CHOICE = ("caption", "caption_model", "caption_flags")
REPEATS = "caption_repeats"  # how many clips of the run have the chosen caption, word for word; so is this
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


def check_rules(rules: dict[str, Rule], columns: pa.Schema) -> None:
    """Raise RecipeError for a rule on a column of clips/ that does not exist or holds something else.

    What the list's own columns (meta.KEY) and the captions' scores are is known only once clips are read.
    """
    numbers = [REPEATS, *(f.name for f in columns if _is_number(f.type))]
    texts = [*CHOICE, "text", *(f.name for f in columns if pa.types.is_string(f.type))]
    for name, rule in rules.items():
        if rule.column.startswith(META) or (rule.column.startswith(CHOSEN) and not rule.textual):
            continue
        usable, others = (texts, numbers) if rule.textual else (numbers, texts)
        if rule.column in usable:
            continue
        if rule.column in others:
            wrong = "is a number: give it a min or a max" if rule.textual else "is not a number"
            wrong += "" if rule.textual else ", use contains, excludes, matches or not_matches"
        else:
            wrong = "is no text" if rule.column in columns.names else "was not measured by this run"
        more = f"{META}KEY of the list's columns" + (
            "" if rule.textual else f", {CHOSEN}SCORE of the chosen caption"
        )
        raise RecipeError(
            f"decide.rules.{name}: column {rule.column!r} {wrong}{nearest(rule.column, usable)}; such a rule may use "
            f"{', '.join(usable)}, {more}"
        )


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _measured(clips: Layered, recipe: Recipe) -> pa.Table:
    """The columns that the rules name of every clip, its chosen caption, and where it was measured, sorted.

    Numbers are float64; texts are strings, and so is what a list says (meta.KEY). Raises RecipeError for a
    rule, or a choice, by what no clip has.
    """
    asked = {r.column for r in recipe.decide.rules.values()}
    scores = sorted(c for c in asked if c.startswith(CHOSEN))
    keys = sorted(c for c in asked if c.startswith(META))
    plain = sorted((asked | set(RANKED)) - {*scores, *keys, *CHOICE, REPEATS})
    plain = [c for c in plain if c in clips.schema().names] if clips.files else plain
    fixed = ["clip_id", "source", "start_frame"]
    seen = _Seen()
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


class _Seen:
    """What the clips turned out to have, to tell a rule that found nothing from one that never could."""

    def __init__(self) -> None:
        self.models: dict[str, None] = {}  # captioners, in order
        self.scored: set[str] = set()  # of any caption
        self.chosen: set[str] = set()  # of a chosen one
        self.meta: set[str] = set()

    def captions(self, candidates: list[list[dict]], chosen: list[dict | None]) -> None:
        for captions in candidates:
            for c in captions:
                self.models[c["model"]] = None
                self.scored.update(name for name, _ in c["scores"] or [])
        self.chosen |= {name for c in chosen if c for name, _ in c["scores"] or []}

    def check(self, recipe: Recipe, scores: list[str], keys: list[str]) -> None:
        choose = recipe.choose
        if self.models:
            check_order(choose, list(self.models))
        asked = (
            choose.weights
            if choose.method == "weights"
            else ()
            if choose.method == "order"
            else (choose.method,)
        )
        for name in asked if self.models else ():
            if name not in self.scored | {"consensus"}:
                key = "weights" if choose.method == "weights" else "method"
                raise RecipeError(
                    f"choose.{key}: no caption has the score {name!r}{nearest(name, self.scored)}; they have "
                    f"{', '.join(sorted(self.scored)) or 'none'}. Add a judge with clipmill caption, or choose by "
                    "consensus or order"
                )
        told = [CHOSEN + name for name in sorted(self.chosen)]
        for s in scores:
            if told and s not in told:
                raise RecipeError(
                    f"decide.rules: no chosen caption has the score {s!r}{nearest(s, told)}; they have "
                    f"{', '.join(told)}"
                )
        listed = [META + key for key in sorted(self.meta)]
        for k in keys:
            if k not in listed:
                have = (
                    f"the list's columns are {', '.join(listed)}"
                    if listed
                    else "their list has no such columns"
                )
                raise RecipeError(f"decide.rules: no clip has the column {k!r}{nearest(k, listed)}; {have}")


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
    if pa.types.is_string(column.type) and not len(column):
        return np.zeros(0, bool)
    if pa.types.is_string(column.type):
        texts = column.to_pylist()
        values = np.array([_number_in(t) for t in texts])
        if np.isnan(values).all():
            example = next((t for t in texts if t), "")
            raise RecipeError(
                f"decide.rules.{name}: no value of {rule.column!r} is a number (one is {example!r:.40}); for texts "
                "use contains, excludes, matches or not_matches"
            )
    else:
        values = column.to_numpy().astype(np.float64)  # null → NaN, and NaN compares false
    fails = np.zeros(len(values), bool)
    if rule.min is not None:
        fails |= values < rule.min
    if rule.max is not None:
        fails |= values > rule.max
    return fails


def _number_in(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return np.nan


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
