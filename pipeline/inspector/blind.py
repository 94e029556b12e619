"""Blind comparison of two writers of captions: pairs drawn by seed, sides by a coin, names hidden until the result.

A side is the name of a model; `chosen`, whatever the run chose; with `other:` before it, of the other run. Nothing is
remembered between a question and its answer but what its name says, so a server may be killed in between.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.inspector.index import Index
from pipeline.inspector.votes import Votes
from pipeline.recipe_schema import nearest

CHOSEN, OTHER = "chosen", "other:"
EVERY = 5  # answers
LOOKED_AT = 400  # clips, for one whose two captions differ


class NoPair(Exception):
    """There is nothing to compare; the message is a sentence."""


@dataclass(frozen=True)
class Pair:
    """Two captions of a clip, as they are shown."""

    name: str
    clip: str
    left: str  # texts
    right: str
    sides: tuple[str, str]  # who wrote them; not to be told


class Blind:
    """Comparisons over a run, and one beside it.

    Args:
        row: of a clip in the other run; none where it has no such clip.
    """

    def __init__(
        self,
        index: Index,
        votes: Votes,
        other: Index | None = None,
        row: Callable[[int], int | None] = lambda r: None,
    ):
        self.index, self.votes, self.other, self._row = index, votes, other, row
        self._orders: dict[tuple[str, str], np.ndarray] = {}
        self._verdicts: dict[
            tuple[str, str], tuple[int, bool]
        ] = {}  # at how many looks, and whether it was enough
        self._lock = threading.Lock()

    def sides(self) -> list[str]:
        """What may be compared."""
        found = [*self.index.models.rows, CHOSEN]
        if self.other is not None:
            found += [OTHER + name for name in (*self.other.models.rows, CHOSEN)]
        return found

    def check(self, a: str, b: str) -> tuple[str, str]:
        """The two, sorted. Raises NoPair."""
        for name in (a, b):
            if name not in self.sides():
                raise NoPair(
                    f"nothing called {name!r} writes captions here{nearest(name, self.sides())}; there are "
                    f"{', '.join(self.sides())}"
                )
        if a == b:
            raise NoPair(f"{a!r} cannot be compared with itself")
        return (a, b) if a < b else (b, a)

    def next(self, a: str, b: str, who: str, seed: int = 0) -> Pair:
        """A pair that this person has not answered: of those fewest people have, the first drawn. Raises NoPair."""
        a, b = self.check(a, b)
        answers = self.votes.ab((a, b))
        mine = {v["clip"] for v in answers if v["who"] == who}
        people = Counter(v["clip"] for v in answers)
        fewest = sorted((c for c in people if c not in mine), key=lambda c: people[c])
        looked = 0
        for row in self._drawn(a, b, seed).tolist():
            clip = self.index.ids[row].as_py()
            if clip in people:
                continue
            if (pair := self.pair(a, b, clip)) is not None:
                return pair
            looked += 1
            if looked > LOOKED_AT:
                break
        for clip in fewest:
            if (pair := self.pair(a, b, clip)) is not None:
                return pair
        raise NoPair(f"no clip is left on which {a} and {b} say different things")

    def _drawn(self, a: str, b: str, seed: int) -> np.ndarray:
        """Rows that have both, in the order they are asked about."""
        key = a, f"{b}\0{seed}"
        with self._lock:
            if key not in self._orders:
                mask = np.ones(len(self.index), bool)
                for side in (a, b):
                    if side in self.index.models.rows:
                        mask &= self.index.models[side]
                    elif side == CHOSEN:
                        mask &= self.index.model.codes >= 0
                digest = hashlib.sha256(f"{a}\0{b}\0{seed}".encode()).digest()
                rng = np.random.default_rng(int.from_bytes(digest[:8]))
                self._orders[key] = rng.permutation(np.flatnonzero(mask))
            return self._orders[key]

    def pair(self, a: str, b: str, clip: str) -> Pair | None:
        """As they are shown; none where one of them says nothing, or both the same."""
        row = self.index.row(clip)
        texts = [None if row is None else self._text(side, row) for side in (a, b)]
        if not texts[0] or not texts[1] or texts[0].split() == texts[1].split():
            return None
        digest = hashlib.sha256(f"{a}\0{b}\0{clip}".encode()).hexdigest()
        sides = (a, b) if int(digest[0], 16) % 2 else (b, a)
        left, right = (texts[0], texts[1]) if sides == (a, b) else (texts[1], texts[0])
        return Pair(f"{clip}.{_hash(a, b)}", clip, left, right, sides)

    def _text(self, side: str, row: int) -> str | None:
        index, at = self.index, row
        if side.startswith(OTHER) and side not in self.index.models.rows:
            found = self._row(row)
            if found is None or self.other is None:
                return None
            index, at, side = self.other, found, side.removeprefix(OTHER)
        if side == CHOSEN:
            return index.caption[at].as_py()
        return next((c["text"] for c in index.details(at)["captions"] or [] if c["model"] == side), None)

    def answer(self, name: str, answer: str, who: str) -> dict[str, Any]:
        """Keep an answer. Raises NoPair, StoreError."""
        if answer not in ("left", "right", "tie"):
            raise NoPair("answer: left, right or tie")
        clip, _, key = name.partition(".")
        sides = self.sides()
        both = next(((a, b) for a in sides for b in sides if a < b and _hash(a, b) == key), None)
        pair = self.pair(*both, clip) if both else None
        if pair is None:
            raise NoPair("there is no such pair; ask for another")
        left, right = pair.sides
        return self.votes.add(
            {"clip": clip, "kind": "ab", "left": left, "right": right, "answer": answer, "who": who}
        )

    def answers(self, a: str, b: str) -> list[tuple[str, str, str, float]]:
        """(clip, left, right, left's share of the win), as models.measures.captions.bradley_terry counts them."""
        share = {"left": 1.0, "right": 0.0, "tie": 0.5}
        return [
            (v["clip"], v["left"], v["right"], share[v["answer"]])
            for v in self.votes.ab((a, b))
            if v["answer"] in share
        ]

    def result(self, a: str, b: str) -> dict[str, Any]:
        """Scores with intervals, wins, and whether that is enough. Raises NoPair."""
        from models.measures.captions.bradley_terry import counted, enough, interval

        names = list(self.check(a, b))
        answers = self.answers(*names)
        said = enough(answers, names)
        rated = interval(answers, names)
        wins = counted(answers, names)[1]
        ties = sum(share == 0.5 for *_, share in answers)
        return {
            "models": [
                {"name": n, "score": rated[n].score, "low": rated[n].low, "high": rated[n].high}
                for n in names
            ],
            "wins": wins.tolist(),
            "ties": ties,
            "pairs": len(answers),
            "clips": len({clip for clip, *_ in answers}),
            "enough": said.enough,
            "why": said.why,
        }

    def enough(self, a: str, b: str) -> bool:
        """Whether to go on asking; looked at after every EVERY answers, as it takes a while."""
        from models.measures.captions.bradley_terry import enough

        names = self.check(a, b)
        answers = self.answers(*names)
        looks = len(answers) // EVERY
        if self._verdicts.get(names, (0, False))[0] != looks:
            self._verdicts[names] = looks, enough(answers, list(names)).enough
        return self._verdicts.get(names, (0, False))[1]


def _hash(a: str, b: str) -> str:
    return hashlib.sha256(f"{a}\0{b}".encode()).hexdigest()[:16]
