"""DiT against its published sizes, diffusers' implementation, and what its parts must not do."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.denoisers.conditions import patchify, unpatchify
from models.denoisers.dit import PRESETS, Block, DiT, build, time_positions
from models.diffusion.condition import Condition

SMALL: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2}
ATTENTIONS = ["full", "factorised", "alternating"]
CONDITIONINGS = ["adaln_zero", "adaln", "cross_attention", "in_context"]


def trained(model: nn.Module) -> nn.Module:
    """As if: no weight is 0."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.15)
    return model


def small(**options: Any) -> DiT:
    torch.manual_seed(0)
    return trained(build(3, 8, **SMALL | options)).double()  # type: ignore[return-value]


def clip(frames: int = 4, batch: int = 2, **fields: Any) -> tuple[Tensor, Tensor, Condition]:
    g = torch.Generator().manual_seed(1)
    z, text = (torch.randn(*s, generator=g).double() for s in ((batch, 3, frames, 4, 6), (batch, 5, 8)))
    mask = torch.arange(5) < torch.tensor([[3], [5]])[:batch]
    level = torch.rand(batch, generator=g).double()
    return z, level, Condition(text=text, text_mask=mask, **fields)


# sizes


@pytest.mark.parametrize(
    ("preset", "count"),
    [("S/2", 32_963_360), ("B/2", 130_512_416), ("L/2", 458_102_816), ("XL/2", 675_129_632)],
)
def test_parameter_counts_are_those_published(preset: str, count: int):
    with torch.device("meta"):
        model = build(4, classes=1000, learn_sigma=True, **PRESETS[preset])
    table = 16 * 16 * model.dim  # the original counts its fixed table of positions
    assert sum(p.numel() for p in model.parameters()) + table == count


@pytest.mark.parametrize(
    ("conditioning", "millions"), [("in_context", 449), ("cross_attention", 598), ("adaln", 600)]
)
def test_the_papers_other_variants_of_xl_have_its_sizes(conditioning: str, millions: int):
    with torch.device("meta"):
        model = build(4, classes=1000, learn_sigma=True, conditioning=conditioning, **PRESETS["XL/2"])  # type: ignore[arg-type]
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 1


def test_every_preset_builds():
    for options in PRESETS.values():
        with torch.device("meta"):
            build(4, 16, **{**options, "depth": 2})


def test_image_dit_is_that_of_diffusers():
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    ours = trained(build(4, classes=10, learn_sigma=True, dim=32, depth=2, heads=4)).eval()
    theirs = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    ).eval()
    own = ours.state_dict()
    state = {
        "pos_embed.proj.weight": own["embed.weight"].unflatten(1, (2, 2, 4)).permute(0, 3, 1, 2),
        "pos_embed.proj.bias": own["embed.bias"],
        "proj_out_1.weight": own["final.ada.weight"],
        "proj_out_1.bias": own["final.ada.bias"],
        "proj_out_2.weight": own["final.linear.weight"],
        "proj_out_2.bias": own["final.linear.bias"],
    }
    for i in range(2):
        a, b = f"blocks.{i}.", f"transformer_blocks.{i}."
        emb = b + "norm1.emb."
        state[emb + "class_embedder.embedding_table.weight"] = own["label.weight"]
        for kind in ("weight", "bias"):
            for k, name in enumerate(("to_q", "to_k", "to_v")):
                state[f"{b}attn1.{name}.{kind}"] = own[f"{a}attentions.0.qkv.{kind}"].chunk(3)[k]
            state[f"{b}attn1.to_out.0.{kind}"] = own[f"{a}attentions.0.proj.{kind}"]
            state[f"{b}norm1.linear.{kind}"] = own[f"{a}ada.{kind}"]
            state[f"{b}ff.net.0.proj.{kind}"] = own[f"{a}mlp.0.{kind}"]
            state[f"{b}ff.net.2.{kind}"] = own[f"{a}mlp.2.{kind}"]
            state[f"{emb}timestep_embedder.linear_1.{kind}"] = own[f"level.mlp.0.{kind}"]
            state[f"{emb}timestep_embedder.linear_2.{kind}"] = own[f"level.mlp.2.{kind}"]
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"pos_embed.pos_embed"}
    for block in theirs.transformer_blocks:  # it spaces the rates by 1/127, DiT's own code by 1/128
        block.norm1.emb.time_proj.downscale_freq_shift = 0

    z, label = torch.randn(3, 4, 8, 8), torch.tensor([3, 10, 0])
    steps = torch.tensor([0, 501, 999])
    with torch.no_grad():
        expected = theirs(z, steps, label).sample
        out = ours(z[:, :, None], steps / 1000, Condition(), label=label)
    assert expected.std() > 0.1
    assert (out[:, :, 0] - expected).abs().max() < 1e-5


# at the beginning


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_new_block_is_the_identity_bit_for_bit(attention: str):
    model = build(3, 8, attention=attention, **SMALL)  # type: ignore[arg-type]
    x, c, prompt = torch.randn(2, 4, 6, 32), torch.randn(2, 32), torch.randn(2, 5, 32)
    for block in model.blocks:
        assert torch.equal(block(x, c, prompt), x)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_new_model_gives_exactly_zero(conditioning: str):
    z, level, condition = clip()
    out = build(3, 8, conditioning=conditioning, **SMALL).double()(z, level, condition)  # type: ignore[arg-type]
    assert out.shape == z.shape
    assert torch.equal(out, torch.zeros_like(z))


@pytest.mark.parametrize(
    ("attention", "conditioning"),
    [(a, c) for a in ATTENTIONS for c in CONDITIONINGS if c != "in_context" or a == "full"],
)
def test_every_parameter_has_a_gradient_within_three_steps(attention: str, conditioning: str):
    torch.manual_seed(0)
    options: dict[str, Any] = {"attention": attention, "conditioning": conditioning}
    model = build(3, 8, classes=5, context=True, upsample=True, qk_norm=True, **SMALL | options).double()
    z, level, condition = clip()
    condition = replace(
        condition.without_text(torch.tensor([False, True])),
        known=z,
        known_mask=torch.ones(2, 1, 4, 1, 1),
        low=z,
        low_level=level,
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    seen = set()
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(z, level, condition, label=torch.tensor([1, 5])) - torch.sin(3 * z)).square().mean()
        loss.backward()
        seen |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    assert {n for n, _ in model.named_parameters()} - seen == set()


# what may influence what


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_independent_images_and_the_clip_do_not_see_each_other(attention: str):
    model = small(attention=attention)
    z, level, condition = clip(frames=5, images=2)  # 3 frames and 2 images
    z.requires_grad_()
    out = model(z, level, condition)
    group = [0, 0, 0, 1, 2]
    for i in range(5):
        (gradient,) = torch.autograd.grad(out[:, :, i].square().sum(), z, retain_graph=True)
        for j in range(5):
            other = z.detach().clone()
            other[:, :, j] += 3
            same = torch.equal(model(other, level, condition)[:, :, i], out[:, :, i])
            assert same == (group[i] != group[j])
            assert (gradient[:, :, j] == 0).all() == (group[i] != group[j])


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_joint_images_come_out_as_in_passes_of_their_own(attention: str):
    model = small(attention=attention)
    z, level, condition = clip(frames=5, images=2)
    out = model(z, level, condition)
    alone = replace(condition, images=0)
    for part in (slice(0, 3), slice(3, 4), slice(4, 5)):
        assert (out[:, :, part] - model(z[:, :, part], level, alone)).abs().max() < 1e-12


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_text_level_and_label_count_under_every_conditioning(conditioning: str):
    for text in ("pooled", "tokens", "both"):
        model = small(conditioning=conditioning, text=text, classes=4)
        z, level, condition = clip()
        out = model(z, level, condition, label=torch.tensor([0, 1]))
        assert condition.text is not None
        for change in (
            model(z, level.flip(0), condition, label=torch.tensor([0, 1])),
            model(z, level, condition, label=torch.tensor([1, 0])),
            model(z, level, replace(condition, text=condition.text.flip(0)), label=torch.tensor([0, 1])),
        ):
            assert (change - out).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-6


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_padding_of_the_text_changes_nothing(conditioning: str):
    model = small(conditioning=conditioning)
    z, level, condition = clip()
    assert condition.text is not None
    assert condition.text_mask is not None
    poisoned = condition.text.masked_fill(~condition.text_mask[..., None], float("nan"))
    out = model(z, level, condition)
    assert torch.equal(model(z, level, replace(condition, text=poisoned)), out)
    shorter = replace(condition, text=condition.text[:, :3], text_mask=condition.text_mask[:, :3])
    assert torch.allclose(model(z, level, shorter)[0], out[0], atol=1e-12)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_no_text_is_one_thing_however_it_is_said(conditioning: str):
    model = small(conditioning=conditioning)
    z, level, condition = clip()
    none = model(z, level, condition.without_text())
    assert none.isfinite().all()
    assert torch.allclose(none, model(z, level, Condition()), atol=1e-12)
    half = model(z, level, condition.without_text(torch.tensor([True, False])))
    assert torch.allclose(half[0], none[0], atol=1e-12)
    assert torch.allclose(half[1], model(z, level, condition)[1], atol=1e-12)
    assert (none - model(z, level, condition)).abs().max() > 1e-6


def test_no_label_is_the_null_class():
    model = small(classes=4)
    z, level, condition = clip()
    assert torch.equal(model(z, level, condition), model(z, level, condition, label=torch.full((2,), 4)))


def test_known_frames_and_a_low_resolution_video_count_and_none_known_is_zero():
    model = small(context=True, upsample=True)
    z, level, condition = clip()
    condition = replace(condition, low=z.flip(0), low_level=level)
    nothing = replace(condition, known=torch.zeros_like(z), known_mask=torch.zeros(2, 1, 4, 1, 1))
    out = model(z, level, condition)
    assert torch.equal(model(z, level, nothing), out)
    for change in (
        replace(condition, known=z, known_mask=torch.ones(2, 1, 4, 1, 1)),
        replace(nothing, known_mask=torch.ones(2, 1, 4, 1, 1)),
        replace(condition, low=z),
        replace(condition, low_level=None),
    ):
        assert (model(z, level, change) - out).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-6


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_frames_rows_and_columns_have_an_order_and_frames_see_each_other(attention: str):
    model = small(attention=attention, patch=1)
    z, level, condition = clip()
    out = model(z, level, condition)
    for axis in (2, 3, 4):
        assert (model(z.flip(axis), level, condition).flip(axis) - out).abs().max() > 1e-6
    far = z.clone()
    far[:, :, 3] += 1
    assert (model(far, level, condition)[:, :, 0] - out[:, :, 0]).abs().max() > 1e-6


def test_the_first_frame_and_images_have_the_position_of_an_image():
    table = time_positions(5, 2, 32, torch.device("cpu"))
    assert torch.equal(table[[0, 3, 4]], torch.zeros(3, 1, 32))
    assert len(table[:3].unique(dim=0)) == 3


# shapes, and how it is run


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2), (1, 1, 1), (3, 1, 2)])
def test_unpatchify_undoes_patchify(patch: tuple[int, int, int]):
    z = torch.randn(2, 3, 6, 4, 8)
    x = patchify(z, patch)
    assert x.shape == (2, 6 // patch[0], 4 // patch[1], 8 // patch[2], 3 * patch[0] * patch[1] * patch[2])
    assert torch.equal(unpatchify(x, patch), z)
    token = z[1, :, : patch[0], 4 - patch[1] :, patch[2] : 2 * patch[2]]  # of time 0, last row, column 1
    assert torch.equal(x[1, 0, -1, 1], token.movedim(0, -1).flatten())


def test_one_model_takes_other_grids_and_durations():
    model = small(patch_t=2, attention="factorised")
    _, level, condition = clip()
    for shape in ((2, 4, 6), (4, 2, 2), (6, 8, 4)):
        z = torch.randn(2, 3, *shape).double()
        assert model(z, level, condition).shape == z.shape


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_blocks_checkpoint_from_outside(attention: str):
    model = small(attention=attention)
    z, level, condition = clip(frames=5, images=2)
    model(z, level, condition).square().sum().backward()
    plain = [p.grad for p in model.parameters()]
    model.zero_grad()
    for block in model.blocks:
        assert isinstance(block, Block)
        inner = block.forward
        block.forward = lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=False)  # type: ignore[method-assign]
    model(z, level, condition).square().sum().backward()
    for p, before in zip(model.parameters(), plain, strict=True):
        assert (p.grad is None and before is None) or torch.equal(p.grad, before)  # type: ignore[arg-type]


def test_bfloat16_autocast_and_pure_bfloat16_run():
    z, level, condition = clip()
    assert condition.text is not None
    model = small(qk_norm=True, attention="factorised")
    exact = model(z, level, condition)
    model = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(z.float(), level.float(), replace(condition, text=condition.text.float()))
    assert (out - exact).abs().mean() < 0.05 * exact.abs().mean()
    half = replace(condition, text=condition.text.bfloat16())
    assert model.bfloat16()(z.bfloat16(), level.float(), half).dtype == torch.bfloat16


def test_bad_input_is_named():
    z, level, condition = clip()
    model = build(3, **SMALL)
    for said, call in {
        "condition.text: this model takes no text": lambda: model.double()(z, level, condition),
        "condition.known: this model takes no known": lambda: model(z, level, Condition(known=z)),
        "condition.low: this model takes no low": lambda: model(z, level, Condition(low=z)),
        "label: this model knows no classes": lambda: model(z, level, Condition(), label=torch.zeros(2)),
        "do not divide into patches": lambda: model(z[..., :5], level, Condition()),
        "low is missing": lambda: build(3, upsample=True, **SMALL)(z, level, Condition()),
        "belong together": lambda: build(3, context=True, **SMALL)(z, level, Condition(known=z)),
        "8 features a token, the model was built for 9": lambda: small_text(9)(z, level, condition),
        "need patch_t=1": lambda: build(3, patch_t=2, **SMALL)(z, level, Condition(images=2)),
        "in context need attention='full'": lambda: build(
            3, conditioning="in_context", attention="factorised", **SMALL
        ),
        "dim=30": lambda: build(3, dim=30, heads=2),
        "heads=5 does not divide": lambda: build(3, dim=32, heads=5),
    }.items():
        with pytest.raises(ValueError, match=said):
            call()


def small_text(width: int) -> DiT:
    return build(3, width, **SMALL).double()
