from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from models.measures.captions.bradley_terry import counted, enough, evidence, fit, interval


def answers(shares, a="a", b="b"):
    return [(f"clip {i}", a, b, s) for i, s in enumerate(shares)]


def test_of_two_models_the_difference_is_the_log_odds():
    wins = np.array([[0, 30], [10, 0]])
    assert np.subtract(*fit(wins, prior=0)) == pytest.approx(math.log(3))
    assert np.subtract(*fit(wins)) == pytest.approx(math.log(30.5 / 10.5))
    assert fit(wins).sum() == pytest.approx(0)


def test_scores_are_the_likeliest_ones_as_a_general_optimiser_finds_them():
    rng = np.random.default_rng(0)
    true = np.array([0.0, 1.0, -0.5, 2.0])
    games = rng.integers(5, 40, (4, 4))
    wins = rng.binomial(games, 1 / (1 + np.exp(true[None] - true[:, None]))) * (1 - np.eye(4))

    def loss(scores):
        return (wins * np.log1p(np.exp(scores[None] - scores[:, None]))).sum()

    theirs = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-9}).x
    assert fit(wins, prior=0) == pytest.approx(theirs - theirs.mean(), abs=1e-5)


def test_a_tie_is_half_a_win_each_and_sides_do_not_matter():
    names, wins = counted([("1", "a", "b", 1), ("2", "b", "a", 0.5), ("3", "b", "a", 0)])
    assert names == ["a", "b"]
    assert wins.tolist() == [[0, 2.5], [0.5, 0]]


def test_one_that_always_wins_has_a_finite_score_or_with_no_prior_a_sentence():
    wins = np.array([[0, 9], [0, 0]])
    assert np.subtract(*fit(wins)) == pytest.approx(math.log(9.5 / 0.5))
    with pytest.raises(ValueError, match="no finite"):
        fit(wins, prior=0)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    true = np.array([0.6, 0.0, -0.6])
    held = []
    for _ in range(60):
        pairs = rng.permuted(np.tile(np.arange(3), (120, 1)), axis=1)[:, :2]
        won = rng.random(120) < 1 / (1 + np.exp(true[pairs[:, 1]] - true[pairs[:, 0]]))
        asked = [
            (str(i), "abc"[a], "abc"[b], float(w))
            for i, ((a, b), w) in enumerate(zip(pairs, won, strict=True))
        ]
        found = interval(asked, "abc", resamples=100)
        held += [found[m].low <= t <= found[m].high for m, t in zip("abc", true, strict=True)]
    assert np.mean(held) >= 0.9


def test_many_answers_about_few_clips_count_as_few():
    shares = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    once = answers(shares)
    ten_people = [x for x in once for _ in range(10)]
    width = {name: found["a"].high - found["a"].low for name, found in
             {"once": interval(once), "ten": interval(ten_people)}.items()}  # fmt: skip
    by_fisher_alone = interval(ten_people, resamples=0)["a"]
    assert width["ten"] > 0.6 * width["once"]
    assert by_fisher_alone.high - by_fisher_alone.low < 0.5 * width["ten"]


def test_evidence_is_the_beta_binomial_mixture():
    from scipy.special import betaln

    for won, lost in ((0, 0), (5, 0), (9, 3), (40, 60)):
        exact = math.exp(betaln(won + 0.5, lost + 0.5) - betaln(0.5, 0.5) + (won + lost) * math.log(2))
        assert evidence([1.0] * won + [0.0] * lost) == pytest.approx(exact, rel=1e-6)


def test_looking_after_every_answer_calls_equals_different_no_more_often_than_said():
    rng = np.random.default_rng(0)
    angles = (np.arange(64) + 0.5) * np.pi / 64 - np.pi / 2
    false, naive = 0, 0
    for _ in range(400):
        x = rng.choice([-1.0, 0.0, 1.0], 300, p=[0.4, 0.2, 0.4])  # with ties
        logs = np.cumsum(np.log1p(np.sin(angles)[None] * x[:, None]), 0)
        false += bool((np.exp(logs).mean(1) >= 20).any())
        t = np.cumsum(x) / np.sqrt(0.8 * np.arange(1, 301))
        naive += bool((np.abs(t[10:]) > 1.96).any())
    assert false / 400 <= 0.05
    assert naive / 400 > 0.15  # what an interval looked at each time would have done


def test_it_ends_when_told_apart_or_alike_and_says_which():
    assert not enough([], ["a", "b"]).enough
    assert not enough(answers([1.0] * 5), ["a", "b"]).enough
    done = enough(answers([1.0] * 12), ["a", "b"])
    assert done.enough
    assert done.why == "a is better than b"
    assert enough(answers([0.0] * 12, "b", "a"), ["a", "b"]).why == "a is better than b"
    alike = enough(answers([0.0, 1.0] * 300), ["a", "b"])
    assert alike.enough
    assert alike.why == "a and b are alike, closer than 60 : 40"
    third = enough(answers([1.0] * 20), ["a", "b", "c"])
    assert not third.enough
    assert third.why == "not told apart yet: a and c after 0 clips, b and c after 0 clips"
    assert not enough([("one clip", "a", "b", 1.0)] * 50, ["a", "b"]).enough
