"""Positions of M-RoPE, the rule written out; that they are transformers' own is in test_qwen_vl.py."""

from __future__ import annotations

import pytest
import torch

from models.language.positions import Grid, multimodal, packed


def test_a_clip_takes_time_row_and_column_and_text_goes_on_behind_its_sides():
    """Of 2 times, 2 rows and 3 columns: what follows begins 3 places on."""
    got = multimodal(2 + 12 + 2, [Grid(2, 2, 2, 3)])
    expected = [[0] * 3, [1] * 3]
    expected += [[2 + t, 2 + h, 2 + w] for t in range(2) for h in range(2) for w in range(3)]
    expected += [[5] * 3, [6] * 3]
    assert got.T.tolist() == expected


def test_times_lie_as_far_apart_as_they_are_told():
    """1.3 places a time, rounded down as the published models do."""
    got = multimodal(4, [Grid(0, 4, 1, 1, step=1.3)])
    assert got[0].tolist() == [0, 1, 2, 3]
    assert multimodal(4, [Grid(0, 4, 1, 1, step=2.5)])[0].tolist() == [0, 2, 5, 7]


def test_text_alone_counts_and_packed_documents_begin_anew():
    assert torch.equal(multimodal(7), torch.arange(7).expand(3, -1))
    grids = [Grid(1, 1, 2, 2), Grid(9, 2, 1, 2)]
    got = packed([7, 8], grids, 18)
    assert torch.equal(got[:, :7], multimodal(7, grids[:1]))
    assert torch.equal(got[:, 7:15], multimodal(8, [Grid(2, 2, 1, 2)]))
    assert torch.equal(got[:, 15:], multimodal(3))


def test_pictures_that_overlap_or_go_beyond_the_end_are_refused():
    with pytest.raises(ValueError, match="overlaps"):
        multimodal(20, [Grid(2, 1, 3, 3), Grid(8, 1, 1, 1)])
    with pytest.raises(ValueError, match="after the 10 tokens"):
        multimodal(10, [Grid(2, 1, 3, 3)])
