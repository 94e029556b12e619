"""The DCT of blocks in space and time, causal, its coefficients in the order in which they matter.

A trained autoencoder that codes them as they are is a block DCT, and can only get better from there.

A picture's neighbours are alike, and so are grey levels in all colours. Of a Gaussian of that kind (an AR(1) process of
correlation ρ along each axis, grey, red − blue and green − magenta independent) the DCT's coefficients are all but
independent (Ahmed, Natarajan and Rao 1974), and the first C of them in order of variance the best C numbers of a
block. Each is divided by its deviation under that process, so that latents begin with variances near 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RHO = 0.95  # of neighbours in space and time; fits real clips of 64×64 pixels at 8 frames a second
COLOURS = (1.0, 0.1, 0.016)  # variance of grey, red − blue and green − magenta, likewise
PIXEL = 0.3  # variance of one value of a picture in −1…1
Memory = dict[nn.Module, Tensor]


class BlockDCT3D(nn.Module):
    """Videos [B, 3, 1 + n·t, H, W] to coefficients [B, 3·t·y·x, 1 + n, H/y, W/x], and back without loss.

    The first frame's block is that frame t times. shape: (t, y, x) of a block.
    """

    basis: Tensor
    deviation: Tensor

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.shape = tuple(shape)
        axes = [dct(n) for n in shape]
        colours = F.normalize(torch.tensor([[1.0, 1, 1], [1, 0, -1], [-1, 2, -1]]).double(), dim=1)
        basis = torch.einsum("kc,at,by,dx->kabdctyx", colours, *axes).flatten(0, 3)  # orthonormal rows
        variances = [(a @ correlation(len(a)) @ a.T).diagonal() for a in axes]
        share = torch.tensor(COLOURS).double() / sum(COLOURS) * 3
        variance = PIXEL * torch.einsum("k,a,b,d->kabd", share, *variances).flatten()
        order = (
            (1e6 * variance.log()).round().argsort(descending=True, stable=True)
        )  # alike ones as they come
        self.register_buffer("basis", basis[order].float())  # [3tyx, 3, t, y, x]
        self.register_buffer("deviation", variance[order].sqrt().float().view(-1, 1, 1, 1))

    def cut(self, video: Tensor, memory: Memory | None = None) -> Tensor:
        if memory is None or self not in memory:  # the first frames of all
            video = torch.cat([video[:, :, :1].expand(-1, -1, self.shape[0] - 1, -1, -1), video], dim=2)
        if memory is not None:
            memory[self] = video.new_empty(0)
        with torch.autocast(
            video.device.type, enabled=False
        ):  # a picture's mean must not be rounded to 8 bits
            return F.conv3d(video, self.basis.to(video), stride=self.shape) / self.deviation.to(video)

    def join(self, coefficients: Tensor, first: bool = True) -> Tensor:
        """first: of the video's own first block one frame is meant."""
        with torch.autocast(coefficients.device.type, enabled=False):
            x = coefficients * self.deviation.to(coefficients)
            video = F.conv_transpose3d(x, self.basis.to(x), stride=self.shape)
        return video[:, :, self.shape[0] - 1 :] if first else video


def dct(n: int) -> Tensor:
    """The orthonormal DCT-II, float64 [frequency, position]."""
    i = torch.arange(n, dtype=torch.float64)
    basis = torch.cos(math.pi / n * (i + 0.5)[None, :] * i[:, None]) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


def correlation(n: int) -> Tensor:
    """Of an AR(1) process, [n, n]."""
    i = torch.arange(n, dtype=torch.float64)
    return RHO ** (i[:, None] - i[None, :]).abs()
