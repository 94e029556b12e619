"""What is done to a module from outside, so that models know nothing of it; in this order, as torchtitan has it:

activation checkpointing ─ compilation ─ data parallelism      block by block, then around the whole

A block is called as before, and its parameters keep their names.

Under FSDP no rank but the first ever holds the whole of what is trained, and that one on the host: the others make it
on the meta device (`made_on`, `make`), and after sharding the first one's weights, or a checkpoint's, fill the shards.
Frozen models beside it (autoencoder, text encoder, perceptual and feature networks) are whole on every rank: each runs
them on samples of its own.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from jobs.training.distributed import World
from jobs.training.recipe_core import ActivationCheckpointing, Compute
from models.attention import varlen_attn

M = TypeVar("M", bound=nn.Module)

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


# ---------------------------------------------------------------- where networks are made


def made_on(compute: Compute, world: World, given: bool) -> torch.device:
    """The device on which this rank makes the networks that are trained.

    Args:
        given: a checkpoint has all of their weights, so that no rank need make any.
    """
    if world.mesh is None or compute.parallel != "fsdp":
        return world.device
    return torch.device("meta" if given or world.rank else "cpu")


def make(build: Callable[[], M], device: torch.device) -> M:
    """A module on that device; on the meta device it is never anything but shapes."""
    if device.type != "meta":
        return build().to(device)
    with device:
        module = build()
    if lost := dict(module.named_buffers()).keys() - module.state_dict().keys():
        raise ValueError(
            f"{type(module).__name__}: no checkpoint keeps its buffer {min(lost)}: make it persistent"
        )
    return module


def on_meta(module: nn.Module) -> bool:
    return any(p.is_meta for p in module.parameters())


# ---------------------------------------------------------------- all of it


def parallelize(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    optimizer: torch.optim.Optimizer,
    compute: Compute,
    world: World,
    uncompiled: list[str],
) -> nn.Module:
    """What to call in place of the module: its gradients are means over all ranks.

    The optimizer is given the sharded parameters in place of those it was made with.

    Args:
        blocks: the repeated ones, see `Task.blocks`.
        uncompiled: see `compile_blocks`.
    """
    blocks = list(blocks)
    checkpoint_activations(blocks, compute.activation_checkpointing)
    if compute.compile:
        compile_blocks(blocks, uncompiled)
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


def compile_blocks(blocks: Iterable[nn.Module], uncompiled: list[str]) -> None:
    """Each block's forward as one graph, shared by blocks of the same kind, for sizes that vary once they have.

    Hooks around the block (FSDP's) stay outside of the graph. A block whose `one_graph` is False is left as it is.

    Args:
        uncompiled: is told, in a sentence, of a kind of block that cannot be one graph or needs more than `GRAPHS` of
            them. It runs as it is from then on, so that no rank waits for one that has stopped in the midst of a
            step; whoever calls must end what is slow in silence.
    """
    kinds: dict[object, Callable[..., Any]] = {}
    limits: dict[str, Any] = {"recompile_limit": GRAPHS, "isolate_recompiles": True}
    known = inspect.signature(torch.compile).parameters
    if not limits.keys() <= known.keys():  # older torch has one limit for all that is compiled
        limits, torch._dynamo.config.recompile_limit = {}, GRAPHS * 64
    options: dict[str, Any] = {"fullgraph": True} | limits
    for block in blocks:
        if not getattr(block, "one_graph", True):
            continue
        kind = type(block), tuple((name, p.shape, p.requires_grad) for name, p in block.named_parameters())
        if kind not in kinds:
            compiled = torch.compile(_called, **options)
            kinds[kind] = _or_plain(compiled, type(block).__name__, uncompiled)
        block.forward = partial(kinds[kind], block.forward)


def _called(forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
    return forward(*args, **named)


def _or_plain(compiled: Callable[..., Any], kind: str, uncompiled: list[str]) -> Callable[..., Any]:
    """`compiled`, until it fails, which it does before anything is computed."""
    failed = False

    def run(forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
        nonlocal failed
        if not failed:
            try:
                return compiled(forward, *args, **named)
            except FailOnRecompileLimitHit:
                why = f"needs more than {GRAPHS} graphs, as if its inputs were never alike"
                fix = "train on fewer shapes (data.buckets)"
            except TorchDynamoException as e:
                why = f"cannot be compiled as one graph ({_first_line(e)})"
                fix = "mend that line of the model"
            failed = True
            uncompiled.append(f"a block of kind {kind} {why}: {fix}, or set compute.compile to false")
        return forward(*args, **named)

    return run


def _first_line(e: BaseException) -> str:
    return next(filter(None, map(str.strip, str(e).splitlines())), type(e).__name__).rstrip(".:")


# ---------------------------------------------------------------- data parallelism


def replicate(module: nn.Module, world: World) -> nn.Module:
    """DDP: every rank holds all. Nothing is searched for: a trained parameter takes part in every step."""
    from torch.nn.parallel import DistributedDataParallel

    assert world.all_ranks is not None
    return DistributedDataParallel(
        module,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        process_group=world.all_ranks.get_group(),
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

    The first rank's weights, on whatever device, fill all shards where other ranks made the module without any.
    Where none has weights they are not set: a checkpoint is to be read.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = world.all_ranks
    assert mesh is not None
    bf16 = compute.precision == "bf16"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    if bf16 and world.device.type == "cpu":
        norms_by_input(module)
    names = {id(p): name for name, p in module.named_parameters()}
    shapes_alone = world.gather(on_meta(module))
    weights = {} if shapes_alone[world.rank] else {n: x.detach() for n, x in module.state_dict().items()}
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if on_meta(module):
        module.to_empty(device=world.device)
    if any(shapes_alone) and not shapes_alone[0]:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(module, weights, options=options)
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
