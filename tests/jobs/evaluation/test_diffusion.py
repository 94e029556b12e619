"""clipmill eval: right numbers with their protocol, real beside generated, never called FVD without I3D."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs import evaluate as job
from jobs.evaluation import diffusion as evaluate
from pipeline.io.store import Store
from pipeline.shards.pack import shard
from tests.fixtures import run_folder

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


class Colours(torch.nn.Module):
    """Mean and spread of the colours, [B, 6]: quick, and different for every gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.mean((2, 3, 4)), x.std((2, 3, 4))], 1)


class LikeI3D(torch.nn.Module):
    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        return x[:, :, :2, ::16, ::16].flatten(1)[:, :400]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """16 clips of 2.5 to 9.5 s, sharded, all kept."""
    root = tmp_path_factory.mktemp("run")
    recipe = run_folder.make_run_folder(root)
    decide = recipe.decide.model_copy(update={"rules": {}})
    decide = decide.model_copy(update={"duplicates": decide.duplicates.model_copy(update={"enabled": False})})
    shard(Store(str(root)), recipe.model_copy(update={"decide": decide}))
    return root


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    torch.jit.script(Colours()).save(str(folder / "colours.pt"))
    torch.jit.script(LikeI3D()).save(str(folder / "i3d.pt"))
    return folder


@pytest.fixture
def made(tmp_path) -> Path:
    """6 mp4 files of 30 frames at 12 a second, with captions, and one that is no video."""
    folder = tmp_path / "made"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.mp4").write_bytes(run_folder.mp4(96, 72, 30, 900 + i))
        (folder / f"{i}.txt").write_text(f"gradient number {i}\n")
    return folder


def evaluated(made: Path, run: Path, *more: str) -> dict:
    code = job.main(["diffusion", str(made), "--against", f"{run}/shards", "--frames", "6", *more])
    assert code == 0
    return json.loads((made / "eval.json").read_text())


def test_numbers_are_those_of_numpy_over_the_files(made, run, networks, capsys):
    """Every frame decoded whole by PyAV, the sixth part chosen by hand, the distance with scipy."""
    import av
    from scipy.linalg import sqrtm

    result = evaluated(made, run, "--n", "6", "--size", "96x72", "--features", str(networks / "colours.pt"))
    frechet, kernel = result["numbers"]
    protocol = frechet["protocol"]
    assert (protocol["frames"], protocol["fps"], protocol["n"], protocol["seed"]) == (6, 8.0, 6, 0)
    assert (protocol["width"], protocol["height"]) == (96, 72)
    assert (protocol["network"], len(protocol["hash"])) == ("colours", 12)

    def features(mp4: bytes) -> np.ndarray:
        import io

        with av.open(io.BytesIO(mp4)) as container:
            frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
        begin = (len(frames) / 12 - 6 / 8) / 2  # the middle, 6 frames at 8 of 12 a second
        chosen = frames[[int((begin + i / 8) * 12 + 1e-6) for i in range(6)]].astype(float) / 127.5 - 1
        return np.concatenate([chosen.mean((0, 1, 2)), chosen.std((0, 1, 2), ddof=1)])

    ours = np.stack([features((made / f"{i}.mp4").read_bytes()) for i in range(6)])
    reader = evaluate.real_videos(f"{run}/shards", evaluate.Protocol(6, 8.0, 72, 96, 6, 0), [])
    real = np.stack(
        [Colours()(v.permute(3, 0, 1, 2)[None].double() / 127.5 - 1)[0].numpy() for v, _ in reader]
    )
    first, other = real[:6], real[6:12]

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        one, two = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        root = np.real(sqrtm(one @ two + 1e-12 * np.eye(6)))
        return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + two - 2 * root))

    assert frechet["value"] == pytest.approx(distance(ours, first), rel=2e-3)
    assert frechet["real"] == pytest.approx(distance(other, first), rel=2e-3)
    assert kernel["name"] == "Kernel distance"
    out = capsys.readouterr().out
    assert "6 videos on either side, 6 frames, 8 a second, 96×72, middle of the clip, seed 0" in out
    assert protocol["hash"] in out


def test_only_the_i3d_file_gives_a_number_called_fvd(made, run, networks, capsys):
    both = ["--features", str(networks / "colours.pt"), "--features", str(networks / "i3d.pt")]
    result = evaluated(made, run, "--n", "4", *both)
    names = {(n["protocol"]["network"], n["name"]) for n in result["numbers"]}
    assert names == {
        ("colours", "Fréchet distance"),
        ("colours", "Kernel distance"),
        ("i3d", "FVD"),
        ("i3d", "Kernel distance"),
    }
    assert capsys.readouterr().out.count("FVD") == 1


def test_the_real_videos_themselves_are_next_to_0_and_dark_ones_farther_than_other_real_ones(
    run, networks, tmp_path
):
    from jobs.videos import write_mp4

    same, dark = tmp_path / "same", tmp_path / "dark"
    same.mkdir()
    dark.mkdir()
    protocol = evaluate.Protocol(6, 8.0, 64, 64, 6, seed=0)
    for i, (video, _) in zip(range(6), evaluate.real_videos(f"{run}/shards", protocol, []), strict=False):
        write_mp4(same / f"{i:02d}.mp4", video.numpy(), 8)
        write_mp4(dark / f"{i:02d}.mp4", video.numpy() // 4, 8)
    options = ["--n", "6", "--features", str(networks / "colours.pt")]
    near, far = (evaluated(folder, run, *options)["numbers"] for folder in (same, dark))
    assert near[0]["value"] < 0.02 * near[0]["real"]  # what H.264 has changed
    assert far[0]["value"] > far[0]["real"] == near[0]["real"]
    assert (
        far[1]["value"] > 0 > near[1]["value"]
    )  # a set with itself: pairs of equals are in the mixed term alone


def test_fewer_videos_than_asked_are_told_and_all_sets_are_of_one_size(made, run, networks):
    (made / "broken.mp4").write_bytes(b"nothing")
    (made / "short.mp4").write_bytes(run_folder.mp4(96, 72, 5, 7))
    result = evaluated(made, run, "--n", "50", "--features", str(networks / "colours.pt"))
    assert result["numbers"][0]["protocol"]["n"] == 6
    notes = " ".join(result["notes"])
    assert "6 videos on either side, not 50" in notes
    assert "broken.mp4 is no video" in notes
    assert "short.mp4 is shorter than 6 frames at 8 a second" in notes
    assert "below 10 × 6" in notes  # 6 samples of 6 dimensions


def test_clips_that_are_too_short_are_left_out_not_frozen(run):
    notes: list[str] = []
    protocol = evaluate.Protocol(24, 8.0, 32, 32, 4, 0)  # 3 s: the clips of 2.5 s do not hold it
    videos = [v for v, _ in evaluate.real_videos(f"{run}/shards", protocol, notes)]
    lengths = pq.read_table(run / "shards/index.parquet")["duration_s"].to_pylist()
    short = sum(s < 3 for s in lengths)
    assert 0 < short == len(lengths) - len(videos)
    assert f"{short} of {len(lengths)} real clips are shorter than 24 frames at 8 a second" in notes[0]
    for video in videos:  # a clip that ends early would stand still at its end
        assert (video[-3:] != video[-4:-1]).any()


def test_real_videos_are_the_middles_of_clips_as_they_are_stored(run):
    import tarfile

    from pipeline.shards.reader import decode

    wanted = []
    for tar in (run / "shards").rglob("*.tar"):
        with tarfile.open(tar) as f:
            files = [f.extractfile(m).read() for m in f if m.name.endswith(".mp4")]
        wanted += [decode(mp4, 6, 8.0, (32, 40), 0.5).tobytes() for mp4 in files]
    protocol = evaluate.Protocol(6, 8.0, 32, 40, 4, 0)
    found = [v.numpy().tobytes() for v, _ in evaluate.real_videos(str(run), protocol, [])]
    assert sorted(found) == sorted(wanted)


def test_the_seed_chooses_the_real_clips(run):
    def captions(seed: int) -> list[str]:
        return [c for _, c in evaluate.real_videos(str(run), evaluate.Protocol(2, 8.0, 16, 16, 4, seed), [])]

    assert captions(0) == captions(0)
    assert sorted(captions(0)) == sorted(captions(1))
    assert captions(0) != captions(1)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory) -> str:
    import open_clip

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    torch.save(open_clip.model.CLIP(**CLIP).state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP}))
    return f"local-dir:{folder}"


def test_clip_scores_are_those_of_the_scorer_with_own_and_other_captions(made, run, networks, tiny_clip):
    from models.measures.clip_score import ClipScorer
    from pipeline.shards.reader import decode

    options = ["--n", "4", "--size", "32", "--features", str(networks / "colours.pt"), "--clip", tiny_clip]
    row = evaluated(made, run, *options)["numbers"][-1]
    scorer = ClipScorer(tiny_clip, "")
    texts = [f"gradient number {i}" for i in range(4)]
    own, other = [], []
    for i in range(4):
        frames = list(decode((made / f"{i}.mp4").read_bytes(), 6, 8.0, (32, 32), 0.5))
        ((mine, others),) = scorer(frames, [(len(frames), [[texts[i]], [texts[(i + 1) % 4]]])])
        own += mine
        other += others
    assert row["name"] == "CLIPScore"
    assert row["value"] == pytest.approx(np.mean(own), abs=1e-6)
    assert row["other_caption"] == pytest.approx(np.mean(other), abs=1e-6)


def test_without_captions_there_is_no_clip_score(made, run, networks, tiny_clip):
    (made / "2.txt").unlink()
    options = ["--n", "4", "--features", str(networks / "colours.pt"), "--clip", tiny_clip]
    result = evaluated(made, run, *options)
    assert "CLIPScore" not in {n["name"] for n in result["numbers"]}
    assert any("have captions" in note for note in result["notes"])


def test_captions_of_the_monitors_samples_are_found(tmp_path):
    from jobs.training.page.monitor import write_samples

    videos = {p: np.zeros((2, 16, 16, 3), np.uint8) for p in ("a red “dog”", "b")}
    folder = write_samples(tmp_path, 5, videos, 8)
    assert [evaluate.caption_of(f) for f in sorted(folder.glob("*.mp4"))] == list(videos)


def test_a_model_is_sampled_with_the_captions_of_the_real_clips_and_says_how(run, networks, tmp_path, capsys):
    """As it was trained, by the settings that are printed: the same drawn again by hand, to the byte."""
    from jobs.training.diffusion.build import load_trained
    from jobs.training.loop import train
    from tests.jobs.test_sample import Silent, recipe

    train(recipe(), str(run), tmp_path / "m", monitor=Silent, device="cpu")
    options = ["--n", "2", "--steps", "2", "--guidance", "1.5", "--seed", "7", "--device", "cpu"]
    features = ["--features", str(networks / "colours.pt")]
    model = str(tmp_path / "m")
    assert job.main(["diffusion", model, "--against", str(run), *features, *options]) == 0
    out = capsys.readouterr().out
    assert "seed 7" in out
    assert "step 20, ema 0.1, sampler dpmpp_2m, steps 2, spacing time, guidance 1.5" in out
    assert "latents 9×5×4×4" in out
    protocol = json.loads((tmp_path / "m/eval.json").read_text())["numbers"][0]["protocol"]
    assert protocol["sampling"]["step"] == 20

    args = argparse.Namespace(
        generated=model, ema=None, device="cpu", steps=2, guidance=1.5, n=3, seed=7, locate=[]
    )
    system, how, asked = evaluate.load(args)
    found = list(evaluate.sampled(system, how, ["ape", "bee"], asked))
    assert [c for _, c in found] == ["ape", "bee", "ape"]
    again = load_trained(model, 0.1, "cpu")
    draw = again.draw(run=again.recipe.run.but(sample_steps=2, guidance=1.5), seed=7)
    by_hand = again.decode(draw(again.shape(3), again.condition(["ape", "bee", "ape"])))
    assert torch.equal(torch.stack([v for v, _ in found]), by_hand)


@pytest.mark.parametrize(("size", "found"), [("64", (64, 64)), ("96x72", (72, 96)), ("96X72", (72, 96))])
def test_sizes_are_width_by_height(size, found):
    assert evaluate.sides(size) == found


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--size", "sixty"], "--size sixty"),
        (["--n", "1"], "--n must be at least 2"),
        (["--features", "inception"], "feature network 'inception'"),
        (["--guidance", "3"], "holds videos, not a model"),
        (["--frames", "1000"], "give fewer --frames"),
        (["--clip", "ViT-B-33:openai"], "no architecture"),
    ],
)
def test_bad_input_is_one_line(made, run, networks, capsys, arguments, says):
    features = [] if "--features" in arguments else ["--features", str(networks / "colours.pt")]
    assert job.main(["diffusion", str(made), "--against", str(run), *features, *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_a_folder_without_videos_or_shards_is_one_line(made, run, networks, tmp_path, capsys):
    assert job.main(["diffusion", str(tmp_path / "none"), "--against", str(run)]) == 2
    assert "is no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    network = ["--features", str(networks / "colours.pt")]
    assert job.main(["diffusion", str(made), "--against", str(tmp_path / "empty"), *network]) == 2
    assert "give a folder of shards" in capsys.readouterr().err
    shutil.rmtree(made)
    made.mkdir()
    assert job.main(["diffusion", str(made), "--against", str(run)]) == 2
    assert "holds neither a model" in capsys.readouterr().err


def test_a_model_is_measured_as_it_was_trained(tmp_path):
    (tmp_path / "model.safetensors").touch()
    given = {"generated": str(tmp_path), "n": 4, "seed": 0, "frames": None, "fps": None, "size": None}
    evaluate.check(argparse.Namespace(**given))
    for name, value in (("frames", 8), ("fps", 4.0), ("size", "32")):
        with pytest.raises(ValueError, match=f"--{name}: a model is measured as it was trained"):
            evaluate.check(argparse.Namespace(**given | {name: value}))
