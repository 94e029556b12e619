"""What a computation costs and what a device could do: for model FLOPs utilisation (Chowdhery et al. 2022, app. B).

FLOPs are counted, not estimated, by torch's dispatcher; a multiply–add is two. Recomputation in the
backward pass does not count: it is no use to the model.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

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

    saved: bytes that autograd keeps between them, parameters left out, where nothing is recomputed.
    recomputed: the same where each of the blocks keeps its inputs only, and the largest is live again.
    """

    flops: int = 0
    saved: int = 0
    recomputed: int = 0

    def kept(self, mode: str) -> int:
        return self.saved if mode == "none" else self.recomputed


def cost(
    loss: Callable[[], Tensor], module: nn.Module, blocks: Iterable[nn.Module], device: torch.device
) -> Cost:
    """Run `loss().backward()` once and count; gradients and buffers of the module are put back.

    On a GPU what autograd keeps waits in host memory, so that it fits where it would not without
    recomputation. On a CPU attention runs by its formula, since torch counts its fused kernel as nothing.
    """
    buffers = [b.clone() for b in module.buffers()]
    owned = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
    inside: dict[int, int] = {}  # block → bytes it keeps
    inputs: dict[int, int] = {}  # block → bytes that go in
    stack: list[int] = []
    seen: dict[int, StorageWeakRef] = {}  # by address, which another storage may have once it is free
    found = Cost()

    def keep(x: Tensor) -> Tensor:
        where = x.untyped_storage().data_ptr()
        if where not in owned and (where not in seen or seen[where].expired()):
            seen[where] = StorageWeakRef(x.untyped_storage())
            size = x.untyped_storage().nbytes()
            found.saved += size
            if stack:
                inside[stack[-1]] = inside.get(stack[-1], 0) + size
        return x.cpu() if device.type == "cuda" else x

    def enter(block: nn.Module, args: tuple[object, ...]) -> None:
        stack.append(id(block))
        inputs[id(block)] = sum(x.untyped_storage().nbytes() for x in args[:1] if isinstance(x, Tensor))

    def leave(block: nn.Module, args: object, out: object) -> None:
        stack.pop()

    hooks = [h for b in blocks for h in (b.register_forward_pre_hook(enter), b.register_forward_hook(leave))]
    counter = FlopCounterMode(display=False)
    hold = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x.to(device))
    try:
        with counter, _formula(device):
            with hold:
                total = loss()
            if total.requires_grad:
                total.backward()
    finally:
        for hook in hooks:
            hook.remove()
        module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in zip(module.buffers(), buffers, strict=True):
                buffer.copy_(before)
    found.flops = counter.get_total_flops()
    blocked = sum(inside.values())
    found.recomputed = found.saved - blocked + sum(inputs.values()) + max(inside.values(), default=0)
    return found


@contextlib.contextmanager
def _formula(device: torch.device) -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext():
        yield
