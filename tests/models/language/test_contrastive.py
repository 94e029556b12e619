"""Losses of selectors against the formulas written out, over ranks, and in two passes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from models.language.contrastive import (
    LogitScale,
    among_rivals,
    contrastive,
    feature_gradients,
    hard_negatives,
    matching,
    surrogate,
)

N, K, D = 6, 3, 5


def features(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*shape, D, generator=g, dtype=torch.float64).float() for shape in ((N,), (N,), (N, K))
    )


def cosine(a, b) -> float:
    return float(a @ b / a.norm() / b.norm())


def test_contrastive_is_the_mean_of_both_directions_written_out():
    v, t, _ = features()
    expected = 0.0
    for i in range(N):
        by_video = sum(math.exp(7 * cosine(v[i], t[j])) for j in range(N))
        by_text = sum(math.exp(7 * cosine(v[j], t[i])) for j in range(N))
        expected -= 7 * cosine(v[i], t[i]) - (math.log(by_video) + math.log(by_text)) / 2
    assert contrastive(v, t, 7.0).item() == pytest.approx(expected, rel=1e-5)
    assert contrastive(3 * v, t / 5, 7.0).item() == pytest.approx(expected, rel=1e-5)


def test_equal_captions_are_not_each_others_negatives():
    v, t, _ = features()
    t[1] = t[0]
    same = torch.tensor([0, 0, 2, 3, 4, 5])
    got = contrastive(v, t, 7.0, same=same)
    expected = 0.0
    for i in range(N):
        keys = [j for j in range(N) if j == i or same[j] != same[i]]
        expected -= 7 * cosine(v[i], t[i])
        expected += math.log(sum(math.exp(7 * cosine(v[i], t[j])) for j in keys)) / 2
        expected += math.log(sum(math.exp(7 * cosine(v[j], t[i])) for j in keys)) / 2
    assert got.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("own", "others"), [(1.0, 0.01), (0.5, 0.1)])
def test_rivals_and_captions_of_other_videos_have_their_weights(own, others):
    """Panda-70M's are 1 and a hundredth."""
    v, _, texts = features()
    chosen = torch.tensor([0, 1, 2, 0, 1, 2])
    there = torch.ones(N, K, dtype=torch.bool)
    there[0, 2] = there[3, 1] = False
    expected = 0.0
    for i in range(N):
        right = math.exp(4 * cosine(v[i], texts[i, chosen[i]]))
        below = right
        for j in range(N):
            for k in range(K):
                if there[j, k] and (j, k) != (i, int(chosen[i])):
                    below += (own if i == j else others) * math.exp(4 * cosine(v[i], texts[j, k]))
        expected -= math.log(right / below)
    got = among_rivals(v, texts, chosen, 4.0, there=there, own=own, others=others)
    assert got.item() == pytest.approx(expected, rel=1e-5)
    if own == 1.0:
        assert got == among_rivals(v, texts, chosen, 4.0, there=there)


def test_negatives_are_drawn_by_similarity_and_never_a_positive():
    similarity = torch.tensor([[9.0, 1.0, 0.0, 2.0]])
    positive = torch.tensor([[True, False, False, False]])
    g = torch.Generator().manual_seed(0)
    drawn = hard_negatives(similarity.expand(20_000, -1), positive.expand(20_000, -1), g)
    share = torch.bincount(drawn, minlength=4) / 20_000
    expected = torch.tensor([-math.inf, 1.0, 0.0, 2.0]).softmax(0)
    assert share[0] == 0
    torch.testing.assert_close(share, expected, atol=0.015, rtol=0)
    with pytest.raises(ValueError, match="no negative"):
        hard_negatives(similarity, torch.ones(1, 4, dtype=torch.bool))


def test_negatives_by_given_uniforms_are_the_inverse_of_the_distribution_function():
    similarity = torch.tensor([[9.0, 1.0, 0.0, 2.0, 9.0]])
    positive = torch.tensor([[True, False, False, False, True]])
    uniform = torch.linspace(0, 1, 10_001)
    drawn = hard_negatives(similarity.expand(10_001, -1), positive.expand(10_001, -1), uniform=uniform)
    assert set(drawn.tolist()) == {1, 2, 3}
    share = torch.bincount(drawn, minlength=5) / 10_001
    expected = torch.tensor([-math.inf, 1.0, 0.0, 2.0, -math.inf]).softmax(0)
    torch.testing.assert_close(share, expected, atol=1e-3, rtol=0)
    ends = hard_negatives(similarity.expand(2, -1), positive.expand(2, -1), uniform=torch.tensor([0.0, 1.0]))
    assert ends.tolist() == [1, 3]


class Match(nn.Module):
    """Logits of pairs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(2 * D, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, v, t):
        return self.net(torch.cat([v, t], dim=-1))[:, 0]


DRAW = torch.tensor([1, 0, 4, 5, 2, 3]), torch.tensor([3, 2, 1, 0, 5, 4])


def test_matching_is_three_binary_cross_entropies_a_pair():
    v, t, _ = features()
    match = Match()
    expected = torch.zeros(())
    for i in range(N):
        expected = expected - F.logsigmoid(match(v[i : i + 1], t[i : i + 1]))[0]
        expected = expected - F.logsigmoid(-match(v[i : i + 1], t[DRAW[0][i]][None]))[0]
        expected = expected - F.logsigmoid(-match(v[DRAW[1][i]][None], t[i : i + 1]))[0]
    torch.testing.assert_close(matching(match, v, t, 1.0, draw=DRAW), expected)


def test_matching_draws_neither_the_pair_itself_nor_one_of_the_same_caption():
    v, t, _ = features()
    seen = []

    def match(videos, texts):
        seen.append((videos, texts))
        return videos.sum(-1) * 0

    same = torch.tensor([0, 0, 2, 3, 4, 5])
    for seed in range(50):
        matching(match, v, t, 1.0, same=same, generator=torch.Generator().manual_seed(seed))
    for videos, texts in seen:
        for i in range(N, 3 * N):
            a = next(j for j in range(N) if torch.equal(videos[i], v[j]))
            b = next(j for j in range(N) if torch.equal(texts[i], t[j]))
            assert same[a] != same[b]


def test_the_logit_scale_stops_at_100_and_comes_back():
    scale = LogitScale(200.0)
    assert scale().item() == pytest.approx(100.0, rel=1e-5)
    (-scale()).backward()  # wants it greater
    assert scale.log.grad == 0
    scale.log.grad = None
    scale().backward()
    assert scale.log.grad.item() == pytest.approx(100.0, rel=1e-5)
    free = LogitScale()
    assert free().item() == pytest.approx(1 / 0.07, rel=1e-5)
    (-free()).backward()
    assert free.log.grad.item() == pytest.approx(-1 / 0.07, rel=1e-5)


# ---------------------------------------------------------------- over ranks


class Model(nn.Module):
    """Two towers, a scale and a matching head."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(2)
        self.video = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, D))
        self.text = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, D))
        self.scale, self.match = LogitScale(5.0), Match()

    def forward(self, v, t, texts):
        return self.video(v), self.text(t), self.text(texts), self.scale()


def total(model, v, t, texts, scale, group=None, rows=slice(None)):
    chosen, draw = torch.tensor([0, 1, 2, 0, 1, 2])[rows], tuple(d[rows] for d in DRAW)
    same = torch.tensor([0, 0, 2, 3, 4, 0])[rows]
    there = torch.ones(N, K, dtype=torch.bool)[rows]
    return (
        contrastive(v, t, scale, group, same)
        + among_rivals(v, texts, chosen, scale, group, there)
        + matching(model.match, v, t, scale, group, draw=draw)
    ) / N


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    try:
        model, rows = Model(), slice(rank * N // 2, (rank + 1) * N // 2)
        group = dist.group.WORLD
        outs = model(*(x[rows] for x in features()))
        loss = total(model, *outs, group=group, rows=rows)
        loss.backward()
        every = {n: p.grad for n, p in model.named_parameters()} | {"loss": loss.detach()}
        for x in every.values():
            dist.all_reduce(x)
        if rank == 0:
            torch.save(every, f"{folder}/got.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_have_the_loss_and_the_gradients_of_one(tmp_path: Path):
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    got = torch.load(tmp_path / "got.pt")
    model = Model()
    loss = total(model, *model(*features()))
    loss.backward()
    torch.testing.assert_close(got.pop("loss"), loss.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, atol=1e-6, rtol=1e-5)
        assert p.grad.abs().max() > 1e-4, name


def test_two_passes_over_micro_batches_have_the_gradients_of_one_pass_dropout_too():
    model = Model(dropout=0.5)
    chunks = [tuple(x[i : i + 2] for x in features()) for i in range(0, N, 2)]

    def encoded(i):
        torch.manual_seed(i)
        return model(*chunks[i])

    loss, gradients = None, None
    with torch.no_grad():
        first = [encoded(i) for i in range(3)]
    loss, gradients = feature_gradients(first, lambda *each: total(model, *each))
    for i in range(3):
        surrogate(encoded(i), gradients[i]).backward()
    v, t = (torch.cat([part[j] for part in first]) for j in range(2))
    (
        matching(model.match, v, t, 1.0, draw=DRAW) / N
    ).backward()  # what the loss asks of the head's own weights
    got = {n: p.grad for n, p in model.named_parameters()}

    model.zero_grad(set_to_none=True)
    parts = [encoded(i) for i in range(3)]
    joined = [torch.cat([part[j] for part in parts]) for j in range(3)]
    expected = total(model, *joined, parts[0][3])
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, atol=1e-6, rtol=1e-5)
