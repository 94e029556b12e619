"""A disk that is full, or a folder that cannot be written: one sentence, nothing lost, and the same command goes on."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jobs.training.loop import train
from jobs.training.page.monitor import Monitor
from jobs.training.room import unwritable
from tests.fixtures.toy_training import build, recipe, run, weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 4 KiB; `remount` makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k", "none", folder], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_told_in_a_sentence_and_with_room_the_same_command_ends_as_if_nothing_had_been(
    disk: Path, tmp_path: Path
):
    """At each size of the disk it fails elsewhere: the page, metrics, checkpoints, frozen weights, the last export."""
    run(recipe(), tmp_path / "calm")
    failed = 0
    for size in (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 128, 192, 4096):
        subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
        try:
            train(recipe(), "", disk / "out", device="cpu", build=build, monitor=Monitor)
        except ValueError as e:
            said, failed = str(e), failed + 1
        else:
            break
        assert said.startswith(
            f"{disk / 'out'} cannot be written, no space is left: make some; the same command"
        )
    assert failed >= 5
    assert all(torch.equal(a, b) for a, b in pairs(weights(disk / "out", 6), weights(tmp_path / "calm", 6)))
    assert not list((disk / "out").rglob("*.partial"))


def pairs(a, b):
    flat = [dict(leaves(x)) for x in (a, b)]
    assert flat[0].keys() == flat[1].keys()
    return [(flat[0][key], flat[1][key]) for key in flat[0]]


def leaves(x, name=""):
    if isinstance(x, dict):
        for key, value in x.items():
            yield from leaves(value, f"{name}.{key}")
    elif isinstance(x, torch.Tensor):
        yield name, x


@pytest.mark.parametrize("below", ["", "sub/"])
def test_an_out_that_is_a_file_is_told(tmp_path: Path, below: str):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written, .* file: give another --out"):
        run(recipe(), tmp_path / "file" / below)


def test_errors_about_something_else_are_left_alone(tmp_path: Path):
    assert unwritable(FileNotFoundError(errno.ENOENT, "gone", str(tmp_path / "x")), tmp_path) is None
    assert unwritable(PermissionError(errno.EACCES, "no", "/somewhere/data.tar"), tmp_path) is None
    assert unwritable(RuntimeError("PytorchStreamWriter failed"), tmp_path) is None  # there is room
    assert unwritable(ValueError("No idea"), tmp_path) is None
