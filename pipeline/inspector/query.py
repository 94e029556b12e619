"""What the page asks of the columns: which clips, in which order, and how many of what kind."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.inspector.index import Index, finite
from pipeline.recipe_schema import nearest

MOST_ROWS = 200  # of one answer
MOST_BINS = 200
MOST_TEXT = 500  # characters of a search
TOP_SOURCES = 50
KEPT_ANSWERS, KEPT_ORDERS = 16, 24
FIXED = ("agreement", "fit", "gap", "flag_count", "captions", "words")  # columns made of the captions
ONE, SEVERAL = (
    ("q", "like", "text", "sort"),
    ("kept", "rule", "model", "has", "flag", "source", "bucket", "voted"),
)
MOST_VALUES = 100  # of one filter
VOTED = ("none", "any", "best", "bad", "edit", "keep", "drop")


class Wrong(Exception):
    """What was asked cannot be answered; the message is a sentence."""


@dataclass(frozen=True)
class Filters:
    """Which clips; all of it must hold, of several values of one name any. Names as in the page's address."""

    q: str = ""
    kept: tuple[str, ...] = ()
    rule: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    has: tuple[str, ...] = ()
    flag: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    bucket: tuple[str, ...] = ()
    voted: tuple[str, ...] = ()
    ranges: tuple[tuple[str, float, float], ...] = ()
    like: str = ""
    text: str = ""
    sort: str = ""

    @staticmethod
    def of(items: Iterable[tuple[str, str]]) -> Filters:
        """From the pairs of a query string; others are ignored. Raises Wrong."""
        one: dict[str, Any] = {}
        several: dict[str, dict[str, None]] = {}
        ranges = []
        for name, value in items:
            if name == "range":
                ranges.append(_range(value))
            elif name in ONE:
                one[name] = value
            elif name in SEVERAL and value:
                several.setdefault(name, {})[value] = None
        if max((len(one.get(n, "")) for n in ("q", "text")), default=0) > MOST_TEXT:
            raise Wrong(f"a search has at most {MOST_TEXT} characters")
        if max((*map(len, several.values()), len(ranges)), default=0) > MOST_VALUES:
            raise Wrong(f"at most {MOST_VALUES} values of one filter")
        return Filters(**one | {n: tuple(v) for n, v in several.items()}, ranges=tuple(ranges))


def _range(value: str) -> tuple[str, float, float]:
    column, low, high = ([*value.rsplit(":", 2), "", ""])[:3]
    try:
        low_, high_ = float(low or "-inf"), float(high or "inf")
    except ValueError:
        raise Wrong(f"range={value}: write COLUMN:MIN:MAX, e.g. duration_s:2:10 or duration_s:2:") from None
    if math.isnan(low_) or math.isnan(high_) or not column:
        raise Wrong(f"range={value}: write COLUMN:MIN:MAX, e.g. duration_s:2:10 or duration_s:2:")
    return column, low_, high_


@dataclass
class Found:
    """Clips in order."""

    rows: np.ndarray  # int32 [m]
    similarity: dict[int, float] = field(default_factory=dict)  # by row, where they are sorted by it


class Query:
    """Answers over one index; answers and orders last used are kept.

    Args:
        search: rows, bool [n], that have the words of a full-text search.
        alike: similarity, float32 [n], of every clip to one (a row) or to a text; NaN where it has none.
        voted: bool [n], clips with votes of a kind of VOTED but 'none'.
        version: changes when the answer does, besides by `index.generation`.
    """

    def __init__(
        self,
        index: Index,
        search: Callable[[str], np.ndarray],
        alike: Callable[[int | str], np.ndarray],
        voted: Callable[[str], np.ndarray],
        version: Callable[[Filters], Any],
    ):
        self.index, self.search, self.alike, self.voted, self.version = index, search, alike, voted, version
        self._answers: OrderedDict[Any, Found] = OrderedDict()
        self._orders: OrderedDict[Any, np.ndarray] = OrderedDict()
        self._bins: OrderedDict[Any, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def column(self, name: str) -> np.ndarray:
        """float32 [n]. Raises Wrong where there is none, or it is still being read."""
        if (values := self.index.numbers.get(name)) is not None:
            return values
        if name in self.index.scores or name == "fps":
            self.index.read_measures()
            return self.index.numbers[name]
        if not self.index.ready and (name in FIXED or name.startswith("caption.")):
            raise Wrong(f"{name}: the captions are still being read; ask again in a moment")
        raise Wrong(f"no column {name!r}{nearest(name, list(self.index.numbers))}")

    def found(self, filters: Filters) -> Found:
        """The clips that pass, in the order asked for. Raises Wrong."""
        key = filters, self.index.generation, self.version(filters)
        with self._lock:
            if key in self._answers:
                self._answers.move_to_end(key)
                return self._answers[key]
        found = self._sorted(filters, self.mask(filters))
        self._keep(self._answers, key, found, KEPT_ANSWERS)
        return found

    def _keep(self, cache: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
        with self._lock:
            cache[key] = value
            while len(cache) > most:
                cache.popitem(last=False)

    def mask(self, filters: Filters, but: str = "") -> np.ndarray:
        """bool [n]: the clips that pass.

        Args: but: a column whose ranges do not count, or a filter that does not.
        """
        index = self.index
        mask = np.ones(len(index), bool)
        for name in SEVERAL:
            if (asked := getattr(filters, name)) and name != but:
                mask &= np.logical_or.reduce([self._has(name, value) for value in asked])
        for column, low, high in filters.ranges:
            if column != but:
                values = self.column(column)
                mask &= (values >= np.float32(low)) & (values <= np.float32(high))
        if filters.q.strip():
            mask &= self.search(filters.q)
        return mask

    def _has(self, name: str, asked: str) -> np.ndarray:
        """bool [n]: clips of one value of a filter. Raises Wrong."""
        index = self.index
        if name == "kept":
            if asked not in ("0", "1"):
                raise Wrong(f"kept={asked[:40]}: write 1 or 0")
            return index.kept == int(asked)
        if name == "rule":
            return self._known("rule", asked, index.dropped.rows)
        if name == "voted":
            if asked not in VOTED:
                raise Wrong(f"voted={asked[:40]}: write one of {', '.join(VOTED)}")
            return ~self.voted("any") if asked == "none" else self.voted(asked)
        if name in ("has", "flag"):
            if not index.ready:
                raise Wrong(f"{name}: the captions are still being read; ask again in a moment")
            return self._known(name, asked, (index.models if name == "has" else index.flags).rows)
        if name == "source":
            code = index.sources.code(asked)
            names = index.sources if code >= 0 else index.names  # the path, or what the list calls it
        else:
            names = index.model if name == "model" else index.buckets
        return names.codes == names.code(asked)

    def _known(self, what: str, name: str, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        if name not in rows:
            raise Wrong(f"no {what} {name!r}{nearest(name, list(rows))}")
        return rows[name]

    def _sorted(self, filters: Filters, mask: np.ndarray) -> Found:
        like = self._like(filters)
        if like is not None:
            rows = np.flatnonzero(mask & np.isfinite(like))
            rows = rows[np.argsort(-like[rows], kind="stable")].astype(np.int32)
            return Found(rows, {int(r): float(like[r]) for r in rows[: MOST_ROWS * 5]})
        if filters.sort in ("", "source"):
            return Found(np.flatnonzero(mask).astype(np.int32))
        order = self.order(filters.sort)
        return Found(order[mask[order]])

    def _like(self, filters: Filters) -> np.ndarray | None:
        if filters.like:
            row = self.index.row(filters.like)
            if row is None:
                raise Wrong(f"like={filters.like}: there is no such clip")
            return self.alike(row)
        return self.alike(filters.text) if filters.text.strip() else None

    def order(self, sort: str) -> np.ndarray:
        """int32 [n]: all clips by a column, those without a value last, or at random. Raises Wrong."""
        name, _, seed = sort.partition(":")
        if name == "random":
            if not ((seed or "0").isdigit() and seed.isascii()) or len(seed) > 18:
                raise Wrong(f"sort={sort}: write random:SEED, a number")
            values = None
        else:
            values = self.column(sort.removeprefix("-"))
        key = sort, self.index.generation
        with self._lock:
            if key in self._orders:
                self._orders.move_to_end(key)
                return self._orders[key]
        if values is None:
            order = np.random.default_rng(int(seed or 0)).permutation(len(self.index)).astype(np.int32)
        else:
            order = ascending(-values if sort.startswith("-") else values)
        self._keep(self._orders, key, order, KEPT_ORDERS)
        return order

    # ------------------------------------------------------------ counts

    def histogram(self, column: str, bins: int, filters: Filters) -> dict[str, Any]:
        """Clips in equal bins from the run's least to its largest value, whatever is filtered.

        A few outliers do not squeeze the rest into one bin: beyond the 1st and 99th percentile lies in the first and
        last one, where that would else be so.
        """
        if not 1 <= bins <= MOST_BINS:
            raise Wrong(f"bins={bins}: from 1 to {MOST_BINS}")
        values = self.column(column)
        mask = self.mask(filters, but=column)
        key = column, bins, self.index.generation
        with self._lock:
            kept = self._bins.get(key)
        if kept is None:
            edges = _edges(values, bins)
            which = np.full(len(values), bins, np.uint8)
            there = np.isfinite(values)
            width = (edges[-1] - edges[0]) / bins
            scaled = (values[there] - np.float32(edges[0])) / np.float32(width)
            which[there] = np.clip(scaled, 0, bins - 1).astype(np.uint8)
            kept = edges, which
            self._keep(self._bins, key, kept, KEPT_ORDERS)
        edges, which = kept
        all_ = np.bincount(which[mask], minlength=bins + 1)
        stay = np.bincount(which[mask & (self.index.kept == 1)], minlength=bins + 1)
        return {"edges": edges.tolist(), "counts": all_[:bins].tolist(), "kept": stay[:bins].tolist()} | {
            "missing": int(all_[bins])
        }

    def facets(self, filters: Filters) -> dict[str, Any]:
        """Clips by what they have, among those that pass; of a filter that is set, by the others: what else may be
        chosen keeps its count."""
        index, passing = self.index, self.mask(filters)

        def mask(name: str) -> np.ndarray:
            return self.mask(filters, but=name) if getattr(filters, name) else passing

        sources = list(index.sources.counts(mask("source")).items())[:TOP_SOURCES]
        kept = np.bincount(index.kept[mask("kept")] + 1, minlength=3)
        return {
            "total": int(np.count_nonzero(passing)),
            "models": index.model.counts(mask("model")),
            "has": index.models.counts(mask("has")),
            "flags": index.flags.counts(mask("flag")),
            "rules": index.dropped.counts(mask("rule")),
            "sources": dict(sources),
            "buckets": index.buckets.counts(mask("bucket")),
            "kept": {"1": int(kept[2]), "0": int(kept[1]), "undecided": int(kept[0])},
        }


def ascending(values: np.ndarray) -> np.ndarray:
    """float32 [n] → int32 [n]: np.argsort(values, kind="stable"), NaN last, in a third of the time.

    Numbers as whole ones of the same order, sorted by their lower and then by their upper half: of 16 bits numpy sorts
    by radix.
    """
    x = np.where(np.isnan(values), np.float32(np.nan), values + np.float32(0))  # one NaN, and no −0
    bits = x.view(np.uint32)
    bits ^= np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
    by_low = np.argsort(bits.astype(np.uint16), kind="stable")
    return by_low[np.argsort((bits >> 16).astype(np.uint16)[by_low], kind="stable")].astype(np.int32)


def _edges(values: np.ndarray, bins: int) -> np.ndarray:
    """float64 [bins + 1], equally far apart."""
    some = values[np.isfinite(values)]
    if not len(some):
        return np.linspace(0.0, 1.0, bins + 1)
    low, high = float(some.min()), float(some.max())
    inner_low, inner_high = (float(v) for v in np.percentile(some, (1, 99)))
    if inner_high > inner_low and (high - low) > 4 * (inner_high - inner_low):
        low, high = inner_low, inner_high
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, bins + 1)


def summary(index: Index, row: int, caption: str) -> dict[str, Any]:
    """A clip in the grid, without its votes.

    Args: caption: the chosen one (`Index.chosen`).
    """

    def number(name: str) -> float | None:
        values = index.numbers.get(name)
        return None if values is None else finite(float(values[row]))

    return {
        "id": index.ids[row].as_py(),
        "source": index.sources[row],
        "name": index.names[row],
        "start_s": round(float(index.start[row]), 6),
        "end_s": round(float(index.end[row]), 6),
        "duration_s": number("duration_s"),
        "width": int(index.numbers["width"][row]),
        "height": int(index.numbers["height"][row]),
        "bucket": index.buckets[row],
        "kept": {1: True, 0: False}.get(int(index.kept[row])),
        "dropped_by": index.dropped.of(row),
        "caption": caption,
        "model": index.model[row] or "",
        "agreement": number("agreement"),
        "fit": number("fit"),
        "gap": number("gap"),
        "flags": index.flags.of(row),
        "chosen_flags": index.chosen_flags.of(row),
    }
