"""ViViT against image ViTs of timm and torchvision, transformers' ViViT, and dense attention."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders.vivit import (
    PRESETS,
    DotProductAttention,
    FactorisedBlock,
    ViViT,
    central_frame,
    load_image_vit,
)

SMALL: dict[str, Any] = {
    "frames": 6,
    "size": 32,
    "tubelet": (3, 8, 8),
    "dim": 32,
    "depth": 2,
    "heads": 4,
    "time_depth": 1,
}


def image_vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    model = timm.models.VisionTransformer(**sizes | options)
    for p in model.parameters():
        nn.init.normal_(p, std=0.15)
    return model.eval()


def video(size: int = 32, frames: int = 6) -> Tensor:
    return torch.randn(2, 3, frames, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_a_central_frame_tubelet_is_the_2d_embedding_of_its_centre_frame(frames: int):
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 3, 4, 4).double(), torch.randn(5).double()
    clip = torch.randn(2, 3, 3 * frames, 8, 12).double()
    tubelets = F.conv3d(clip, central_frame(weight, frames), bias, stride=(frames, 4, 4))
    for i in range(3):
        centre = clip[:, :, i * frames + frames // 2]
        assert torch.allclose(tubelets[:, :, i], F.conv2d(centre, weight, bias, stride=4), atol=1e-12)


def test_a_fresh_model_3_is_the_image_model_of_the_centre_frames():
    image = image_vit(class_token=False, global_pool="avg", fc_norm=False)
    model = ViViT(3, **SMALL).eval()
    load_image_vit(model, image.state_dict())
    clip = video()
    with torch.no_grad():
        out = model(clip)
        frames = [image.forward_features(clip[:, :, i]) for i in (1, 4)]
    assert torch.allclose(out.tokens, torch.stack(frames, dim=1), atol=1e-5)
    assert torch.allclose(out.features, torch.stack([f.mean(1) for f in frames]).mean(0), atol=1e-5)


def test_model_2_encodes_each_time_as_the_image_model():
    image = image_vit()
    model = ViViT(2, **SMALL).eval()
    load_image_vit(model, image.state_dict())
    clip = video()
    with torch.no_grad():
        out = model(clip)
        frames = torch.stack([image.forward_features(clip[:, :, i]) for i in (1, 4)], dim=1)
        assert torch.allclose(out.tokens, frames[:, :, 1:], atol=1e-5)
        model.time_blocks = nn.ModuleList()  # its encoder of times is given the class tokens
        given: list[Tensor] = []
        model.time_norm.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        model(clip)
    assert torch.allclose(given[0][:, 1:], frames[:, :, 0], atol=1e-5)


@pytest.mark.parametrize("number", [1, 4])
def test_on_one_tubelet_models_1_and_4_start_as_the_image_model(number: int):
    """Model 4 where its heads for time look at the same as those for space: one place."""
    if number == 1:
        image, size = image_vit(), 32
    else:
        image, size = image_vit(img_size=8, class_token=False, global_pool="avg", fc_norm=False), 8
    model = ViViT(number, **SMALL | {"frames": 3, "size": size}).eval()
    load_image_vit(model, image.state_dict())
    clip = video(size, frames=3)
    with torch.no_grad():
        expected = image.forward_features(clip[:, :, 1])
        out = model(clip)
    assert torch.allclose(out.tokens[:, 0], expected[:, -out.tokens.shape[2] :], atol=1e-5)
    assert torch.allclose(out.features, expected[:, 0], atol=1e-5)


def test_names_of_a_real_timm_model_and_of_torchvision_are_understood():
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    real = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64).eval()
    other = VisionTransformer(64, 16, 12, 3, 192, 768).eval()
    for p in [*real.parameters(), *other.parameters()]:
        nn.init.normal_(p, std=0.06)
    clip = video(64, frames=2)
    with torch.no_grad():
        for image in (real, other):
            model = ViViT(2, frames=2, size=64, **PRESETS["Ti/16x2"]).eval()
            load_image_vit(model, image.state_dict())
            if image is real:
                expected = real.forward_features(clip[:, :, 1])
            else:
                x = other._process_input(clip[:, :, 1])
                expected = other.encoder(torch.cat([other.class_token.expand(2, -1, -1), x], dim=1))
            assert torch.allclose(model(clip).tokens[:, 0], expected[:, 1:], atol=1e-4)


def test_model_1_is_that_of_transformers():
    from transformers import VivitConfig, VivitModel

    torch.manual_seed(0)
    model = ViViT(1, **SMALL).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.15)
    config = VivitConfig(
        image_size=32,
        num_frames=6,
        tubelet_size=[3, 8, 8],
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    theirs = VivitModel(config, add_pooling_layer=False).eval()
    own = model.state_dict()
    positions = own["space_embed"].flatten(0, 1) + own["time_embed"][:, None]
    matched = {
        "embeddings.cls_token": own["cls_token"][None, None],
        "embeddings.position_embeddings": F.pad(positions.flatten(0, 1), (0, 0, 1, 0))[None],
        "embeddings.patch_embeddings.projection.weight": own["embed.weight"],
        "embeddings.patch_embeddings.projection.bias": own["embed.bias"],
        "layernorm.weight": own["norm.weight"],
        "layernorm.bias": own["norm.bias"],
    }
    parts = {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.o_proj": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for i in range(2):
        for kind in ("weight", "bias"):
            for their, our in parts.items():
                matched[f"layers.{i}.{their}.{kind}"] = own[f"blocks.{i}.{our}.{kind}"]
            for letter, part in zip("qkv", own[f"blocks.{i}.attn.qkv.{kind}"].chunk(3), strict=True):
                matched[f"layers.{i}.attention.{letter}_proj.{kind}"] = part
    theirs.load_state_dict(matched)
    clip = video()
    with torch.no_grad():
        expected = theirs(clip.transpose(1, 2)).last_hidden_state
        out = model(clip)
    assert torch.allclose(out.features, expected[:, 0], atol=1e-5)
    assert torch.allclose(out.tokens.flatten(1, 2), expected[:, 1:], atol=1e-5)


# models 3 and 4: dense attention under a block mask, one head at a time

T, N, DIM, HEADS = 3, 4, 32, 4
FRAME, PLACE = torch.arange(T).repeat_interleave(N), torch.arange(N).repeat(T)
SAME_FRAME, SAME_PLACE = FRAME[:, None] == FRAME, PLACE[:, None] == PLACE


def dense(layer: Any, x: Tensor, masks: list[Tensor]) -> Tensor:
    """x [B, TN, D]; a mask [TN, TN] a head."""
    d = DIM // HEADS
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    out = []
    for h, mask in enumerate(masks):
        own = slice(h * d, (h + 1) * d)
        logits = torch.einsum("bid,bjd->bij", q[..., own], k[..., own]) / d**0.5
        out.append(logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v[..., own])
    return layer.proj(torch.cat(out, dim=-1))


def test_model_4_is_dense_attention_with_half_the_heads_masked_to_space_and_half_to_time():
    torch.manual_seed(0)
    layer, x = DotProductAttention(DIM, HEADS).double(), torch.randn(2, T, N, DIM).double()
    expected = dense(layer, x.flatten(1, 2), [SAME_FRAME] * 2 + [SAME_PLACE] * 2)
    assert torch.allclose(layer(x).flatten(1, 2), expected, atol=1e-12)


def test_model_3_is_dense_attention_masked_to_space_then_to_time():
    torch.manual_seed(0)
    block, x = FactorisedBlock(DIM, HEADS).double(), torch.randn(2, T, N, DIM).double()
    nn.init.normal_(block.attn_time.proj.weight)
    y = x.flatten(1, 2)
    y = y + dense(block.attn, block.norm1(y), [SAME_FRAME] * HEADS)
    y = y + dense(block.attn_time, block.norm_time(y), [SAME_PLACE] * HEADS)
    y = y + block.mlp(block.norm2(y))
    assert torch.allclose(block(x).flatten(1, 2), y, atol=1e-12)


# as a whole


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_every_parameter_learns_and_every_frame_counts(number: int):
    torch.manual_seed(0)
    model = ViViT(number, classes=5, **SMALL)
    clip = video().requires_grad_()
    for block in model.blocks:
        if isinstance(block, FactorisedBlock):  # 0 at first, which would hide its queries and keys
            nn.init.normal_(block.attn_time.proj.weight, std=0.1)
    out = model(clip)
    assert out.features.shape == (2, 32)
    assert out.tokens.shape == (2, 2, 16, 32)
    assert out.logits is not None
    assert out.logits.shape == (2, 5)
    F.cross_entropy(out.logits, torch.tensor([1, 2])).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert clip.grad is not None
    assert (clip.grad.abs().amax(dim=(1, 3, 4)) > 0).all()


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_features_know_the_order_of_frames_but_not_of_the_batch(number: int):
    torch.manual_seed(0)
    model = ViViT(number, **SMALL).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.15)
    clip = video().double()
    turned = clip.unflatten(2, (2, 3)).flip(2).flatten(2, 3)  # tubelets in reverse
    features = model(clip).features
    assert (model(turned).features - features).abs().max() > 1e-4
    assert torch.allclose(model(clip.flip(0)).features, features.flip(0), atol=1e-12)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_other_durations_and_sizes_are_taken(number: int):
    model = ViViT(number, **SMALL)
    assert model(torch.randn(1, 3, 12, 48, 24)).tokens.shape == (1, 4, 18, 32)


def test_bad_input_is_named():
    for said, call in {
        "model=5": lambda: ViViT(5, **SMALL),
        "heads=1": lambda: ViViT(4, **SMALL | {"heads": 1}),
        "7×32×32 does not divide into tubelets of 3×8×8": lambda: ViViT(**SMALL)(video(frames=7)),
        "no weight 'blocks.2": lambda: load_image_vit(
            ViViT(**SMALL | {"depth": 3}), image_vit().state_dict()
        ),
        "no weight 'cls_token'": lambda: load_image_vit(
            ViViT(**SMALL), image_vit(class_token=False, global_pool="avg").state_dict()
        ),
        r"proj.weight is \[32, 3, 4, 4\] in the image model": lambda: load_image_vit(
            ViViT(**SMALL), image_vit(patch_size=4).state_dict()
        ),
    }.items():
        with pytest.raises(ValueError, match=said):
            call()
