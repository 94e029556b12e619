"""The diffusion task: each thing it draws, knows, drops and measures, against the same made by hand."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jobs.training.data.loader import positions_of
from jobs.training.data.pixels import to_unit
from jobs.training.diffusion.build import build_network, build_process, load_system, load_trained
from jobs.training.diffusion.network import Network
from jobs.training.diffusion.recipe import DiffusionRecipe, Tasks
from jobs.training.diffusion.task import LOW_NOISE, build, images_of, known_frames, mean_over_frames
from jobs.training.exported import load_model
from jobs.training.loop import train
from jobs.training.recipe import load_training
from jobs.training.task import Draws
from models.autoencoders import vae
from models.autoencoders.latents import BlockDCT
from models.diffusion.objective import prediction_error
from tests.fixtures.run_folder import make_sharded_run
from tests.fixtures.toy_training import start

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusion") / "run"
    return make_sharded_run(folder, sources=4)


def recipe(**sections) -> DiffusionRecipe:
    buckets = [{"frames": 4, "height": 32, "width": 32}]
    return DiffusionRecipe.model_validate(
        {
            "name": "t",
            "data": {"fps": 4, "buckets": buckets, "batch": 3, "workers": 0} | sections.pop("data", {}),
            "autoencoder": {"kind": "dct", "patch": 8, "keep": 3},
            "text": {"kind": "words", "length": 16, "width": 16, "depth": 1} | sections.pop("text", {}),
            "model": {"kind": "dit", "dim": 32, "depth": 1, "heads": 2},
        }
        | sections
    )


def stirred(network: Network) -> Network:
    """With all parameters away from 0: an untrained network says 0 whatever it is given."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return network


def first(loader):
    return next(iter(loader))


# ------------------------------------------------------------ latents


def test_the_normaliser_has_numpys_statistics_of_the_latents(run):
    task, loader = build(recipe(), start(run))
    videos = [loader.batch(n)["video"] for n in range(loader.epoch_length)]
    z = BlockDCT(8, 3).encode(torch.cat(videos).float() / 127.5 - 1).mean.double().numpy()
    by_channel = np.moveaxis(z, 1, 0).reshape(z.shape[1], -1)
    np.testing.assert_allclose(task.system.normalizer.mean, by_channel.mean(1), atol=1e-6)
    np.testing.assert_allclose(task.system.normalizer.std, by_channel.std(1), rtol=1e-5)
    x = torch.cat([task.latents(loader.batch(n), Draws(0, n, CPU)) for n in range(loader.epoch_length)])
    torch.testing.assert_close(
        x.movedim(1, 0).flatten(1).std(1, correction=0), torch.ones(9), atol=1e-4, rtol=0
    )


def test_the_normaliser_belongs_to_the_run_and_is_not_measured_again(run, tmp_path):
    """Another folder of as many clips does not change it, nor does a resumed start."""
    train(recipe(run={"steps": 1, "sample_every": 0}), run, tmp_path, monitor=Told, device="cpu")
    kept = load_trained(str(tmp_path), None, "cpu").normalizer
    state = {"normalizer": {"mean": (kept.mean + 1).tolist(), "std": kept.std.tolist()}}
    again = build(recipe(), start(run, saved=state))[0].system.normalizer
    assert torch.equal(again.mean, kept.mean + 1)


def test_all_ranks_normalise_alike(run):
    found = [build(recipe(), start(run, rank, 2))[0].system.normalizer for rank in range(2)]
    assert torch.equal(found[0].std, found[1].std)


@pytest.mark.parametrize(
    "model",
    [
        {"kind": "dit", "dim": 32, "depth": 2, "heads": 2, "attention": "factorised"},
        {"kind": "dit", "dim": 32, "depth": 2, "heads": 2},
        {"kind": "unet3d", "width": 16, "multipliers": [1, 2], "depth": 1, "head_dim": 8},
    ],
    ids=["dit-factorised", "dit-full", "unet3d"],
)
def test_images_beside_clips_train_as_if_appended_in_time_and_masked(run, model):
    """Ho et al. 2022, sec. 3.1: one pass over T + n frames, whose loss is their mean."""
    task, loader = build(recipe(data={"images": 2}, model=model), start(run))
    batch, draws = first(loader), Draws(0, 0, CPU)
    network, process = stirred(task.system.network).eval(), task.system.process
    got = task.loss("diffusion", network, batch, draws)
    assert task.tokens(batch) == 3 * 6 * 16
    assert (len(got.each), len(got.levels), len(got.errors)) == (3, 9, 9)

    images = images_of(batch)
    assert len(images["key"]) == 6
    of_clips, of_images = task.question(batch, draws), task.question(images, replace(draws, part=1))
    for question, videos in zip((of_clips, of_images), (batch["video"], images["video"]), strict=True):
        encoded = BlockDCT(8, 3).encode(to_unit(videos)).mean
        torch.testing.assert_close(question.x, task.system.normalizer(encoded))
    # with the clip's caption and level for its images, both ways ask the network the same
    x, t, noise, told = of_clips.x, of_clips.t, of_clips.noise, of_clips.condition
    x_images, noise_images = of_images.x, of_images.noise
    text, mask = network.read(batch["caption"])
    told = replace(told, text=text, text_mask=mask)
    again = replace(told, text=text.repeat_interleave(2, 0), text_mask=mask.repeat_interleave(2, 0))
    twice = t.repeat_interleave(2)
    apart = [
        prediction_error(network.denoiser, process, x, t, noise, told),
        prediction_error(network.denoiser, process, x_images, twice, noise_images, again),
    ]

    def joined(clips, images):
        return torch.cat([clips, images.unflatten(0, (3, 2)).squeeze(3).transpose(1, 2)], dim=2)

    whole = prediction_error(
        network.denoiser,
        process,
        joined(x, x_images),
        t,
        joined(noise, noise_images),
        replace(told, images=2),
    )
    torch.testing.assert_close(mean_over_frames(apart, [4, 1]).sum(), whole.sum())


def test_each_image_has_the_caption_and_the_noise_of_its_own(run):
    task, loader = build(recipe(data={"images": 2}), start(run))
    batch, read = first(loader), []
    task.system.network.text.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    losses = task.loss("diffusion", task.system.network, batch, Draws(0, 0, CPU))
    assert read == [batch["caption"], batch["image_caption"]]
    assert len(set(losses.levels.tolist())) == 9


# ------------------------------------------------------------ what is known


def test_prediction_knows_one_to_context_frames_each_as_often():
    every = torch.linspace(0, 0.999, 1000)
    for most, frames, counts in ((4, 8, [250] * 4), (2, 8, [500] * 2), (4, 3, [250, 750]), (1, 2, [1000])):
        known = known_frames(Tasks(prediction=1.0, context=most), frames, torch.zeros(1000), every)
        told = known.sum(1)
        assert torch.bincount(told).tolist() == [0, *counts]
        assert all(row[:n].all() for row, n in zip(known, told, strict=True))


def test_known_frames_are_those_of_the_task():
    tasks = Tasks(first_frame=0.25, prediction=0.25, interpolation=0.25, stride=3)
    kind, more = torch.tensor([0.1, 0.3, 0.3, 0.6, 0.9]), torch.tensor([0.0, 0.1, 0.9, 0.0, 0.0])
    found = known_frames(tasks, 7, kind, more).int().tolist()
    assert found == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 1],
        [0, 0, 0, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize("frames", [1, 2, 3, 8])
def test_something_is_always_left_to_predict_and_chances_are_the_recipes(frames):
    tasks = Tasks(first_frame=0.1, prediction=0.3, interpolation=0.4)
    kind, more = torch.rand(2, 4000, generator=torch.Generator().manual_seed(0))
    known = known_frames(tasks, frames, kind, more)
    assert not known.all(1).any()
    assert abs(known.any(1).float().mean() - (0.8 if frames > 1 else 0)) < 0.03


def test_under_a_causal_autoencoder_key_frames_are_told_by_the_latents_they_have_alone(run):
    """And are still to be found there, but for the first: a latent joins a key frame with those before it."""
    tasks = {"interpolation": 0.5, "prediction": 0.5, "stride": 2}
    data = {"buckets": [{"frames": 9, "height": 32, "width": 32}], "batch": 8}
    task, loader = build(recipe(tasks=tasks, data=data), start(run))
    torch.manual_seed(0)
    sizes = {"stride": (2, 8, 8), "width": 8, "multipliers": (1, 1, 1, 1), "depth": 1}
    task.system.autoencoder = vae.build(9, **sizes).requires_grad_(False).eval()
    batch, draws = first(loader), Draws(0, 3, CPU)
    x = task.latents(batch, draws)
    assert x.shape[2] == 5
    condition = task.condition(x, batch, draws)
    places = [row.nonzero().flatten().tolist() for row in condition.known_mask[:, 0, :, 0, 0]]
    assert [0, 2, 4] in places
    assert any(p in ([0], [0, 1]) for p in places)
    for i, known in enumerate(places):
        between = known == [0, 2, 4]
        assert condition.held[i, 0, :, 0, 0].nonzero().flatten().tolist() == ([0] if between else known)
        for place in known:
            frame = to_unit(batch["video"][i : i + 1, :, 2 * place : 2 * place + 1])
            alone = task.system.mean(frame)[0, :, 0]
            expected = alone if between and place else x[i, :, place]
            torch.testing.assert_close(condition.known[i, :, place], expected, atol=1e-4, rtol=1e-3)


def test_known_frames_reach_the_network_clean_and_images_are_never_known(run):
    tasks = {"first_frame": 0.5, "prediction": 0.5}
    task, loader = build(recipe(tasks=tasks, data={"images": 1}), start(run))
    batch = first(loader)
    x = task.latents(batch, Draws(0, 0, CPU))
    told = task.condition(x, batch, Draws(0, 0, CPU))
    assert told.known_mask.shape == (3, 1, 4, 1, 1)
    assert told.known_mask[:, :, 0].all()
    assert torch.equal(told.known, x * told.known_mask)
    images = images_of(batch)
    x = task.latents(images, Draws(0, 0, CPU))
    assert not task.condition(x, images, Draws(0, 0, CPU)).known_mask.any()


def test_super_resolution_is_told_the_blurred_clip_with_noise_of_its_level(run):
    task, loader = build(recipe(tasks={"upsampling": 4}), start(run))
    batch, draws = first(loader), Draws(0, 5, CPU)
    told = task.condition(task.latents(batch, draws), batch, draws)
    video = to_unit(batch["video"]).flatten(0, 1)  # B·3 T H W
    small = F.interpolate(video, scale_factor=0.25, mode="area")
    large = F.interpolate(small, scale_factor=4, mode="bilinear", align_corners=False).unflatten(0, (3, 3))
    clean = task.system.normalizer(BlockDCT(8, 3).encode(large).mean)
    angle = told.low_level[:, None, None, None, None] * torch.pi / 2
    noise = (told.low - angle.cos() * clean) / angle.sin()
    assert 0 < told.low_level.min() < told.low_level.max() < LOW_NOISE
    assert abs(noise.mean()) < 0.06
    assert abs(noise.std() - 1) < 0.06


# ------------------------------------------------------------ text


def test_captions_are_left_out_as_often_as_the_recipe_says_and_wholly(run):
    task, loader = build(recipe(text={"dropout": 0.3}), start(run))
    seen = []
    network = task.system.network
    network.denoiser.register_forward_pre_hook(lambda _, args: seen.append(args[2].text_mask))
    batch = first(loader)
    for micro in range(40):
        task.loss("diffusion", network, batch, Draws(0, micro, CPU))
    masks = torch.cat(seen)
    rows = masks.any(1)
    assert abs((~rows).float().mean() - 0.3) < 0.1  # of 120
    _, full = network(Network.read, batch["caption"])
    assert torch.equal(masks[rows], full.repeat(40, 1)[rows])


def test_what_is_frozen_gets_no_gradient_and_all_else_does(run, tmp_path):
    from tests.models.encoders.test_text import _save

    text = {"kind": "transformers", "model": _save(tmp_path / "t5", "t5"), "length": 24, "dropout": 0.5}
    for options in ({"text": text}, {"objective": {"weighting": "uncertainty"}, "text": {"dropout": 0.5}}):
        task, loader = build(recipe(**options), start(run))
        phase = task.phases[0]
        stirred(phase.module)
        for micro in range(3):
            task.loss("diffusion", phase.module, first(loader), Draws(0, micro, CPU)).sums["clips"].backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in phase.module.parameters())
        trained = {id(p) for group in phase.optimizer.param_groups for p in group["params"]}
        assert trained == {id(p) for p in phase.module.parameters()}
        if task.system.text is not None:
            assert not any(p.requires_grad or p.grad is not None for p in task.system.text.parameters())
            assert not trained & {id(p) for p in task.system.text.parameters()}


# ------------------------------------------------------------ the loss


def test_so_many_samples_as_the_recipe_says_are_pure_noise_and_the_others_are_spread_as_ever(run):
    task, loader = build(recipe(objective={"pure_noise": 0.4}), start(run))
    batch, network = first(loader), task.system.network
    found = [task.loss("diffusion", network, batch, Draws(0, micro, CPU)).levels for micro in range(100)]
    angle = torch.cat(found) * torch.pi / 2
    t = angle.sin() / (angle.sin() + angle.cos())  # of rectified flow
    pure = t > 1 - 1e-6
    assert abs(pure.float().mean() - 0.4) < 0.1  # of 300
    quantiles = torch.quantile(t[~pure], torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quantiles, torch.tensor([0.25, 0.5, 0.75]), atol=0.12, rtol=0)


@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
def test_the_loss_is_the_formula(run, weighting):
    """Rectified flow, E‖v̂ − (ε − x)‖² of each sample; min-SNR-γ: times min(SNR, γ) · σ² of x̂'s error."""
    task, loader = build(recipe(objective={"weighting": weighting}, text={"dropout": 0}), start(run))
    network, batch, draws = stirred(task.system.network), first(loader), Draws(3, 7, CPU)
    losses = task.loss("diffusion", network, batch, draws)
    x = task.latents(batch, draws)
    t, noise = draws.uniform(3), draws.normal(x)
    z = x + t[:, None, None, None, None] * (noise - x)
    said = network(
        Network.predict, z, torch.atan2(t, 1 - t) * 2 / torch.pi, task.system.condition(batch["caption"])
    )
    error = ((said - (noise - x)) ** 2).mean((1, 2, 3, 4))
    torch.testing.assert_close(losses.errors, error.detach())
    weight = torch.minimum((1 - t) ** 2 / t**2, torch.tensor(5.0)) * t**2 if weighting == "min_snr" else 1
    torch.testing.assert_close(losses.sums["clips"], (weight * error).sum())
    assert len(losses.each) == 3
    torch.testing.assert_close(losses.levels, torch.atan2(t, 1 - t) * 2 / torch.pi)


def test_two_ranks_train_as_one_that_accumulates(run):
    alone, loader = build(recipe(), start(run))
    network = stirred(alone.system.network)
    one = [
        alone.loss("diffusion", network, batch, Draws(0, m, CPU)).sums["clips"]
        for m, batch in enumerate(itertools.islice(loader, 4))
    ]
    for rank in range(2):
        task, mine = build(recipe(), start(run, rank, 2))
        for m, batch in enumerate(itertools.islice(mine, 2)):
            found = task.loss("diffusion", network, batch, Draws(0, 2 * m + rank, CPU)).sums["clips"]
            assert torch.equal(found, one[2 * m + rank])


def test_shift_of_the_cosine_schedule_divides_the_snr_by_its_square():
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    objective = recipe(objective={"schedule": "cosine", "prediction": "v", "shift": 3}).objective
    plain = recipe(objective={"schedule": "cosine", "prediction": "v"}).objective
    (a, s), (a0, s0) = build_process(objective).schedule(t), build_process(plain).schedule(t)
    torch.testing.assert_close((a / s) ** 2, (a0 / s0) ** 2 / 9)


# ------------------------------------------------------------ using it


def test_the_state_and_the_weights_bring_the_system_back(run):
    task, _ = build(recipe(run={"steps": 1, "sample_steps": 2, "prompts": ["a", "b"]}), start(run))
    stirred(task.system.network)
    again = load_system(task.recipe, task.state(), CPU)
    again.network.load_state_dict(task.system.network.state_dict())
    shape = task.system.shape(2)
    drawn = [s.draw(seed=1)(shape, s.condition(["a", "b"])) for s in (task.system, again)]
    assert torch.equal(*drawn)
    assert torch.equal(task.system.decode(drawn[0]), again.decode(drawn[1]))


@pytest.mark.parametrize("tasks", [{}, {"upsampling": 2}])
def test_samples_are_videos_of_the_prompts(run, tasks):
    task, loader = build(recipe(tasks=tasks, run={"sample_steps": 2}), start(run))
    found = task.evaluate(task.system.network, 1).videos
    captions = loader.batch(0)["caption"]
    assert all(name.startswith(c) for name, c in zip(found, captions, strict=True))
    assert all(v.shape == (4, 32, 32, 3) and v.dtype == torch.uint8 for v in found.values())


def test_blocks_are_the_denoisers(run):
    task, _ = build(recipe(model={"kind": "dit", "dim": 32, "depth": 3, "heads": 2}), start(run))
    assert list(task.blocks(task.system.network)) == list(task.system.network.denoiser.blocks)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"autoencoder": {"kind": "diffusers"}}, "needs autoencoder.path"),
        ({"text": {"kind": "transformers"}}, "needs text.model"),
        ({"text": {"kind": "transformers", "model": "./nothing"}}, "no such folder"),
        ({"objective": {"schedule": "linear", "shift": 2}}, "schedule linear has none"),
        ({"tasks": {"upsampling": 5}}, "does not divide"),
        ({"tasks": {"upsampling": 2}, "data": {"cache": "x"}}, "leave data.cache out"),
        ({"model": {"kind": "video_ldm", "preset": "small"}, "tasks": {"upsampling": 2}}, "cannot be given"),
    ],
)
def test_what_does_not_fit_is_one_sentence(run, sections, says):
    with pytest.raises(ValueError, match=says):
        build(recipe(**sections), start(run))


# ------------------------------------------------------------ bundled recipes

AUTOENCODERS = {
    "small": BlockDCT(8, 8),
    "unet3d": BlockDCT(1, 1),
    "dit-xl": SimpleNamespace(channels=4, stride=(1, 8, 8), causal=False),
    "video_ldm": SimpleNamespace(channels=4, stride=(1, 8, 8), causal=False),
    "sora": SimpleNamespace(channels=16, stride=(4, 8, 8), causal=True),
}


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_a_bundled_recipe_fits_together(name):
    wanted, autoencoder = load_training(name), AUTOENCODERS[name]
    positions = positions_of(wanted, autoencoder)
    if wanted.data.batch is None:
        held = [wanted.data.tokens // p * p for p in positions]
        assert min(held) > 0.75 * max(held)
    with torch.device("meta"):
        network = build_network(wanted, autoencoder.channels, SimpleNamespace(width=768))
    assert sum(1 for _ in network.denoiser.parameters()) > 0


# ------------------------------------------------------------ while training


class Told:
    """A monitor that remembers."""

    def __init__(self, *args, **options):
        self.scalars_at: list = []
        Told.newest = self

    def evaluation(self, step, found):
        self.scalars_at.append((step, found.scalars))

    def __getattr__(self, name):
        return lambda *args: None


def test_distances_to_real_videos_are_measured_while_it_trains_and_do_not_disturb_it(run, tmp_path):
    """Twice the same numbers, the reference kept, the model that an unwatched run gives."""
    found, weights = [], []
    for name, n in {"watched": 3, "again": 3, "unwatched": 0}.items():
        run_ = {
            "steps": 2,
            "save_every": 2,
            "sample_every": 1,
            "log_every": 1,
            "sample_steps": 2,
            "frechet": n,
        }
        train(recipe(run=run_), run, tmp_path / name, monitor=Told, device="cpu")
        distances = [
            (s, f["frechet/efficientnet-lite0"])
            for s, f in Told.newest.scalars_at
            if "frechet/efficientnet-lite0" in f
        ]
        found.append(distances)
        weights.append(load_model(tmp_path / name).weights["diffusion"])
    assert [step for step, _ in found[0]] == [1, 2]
    assert found[0] == found[1]
    assert found[2] == []
    assert all(np.isfinite(d) and d > 0 for _, d in found[0])
    assert list((tmp_path / "watched" / "reference").iterdir())
    for other in weights[1:]:
        assert all(torch.equal(weights[0][k], other[k]) for k in other)
