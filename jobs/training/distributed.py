"""Several processes that train as one: who they are, and how they agree.

A launcher (torchrun, Ray Train) starts the processes; alone, there is one and nothing here does anything.
Host-side agreement (counts, "stop now", errors) goes through gloo, so that it never waits for the GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pipeline.faults import one_line

T = TypeVar("T")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    mesh: of all of them, [data, context]; none: there is one. Ranks along 'data' see different samples, those along
        'context' parts of the same ones.
    host: gloo group of all ranks, for host-side agreement; writing: another one, for the thread that writes
        checkpoints.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    host: Any = None
    writing: Any = None

    @property
    def data_rank(self) -> int:
        """Whose samples these are, of `data_size`."""
        return self.rank if self.mesh is None else self.mesh.get_local_rank("data")

    @property
    def data_size(self) -> int:
        return self.size if self.mesh is None else self.mesh["data"].size()

    @property
    def context_rank(self) -> int:
        """Which part of its samples this rank computes, of `context_size`."""
        return 0 if self.mesh is None else self.mesh.get_local_rank("context")

    @property
    def context_size(self) -> int:
        return 1 if self.mesh is None else self.mesh["context"].size()

    @property
    def context_group(self) -> dist.ProcessGroup | None:
        """Of the ranks that have the same samples; none where there is one process."""
        return None if self.mesh is None else self.mesh.get_group("context")

    @cached_property
    def all_ranks(self) -> DeviceMesh | None:
        """The mesh along one dimension, over which weights are shared and gradients summed."""
        if self.mesh is None or self.context_size == 1:
            return self.mesh and self.mesh["data"]
        return self.mesh["data", "context"]._flatten("all")

    def sum(self, *values: float) -> list[float]:
        """Of host numbers, over all ranks."""
        if self.size == 1:
            return list(values)
        x = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(x, group=self.host)
        return x.tolist()

    def share(self, count: int) -> list[int]:
        """This rank's of the numbers 0 … count − 1, as many as every rank has: where they do not go round, the last
        one is done by several."""
        return [min(i, count - 1) for i in range(self.rank, -(-count // self.size) * self.size, self.size)]

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of each rank, in their order, on all of them."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.host)
        return found

    def agree(self, work: Callable[[], T]) -> T:
        """What `work`, in which no rank waits for another, gives here; if it fails on one rank, all fail.

        Raises here what it raised here, else ValueError with what it said on the first rank where it failed.
        """
        failed: Exception | None = None
        try:
            found = work()
        except Exception as e:  # whatever it may raise, or the others would wait for this rank
            failed = e
        said = self.gather(failed and (one_line(failed) or type(failed).__name__))
        if failed:
            raise failed
        if any(said):
            raise ValueError(next(filter(None, said)))
        return found

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first rank (picklable), on all; if it fails there, all fail, see `agree`."""
        found = self.agree(lambda: work() if self.rank == 0 else None)
        answer: T = self.gather(found)[0]
        return answer


@contextlib.contextmanager
def connect(device: str | None = None, context: int = 1) -> Iterator[World]:
    """Join the processes that the launcher started, for the time of the block.

    Reads RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; where a launcher has made the process group
    already (Ray Train), takes that one and leaves it open. nccl on GPUs, gloo on CPUs.

    Args:
        device: 'cpu', 'cuda' or 'cuda:1'; none: this process's GPU where there is one.
        context: so many neighbouring ranks compute the same samples, a part each.

    Raises ValueError where that device is not there, or the ranks cannot be shared out so.
    """
    own = False
    where = device_of(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    else:
        keep_freed_memory()
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo")
        own = True
    try:
        size = dist.get_world_size() if dist.is_initialized() else 1
        if size % context:
            raise ValueError(
                f"compute.context {context} does not divide the {size} processes: start a multiple of it"
            )
        if size > 1:
            shape = (size // context, context)
            mesh = init_device_mesh(where.type, shape, mesh_dim_names=("data", "context"))
            groups = [dist.new_group(backend="gloo") for _ in range(2)]
            yield World(dist.get_rank(), size, where, mesh, *groups)
        else:
            yield World(0, 1, where)
    finally:
        if own:
            dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed: every step takes the same memory again.

    Otherwise it goes back to the system and comes as new pages, to be cleared and mapped at their first touch: a
    tenth of a step on a CPU, or more (bench/results/train_diffusion.md). Does nothing with another libc.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def device_of(name: str | None) -> torch.device:
    """The named device, 'cuda' being this process's GPU (LOCAL_RANK); none: that GPU, where there is one.

    Raises ValueError where it is not there.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ValueError(f"device {name!r}: give cpu, cuda or cuda:N") from e
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r}: give cpu, cuda or cuda:N")
    if device.type == "cuda":
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"device cuda:{index}: this machine has {torch.cuda.device_count()} GPUs that torch can use; "
                "give --device cpu, or start fewer processes"
            )
        return torch.device("cuda", index)
    return device
