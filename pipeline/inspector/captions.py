"""Numbers of every clip from all its captions: how far they agree, how they fit, how odd they are."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.caption.choose import best
from pipeline.decide.rules import CHOSEN
from pipeline.inspector.nested import Marks, Names, by_key, flat
from pipeline.recipe_choose import Choose

CONSENSUS, FIT = "consensus", "visual_fit"
HUMAN = "human"  # a score: the share of people who would have this caption (pipeline.inspector.choices)
COUNTED = 1 << 16  # texts whose words are counted at a time


class CaptionColumns:
    """Filled by `add`, a file of clips at a time.

    Args:
        model: who wrote each clip's chosen caption; kept: int8 [n], −1 where nothing was chosen yet.
        choose: how it would be.

    flags, models: clips with such a caption, of any model; chosen_flags: with such a chosen one.
    """

    def __init__(self, model: Names, kept: np.ndarray, choose: Choose):
        self.model, self.kept, self.choose, n = model, kept, choose, len(kept)
        self.n = n
        self.count, self.flag_count = np.zeros(n, np.float32), np.zeros(n, np.float32)
        self.agreement = np.full(n, np.nan, np.float32)
        self.chosen: dict[str, np.ndarray] = {}  # by score, of the chosen caption
        self.gaps: dict[str, np.ndarray] = {}  # by score, largest − smallest of a clip's captions
        self.flags, self.chosen_flags, self.models = Marks(n), Marks(n), Marks(n)
        # row → text and model of the caption that would stand
        self.undecided: dict[int, tuple[str, str]] = {}

    def add(self, rows: np.ndarray, captions: pa.Array) -> None:
        """Args: rows: of each list of captions, −1 for one that is no clip of its own."""
        there = np.flatnonzero(rows >= 0)
        if len(there) < len(rows):
            rows, captions = rows[there], captions.take(pa.array(there))
        owner, flat_captions = flat(captions)
        if len(there) and (self.kept[rows] < 0).any():
            self._choose(rows, captions)
        if not len(owner):
            return
        row = rows[owner]
        model = Names.of(flat_captions.field("model"))
        text = flat_captions.field("text").fill_null("")
        said = pc.not_equal(text, "").to_numpy(zero_copy_only=False)
        self.count[rows] = np.bincount(owner[said], minlength=len(rows))
        for code, name in enumerate(model.names):
            self.models.put(name, row[said & (model.codes == code)])
        stands = self._stands(row, model)
        of, flags = flat(flat_captions.field("flags"))
        named = Names.of(flags)
        self.flag_count[rows] = np.bincount(owner[of], minlength=len(rows))
        for code, name in enumerate(named.names):
            its = of[named.codes == code]
            self.flags.put(name, row[its])
            self.chosen_flags.put(name, row[its[stands[its]]])
        for name, (of, values) in by_key(flat_captions.field("scores")).items():
            self._score(name, row[of], values, stands[of])

    def _stands(self, row: np.ndarray, model: Names) -> np.ndarray:
        """bool [m]: it is its clip's chosen caption."""
        chosen = self.model
        ours = np.array([*(chosen.code(n) for n in model.names), -3], np.int32)
        stands = ours[model.codes] == chosen.codes[row]
        for r in set(row.tolist()) & self.undecided.keys() if self.undecided else ():
            stands |= (row == r) & (model.codes == model.code(self.undecided[r][1]))
        return stands

    def _choose(self, rows: np.ndarray, captions: pa.Array) -> None:
        for row, candidates in zip(rows.tolist(), captions.to_pylist(), strict=True):
            if self.kept[row] < 0 and (i := best(candidates or [], self.choose)) is not None:
                self.undecided[row] = candidates[i]["text"], candidates[i]["model"]

    def _score(self, name: str, row: np.ndarray, values: np.ndarray, stands: np.ndarray) -> None:
        there = np.isfinite(values)
        row, values, stands = row[there], values[there], stands[there]
        n = self.n
        of_chosen = self.chosen.setdefault(name, np.full(n, np.nan, np.float32))
        of_chosen[row[stands]] = values[stands]
        some, inverse, counts = np.unique(row, return_inverse=True, return_counts=True)
        high, low = np.full(len(some), -np.inf), np.full(len(some), np.inf)
        np.maximum.at(high, inverse, values)
        np.minimum.at(low, inverse, values)
        gap = self.gaps.setdefault(name, np.full(n, np.nan, np.float32))
        gap[some] = np.where(counts > 1, high - low, np.nan)
        if name == CONSENSUS:
            self.agreement[some] = np.bincount(inverse, values) / counts

    def numbers(self, fit: str | None, caption: pa.ChunkedArray) -> dict[str, np.ndarray]:
        """Columns, float32 [n].

        Args:
            fit: the score that says how well captions fit the pictures; caption: the chosen ones.
        """
        none = np.full(self.n, np.nan, np.float32)
        return {
            "agreement": self.agreement,
            "fit": self.chosen.get(fit or "", none),
            "gap": self.gaps.get(fit or "", none),
            "flag_count": self.flag_count,
            "captions": self.count,
            "words": word_counts(caption),
        } | {CHOSEN + name: values for name, values in self.chosen.items()}

    def decided(self, caption: pa.ChunkedArray) -> tuple[pa.ChunkedArray, Names]:
        """Chosen captions and who wrote them, with those that would be chosen of undecided clips."""
        texts, names, codes = caption.to_pylist(), list(self.model.names), self.model.codes.copy()
        for row, (text, who) in self.undecided.items():
            texts[row] = text
            if who not in names:
                names.append(who)
            codes[row] = names.index(who)
        return pa.chunked_array([pa.array(texts, pa.large_string())]), Names(codes, names)


def word_counts(texts: pa.ChunkedArray) -> np.ndarray:
    """Words of each text, parted by (ASCII) white space, float32 [n]; NaN where there is no text."""
    found = [np.zeros(0, np.float32)]
    for chunk in texts.chunks:
        for at in range(0, len(chunk), COUNTED):
            some = chunk.slice(at, COUNTED).cast(pa.large_string())
            offsets = np.frombuffer(some.buffers()[1], np.int64)[some.offset : some.offset + len(some) + 1]
            data = np.frombuffer(some.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
            letter = data > ord(" ")
            begins = letter.copy()
            begins[1:] &= ~letter[:-1]
            first = offsets[:-1] - offsets[0]
            first = first[first < len(data)]
            begins[first] = letter[first]  # a word ends with its text
            until = np.concatenate([[0], np.cumsum(begins)])
            count = np.diff(until[offsets - offsets[0]]).astype(np.float32)
            count[some.is_null().to_numpy(zero_copy_only=False)] = np.nan
            found.append(count)
    return np.concatenate(found)
