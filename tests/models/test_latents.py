"""The block DCT is orthonormal: exact inverse, energy kept, equal to OpenCV's DCT."""

import cv2
import numpy as np
import pytest
import torch

from models.latents import BlockDCT


def test_keeping_every_coefficient_inverts_exactly_and_keeps_energy():
    code, video = BlockDCT(8, 64), torch.rand(2, 3, 3, 16, 24) * 2 - 1
    z = code.encode(video)
    torch.testing.assert_close(code.decode(z), video, atol=1e-5, rtol=0)
    torch.testing.assert_close(z.square().sum() * 64, video.square().sum())


def test_coefficients_equal_opencvs_dct():
    block = np.random.default_rng(0).random((8, 8), np.float32)
    z = BlockDCT(8, 64).encode(torch.from_numpy(block).expand(1, 1, 3, 8, 8))[0, 0, :64, 0, 0]
    order = sorted(range(64), key=lambda i: (i // 8 + i % 8, i))
    np.testing.assert_allclose(z.numpy() * 8, cv2.dct(block).reshape(-1)[order], atol=1e-5)


def test_few_coefficients_are_the_orthogonal_projection():
    code, video = BlockDCT(4, 5), torch.rand(1, 2, 3, 8, 8)
    once = code.decode(code.encode(video))
    torch.testing.assert_close(code.decode(code.encode(once)), once, atol=1e-6, rtol=0)
    assert ((video - once) * once).sum().abs() < 1e-3


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="blocks of 8"):
        BlockDCT(8).encode(torch.zeros(1, 1, 3, 12, 16))
