"""What is done to a module from outside, so that models know nothing of it; in this order, as torchtitan has it:

activation checkpointing ─ compilation ─ data parallelism      block by block, then around the whole

A block is called as before, and its parameters keep their names.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from jobs.training.distributed import World
from jobs.training.recipe_core import ActivationCheckpointing, Compute
from models.attention import varlen_attn

GRAPHS = 16  # of one kind of block at most: its shapes, with and without gradients; more is an error

aten = torch.ops.aten
SAVED: tuple[Any, ...] = (  # by selective checkpointing: what costs more to compute again than to keep
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_attention_math.default,
    *([torch.ops.torch_attn._varlen_attn.default] if varlen_attn is not None else ()),
)


def parallelize(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    optimizer: torch.optim.Optimizer,
    compute: Compute,
    world: World,
) -> nn.Module:
    """What to call in place of the module: its gradients are means over the data-parallel ranks.

    The optimizer is given the sharded parameters in place of those it was made with.

    Args:
        blocks: the repeated ones, see `Task.blocks`.
    """
    blocks = list(blocks)
    checkpoint_activations(blocks, compute.activation_checkpointing)
    if compute.compile:
        compile_blocks(blocks)
    if world.mesh is None:
        return module
    if compute.parallel == "ddp":
        return replicate(module, world)
    shard(module, blocks, optimizer, compute, world)
    return module


# ---------------------------------------------------------------- activation checkpointing


def checkpoint_activations(blocks: Iterable[nn.Module], mode: ActivationCheckpointing) -> None:
    """Recompute in the backward pass what a block does not keep.

    none: autograd keeps what it likes. full: a block keeps its inputs alone. selective: the results of matrix
    products, convolutions and attention too (`SAVED`), so that only what is cheap is computed again.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keeps)
    for block in blocks:
        block.forward = _checkpointed(block.forward, options)


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def run(
        *args: Any, **named: Any
    ) -> Any:  # a plain function: torch.compile looks into no partial of checkpoint
        if not torch.is_grad_enabled():
            return forward(*args, **named)
        return checkpoint(forward, *args, **named, **options)

    return run


def keeps(context: object, op: object, *args: object, **named: object) -> CheckpointPolicy:
    """torch's question of selective checkpointing about one operation."""
    return CheckpointPolicy.MUST_SAVE if op in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


# ---------------------------------------------------------------- compilation


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Each block's forward as one graph, shared by blocks of the same kind, for sizes that vary once they have.

    A block that cannot be one graph, or whose kind needs more than `GRAPHS` of them, raises an error when it is
    called: none falls back to running uncompiled. Hooks around the block (FSDP's) stay outside of the graph.
    """
    kinds: dict[object, Callable[..., Any]] = {}
    limits: dict[str, Any] = {"recompile_limit": GRAPHS, "isolate_recompiles": True}
    known = inspect.signature(torch.compile).parameters
    if not limits.keys() <= known.keys():  # older torch has one limit for all that is compiled
        limits, torch._dynamo.config.recompile_limit = {}, GRAPHS * 64
    options: dict[str, Any] = {"fullgraph": True} | limits
    for block in blocks:
        kind = type(block), tuple((name, p.shape, p.requires_grad) for name, p in block.named_parameters())
        if kind not in kinds:
            kinds[kind] = torch.compile(_called, **options)
        block.forward = partial(kinds[kind], block.forward)


def _called(forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
    return forward(*args, **named)


# ---------------------------------------------------------------- data parallelism


def replicate(module: nn.Module, world: World) -> nn.Module:
    """DDP: every rank holds all. Nothing is searched for: a trained parameter takes part in every step."""
    from torch.nn.parallel import DistributedDataParallel

    assert world.mesh is not None
    return DistributedDataParallel(
        module,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        process_group=world.mesh.get_group("data"),
        gradient_as_bucket_view=True,
    )


def shard(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    optimizer: torch.optim.Optimizer,
    compute: Compute,
    world: World,
) -> None:
    """FSDP2: parameters, gradients, moments and averages are sharded, block by block, in float32.

    Where compute.precision is bf16 parameters are gathered and used in it, gradients summed in float32; autocast
    gives activations their types as on one process, so inputs are not cast here (noise levels stay exact).
    A block gives its gathered parameters back after the forward pass; the rest, which the backward pass begins
    with, keeps them.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    assert world.mesh is not None
    bf16 = compute.precision == "bf16"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    if bf16 and world.device.type == "cpu":
        norms_by_input(module)
    names = {id(p): name for name, p in module.named_parameters()}
    mesh = world.mesh["data"]
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    sharded = dict(module.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [sharded[names[id(p)]] for p in group["params"]]


def norms_by_input(module: nn.Module) -> None:
    """Norms use their weights in the type of what comes in, as under autocast on a GPU; a CPU's leaves both as they are
    and its kernels refuse weights in bf16 beside float32."""
    for norm in module.modules():
        if type(norm) in (nn.LayerNorm, nn.GroupNorm):  # others (FrameNorm) see what layers in bf16 give
            own: Any = norm
            own.forward = partial(_norm, own)


def _norm(norm: nn.LayerNorm | nn.GroupNorm, x: Tensor) -> Tensor:
    weight, bias = (None if p is None else p.to(x.dtype) for p in (norm.weight, norm.bias))
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
    return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)


@contextlib.contextmanager
def local_gradients(module: nn.Module, local: bool) -> Iterator[None]:
    """Inside, gradients are summed on this rank only: for all micro-batches of a step but the last."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not local)
        yield
    elif local and isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    else:
        yield


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Of all of them together, over all shards; a scalar on the device."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
