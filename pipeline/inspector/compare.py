"""Two runs, clip by clip: which clips are in both, and what is said and decided of them in each.

Clips are the same by their id; where ids differ (another splitting, another salt) those of one source that overlap in
time by more than half of what they cover together, the most alike first.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.inspector.index import Index, finite
from pipeline.inspector.nested import whole
from pipeline.inspector.query import Wrong, summary

OVERLAP = 0.5  # intersection over union, seconds
SAME = 1e-5  # scores that differ by less, of the larger one, are one
# In the order in which one stands for a clip that has several
CHANGES = ("gone", "new", "dropped", "kept", "caption", "scores")


class Comparison:
    """Args: a, b: the run that is looked at, and the other.

    to: int32 [len(a)], row of the same clip in b, −1 where it has none; back: the other way round.
    changes: bool [len(a)] by name, of clips in both.
    """

    def __init__(self, a: Index, b: Index):
        self.a, self.b = a, b
        self.to = pc.index_in(a.ids, value_set=b.ids).fill_null(-1).to_numpy().astype(np.int32)
        self.back = np.full(len(b), -1, np.int32)
        both = self.to >= 0
        self.back[self.to[both]] = np.flatnonzero(both)
        self._overlapping()
        self._generations: tuple[int, int] | None = None
        self._changes: dict[str, np.ndarray] = {}

    def _overlapping(self) -> None:
        rest_a, rest_b = np.flatnonzero(self.to < 0), np.flatnonzero(self.back < 0)
        if not len(rest_a) or not len(rest_b):
            return
        # The list's names: one video may lie at another path
        by_name: dict[str, list[int]] = defaultdict(list)
        for row in rest_b.tolist():
            by_name[self.b.names[row] or ""].append(row)
        for row in rest_a.tolist():
            others = by_name.get(self.a.names[row] or "")
            if not others:
                continue
            start, end = float(self.a.start[row]), float(self.a.end[row])
            starts, ends = self.b.start[others], self.b.end[others]
            common = np.minimum(ends, end) - np.maximum(starts, start)
            share = common / (np.maximum(ends, end) - np.minimum(starts, start))
            share[self.back[others] >= 0] = -1.0
            best = int(np.argmax(share))
            if share[best] > OVERLAP:  # above one half: no other clip of either run can match either better
                self.to[row], self.back[others[best]] = others[best], row

    @property
    def changes(self) -> dict[str, np.ndarray]:
        now = self.a.generation, self.b.generation
        if self._generations != now:
            self._changes, self._generations = self._compared(), now
        return self._changes

    def _compared(self) -> dict[str, np.ndarray]:
        a, b, at = self.a, self.b, np.maximum(self.to, 0)
        both = self.to >= 0
        if not len(b):
            none = np.zeros(len(a), bool)
            return {"gone": ~both} | dict.fromkeys(CHANGES[2:], none)
        ours, theirs = (whole(x.caption.cast(pa.large_string())).fill_null("") for x in (a, b))
        kept = a.kept, b.kept[at]
        scores = np.zeros(len(a), bool)
        for name in self._scores():
            x, y = a.numbers[name], b.numbers[name][at]
            least = np.maximum(np.abs(x), np.abs(y)) * SAME
            with np.errstate(invalid="ignore"):
                scores |= (np.abs(x - y) > least) | (np.isnan(x) != np.isnan(y))
        return {
            "gone": ~both,
            "dropped": both & (kept[0] == 1) & (kept[1] == 0),
            "kept": both & (kept[0] == 0) & (kept[1] == 1),
            "caption": both & pc.not_equal(ours, theirs.take(pa.array(at))).to_numpy(zero_copy_only=False),
            "scores": both & scores,
        }

    def _scores(self) -> list[str]:
        """Measures that both have."""
        self.a.read_measures()
        self.b.read_measures()
        return [n for n in self.a.numbers if n.startswith("score_") and n in self.b.numbers]

    def rows(self, change: str, offset: int, limit: int) -> dict[str, Any]:
        """Clips that changed, and how many did in which way. Raises Wrong.

        Args: change: one of CHANGES; '': any.
        """
        if change and change not in CHANGES:
            raise Wrong(f"change={change[:40]}: write one of {', '.join(CHANGES)}")
        changes, new = self.changes, np.flatnonzero(self.back < 0)
        counts = {name: len(new) if name == "new" else int(changes[name].sum()) for name in CHANGES}
        any_ = np.logical_or.reduce([changes[n] for n in CHANGES if n != "new"])
        counts["same"] = len(self.a) - int(any_.sum())
        mask = any_ if not change else changes.get(change, np.zeros(len(self.a), bool))
        ours = np.flatnonzero(mask)
        others = new if change in ("", "new") else new[:0]
        total = len(ours) + len(others)
        rows = []
        for i in range(offset, min(offset + limit, total)):
            if i < len(ours):
                rows.append(self._row(int(ours[i])))
            else:
                at = int(others[i - len(ours)])
                side = summary(self.b, at, *self.b.chosen([at]))
                rows.append({"id": side["id"], "change": "new", "changes": ["new"], "a": None, "b": side})
        return {"total": total, "counts": counts, "rows": rows}

    def _row(self, row: int) -> dict[str, Any]:
        found = [name for name in CHANGES if name != "new" and self.changes[name][row]]
        at = int(self.to[row])
        a = summary(self.a, row, *self.a.chosen([row]))
        b = None if at < 0 else summary(self.b, at, *self.b.chosen([at]))
        scores: dict[str, list[float | None]] = {}
        if "scores" in found:
            for name in self._scores():
                x, y = float(self.a.numbers[name][row]), float(self.b.numbers[name][at])
                if finite(x) != finite(y):
                    scores[name] = [finite(x), finite(y)]
        return {"id": a["id"], "change": found[0] if found else "same", "changes": found, "a": a, "b": b} | {
            "scores": scores
        }
