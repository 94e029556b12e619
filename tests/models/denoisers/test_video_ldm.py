"""Video LDM: the image model inside is kept bit for bit, temporal layers mix videos and nothing else."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.denoisers.video_ldm import (
    PRESETS,
    KnownFrames,
    Layer,
    Temporal,
    TimeAttention,
    TimeResBlock,
    UnitInterval,
    VideoLDM,
    build,
    timestep,
)
from models.diffusion.condition import Condition
from models.diffusion.noise import level as noise_level
from tests.models.denoisers.test_unet3d import learnt, normal, scattered

CHANNELS, FRAMES, SIDE, TEXT = 4, 5, 4, 8
TINY: dict[str, Any] = {"width": 8, "multipliers": (1, 2), "depth": 1, "head_dim": 4}
LEVEL = torch.tensor([0.3, 0.8], dtype=torch.float64)


def ours(alpha: float, images: int = 0, known: int = 0, **options: Any) -> tuple[VideoLDM, Tensor, Condition]:
    """A model with text, and the first `known` frames known; every α is `alpha`."""
    model = scattered(build(CHANNELS, TEXT, **TINY, context=True, **options))
    assert isinstance(model, VideoLDM)
    for layer in model.temporal:
        layer.beta.data[:] = 1 - alpha
    z = normal(2, CHANNELS, FRAMES, SIDE, SIDE)
    mask = (torch.arange(FRAMES) < known).double().view(1, 1, -1, 1, 1).expand(2, -1, -1, -1, -1)
    condition = Condition(
        text=normal(2, 3, TEXT, seed=2),
        text_mask=torch.tensor([[True, True, False], [False, False, False]]),
        known=normal(*z.shape, seed=3) * mask,
        known_mask=mask,
        images=images,
    )
    return model, z, condition


def as_images(model: VideoLDM, z: Tensor, condition: Condition) -> Tensor:
    """Every frame through the image model alone, all of them one batch."""
    assert condition.text is not None
    assert condition.text_mask is not None
    t = z.shape[2]
    y = model.spatial(
        z.transpose(1, 2).flatten(0, 1),
        LEVEL.repeat_interleave(t),
        condition.text.repeat_interleave(t, dim=0),
        condition.text_mask.repeat_interleave(t, dim=0),
    )
    return y.unflatten(0, (len(z), t)).transpose(1, 2)


def test_with_alpha_1_it_is_the_image_model_bit_for_bit():
    model, z, condition = ours(alpha=1.0, known=2)
    assert torch.equal(model(z, LEVEL, condition), as_images(model, z, condition))
    assert all(temporal.beta == 0 for temporal in build(CHANNELS, **TINY).temporal)


@pytest.mark.parametrize("kind", ["residual", "attention"])
def test_a_temporal_layer_is_the_identity_at_first_and_its_branch_is_not(kind: Any):
    torch.manual_seed(0)
    layer = Temporal(Layer(kind, 8, 0), 16, known=6)
    x, emb, known = torch.randn(2, 3, 8, 2, 2), torch.randn(2, 3, 16), torch.randn(2, 3, 2, 2, 6)
    assert torch.equal(layer(x, emb, known), x)
    assert not torch.allclose(layer.temporal(x, emb), x, atol=1e-2)  # else α would get no gradient


@pytest.mark.parametrize("kind", ["residual", "attention"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_alpha_blends_towards_the_temporal_branch(kind: Any, alpha: float):
    layer = scattered(Temporal(Layer(kind, 8, 0), 16))
    layer.beta.data[:] = 1 - alpha
    x, emb = normal(2, 3, 8, 2, 2), normal(2, 3, 16)
    assert torch.allclose(layer(x, emb), alpha * x + (1 - alpha) * layer.temporal(x, emb), atol=1e-12)


def test_alpha_stays_in_0_to_1_and_returns_from_beyond():
    x = torch.tensor([1.5, 1.0, 0.5, 0.0, -0.5], requires_grad=True)
    assert torch.equal(UnitInterval.apply(x), torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0]))
    for slope, moves in ((1.0, [1, 1, 1, 0, 0]), (-1.0, [0, 0, 1, 1, 1])):  # a step is along −slope
        (grad,) = torch.autograd.grad(slope * UnitInterval.apply(x).sum(), x)
        assert torch.equal(grad, slope * torch.tensor(moves))


def test_in_bfloat16_temporal_layers_learn_from_an_alpha_hardly_below_1():
    layer = Temporal(Layer("residual", 8, 0), 16)
    layer.beta.data[:] = 1 - 0.9995  # rounds to 1
    layer.temporal.bfloat16()
    x = torch.randn(1, 3, 8, 2, 2, dtype=torch.bfloat16)
    layer(x, torch.randn(1, 3, 16, dtype=torch.bfloat16)).square().sum().backward()
    assert layer.temporal.conv2.weight.grad.any()


def test_an_image_sees_only_itself_and_videos_see_each_other():
    model, z, condition = ours(alpha=0.5, images=2, known=1)
    before = model(z, LEVEL, condition)
    for j in range(FRAMES):
        other = z.clone()
        other[:, :, j] += 1
        after = model(other, LEVEL, condition)
        changed = [not torch.equal(before[:, :, i], after[:, :, i]) for i in range(FRAMES)]
        assert changed == [i == j or (i < 3 and j < 3) for i in range(FRAMES)]


def test_the_gradient_between_isolated_frames_is_exactly_zero():
    model, z, condition = ours(alpha=0.5, images=2, known=1)
    z.requires_grad_()
    out = model(z, LEVEL, condition)
    for i in range(FRAMES):
        (grad,) = torch.autograd.grad(out[:, :, i].square().sum(), z, retain_graph=True)
        seen = [bool((grad[:, :, j] != 0).any()) for j in range(FRAMES)]
        assert seen == [i == j or (i < 3 and j < 3) for j in range(FRAMES)]


def test_images_after_a_clip_come_out_as_from_the_image_model():
    model, z, condition = ours(alpha=0.5, images=2, known=1)
    together, images = model(z, LEVEL, condition), as_images(model, z, condition)
    assert (together - images)[:, :, 3:].abs().max() <= 1e-12 * images.abs().max()
    assert (together - images)[:, :, :3].abs().max() > 1e-3
    only = model(z, LEVEL, replace(condition, images=FRAMES))
    assert torch.allclose(only, images, rtol=0, atol=1e-12)


def test_known_frames_and_their_mask_reach_all_frames_but_images():
    for known in (0, 1, 2):
        model, z, condition = ours(alpha=0.5, images=1, known=known)
        before = model(z, LEVEL, condition)
        assert before.shape == z.shape
        without = replace(condition, known=None, known_mask=None)
        changes: list[Condition] = [without] if known else []
        if known:
            assert condition.known is not None
            assert condition.known_mask is not None
            changes.append(replace(condition, known=condition.known * 2))
            changes.append(replace(condition, known_mask=condition.known_mask * 0))
        else:
            assert torch.equal(before, model(z, LEVEL, without))
        for change in changes:
            after = model(z, LEVEL, change)
            far = [(before - after)[:, :, i].abs().max() for i in range(FRAMES)]
            assert min(far[:-1]) > 1e-6
            assert far[-1] == 0


def test_the_order_of_frames_counts():
    for kind in (TimeAttention, TimeResBlock):
        layer = scattered(kind(8, 16))
        x, emb = normal(1, 4, 8, 2, 2), normal(1, 1, 16).expand(1, 4, 16)
        assert not torch.allclose(layer(x.flip(1), emb).flip(1), layer(x, emb), atol=1e-3)


def test_a_temporal_layer_never_mixes_places():
    for kind in (TimeAttention, TimeResBlock):
        layer = scattered(kind(8, 16))
        layer.norm = layer.norm1 = layer.norm2 = nn.Identity()  # norms see the whole frame
        x, emb = normal(1, 4, 8, 2, 2), normal(1, 4, 16)
        y = x.clone()
        y[..., 1, 1] += 1
        same = (layer(x, emb) == layer(y, emb))[0].all(dim=0).all(dim=0)
        assert same.tolist() == [[True, True], [True, False]]


def test_a_frozen_spatial_part_gets_no_gradient_and_the_temporal_layers_do():
    model, z, condition = ours(alpha=1.0, known=1, frozen=True)
    model(z, LEVEL, condition).square().mean().backward()
    assert all(p.grad is None for p in model.spatial.parameters())
    assert any(layer.beta.grad.any() for layer in model.temporal)
    for layer in model.temporal:
        layer.beta.data[:] = 1 - 0.9
    model(z, LEVEL, condition).square().mean().backward()
    assert all(p.grad is None for p in model.spatial.parameters())
    rest = [p for n, p in model.named_parameters() if not n.startswith("spatial.")]
    assert all(p.grad is not None and p.grad.any() for p in rest)


def test_known_frames_are_brought_to_the_size_of_every_level():
    sizes = [tuple(y.shape) for y in KnownFrames(5, 3, channels=6)(torch.zeros(2, 3, 5, 8, 4))]
    assert sizes == [(2, 3, 8, 4, 6), (2, 3, 4, 2, 6), (2, 3, 2, 1, 6)]


@pytest.mark.parametrize("preset", PRESETS)
def test_temporal_layers_have_as_many_parameters_as_counted_by_hand(preset: str):
    with torch.device("meta"):
        model = build(4, 16, **PRESETS[preset])
    expected, emb = 0, 4 * PRESETS[preset]["width"]
    for layer in model.spatial.layers():
        c = layer.channels
        residual = 2 * (3 * c * c + c) + 2 * 2 * c + 2 * c * emb + 2 * c  # convolutions, norms, modulation
        expected += 1 + (residual if layer.kind == "residual" else 4 * c * c + c + 2 * c)
    assert sum(p.numel() for p in model.temporal.parameters()) == expected
    assert len(list(model.repeated())) > len(model.temporal)


def test_sixty_steps_on_one_clip_more_than_halve_its_loss():
    torch.manual_seed(0)
    model = build(4, width=16, multipliers=(1, 2), depth=1, head_dim=16)
    assert learnt(model) < 0.5


def test_with_a_frozen_image_model_the_temporal_layers_learn():
    torch.manual_seed(0)
    model = build(4, width=16, multipliers=(1,), depth=1, head_dim=16, frozen=True)
    model.spatial.unet.conv_out.weight.data.normal_(std=0.1)  # as 0 it would let nothing through
    assert learnt(model) < 0.8
    assert max(layer.beta.item() for layer in model.temporal) > 0.01


STABLE_DIFFUSION: dict[str, dict[str, Any]] = {  # the families' configs, with fewer channels
    "1.x": {
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16, 16),
        "attention_head_dim": 2,
        "layers_per_block": 2,
    },
    "2.x": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
        "attention_head_dim": (1, 2),
        "use_linear_projection": True,
        "layers_per_block": 2,
    },
    "xl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "attention_head_dim": (1, 2),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "layers_per_block": 2,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 10 + 6 * 6,
    },
}


def saved(family: str, folder: Path, **change: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config = STABLE_DIFFUSION[family] | {"cross_attention_dim": TEXT, "norm_num_groups": 4, "sample_size": 8}
    unet = UNet2DConditionModel(**(config | change))
    unet.save_pretrained(folder)
    return unet.eval()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", STABLE_DIFFUSION)
def test_with_alpha_1_a_video_is_stable_diffusion_on_each_frame(family: str, masked: bool, tmp_path: Path):
    unet = saved(family, tmp_path / "unet")
    model = build(CHANNELS, TEXT, spatial=str(tmp_path), context=True)  # a pipeline's folder: its `unet`
    z, text = normal(2, CHANNELS, 3, 8, 12).float(), normal(2, 5, TEXT).float()
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5]) if masked else None
    level = LEVEL.float()
    video = model(z, level, Condition(text=text, text_mask=mask))
    added = {"time_ids": torch.tensor([[64, 96, 0, 0, 64, 96]] * 2), "text_embeds": torch.zeros(2, 10)}
    for i in range(3):
        image = unet(
            z[:, :, i],
            timestep(level),
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            added_cond_kwargs=added,
        ).sample
        assert torch.allclose(video[:, :, i], image, rtol=0, atol=1e-5)
    model.temporal[3].beta.data[:] = 1 - 0.5
    assert not torch.allclose(model(z, level, Condition(text=text, text_mask=mask)), video, atol=1e-4)


def test_no_text_to_stable_diffusion_is_a_text_of_zeros(tmp_path: Path):
    unet = saved("1.x", tmp_path)
    model = build(CHANNELS, TEXT, spatial=str(tmp_path))
    z, text, level = normal(2, CHANNELS, 1, 8, 8).float(), normal(2, 5, TEXT).float(), LEVEL.float()
    dropped = Condition(text=text, text_mask=torch.ones(2, 5, dtype=torch.bool)).without_text()
    zeros = unet(z[:, :, 0], timestep(level), encoder_hidden_states=0 * text).sample
    for condition in (dropped, Condition()):
        assert torch.allclose(model(z, level, condition)[:, :, 0], zeros, rtol=0, atol=1e-5)


def test_a_frozen_stable_diffusion_keeps_its_weights_and_its_names(tmp_path: Path):
    unet = saved("1.x", tmp_path)
    model = build(CHANNELS, TEXT, spatial=str(tmp_path), frozen=True)
    inside = {n.removeprefix("spatial.unet."): p for n, p in model.named_parameters() if "spatial" in n}
    assert inside.keys() == dict(unet.named_parameters()).keys()
    model(
        torch.randn(1, CHANNELS, 3, 8, 8), torch.rand(1), Condition(text=torch.randn(1, 2, TEXT))
    ).sum().backward()
    assert all(p.grad is None and torch.equal(p, unet.get_parameter(n)) for n, p in inside.items())
    assert any(layer.beta.grad is not None for layer in model.temporal)


def test_levels_of_the_training_schedule_are_its_time_steps():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    signal = scheduler.alphas_cumprod.double()
    steps = timestep(noise_level(signal.sqrt(), (1 - signal).sqrt()))
    assert (steps - torch.arange(1000)).abs().max() < 0.02
    ends = timestep(torch.tensor([0.0, 1.0]))
    assert ends.tolist() == [0, 999]


@pytest.mark.parametrize(
    ("change", "channels", "text_width", "says"),
    [
        ({}, 8, TEXT, "maps 4 to 4 channels, the latents have 8"),
        ({}, 4, 16, "reads text of 8 features, the text encoder gives 16"),
        ({"class_embed_type": "timestep"}, 4, TEXT, "class_embed_type=timestep"),
        ({"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, 4, TEXT, "AttnDownBlock2D"),
    ],
)
def test_other_image_models_are_refused(
    change: dict, channels: int, text_width: int, says: str, tmp_path: Path
):
    saved("2.x", tmp_path, **change)
    with pytest.raises(ValueError, match=says):
        build(channels, text_width, spatial=str(tmp_path))


def test_a_folder_without_such_a_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"no config\.json"):
        build(4, TEXT, spatial=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet3DConditionModel"}))
    with pytest.raises(ValueError, match="holds a UNet3DConditionModel"):
        build(4, TEXT, spatial=str(tmp_path))
    with pytest.raises(ValueError, match="width and spatial"):
        build(4, TEXT, width=64, spatial=str(tmp_path))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[diffusers\]'"):
        build(4, TEXT, spatial=str(tmp_path))


@pytest.mark.parametrize(
    ("condition", "side", "says"),
    [
        (Condition(images=9), SIDE, "images=9"),
        (Condition(known=torch.zeros(1)), SIDE, "context=True"),
        (Condition(low=torch.zeros(1)), SIDE, "takes no low-resolution"),
        (Condition(text=torch.zeros(1, 1, TEXT)), SIDE, "text"),
        (Condition(), 5, "5×5.*multiples of 2"),
    ],
)
def test_what_it_was_not_built_for_is_refused(condition: Condition, side: int, says: str):
    with pytest.raises(ValueError, match=says):
        build(CHANNELS, **TINY)(torch.zeros(1, CHANNELS, 2, side, side), torch.zeros(1), condition)
