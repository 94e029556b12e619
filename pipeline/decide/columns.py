"""Which columns a rule or a choice may go by: those of clips/, those of the list, the scores of captions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa

from pipeline.caption.choose import check_names
from pipeline.caption.hygiene import FLAGS
from pipeline.recipe import Recipe, RecipeError, Rule, nearest
from pipeline.recipe_choose import Choose

CHOSEN = "caption."  # prefix of a rule's column: a score of the chosen caption
META = "meta."  # prefix of a rule's column: a column of the list that a source came from
# Of what is chosen: its text, who wrote it, its flags with spaces between; columns of a rule, too
CHOICE = ("caption", "caption_model", "caption_flags")
REPEATS = "caption_repeats"  # how many clips of the run have the chosen caption, word for word; so is this


def check_rules(rules: dict[str, Rule], columns: pa.Schema) -> None:
    """Raise RecipeError for rules on columns of clips/ that do not exist or hold something else.

    What the list's own columns (meta.KEY) and the captions' scores are is known only once clips are read.
    """
    numbers = [REPEATS, *(f.name for f in columns if _is_number(f.type))]
    texts = [*CHOICE, "text", *(f.name for f in columns if pa.types.is_string(f.type))]
    mistakes = []
    for name, rule in rules.items():
        if rule.column.startswith(META) or (rule.column.startswith(CHOSEN) and not rule.textual):
            continue
        usable, others = (texts, numbers) if rule.textual else (numbers, texts)
        if rule.column in usable:
            mistakes += _flag_slips(name, rule)
            continue
        if rule.column in others:
            wrong = "is a number: give it a min or a max" if rule.textual else "is not a number"
            wrong += "" if rule.textual else ", use contains, excludes, matches or not_matches"
        else:
            wrong = "is no text" if rule.column in columns.names else "was not measured by this run"
        more = f"{META}KEY of the list's columns" + (
            "" if rule.textual else f", {CHOSEN}SCORE of the chosen caption"
        )
        mistakes.append(
            f"decide.rules.{name}: column {rule.column!r} {wrong}{nearest(rule.column, usable)}; such a rule may use "
            f"{', '.join(usable)}, {more}"
        )
    if mistakes:
        raise RecipeError("; ".join(mistakes), mistakes=mistakes)


def _flag_slips(name: str, rule: Rule) -> list[str]:
    """What a rule on flags asks for that is a letter or two off a known one; captioners may have flags of their own."""
    asked = [*rule.contains, *rule.excludes] if rule.column == "caption_flags" else []
    return [
        f"decide.rules.{name}: no flag {word!r}{meant}; there are {', '.join(FLAGS)}"
        for word in asked
        if not any(word in flag for flag in FLAGS) and (meant := nearest(word, FLAGS))
    ]


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


class Seen:
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
        if self.models:
            check_choice(recipe.choose, list(self.models), self.scored)
        if self.chosen:
            check_scores(scores, self.chosen)
        check_listed(keys, self.meta)


def check_choice(choose: Choose, captioners: Sequence[str], scores: Iterable[str]) -> None:
    """Raises RecipeError for a choice by a captioner, or a score, that captions do not have.

    Args:
        scores: those of the judges; consensus is always there.
    """
    check_names(choose, captioners)
    known = sorted({*scores, "consensus"})
    weighed = choose.method == "weights"
    asked = list(choose.weights) if weighed else [choose.method] if choose.method != "order" else []
    for name in asked:
        if name not in known:
            ways = known if weighed else [*known, "order", "weights"]
            raise RecipeError(
                f"choose.{'weights' if weighed else 'method'}: no caption has the score {name!r}{nearest(name, ways)}; "
                f"they have {', '.join(known)}. Add a judge (choose.judges; clipmill caption on a finished run), or "
                "choose by consensus or order"
            )


def check_scores(columns: Iterable[str], scores: Iterable[str]) -> None:
    """Raises RecipeError for a rule's column caption.SCORE of a score that no chosen caption has."""
    told = [CHOSEN + name for name in sorted(scores)]
    for column in columns:
        if column not in told:
            raise RecipeError(
                f"decide.rules: no chosen caption has the score {column!r}{nearest(column, told)}; they have "
                f"{', '.join(told)}"
            )


def check_listed(columns: Iterable[str], keys: Iterable[str]) -> None:
    """Raises RecipeError for a rule's column meta.KEY of a key that no source has."""
    listed = [META + key for key in sorted(keys)]
    for column in columns:
        if column not in listed:
            have = (
                f"the list's columns are {', '.join(listed)}" if listed else "their list has no such columns"
            )
            raise RecipeError(
                f"decide.rules: no clip has the column {column!r}{nearest(column, listed)}; {have}"
            )


def scores_asked(rules: Mapping[str, Rule]) -> list[str]:
    """The columns caption.SCORE that rules name; caption.KEY of a text rule is none."""
    return sorted({r.column for r in rules.values() if r.column.startswith(CHOSEN) and not r.textual})


def listed_asked(rules: Mapping[str, Rule]) -> list[str]:
    """The columns meta.KEY that rules name."""
    return sorted({r.column for r in rules.values() if r.column.startswith(META)})


def number_in(text: str | None) -> float:
    """What a text that a list gives counts as for min and max; NaN where it is no number."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def no_number(name: str, rule: Rule, example: str) -> RecipeError:
    """What is said of a rule's min or max on texts none of which is a number."""
    return RecipeError(
        f"decide.rules.{name}: no value of {rule.column!r} is a number (one is {example!r:.40}); for texts "
        "use contains, excludes, matches or not_matches"
    )
