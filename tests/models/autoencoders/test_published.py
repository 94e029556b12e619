"""Published autoencoders behind one protocol, on tiny checkpoints of the real classes."""

import sys
import warnings

import pytest
import torch

from models.autoencoders import published as autoencoders
from models.autoencoders.latents import latent_shape
from models.hub import MissingModel

diffusers = pytest.importorskip("diffusers")

SMALL = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
WAN = {"base_dim": 4, "num_res_blocks": 1}
LTX = {
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5,
    "latent_channels": 8,
}
KL = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
# class, its options, frames, and what the protocol must say: channels, stride, causal
KINDS = [
    ("AutoencoderKL", KL, 9, (4, (1, 2, 2), False)),
    ("AutoencoderKLWan", WAN, 9, (16, (4, 8, 8), True)),
    ("AutoencoderKLCogVideoX", SMALL, 17, (16, (4, 8, 8), True)),
    ("AutoencoderKLHunyuanVideo", SMALL | {"latent_channels": 4}, 9, (4, (4, 8, 8), True)),
    ("AutoencoderKLLTXVideo", LTX, 17, (8, (8, 32, 32), True)),
    ("AutoencoderKLLTXVideo", LTX | {"timestep_conditioning": True}, 9, (8, (8, 32, 32), True)),
]


def saved(tmp_path, kind: str, options: dict, subfolder: str = "") -> str:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(diffusers, kind)(**options).save_pretrained(tmp_path / subfolder)
    return str(tmp_path)


def clip(frames: int, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, frames, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("kind", "options", "frames", "expected"), KINDS)
@torch.no_grad()
def test_encoding_and_decoding_are_the_models_own(tmp_path, kind, options, frames, expected):
    ours = autoencoders.load(saved(tmp_path, kind, options))
    theirs = getattr(diffusers, kind).from_pretrained(tmp_path).eval()
    assert (ours.channels, ours.stride, ours.causal) == expected
    video = clip(frames, 2 if kind == "AutoencoderKL" else 1)  # the one where we fold frames into the batch
    posterior = ours.encode(video)
    assert posterior.mean.shape == (len(video), ours.channels, *latent_shape(ours, frames, 32, 32))
    if kind == "AutoencoderKL":  # frame by frame
        own = [theirs.encode(video[:, :, t]).latent_dist for t in range(frames)]
        mean, logvar = torch.stack([d.mean for d in own], 2), torch.stack([d.logvar for d in own], 2)
        made = torch.stack([theirs.decode(mean[:, :, t]).sample for t in range(frames)], 2)
    else:
        own = theirs.encode(video).latent_dist
        mean, logvar = own.mean, own.logvar
        told = {"temb": torch.zeros(1)} if options.get("timestep_conditioning") else {}
        made = theirs.decode(mean, **told).sample
    torch.testing.assert_close(posterior.mean, mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(posterior.logvar, logvar, atol=1e-5, rtol=1e-5)
    assert made.shape == video.shape
    torch.testing.assert_close(ours.decode(posterior.mean), made, atol=1e-4, rtol=1e-4)
    assert not any(p.requires_grad for p in ours.parameters())


STATISTICS = {"latents_mean": (1.0, 2.0, 3.0, 4.0), "latents_std": (2.0, 4.0, 6.0, 8.0)}


@pytest.mark.parametrize(
    ("kind", "options", "normalised"),
    [  # what the pipelines of diffusers compute of a latent z, channel 0
        ("AutoencoderKL", KL, lambda z: z * 0.18215),
        ("AutoencoderKL", KL | {"scaling_factor": 1.5, "shift_factor": 0.06}, lambda z: (z - 0.06) * 1.5),
        ("AutoencoderKL", KL | {"scaling_factor": 0.5} | STATISTICS, lambda z: (z - 1.0) * 0.5 / 2.0),
        ("AutoencoderKLWan", WAN, lambda z: (z + 0.7571) / 2.8184),
        ("AutoencoderKLCogVideoX", SMALL, lambda z: z * 1.15258426),
        ("AutoencoderKLHunyuanVideo", SMALL, lambda z: z * 0.476986),
    ],
)
def test_the_normaliser_is_the_models_own_scaling(tmp_path, kind, options, normalised):
    model, z = autoencoders.load(saved(tmp_path, kind, options)), torch.randn(1, 16, 2, 2, 2)
    z = z[:, : model.channels]
    torch.testing.assert_close(model.normalizer(z)[:, 0], normalised(z)[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.normalizer.inverse(model.normalizer(z)), z, rtol=1e-5, atol=1e-5)


def test_ltx_statistics_come_from_its_weights(tmp_path):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTXVideo(**LTX)
    vae.latents_mean += torch.arange(8.0)
    vae.latents_std *= 4
    vae.save_pretrained(tmp_path)
    model, z = autoencoders.load(str(tmp_path)), torch.randn(1, 8, 2, 1, 1)
    expected = (z - torch.arange(8.0).view(1, 8, 1, 1, 1)) / 4
    torch.testing.assert_close(model.normalizer(z), expected)


def test_a_pipelines_folder_is_entered(tmp_path):
    assert autoencoders.load(saved(tmp_path, "AutoencoderKL", KL, subfolder="vae")).channels == 4


def test_weights_take_the_asked_type(tmp_path):
    model = autoencoders.load(saved(tmp_path, "AutoencoderKL", KL), torch.bfloat16)
    mean = model.encode(clip(2)).mean
    assert mean.dtype == torch.bfloat16
    assert torch.isfinite(model.decode(mean)).all()


@torch.no_grad()
def test_an_even_number_of_cogvideox_latents_is_refused_because_it_decodes_to_other_frames(tmp_path):
    model = autoencoders.load(saved(tmp_path, "AutoencoderKLCogVideoX", SMALL))
    latents = model.vae.encode(clip(5)).latent_dist.mean
    assert latents.shape[2] == 2
    assert model.vae.decode(latents).sample.shape[2] == 8  # 5 went in
    for refused in (lambda: model.encode(clip(5)), lambda: model.decode(latents)):
        with pytest.raises(ValueError, match="give 1 \\+ a multiple of 8 frames"):
            refused()


def test_sizes_that_do_not_divide_are_refused(tmp_path):
    model = autoencoders.load(saved(tmp_path, "AutoencoderKLWan", WAN))
    with pytest.raises(ValueError, match="give 1 \\+ a multiple of 4 frames"):
        model.encode(clip(4))


def test_an_unknown_class_is_named_with_the_known_ones(tmp_path):
    folder = saved(tmp_path, "VQModel", {})
    with pytest.raises(ValueError, match="is a VQModel, which is not known here: give one of AutoencoderKL"):
        autoencoders.load(folder)


def test_a_folder_without_an_autoencoder_is_said_so(tmp_path):
    with pytest.raises(MissingModel, match="has no config"):
        autoencoders.load(str(tmp_path))
    folder = saved(tmp_path, "AutoencoderKL", KL)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(MissingModel, match="no weights"):
        autoencoders.load(folder)


def test_without_diffusers_the_fix_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingModel, match=r"pip install -e '\.\[diffusers\]'"):
        autoencoders.load("anything")
