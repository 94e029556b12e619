"""Pools of workers, and whether the nodes of a cluster have a place for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.run.worker import RunError
from pipeline.stages import Resources, Stage

UNIT = 10_000  # Ray counts resources in units of 1/10,000
STEPS = 20_000  # of the search for places, before it gives up


@dataclass
class Pool:
    """Consecutive stages that share one actor pool."""

    stages: list[Stage]
    resources: Resources

    def __str__(self) -> str:
        return ", ".join(s.name for s in self.stages)


@dataclass(frozen=True)
class Node:
    """What a node of the cluster has in all."""

    cpus: float
    gpus: int = 0


def pools(stages: list[Stage], resources: dict[str, Resources]) -> list[Pool]:
    """Fuse consecutive CPU stages of equal needs; a stage on a GPU has its pool to itself."""
    found: list[Pool] = []
    for stage in stages:
        r = resources[stage.name]
        if found and r.gpus == 0 and found[-1].resources == r:
            found[-1].stages.append(stage)
        else:
            found.append(Pool([stage], r))
    return found


def fit(found: list[Pool], nodes: list[Node]) -> list[Pool]:
    """Shrink the pools' shares of CPUs so that the smallest size of all of them fits the nodes at once.

    Actors that wait for one another's place would hang the run (ray #44687); a tenth of each node is left to Ray's
    own tasks. GPUs are not shrunk: raises RunError where the smallest sizes do not fit the nodes' GPUs.
    """
    for pool in found:
        g = pool.resources.gpus
        if g > 1 and g != int(g):
            raise RunError(f"stage {pool}: resources.<stage>.gpus {g:g}: above 1 it must be a whole number")
    if place(_demands(found, 0.0), nodes) is False:
        raise RunError(no_place(found, nodes))
    need = sum(p.resources.cpus * p.resources.min_workers for p in found)
    share = min(1.0, 0.9 * sum(n.cpus for n in nodes) / need) if need else 1.0
    if len(found) == 1:  # let a lone pool use every CPU all the same
        share = min(share, 0.9)
    rest = [replace(n, cpus=0.9 * n.cpus) for n in nodes]
    if len(nodes) > 1 and not place(_demands(found, share), rest):
        low, high = 0.0, share
        for _ in range(14):
            share = (low + high) / 2
            low, high = (share, high) if place(_demands(found, share), rest) else (low, share)
        share = low
    return [Pool(p.stages, replace(p.resources, cpus=p.resources.cpus * share)) for p in found]


def no_place(found: list[Pool], nodes: list[Node]) -> str:
    """The sentence for pools that do not fit the nodes."""
    wanted = "; ".join(
        f"{pool}: {p.min_workers} × ({p.cpus:.3g} CPUs, {p.gpus:g} GPUs)"
        for pool in found
        for p in [pool.resources]
    )
    have = "; ".join(f"{n.cpus:g} CPUs, {n.gpus} GPUs" for n in nodes) or "none"
    return (
        f"the workers of all stages find no place on the cluster's nodes at once ({wanted}; nodes: {have}): lower "
        "resources.<stage>.gpus or min_workers so that they pack"
    )


def _demands(found: list[Pool], share: float) -> list[tuple[float, float]]:
    """(CPUs, GPUs) of every worker of the pools' smallest sizes."""
    return [
        (pool.resources.cpus * share, pool.resources.gpus)
        for pool in found
        for _ in range(pool.resources.min_workers)
    ]


def place(demands: list[tuple[float, float]], nodes: list[Node]) -> bool | None:
    """Whether all (CPUs, GPUs) find a place on the nodes at once; None where the search took too long to tell.

    A worker lies on one node, a fraction of a GPU on one GPU, several GPUs on whole free ones.
    """
    # large ones first; equal ones side by side
    items = sorted(((round(g * UNIT), int(c * UNIT)) for c, g in demands), reverse=True)
    start = tuple(sorted((int(n.cpus * UNIT), (UNIT,) * int(n.gpus)) for n in nodes))
    if any(
        sum(i[k] for i in items) > sum(h)
        for k, h in enumerate(([sum(g) for _, g in start], [c for c, _ in start]))
    ):
        return False
    seen: set[tuple[int, _State]] = set()
    ways = [iter([start])]  # for the first i items: ways to place the i-th one that are still to be tried
    for _ in range(STEPS):
        state = next(ways[-1], None)
        if state is None:
            ways.pop()
            if not ways:
                return False
        elif len(ways) > len(items):
            return True
        elif (len(ways), state) not in seen:
            seen.add((len(ways), state))
            ways.append(_placed(*items[len(ways) - 1], state))
    return None


_State = tuple[tuple[int, tuple[int, ...]], ...]  # of every node, sorted: CPUs and GPUs left, in units


def _placed(gpus: int, cpus: int, state: _State) -> Iterator[_State]:
    """What may be left when a worker has found its place."""
    for n, (left, devices) in enumerate(state):
        if cpus <= left and (n == 0 or state[n] != state[n - 1]):
            for after in _take(devices, gpus):
                yield tuple(sorted((*state[:n], (left - cpus, after), *state[n + 1 :])))


def _take(devices: tuple[int, ...], gpus: int) -> list[tuple[int, ...]]:
    """What may be left of a node's GPUs (sorted, in units) when a worker takes `gpus` units of them."""
    if gpus == 0:
        return [devices]
    if gpus >= UNIT:
        count, free = gpus // UNIT, [d for d in devices if d == UNIT]
        if len(free) < count:
            return []
        return [tuple(sorted([d for d in devices if d != UNIT] + free[count:] + [0] * count))]
    found = []
    for i, d in enumerate(devices):
        if d >= gpus and (i == 0 or devices[i - 1] != d):
            found.append(tuple(sorted((*devices[:i], d - gpus, *devices[i + 1 :]))))
    return found
