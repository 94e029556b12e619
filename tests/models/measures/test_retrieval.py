"""Places and recall, against a sort done by hand."""

import numpy as np

from models.measures.retrieval import ranks, recall


def test_places_are_those_of_a_stable_sort_of_unlike_scores():
    rng = np.random.default_rng(0)
    scores = rng.permutation(30 * 20).reshape(30, 20).astype(float)
    relevant = [sorted(rng.choice(20, size=rng.integers(1, 4), replace=False).tolist()) for _ in range(30)]
    found = ranks(scores, relevant)
    for row, right, place in zip(scores, relevant, found, strict=True):
        order = np.argsort(-row).tolist()
        assert place == 1 + min(order.index(i) for i in right)


def test_equal_scores_count_against_the_query():
    assert ranks(np.array([[1.0, 1.0, 1.0, 0.0]]), [[0]]).tolist() == [3]
    assert ranks(np.array([[1.0, 1.0, 1.0, 0.0]]), [[0, 2]]).tolist() == [2]  # one other is as high
    assert ranks(np.zeros((1, 10)), [[4]]).tolist() == [10]  # a model that says nothing finds nothing


def test_recall_is_the_share_within_k():
    places = np.array([1, 2, 5, 6, 11])
    assert [recall(places, k) for k in (1, 5, 10)] == [0.2, 0.6, 0.8]
