"""A frozen Stable Diffusion inside Video LDM sees what it was trained on: against diffusers' own pipelines, through
the trainer's path. Tiny checkpoints of the real classes.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from jobs.training.diffusion.build import build_system
from jobs.training.diffusion.network import Question
from jobs.training.diffusion.recipe import DiffusionRecipe
from jobs.training.diffusion.task import as_published
from models.denoisers.video_ldm import timestep
from tests.fixtures.tiny_vlm import _bpe
from tests.models.autoencoders.test_published import KL
from tests.models.denoisers.test_video_ldm import STABLE_DIFFUSION

diffusers = pytest.importorskip("diffusers")

CPU = torch.device("cpu")
TEXTS = ["a red square moves", ""]
LENGTH = 12


def tokenizer(pad: str) -> PreTrainedTokenizerFast:
    special = {"eos_token": "</s>", "pad_token": pad}
    return PreTrainedTokenizerFast(
        tokenizer_object=_bpe(["<pad>", "</s>"]), model_max_length=LENGTH, **special
    )


def tower(kind: Any, words: Any, width: int) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    ids = {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "bos_token_id": None}
    return kind(CLIPTextConfig(**sizes, **ids, max_position_embeddings=LENGTH, projection_dim=10)).eval()


def pipeline(folder: Path, family: str) -> Any:
    """A pipeline of diffusers, saved."""
    torch.manual_seed(0)
    xl = family == "xl"
    config = STABLE_DIFFUSION[family] | {"cross_attention_dim": 24 if xl else 8, "norm_num_groups": 4}
    parts = {
        "unet": diffusers.UNet2DConditionModel(**config, sample_size=8).eval(),
        "vae": diffusers.AutoencoderKL(**KL, scaling_factor=0.3, shift_factor=0.2).eval(),
        "tokenizer": tokenizer("</s>"),
        "scheduler": diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction" if family == "2.x" else "epsilon",
        ),
    }
    parts["text_encoder"] = tower(CLIPTextModel, parts["tokenizer"], 8)
    if xl:
        parts["tokenizer_2"] = tokenizer("<pad>")
        parts["text_encoder_2"] = tower(CLIPTextModelWithProjection, parts["tokenizer_2"], 16)
        made = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        made = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(folder)
    return made


def recipe(folder: Path, family: str, **sections: Any) -> DiffusionRecipe:
    return DiffusionRecipe.model_validate(
        {
            "name": "t",
            "data": {"buckets": [{"frames": 3, "height": 16, "width": 24}]},
            "autoencoder": {"kind": "diffusers", "path": str(folder)},
            "text": {"kind": "diffusers", "model": str(folder), "length": LENGTH},
            "model": {"kind": "video_ldm", "spatial": str(folder), "frozen": True},
            "objective": {"schedule": "scaled_linear", "prediction": "v" if family == "2.x" else "eps"},
            "run": {"sample_steps": 2, "guidance": 3.0},
        }
        | sections
    )


def told(pipe: Any, texts: list[str], family: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of the pipeline's own `encode_prompt`; of an empty text what it takes where there is no negative prompt."""
    rows = []
    for text in texts:
        found = pipe.encode_prompt(
            prompt=text or "x", device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        text_row = found[0] if text else found[1]
        rows.append((text_row, (found[2] if text else found[3]) if family == "xl" else None))
    features = torch.cat([features for features, _ in rows])
    return features, torch.cat([pooled for _, pooled in rows]) if family == "xl" else None  # type: ignore[misc]


def asked(
    unet: Any, z: torch.Tensor, step: Any, text: torch.Tensor, pooled: torch.Tensor | None
) -> torch.Tensor:
    """The image model on every frame of z [B, C, T, h, w]."""
    sizes = (
        torch.tensor([[16, 24, 0, 0, 16, 24]] * len(z)) * 8 // 2
    )  # of latents 8 × 12 under XL's 8×8 autoencoder
    added = {"text_embeds": pooled, "time_ids": sizes} if pooled is not None else None
    frames = [unet(x, step, encoder_hidden_states=text, added_cond_kwargs=added).sample for x in z.unbind(2)]
    return torch.stack(frames, dim=2)


@pytest.mark.parametrize("family", STABLE_DIFFUSION)
@torch.no_grad()
def test_at_first_the_trainer_asks_a_frozen_image_model_what_its_own_pipeline_asks(
    family: str, tmp_path: Path
):
    """From pixels and captions to the error: latents, level, text, pooled text, and what is dropped."""
    pipe = pipeline(tmp_path, family)
    system = build_system(recipe(tmp_path, family), CPU)
    published = as_published(system)
    assert published is not None
    system.normalizer = published
    generator = torch.Generator().manual_seed(1)
    video = torch.rand(2, 3, 3, 16, 24, generator=generator) * 2 - 1

    x = system.mean(video)
    frames = video.transpose(1, 2).flatten(0, 1)
    latents = (pipe.vae.encode(frames).latent_dist.mean - 0.2) * 0.3
    torch.testing.assert_close(x, latents.unflatten(0, (2, 3)).transpose(1, 2))

    texts = ["a red square moves", "a blue circle"]
    condition, (text, pooled) = system.condition(texts), told(pipe, texts, family)
    assert condition.text is not None
    torch.testing.assert_close(condition.text, text)
    assert condition.text_mask is not None
    assert condition.text_mask.all()

    steps = torch.tensor([123, 800])
    alpha = pipe.scheduler.alphas_cumprod[steps].sqrt()
    noise = torch.randn(x.shape, generator=generator)
    z = pipe.scheduler.add_noise(x, noise, steps)
    level = torch.atan2((1 - alpha**2).sqrt(), alpha) / (torch.pi / 2)
    expected = asked(pipe.unet, z, steps, text, pooled)
    torch.testing.assert_close(system.network.predict(z, level, condition), expected, atol=2e-3, rtol=1e-3)

    t = torch.tensor([0.2, 0.7])
    dropped = torch.tensor([False, True])
    (answer,) = system.network.losses([Question(x, t, noise, condition, None, dropped)])
    text, pooled = told(pipe, [texts[0], ""], family)
    z, step = system.process.noisy(x, t, noise), timestep(system.process.level(t))
    assert (step - (1000 * t - 0.5)).abs().max() < 2  # the times of its 1000 steps
    alpha, sigma = (a.view(-1, 1, 1, 1, 1) for a in system.process.schedule(t))
    target = alpha * noise - sigma * x if family == "2.x" else noise
    error = (asked(pipe.unet, z, step, text, pooled) - target).square().flatten(1).mean(1)
    torch.testing.assert_close(answer.error, error, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("family", STABLE_DIFFUSION)
@torch.no_grad()
def test_guidance_goes_away_from_what_the_pipeline_takes_for_no_text(family: str, tmp_path: Path):
    pipe = pipeline(tmp_path, family)
    system = build_system(recipe(tmp_path, family), CPU)
    condition = system.condition(TEXTS)
    text, pooled = told(pipe, TEXTS, family)
    torch.testing.assert_close(condition.text, text)
    without = condition.without_text()
    nothing, nothing_pooled = told(pipe, ["", ""], family)
    torch.testing.assert_close(without.text, nothing)
    assert bool(nothing.any()) == (family != "xl")  # the pipeline of XL says zeros
    if pooled is not None:
        torch.testing.assert_close(condition.pooled, pooled)
        torch.testing.assert_close(without.pooled, nothing_pooled)
    z = torch.randn(2, 4, 3, 8, 12)
    level = torch.tensor([0.5, 0.5])
    guided, plain = (system.network.predict(z, level, c) for c in (condition, without))
    assert (guided - plain)[0].abs().max() > 1e-4
    assert torch.equal(guided[1], plain[1])
    assert system.draw(seed=1)(system.shape(2), condition).isfinite().all()


def test_only_temporal_layers_are_trained(tmp_path: Path):
    pipeline(tmp_path, "1.x")
    system = build_system(recipe(tmp_path, "1.x"), CPU)
    condition = replace(system.condition(TEXTS), images=0)
    shape = system.shape(2)
    system.network.predict(torch.randn(shape), torch.rand(2), condition).square().mean().backward()
    moved = {n for n, p in system.network.named_parameters() if p.grad is not None}
    assert moved
    assert all(".temporal." in name for name in moved)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"objective": {"schedule": "flow", "prediction": "eps"}}, "give scaled_linear"),
        ({"objective": {"schedule": "scaled_linear", "prediction": "v"}}, "predicts eps: give that"),
        ({"text": {"kind": "diffusers", "model": "HERE", "length": 64}}, "reads 12 places"),
        ({"text": {"kind": "transformers", "model": "HERE/text_encoder"}}, "give text.kind diffusers"),
        ({"text": {"kind": "diffusers", "model": "HERE/unet", "length": LENGTH}}, "has no text_encoder"),
    ],
)
def test_what_it_was_not_trained_on_is_refused(sections: Any, says: str, tmp_path: Path):
    pipe = pipeline(tmp_path, "1.x")
    pipe.tokenizer.save_pretrained(tmp_path / "text_encoder")
    if "text" in sections:
        text = sections["text"]
        sections = {"text": text | {"model": text["model"].replace("HERE", str(tmp_path))}}
    from models.hub import MissingModel

    with pytest.raises((ValueError, MissingModel), match=says):
        build_system(recipe(tmp_path, "1.x", **sections), CPU)
