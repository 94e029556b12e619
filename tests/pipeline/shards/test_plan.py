import tarfile
from itertools import pairwise

import numpy as np
import pytest

from pipeline.shards.plan import bucket, header, split


@pytest.mark.parametrize("seed", range(5))
def test_split_is_within_the_limits_the_fewest_and_even(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 60, 200)
    edges = split(sizes, 12, 300)
    runs = [sizes[a:b] for a, b in pairwise(edges)]
    assert edges[0] == 0
    assert edges[-1] == len(sizes)
    assert all(0 < len(r) <= 12 and r.sum() <= 300 for r in runs)
    fewest, n, size = 1, 0, 0
    for s in sizes:
        if n == 12 or size + s > 300:
            fewest, n, size = fewest + 1, 0, 0
        n, size = n + 1, size + s
    assert len(runs) == fewest
    assert min(len(r) for r in runs) >= 4


def test_split_spreads_evenly_where_sizes_are_equal():
    edges = split(np.full(1001, 10), 1000, 1 << 20)
    assert sorted(np.diff(edges)) in ([500, 501], [501, 500])


def test_a_clip_above_the_limit_gets_a_run_of_its_own():
    assert split(np.array([5, 5000, 5, 5]), 10, 100) == [0, 1, 2, 4]
    assert split(np.array([], int), 10, 100) == [0]


@pytest.mark.parametrize("size", [0, 1, 511, 512, 12345, 8**11 - 1])
def test_tar_headers_are_those_of_pythons_tarfile(size):
    info = tarfile.TarInfo("0123456789abcdef0123.efficientnet_lite0.npy")
    info.size = size
    assert header(info.name, size) == info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(
    ("width", "height", "sar", "seconds", "name"),
    [
        (640, 360, 1, 5, "16x9_360p_4-8s"),
        (720, 480, 32 / 27, 4, "16x9_480p_4-8s"),  # anamorphic NTSC
        (1080, 1920, 1, 3.99, "9x16_1080p_0-4s"),
        (1918, 1078, 1, 32, "16x9_1080p_32s-up"),
        (640, 272, 1, 10, "21x9_240p_8-16s"),
        (64, 64, 1, 1, "1x1_under144p_0-4s"),
    ],
)
def test_bucket_names_say_shape_and_length(width, height, sar, seconds, name):
    assert bucket(width, height, sar, seconds, (4, 8, 16, 32)) == name
