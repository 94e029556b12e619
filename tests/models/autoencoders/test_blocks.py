"""The DCT of blocks in space and time, and the autoencoder that begins as it."""

import math

import pytest
import torch
from torch import Tensor

from models.autoencoders import vae
from models.autoencoders.blocks import BlockDCT3D, correlation, dct

SHAPES = [(2, 4, 4), (4, 8, 8), (1, 4, 4)]


def clip(frames: int, size: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(2, 3, frames, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def made(stride=(2, 4, 4), channels=16, moved: float = 0.0) -> vae.VAE:
    """moved: how far its last layers are from what they are at first."""
    torch.manual_seed(0)
    model = vae.build(channels, stride=stride, width=16, multipliers=(1,), depth=1, dct=True).eval()
    for head in (model.encoder.layers[-1], model.decoder.layers[-1]):
        head.conv.weight.data += moved * torch.randn_like(head.conv.weight)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_all_coefficients_give_the_video_back(shape):
    blocks = BlockDCT3D(shape)
    video = clip(1 + 2 * shape[0])
    coefficients = blocks.cut(video)
    assert coefficients.shape == (2, 3 * math.prod(shape), 3, 16 // shape[1], 16 // shape[2])
    torch.testing.assert_close(blocks.join(coefficients), video, atol=1e-5, rtol=0)


def test_the_transform_is_the_orthonormal_dct_of_three_axes_and_three_colours():
    basis = BlockDCT3D((2, 4, 4)).basis.flatten(1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(96), atol=5e-6, rtol=0)
    scipy = pytest.importorskip("scipy.fft")
    for n in (2, 4, 8):
        torch.testing.assert_close(
            dct(n), torch.from_numpy(scipy.dct(torch.eye(n).double().numpy(), norm="ortho").T)
        )


def test_of_pictures_like_neighbours_the_latents_have_unit_variance_and_the_first_say_most():
    """Drawn from the process that the order is made for."""
    blocks = BlockDCT3D((2, 4, 4))
    roots = [torch.linalg.cholesky(correlation(n)).float() for n in (2, 4, 4)]
    white = torch.randn(4000, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    grey = torch.einsum("ntyx,at,by,dx->nabd", white, *roots)
    video = (0.5 * grey)[:, None].expand(-1, 3, -1, -1, -1)
    with torch.no_grad():
        later = blocks.cut(torch.cat([video[:, :, :1], video], dim=2))[:, :, 1].flatten(1)
    share = later.var(0) / later.var(0)[0]
    first = blocks.basis.flatten(1) @ torch.ones(3 * 2 * 4 * 4) / math.sqrt(96)
    assert first[0] == pytest.approx(1, abs=1e-5)  # the mean of the block comes first
    grey_ones = share > 0.01  # colours have none here
    assert grey_ones.sum() == 32
    torch.testing.assert_close(share[grey_ones], torch.ones(32), atol=0.15, rtol=0)
    assert (blocks.deviation.flatten().diff() <= 0).all()


@pytest.mark.parametrize("stride", SHAPES)
def test_the_autoencoder_is_the_dct_at_first(stride):
    model, video = made(stride), clip(1 + 2 * stride[0])
    coefficients = model.blocks.cut(video)
    posterior = model.encode(video)
    torch.testing.assert_close(posterior.mean, coefficients[:, :16])
    assert (posterior.logvar == vae.QUIET).all()
    kept = torch.cat([coefficients[:, :16], torch.zeros_like(coefficients[:, 16:])], dim=1)
    torch.testing.assert_close(model.decode(posterior.mean), model.blocks.join(kept))


def test_with_a_channel_for_every_coefficient_nothing_is_lost_at_first():
    model, video = made(channels=96), clip(5)
    torch.testing.assert_close(model.decode(model.encode(video).mean), video, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stride", SHAPES)
@pytest.mark.parametrize("chunk", [1, 2])
def test_coding_in_chunks_equals_the_whole(stride, chunk):
    model, video = made(stride, moved=0.1), clip(1 + 4 * stride[0])
    with torch.no_grad():
        whole, parts = model.encode(video), model.encode(video, chunk)
        torch.testing.assert_close(parts.mean, whole.mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            model.decode(whole.mean, chunk), model.decode(whole.mean), atol=1e-5, rtol=1e-4
        )


def test_a_changed_frame_leaves_latents_and_frames_before_it():
    model, video = made(moved=0.1), clip(9)
    other = video.clone()
    other[:, :, 5:] = -other[:, :, 5:]
    with torch.no_grad():
        a, b = model.encode(video).mean, model.encode(other).mean
        assert torch.equal(a[:, :, :3], b[:, :, :3])
        assert not torch.equal(a[:, :, 3], b[:, :, 3])
        assert torch.equal(model.decode(a)[:, :, :5], model.decode(b)[:, :, :5])


def test_every_weight_learns_once_the_last_layers_have_moved():
    model = made(moved=0.01)
    video = clip(5)
    back, mean, logvar = model(video, torch.randn(2, 16, 3, 4, 4))
    ((back - video).abs().mean() + 1e-3 * (mean.square().mean() + logvar.mean())).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_under_autocast_the_dct_is_not_rounded():
    model, video = made(channels=96), clip(5)
    with torch.autocast("cpu", torch.bfloat16):
        back = model.decode(model.encode(video).mean)
    torch.testing.assert_close(back, video, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"channels": 97}, r"97 channels: blocks of \(2, 4, 4\) have 96 coefficients"),
        ({"multipliers": (1, 2)}, "with dct, stride .* has 1 resolutions: give as many multipliers, not 2"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, says):
    options = {"channels": 16, "width": 16, "multipliers": (1,), "depth": 1} | options
    with pytest.raises(ValueError, match=says):
        vae.build(options.pop("channels"), stride=(2, 4, 4), dct=True, **options)
