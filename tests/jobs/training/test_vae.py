"""Training an autoencoder: what each phase learns from, when the discriminator begins, and the whole on shards."""

import copy

import pytest
import torch
from pydantic import ValidationError

from jobs.training.recipe import TRAINING, load_training
from jobs.training.task import Draws
from jobs.training.vae import task as training
from jobs.training.vae.recipe import VAELoss, VAERecipe
from jobs.training.vae.task import AutoencoderTask
from models.autoencoders.latents import BlockDCT
from models.measures.quality import psnr, ssim
from pipeline.recipe_file import parse_as
from tests.fixtures.run_folder import make_sharded_run
from tests.fixtures.toy_training import start

MODEL = {"kind": "vae", "stride": [2, 4, 4], "width": 8, "multipliers": [1, 2, 2], "depth": 1}
CPU = torch.device("cpu")
DATA = {"fps": 8, "buckets": [{"frames": 5, "height": 32, "width": 32}], "batch": 2, "workers": 0}


def recipe(**sections) -> VAERecipe:
    plain = {"name": "test", "trains": "vae", "model": MODEL, "data": DATA, "optimizer": {"lr": 1e-3}}
    return parse_as(VAERecipe, plain | sections, [], "test")


def task(wanted: VAELoss, **sections) -> AutoencoderTask:
    return AutoencoderTask(recipe(**sections).model_copy(update={"vae": wanted}), CPU)


def wants(**fields) -> VAELoss:
    start = {"channels": 4, "perceptual": "none", "discriminator_width": 8, "adversarial_start": 0}
    return VAELoss(**(start | fields))


def batch(seed: int = 0, size: int = 2) -> dict:
    pixels = torch.randint(0, 256, (size, 3, 5, 32, 32), generator=torch.Generator().manual_seed(seed))
    return {"key": ["a"] * size, "video": pixels.to(torch.uint8)}


def gradients(module) -> list:
    return [p.grad for p in module.parameters()]


def test_the_loss_is_the_sum_of_its_parts():
    made = task(wants(kl=1.0, perceptual="efficientnet_lite0", perceptual_weight=0.5, adversarial=0))
    draws = Draws(0, 0, CPU)
    losses = made.loss("vae", made.vae, batch(), draws)
    video = batch()["video"].float() / 127.5 - 1
    posterior = made.vae.encode(video)
    seen = made.vae.decode(posterior.sample(draws.normal(posterior.mean)))
    standard = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(posterior.mean, (posterior.logvar / 2).exp()), standard
    )
    expected = (seen - video).abs().mean() + 0.5 * made.perceptual(seen, video).mean()
    expected = expected + kl.sum() / video.numel()
    assert len(losses.each) == 2
    torch.testing.assert_close(losses.sums["clips"] / 2, expected, rtol=1e-5, atol=0)
    error = (seen.clamp(-1, 1) - video).square().mean(dim=(1, 3, 4))
    torch.testing.assert_close(losses.report["psnr"].sum / 2, (10 * torch.log10(4 / error)).mean())


def test_the_discriminators_pull_on_the_last_layer_is_the_reconstructions_times_its_weight():
    made, draws = task(wants(kl=0.0, adversarial=0.25)), Draws(0, 0, CPU)
    with_it = made.loss("vae", made.vae, batch(), draws)
    layer = made.vae.last_layer
    (whole,) = torch.autograd.grad(with_it.sums["clips"], layer)
    alone = task(wants(kl=0.0, adversarial=0))
    (fit,) = torch.autograd.grad(
        alone.loss("vae", alone.vae, batch(), draws).sums["clips"], alone.vae.last_layer
    )
    # the decoder sees L1 and, from the discriminator, a gradient of a quarter of its length
    torch.testing.assert_close((whole - fit).norm(), 0.25 * fit.norm(), rtol=1e-3, atol=0)
    # its direction is the discriminator's own
    video = batch()["video"].float() / 127.5 - 1
    noise = draws.normal(made.vae.encode(video).mean)
    logits = made.discriminator(made.vae(video, noise)[0])
    (push,) = torch.autograd.grad(-logits.flatten(1).mean(1).sum(), layer)
    torch.testing.assert_close(
        torch.cosine_similarity((whole - fit).flatten(), push.flatten(), 0).item(), 1.0
    )
    torch.testing.assert_close(with_it.report["adversarial"].sum, -logits.flatten(1).mean(1).sum().detach())


def test_each_phase_leaves_the_others_gradients_alone():
    made, draws = task(wants()), Draws(0, 0, CPU)
    assert [(p.name, p.ema) for p in made.phases] == [("vae", True), ("discriminator", False)]
    made.loss("vae", made.vae, batch(), draws).sums["clips"].backward()
    assert all(g is not None for g in gradients(made.vae))
    assert all(g is None for g in gradients(made.discriminator))
    made.vae.zero_grad()
    made.loss("discriminator", made.discriminator, batch(), draws).sums["clips"].backward()
    assert all(g is None for g in gradients(made.vae))
    assert all(g is not None for g in gradients(made.discriminator))


@pytest.mark.parametrize("micro_batches", [1, 2, 6])
def test_the_discriminator_begins_at_its_step_however_many_micro_batches_make_one(micro_batches):
    made = task(wants(adversarial_start=2), data=DATA | {"micro_batches": micro_batches})
    begins = 2 * micro_batches
    for micro, judges in ((0, False), (begins - 1, False), (begins, True)):
        draws = Draws(0, micro, CPU)
        assert ("adversarial" in made.loss("vae", made.vae, batch(), draws).report) == judges
        learns = made.loss("discriminator", made.discriminator, batch(), draws).sums["clips"]
        assert learns.requires_grad == judges


def test_a_sample_weighs_the_same_in_any_micro_batch():
    made, both = task(wants(adversarial=0)), batch(size=2)
    whole = made.loss("vae", made.vae, both, Draws(0, 0, CPU)).report
    parts = [
        made.loss("vae", made.vae, {"video": both["video"][i : i + 1]}, Draws(0, 0, CPU)).report
        for i in range(2)
    ]
    apart = parts[0]["psnr"].sum + parts[1]["psnr"].sum
    torch.testing.assert_close(whole["psnr"].sum, apart, atol=0.1, rtol=0)


def test_training_the_decoder_leaves_the_encoder_out():
    wide = MODEL | {"stride": [1, 4, 4], "temporal_decoder": True}
    made = task(wants(train="decoder"), model=wide)
    trained = {id(p) for g in made.phases[0].optimizer.param_groups for p in g["params"]}
    assert trained == {id(p) for p in made.vae.decoder.parameters()}
    made.loss("vae", made.vae, batch(), Draws(0, 0, CPU)).sums["clips"].backward()
    assert all(g is None for g in gradients(made.vae.encoder))
    assert all(g is not None for g in gradients(made.vae.decoder))


def test_some_steps_of_both_phases_reconstruct_better_and_tell_apart():
    made, clips = task(wants(adversarial=0.1, adversarial_start=8)), batch()
    clips["video"] = torch.nn.functional.avg_pool3d(clips["video"].float(), 5, 1, 2).to(torch.uint8)
    l1: list[float] = []
    told_apart: list[float] = []
    for step in range(16):
        for phase in made.phases:
            phase.optimizer.zero_grad()
            losses = made.loss(phase.name, phase.module, clips, Draws(0, step, CPU))
            if losses.sums["clips"].requires_grad:
                (losses.sums["clips"] / len(losses.each)).backward()
                phase.optimizer.step()
            if phase.name == "vae":
                l1.append(losses.report["l1"].sum.item() / losses.report["l1"].parts)
            else:
                told_apart.append(losses.sums["clips"].item())
    assert l1[-1] < 0.8 * l1[0]
    assert told_apart[:8] == [0.0] * 8
    assert told_apart[-1] < told_apart[8]


def test_blocks_are_found_under_a_wrapper_too():
    made = task(wants())

    class Wrapped(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    for module in (made.vae, made.discriminator):
        assert list(made.blocks(Wrapped(module))) == list(made.blocks(module)) != []


# ---------------------------------------------------------------- on shards


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a few clips, sharded."""

    folder = tmp_path_factory.mktemp("run")
    return make_sharded_run(folder)


def test_built_on_shards_it_trains_and_shows_original_beside_reconstruction(run):
    made, loader = training.build(recipe(), start(run))
    clips = next(iter(loader))
    assert clips["video"].shape == (2, 3, 5, 32, 32)
    assert made.tokens(clips) == 2 * 3 * 8 * 8
    losses = made.loss("vae", made.vae, clips, Draws(0, 0, CPU))
    losses.sums["clips"].backward()
    assert torch.isfinite(losses.sums["clips"])
    shown = made.evaluate(made.vae, 0).videos
    assert len(shown) == 2
    for clip, pair in zip(made.shown, shown.values(), strict=True):
        assert pair.shape == (5, 32, 64, 3)
        assert pair.dtype == torch.uint8
        assert torch.equal(pair[:, :, :32], clip.permute(1, 2, 3, 0))
    _, again = training.build(recipe(), start(run))
    assert next(iter(again))["key"] == clips["key"]


def test_the_state_rebuilds_the_autoencoder(run, tmp_path):
    made = task(wants())
    torch.save(made.state(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = training.vae.build(**state["vae"])
    other.load_state_dict(copy.deepcopy(made.vae.state_dict()))
    video = torch.rand(1, 3, 3, 16, 16)
    assert torch.equal(other.encode(video).mean, made.vae.encode(video).mean)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"buckets": [{"frames": 4, "height": 32, "width": 32}]}}, "give 1 \\+ a multiple of 2"),
        ({"model": {"kind": "dit"}}, "needs model.kind vae"),
    ],
)
def test_what_does_not_fit_is_said_before_training(run, sections, said):
    with pytest.raises(ValueError, match=said):
        training.build(recipe(**sections), start(run))


def test_the_sections_fields_are_checked():
    with pytest.raises(ValidationError):
        VAELoss(perceptual="resnet")
    with pytest.raises(ValidationError):
        VAELoss(kll=1e-6)


def test_the_bundled_recipe_fits_its_buckets():
    bundled = load_training("vae")
    assert (TRAINING / "vae.yaml").is_file()
    made = AutoencoderTask(bundled.model_copy(update={"vae": wants()}), CPU)
    for bucket in bundled.data.buckets:
        training.latent_shape(made.vae, bucket.frames, bucket.height, bucket.width)


def test_held_out_clips_are_not_trained_on_and_measured_beside_the_block_dct_of_as_many_numbers(run):
    model = {"kind": "vae", "stride": [2, 4, 4], "width": 8, "multipliers": [1], "depth": 1, "dct": True}
    wanted = recipe(held_out=0.3, model=model)
    made, loader = training.build(wanted, start(str(run)))
    trained, held = ({*reader.keys} for reader in (loader.readers[0], made.held_out))
    assert held
    assert not trained & held
    scalars = made.evaluate(made.vae.eval(), 0).scalars
    clips = [made.held_out.read(row)["video"] for row in range(len(held))]
    for name, autoencoder in (("", made.vae), ("/dct", BlockDCT(8, 11))):
        found = []
        for clip in clips:
            video = torch.from_numpy(clip)[None] / 127.5 - 1
            with torch.no_grad():
                again = autoencoder.decode(autoencoder.encode(video).mean).clamp(-1, 1)
            found.append([float(x.mean()) for x in (psnr(again, video), ssim(again, video))])
        told = [scalars[f"held_out/{measure}{name}"] for measure in ("psnr", "ssim")]
        assert told == pytest.approx(torch.tensor(found).mean(0).tolist(), rel=1e-4)
