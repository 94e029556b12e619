"""Training from shards: resuming gives what an uninterrupted run gives, bit for bit."""

import subprocess
import sys

import pytest
import torch

from jobs import train
from jobs.train import Settings
from tests.fixtures.run_folder import make_run_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a few clips, sharded."""
    folder = tmp_path_factory.mktemp("run")
    make_run_folder(folder)
    from jobs import shard

    assert shard.main([str(folder)]) == 0
    return str(folder)


@pytest.mark.parametrize("model", ["diffusion", "vlm"])
def test_stopping_and_resuming_equals_not_stopping(run, tmp_path, model):
    settings = Settings(model, batch=2, frames=2, size=32, lr=1e-3, seed=1)
    whole = train.train(run, tmp_path / "whole", settings, 7, workers=0)
    parts = train.train(run, tmp_path / "parts", settings, 3, workers=1)
    parts += train.train(run, tmp_path / "parts", settings, 7, workers=0)
    assert parts == whole
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("whole", "parts"))
    assert a["data"] == b["data"]
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def test_other_settings_do_not_overwrite_a_checkpoint(run, tmp_path, capsys):
    arguments = ["diffusion", run, "--out", str(tmp_path), "--steps", "1", "--size", "32", "--frames", "2"]
    assert train.main(arguments) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert train.main([*arguments, "--lr", "1"]) == 2
    assert "another --out" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(("arguments", "says"), [(["--size", "30"], "multiple of 16"), ([], "shards")])
def test_bad_input_is_one_line(tmp_path, capsys, arguments, says):
    assert train.main(["vlm", str(tmp_path), "--out", str(tmp_path / "o"), *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_training_imports_no_ray(run, tmp_path):
    code = (
        "import sys\nfrom jobs import train\n"
        f"train.main(['vlm', {run!r}, '--out', {str(tmp_path)!r}, '--steps', '1', '--size', '32', '--workers', '0'])\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
