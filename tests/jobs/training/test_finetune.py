"""Beginning with a trained model: any denoiser, all of it or with adapters, without it being there later; and files
that lie elsewhere by now."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs import sample
from jobs.sampling import latents_of
from jobs.training.checkpoint import difference
from jobs.training.diffusion.build import load_trained
from jobs.training.diffusion.network import Network
from jobs.training.diffusion.task import Diffusion, build
from jobs.training.exported import CheckpointError
from jobs.training.loop import train
from jobs.training.task import Draws
from tests.fixtures.run_folder import make_sharded_run
from tests.fixtures.shrunken import checkpoints, load
from tests.fixtures.toy_training import Notes, in_ranks, start, weights
from tests.jobs.training.test_lora import stirred

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
CPU = torch.device("cpu")
SHORT = ["run.sample_every=0", "run.save_every=1", "data.micro_batches=1", "data.stills=0", "data.images=0"]
SHORT += ["tasks={first_frame: 0}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune") / "run"
    return make_sharded_run(folder, sources=4)


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    return checkpoints(tmp_path_factory.mktemp("checkpoints"))


def recipe(name, at, *more):
    return load(name, at, *SHORT, *more)


def away_from_zero(recipe, start):
    """As the trainer makes it, and then no part of it says 0."""
    task, loader = build(recipe, start)
    if not start.saved:
        stirred(task.system.network)
    return task, loader


@pytest.fixture(scope="module")
def trained(run, at, tmp_path_factory):
    """A kind → the folder of a model of it, trained for a step."""
    made = {}

    def of(name):
        if name not in made:
            out = tmp_path_factory.mktemp(name)
            train(
                recipe(name, at, "run.steps=1"), run, out, device="cpu", build=away_from_zero, monitor=Notes
            )
            made[name] = str(out)
        return made[name]

    return of


def said(task: Diffusion, batch, other: Network) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the task's network and of another, each told what it takes, on the same noisy latents and texts."""
    question = task.question(batch.get("parts", [batch])[0], Draws(0, 0, CPU))
    network, z = task.system.network, question.noise
    told = network._condition(replace(question, dropped=torch.zeros(len(z), dtype=torch.bool)))
    plain = replace(told, known=None, known_mask=None, held=None, low=None, low_level=None)
    level = torch.full((len(z),), 0.4)
    with torch.no_grad():
        return network.predict(z, level, told), other.predict(z, level, plain)


# ------------------------------------------------------------ all of it


MORE = {"known frames": ["tasks={first_frame: 1}"], "small videos": ["tasks={upsampling: 2}"]}


@pytest.mark.parametrize("more", ["", *MORE])
@pytest.mark.parametrize("name", ["small", "sora", "toy", "video_ldm", "video_ldm-frozen"])
def test_a_fine_tuned_model_says_at_first_what_the_one_it_starts_from_says(name, more, run, at, trained):
    """Of any denoiser; known frames and small videos, which the other never saw, change nothing yet."""
    wanted = recipe(name, at, f"start={trained(name)}", *MORE.get(more, ()))
    if more == "small videos" and "video_ldm" in name:
        with pytest.raises(ValueError, match=r"cannot be given frames \(upsample\)"):
            build(wanted, start(run))
        return
    task, loader = build(wanted, start(run))
    other = load_trained(trained(name), None, "cpu")
    mine, theirs = said(task, next(iter(loader)), other.network)
    assert mine.abs().max() > 1e-2
    torch.testing.assert_close(mine, theirs)
    assert torch.equal(task.system.normalizer.std, other.normalizer.std)


def test_what_was_trained_for_known_frames_and_small_videos_learns_the_other_too(run, at, trained, tmp_path):
    """Channels are appended between those that are there; each keeps its own weight."""
    for first in MORE.values():
        shutil.rmtree(tmp_path / "first", ignore_errors=True)
        wanted = recipe("toy", at, *first, "run.steps=1")
        train(wanted, run, tmp_path / "first", device="cpu", build=away_from_zero, monitor=Notes)
        both = "tasks={first_frame: 1, upsampling: 2}"
        task, loader = build(recipe("toy", at, both, f"start={tmp_path / 'first'}"), start(run))
        other = load_trained(str(tmp_path / "first"), None, "cpu").network
        batch = next(iter(loader))
        question = task.question(batch, Draws(0, 0, CPU))
        told = task.system.network._condition(question)
        without = (
            {"low": None, "low_level": None} if "first" in first[0] else {"known": None, "known_mask": None}
        )
        level = torch.full((len(question.x),), 0.4)
        with torch.no_grad():
            mine = task.system.network.predict(question.noise, level, told)
            theirs = other.predict(question.noise, level, replace(told, **without))
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["model.width=24"], "has another denoiser.*: use the same options of model"),
        (["model.cross_attention=false"], "which this recipe's network has not: use the same options"),
        (["text.width=24"], "trained with another text"),
        (["objective.prediction=eps"], "trained with another objective.prediction"),
        (["model={kind: dit, dim: 32, depth: 1, heads: 2}"], "trained with another model.kind"),
        (["start=nowhere"], "nowhere holds no model.safetensors"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(change, says, run, at, trained):
    with pytest.raises(ValueError, match=says):
        build(recipe("toy", at, f"start={trained('toy')}", *change), start(run))


def test_other_weights_of_the_encoders_are_refused_wherever_they_lie(run, at, trained, tmp_path):
    """At the start and when a training goes on; the same weights elsewhere are the same."""
    diffusers = pytest.importorskip("diffusers")
    shutil.copytree(at["image"], tmp_path / "same")
    other = diffusers.AutoencoderKL.from_pretrained(at["image"])
    stirred(other)
    other.save_pretrained(tmp_path / "other")
    same, others = (f"autoencoder.path={tmp_path / name}" for name in ("same", "other"))
    base = f"start={trained('dit-xl')}"
    build(recipe("dit-xl", at, base, same), start(run))
    with pytest.raises(
        ValueError, match=r"start .* other weights of its autoencoder .*: name those in autoencoder.path"
    ):
        build(recipe("dit-xl", at, base, others), start(run))
    out = tmp_path / "out"
    train(recipe("dit-xl", at, "run.steps=1"), run, out, device="cpu", monitor=Notes)
    train(recipe("dit-xl", at, "run.steps=2", same), run, out, device="cpu", monitor=Notes)
    with pytest.raises(ValueError, match="out was trained with other weights of its autoencoder"):
        train(recipe("dit-xl", at, "run.steps=3", others), run, out, device="cpu", monitor=Notes)


@pytest.mark.parametrize("lora", [[], ["lora={rank: 2}"]], ids=["all of it", "adapters"])
def test_a_fine_tune_goes_on_without_the_model_it_started_from(lora, run, at, trained, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(trained("video_ldm-frozen"), base)
    for out, steps in (("whole", [3]), ("parts", [1, 3])):
        for n in steps:
            wanted = recipe("video_ldm-frozen", at, f"start={base}", f"run.steps={n}", "run.keep=3", *lora)
            train(wanted, run, tmp_path / out, device="cpu", monitor=Notes)
            if n == 1:
                base.rename(tmp_path / "gone")
    a, b = weights(tmp_path / "whole", 3), weights(tmp_path / "parts", 3)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    without = recipe("video_ldm-frozen", at, "run.steps=4", *lora)  # nor need it be named
    assert train(without, run, tmp_path / "parts", device="cpu", monitor=Notes).step == 4


# ------------------------------------------------------------ adapters


@pytest.mark.parametrize("name", ["small", "sora", "toy", "video_ldm-frozen"])
def test_adapters_alone_are_trained_kept_and_averaged_and_what_is_loaded_says_what_peft_does(
    name, run, at, trained, tmp_path
):
    from peft import PeftModel

    folder = trained(name)
    wanted = recipe(
        name, at, f"start={folder}", "run.steps=2", "lora={rank: 2, alpha: 4}", "optimizer.lr=0.05"
    )
    train(wanted, run, tmp_path / "out", device="cpu", monitor=Notes)

    buffers = {name for name, _ in load_trained(folder, None, "cpu").network.named_buffers()}

    def adapters(keys):
        return all(".lora_" in key for key in keys if not key.endswith(tuple(buffers)))

    stored = weights(tmp_path / "out", 2)
    assert {key.split("/")[0] for key in stored} == {"model", "optimizer", "ema"}
    assert adapters(stored)
    assert adapters(load_file(tmp_path / "out/model.safetensors"))
    base = load_trained(folder, None, "cpu").network
    kept = load_file(tmp_path / "out/frozen.safetensors")
    assert len(kept) == sum(1 for _ in base.parameters())
    for key, x in kept.items():
        own = key.removeprefix("diffusion/").replace(".base_layer.", ".")
        assert torch.equal(x, base.get_parameter(own))

    found = load_trained(str(tmp_path / "out"), None, "cpu")
    assert found.network.state_dict().keys() == base.state_dict().keys()  # merged
    task, loader = build(recipe(name, at, f"start={tmp_path / 'out'}"), start(run))  # and to start from
    batch = next(iter(loader))
    mine, before = said(task, batch, base)
    assert (mine - before).abs().max() > 1e-3
    torch.testing.assert_close(said(task, batch, found.network)[1], mine)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "out/adapter")).base_model.model
    torch.testing.assert_close(said(task, batch, theirs)[1], mine, atol=1e-5, rtol=1e-5)


class Killed(Notes):
    """Dies of SIGKILL once step 2 is on the disk."""

    def __init__(self, out, recipe, enabled=True):
        super().__init__(out, recipe, enabled)
        self.out = out

    def scalars(self, step, values):
        while step == 3 and not (self.out / "checkpoints/step-00000002").is_dir():
            time.sleep(0.01)
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def rank(options, at, run, out, monitor=Notes):
    wanted = recipe("sora", at, "data.micro_batches=2", "run.steps=4", *options)
    train(wanted, run, Path(out), device="cpu", monitor=monitor)


def killed_rank(*args):
    rank(*args, monitor=Killed)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_adapters_resume_bit_for_bit_on_two_ranks_and_are_those_of_one(parallel, run, at, trained, tmp_path):
    options = [
        f"start={trained('sora')}",
        "lora={rank: 2}",
        "compute.precision=fp32",
        f"compute.parallel={parallel}",
    ]
    options += ["compute.activation_checkpointing=selective"] * (parallel == "fsdp")
    assert in_ranks(2, killed_rank, options, at, run, tmp_path / "parts") == [-signal.SIGKILL] * 2
    for ranks, name in ((2, "whole"), (2, "parts"), (1, "one")):
        assert in_ranks(ranks, rank, options, at, run, tmp_path / name) == [0] * ranks
    a, b, one = (weights(tmp_path / name, 4) for name in ("whole", "parts", "one"))
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    for key in a:
        torch.testing.assert_close(a[key], one[key], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["start=null"], "lora adapts a network that was trained: name the folder of one in start"),
        (["lora={targets: [qvk]}"], r"no linear layer's name ends in 'qvk' \(did you mean"),
        (
            ["tasks={first_frame: 1}"],
            "adapters alone, which cannot learn denoiser.*: start .* without it; turn off",
        ),
    ],
)
def test_adapters_that_could_not_do_it_are_refused(change, says, run, at, trained):
    with pytest.raises(ValueError, match=says):
        build(recipe("toy", at, f"start={trained('toy')}", "lora={rank: 2}", *change), start(run))


# ------------------------------------------------------------ paths


@pytest.fixture
def moved(run, at, tmp_path):
    """A model and the autoencoder and text encoder beside it, moved together; and where they were."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    for name in ("image", "clip"):
        shutil.copytree(at[name], old / name)
    beside = [f"autoencoder.path={old / 'image'}", f"text.model={old / 'clip'}", "run.steps=1"]
    train(recipe("dit-xl", at, *beside), run, old / "models" / "dit", device="cpu", monitor=Notes)
    old.rename(new)
    return old, new


def drawn(folder, *options) -> int:
    return sample.main(
        [str(folder), "--prompt", "x", "--steps", "1", "--out", "out", "--device", "cpu", *options]
    )


def test_a_model_moved_with_what_it_needs_is_sampled_from_any_folder(moved, tmp_path, monkeypatch):
    """And goes on being trained, and is started from, from there."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert drawn(Path("../new/models/dit")) == 0
    found = load_trained("../new/models/dit", None, "cpu").recipe
    assert found.autoencoder.path == str(moved[1] / "image")
    assert found.text.model == str(moved[1] / "clip")


def test_paths_that_are_still_there_come_first(moved, at):
    old, new = moved
    old.mkdir()
    shutil.copytree(at["image"], old / "image")
    found = load_trained(str(new / "models/dit"), None, "cpu").recipe
    assert found.autoencoder.path == str(old / "image")
    assert found.text.model == str(new / "clip")


def test_what_is_lost_is_named_with_what_gives_it_anew(moved, at, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(moved[1] / "image")
    assert drawn("new/models/dit") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"autoencoder.path {moved[0] / 'image'}, which it was trained with, is not there" in told
    assert (
        f"nor at {moved[1] / 'image'}: bring it back, or say where it is, --locate autoencoder.path=" in told
    )
    assert drawn("new/models/dit", "--locate", f"autoencoder.path={at['image']}") == 0
    assert drawn("new/models/dit", "--replace", "--locate", "vae=x") == 2
    assert (
        "--locate vae=x: give autoencoder.path=PATH, text.model=PATH, model.spatial=PATH"
        in capsys.readouterr().err
    )
    assert drawn("new/models/dit", "--replace", "--locate", "text.model=lost") == 2
    assert "--locate text.model=lost: lost is not there" in capsys.readouterr().err


def test_a_model_is_sampled_with_the_encoders_that_it_was_trained_with_alone(
    moved, at, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(moved[1] / "clip")
    assert drawn("new/models/dit", "--locate", f"text.model={at['t5']}") == 2
    told = capsys.readouterr().err
    assert "new/models/dit was trained with other weights of its text than " in told
    assert told.endswith(f"{at['t5']} holds: say where those are, --locate text.model\n")


def test_two_models_latents_are_alike_wherever_their_autoencoders_lie(moved, at):
    folder = str(moved[1] / "models/dit")
    one, other = (
        load_trained(folder, None, "cpu", located) for located in ({}, {"autoencoder.path": at["image"]})
    )
    assert one.recipe.autoencoder != other.recipe.autoencoder
    assert latents_of(one) == latents_of(other)


def test_an_export_without_its_averages_gives_its_last_weights(moved):
    folder = moved[1] / "models/dit"
    assert load_trained(str(folder), None, "cpu").ema == 0.1
    shutil.rmtree(folder / "ema")
    found = load_trained(str(folder), None, "cpu")
    assert found.ema == 0
    last = load_file(folder / "model.safetensors")
    assert all(torch.equal(x, last[f"diffusion/{name}"]) for name, x in found.network.named_parameters())


def test_where_a_part_lies_is_no_other_training_but_whether_there_is_one_is():
    a = {"start": "a", "autoencoder": {"path": "x", "keep": 1}, "data": {"cache": None}}
    assert difference(a, a | {"start": None}) is None
    assert difference(a, a | {"autoencoder": {"path": "y", "keep": 1}}) is None
    assert difference(a, a | {"autoencoder": {"path": "x", "keep": 2}}) == ("autoencoder.keep", 1, 2)
    assert difference(a, a | {"data": {"cache": "c"}}) == ("data.cache", None, "c")

    def mixed(*parts):
        return {"data": {"mixture": [dict(zip(("data", "share", "cache"), x, strict=True)) for x in parts]}}

    b = mixed(("a", 0.3, "c"))
    assert difference(b, mixed(("moved", 0.3, "d"))) is None
    assert difference(b, mixed(("a", 0.4, "c"))) == ("data.mixture.0.share", 0.3, 0.4)
    assert difference(b, mixed(("a", 0.3, None))) == ("data.mixture.0.cache", "c", None)
    assert difference(b, mixed(("a", 0.3, "c"), ("b", 0.1, "c")))[0] == "data.mixture.1"


def test_an_adapters_folder_says_what_it_is(run, at, trained, tmp_path):
    wanted = recipe("small", at, f"start={trained('small')}", "run.steps=1", "lora={targets: [qkv]}")
    train(wanted, run, tmp_path, device="cpu", monitor=Notes)
    told = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert told["peft_type"] == "LORA"
    assert (told["r"], told["lora_alpha"]) == (16, 16)
    assert all(name.endswith(".qkv") for name in told["target_modules"])
    with pytest.raises(CheckpointError, match="holds no model"):
        load_trained(str(tmp_path / "adapter"), None, "cpu")
