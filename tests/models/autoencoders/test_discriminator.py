"""A patch discriminator sees patches alone; its losses and the adaptive weight are the papers' formulas."""

import numpy as np
import pytest
import torch

from models.autoencoders.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)


def tiny() -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(width=8, layers=2)


def test_hinge_losses_equal_the_formula():
    real, fake = torch.randn(2, 3, 1, 2, 4, 4) * 2
    r, f = real.numpy().reshape(3, -1), fake.numpy().reshape(3, -1)
    hinge = 0.5 * (np.maximum(0, 1 - r).mean(1) + np.maximum(0, 1 + f).mean(1))
    np.testing.assert_allclose(discriminator_loss(real, fake), hinge, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(generator_loss(fake), -f.mean(1), rtol=1e-6, atol=1e-6)


def test_confident_and_right_costs_nothing_and_moves_nothing():
    real, fake = torch.full((1, 1, 1, 2, 2), 1.5), torch.full((1, 1, 1, 2, 2), -1.5, requires_grad=True)
    loss = discriminator_loss(real, fake)
    loss.sum().backward()
    assert loss.item() == 0
    assert fake.grad.abs().max() == 0


@pytest.mark.parametrize("frames", [1, 2, 5, 9])
def test_a_logit_a_patch_of_any_length(frames):
    logits = tiny()(torch.randn(2, 3, frames, 32, 48))
    assert logits.shape == (2, 1, -(-frames // 2), 6, 10)


def test_a_logit_sees_its_patch_and_nothing_else():
    model, video = tiny().double(), torch.randn(2, 3, 9, 64, 64, dtype=torch.float64).requires_grad_()
    logits = model(video)
    logits[0, 0, 0, 0, 0].backward()
    seen = video.grad.abs().amax(1)  # B T H W
    assert seen[1].max() == 0  # not batch-mates
    rows = seen[0].amax((0, 2)).nonzero().flatten()
    frames = seen[0].amax((1, 2)).nonzero().flatten()
    # receptive field of kernels 4 at strides 2, 2, 1, 1 is 34 pixels; the first patch begins in the padding
    assert rows.min() == 0
    assert 20 <= rows.max() + 1 <= 34
    assert frames.max() < 9 - 1


def linear(scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Two losses linear in a layer, so that their gradients are known; and the weight by the formula."""
    torch.manual_seed(1)
    layer = torch.randn(3, 4, requires_grad=True)
    a, b = torch.randn(2, 3, 4)
    b = b * scale
    expected = a.norm().item() / (b.norm().item() + 1e-6)
    return (a * layer).sum(), (b * layer).sum(), layer, expected


@pytest.mark.parametrize("scale", [10.0, 1.0, 1e-2])
def test_the_adaptive_weight_is_the_ratio_of_the_gradients(scale):
    reconstruction, adversarial, layer, expected = linear(scale)
    weight = adaptive_weight(reconstruction, adversarial, layer)
    assert weight.item() == pytest.approx(expected, rel=1e-5)
    assert not weight.requires_grad
    assert layer.grad is None
    (weight * adversarial).backward()  # the graph is still there, and both pull alike now
    pulled = layer.grad.norm()
    layer.grad = None
    reconstruction.backward()
    assert pulled.item() == pytest.approx(layer.grad.norm().item(), rel=1e-4)


def test_the_adaptive_weight_is_bounded():
    reconstruction, adversarial, layer, _ = linear(0.0)
    assert adaptive_weight(reconstruction, adversarial, layer) == 1e4


def test_it_learns_to_tell_sharp_from_blurred():
    model = tiny()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    sharp = torch.rand(4, 3, 3, 32, 32).round() * 2 - 1
    blurred = torch.nn.functional.avg_pool3d(sharp, (1, 3, 3), 1, (0, 1, 1))
    for _ in range(30):
        loss = discriminator_loss(*model(torch.cat([sharp, blurred])).chunk(2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, fake = model(torch.cat([sharp, blurred])).chunk(2)
    assert real.min() > fake.max()


def test_every_block_is_listed_and_learns():
    model = tiny()
    model(torch.randn(1, 3, 3, 32, 32)).square().mean().backward()
    assert len(model.blocks) == 2
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_frames_too_small_for_a_logit_are_refused():
    assert tiny()(torch.zeros(1, 3, 1, 12, 12)).shape[3:] == (1, 1)
    with pytest.raises(ValueError, match="16×11: the discriminator needs 12×12"):
        tiny()(torch.zeros(1, 3, 1, 11, 16))
