"""Bradley–Terry scores of blind comparisons, their intervals, and when there have been enough.

Bradley and Terry 1952: P(a beats b) = 1 / (1 + e^(b − a)) for scores a and b; a tie is half a win for each. Scores are
log odds: 0.4 apart is 60 : 40, 1.1 is 75 : 25. They add up to 0.

An answer is `(clip, a, b, share)`: two models were shown on a clip, and a got that share of the win: 1, ½ or 0.
Answers about one clip, by several people, are not independent, so what is drawn and counted is clips.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

Answer = tuple[str, str, str, float]

PRIOR = 0.5  # wins added both ways to each pair
SAME = 0.4  # log odds: models closer than 60 : 40 may be called alike


@dataclass(frozen=True)
class Rated:
    """A model's score and an interval for it, log odds against the average model."""

    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Enough:
    """Whether to go on asking, and why."""

    enough: bool
    why: str  # one sentence


def counted(answers: Sequence[Answer], models: Sequence[str] = ()) -> tuple[list[str], np.ndarray]:
    """Models, and wins float64 [n, n]: how often row beat column, ties half.

    Args:
        models: their order; others of the answers follow as they come.
    """
    names = list(dict.fromkeys([*models, *(m for _, a, b, _ in answers for m in (a, b))]))
    at = {name: i for i, name in enumerate(names)}
    wins = np.zeros((len(names), len(names)))
    for _, a, b, share in answers:
        wins[at[a], at[b]] += share
        wins[at[b], at[a]] += 1 - share
    return names, wins


def fit(wins: np.ndarray, prior: float = PRIOR) -> np.ndarray:
    """Scores float64 [n] that make the wins likeliest, adding up to 0.

    Args:
        wins: [n, n], how often row beat column; the diagonal is not looked at.
        prior: so many wins are added both ways to each pair. Of two models with ½ the difference is
            ln((w + ½) / (l + ½)), Haldane and Anscombe's estimate, finite where one always wins. With 0 it is the
            likeliest score itself; ValueError where that is not finite (no chain of wins both ways between all).
    """
    wins = _padded(wins, prior)
    n = len(wins)
    reach = (wins > 0) | np.eye(n, dtype=bool)
    for _ in range(n):
        reach = reach @ reach
    if not reach.all():
        raise ValueError(
            "these wins have no finite Bradley–Terry scores: some models never lost to others; give prior"
        )
    scores, games, won = np.zeros(n), wins + wins.T, wins.sum(1)
    for _ in range(100):  # Newton; the log likelihood is concave
        p = _chances(scores)
        step = np.linalg.pinv(_information(games, p)) @ (won - (games * p).sum(1))
        scores += step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-300))  # no further than e² at a time
        if np.abs(step).max(initial=0.0) < 1e-12:
            break
    return scores - scores.mean()


def interval(
    answers: Sequence[Answer],
    models: Sequence[str] = (),
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Rated]:
    """Score and interval of each model.

    The wider of two intervals: by Fisher information, which holds where every answer is of a clip of its own, and by
    drawing clips with replacement, which knows that answers about one clip go together but is blind where one model
    has always won.
    """
    names, wins = counted(answers, models)
    if not names:
        return {}
    scores = fit(wins)
    z = _normal_quantile(0.5 + level / 2)
    padded = _padded(wins, PRIOR)
    covariance = np.linalg.pinv(_information(padded + padded.T, _chances(scores)))
    half = z * np.sqrt(np.diag(covariance))
    low, high = scores - half, scores + half
    by_clip: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_clip[answer[0]].append(answer)
    if len(by_clip) > 1 and resamples:
        each = np.stack([counted(some, names)[1] for some in by_clip.values()])  # [clips, n, n]
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(len(each), np.full(len(each), 1 / len(each)), resamples)  # [resamples, clips]
        again = np.stack([fit(w) for w in np.tensordot(drawn, each, 1)])
        edges = np.quantile(again, [0.5 - level / 2, 0.5 + level / 2], axis=0)
        low, high = np.minimum(low, edges[0]), np.maximum(high, edges[1])
    rows = zip(names, scores, low, high, strict=True)
    return {name: Rated(float(s), float(a), float(b)) for name, s, a, b in rows}


def enough(
    answers: Sequence[Answer], models: Sequence[str], error: float = 0.05, same: float = SAME
) -> Enough:
    """Whether the comparisons tell the models apart, or show that they are alike.

    Looked at after every answer, a 95 % interval excludes 0 sooner or later, whatever is true. So each pair is
    decided by `evidence`, which may be looked at as often as one likes; with several pairs each gets its share of
    `error`. A pair is alike when the interval of its difference, at 1 − error, lies within ±same.
    """
    pairs = list(combinations(models, 2))
    least, said, open_pairs = len(pairs) / error, [], []
    for a, b in pairs:
        its = [x for x in answers if {x[1], x[2]} == {a, b}]
        shares = _clip_shares(its, a)
        if evidence(shares) >= least:
            better, worse = (a, b) if np.mean(shares) > 0.5 else (b, a)
            said.append(f"{better} is better than {worse}")
            continue
        rated = interval(its, (a, b), 1 - error / len(pairs), 200)
        if 2 * max(abs(rated[a].low), abs(rated[a].high)) <= same:  # a = −b: the difference is twice a
            said.append(f"{a} and {b} are alike, closer than {100 / (1 + np.exp(-same)):.0f} : "
                        f"{100 / (1 + np.exp(same)):.0f}")  # fmt: skip
        else:
            open_pairs.append(f"{a} and {b} after {len(shares)} clips")
    if open_pairs:
        return Enough(False, f"not told apart yet: {', '.join(open_pairs)}")
    return Enough(bool(pairs), "; ".join(said) or "there is nothing to compare")


def evidence(shares: Sequence[float]) -> float:
    """How much better than a fair coin a bet on one side does: ≥ 1/α rejects 'the two are alike' at level α, any time.

    Args:
        shares: of the win, a clip each, 0 to 1.

    Under a mean of ½ the product of 1 + λ(2x − 1) is a martingale for every λ in (−1, 1), and so is its mean over λ
    (Robbins 1970; Waudby-Smith and Ramdas 2024, arXiv:2010.09686); λ is drawn as sin of an even angle, which for 0
    and 1 gives the beta-binomial mixture with Beta(½, ½).
    """
    angles = (np.arange(512) + 0.5) * np.pi / 512 - np.pi / 2
    bets = np.sin(angles)
    x = 2 * np.asarray(shares, np.float64) - 1
    logs = sum((np.log1p(bets * v) for v in x), np.zeros(len(bets)))
    return float(np.exp(np.logaddexp.reduce(logs) - np.log(len(bets))))


def _clip_shares(answers: Sequence[Answer], model: str) -> list[float]:
    """Of each clip the model's mean share of the win."""
    shares: dict[str, list[float]] = defaultdict(list)
    for clip, a, _, share in answers:
        shares[clip].append(share if a == model else 1 - share)
    return [float(np.mean(some)) for some in shares.values()]


def _padded(wins: np.ndarray, prior: float) -> np.ndarray:
    return (np.asarray(wins, np.float64) + prior) * (1 - np.eye(len(wins)))


def _chances(scores: np.ndarray) -> np.ndarray:
    """P(row beats column), [n, n]."""
    return 1 / (1 + np.exp(scores[None, :] - scores[:, None]))


def _information(games: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Fisher information [n, n] of the scores; singular, since only differences matter."""
    each = games * p * (1 - p)
    return np.diag(each.sum(1)) - each


def _normal_quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)
