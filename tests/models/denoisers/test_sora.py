"""The packed transformer against Wan's block in diffusers, and against itself alone."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import models.denoisers.sora
from models.denoisers import wan
from models.denoisers.conditions import patchify, unpatchify
from models.denoisers.sora import PRESETS, Sora, build
from models.diffusion import noise
from models.diffusion.condition import Condition

SMALL: dict[str, Any] = {"dim": 48, "ffn": 80, "heads": 2, "depth": 2}
BUCKETS = [(1, 4, 6), (5, 4, 4), (3, 8, 2), (2, 2, 10)]  # an image, and clips of any aspect


def small(text_width: int | None = 8, **options: Any) -> Sora:
    torch.manual_seed(0)
    model = build(3, text_width, **SMALL | options).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.15)
    return model


def batch(shape: tuple[int, int, int], size: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Condition]:
    g = torch.Generator().manual_seed(seed)
    z, text = torch.randn(size, 3, *shape, generator=g), torch.randn(size, 5, 8, generator=g)
    mask = torch.arange(5) < torch.randint(0, 6, (size, 1), generator=g)
    return z.double(), torch.rand(size, generator=g).double(), Condition(text=text.double(), text_mask=mask)


def buckets() -> list[tuple[Tensor, Tensor, Condition]]:
    return [batch(shape, 1 + i % 2, seed=i) for i, shape in enumerate(BUCKETS)]


# Wan


def published(folder: Path, **options: Any) -> Any:
    """A tiny transformer of diffusers' class, all its parameters stirred, saved as a pipeline has it."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4}
    sizes |= {"text_dim": 16, "ffn_dim": 80, "num_layers": 2}
    theirs = WanTransformer3DModel(**sizes | options).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.15)
    theirs.save_pretrained(folder / "transformer")
    return theirs


WAN = SMALL | wan.OPTIONS


@pytest.mark.filterwarnings("ignore")
def test_published_weights_give_what_wan_gives_packed_too(tmp_path: Path):
    theirs = published(tmp_path)
    ours = build(4, 16, **WAN, weights=str(tmp_path)).eval()
    g = torch.Generator().manual_seed(1)
    parts, expected = [], []
    for i, shape in enumerate(BUCKETS):
        z, text = torch.randn(2, 4, *shape, generator=g), torch.randn(2, 5, 16, generator=g)
        words = torch.arange(5) < torch.tensor([[3 + i % 2], [5]])
        time = 1000 * torch.rand(2, generator=g).double()
        level = torch.atan2(time, 1000 - time) * 2 / math.pi  # of rectified flow at that time
        parts.append((z, level, Condition(text=text, text_mask=words)))
        padded = F.pad(text * words[..., None], (0, 0, 0, 512 - 5))
        with torch.no_grad():
            expected.append(theirs(z, time.float(), padded).sample)
    with torch.no_grad():
        alone = [ours(*part) for part in parts]
        together = ours.packed(*zip(*parts, strict=True))
    for wanted, *found in zip(expected, alone, together, strict=True):
        assert wanted.std() > 0.1
        for out in found:
            assert (out - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())


@pytest.mark.filterwarnings("ignore")
def test_published_weights_begin_a_model_that_is_told_more(tmp_path: Path):
    published(tmp_path)
    z, level, condition = (
        torch.randn(2, 4, 3, 4, 4),
        torch.tensor([0.2, 0.9]),
        Condition(text=torch.randn(2, 5, 16)),
    )
    plain = build(4, 16, **WAN, weights=str(tmp_path))
    more = build(4, 16, **WAN, weights=str(tmp_path), context=True)
    mask = torch.zeros(2, 1, 3, 1, 1)
    mask[:, :, :1] = 1
    with torch.no_grad():
        told = more(z, level, replace(condition, known=z * mask, known_mask=mask))
        assert torch.allclose(told, plain(z, level, condition), atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_weights_that_do_not_fit_are_refused(tmp_path: Path):
    published(tmp_path / "wan")
    published(tmp_path / "image", image_dim=8, added_kv_proj_dim=48)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    for said, folder, options in (
        ("holds no config.json", "none", {}),
        ("holds a UNet2DConditionModel", "other", {}),
        ("has image_dim 8: only Wan's text-to-video", "image", {}),
        ("has 2 heads, this model 4", "wan", {"heads": 4}),
        ("its blocks.0.attention.k_norm.weight is 48, this model's 24", "wan", {"qk_norm": "head"}),
        ("its blocks.2.attention.k_norm.weight is none", "wan", {"depth": 3}),
        ("patch_embedding.weight is 48×4×1×2×2, this model's 48×4", "wan", {"patch": (1, 1, 1)}),
    ):
        with pytest.raises(ValueError, match=f"weights={tmp_path / folder}.*{said}"):
            build(4, 16, **WAN | options, weights=str(tmp_path / folder))
    with pytest.raises(ValueError, match=r"its words\.0\.weight is 48×16, this model's 48×9"):
        build(4, 9, **WAN, weights=str(tmp_path / "wan"))


def test_flow_time_is_that_of_the_straight_path():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.allclose(wan.flow_time(noise.level(*noise.Flow(3.0)(t))), 3 * t / (1 + 2 * t), atol=1e-12)


def test_the_wan_preset_has_wans_parameters():
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        ours = build(16, 4096, **PRESETS["Wan-1.3B"])
        theirs = WanTransformer3DModel(
            num_attention_heads=12,
            attention_head_dim=128,
            in_channels=16,
            out_channels=16,
            ffn_dim=8960,
            num_layers=30,
            text_dim=4096,
        )
    assert isinstance(theirs, nn.Module)
    count, wanted = (sum(p.numel() for p in m.parameters()) for m in (ours, theirs))
    assert count == wanted + 4096  # we learn what 'no text' is


@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 2), (1, 1, 1)])
def test_unpatchify_undoes_patchify_for_every_bucket(patch: tuple[int, int, int]):
    for shape in BUCKETS:
        z = torch.randn(2, 3, *shape)
        assert torch.equal(unpatchify(patchify(z, patch), patch), z)


# company


@pytest.mark.parametrize("text_width", [8, None])
def test_packed_is_alone(text_width: int | None):
    model = small(text_width)
    parts = [(z, level, c if text_width else Condition()) for z, level, c in buckets()]
    together = model.packed(*zip(*parts, strict=True))
    for out, (z, level, condition) in zip(together, parts, strict=True):
        assert out.shape == z.shape
        assert (out - model(z, level, condition)).abs().max() < 1e-12
    back = model.packed(*zip(*parts[::-1], strict=True))[::-1]
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(together, back, strict=True))


def test_a_batch_mate_has_no_influence_at_all():
    model = small()
    parts = buckets()
    leaves = [z.requires_grad_() for z, _, _ in parts]
    out = model.packed(*zip(*parts, strict=True))
    gradients = torch.autograd.grad(out[2].square().sum(), leaves)
    assert [bool((g != 0).any()) for g in gradients] == [False, False, True, False]
    z, level, condition = parts[1]
    assert condition.text is not None
    parts[1] = (z.detach() + 5, level / 2, replace(condition, text=-condition.text))
    changed = model.packed(*zip(*parts, strict=True))
    assert [torch.equal(a, b) for a, b in zip(out, changed, strict=True)] == [True, False, True, True]


def test_packed_runs_on_shapes_alone():
    """As operations are counted before a training begins; texts then count as without padding."""
    model, parts = small(), buckets()
    model.packed(*zip(*parts, strict=True))  # tables of positions are there from then on
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(z) for z, _, _ in parts]
        texts = [
            replace(c, text=mode.from_tensor(c.text), text_mask=mode.from_tensor(c.text_mask))
            for *_, c in parts
        ]
        out = model.packed(fake, [mode.from_tensor(level) for _, level, _ in parts], texts)
    assert [x.shape for x in out] == [z.shape for z, _, _ in parts]


def test_padding_of_the_text_changes_nothing():
    model = small()
    z, level, condition = batch((3, 4, 4))
    assert condition.text is not None
    assert condition.text_mask is not None
    out = model(z, level, condition)
    padded = replace(
        condition,
        text=F.pad(condition.text, (0, 0, 0, 4), value=float("nan")),
        text_mask=F.pad(condition.text_mask, (0, 4)),
    )
    assert (model(z, level, padded) - out).abs().max() < 1e-12
    together = model.packed([z, z], [level, level], [condition, padded])
    assert all((x - out).abs().max() < 1e-12 for x in together)


def test_no_text_is_one_thing_however_it_is_said():
    model = small()
    z, level, condition = batch((3, 4, 4))
    none = model(z, level, condition.without_text())
    assert (none - model(z, level, Condition())).abs().max() < 1e-12
    assert (none - model(z, level, replace(condition, text_mask=None))).abs().max() > 1e-3


def test_packed_gradients_are_those_of_each_alone():
    model = small()
    parts = buckets()
    sum(x.square().sum() for x in model.packed(*zip(*parts, strict=True))).backward()
    packed = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    for part in parts:
        model(*part).square().sum().backward()
    for n, p in model.named_parameters():
        assert torch.allclose(p.grad, packed[n], rtol=1e-9, atol=1e-9), n  # type: ignore[arg-type]


# time and place


def test_an_image_is_a_clip_of_one_frame_in_joint_training_too():
    model = small(context=True)
    z, level, condition = batch((5, 4, 4))
    known = torch.zeros(2, 1, 5, 1, 1)
    known[:, :, [0, 3]] = 1
    joint = replace(condition, images=2, known=z.flip(0) * known, known_mask=known)
    out = model(z, level, joint)
    for part in (slice(0, 3), slice(3, 4), slice(4, 5)):
        assert joint.known is not None
        alone = replace(condition, known=joint.known[:, :, part], known_mask=known[:, :, part])
        assert (out[:, :, part] - model(z[:, :, part], level, alone)).abs().max() < 1e-12
    only = model(z, level, replace(joint, images=5))
    assert (only[:, :, 3:] - out[:, :, 3:]).abs().max() < 1e-12


def test_one_frame_is_the_image_path(monkeypatch: pytest.MonkeyPatch):
    """Without time: two axes of rotary positions, those of time left unturned."""
    model = small()
    z, level, condition = batch((1, 4, 6))
    out = model(z, level, condition)

    def flat(frames: int, height: int, width: int, head: int, device: Any, dtype: Any) -> Any:
        assert frames == 1
        third = head // 2 // 3
        rate = 10_000.0 ** -(torch.arange(third).double() / third)
        rows, columns = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
        angle = torch.cat([rows[:, None] * rate, columns[:, None] * rate], dim=-1)
        angle = F.pad(angle, (head // 2 - 2 * third, 0))
        return models.denoisers.sora.Rotary(angle.cos(), angle.sin())

    monkeypatch.setattr(models.denoisers.sora, "rotary", flat)
    assert (model(z, level, condition) - out).abs().max() < 1e-12


def test_the_prediction_does_not_depend_on_where_the_grid_begins(monkeypatch: pytest.MonkeyPatch):
    model = small(patch=(1, 1, 1))
    z, level, condition = batch((3, 4, 6))
    out = model(z, level, condition)
    for axis in (2, 3, 4):  # while order counts on each axis
        assert (model(z.flip(axis), level, condition).flip(axis) - out).abs().max() > 1e-3

    def shifted(*sides: Any, by: tuple[int, int, int]) -> Any:
        grid = torch.cartesian_prod(*(torch.arange(n) for n in sides[:3])) + torch.tensor(by)
        return models.denoisers.sora.Rotary.of(grid, sides[3])

    monkeypatch.setattr(models.denoisers.sora, "rotary", lambda *a: shifted(*a, by=(9, -4, 100)))
    assert (model(z, level, condition) - out).abs().max() < 1e-10


# beginning, conditions, use


def test_a_new_model_gives_zero_and_its_blocks_are_the_identity_bit_for_bit():
    torch.manual_seed(0)
    model = build(3, 8, **SMALL)
    assert torch.equal(
        model(torch.randn(2, 3, 3, 4, 4), torch.rand(2), Condition()), torch.zeros(2, 3, 3, 4, 4)
    )
    x, c, words = torch.randn(2, 12, 48), torch.randn(2, 48), torch.randn(2, 5, 48)
    turn = models.denoisers.sora.rotary(3, 2, 2, 24, torch.device("cpu"), torch.float32)
    for block in model.blocks:
        assert torch.equal(block(x, model.ada(c).unflatten(-1, (6, -1)), turn, words), x)


def test_every_parameter_has_a_gradient_within_three_steps():
    torch.manual_seed(0)
    model = build(3, 8, context=True, upsample=True, **SMALL).double()
    z, level, condition = batch((3, 4, 4))
    condition = replace(
        condition,
        text_mask=torch.arange(5) < torch.tensor([[0], [3]]),
        known=z,
        known_mask=torch.ones(2, 1, 3, 1, 1),
        low=z,
        low_level=level,
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    seen: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        (model(z, level, condition) - torch.sin(3 * z)).square().mean().backward()
        seen |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    assert {n for n, _ in model.named_parameters()} - seen == set()


def test_each_condition_counts():
    model = small(context=True, upsample=True)
    z, level, condition = batch((3, 4, 4))
    condition = replace(condition, low=z.flip(0), low_level=level)
    out = model(z, level, condition)
    for change in (
        model(z, level.flip(0), condition),
        model(z, level, replace(condition, text=torch.randn(2, 5, 8).double(), text_mask=None)),
        model(z, level, replace(condition, low=z)),
        model(z, level, replace(condition, low_level=None)),
        model(z, level, replace(condition, known=z, known_mask=torch.ones(2, 1, 3, 1, 1))),
    ):
        assert (change - out).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-6


def test_blocks_checkpoint_from_outside_also_packed():
    model = small()
    parts = buckets()
    sum(x.square().sum() for x in model.packed(*zip(*parts, strict=True))).backward()
    plain = [p.grad for p in model.parameters()]
    model.zero_grad()
    for block in model.blocks:
        inner = block.forward
        block.forward = lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=False)  # type: ignore[method-assign, assignment]
    sum(x.square().sum() for x in model.packed(*zip(*parts, strict=True))).backward()
    assert all(torch.equal(p.grad, q) for p, q in zip(model.parameters(), plain, strict=True))  # type: ignore[arg-type]


def test_rotary_tables_first_met_while_sampling_serve_training():
    model = small()
    z, level, condition = batch((4, 6, 2))
    with torch.inference_mode():
        model(z, level, condition)
    model(z, level, condition).sum().backward()


def test_bfloat16_autocast_is_close():
    model = small()
    parts = buckets()
    exact = model.packed(*zip(*parts, strict=True))
    single = [
        (z.float(), level.float(), replace(c, text=None if c.text is None else c.text.float()))
        for z, level, c in parts
    ]
    with torch.autocast("cpu", torch.bfloat16):
        out = model.float().packed(*zip(*single, strict=True))
    for a, b in zip(out, exact, strict=True):
        assert (a - b).abs().mean() < 0.05 * b.abs().mean()


def test_bad_input_is_named():
    z, level, condition = batch((3, 4, 4))
    for said, call in {
        "condition.text: this model takes no text": lambda: small(None)(z, level, condition),
        "condition.known: this model takes no known": lambda: small()(z, level, Condition(known=z)),
        "do not divide into patches of 1×2×2": lambda: small()(z[..., :3], level, condition),
        "condition.images=4, but there are only 3": lambda: small()(z, level, Condition(images=4)),
        "images as batches of one frame": lambda: small().packed([z], [level], [Condition(images=1)]),
        "heads of an even width": lambda: build(3, dim=30, heads=2),
        "give three numbers": lambda: build(3, patch=(2, 2)),  # type: ignore[arg-type]
    }.items():
        with pytest.raises(ValueError, match=said):
            call()
