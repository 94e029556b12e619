"""Distances while training: to the same real videos at every look, whoever of the ranks samples what."""

import os
from pathlib import Path

import pytest
import torch

from jobs.training.diffusion.frechet import FrechetInLoop
from jobs.training.distributed import World, connect
from models.measures.frechet import frechet_distance, kernel_distance, moments
from tests.fixtures.toy_training import in_ranks

ALONE = World(0, 1, torch.device("cpu"))


class Counting:
    """A feature network that counts the videos it saw."""

    name, hash, about, distance = "colours", "0123456789ab", "", "Fréchet distance"

    def __init__(self):
        self.seen = 0

    def __call__(self, videos):
        self.seen += len(videos)
        return videos.float().mean((1, 2, 3))


def video(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (1, 2, 4, 4, 3), generator=generator, dtype=torch.uint8)


def real(n: int):
    return lambda: (torch.cat([video(i) for i in range(at, min(at + 4, n))]) for at in range(0, n, 4))


def sampled(world: World = ALONE, n: int = 10):
    return ((i, video(100 + i)) for i in world.share(n))


def features(start: int, n: int) -> torch.Tensor:
    return torch.cat([video(start + i).float().mean((1, 2, 3)) for i in range(n)])


def test_it_is_the_distance_to_the_first_n_and_the_floor_that_of_the_next_n(tmp_path):
    found = FrechetInLoop(tmp_path, Counting(), real(30), 10, ALONE)(sampled())
    ours, other, made = features(0, 10), features(10, 10), features(100, 10)
    assert found == pytest.approx(
        {
            "frechet/colours": frechet_distance(moments(ours), moments(made)),
            "kernel/colours": kernel_distance(ours, made),
            "frechet/colours/real": frechet_distance(moments(ours), moments(other)),
            "kernel/colours/real": kernel_distance(ours, other),
        }
    )


def test_real_videos_are_measured_once_in_a_run_and_anew_for_another_protocol(tmp_path):
    FrechetInLoop(tmp_path, Counting(), real(20), 10, ALONE, {"frames": 2})
    again = Counting()
    kept = FrechetInLoop(tmp_path, again, real(0), 10, ALONE, {"frames": 2})
    assert again.seen == 0
    torch.testing.assert_close(kept.real, features(0, 10))
    FrechetInLoop(tmp_path, again, real(20), 10, ALONE, {"frames": 3})
    assert again.seen == 20


def test_few_real_videos_have_no_floor_and_one_is_refused(tmp_path):
    found = FrechetInLoop(tmp_path / "a", Counting(), real(13), 10, ALONE)
    assert set(found(sampled())) == {"frechet/colours", "kernel/colours"}
    assert len(found.real) == 10
    with pytest.raises(ValueError, match="1 real videos are too few"):
        FrechetInLoop(tmp_path / "b", Counting(), real(1), 10, ALONE)


def measure(out: Path, count: int) -> None:
    """As a rank; what it got, or was told, and how many real videos it looked at."""
    network = Counting()
    with connect("cpu") as world:
        assert len(world.share(7)) == 4  # equal passes through the model on every rank
        try:
            found = FrechetInLoop(out, network, real(count), 7, world)
            said = found(sampled(world, 7))
        except ValueError as e:
            said = str(e)
    torch.save((said, network.seen), out / f"{os.environ['RANK']}.pt")


@pytest.mark.parametrize("count", [14, 1])
def test_ranks_share_the_work_and_all_get_the_numbers_of_the_whole_or_the_sentence(tmp_path, count):
    assert in_ranks(2, measure, tmp_path, count) == [0, 0]
    (first, looked), (second, other) = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    assert first == second
    if count == 1:
        assert "too few" in first
        return
    assert first == pytest.approx(FrechetInLoop(tmp_path, Counting(), real(14), 7, ALONE)(sampled(n=7)))
    assert (looked, other) == (14 + 4, 4)  # rank 0 alone measures the real ones, once
