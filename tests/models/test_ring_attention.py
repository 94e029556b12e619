"""Attention in blocks and around a ring against full attention: over gloo ranks, and over threads of one process."""

import itertools
import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from jobs.training.distributed import connect
from models.attention import Mask, Rotary, SelfAttention, Tokens, attend
from models.language.loss import Goal, shifted, token_weights
from models.language.world import Goals, Places, build
from models.ring_attention import ALL, NOTHING, SOMETHING, Blocks, Placement, Ring, join, sight, split
from tests.fixtures.toy_training import in_ranks

L = 48
LENGTHS = [13, 5, 30]  # segments that cross ranks, and blocks of them, wherever these end
RULES = ["none", "documents", "causal", "documents in order", "frames", "padding"]
PLACEMENTS: list[Placement] = ["contiguous", "zigzag"]


def mask_of(rule: str, length: int = L) -> Mask | None:
    lengths = [n * length // L for n in LENGTHS]
    return {
        "none": None,
        "documents": Mask.documents(lengths),
        "causal": Mask().in_order(length),
        "documents in order": Mask.documents(lengths).in_order(length),
        "frames": Mask.frames(8, 3, length // 8),
        "padding": Mask.padding(torch.arange(length) < torch.tensor([[length // 3], [length]])),
    }[rule]


def numbers(
    length: int = L, heads: int = 4, of_keys: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """q, k, v, and what the output's gradient is."""
    g = torch.Generator().manual_seed(0)
    sizes = (heads, of_keys, of_keys, heads)
    return [torch.randn(2, n, length, 8, generator=g, dtype=torch.float64).to(dtype) for n in sizes]


Results = list[Tensor]  # out, dq, dk, dv


def whole(mask: Mask | None, given: Sequence[Tensor]) -> Results:
    """By the formula written out, in float64, each head of keys repeated for those of queries."""
    *leaves, weights = (x.double().requires_grad_() for x in given)
    q, *kv = leaves
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in kv)
    out = attend(q, k, v, mask, kernel="plain")
    return [out.detach(), *torch.autograd.grad((out * weights.detach()).sum(), leaves)]


def part(ring: Ring, mask: Mask | None, given: Sequence[Tensor]) -> Results:
    """Of this rank."""
    *leaves, weights = (ring.split(x, dim=2).requires_grad_() for x in given)
    out = attend(*leaves, ring.mask(mask, given[0].shape[2]))
    return [out.detach(), *torch.autograd.grad((out * weights.detach()).sum(), leaves)]


class InThread:
    """A rank that is a thread of this process."""

    def __init__(self, rank: int, boxes: list[queue.SimpleQueue]):
        self.rank, self.size, self.boxes = rank, len(boxes), boxes

    def pass_on(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        self.boxes[(self.rank + 1) % self.size].put([x.clone() for x in tensors])
        return lambda: self.boxes[self.rank].get(timeout=20)


def in_threads(
    ranks: int,
    work: Callable[[Ring], Any],
    placement: Placement = "zigzag",
    block: int = 5,
    kind: type[InThread] = InThread,
) -> list[Any]:
    """What each rank's work gives."""
    boxes: list[queue.SimpleQueue] = [queue.SimpleQueue() for _ in range(ranks)]
    found: list[Any] = [None] * ranks

    def run(rank: int) -> None:
        found[rank] = work(Ring(kind(rank, boxes), placement, block))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(box.empty() for box in boxes)
    return found


def around(
    ranks: int, mask: Mask | None, given: Sequence[Tensor], placement: Placement = "zigzag", block: int = 5
) -> Results:
    parts = in_threads(ranks, lambda ring: part(ring, mask, given), placement, block)
    return [join(x, placement, dim=2) for x in zip(*parts, strict=True)]


def errors(found: Results, wanted: Results) -> list[float]:
    return [float((a.double() - b).abs().max()) for a, b in zip(found, wanted, strict=True)]


# ---------------------------------------------------------------- equal to full attention


def ring_rank(out: Path) -> None:
    """Two rings of two, then one of four, as the 'context' dimension of a mesh: each rule, placement, both at once."""
    with connect("cpu") as world:
        found = {}
        for context in (2, 4):
            mesh = init_device_mesh("cpu", (4 // context, context), mesh_dim_names=("data", "context"))
            for rule, placement in itertools.product(RULES, PLACEMENTS):
                ring = Ring.of(mesh.get_group("context"), placement, block=5)
                got = part(ring, mask_of(rule), numbers())
                found[context, rule, placement] = [ring.join(x, dim=2) for x in got]
        torch.save(found, out / f"{world.rank}.pt")
        dist.barrier()


def test_two_and_four_gloo_ranks_give_full_attention_and_its_gradients(tmp_path: Path):
    assert in_ranks(4, ring_rank, tmp_path) == [0] * 4
    wanted = {rule: whole(mask_of(rule), numbers()) for rule in RULES}
    for rank in range(4):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == 2 * len(RULES) * len(PLACEMENTS)
        for (context, rule, placement), got in found.items():
            assert max(errors(got, wanted[rule])) < 1e-5, (rank, context, rule, placement)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block", [3, 7, 64])
def test_blocks_on_one_device_give_full_attention_and_its_gradients(rule: str, block: int):
    found = part(Ring(block=block), mask_of(rule), numbers())
    assert max(errors(found, whole(mask_of(rule), numbers()))) < 1e-5


@pytest.mark.parametrize("of_keys", [1, 2, 4])
def test_grouped_heads_of_keys_travel_once_each(of_keys: int):
    given, sent = numbers(of_keys=of_keys), []

    class Watched(InThread):
        def pass_on(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
            sent.extend(x.shape[1] for x in tensors)
            return super().pass_on(tensors)

    found = in_threads(2, lambda ring: part(ring, mask_of("causal"), given), kind=Watched)
    got = [join(x, "zigzag", dim=2) for x in zip(*found, strict=True)]
    assert max(errors(got, whole(mask_of("causal"), given))) < 1e-5
    assert Counter(sent) == {of_keys: 2 * (2 + 2 + 4)}  # a rank: k, v forward; again backward; dk, dv twice


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_error_does_not_grow_with_the_ring(placement: Placement):
    given, mask = numbers(336), mask_of("documents in order", 336)
    wanted = whole(mask, given)
    each = {
        ranks: errors(around(ranks, mask, given, placement, block=32), wanted)
        for ranks in range(1, 9)
        if not 336 % (2 * ranks)
    }
    assert len(each) == 7
    for ranks, found in each.items():
        assert max(found) < 5e-6, (ranks, found)
        assert all(x < 3 * alone for x, alone in zip(found, each[1], strict=True)), (ranks, found, each[1])


def test_in_bf16_the_error_does_not_grow_either():
    """Sums, and dk and dv on their way, are float32: the output is the exact one rounded once, whatever the ring."""
    given, mask = numbers(dtype=torch.bfloat16), mask_of("documents in order")
    wanted = whole(mask, given)
    alone = errors(around(1, mask, given), wanted)
    for ranks in (2, 4, 8):
        found = around(ranks, mask, given)
        assert all(x.dtype == torch.bfloat16 for x in found)
        assert (found[0] == wanted[0].bfloat16()).double().mean() > 0.99  # but for ties that float32 breaks
        assert all(x < 1.1 * y for x, y in zip(errors(found, wanted), alone, strict=True)), ranks


def test_autocast_changes_nothing_inside():
    given = numbers()
    with torch.autocast("cpu", torch.bfloat16):
        found = part(Ring(block=7), mask_of("causal"), given)
    assert max(errors(found, whole(mask_of("causal"), given))) < 1e-5


# ---------------------------------------------------------------- nothing to see


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_queries_that_may_look_nowhere_give_zero_and_gradient_zero(ranks: int, placement: Placement):
    """Places 10 … 33, whole ranks of them, are padding, and the others may see no keys of theirs."""
    document = torch.zeros(L, dtype=torch.int64)
    document[10:34] = -1
    mask, given = Mask(Tokens(document), Tokens(document)).in_order(L), numbers()
    found = around(ranks, mask, given, placement)
    assert all(x.isfinite().all() for x in found)
    assert all(not x[:, :, 10:34].any() for x in found)
    assert all(x[:, :, :10].any() and x[:, :, 34:].any() for x in found)
    assert max(errors(found, whole(mask, given))) < 1e-5


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_sequence_in_which_no_one_sees_anyone_gives_zeros(ranks: int):
    mask = Mask(Tokens(torch.zeros(L).long()), Tokens(torch.ones(L).long()))
    assert not any(x.any() for x in around(ranks, mask, numbers()))


def test_logits_too_large_for_an_exponential_do_no_harm():
    q, k, v, weights = numbers()
    given = [q * 1e3, k * 1e3, v, weights]  # e^(10^6) of float32 is infinite
    found, wanted = around(4, mask_of("causal"), given), whole(mask_of("causal"), given)
    assert all(x.isfinite().all() for x in found)
    assert max(errors(found, wanted)[:1]) < 1e-3


# ---------------------------------------------------------------- blocks that are skipped


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_a_block_sees_is_what_the_mask_says(rule: str, placement: Placement):
    for rank in range(4):
        ring = Ring(InThread(rank, [queue.SimpleQueue()] * 4), placement, block=4)
        mask = ring.mask(mask_of(rule), L)
        assert isinstance(mask.context, Blocks)
        blocks = mask.context.blocks
        rows = mask.queries.document, mask.keys.document, mask.queries.place, mask.queries.frame
        seen = mask.dense() if any(x is not None for x in rows) else torch.ones(1, 1, 12, L, dtype=torch.bool)
        seen = seen.expand(-1, -1, 12, L)
        for owner, (i, (a, b)), (j, (c, d)) in itertools.product(
            range(4), enumerate(blocks), enumerate(blocks)
        ):
            those = seen[:, :, a:b, owner * 12 + c : owner * 12 + d]
            said = mask.context.sights[owner][i][j]
            assert said == SOMETHING or (said == ALL) == bool(those.all())
            assert said == SOMETHING or (said == NOTHING) == (not those.any())


def test_of_a_causal_sequence_only_blocks_on_the_diagonal_need_a_mask():
    steps = [(a, a + 4) for a in range(0, 64, 4)]
    found = sight(Mask().in_order(64), steps, steps)
    assert torch.equal(found, torch.full((16, 16), ALL).tril(-1) + SOMETHING * torch.eye(16).long())


def test_of_packed_documents_those_of_others_are_skipped():
    steps = [(a, a + 8) for a in range(0, 128, 8)]
    found = sight(Mask.documents([32, 64, 32]), steps, steps)
    assert torch.equal(found == ALL, torch.block_diag(*(torch.ones(n, n) for n in (4, 8, 4))).bool())
    assert not (found == SOMETHING).any()


@pytest.mark.parametrize(("placement", "most"), [("contiguous", 484 / 260), ("zigzag", 1.0)])
def test_zigzag_gives_every_rank_the_same_work_in_causal_order(placement: Placement, most: float):
    work = []
    for rank in range(8):
        ring = Ring(InThread(rank, [queue.SimpleQueue()] * 8), placement, block=8)
        context = ring.mask(Mask().in_order(512), 512).context
        assert isinstance(context, Blocks)
        work.append(sum(x != NOTHING for x in itertools.chain(*itertools.chain(*context.sights))))
    assert max(work) / (sum(work) / 8) == most


class Products(TorchDispatchMode):
    """How many products of matrices there were."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", RULES)
def test_blocks_that_see_nothing_cost_nothing(rule: str):
    mask = mask_of(rule)
    seen = torch.ones(1, 1, L, L) if mask is None else mask.dense().expand(-1, -1, L, L)
    blocks = seen.bool().any(0)[0].view(6, 8, 6, 8).any(3).any(1).sum()
    assert blocks < 23 or rule in ("none", "padding")  # of 36
    with Products() as products:
        part(Ring(block=8), mask, numbers())
    assert products.count == blocks * 7  # S and PV; S again, dV, dP, dQ, dK


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().size() // x.element_size())
        return found


def test_no_tensor_is_larger_than_the_sequence_or_a_block():
    length = 1024
    given, mask = numbers(length), mask_of("causal", length)
    for block, ring in (
        (32, True),
        (length, False),
    ):  # a block of everything is full attention, and is noticed
        with Largest() as largest:
            part(Ring(block=block), mask, given)
        assert (largest.elements <= 2 * 4 * length * 8) == ring


# ---------------------------------------------------------------- sequences and models


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_sequence_that_is_split_is_joined_again(ranks: int, placement: Placement):
    x = torch.randn(2, 24, 3)
    parts = [split(x, rank, ranks, placement, dim=1) for rank in range(ranks)]
    assert torch.equal(join(parts, placement, dim=1), x)
    joined = in_threads(ranks, lambda ring: ring.join(ring.split(x, 1), 1), placement, 512)
    assert all(torch.equal(y, x) for y in joined)


def test_zigzag_holds_the_chunk_as_far_from_the_end_as_from_the_beginning():
    held = [split(torch.arange(12), rank, 3, "zigzag").tolist() for rank in range(3)]
    assert held == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert [split(torch.arange(12), r, 3, "contiguous").tolist()[0] for r in range(3)] == [0, 4, 8]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_layer_that_is_handed_such_a_mask_gives_the_same_outputs_and_gradients(placement: Placement):
    """The layer's code is the same; gradients of its weights are the sum over ranks."""
    torch.manual_seed(0)
    layer, x = SelfAttention(32, 4, qk_norm="head").double(), torch.randn(2, L, 32, dtype=torch.float64)
    places = torch.cat([torch.arange(n) for n in LENGTHS])  # restart
    mask, weights = mask_of("documents in order"), list(layer.parameters())

    def rotary(at: Tensor) -> Rotary:
        return Rotary.of(torch.stack([at, at * 0, at * 0], dim=-1), 8)

    wanted = layer(x, mask, rotary(places))
    gradients = torch.autograd.grad(wanted.square().sum(), weights)

    def work(ring: Ring) -> tuple[Tensor, ...]:
        out = layer(ring.split(x, dim=1), ring.mask(mask, L), rotary(ring.split(places)))
        return out.detach(), *torch.autograd.grad(out.square().sum(), weights)

    outs, *found = zip(*in_threads(4, work, placement, block=5), strict=True)
    assert torch.allclose(join(outs, placement, dim=1), wanted, atol=1e-12)
    for parts, gradient in zip(found, gradients, strict=True):
        assert torch.allclose(sum(parts), gradient, atol=1e-10)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_world_model_in_a_ring_has_the_loss_and_the_gradients_of_one_device(placement: Placement):
    """Packed documents of words and visual tokens, with a rank on which there is nothing to learn."""
    torch.manual_seed(0)
    model = build(20, 12, dim=32, ffn=48, heads=4, groups=2, depth=2).double()
    tokens, vision, learnt = torch.randint(12, (1, L)), torch.rand(1, L) < 0.5, torch.rand(1, L) < 0.7
    learnt = shifted(learnt, LENGTHS)
    learnt[:, 6:24] = learnt[:, 36:42] = False  # nothing to learn on the second rank of either placement
    assert not split(learnt, 1, 4, placement).any()
    targets, weights, kind = (
        shifted(tokens, LENGTHS),
        token_weights(LENGTHS, learnt),
        shifted(vision, LENGTHS),
    )
    places, trained = Places.packed(LENGTHS, L), [p for p in model.parameters() if p.requires_grad]

    def loss(of: Callable[[Tensor], Tensor], places: Places) -> Tensor:
        goals = (Goal.of(of(targets), of(weights * mark)) for mark in (~kind, kind))
        said = model(of(tokens), of(vision), places, goals=Goals(*goals))
        return said.text + said.vision

    def work(ring: Ring) -> tuple[Tensor, ...]:
        found = loss(ring.split, Places(ring.split(places.positions), ring.mask(places.mask, L)))
        return found.detach(), *torch.autograd.grad(found, trained)

    wanted = loss(lambda x: x, places)
    every = zip(*in_threads(4, work, placement), strict=True)
    for parts, whole in zip(every, (wanted, *torch.autograd.grad(wanted, trained)), strict=True):
        assert torch.allclose(sum(parts), whole, atol=1e-6)  # the cross-entropy is in float32


def test_a_compiled_layer_steps_out_for_the_ring():
    layer, x = SelfAttention(32, 4), torch.randn(1, L, 32)
    torch._dynamo.reset()
    mask = Ring(block=7).mask(mask_of("causal"), L)
    compiled = torch.compile(layer, backend="eager")
    assert torch.allclose(compiled(x, mask), layer(x, mask_of("causal")), atol=1e-5)


def test_what_does_not_fit_is_said():
    q, k, v, _ = numbers()
    ring = Ring(InThread(0, [queue.SimpleQueue()] * 5))
    with pytest.raises(ValueError, match=r"48 places on 5 ranks \(zigzag\): fill it up to a multiple of 10"):
        ring.mask(None, L)
    with pytest.raises(ValueError, match=r"a mask of \[40\] places over a sequence of 48"):
        Ring().mask(Mask().in_order(40), L)
    mask = Ring().mask(None, L)
    with pytest.raises(
        ValueError, match="24 queries and 24 keys under a mask of a ring with 48 places a rank"
    ):
        attend(q[:, :, :24], k[:, :, :24], v[:, :, :24], mask)
    with pytest.raises(ValueError, match="4 heads of queries are no multiple of the 3 of keys"):
        attend(q, k[:, :1].expand(-1, 3, -1, -1), v[:, :1].expand(-1, 3, -1, -1), mask)
    with pytest.raises(ValueError, match="takes no bias"):
        attend(q, k, v, mask, bias=torch.zeros(4, L, L))
