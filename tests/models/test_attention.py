"""Every kernel and layout against the formula written out, torch's own modules, and Wan's rotary positions."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from models import attention
from models.attention import (
    Backend,
    CrossAttention,
    Packing,
    Rotary,
    SelfAttention,
    along,
    attend,
    attend_packed,
    backend,
)

CPU: list[Backend] = ["auto", "plain", "math", "flash"]
KERNELS: list[tuple[str, torch.dtype, Backend]] = [("cpu", torch.float32, name) for name in CPU]
if torch.cuda.is_available():
    KERNELS += [("cuda", torch.float32, name) for name in ("auto", "plain", "math", "efficient")]
    KERNELS += [("cuda", torch.bfloat16, name) for name in ("auto", "efficient", "flash", "cudnn")]


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """One query at a time, in float64."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    shape = (*q.shape[:3], k.shape[2])
    seen = torch.ones(shape, dtype=torch.bool) if mask is None else mask.cpu().expand(shape)
    extra = torch.zeros(shape) if bias is None else bias.cpu().expand(shape)
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        keys = [j for j in range(k.shape[2]) if seen[b, h, i, j]]
        weights = [
            math.exp(q[b, h, i] @ k[b, h, j] / math.sqrt(q.shape[3]) + extra[b, h, i, j]) for j in keys
        ]
        for w, j in zip(weights, keys, strict=True):
            out[b, h, i] += w / sum(weights) * v[b, h, j]
    return out


@pytest.mark.parametrize("extras", ["nothing", "mask", "padding", "bias", "mask and bias"])
@pytest.mark.parametrize(("device", "dtype", "name"), KERNELS)
def test_every_kernel_gives_the_formula(device: str, dtype: torch.dtype, name: Backend, extras: str):
    if device == "cuda" and name in ("flash", "cudnn") and extras != "nothing":
        pytest.skip(f"{name} takes no {extras}")
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 8, generator=g).to(device, dtype) for length in (5, 7, 7))
    mask, bias = None, None
    if "mask" in extras:
        mask = (torch.rand(5, 7, generator=g) < 0.6).to(device)
        mask[2] = False  # a query that may look nowhere
    if extras == "padding":
        mask = (torch.arange(7) < torch.tensor([[4], [7]]))[:, None, None].to(device)  # B 1 1 L
    if "bias" in extras:
        bias = torch.randn(3, 5, 7, generator=g).to(device)
    with backend(name):
        out = attend(q, k, v, mask, bias)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (out.double().cpu() - by_hand(q, k, v, mask, bias)).abs().max() < tolerance


@pytest.mark.parametrize("name", CPU)
def test_a_query_that_may_look_nowhere_gives_zero_and_finite_gradients(name: Backend):
    q, k, v = (torch.randn(1, 2, 3, 8, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    with backend(name):
        out = attend(q, k, v, mask)
        out.square().sum().backward()
    assert torch.equal(out[:, :, 1], torch.zeros(1, 2, 8))
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


# As many heads as positions: an output reshaped without its transposition has the right shape, and is wrong.


def copied(layer: SelfAttention | CrossAttention) -> nn.MultiheadAttention:
    dim = layer.proj.out_features
    reference = nn.MultiheadAttention(dim, layer.heads, batch_first=True)
    with torch.no_grad():
        if isinstance(layer, SelfAttention):
            reference.in_proj_weight.copy_(layer.qkv.weight)
            reference.in_proj_bias.copy_(layer.qkv.bias)
        else:
            reference.in_proj_weight.copy_(torch.cat([layer.q.weight, layer.kv.weight]))
            reference.in_proj_bias.copy_(torch.cat([layer.q.bias, layer.kv.bias]))
        reference.out_proj.load_state_dict(layer.proj.state_dict())
    return reference


@pytest.mark.parametrize("name", CPU)
def test_self_attention_is_torchs(name: Backend):
    torch.manual_seed(0)
    layer, x = SelfAttention(32, 4), torch.randn(2, 4, 32)
    mask = torch.ones(4, 4).tril().bool()
    with backend(name):
        out = layer(x, mask)
    assert torch.allclose(out, copied(layer)(x, x, x, attn_mask=~mask)[0], atol=1e-6)


@pytest.mark.parametrize("name", CPU)
def test_cross_attention_is_torchs(name: Backend):
    torch.manual_seed(0)
    layer, x, tokens = CrossAttention(32, 4), torch.randn(2, 4, 32), torch.randn(2, 6, 32)
    mask = torch.arange(6) < torch.tensor([[2], [6]])
    with backend(name):
        out = layer(x, tokens, mask)
    assert torch.allclose(out, copied(layer)(x, tokens, tokens, key_padding_mask=~mask)[0], atol=1e-6)


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("axis", ["space", "time"])
def test_attention_along_an_axis_is_dense_attention_under_a_block_mask(axis: str, name: Backend):
    torch.manual_seed(0)
    t, n = 3, 4
    layer, x = SelfAttention(32, 4).double(), torch.randn(2, t, n, 32, dtype=torch.float64)
    frame, place = torch.arange(t).repeat_interleave(n), torch.arange(n).repeat(t)
    same = frame if axis == "space" else place
    dense = copied(layer).double()
    whole = x.flatten(1, 2)
    expected = dense(whole, whole, whole, attn_mask=same[:, None] != same[None])[0]
    with backend(name):
        out = along(axis, layer, x)  # type: ignore[arg-type]
    assert torch.allclose(out.flatten(1, 2), expected, atol=1e-12)


def test_qk_norm_takes_the_scale_from_each_head_alone():
    torch.manual_seed(0)
    layer, x = SelfAttention(32, 4, qk_norm=True).double(), torch.randn(2, 5, 32, dtype=torch.float64)
    out = layer(x)
    with torch.no_grad():  # queries of head 1 and keys of head 2
        for rows in (slice(8, 16), slice(32 + 16, 32 + 24)):
            layer.qkv.weight[rows] *= 7
            layer.qkv.bias[rows] *= 7
    assert torch.allclose(layer(x), out, atol=1e-5)  # but for the norm's eps
    plain = SelfAttention(32, 4).double()
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "norm" not in k})
    assert not torch.allclose(plain(x), out, atol=1e-2)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="heads=5 does not divide dim=32"):
        SelfAttention(32, 5)


@pytest.mark.parametrize("name", CPU)
def test_packed_sequences_are_what_each_is_alone(name: Backend):
    torch.manual_seed(0)
    lengths, others = [3, 1, 6], [2, 4, 1]
    q = torch.randn(1, 2, sum(lengths), 8, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, sum(others), 8, dtype=torch.float64)
    with backend(name):
        out = attend_packed(q, k, v, Packing.of(lengths), Packing.of(others))
    begin, start = 0, 0
    for n, m in zip(lengths, others, strict=True):
        alone = by_hand(
            q[:, :, begin : begin + n], k[:, :, start : start + m], v[:, :, start : start + m], None, None
        )
        assert torch.allclose(out[:, :, begin : begin + n], alone, atol=1e-12)
        begin, start = begin + n, start + m


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel needs CUDA")
@pytest.mark.parametrize("lengths", [[3, 1, 60], [300, 17, 200]])
def test_the_variable_length_kernel_gives_the_same_forward_and_backward(lengths: list[int]):
    torch.manual_seed(0)
    packing = Packing.of(lengths, torch.device("cuda"))
    leaves = [
        torch.randn(1, 4, sum(lengths), 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]
    results = []
    for name in ("auto", "plain"):
        with backend(name):  # type: ignore[arg-type]
            out = attend_packed(*leaves, packing, packing)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for fast, slow in zip(*results, strict=True):
        assert torch.allclose(fast.float(), slow.float(), atol=5e-2, rtol=5e-2)


def test_rotary_positions_are_wans():
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    for head in (16, 64, 128):
        cos, sin = WanRotaryPosEmbed(head, (1, 1, 1), 32)(torch.zeros(1, 1, 3, 4, 5))
        ours = Rotary.of(torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(5)), head)
        assert ours.cos.shape == (60, head // 2)
        assert torch.allclose(ours.cos, cos[0, :, 0, ::2].double(), atol=1e-6)
        assert torch.allclose(ours.sin, sin[0, :, 0, ::2].double(), atol=1e-6)


def test_rotary_scores_know_relative_offsets_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 60, 32, dtype=torch.float64)
    places = torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(5))

    def scores(of_q: Tensor, of_k: Tensor) -> Tensor:
        return Rotary.of(of_q, 32).turn(q) @ Rotary.of(of_k, 32).turn(k).transpose(-1, -2)

    here = scores(places, places)
    assert torch.allclose(
        scores(places + torch.tensor([7, -2, 40]), places + torch.tensor([7, -2, 40])), here
    )
    for axis in range(3):  # and each axis counts
        moved = places.clone()
        moved[:, axis] += 1
        assert (scores(moved, places) - here).abs().max() > 0.1


def test_turning_keeps_lengths_and_type():
    x = torch.randn(1, 2, 6, 16, dtype=torch.bfloat16)
    turned = Rotary.of(torch.randint(0, 99, (6, 3)), 16).turn(x)
    assert turned.dtype == x.dtype
    assert torch.allclose(turned.float().norm(dim=-1), x.float().norm(dim=-1), rtol=1e-2)


def test_more_sequences_than_a_kernel_takes_are_split_without_a_difference(monkeypatch):
    q, k, v = torch.randn(3, 7, 2, 5, 8)
    bias, mask = torch.randn(2, 5, 5), torch.rand(5, 5) < 0.7
    whole = attention.attend(q, k, v, mask, bias)
    monkeypatch.setattr(attention, "MOST_ROWS", 3)
    torch.testing.assert_close(attention.attend(q, k, v, mask, bias), whole)
