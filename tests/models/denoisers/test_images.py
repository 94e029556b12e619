"""Pictures among videos, in every denoiser: no frame reaches them, and no layer over time does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.denoisers import dit, sora, unet3d, video_ldm
from models.diffusion.condition import Condition
from tests.models.denoisers.test_unet3d import normal, scattered

CHANNELS, FRAMES, IMAGES, TEXT = 4, 5, 2, 8
LEVEL = torch.tensor([0.3, 0.8], dtype=torch.float64)
SMALL: dict[str, Any] = {"width": 8, "multipliers": (1, 2), "depth": 1, "head_dim": 4}
DIT: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 2}

KINDS: dict[str, Callable[[], nn.Module]] = {
    "dit-full": lambda: dit.build(CHANNELS, TEXT, **DIT),
    "dit-factorised": lambda: dit.build(CHANNELS, TEXT, **DIT, attention="factorised"),
    "dit-alternating": lambda: dit.build(CHANNELS, TEXT, **DIT, attention="alternating"),
    "sora": lambda: sora.build(CHANNELS, TEXT, dim=16, ffn=32, heads=2, depth=2),
    "unet3d": lambda: unet3d.build(CHANNELS, TEXT, **SMALL, places=True),
    "video_ldm": lambda: video_ldm.build(CHANNELS, TEXT, **SMALL),
}


def over_time(model: nn.Module) -> list[nn.Module]:
    """The layers that mix frames at a place."""
    kinds = (video_ldm.Temporal, unet3d.TimeAttention)
    return [m for m in model.modules() if isinstance(m, kinds) or getattr(m, "axis", "") == "time"]


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = scattered(KINDS[kind]())
    for layer in model.modules():
        if isinstance(layer, video_ldm.Temporal):
            layer.beta.data[:] = 0.5
    return model


def told(images: int) -> Condition:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    return Condition(text=normal(2, 3, TEXT, seed=2), text_mask=mask, images=images)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_another_frame_reaches_a_picture_and_nothing_of_a_picture_another_frame(kind: str):
    model, z = made(kind), normal(2, CHANNELS, FRAMES, 4, 4)
    before = model(z, LEVEL, told(IMAGES))
    for j in range(FRAMES):
        other = z.clone()
        other[:, :, j] += 1
        after = model(other, LEVEL, told(IMAGES))
        changed = [not torch.equal(before[:, :, i], after[:, :, i]) for i in range(FRAMES)]
        clip = FRAMES - IMAGES
        assert changed == [i == j or (i < clip and j < clip) for i in range(FRAMES)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_depends_on_no_layer_over_time_however_it_comes_and_a_clip_does(kind: str):
    model, z = made(kind), normal(2, CHANNELS, FRAMES, 4, 4)

    def drawn() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        clip, alone = model(z, LEVEL, told(IMAGES)), model(z[:, :, -1:], LEVEL, told(0))
        return clip[:, :, :-IMAGES], clip[:, :, -IMAGES:], alone, model(z[:, :, -1:], LEVEL, told(1))

    clip, images, alone, image = drawn()
    torch.testing.assert_close(images[:, :, -1:], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(image, alone, rtol=0, atol=1e-12)
    layers = over_time(model)
    assert bool(layers) == (kind not in ("dit-full", "sora"))
    for layer in layers:
        for p in layer.parameters():
            p.data += 1
    after = drawn()
    assert all(torch.equal(a, b) for a, b in zip((images, alone, image), after[1:], strict=True))
    assert torch.equal(clip, after[0]) != bool(layers)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_takes_part_in_a_step_of_pictures_alone(kind: str):
    """Whatever a rank is dealt, it has as many gradients as the others; those of layers over time are 0."""
    model = made(kind)
    model(normal(2, CHANNELS, 1, 4, 4), LEVEL, told(0)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    for layer in over_time(model):
        assert not any(p.grad.any() for p in layer.parameters() if p.grad is not None)
