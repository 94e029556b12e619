"""What a run's captioners did: how often each is picked, scored, flagged, what it costs, and which of them to keep.

Files are gone over once, a few at a time; of each clip there stay some numbers. What looks at the words themselves
(agreement, vocabulary, references) looks at SAMPLE clips, those of the smallest ids, which are hashes.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from models.measures.student_t import quantile
from pipeline.caption.choose import best, weights
from pipeline.decide.columns import check_choice
from pipeline.decide.rules import META
from pipeline.faults import StoreError
from pipeline.layers import Layered, read_ahead, unit_of
from pipeline.recipe_choose import Choose
from pipeline.recipe_schema import RecipeError, nearest

SAMPLE = 10_000  # clips
LEVEL = 0.95  # of intervals
AHEAD = 8  # files of clips in memory
VOTES = "votes"


@dataclass
class Mean:
    """A mean and its interval, where values of one source go together.

    Cluster-robust variance (Liang and Zeger 1986) with t of one degree of freedom less than there are sources, since
    few of them say little of how sources differ.
    """

    n: int = 0
    total: float = 0.0
    groups: int = 0
    _ss: float = 0.0  # Σ over sources of (sum)², sum · count, count²
    _sn: float = 0.0
    _nn: float = 0.0

    def add(self, sums: Mapping[str, tuple[int, float]]) -> None:
        """Args: sums: of each source, which was not here before, count and sum of its values."""
        for n, s in sums.values():
            self.n, self.total, self.groups = self.n + n, self.total + s, self.groups + 1
            self._ss, self._sn, self._nn = self._ss + s * s, self._sn + s * n, self._nn + n * n

    def told(self) -> dict[str, float | int | None]:
        """mean, low, high (None of a single source) and clips."""
        if not self.n:
            return {"mean": None, "low": None, "high": None, "clips": 0}
        mean = self.total / self.n
        squares = max(0.0, self._ss - 2 * mean * self._sn + mean * mean * self._nn)
        half = math.nan
        if self.groups > 1:
            t = quantile(0.5 + LEVEL / 2, self.groups - 1)
            half = t * math.sqrt(squares * self.groups / (self.groups - 1)) / self.n
        low, high = (None, None) if math.isnan(half) else (mean - half, mean + half)
        return {"mean": mean, "low": low, "high": high, "clips": self.n}


@dataclass
class Captioner:
    """What one of them did."""

    outcomes: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    cost: Counter[str] = field(default_factory=Counter)
    picked: int = 0
    scores: dict[str, Mean] = field(default_factory=lambda: defaultdict(Mean))
    words: Mean = field(default_factory=Mean)


class Captioners:
    """The numbers of a run. Raises StoreError where a file of it cannot be read.

    Args:
        choose: how a caption is picked.
        reference: what captions are compared with: a model, 'meta.KEY' of the list; none: nothing.
        cover: the score by which a caption is good, or 'votes'; none: what `choose` goes by.
        least: from which score on it is good; none: the median of the clips' best.
        votes: of clips that people voted on, the models that they called best, for cover 'votes'.
    """

    def __init__(
        self,
        clips: Layered,
        choose: Choose,
        reference: str | None = None,
        cover: str | None = None,
        least: float | None = None,
        votes: Mapping[str, Sequence[str]] | None = None,
    ):
        self.clips, self.choose, self.reference, self.votes = clips, choose, reference, votes or {}
        self.cover = cover or (
            choose.method
            if choose.method not in ("order", "weights")
            else next(iter(choose.weights), "consensus")
        )
        self.least = least
        self.models: dict[str, Captioner] = defaultdict(Captioner)
        self.total = 0
        self._covered: list[tuple[list[str], np.ndarray]] = []
        self._sample: list[tuple[int, dict[str, str], str]] = []  # a heap: −id, texts by model, reference
        self._meta: set[str] = set()
        wanted = ["clip_id", "source", "captions", *(["meta"] if self._by_meta else [])]
        # captions are most of a run's bytes: few files at a time
        for _, table in read_ahead(lambda name: clips.read(name, wanted), clips.files, AHEAD):
            self._add(table.to_pylist())
        self._check()

    @property
    def _by_meta(self) -> bool:
        return bool(self.reference and self.reference.startswith(META))

    def _add(self, rows: list[dict[str, Any]]) -> None:
        """The clips of a file."""
        self.total += len(rows)
        sums: dict[tuple[str, str], dict[str, tuple[int, float]]] = defaultdict(dict)

        def note(model: str, name: str, source: str, value: float) -> None:
            n, s = sums[model, name].get(source, (0, 0.0))
            sums[model, name][source] = n + 1, s + value

        covered: list[dict[str, float]] = []
        for row in rows:
            captions, source = row["captions"] or [], row["source"]
            pick = best(captions, self.choose)
            covered.append({})
            for i, c in enumerate(captions):
                mine, model = self.models[c["model"]], c["model"]
                mine.outcomes[c["outcome"]] += 1
                mine.picked += i == pick
                mine.flags.update(set(c["flags"] or ()))
                mine.cost.update(dict(c["cost"] or ()))
                scores = dict(c["scores"] or ())
                for name, value in scores.items():
                    note(model, name, source, value)
                if c["text"]:
                    note(model, "words", source, len(c["text"].split()))
                    covered[-1][model] = scores.get(self.cover, math.nan)
            self._draw(row, captions)
        for (model, name), of_sources in sums.items():
            mine = self.models[model]
            (mine.words if name == "words" else mine.scores[name]).add(of_sources)
        names = list(self.models)
        found = np.array([[c.get(m, math.nan) for m in names] for c in covered], np.float32)
        self._covered.append((names, found.reshape(len(rows), len(names))))

    def _draw(self, row: dict[str, Any], captions: list[dict[str, Any]]) -> None:
        """Take a clip into the sample, in place of that with the largest id where it is full."""
        key = -int(row["clip_id"], 16)
        if self._by_meta:
            meta = dict(row["meta"] or ())
            self._meta |= meta.keys()
        if len(self._sample) == SAMPLE and key <= self._sample[0][0]:
            return
        texts = {c["model"]: c["text"] for c in captions if c["text"]}
        if self._by_meta:
            said = meta.get(str(self.reference).removeprefix(META), "")
        else:
            said = texts.get(self.reference or "", "")
        put = heapq.heappushpop if len(self._sample) == SAMPLE else heapq.heappush
        put(self._sample, (key, texts, said))

    def _check(self) -> None:
        if not self.models:
            raise StoreError(f"{self.clips.store.uri} has no captions: add some with clipmill caption")
        scores = sorted({name for mine in self.models.values() for name in mine.scores})
        if self.cover != VOTES and self.cover not in scores:
            raise RecipeError(
                f"no caption has the score {self.cover!r}{nearest(self.cover, scores)}; they have "
                f"{', '.join(scores) or 'none'}"
            )
        check_choice(self.choose, list(self.models), scores)
        known = [META + key for key in sorted(self._meta)] if self._by_meta else sorted(self.models)
        if self.reference and self.reference not in known:
            raise RecipeError(
                f"no clip has the reference {self.reference!r}{nearest(self.reference, known)}; give one of "
                f"{', '.join(known) or '(the list has no columns)'}"
            )

    def told(self) -> dict[str, Any]:
        """All of it as plain data, for JSON."""
        seconds, layers = _seconds(self.clips), {layer.name for layer in self.clips.layers}
        against = self._against()
        models = []
        for name, mine in self.models.items():
            texts = [texts[name] for _, texts, _ in sorted(self._sample, reverse=True) if name in texts]
            said = sum(mine.outcomes.values())
            models.append(
                {
                    "model": name,
                    "layer": f"caption:{name}" in layers,
                    "clips": said,
                    "outcomes": dict(mine.outcomes.most_common()),
                    "picked": mine.picked,
                    "pick_rate": mine.picked / self.total,
                    "scores": {k: m.told() for k, m in sorted(mine.scores.items())},
                    "words": mine.words.told(),
                    "flags": {k: n / said for k, n in mine.flags.most_common()},
                    "seconds_a_clip": seconds.get(f"caption:{name}"),
                    "cost": dict(mine.cost),
                    **_said(texts),
                    **({"against": against[name]} if name in against else {}),
                }
            )
        models.sort(key=lambda m: -m["picked"])
        return {
            "run": self.clips.store.uri,
            "clips": self.total,
            "sample": len(self._sample),
            "chosen_by": self.choose.method,
            "models": models,
            "judges": {k.partition(":")[2]: s for k, s in seconds.items() if k.startswith("judge:")},
            "agreement": self._agreement([m["model"] for m in models]),
            "reference": self.reference,
            "cover": self._set_cover(),
        }

    def _agreement(self, names: list[str]) -> dict[str, Any]:
        """Mean similarity (as of `consensus`) of each two captioners' texts, where both say something."""
        total, count = np.zeros((len(names),) * 2), np.zeros((len(names),) * 2)
        for _, texts, _ in self._sample:
            vectors = {i: weights(texts[name]) for i, name in enumerate(names) if name in texts}
            for i, j in combinations(vectors, 2):
                u, v = vectors[i], vectors[j]
                total[i, j] += math.fsum(u[g] * v[g] for g in u.keys() & v.keys())
                count[i, j] += 1
        both = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        matrix = [
            [
                None if i == j or math.isnan(x := both[min(i, j), max(i, j)]) else float(x)
                for j in range(len(names))
            ]
            for i in range(len(names))
        ]
        return {"models": names, "mean_similarity": matrix}

    def _against(self) -> dict[str, dict[str, float]]:
        """CIDEr-D, BLEU-4 and ROUGE-L of each model on the sample's clips that have a reference; silence scores 0."""
        from models.measures.captions.bleu import bleu
        from models.measures.captions.cider import cider_d
        from models.measures.captions.rouge_l import rouge_l

        pairs = [(texts, [said]) for _, texts, said in sorted(self._sample, reverse=True) if said]
        references = [its for _, its in pairs]
        found = {}
        for name in self.models if pairs else ():
            if name == self.reference:
                continue
            candidates = [texts.get(name, "") for texts, _ in pairs]
            found[name] = {
                "clips": len(pairs),
                "cider_d": float(np.mean(cider_d(candidates, references))),
                "bleu_4": bleu(candidates, references)[-1],
                "rouge_l": float(np.mean([rouge_l(*x) for x in zip(candidates, references, strict=True)])),
            }
        return found

    def _set_cover(self) -> dict[str, Any]:
        from models.measures.captions.set_cover import greedy

        names = list(self.models)
        patterns: Counter[int] = Counter()
        least = self.least
        if self.cover == VOTES:
            for models in self.votes.values():
                patterns[sum(1 << i for i, name in enumerate(names) if name in models)] += 1
        else:
            if least is None:
                tops = [np.fmax.reduce(x, 1) for _, x in self._covered if x.size]
                every = np.concatenate([t[~np.isnan(t)] for t in tops]) if tops else np.zeros(0)
                least = float(np.median(every)) if len(every) else 0.0
            for _, x in self._covered:  # later files may know more models, never in another order
                bits = (x >= least) @ np.array([1 << i for i in range(x.shape[1])], object)
                patterns.update(Counter(bits.tolist()) if x.size else {0: len(x)})
        n = patterns.total()
        steps = [
            {"model": s.model, "alone": s.alone / n, "adds": s.adds / n, "covered": s.covered / n}
            for s in greedy(patterns, names)
        ]
        return {"by": self.cover, "least": least, "clips": n, "steps": steps}


def _said(texts: list[str]) -> dict[str, Any]:
    """How various they are."""
    from models.measures.captions.diversity import distinct_n, self_bleu, vocabulary

    return {
        "vocabulary": vocabulary(texts),
        "distinct_2": distinct_n(texts, 2),
        "self_bleu": self_bleu(texts),
        "same": 1 - len(set(texts)) / len(texts) if texts else None,
    }


def _seconds(clips: Layered) -> dict[str, float]:
    """Mean seconds a clip of every captioner and judge: of those that ran in `curate` from its sources' account."""
    store = clips.store
    total: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)

    def note(rows: Iterable[tuple[str, float, int]]) -> None:
        for stage, seconds, n in rows:
            total[stage] += seconds
            count[stage] += n

    names = ["videos/" + name.removeprefix("clips/") for name in clips.files]
    for _, table in read_ahead(lambda name: store.read_table(name, ["seconds", "clips"]), names):
        for row in table.to_pylist():
            its = [(k, s) for k, s in row["seconds"] or [] if k.startswith(("caption:", "judge:"))]
            note((k, s, row["clips"] or 0) for k, s in its)
    for name, over in clips.over.items():
        for layer in over:
            if layer.captions or layer.judges:
                its = store.read_table(f"{layer.folder}/{unit_of(name)}.parquet", ["seconds"])["seconds"]
                note([(layer.name, math.fsum(its.drop_null().to_pylist()), len(its) - its.null_count)])
    return {stage: total[stage] / count[stage] for stage in total if count[stage]}
