"""The selector on frozen features: it learns to tell captions that differ by one attribute, and how sure it may be."""

from __future__ import annotations

import itertools

import pytest
import torch

from models.language.contrastive import among_rivals, contrastive, matching
from models.language.selector import PRESETS, Selector

VALUES, ATTRIBUTES, WIDTH = 4, 3, 24


def toy():
    """All combinations of three attributes, with features of clip and caption that mix them differently."""
    g = torch.Generator().manual_seed(0)
    which = torch.tensor(list(itertools.product(range(VALUES), repeat=ATTRIBUTES)))  # 64 3
    tables = torch.randn(2, ATTRIBUTES, VALUES, WIDTH, generator=g)
    clip, caption = (sum(t[a, which[:, a]] for a in range(ATTRIBUTES)) for t in tables)
    held_out = which.sum(1) % VALUES == 0  # 16 combinations; each value of each attribute is seen in others
    return which, clip, caption, held_out, g


def one_off(which: torch.Tensor) -> torch.Tensor:
    """For each combination the others that differ by one attribute, [64, 9]."""
    apart = (which[:, None] != which[None]).sum(-1)
    return torch.stack([(row == 1).nonzero()[:, 0] for row in apart])


def test_captions_one_attribute_away_are_told_apart_on_combinations_never_seen():
    torch.manual_seed(0)
    which, clip, caption, held_out, g = toy()
    seen, rivals = (~held_out).nonzero()[:, 0], one_off(which)
    model = Selector(WIDTH, WIDTH, **PRESETS["tiny"])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.1)
    for _ in range(150):
        own = seen[torch.randint(len(seen), (32,), generator=g)].unique()
        rival = rivals[own, torch.randint(9, (len(own),), generator=g)]
        texts = torch.stack([caption[own], caption[rival]], dim=1)
        texts = texts + 0.1 * torch.randn(texts.shape, generator=g)
        v, t, scale = model(clip[own] + 0.1 * torch.randn(len(own), WIDTH, generator=g), texts)
        loss = contrastive(v, t[:, 0], scale) + matching(model.match, v, t[:, 0], scale, generator=g)
        loss = loss + among_rivals(v, t, torch.zeros(len(own), dtype=torch.long), scale)
        optimizer.zero_grad()
        (loss / len(own)).backward()
        optimizer.step()

    model.eval()
    with torch.no_grad():
        videos, texts, _ = model(clip[held_out], caption)
    places = held_out.nonzero()[:, 0]
    candidates = torch.cat([places[:, None], rivals[places]], dim=1)  # the right one and nine hard negatives
    order = model.best(videos, texts[candidates], again=0)
    assert (order[:, 0] == 0).float().mean() >= 0.95
    assert (model.best(videos, texts, again=0)[:, 0] == places).float().mean() >= 0.9  # of all 64


def test_the_best_are_put_in_order_by_the_head_and_the_others_by_cosine():
    torch.manual_seed(1)
    model = Selector(5, 6, dim=8, hidden=16).eval()
    videos, texts, _ = model(torch.randn(3, 4, 5), torch.randn(10, 6))
    assert videos.shape == (3, 8)  # of four frames
    order = model.best(videos, texts, again=4)
    for v, row in zip(videos, order, strict=True):
        cosine = torch.nn.functional.cosine_similarity(v[None], texts)
        near = cosine.argsort(descending=True)
        logits = model.match(v.expand(4, -1), texts[near[:4]])
        assert torch.equal(row, torch.cat([near[:4][logits.argsort(descending=True)], near[4:]]))
    each = model.best(videos, texts.expand(3, -1, -1), again=4)
    assert torch.equal(each, order)


def test_calibrated_probabilities_are_the_shares_of_pairs_that_belong_together():
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, generator=g)
    together = torch.rand(20_000, generator=g) < torch.sigmoid(0.6 * logits - 1.0)
    model = Selector(4, 4, **PRESETS["tiny"])
    model.calibrate(logits, together)
    torch.testing.assert_close(model.platt, torch.tensor([0.6, -1.0]), atol=0.06, rtol=0)
    p = model.probability(logits)
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        group = (p >= low) & (p < low + 0.2)
        assert abs(p[group].mean() - together[group].float().mean()) < 0.02
    model.calibrate(
        torch.tensor([-1.0, 1.0]), torch.tensor([False, True])
    )  # they separate: finite all the same
    assert model.platt.isfinite().all()
    model.calibrate(logits, ~together)  # worse than chance: the order of captions is not turned around
    p = model.probability(logits)
    assert 0 < model.platt[0] < 0.02
    assert p.mean().item() == pytest.approx((~together).float().mean().item(), abs=0.01)
    with pytest.raises(ValueError, match="give both"):
        model.calibrate(logits, torch.ones(20_000, dtype=torch.bool))


def test_it_begins_as_the_features_are_and_may_leave_texts_so():
    torch.manual_seed(0)
    video, text = torch.randn(5, 12), torch.randn(5, 3, 8)
    model = Selector(12, 8, dim=8, hidden=16, residual=True, texts=False)
    v, t, scale = model(video, text)
    assert torch.equal(v, video[:, :8])
    assert torch.equal(t, text)
    chosen = torch.tensor([0, 1, 2, 0, 1])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        v, t, scale = model(video, text)
        optimizer.zero_grad()
        among_rivals(v, t, chosen, scale).backward()
        optimizer.step()
    assert torch.equal(model(video, text)[1], text)
    assert not torch.equal(model(video, text)[0], video[:, :8])
    with pytest.raises(ValueError, match="lower dim"):
        Selector(12, 8, dim=10, residual=True)
    with pytest.raises(ValueError, match="residual: true"):
        Selector(12, 8, dim=8, texts=False)
