"""From a recipe to samples: every option of sampling is reached, and times follow the shape."""

import math

import diffusers
import pytest
import torch
from pydantic import ValidationError

from jobs.training.diffusion.build import build_system
from jobs.training.diffusion.recipe import DiffusionRecipe
from tests.fixtures.shrunken import KL
from tests.jobs.training.test_diffusion import stirred

CPU = torch.device("cpu")


def recipe(**sections) -> DiffusionRecipe:
    return DiffusionRecipe.model_validate(
        {
            "name": "t",
            "data": {"buckets": [{"frames": 3, "height": 32, "width": 32}]},
            "autoencoder": {"kind": "dct", "patch": 8, "keep": 3},
            "text": {"kind": "words", "length": 16, "width": 16, "depth": 1},
            "model": {"kind": "dit", "dim": 32, "depth": 1, "heads": 2},
            "run": {"sample_steps": 4},
        }
        | sections
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"sampler": "heun"}),
        ({}, {"sample_steps": 5}),
        ({}, {"spacing": "logsnr"}),
        ({}, {"guidance": 1.0}),
        ({}, {"guidance_interval": (0.0, 0.5)}),
        ({}, {"guidance_rescale": 1.0}),
        ({"sampler": "ancestral"}, {"sampler_options": {"gamma": 1.0}}),
        ({"sampler": "ancestral"}, {"sampler_options": {"corrections": 1}}),
        ({"sampler": "predictor_corrector"}, {"sampler_options": {"gamma": 1.0}}),
        ({"sampler": "predictor_corrector"}, {"sampler_options": {"delta": 0.3}}),
        ({"sampler": "ddim"}, {"sampler_options": {"eta": 1.0}}),
    ],
    ids=str,
)
def test_every_option_of_sampling_is_reached_from_the_recipe(first, second):
    system = build_system(recipe(), CPU)
    stirred(system.network).eval()

    def drawn(**options):
        run = system.recipe.run.but(**options)
        return system.draw(run=run, seed=1)(system.shape(1), system.condition(["waves"]))

    assert torch.equal(drawn(**first), drawn(**first))
    assert (drawn(**first) - drawn(**first, **second)).abs().max() > 1e-3


def test_options_of_one_sampler_are_not_another_ones():
    run = recipe(run={"sampler": "ancestral", "sampler_options": {"gamma": 0.5}}).run
    assert run.but(sampler="heun").sampler_options == {}
    assert run.but(guidance=1).sampler_options == {"gamma": 0.5}
    with pytest.raises(ValueError, match="sampler heun has no option 'gamma': it has no options"):
        run.but(sampler="heun", sampler_options={"gamma": 0.5})


def test_the_automatic_shift_is_open_sora_2s_for_each_shape():
    """α (1, 256 tokens) = 1, α (1, 4096 tokens) = 3, linear between, times √T; in training as in sampling."""
    system = build_system(recipe(objective={"shift": "auto"}), CPU)
    u = torch.tensor([0.1, 0.5, 0.9])
    for (t, h, w), alpha in (
        ((1, 32, 32), 1.0),
        ((1, 128, 128), 3.0),
        ((9, 64, 64), 3 * (1 + 2 * 768 / 3840)),
    ):
        found = system.shifted(u, (3, 9, t, h, w))
        torch.testing.assert_close(found, alpha * u / (1 + (alpha - 1) * u))
        assert found.dtype == torch.float32
    asked = []
    system.network.predict = lambda z, level, condition: asked.append(level) or torch.zeros_like(z)
    network = lambda call, *args: system.network.predict(*args)  # noqa: E731
    run = system.recipe.run.but(sampler="euler", guidance=0.0)
    system.draw(network, run=run)(system.shape(1), system.condition(["x"], system.network))
    alpha = math.sqrt(3) * (1 + 2 * (4 - 256) / 3840)
    t = torch.tensor([1, 0.75, 0.5, 0.25])
    t = alpha * t / (1 + (alpha - 1) * t)
    torch.testing.assert_close(torch.cat(asked), system.process.level(t))


def test_a_video_is_drawn_in_a_shape_of_videos_though_pictures_of_its_very_shape_were_trained_on():
    shapes = [(1, 32, 32), (5, 32, 32), (9, 32, 48), (9, 48, 32)]
    buckets = [dict(zip(("frames", "height", "width"), shape, strict=True)) for shape in shapes]
    system = build_system(recipe(data={"buckets": buckets}), CPU)
    system.trained = [shapes[0], *shapes[2:]]  # no clip filled the square one of videos
    drawn = {aspect: system.bucket_like(aspect) for aspect in (0.5, 1.0, 2.0)}
    assert all(b.frames == 9 for b in drawn.values())
    assert (drawn[0.5].width, drawn[2.0].width) == (32, 48)
    system.trained = shapes
    assert system.bucket_like(1.0).frames == 5
    system.trained = shapes[:1]
    assert system.bucket_like(2.0).frames == 1


# ---------------------------------------------------------------- precision of what is frozen


def test_an_autoencoder_encodes_in_bf16_where_the_recipe_says_so_and_never_because_the_step_does(tmp_path):
    torch.manual_seed(0)
    diffusers.AutoencoderKL(**KL).save_pretrained(tmp_path)
    exact, rough = (
        build_system(recipe(autoencoder={"kind": "diffusers", "path": str(tmp_path), "precision": p}), CPU)
        for p in ("fp32", "bf16")
    )
    video = torch.rand(1, 3, 3, 32, 32) * 2 - 1
    mean = exact.encode(video).mean
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact.encode(video).mean, mean)
    near = rough.encode(video)
    assert near.mean.dtype == near.logvar.dtype == torch.float32
    assert 1e-4 < (near.mean - mean).square().mean().sqrt() / mean.std() < 0.03
    latents = torch.randn(rough.shape(1))
    assert torch.equal(rough.decode(latents), exact.decode(latents))
    assert rough.weights == exact.weights


def test_bf16_is_refused_where_there_is_nothing_to_gain():
    with pytest.raises(ValidationError, match="precision bf16: kind dct costs next to nothing"):
        recipe(autoencoder={"kind": "dct", "precision": "bf16"})
