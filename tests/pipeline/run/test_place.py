"""Pools that always fit: shares of CPUs, places on GPUs, against brute force."""

import itertools
import random

import pytest

from pipeline.run.place import Node, Pool, fit, place, pools
from pipeline.run.worker import RunError
from pipeline.stages import Resources
from tests.fixtures.toy_stages import Toy


def toys(*cpus: float) -> list[Toy]:
    return [Toy(f"s{i}", c) for i, c in enumerate(cpus)]


def needs(stages) -> dict[str, Resources]:
    return {s.name: s.resources for s in stages}


def test_consecutive_cpu_stages_of_equal_need_share_a_pool():
    stages = toys(1, 1, 2, 2, 1)
    assert [[s.name for s in p.stages] for p in pools(stages, needs(stages))] == [
        ["s0", "s1"],
        ["s2", "s3"],
        ["s4"],
    ]


def test_a_gpu_stage_has_its_pool_to_itself():
    stages = toys(1, 1, 1, 1)
    r = needs(stages) | {"s1": Resources(1, gpus=0.5), "s2": Resources(1, gpus=0.5)}
    assert [[s.name for s in p.stages] for p in pools(stages, r)] == [["s0"], ["s1"], ["s2"], ["s3"]]


@pytest.mark.parametrize("cpus", [1, 2, 4, 64])
@pytest.mark.parametrize("shape", [(1,), (1, 2), (1, 2, 1, 2, 1, 2, 1), (8, 1, 16)])
def test_the_smallest_size_of_all_pools_fits_every_machine(cpus, shape):
    fitted = fit(pools(stages := toys(*shape), needs(stages)), [Node(cpus)])
    assert sum(p.resources.cpus * p.resources.min_workers for p in fitted) <= 0.9 * cpus + 1e-9


def test_a_lone_pool_can_still_use_every_cpu():
    stages = toys(1)
    assert int(4 / fit(pools(stages, needs(stages)), [Node(4)])[0].resources.cpus) == 4


def test_shares_fit_node_by_node_and_not_only_in_all():
    fitted = fit([Pool(toys(3), Resources(3)), Pool(toys(3), Resources(3))], [Node(2), Node(2), Node(2)])
    assert 1.7 < fitted[0].resources.cpus <= 1.801  # in all there would be room for 2.7 each


@pytest.mark.parametrize(
    ("gpus", "nodes"),
    [
        ([(1.0, 1)], [Node(8)]),
        ([(0.6, 3)], [Node(8, 2)]),  # 1.8 of 2 GPUs, and yet no third place
        ([(2.0, 1)], [Node(8, 1), Node(8, 1)]),  # no node has two
        ([(0.5, 1), (1.0, 2)], [Node(8, 2)]),
    ],
)
def test_gpus_that_do_not_pack_are_one_sentence_before_work_starts(gpus, nodes):
    found = [Pool([Toy(f"s{i}")], Resources(1, g, n)) for i, (g, n) in enumerate(gpus)]
    with pytest.raises(
        RunError, match=r"find no place on the cluster's nodes at once \(s0: .*lower resources"
    ):
        fit(found, nodes)


def test_part_of_a_second_gpu_is_refused_as_ray_does():
    with pytest.raises(RunError, match=r"gpus 1.5: above 1 it must be a whole number"):
        fit([Pool(toys(1), Resources(1, gpus=1.5))], [Node(8, 4)])


def brute_force(demands, nodes) -> bool:
    """Try every assignment of every worker to every GPU (or set of them) of every node."""
    choices = []
    for _, g in demands:
        mine = []
        for n, node in enumerate(nodes):
            if g == 0:
                mine.append((n, ()))
            elif g < 1:
                mine += [(n, (d,)) for d in range(node.gpus)]
            else:
                mine += [(n, ds) for ds in itertools.combinations(range(node.gpus), int(g))]
        choices.append(mine)
    for chosen in itertools.product(*choices):
        cpus, gpus = [0.0] * len(nodes), {}
        for (c, g), (n, devices) in zip(demands, chosen, strict=True):
            cpus[n] += c
            for d in devices:
                gpus[n, d] = gpus.get((n, d), 0.0) + min(g, 1.0)
        if all(c <= node.cpus + 1e-9 for c, node in zip(cpus, nodes, strict=True)) and all(
            g <= 1 + 1e-9 for g in gpus.values()
        ):
            return True
    return False


def test_places_are_found_exactly_where_brute_force_finds_some():
    rng, found = random.Random(0), []
    for _ in range(400):
        demands = [
            (rng.choice([0, 0.5, 1, 2]), rng.choice([0, 0.2, 0.4, 0.5, 0.6, 0.75, 1, 2]))
            for _ in range(rng.randint(1, 5))
        ]
        nodes = [Node(rng.choice([0, 1, 2, 3]), rng.choice([0, 1, 2])) for _ in range(rng.randint(1, 3))]
        found.append(place(demands, nodes))
        assert found[-1] is brute_force(demands, nodes), (demands, nodes)
    assert 100 < sum(found) < 300


def test_the_search_for_places_ends_on_large_clusters():
    assert place([(1.0, 0.3)] * 400, [Node(64, 8)] * 64) is True
    assert place([(1.0, 0.35)] * 1500, [Node(64, 8)] * 64) in (None, False)  # two a GPU: 1024 places
