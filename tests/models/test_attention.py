"""Every kernel and layout against the formula written out, torch's own modules, and Wan's rotary positions."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from models import attention
from models.attention import (
    CrossAttention,
    Kernel,
    Mask,
    Rotary,
    SelfAttention,
    Tokens,
    along,
    attend,
    choose_kernel,
)

CPU: list[Kernel] = ["auto", "plain", "sdpa", "math", "flash"]
KERNELS: list[tuple[str, torch.dtype, Kernel]] = [("cpu", torch.float32, name) for name in CPU]
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
def test_every_kernel_gives_the_formula(device: str, dtype: torch.dtype, name: Kernel, extras: str):
    if device == "cuda" and name in ("flash", "cudnn") and extras != "nothing":
        pytest.skip(f"{name} takes no {extras}")
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 8, generator=g).to(device, dtype) for length in (5, 7, 7))
    mask, bias, seen = None, None, None
    if "mask" in extras:  # the third query may look nowhere
        own, of_keys = torch.tensor([0, 1, 5, 0, 1]), torch.tensor([0, 0, 1, 1, 0, -1, 1])
        mask, seen = Mask(Tokens(own.to(device)), Tokens(of_keys.to(device))), own[:, None] == of_keys
    if extras == "padding":
        there = torch.arange(7) < torch.tensor([[4], [7]])
        mask, seen = Mask.padding(there.to(device)), there[:, None, None]  # B 1 1 L
    if "bias" in extras:
        bias = torch.randn(3, 5, 7, generator=g).to(device)
    out = attend(q, k, v, mask, bias, name)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (out.double().cpu() - by_hand(q, k, v, seen, bias)).abs().max() < tolerance


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


@pytest.mark.parametrize("mask", [None, Mask.padding(torch.arange(9)[None] < torch.tensor([[4], [9]]))])
@pytest.mark.parametrize("bias", [None, torch.randn(4, 9, 9)])
def test_on_a_cpu_bf16_is_float32_rounded_once_under_autocast_too(
    mask: Mask | None, bias: torch.Tensor | None
):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 16).bfloat16().requires_grad_() for _ in range(3))
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    bias = None if bias is None else bias.bfloat16().float()
    expected = attend(*wide, mask, bias)
    expected.square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q, k, v, mask, bias)
    found.square().sum().backward()
    assert torch.equal(found, expected.bfloat16())
    for x, y in zip((q, k, v), wide, strict=True):
        torch.testing.assert_close(x.grad.float(), y.grad, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("name", CPU)
def test_self_attention_is_torchs(name: Kernel):
    torch.manual_seed(0)
    layer, x = SelfAttention(32, 4), torch.randn(2, 4, 32)
    choose_kernel(layer, name)
    out = layer(x, Mask().in_order(4))
    later = torch.ones(4, 4).triu(1).bool()
    assert torch.allclose(out, copied(layer)(x, x, x, attn_mask=later)[0], atol=1e-6)


@pytest.mark.parametrize("name", CPU)
def test_cross_attention_is_torchs(name: Kernel):
    torch.manual_seed(0)
    layer, x, tokens = CrossAttention(32, 4), torch.randn(2, 4, 32), torch.randn(2, 6, 32)
    mask = torch.arange(6) < torch.tensor([[2], [6]])
    choose_kernel(layer, name)
    out = layer(x, tokens, Mask.padding(mask))
    assert torch.allclose(out, copied(layer)(x, tokens, tokens, key_padding_mask=~mask)[0], atol=1e-6)


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("axis", ["space", "time"])
def test_attention_along_an_axis_is_dense_attention_under_a_block_mask(axis: str, name: Kernel):
    torch.manual_seed(0)
    t, n = 3, 4
    layer, x = SelfAttention(32, 4).double(), torch.randn(2, t, n, 32, dtype=torch.float64)
    frame, place = torch.arange(t).repeat_interleave(n), torch.arange(n).repeat(t)
    same = frame if axis == "space" else place
    dense = copied(layer).double()
    whole = x.flatten(1, 2)
    expected = dense(whole, whole, whole, attn_mask=same[:, None] != same[None])[0]
    choose_kernel(layer, name)
    out = along(axis, layer, x)  # type: ignore[arg-type]
    assert torch.allclose(out.flatten(1, 2), expected, atol=1e-12)


def test_qk_norm_takes_the_scale_from_each_head_alone():
    torch.manual_seed(0)
    layer, x = SelfAttention(32, 4, qk_norm="head").double(), torch.randn(2, 5, 32, dtype=torch.float64)
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


# ------------------------------------------------------------ masks


LENGTHS, OTHERS = [3, 1, 6], [2, 4, 1]


def masks() -> dict[str, tuple[Mask | None, Tensor]]:
    """By name: a mask, and the same for 10 queries and keys as someone would write it down."""
    document = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2, 2])
    same, order = document[:, None] == document, torch.arange(10)[:, None] >= torch.arange(10)
    clip = torch.eye(5).bool()
    clip[:3, :3] = True  # 3 frames that move and 2 images, 2 tokens each
    there = torch.tensor([[True] * 4 + [False] * 6, [True] * 10])
    return {
        "documents": (Mask.documents(LENGTHS), same),
        "causal": (Mask().in_order(10), order),
        "documents in order": (Mask.documents(LENGTHS).in_order(10), same & order),
        "frames": (Mask.frames(5, 2, 2), clip.repeat_interleave(2, 0).repeat_interleave(2, 1)),
        "padding": (Mask.padding(there), there[:, None, None]),
    }


def numbers(rows: int, queries: int, keys: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = (queries, keys, keys)
    return [torch.randn(rows, 2, n, 8, generator=g, dtype=torch.float64, requires_grad=True) for n in sizes]


def results(leaves: list[Tensor], mask: Mask | None, kernel: Kernel) -> list[Tensor]:
    """out, dq, dk, dv"""
    out = attend(*leaves, mask, kernel=kernel)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


def written(leaves: list[Tensor], seen: Tensor) -> list[Tensor]:
    q, k, v = leaves
    logits = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~seen, float("-inf"))
    out = torch.softmax(logits, dim=-1).nan_to_num(0.0) @ v
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


@pytest.fixture
def flex_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    """torch has the gradients of its formula, and refuses a CPU at the door."""
    import torch.nn.attention.flex_attention as flex

    monkeypatch.setattr(flex, "_validate_device", lambda *x: None)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("rule", list(masks()))
@pytest.mark.parametrize("kernel", [*CPU, "flex", "varlen"])
def test_every_kernel_reads_the_mask_alike(rule: str, kernel: Kernel, flex_on_a_cpu: None):
    mask, seen = masks()[rule]
    leaves = numbers(2 if rule == "padding" else 1, 10, 10)
    if kernel == "varlen" and not rule.startswith("documents"):
        with pytest.raises(ValueError, match="kernel varlen: it knows documents"):
            attend(*leaves, mask, kernel=kernel)
        return
    for found, wanted in zip(results(leaves, mask, kernel), written(leaves, seen), strict=True):
        assert (found - wanted).abs().max() < 1e-12


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kernel", [*CPU, "flex", "varlen"])
def test_a_query_that_may_look_nowhere_gives_zero_and_finite_gradients(kernel: Kernel, flex_on_a_cpu: None):
    """Document 1 of the queries has no keys left in this part."""
    leaves = numbers(1, 10, 5)
    mask = Mask.documents([4, 6], [5, 4]).part((0, 10), (0, 5))
    out, *gradients = results(leaves, mask, kernel)
    assert torch.equal(out[:, :, 4:], torch.zeros(1, 2, 6, 8, dtype=torch.float64))
    assert out[:, :, :4].abs().min() > 0
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][:, :, 4:].any()


@pytest.mark.parametrize("kernel", [*CPU, "varlen"])
def test_documents_of_queries_see_those_of_other_keys(kernel: Kernel):
    leaves = numbers(1, sum(LENGTHS), sum(OTHERS))
    own, other = (torch.arange(3).repeat_interleave(torch.tensor(n)) for n in (LENGTHS, OTHERS))
    found = results(leaves, Mask.documents(LENGTHS, OTHERS), kernel)
    for a, b in zip(found, written(leaves, own[:, None] == other), strict=True):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kernel", [*CPU, "flex", "varlen"])
def test_heads_of_queries_share_one_of_keys(kernel: Kernel, flex_on_a_cpu: None):
    q, k, v = numbers(1, 10, 10)
    mask = masks()["documents"][0]
    q = torch.cat([q, q.flip(2), -q], dim=1)  # 6 heads: 0, 1 and 2 of key head 0
    found = attend(q, k, v, mask, kernel=kernel)
    for head in range(6):
        own = attend(q[:, head, None], k[:, head // 3, None], v[:, head // 3, None], mask, kernel="plain")
        assert (found[:, head] - own[:, 0]).abs().max() < 1e-12


@pytest.mark.parametrize("rule", list(masks()))
def test_a_part_of_a_mask_is_the_part_of_what_it_allows(rule: str):
    mask, seen = masks()[rule]
    assert mask is not None
    whole = torch.broadcast_to(seen, (len(seen) if seen.ndim == 4 else 1, 1, 10, 10))
    for (a, b), (c, d) in itertools.product([(0, 10), (0, 4), (3, 9), (9, 10)], repeat=2):
        part = mask.part((a, b), (c, d))
        assert torch.equal(part.dense().expand(-1, -1, b - a, -1), whole[:, :, a:b, c:d])
        again = part.part((0, 1), (0, d - c)).dense()
        assert torch.equal(again.expand(-1, -1, 1, -1), whole[:, :, a : a + 1, c:d])


@pytest.mark.parametrize("kernel", CPU)
@pytest.mark.parametrize("rule", ["causal", "documents in order"])
def test_parts_of_an_order_are_attended_to_alike(rule: str, kernel: Kernel):
    """Where queries and keys are the same places, and where a cache has earlier keys too; of several rows."""
    (mask, seen), (q, k, v) = masks()[rule], numbers(2, 10, 10)
    assert mask is not None
    for (a, b), (c, d) in (
        ((0, 10), (0, 10)),
        ((0, 6), (0, 6)),
        ((2, 8), (2, 8)),
        ((6, 10), (0, 10)),
        ((2, 6), (0, 6)),
    ):
        leaves = [q[:, :, a:b], k[:, :, c:d], v[:, :, c:d]]
        found = results(leaves, mask.part((a, b), (c, d)), kernel)
        for x, y in zip(found, written(leaves, seen[a:b, c:d]), strict=True):
            assert (x - y).abs().max() < 1e-12


def test_ring_attention_can_be_made_of_parts():
    """Softmax over keys that come in parts, each under its part of the mask, put together by their log-sum-exp."""
    (q, k, v), (mask, seen) = numbers(1, 10, 10), masks()["documents in order"]
    assert mask is not None
    total, weight = torch.zeros_like(q), torch.zeros(1, 2, 10, 1, dtype=torch.float64)
    for c, d in ((0, 4), (4, 7), (7, 10)):
        allowed = mask.part((0, 10), (c, d)).dense()
        logits = (q @ k[:, :, c:d].transpose(-1, -2) / math.sqrt(8)).masked_fill(~allowed, float("-inf"))
        sums = logits.exp().sum(-1, keepdim=True)
        total = total + attend(q, k[:, :, c:d], v[:, :, c:d], mask.part((0, 10), (c, d))) * sums
        weight = weight + sums
    assert (total / weight - written([q, k, v], seen)[0]).abs().max() < 1e-12


@pytest.mark.parametrize("kernel", ["auto", "flex"])
@pytest.mark.parametrize("rule", list(masks()))
def test_attention_under_a_mask_compiles_as_one_graph(rule: str, kernel: Kernel):
    mask = masks()[rule][0]
    assert mask is not None
    leaves = [x.detach() for x in numbers(2 if rule == "padding" else 1, 10, 10)]
    mask = mask.prepared(kernel, 10, 10, leaves[0].device)
    assert (mask.block is not None) == (kernel == "flex")
    torch._dynamo.reset()
    compiled = torch.compile(partial(attend, kernel=kernel), fullgraph=True, backend="aot_eager")
    expected = attend(*leaves, masks()[rule][0], kernel="plain")
    assert (compiled(*leaves, mask) - expected).abs().max() < 1e-12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels for documents need CUDA")
@pytest.mark.parametrize("kernel", ["varlen", "flex"])
@pytest.mark.parametrize("lengths", [[3, 1, 60], [300, 17, 200]])
@pytest.mark.parametrize("causal", [False, True])
def test_the_kernels_for_documents_give_the_same_forward_and_backward(
    lengths: list[int], kernel: Kernel, causal: bool
):
    torch.manual_seed(0)
    mask = Mask.documents(lengths, device=torch.device("cuda"))
    mask = mask.in_order(sum(lengths), device=torch.device("cuda")) if causal else mask
    leaves = [
        torch.randn(1, 4, sum(lengths), 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]
    fast, slow = (
        [out := attend(*leaves, mask, kernel=name), *torch.autograd.grad(out.float().square().sum(), leaves)]
        for name in (kernel, "plain")
    )
    for a, b in zip(fast, slow, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=5e-2, rtol=5e-2)


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
    bias, mask = torch.randn(2, 5, 5), Mask().in_order(5)
    whole = attention.attend(q, k, v, mask, bias)
    monkeypatch.setattr(attention, "MOST_ROWS", 3)
    torch.testing.assert_close(attention.attend(q, k, v, mask, bias), whole)
