"""clipmill sample of a world model: its tasks, what it says of how it drew, and what it refuses in one sentence."""

# ruff: noqa: F811 (fixtures are imported by their names)

import json
import shutil

import numpy as np
import pytest

from jobs import sample as job
from jobs.training.loop import train
from jobs.videos import write_mp4
from tests.fixtures.toy_training import Notes
from tests.jobs.test_sample import frames_of
from tests.jobs.training.test_world import recipe, run, vq  # noqa: F401 (fixtures)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def model(run, vq, tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    train(recipe(vq), run, out, device="cpu", monitor=Notes)
    return str(out)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    file = tmp_path_factory.mktemp("video") / "grey.mp4"
    write_mp4(file, np.full((6, 32, 32, 3), 90, np.uint8), 8)
    return str(file)


def sampled(model: str, out, *options: str) -> int:
    return job.main([model, *options, "--device", "cpu", "--out", str(out), "--replace"])


def test_the_same_seed_draws_the_same_and_a_video_does_not_depend_on_others(model, tmp_path):
    for name, n in (("a", "2"), ("b", "1")):
        assert sampled(model, tmp_path / name, "--prompt", "waves", "--n", n, "--guidance", "2") == 0
    a, b = (frames_of(tmp_path / name / "000-waves.mp4") for name in "ab")
    assert np.array_equal(a, b)
    assert a.shape == (2, 16, 16, 3)
    used = json.loads((tmp_path / "a" / "sampling.json").read_text())["models"][model]
    assert used["first"] == {"guidance": 2.0, "temperature": 1.0, "top_k": None}


def test_frames_are_drawn_beyond_those_it_was_trained_on(model, tmp_path):
    assert sampled(model, tmp_path / "long", "--prompt", "waves", "--frames", "5", "--top-k", "3") == 0
    assert len(frames_of(tmp_path / "long" / "000-waves.mp4")) == 5


def test_a_video_goes_on_and_what_was_given_stays(model, video, tmp_path):
    assert sampled(model, tmp_path / "on", "--task", "extend", "--video", video, "--frames", "8") == 0
    for seed in ("0", "1"):
        assert sampled(model, tmp_path / seed, "--task", "image", "--video", video, "--seed", seed) == 0
    first, second = (frames_of(next((tmp_path / s).glob("*.mp4"))) for s in "01")
    assert np.abs(first[0].astype(int) - second[0]).mean() < 3  # of the same codes; mp4 is not exact
    assert len(frames_of(next((tmp_path / "on").glob("*.mp4")))) == 8


@pytest.mark.parametrize("task", [("--task", "caption"), ()])
def test_a_video_is_told_in_words(model, video, tmp_path, capsys, task):
    assert sampled(model, tmp_path / "told", *task, "--video", video) == 0
    (row,) = json.loads((tmp_path / "told" / "captions.json").read_text())["captions"]
    assert row["text"] in capsys.readouterr().out
    assert not list((tmp_path / "told").glob("*.mp4"))


def test_a_folder_without_a_model_is_told_before_what_its_options_would_mean(video, tmp_path, capsys):
    assert sampled(str(tmp_path / "nowhere"), tmp_path / "no", "--video", video) == 2
    assert "nowhere holds no model.safetensors" in capsys.readouterr().err


def test_a_codebook_that_was_moved_is_asked_for_as_it_is_given(model, vq, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    told = moved / "model.json"
    told.write_text(told.read_text().replace(str(vq), "/nowhere/vq"))
    assert sampled(str(moved), tmp_path / "no", "--prompt", "waves") == 2
    assert "is not at /nowhere/vq: bring it back, or say where it is, --locate" in capsys.readouterr().err
    assert sampled(str(moved), tmp_path / "yes", "--prompt", "waves", "--locate", f"vq.path={vq}") == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--task", "upsample"], "is for diffusion models"),
        (["--steps", "5"], "--steps is for diffusion models"),
        (["--task", "image"], "needs --video FILE"),
        (["--task", "text", "--context", "2"], "has no use for --context"),
        (["--task", "extend", "--video", "{video}"], "needs --frames N"),
        (["--task", "extend", "--video", "{video}", "--frames", "4"], "give more --frames"),
        (["--top-k", "0"], "give 1 or more"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_in_a_sentence(
    model, video, tmp_path, capsys, options, said
):
    assert sampled(model, tmp_path / "no", *(x.format(video=video) for x in options)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "no").exists()
