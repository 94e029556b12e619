"""What a computation costs and what a device could do: for model FLOPs utilisation (Chowdhery et al. 2022, app. B).

FLOPs are counted, not estimated, by torch's dispatcher; a multiply–add is two. Recomputation in the
backward pass does not count: it is no use to the model.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Dense TFLOP/s of matrix products from the vendors' data sheets: (bf16, fp32 without TF32).
# The first name that is part of the device's name is taken.
PEAKS: dict[str, tuple[float, float]] = {
    "B200": (2250, 75),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H20 ": (148, 44),
    "H200": (989, 67),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "A10G": (70, 35),
    "A10": (125, 31.2),
    "A40": (150, 37.4),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
}


@dataclass(frozen=True)
class Peak:
    flops: float  # a second
    source: str  # 'data sheet of …' or 'measured: …'


def peak(device: torch.device, dtype: torch.dtype = torch.float32) -> Peak:
    """The most a device does in this type (float32 or bfloat16): by its name, or else measured.

    float32 on a GPU is the rate with TF32 off, torch's default.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, (half, single) in PEAKS.items():
            if known in name + " ":
                return Peak((half if dtype == torch.bfloat16 else single) * 1e12, f"data sheet of {name}")
    return Peak(measure_matmul(device, dtype), f"measured: the fastest of several {dtype} matrix products")


@functools.cache
def measure_matmul(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of the fastest n×n product within so many seconds."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Cost:
    """Of one forward and backward pass.

    flops: of the trained modules. beside: of what else is computed: frozen encoders, perceptual networks.
    saved: bytes that autograd keeps between the passes, parameters left out, where nothing is recomputed.
    selective: the same where each of the blocks keeps its inputs and its products, and the largest is live again;
    full: where it keeps its inputs only.
    unused: trained parameters that take no part.
    """

    flops: int = 0
    beside: int = 0
    saved: int = 0
    selective: int = 0
    full: int = 0
    unused: tuple[str, ...] = ()


def cost(
    loss: Callable[[], Tensor],
    modules: Sequence[nn.Module],
    blocks: Iterable[nn.Module],
    device: torch.device,
    product: Callable[[object], bool] = lambda op: False,
    small: bool = False,
) -> Cost:
    """Of `loss().backward()`, without computing the trained modules: they are called on shapes alone.

    Their parameters (which may be on the meta device) are replaced by fake tensors for the time, so no activations
    and no gradients are ever there. What is computed outside of them before, such as frozen encoders, is computed;
    its gradients are taken to cost what its forward pass did, as those by the input of a frozen layer do.
    On a CPU attention is counted by its formula, since torch counts its fused kernel as nothing.
    A module in which sizes depend on values cannot be called on shapes: it is computed, once, with zeros for weights.

    Args:
        blocks: of the first module.
        product: whether selective checkpointing keeps what an operation gives.
        small: so little that to compute it, with zeros for weights, takes less than a millisecond of Python for each
            operation on shapes.
    """
    if small:
        return _cost(loss, modules, list(blocks), device, product, None)
    try:
        return _cost(loss, modules, list(blocks), device, product, FakeTensorMode(allow_non_fake_inputs=True))
    except (DataDependentOutputException, DynamicOutputShapeException):
        return _cost(loss, modules, list(blocks), device, product, None)


def _cost(
    loss: Callable[[], Tensor],
    modules: Sequence[nn.Module],
    blocks: Iterable[nn.Module],
    device: torch.device,
    product: Callable[[object], bool],
    fake: FakeTensorMode | None,
) -> Cost:
    found, mode = Cost(), fake or contextlib.nullcontext()
    inside: dict[int, int] = {}  # block → bytes it keeps
    products: dict[int, int] = {}  # block → bytes of them that are products
    inputs: dict[int, int] = {}  # block → bytes that go in
    stack: list[int] = []
    seen: dict[int, StorageWeakRef] = {}  # by address, which another storage may have once it is free
    again = 0  # FLOPs beside that are differentiated

    def count(op: Any, args: Any, out: Any, flops: int) -> None:
        found.flops += flops
        if stack and product(op):
            sizes = (x.numel() * x.element_size() for x in tree_leaves(out) if isinstance(x, Tensor))
            products[stack[-1]] = products.get(stack[-1], 0) + sum(sizes)

    def count_outside(op: Any, args: Any, out: Any, flops: int) -> None:
        nonlocal again
        if within:
            return
        if torch._C._current_graph_task_id() != -1:  # torch.autograd.grad
            found.flops += flops
            return
        found.beside += flops
        again += flops * any(x.requires_grad for x in tree_leaves(args) if isinstance(x, Tensor))

    def keep(x: Tensor) -> Tensor:
        where = x.untyped_storage()._cdata
        if where not in owned and (where not in seen or seen[where].expired()):
            seen[where] = StorageWeakRef(x.untyped_storage())
            size = x.untyped_storage().nbytes()
            found.saved += size
            if stack:
                inside[stack[-1]] = inside.get(stack[-1], 0) + size
        return x

    def enter(block: nn.Module, args: tuple[object, ...]) -> None:
        stack.append(id(block))
        inputs[id(block)] = sum(x.untyped_storage().nbytes() for x in args[:1] if isinstance(x, Tensor))

    def leave(block: nn.Module, args: object, out: object) -> None:
        stack.pop()

    within: list[nn.Module] = []

    def on_shapes(module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        def run(*args: Any, **named: Any) -> Any:
            within.append(module)
            try:
                with mode, _Counting(count):
                    return forward(*args, **named)
            finally:
                within.pop()

        return run

    hooks = [h for b in blocks for h in (b.register_forward_pre_hook(enter), b.register_forward_hook(leave))]
    with contextlib.ExitStack() as undo:
        for hook in hooks:
            undo.callback(hook.remove)
        owned = {
            x.untyped_storage()._cdata
            for m in modules
            for x in undo.enter_context(_without_values(m, fake, device))
        }
        for module in modules:
            wrapped = on_shapes(module)
            undo.callback(module.__dict__.pop, "forward", None)
            if "forward" in module.__dict__:
                undo.callback(setattr, module, "forward", module.forward)
            module.forward = wrapped
        undo.enter_context(_formula(device))
        with _Counting(count_outside), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            total = loss()
        if total.requires_grad:
            with mode, _Counting(count):
                total.backward()
            trained = ((n, p) for n, p in modules[0].named_parameters() if p.requires_grad)
            found.unused = tuple(name for name, p in trained if p.grad is None)
    found.flops, found.beside = found.flops - again, found.beside + again
    outside = found.saved - sum(inside.values()) + sum(inputs.values())
    found.full = outside + max(inside.values(), default=0)
    found.selective = (
        outside
        + sum(products.values())
        + max((max(size - products.get(block, 0), 0) for block, size in inside.items()), default=0)
    )
    return found


class _Counting(TorchDispatchMode):
    """Tells `count` of each operation: what it is, what it was given and gave, and its FLOPs."""

    def __init__(self, count: Callable[[Any, Any, Any, int], None]):
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        self.count(func, args, out, 0 if formula is None else formula(*args, **kwargs, out_val=out))
        return out


@contextlib.contextmanager
def _without_values(
    module: nn.Module, mode: FakeTensorMode | None, device: torch.device
) -> Iterator[list[Tensor]]:
    """Inside, parameters and buffers are fake tensors on the device, or zeros that take no memory; they are given.

    In place of such zeros' gradients there are such zeros, too.
    """
    made: dict[int, Tensor] = {}
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    for part in module.modules():
        every: list[dict[str, Any]] = [part._parameters, part._buffers]
        for held in every:
            for name, x in held.items():
                if x is None:
                    continue
                if id(x) not in made:
                    made[id(x)] = _without_value(x, mode, device)
                before.append((held, name, x))
                held[name] = made[id(x)]
    try:
        yield list(made.values())
    finally:
        for where, name, x in before:
            where[name] = x


def _without_value(x: Tensor, mode: FakeTensorMode | None, device: torch.device) -> Tensor:
    made: Tensor
    if mode:
        with mode:
            made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    elif isinstance(x, nn.Parameter) or x.is_meta:
        made = torch.zeros((), dtype=x.dtype, device=device).expand(x.shape)
    else:
        made = x.to(device, copy=True)  # a module may write to its buffers
    if not isinstance(x, nn.Parameter):
        return made
    parameter = nn.Parameter(made, x.requires_grad)
    if not mode and x.requires_grad:
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.detach()))
    return parameter


@contextlib.contextmanager
def _formula(device: torch.device) -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext():
        yield
