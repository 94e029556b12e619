"""clipmill eval vq: PSNR and SSIM are the measures' own, and codes are counted as the model gives them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from jobs import evaluate, train
from jobs.evaluation.numbers import table
from jobs.training.data.pixels import to_unit
from jobs.training.world.system import load_vq
from models.measures.quality import psnr
from pipeline.shards.reader import ShardReader
from tests.fixtures.run_folder import make_sharded_run

RECIPE = {
    "trains": "vq",
    "model": {
        "kind": "vq",
        "stride": [1, 4, 4],
        "width": 8,
        "multipliers": [1, 1, 1],
        "depth": 1,
        "codes": 24,
    },
    "vq": {"channels": 4, "perceptual": "none", "adversarial": 0},
    "data": {"fps": 8, "buckets": [{"frames": 2, "height": 16, "width": 16}], "batch": 2, "workers": 0},
    "run": {"steps": 1, "sample_every": 0},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A run and a model."""
    folder = tmp_path_factory.mktemp("vq")
    run = make_sharded_run(folder / "run", sources=4)
    (folder / "mine.yaml").write_text(yaml.safe_dump(RECIPE))
    args = [
        "vq",
        str(run),
        "--recipe",
        str(folder / "mine.yaml"),
        "--out",
        str(folder / "model"),
        "--device",
        "cpu",
    ]
    assert train.main(args) == 0
    return Path(run), folder / "model"


def test_numbers_are_the_measures_own(trained, capsys):
    run, model = trained
    assert evaluate.main(["vq", str(model), "--against", str(run), "--device", "cpu"]) == 0
    result = json.loads((model / "eval.json").read_text())
    found = {row["name"]: row for row in result["numbers"]}
    vq = load_vq(str(model), "MODEL", torch.device("cpu"))
    reader = ShardReader(f"{run}/shards", frames=2, fps=8, size=(16, 16), window="center", shuffle=False)
    each, codes = [], []
    for row in range(len(reader.keys)):
        video = to_unit(torch.from_numpy(reader.read(row)["video"])[None].permute(0, 4, 1, 2, 3))
        with torch.no_grad():
            made, quantised = vq(video)
        each.append(float(psnr(made.clamp(-1, 1), video).mean()))
        codes += quantised.codes.flatten().tolist()
    assert found["PSNR, dB"]["value"] == pytest.approx(np.mean(each), rel=1e-5)
    assert found["PSNR, dB"]["n"] == len(each) > 1
    assert found["codes in use, share"]["value"] == pytest.approx(len(set(codes)) / 24)
    assert result["protocol"]["size"] == "16×16"
    printed = capsys.readouterr().out
    assert f"PSNR, dB {found['PSNR, dB']['value']:.4g} ± {np.std(each, ddof=1):.3g}" in " ".join(
        printed.split()
    )
    assert printed.splitlines()[-1] == f"written to {model / 'eval.json'}"


def test_nothing_that_was_measured_is_said_in_place_of_an_empty_table():
    assert table([]) == "Nothing was found that could be measured."


def test_what_is_no_vq_model_is_one_sentence(trained, tmp_path, capsys):
    run, _ = trained
    assert evaluate.main(["vq", str(tmp_path), "--against", str(run), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("clipmill eval: ")
    assert err.count("\n") == 1
