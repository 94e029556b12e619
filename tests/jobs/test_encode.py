"""clipmill encode: one cache whatever the ranks and kills, and training from it is training from pixels."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from jobs import encode as job
from jobs import shard
from jobs.training.diffusion.recipe import DiffusionRecipe
from jobs.training.diffusion.task import build, images_of
from jobs.training.task import Draws
from models.autoencoders import vae
from models.autoencoders.latents import BlockDCT, Posterior
from pipeline.faults import StoreError
from pipeline.shards import latents
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
from tests.fixtures.run_folder import flip, make_sharded_run
from tests.fixtures.toy_training import start

CPU = torch.device("cpu")
BUCKETS = [{"frames": 4, "height": 32, "width": 32}, {"frames": 8, "height": 32, "width": 48}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """17 clips."""
    folder = tmp_path_factory.mktemp("encode") / "run"
    return make_sharded_run(folder, sources=8)


def recipe(**sections) -> DiffusionRecipe:
    return DiffusionRecipe.model_validate(
        {
            "name": "t",
            "data": {"fps": 4, "buckets": BUCKETS, "tokens": 400, "workers": 0} | sections.pop("data", {}),
            "autoencoder": {"kind": "dct", "patch": 8, "keep": 3},
            "text": {"kind": "words", "length": 16, "width": 16, "depth": 1},
            "model": {"kind": "dit", "dim": 32, "depth": 1, "heads": 2},
        }
        | sections
    )


def digest(folder) -> dict[str, str]:
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def cache(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "cache"
    job.encode(run, recipe(), str(folder), clips=3, batch=2)
    return folder


def test_two_ranks_make_the_cache_of_one_without_overlap_or_loss(run, cache, tmp_path):
    made = []
    for rank in (1, 0):
        before = set(digest(tmp_path))
        job.encode(run, recipe(), str(tmp_path), rank, 2, clips=3, batch=2, workers=rank)
        made.append({n for n in set(digest(tmp_path)) - before if n.endswith(".tar")})
    assert not made[0] & made[1]
    assert min(map(len, made)) > 1
    assert digest(tmp_path) == digest(cache)


def test_every_clip_of_the_run_is_in_the_cache_once(run, cache):
    found = read_index(str(cache))["clip_id"].to_pylist()
    assert sorted(found) == sorted(read_index(f"{run}/shards")["clip_id"].to_pylist())


def test_killed_and_run_again_it_ends_with_the_same_bytes(run, cache, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe().model_dump(mode="json")))
    out = tmp_path / "cache"
    command = [
        sys.executable,
        "-m",
        "jobs.encode",
        run,
        "--recipe",
        str(tmp_path / "r.yaml"),
        "--out",
        str(out),
    ]
    command += ["--clips", "3", "--batch", "2"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=Path(job.__file__).parent.parent)
    deadline = time.monotonic() + 60
    while not list(out.rglob("*-*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    kept = {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet") if p.parent != out}
    assert job.main(command[3:]) == 0
    found = {n: d for n, d in digest(out).items() if not n.endswith(".partial")}
    assert found == digest(cache)
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())


def test_latents_are_those_of_the_clips_first_window(run, cache):
    """Against decoding and encoding by hand."""
    shapes = [tuple(b.values()) for b in BUCKETS]
    pixels = ShardReader(f"{run}/shards", fps=4, shapes=shapes, layout="CTHW")
    stored = latents.LatentReader(str(cache), shapes, length=16)
    rows = {key: i for i, key in enumerate(pixels.keys)}
    for i in range(len(rows)):
        found = stored.read(i)
        clip = pixels.read(rows[found["key"]])
        video = torch.from_numpy(clip["video"].copy())[None].float() / 127.5 - 1
        expected = BlockDCT(8, 3).encode(video).mean[0].half().numpy()
        np.testing.assert_allclose(found["mean"].astype(float), expected.astype(float), atol=2e-3)
        assert found["caption"] == clip["caption"]


def test_a_broken_clip_is_left_out_and_told(run, tmp_path):
    subprocess.run(["cp", "-r", run, tmp_path / "run"], check=True)
    row = read_index(f"{run}/shards").to_pylist()[3]
    with open(tmp_path / "run/shards" / row["tar"], "r+b") as f:
        f.seek(row["offset"])
        f.write(bytes(row["size"]))
    job.encode(str(tmp_path / "run"), recipe(), str(tmp_path / "cache"), clips=3)
    kept = read_index(str(tmp_path / "cache"))["clip_id"].to_pylist()
    assert len(kept) == 16
    assert row["clip_id"] not in kept
    assert latents.statistics(str(tmp_path / "cache"))["broken"] == [row["clip_id"]]


def test_a_repaired_clip_is_encoded_and_nothing_else_again(run, cache, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    row = read_index(f"{run}/shards").to_pylist()[3]
    with open(tmp_path / "run/shards" / row["tar"], "r+b") as f:
        f.seek(row["offset"])
        f.write(bytes(row["size"]))
    out = tmp_path / "cache"
    job.encode(str(tmp_path / "run"), recipe(), str(out), clips=3, batch=2)
    assert len(read_index(str(out))) == 16
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*/*.parquet")}
    shutil.copytree(run, tmp_path / "run", dirs_exist_ok=True)
    job.encode(str(tmp_path / "run"), recipe(), str(out), clips=3, batch=2)
    assert digest(out) == digest(cache)
    assert sum(p.stat().st_mtime_ns != t for p, t in before.items()) == 1


def test_other_clips_or_captions_are_refused_by_training_and_encoded_anew(run, tmp_path):
    folder, out = tmp_path / "run", tmp_path / "cache"
    shutil.copytree(run, folder)
    job.encode(str(folder), recipe(), str(out), clips=3)
    cached = recipe(data={"cache": str(out)})
    build(cached, start(str(folder)))
    lengths = sorted(set(read_index(f"{folder}/shards")["duration_s"].to_pylist()))
    assert (
        shard.main([str(folder), "--set", f"decide.rules.short={{column: duration_s, min: {lengths[1]}}}"])
        == 0
    )
    with pytest.raises(ValueError, match="was made of other clips than"):
        build(cached, start(str(folder)))
    with pytest.raises(StoreError, match="folder of shards"):
        build(cached, start(str(tmp_path / "nowhere")))
    job.encode(str(folder), recipe(), str(out), clips=3)
    build(cached, start(str(folder)))
    assert sorted(read_index(str(out))["clip_id"].to_pylist()) == sorted(
        read_index(f"{folder}/shards")["clip_id"].to_pylist()
    )


def test_an_autoencoder_of_other_weights_at_the_same_path_is_refused(run, tmp_path, capsys):
    options = {"stride": [1, 4, 4], "width": 8, "multipliers": [1, 2, 2], "depth": 1, "channels": 4}

    def save(seed):
        torch.manual_seed(seed)
        folder = tmp_path / "vae"
        folder.mkdir(exist_ok=True)
        weights = {f"vae/{name}": x for name, x in vae.build(**options).state_dict().items()}
        save_file(weights, folder / "model.safetensors", {"step": "1"})
        (folder / "model.json").write_text(json.dumps({"recipe": {"trains": "vae"}}))
        torch.save({"vae": options}, folder / "model.pt")

    save(0)
    wanted = recipe(autoencoder={"kind": "vae", "path": str(tmp_path / "vae")}, data={"tokens": 1000})
    job.encode(run, wanted, str(tmp_path / "cache"))
    cached = wanted.model_copy(
        update={"data": wanted.data.model_copy(update={"cache": str(tmp_path / "cache")})}
    )
    build(cached, start(run))
    save(1)
    with pytest.raises(ValueError, match="made with autoencoder_weights"):
        build(cached, start(run))
    with pytest.raises(StoreError, match="a cache whose autoencoder_weights was"):
        job.encode(run, wanted, str(tmp_path / "cache"))


# ------------------------------------------------------------ training from it


class Rounded(BlockDCT):
    """What a cache holds of its latents: half precision."""

    def encode(self, video):
        return Posterior(super().encode(video).mean.half().float())


def test_a_clip_with_one_flipped_bit_is_left_out_and_named(run, tmp_path, capfd):
    shutil.copytree(run, tmp_path / "run")
    row = read_index(f"{run}/shards").to_pylist()[2]
    flip(tmp_path / "run/shards" / row["tar"], row["offset"] + row["size"] // 2)
    job.encode(str(tmp_path / "run"), recipe(), str(tmp_path / "cache"), clips=3, batch=2)
    assert latents.statistics(str(tmp_path / "cache"))["broken"] == [row["clip_id"]]
    said = capfd.readouterr().err
    assert said.count("left out") == 1
    for named in (row["clip_id"], row["tar"], row["media_sha256"], "damaged"):
        assert named in said


@pytest.mark.parametrize("tasks", [{}, {"first_frame": 0.3, "prediction": 0.3, "interpolation": 0.3}])
def test_training_from_the_cache_is_training_from_pixels(run, cache, tasks):
    from_pixels, pixels = build(recipe(tasks=tasks), start(run))
    from_cache, cached = build(recipe(tasks=tasks, data={"cache": str(cache)}), start(run))
    from_pixels.system.autoencoder = Rounded(8, 3)
    from_pixels.system.normalizer = from_cache.system.normalizer
    network, other = from_pixels.system.network, from_cache.system.network
    with torch.no_grad():  # an untrained network says 0 whatever it is given
        for p, q in zip(network.parameters(), other.parameters(), strict=True):
            q.copy_(p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))))
    steps = min(6, pixels.epoch_length)  # of later epochs pixels have other windows
    for i, (a, b) in enumerate(zip(itertools.islice(pixels, steps), cached, strict=False)):
        assert a["key"] == b["key"]
        assert a["caption"] == b["caption"]
        draws = Draws(0, i, CPU)
        mine, theirs = (
            from_pixels.loss("diffusion", network, a, draws),
            from_cache.loss("diffusion", other, b, draws),
        )
        torch.testing.assert_close(mine.sums["clips"], theirs.sums["clips"], rtol=1e-5, atol=1e-5)
        assert from_pixels.tokens(a) == from_cache.tokens(b)
        assert "video" not in b


def frames_of(mean: torch.Tensor, whole: np.ndarray) -> list[int]:
    """Which latent frames of a clip [C, T, h, w] these latents [C, 1, h, w] are."""
    return [i for i in range(whole.shape[1]) if torch.equal(mean, torch.from_numpy(whole[:, i : i + 1]))]


@pytest.mark.parametrize("lone", [False, True])
def test_images_and_stills_from_the_cache_are_latent_frames(run, cache, lone):
    """The first one where only that stands alone (a causal autoencoder), else any."""
    _, loader = build(recipe(data={"cache": str(cache), "images": 2, "stills": 6}), start(run))
    (clips,) = loader.clips
    assert clips.sizes.lone  # a DCT's latents are of one frame each
    clips.sizes = replace(clips.sizes, lone=lone)
    shapes = [tuple(b.values()) for b in BUCKETS]
    stored = latents.LatentReader(str(cache), shapes, length=16)
    rows = {key: i for i, key in enumerate(stored.keys)}
    seen = set()
    for number, batch in enumerate(itertools.islice(loader, 12)):
        pictures = batch if number < 6 else images_of(batch)
        for i, (key, mean) in enumerate(zip(pictures["key"], pictures["mean"], strict=True)):
            found = frames_of(mean, stored.read(rows[key])["mean"])
            assert found
            seen.update(found)
            assert number < 6 or key != batch["key"][i // 2]
    assert (len(seen) > 1) == lone
    assert 0 in seen


def test_copies_of_a_clip_are_the_windows_of_later_epochs(run, tmp_path):
    job.encode(run, recipe(), str(tmp_path / "cache"), copies=2)
    shapes = [tuple(b.values()) for b in BUCKETS]
    pixels = ShardReader(f"{run}/shards", fps=4, shapes=shapes, layout="CTHW")
    stored = latents.LatentReader(str(tmp_path / "cache"), shapes, length=16)
    keys, every = stored.keys, pixels.keys
    assert sorted(keys) == sorted([*every, *every])
    seen: dict[str, int] = {}
    for i, key in enumerate(keys):
        pixels.epoch = seen[key] = seen.get(key, -1) + 1
        video = torch.from_numpy(pixels.read(every.index(key))["video"].copy())[None].float() / 127.5 - 1
        expected = BlockDCT(8, 3).encode(video).mean[0].half().numpy()
        np.testing.assert_allclose(stored.read(i)["mean"].astype(float), expected.astype(float), atol=2e-3)


def test_frozen_text_is_kept_and_used(run, tmp_path):
    from tests.models.encoders.test_text import _save

    text = {"kind": "transformers", "model": _save(tmp_path / "t5", "t5"), "length": 24}
    job.encode(run, recipe(text=text), str(tmp_path / "cache"))
    with_text = recipe(text=text, data={"cache": str(tmp_path / "cache")})
    task, loader = build(with_text, start(run))
    batch = next(iter(loader))
    told = task.condition(task.latents(batch, Draws(0, 0, CPU)), batch, Draws(0, 0, CPU))
    features, mask = task.system.text(batch["caption"])
    assert torch.equal(told.text_mask, mask)
    torch.testing.assert_close(told.text[mask], features[mask], atol=2e-3, rtol=2e-3)


# ------------------------------------------------------------ errors


def test_a_cache_of_another_recipe_is_refused(run, cache):
    other = recipe(data={"cache": str(cache), "fps": 8})
    with pytest.raises(ValueError, match=r"made with fps 4\.0"):
        build(other, start(run))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing", "--recipe", "small"], "shards"),
        (["RUN", "--recipe", "none-such"], "none-such"),
        (["RUN", "--recipe", "small", "--batch", "0"], "--batch"),
        (["RUN", "--recipe", "small", "--device", "abacus"], "abacus"),
        (
            ["RUN", "--recipe", "small", "--set", "data.buckets=[{frames: 8, height: 60, width: 64}]"],
            "multiple of 8",
        ),
        (["RUN", "--recipe", "small", "--set", "autoencoder.kind=diffusers"], "autoencoder.path"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(run, tmp_path, capsys, arguments, says):
    arguments = [run if a == "RUN" else str(tmp_path / a) if a == "nothing" else a for a in arguments]
    assert job.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_another_cache_in_the_folder_is_refused(run, cache, capsys):
    assert job.main([run, "--recipe", "small", "--out", str(cache)]) == 2
    assert "give another folder" in capsys.readouterr().err
