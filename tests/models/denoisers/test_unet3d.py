"""The 3D U-Net: what frames may see of each other, where time enters, and that it learns."""

import math
import unittest.mock
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import choose_kernel
from models.denoisers.unet3d import (
    PRESETS,
    WAVES,
    Block,
    FrameConv,
    FrameNorm,
    RelativeBias,
    SpaceAttention,
    SpaceTimeWaves,
    TimeAttention,
    UNet3D,
    build,
)
from models.diffusion.condition import Condition
from models.diffusion.noise import Cosine, level

TINY: dict[str, Any] = {"width": 8, "multipliers": (1, 2), "depth": 1, "head_dim": 4}
EVERY_OPTION = {"cross_attention": True, "places": True, "context": True, "upsample": True}
CHANNELS, FRAMES, SIDE, TEXT = 3, 5, 4, 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scattered(module: nn.Module, seed: int = 1) -> nn.Module:
    """In float64, every parameter away from its start, so that nothing is 0 or the identity."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.double().parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return module


def everything(batch: int = 2, frames: int = FRAMES, images: int = 0) -> tuple[UNet3D, Tensor, Condition]:
    """A model with every option that goes with images, and what it takes."""
    model = scattered(build(CHANNELS, TEXT, **TINY, **EVERY_OPTION))
    shape = (batch, CHANNELS, frames, SIDE, SIDE)
    mask = torch.zeros(batch, 1, frames, 1, 1)
    mask[:, :, 0] = 1
    condition = Condition(
        text=normal(batch, 4, TEXT, seed=2),
        text_mask=torch.tensor([[True, True, True, False]] * batch),
        known=normal(*shape, seed=3) * mask,
        known_mask=mask,
        low=normal(*shape, seed=4),
        low_level=torch.full((batch,), 0.2, dtype=torch.float64),
        images=images,
    )
    return model, normal(*shape, seed=5), condition


def frame(condition: Condition, i: int) -> Condition:
    """Of one frame, as an image."""
    parts = {name: getattr(condition, name)[:, :, i : i + 1] for name in ("known", "known_mask", "low")}
    return replace(condition, **parts, images=1)


LEVEL = torch.tensor([0.3, 0.8], dtype=torch.float64)


def test_an_image_sees_only_itself_and_no_frame_sees_an_image():
    model, z, condition = everything(images=2)
    before = model(z, LEVEL, condition)
    for j in range(FRAMES):
        other = z.clone()
        other[:, :, j] += 1
        after = model(other, LEVEL, condition)
        changed = [not torch.equal(before[:, :, i], after[:, :, i]) for i in range(FRAMES)]
        assert changed == [i == j or (i < 3 and j < 3) for i in range(FRAMES)]


def test_the_gradient_between_isolated_frames_is_exactly_zero():
    model, z, condition = everything(images=2)
    z.requires_grad_()
    out = model(z, LEVEL, condition)
    for i in range(FRAMES):
        (grad,) = torch.autograd.grad(out[:, :, i].square().sum(), z, retain_graph=True)
        seen = [bool((grad[:, :, j] != 0).any()) for j in range(FRAMES)]
        assert seen == [i == j or (i < 3 and j < 3) for j in range(FRAMES)]


def test_images_after_a_clip_come_out_as_from_passes_of_their_own():
    model, z, condition = everything(images=2)
    together = model(z, LEVEL, condition)
    for i in (3, 4):
        alone = model(z[:, :, i : i + 1], LEVEL, frame(condition, i))
        assert (together[:, :, i : i + 1] - alone).abs().max() <= 1e-12 * alone.abs().max()
    first = {name: getattr(condition, name)[:, :, :3] for name in ("known", "known_mask", "low")}
    alone = model(z[:, :, :3], LEVEL, replace(condition, **first, images=0))
    assert (together[:, :, :3] - alone).abs().max() <= 1e-12 * alone.abs().max()


def test_convolutions_are_1x3x3_and_norms_of_one_frame():
    x = normal(2, 3, 8, 4, 4)  # B T C h w
    conv, norm = scattered(FrameConv(8, 8, 3, padding=1)), scattered(FrameNorm(8))
    weight = conv.weight[:, :, None]  # 1×3×3
    expected = F.conv3d(x.transpose(1, 2), weight, conv.bias, padding=(0, 1, 1)).transpose(1, 2)
    assert torch.allclose(conv(x), expected, atol=1e-12)
    for i in range(3):
        groups = x[:, i].reshape(2, 2, -1)  # at least 4 channels a group
        unit = (groups - groups.mean(-1, keepdim=True)) / (
            groups.var(-1, correction=0, keepdim=True) + 1e-5
        ).sqrt()
        expected = unit.reshape(2, 8, 4, 4) * norm.weight[:, None, None] + norm.bias[:, None, None]
        assert torch.allclose(norm(x)[:, i], expected, atol=1e-12)


def test_without_attention_frames_mix_in_3x3x3_convolutions_only():
    z, other = normal(1, CHANNELS, FRAMES, SIDE, SIDE), normal(1, CHANNELS, FRAMES, SIDE, SIDE)
    other[:, :, 2] += 1
    for full_3d in (False, True):
        model = scattered(build(CHANNELS, **TINY, attention=(), full_3d=full_3d))
        a, b = (model(x, LEVEL[:1], Condition()) for x in (z, other))
        assert torch.equal(a[:, :, 1], b[:, :, 1]) is not full_3d


def test_3x3x3_convolutions_refuse_independent_images():
    model = build(CHANNELS, **TINY, full_3d=True)
    with pytest.raises(ValueError, match=r"images.*3×3×3"):
        model(torch.zeros(1, CHANNELS, 4, 4, 4), torch.zeros(1), Condition(images=1))


def test_waves_are_those_of_the_middle_of_every_cell_and_images_are_in_the_middle_of_time():
    waves = SpaceTimeWaves()
    t, h, w = 4, 2, 6
    found = waves(torch.zeros(2, t + 1, 3, h, w), images=1)
    assert found.shape == (2, t + 1, 2 * WAVES, h, w)
    for i, y, x in ((0, 0, 0), (3, 1, 2), (4, 0, 5)):
        when = 0.0 if i == t else (2 * i + 1) / t - 1
        place = torch.tensor([when, (2 * y + 1) / h - 1, (2 * x + 1) / w - 1])
        angle = math.pi * place @ waves.frequencies
        torch.testing.assert_close(found[1, i, :, y, x], torch.cat([angle.sin(), angle.cos()]))
    assert torch.equal(waves(torch.zeros(1, 1, 3, h, w))[0, 0], found[0, t])  # a clip of one frame, too


def test_frames_know_their_place_where_they_are_told():
    """Frames of one and the same noise are drawn alike, whatever the time attention, unless told their place."""
    z = normal(1, CHANNELS, 1, SIDE, SIDE).expand(-1, -1, FRAMES, -1, -1)
    for places in (False, True):
        out = scattered(build(CHANNELS, **TINY, attention=(), places=places))(z, LEVEL[:1], Condition())
        alike = [torch.equal(out[:, :, 0], out[:, :, i]) for i in range(1, FRAMES)]
        assert alike == [not places] * (FRAMES - 1)


def test_time_has_levels_of_its_own():
    model = build(CHANNELS, TEXT, **TINY, cross_attention=True, attention=(1,), time=(0,))
    for at, block in model.unet.blocks():
        found = [part is not None for part in (block.space, block.cross, block.time)]
        assert found == ([False, False, True] if at == 0 else [True, True, False])
    model, z = scattered(model), normal(2, CHANNELS, FRAMES, SIDE, SIDE)
    before = model(z, LEVEL, Condition())
    z[:, :, 0] += 1
    assert (model(z, LEVEL, Condition()) != before).flatten(3).any(3).any(0).any(0).all()


def dense(attention: nn.Module, x: Tensor, mask: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Attention over all T·h·w places at once, [B, L, C]; mask [L, L], bias [H, L, L]; written out."""
    heads, size = attention.heads, x.shape[-1] // attention.heads
    k, v = (x @ attention.kv.weight.T).split(x.shape[-1], dim=-1)
    q, k, v = (y.unflatten(-1, (heads, size)) for y in (x @ attention.q.weight.T, k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(size) + bias
    weights = torch.softmax(logits.masked_fill(~mask, -math.inf), dim=-1)
    y = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
    return y @ attention.out.weight.T + attention.out.bias


@pytest.mark.parametrize("kind", [SpaceAttention, TimeAttention])
def test_factorised_attention_is_dense_attention_under_a_block_mask(kind: type):
    layer, x = scattered(kind(8, 2)), normal(2, 3, 8, 2, 4)
    _, t, c, h, w = x.shape
    time = torch.arange(t).repeat_interleave(h * w)  # of each of the T·h·w places
    place = torch.arange(h * w).repeat(t)
    flat = layer.norm(x).permute(0, 1, 3, 4, 2).reshape(2, t * h * w, c)
    if kind is SpaceAttention:
        y = dense(layer.attention, flat, time[:, None] == time)
    else:
        bias = layer.bias(t)[:, time][:, :, time]
        y = dense(layer.attention, flat, place[:, None] == place, bias)
    assert torch.allclose(layer(x), x + y.reshape(2, t, h, w, c).permute(0, 1, 4, 2, 3), atol=1e-12)


def test_the_bias_depends_on_the_distance_alone_and_on_its_sign():
    bias = scattered(RelativeBias(3))(40)  # H T T
    for offset in range(-39, 40):
        diagonal = bias.diagonal(offset, dim1=1, dim2=2)
        assert torch.equal(diagonal, diagonal[:, :1].expand_as(diagonal))
    assert not torch.equal(bias, bias.transpose(1, 2))


@pytest.mark.parametrize(("buckets", "longest"), [(32, 32), (32, 128), (8, 20)])
def test_distances_fall_into_t5s_buckets(buckets: int, longest: int):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(distance, True, buckets, longest)
    assert torch.equal(RelativeBias(1, buckets, longest).bucket(distance), expected)


def test_a_clip_shifted_in_time_is_attended_to_alike():
    """Frames 7 to 10 of a longer clip see each other with the bias that frames 0 to 3 have."""
    layer = scattered(TimeAttention(8, 2))
    assert torch.equal(layer.bias(11)[:, 7:, 7:], layer.bias(4))
    assert not torch.equal(layer.bias(4).flip(1), layer.bias(4))


@pytest.mark.parametrize("preset", PRESETS)
def test_relative_attention_has_as_many_parameters_as_the_paper_says(preset: str):
    options = PRESETS[preset]
    with torch.device("meta"):
        model = build(4, **options)
    attended = (
        range(len(options["multipliers"])) if options.get("attention") is None else options["attention"]
    )
    last, depth = len(options["multipliers"]) - 1, options.get("depth", 2)
    expected = 0
    for i in attended:
        c, heads = options["width"] * options["multipliers"][i], 0
        heads = c // options.get("head_dim", 32)
        blocks = 2 * depth + 1 + 2 * (i == last)
        expected += blocks * (
            4 * c * c + c + 2 * c + 32 * heads
        )  # q k v out, its bias, norm, 32 buckets a head
    times = [m for m in model.modules() if isinstance(m, TimeAttention)]
    assert sum(p.numel() for m in times for p in m.parameters()) == expected
    assert len(list(model.repeated())) == (2 * depth + 1) * (last + 1) + 2


def test_at_first_blocks_of_equal_width_are_the_identity_and_the_output_is_zero():
    torch.manual_seed(0)
    block, x = Block(8, 8, 16, 2, 2, TEXT, False), torch.randn(2, 3, 8, 4, 4)
    assert torch.equal(block(x, torch.randn(2, 16), torch.randn(2, 3, TEXT)), x)
    model = build(CHANNELS, **TINY)
    assert not model(torch.randn(1, CHANNELS, 3, 4, 4), torch.rand(1), Condition()).any()


def test_every_parameter_learns_within_three_steps():
    model, z, condition = everything()
    fresh = build(CHANNELS, TEXT, **TINY, **EVERY_OPTION).double()
    optimizer = torch.optim.Adam(fresh.parameters(), lr=1e-2)
    moved = set()
    for _ in range(3):
        optimizer.zero_grad()
        (fresh(z, LEVEL, condition) - z).square().mean().backward()
        moved |= {n for n, p in fresh.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert moved == {n for n, _ in model.named_parameters()}


def test_known_frames_and_their_mask_reach_the_other_frames():
    model, z, condition = everything()
    before = model(z, LEVEL, condition)
    for change in ({"known": 2 * z}, {"known_mask": torch.zeros(2, 1, FRAMES, 1, 1)}):
        after = model(z, LEVEL, replace(condition, **change))
        assert all((a - b).abs().max() > 1e-6 for a, b in zip(before.unbind(2), after.unbind(2), strict=True))
    none = replace(condition, known=0 * z, known_mask=torch.zeros(2, 1, 1, 1, 1))
    nothing = model(z, LEVEL, replace(condition, known=None, known_mask=None))
    assert torch.equal(nothing, model(z, LEVEL, none))


def test_the_low_resolution_video_and_its_level_reach_the_output():
    model, z, condition = everything()
    before = model(z, LEVEL, condition)
    for change in ({"low": 2 * z}, {"low_level": LEVEL}):
        assert (before - model(z, LEVEL, replace(condition, **change))).abs().max() > 1e-6
    clean = replace(condition, low_level=torch.zeros_like(LEVEL))
    assert torch.equal(model(z, LEVEL, replace(condition, low_level=None)), model(z, LEVEL, clean))


@pytest.mark.parametrize("cross_attention", [False, True])
def test_text_counts_where_its_mask_says_so(cross_attention: bool):
    model = scattered(build(CHANNELS, TEXT, **TINY, cross_attention=cross_attention))
    z, text = normal(2, CHANNELS, 2, SIDE, SIDE), normal(2, 4, TEXT)
    mask = torch.tensor([[True, True, False, False]] * 2)
    before = model(z, LEVEL, Condition(text=text, text_mask=mask))
    for token, counts in ((1, True), (2, False)):
        other = text.clone()
        other[:, token] *= -1
        after = model(z, LEVEL, Condition(text=other, text_mask=mask))
        assert ((before - after).abs().max() > 1e-6) == counts
    dropped = Condition(text=text, text_mask=mask).without_text(torch.tensor([True, False]))
    none, half = model(z, LEVEL, Condition()), model(z, LEVEL, dropped)
    assert torch.allclose(half[0], none[0], atol=1e-12)
    assert torch.allclose(half[1], before[1], atol=1e-12)


def test_a_sample_does_not_depend_on_its_batch_mates():
    model, z, condition = everything()
    together = model(z, LEVEL, condition)
    first = {
        n: getattr(condition, n)[:1] for n in ("text", "text_mask", "known", "known_mask", "low", "low_level")
    }
    assert torch.allclose(together[:1], model(z[:1], LEVEL[:1], Condition(**first)), atol=1e-10)


def test_every_attention_uses_the_kernel_that_was_chosen():
    model, z, condition = everything(images=2)
    expected = model(z, LEVEL, condition)
    choose_kernel(model, "plain")
    with unittest.mock.patch.object(F, "scaled_dot_product_attention") as fused:
        assert torch.allclose(model(z, LEVEL, condition), expected, rtol=1e-9, atol=1e-9)
    assert not fused.called


def test_checkpointed_blocks_give_the_same_gradients():
    model, z, condition = everything(images=1)
    model(z, LEVEL, condition).square().mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for block in model.repeated():
        block.forward = lambda *x, f=block.forward: checkpoint(f, *x, use_reentrant=False)
    model(z, LEVEL, condition).square().mean().backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"width": 12, "head_dim": 8}, "multiple of head_dim 8"),
        ({"width": 12, "head_dim": 6}, "none of 4"),
        ({"attention": (0, 5)}, "levels 0 to 1"),
        ({"cross_attention": True}, "needs text"),
        ({"depth": 0}, "at least one"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict, says: str):
    with pytest.raises(ValueError, match=says):
        build(CHANNELS, **(TINY | options))


@pytest.mark.parametrize(
    ("shape", "condition", "says"),
    [
        ((1, CHANNELS, 2, 4, 5), Condition(), "5×4.*multiples of 2"),
        ((1, CHANNELS, 2, 4, 4), Condition(images=3), "images=3.*2 frames"),
        ((1, CHANNELS, 2, 4, 4), Condition(text=torch.zeros(1, 2, 9)), "text_width"),
        ((1, CHANNELS, 2, 4, 4), Condition(known=torch.zeros(1, CHANNELS, 2, 4, 4)), "context=True"),
        ((1, CHANNELS, 2, 4, 4), Condition(low=torch.zeros(1, CHANNELS, 2, 4, 4)), "takes no low-resolution"),
    ],
)
def test_what_the_model_was_not_built_for_is_refused(shape: tuple, condition: Condition, says: str):
    with pytest.raises(ValueError, match=says):
        build(CHANNELS, **TINY)(torch.zeros(shape), torch.zeros(1), condition)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"low": None}, "low is missing"),
        ({"low": torch.zeros(2, CHANNELS, FRAMES, 2, 2)}, "low has shape"),
        ({"known_mask": None}, "belong together"),
        ({"text": torch.zeros(2, 4, TEXT + 1)}, f"{TEXT + 1} features"),
    ],
)
def test_conditions_of_other_shapes_are_refused(change: dict, says: str):
    model, z, condition = everything()
    with pytest.raises(ValueError, match=says):
        model(z, LEVEL, replace(condition, **change))


@pytest.mark.parametrize("options", [{}, {"attention": (), "full_3d": True}])
def test_sixty_steps_on_one_clip_more_than_halve_its_loss(options: dict):
    torch.manual_seed(0)
    model = build(4, width=16, multipliers=(1, 2), depth=1, head_dim=16, **options)
    assert learnt(model) < 0.5


def wave() -> Tensor:
    """Latents [1, 4, 4, 8, 8] of something that moves over a plain ground."""
    c, t, x = torch.arange(4).view(4, 1, 1, 1), torch.arange(4).view(4, 1, 1), torch.arange(8)
    moving = torch.sin(2 * math.pi * (x + t + 2 * c) / 8)
    return ((-1.0) ** c + 0.7 * moving).expand(4, 4, 8, 8)[None]


def learnt(model: nn.Module, condition: Condition | None = None) -> float:
    """Loss of v on one clip at fixed noise after 60 steps, as a share of that before."""
    condition = condition or Condition()
    clip = wave().expand(3, -1, -1, -1, -1)

    def loss(generator: torch.Generator) -> Tensor:
        alpha, sigma = Cosine()(0.05 + 0.9 * torch.rand(3, generator=generator))
        noise = torch.randn(clip.shape, generator=generator)
        a, s = (x.view(-1, 1, 1, 1, 1) for x in (alpha, sigma))
        return (
            (model(a * clip + s * noise, level(alpha, sigma), condition) - (a * noise - s * clip))
            .square()
            .mean()
        )

    with torch.no_grad():
        before = loss(torch.Generator().manual_seed(99))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    draws = torch.Generator().manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        loss(draws).backward()
        optimizer.step()
    with torch.no_grad():
        return (loss(torch.Generator().manual_seed(99)) / before).item()


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("frames", "halved"), [(8, [8, 4, 2]), (5, [5, 3, 2]), (1, [1, 1, 1])])
def test_the_fully_convolutional_network_halves_time_from_level_to_level(
    frames: int, halved: list[int], full: bool
):
    """Çiçek et al. 2016: and only it; what comes out has all frames again, each of which the others reach."""
    sizes: dict[str, Any] = {"width": 8, "multipliers": (1, 2, 2), "depth": 1, "head_dim": 4, "attention": ()}
    model, seen = scattered(build(3, **sizes, full_3d=full)), []
    blocks = list(model.unet.blocks())
    for _, block in blocks:
        block.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    z = normal(1, 3, frames, 8, 8).requires_grad_()
    out = model(z, torch.tensor([0.5], dtype=torch.float64), Condition())
    assert out.shape == z.shape
    assert seen == [halved[at] if full else frames for at, _ in blocks]
    (grad,) = torch.autograd.grad(out[:, :, 0].square().sum(), z)
    assert [bool(grad[:, :, t].any()) for t in range(frames)] == [full or t == 0 for t in range(frames)]
