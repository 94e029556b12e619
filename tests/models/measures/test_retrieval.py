"""Places of right answers, against a sort done by hand."""

import torch

from models.measures.retrieval import places, recall


def test_places_are_those_of_a_sort_of_unlike_scores():
    draw = torch.Generator().manual_seed(0)
    scores = torch.randperm(30 * 20, generator=draw).view(30, 20).float()
    right = torch.rand(30, 20, generator=draw) < 0.1
    right[:, 3] = True
    for row, own, place in zip(scores, right, places(scores, right), strict=True):
        order = row.argsort(descending=True).tolist()
        assert place == 1 + min(order.index(i) for i in own.nonzero()[:, 0].tolist())


def test_equal_scores_count_against_the_query():
    own = torch.tensor([[True, False, False, False]])
    assert places(torch.tensor([[1.0, 1.0, 1.0, 0.0]]), own).tolist() == [3]
    assert places(torch.tensor([[1.0, 1.0, 1.0, 0.0]]), own | own.roll(2)).tolist() == [
        2
    ]  # one other is as high
    assert places(torch.zeros(1, 4), own).tolist() == [4]  # a model that says nothing finds nothing


def test_what_is_no_number_is_never_found():
    own = torch.tensor([[True, False, False]])
    assert places(torch.full((1, 3), torch.nan), own).tolist() == [3]
    assert places(torch.tensor([[torch.nan, 1.0, 2.0]]), own).tolist() == [3]
    assert places(torch.tensor([[1.0, torch.nan, 0.0]]), own).tolist() == [1]


def test_recall_is_the_share_within_k():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    right = torch.tensor(
        [[True, False, False], [False, True, False], [False, False, True], [False, False, True]]
    )
    assert [recall(scores, right, k) for k in (1, 2, 3)] == [0.25, 0.5, 1.0]
