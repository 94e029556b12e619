"""Pictures and videos as codes of a finite set, and back: what a language model can read and write.

The halves are those of `models.autoencoders.vae`, with the nearest of K learnt vectors between them (VQ-VAE, van den
Oord et al. 2017; with a discriminator VQGAN, Esser et al. 2021), or with each of a few numbers rounded to a few levels
(FSQ, Mentzer et al. 2024), which learns no vectors and has no codes that die.

    video [B, 3, 1 + n·s, H, W] in −1…1  ⇄  codes int64 [B, 1 + n, H/y, W/x]        stride (s, y, x)

With `dct` it works on blocks of its stride, as `models.autoencoders.vae` does: vectors are at first the block's first C
coefficients, so that a codebook begins as that of a classical vector quantiser, and both halves work at the codes' own
resolution, which is quick.

With a time stride of 1 frames are coded one by one: those of 256×256 pixels at stride (1, 16, 16) are the 256 codes a
frame of Large World Model. C: channels; K: codes; N: positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoders.vae import Halves, Memory, decoder_half, encoder_half, stage_factors, stage_widths

PRESETS: dict[str, dict[str, Any]] = {
    "small": {"stride": (1, 4, 4), "width": 32, "multipliers": (1, 2, 4), "depth": 1, "codes": 512},
    "image": {
        "stride": (1, 16, 16),
        "width": 128,
        "multipliers": (1, 1, 2, 2, 4),
        "depth": 2,
    },  # VQGAN's f = 16
    "blocks": {
        "stride": (1, 8, 8),
        "width": 128,
        "multipliers": (1,),
        "depth": 2,
        "dct": True,
        "codes": 1024,
    },
    "video": {"stride": (4, 8, 8), "width": 96, "multipliers": (1, 2, 4, 4), "depth": 2},
}
Update = Literal["ema", "gradient"]
RARE = 1e-4  # inputs a step that an unused code stands for, so that it can still be chosen


class Quantised(NamedTuple):
    """vectors: [N…, C], to which gradients go straight through. codes: int64 [N…]. loss: [N…], to be minimised.
    inputs: [N…, C], detached, before they were rounded."""

    vectors: Tensor
    codes: Tensor
    loss: Tensor
    inputs: Tensor


class Seen(NamedTuple):
    """What codes stood for; of micro-batches and ranks these add up."""

    counts: Tensor  # float32 [K]
    sums: Tensor  # float32 [K, C], of the inputs

    def plus(self, other: Seen) -> Seen:
        return Seen(self.counts + other.counts, self.sums + other.sums)


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """`value` on the way forward, x on the way back."""
    return x + (value - x).detach()


class Codebook(nn.Module):
    """K vectors; each input becomes the nearest.

    The loss is β‖z − sg(e)‖², the commitment; what moves the vectors is either the mean of the inputs they stood for,
    over recent steps (van den Oord et al. 2017, app. A.1): `update`, after each step, or the loss's other half
    ‖sg(z) − e‖². In both, vectors that hardly any input is nearest to begin again at an input (Dhariwal et al. 2020,
    sec. 3.1), for which `update` is called. At first all do.

    With a `rate` λ the code of an input is that of the least ‖z − e‖² − λ ln p, p being how often it was used lately
    (entropy-constrained quantisation, Chou, Lookabaugh & Gray 1989). Where most of a picture is one plain ground, the
    nearest of K vectors says mostly which noise is on it: hundreds of codes for one thing, which no language model can
    foretell. A distance is spent on such differences only where it is worth λ a nat.

    Args:
        beta: weight of the commitment. decay: of the means, a step.
        dead: a code is that is used less than so much of an even share.
        rate: λ, in units of the vectors' squared distance; 0: the nearest.
    """

    entries: Tensor
    mass: Tensor
    sums: Tensor

    def __init__(
        self,
        codes: int,
        channels: int,
        update: Update = "ema",
        beta: float = 0.25,
        decay: float = 0.99,
        dead: float = 0.03,
        rate: float = 0.0,
    ):
        super().__init__()
        for name, share in (("decay", decay), ("dead", dead)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} {share:g}: give a share of 1, less than all of it")
        self.size, self.channels, self.by = codes, channels, update
        self.beta, self.decay, self.dead, self.rate = beta, decay, dead, rate
        entries = torch.randn(codes, channels)
        if update == "gradient":
            self.entries = nn.Parameter(entries)
        else:
            self.register_buffer("entries", entries)
        self.register_buffer("mass", torch.zeros(codes))  # how often each was used, over recent steps
        self.register_buffer("sums", torch.zeros(codes, channels))  # of the inputs it stood for

    def forward(self, z: Tensor) -> Quantised:
        z = z.float()
        codes = self.nearest(z.detach())
        found = self.vectors(codes)
        loss = self.beta * (z - found.detach()).square().mean(-1)
        if self.by == "gradient":
            loss = loss + (z.detach() - found).square().mean(-1)
        return Quantised(straight_through(z, found), codes, loss, z.detach())

    def vectors(self, codes: Tensor) -> Tensor:
        """[N…] → [N…, C]."""
        return F.embedding(codes, self.entries)

    @torch.no_grad()
    def nearest(self, z: Tensor, chunk: int = 16_384) -> Tensor:
        """Codes [N…] of z [N…, C]; the distances of `chunk` inputs at a time are in memory."""
        half = self.entries.square().sum(1) / 2
        if self.rate:
            mass = self.mass + RARE
            half = half - self.rate / 2 * (mass / mass.sum()).log()
        with torch.autocast(z.device.type, enabled=False):
            found = [(half - part @ self.entries.T).argmin(1) for part in z.flatten(0, -2).split(chunk)]
        return torch.cat(found).view(z.shape[:-1])

    @torch.no_grad()
    def seen(self, quantised: Quantised) -> Seen:
        codes, inputs = quantised.codes.flatten(), quantised.inputs.flatten(0, -2)
        counts, sums = torch.zeros_like(self.mass), torch.zeros_like(self.sums)
        return Seen(
            counts.index_add_(0, codes, torch.ones_like(inputs[:, 0])), sums.index_add_(0, codes, inputs)
        )

    @torch.no_grad()
    def update(self, seen: Seen, spare: Tensor) -> int:
        """Move the vectors after a step; → how many began again.

        Args:
            seen: of the whole step. spare: some of its inputs [M, C] in random order, for vectors that begin again:
                where the far ones from their vectors are more likely to be among them (`strays`), vectors go where
                they are missing. On all ranks both must be the same.
        """
        self.mass.lerp_(seen.counts, 1 - self.decay)
        self.sums.lerp_(seen.sums, 1 - self.decay)
        if self.by == "ema":
            means = self.sums / self.mass.clamp(min=1e-12)[:, None]
            self.entries.copy_(torch.where(self.mass[:, None] > 0, means, self.entries))
        even = self.mass.mean()
        again = (self.mass < self.dead * even).nonzero()[: len(spare), 0]
        self.entries[again] = spare[: len(again)].to(self.entries)
        self.mass[again] = even
        self.sums[again] = self.entries[again] * even
        return len(again)


def strays(quantised: Quantised) -> Tensor:
    """How likely each input [N…] is to be drawn as a new vector: ∝ its squared distance to the one it has, as
    k-means++ draws (Arthur & Vassilvitskii 2007). Drawn evenly, most would fall where most inputs lie already."""
    return (quantised.inputs - quantised.vectors.detach()).square().sum(-1)


class FSQ(nn.Module):
    """Each channel bounded and rounded to its number of levels (Mentzer et al. 2024, sec. 3); codes: all combinations.

    Args:
        levels: of each channel, at least 2.
    """

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"levels={tuple(levels)}: give each channel two or more")
        self.levels, self.size, self.channels = tuple(levels), math.prod(levels), len(levels)

    def forward(self, z: Tensor) -> Quantised:
        """z [N…, C] → vectors in −1…1. There is nothing to be minimised."""
        z = z.float()
        steps, half = self._tensors(z)
        reach = (steps - 1) * (1 + 1e-3) / 2
        offset = (steps % 2 == 0) / 2  # an even number of levels lies around −½
        bounded = (z + (offset / reach).atanh()).tanh() * reach - offset
        rounded = straight_through(bounded, bounded.round())
        places = rounded.detach() + half
        codes = (places.long() * self._weights(z.device)).sum(-1)
        return Quantised(rounded / half, codes, z.new_zeros(codes.shape), z.detach())

    def vectors(self, codes: Tensor) -> Tensor:
        """[N…] → [N…, C]."""
        steps, half = self._tensors(codes)
        places = codes[..., None] // self._weights(codes.device) % steps.long()
        return (places - half) / half

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        steps = torch.tensor(self.levels, device=like.device, dtype=torch.float32)
        return steps, steps.div(2, rounding_mode="floor")

    def _weights(self, device: torch.device) -> Tensor:
        """The first channel counts units."""
        return torch.tensor([math.prod(self.levels[:i]) for i in range(self.channels)], device=device)


class Health(NamedTuple):
    """usage: share of the codes that occur. perplexity: how many codes, used evenly, would be as hard to guess."""

    usage: float
    perplexity: float


def health(counts: Tensor) -> Health:
    """Of how often each code occurs, [K]."""
    share = counts.double() / counts.sum().clamp(min=1)
    entropy = -torch.special.xlogy(share, share).sum()
    return Health(float((counts > 0).double().mean()), float(entropy.exp()))


class VQ(Halves):
    """See `build` for the options."""

    def __init__(
        self,
        quantiser: Codebook | FSQ,
        stride: Sequence[int],
        width: int,
        multipliers: Sequence[int],
        depth: int,
        dct: bool = False,
    ):
        super().__init__()
        self.stride, self.channels = (stride[0], stride[1], stride[2]), quantiser.channels
        factors = self.cut_in_blocks(self.channels) if dct else stage_factors(stride)
        if dct and isinstance(quantiser, FSQ):
            raise ValueError("dct with levels: coefficients are not within −1…1: leave one of them out")
        widths = stage_widths(width, multipliers, stride, factors, "with dct, " * dct)
        taps = 3 if stride[0] > 1 else 1
        self.encoder = encoder_half(self.values, self.channels, widths, factors, depth, taps)
        self.quantiser = quantiser
        self.decoder = decoder_half(self.values, self.channels, widths, factors, depth, taps)
        self.zero_biases()
        if dct:
            self.begin_as_blocks()

    @property
    def codes(self) -> int:
        """K."""
        return self.quantiser.size

    def forward(self, video: Tensor) -> tuple[Tensor, Quantised]:
        """(reconstruction [B, 3, T, H, W], its codes [B, T', h, w] and their vectors [B, T', h, w, C])."""
        quantised = self._quantised(video)
        return self._decoded(quantised.vectors), quantised

    def _quantised(self, video: Tensor, memory: Memory | None = None) -> Quantised:
        found: Quantised = self.quantiser(self.into_latents(video, memory).movedim(1, -1))
        return found

    def _decoded(self, vectors: Tensor, memory: Memory | None = None) -> Tensor:
        like = next(self.decoder.parameters())
        return self.from_latents(vectors.movedim(-1, 1).to(like.dtype), memory)

    def encode(self, video: Tensor, chunk: int | None = None) -> Tensor:
        """[B, 3, 1 + n·s, H, W] → codes int64 [B, 1 + n, h, w].

        Args:
            chunk: frames of codes computed at a time, for long videos; none: all at once.
        Raises ValueError where a side is no multiple of its stride.
        """
        (t, y, x), (frames, height, width) = self.stride, video.shape[2:]
        if (frames - 1) % t or height % y or width % x:
            raise ValueError(
                f"{frames} frames of {width}×{height} do not divide into codes: give 1 + a multiple of {t} frames, a "
                f"height that is a multiple of {y} and a width that is one of {x}"
            )
        if chunk is None:
            return self._quantised(video).codes
        memory: Memory = {}
        return torch.cat([self._quantised(p, memory).codes for p in self.pieces(video, chunk)], dim=1)

    def decode(self, codes: Tensor, chunk: int | None = None) -> Tensor:
        """[B, 1 + n, h, w] → [B, 3, 1 + n·s, H, W]; chunk: frames of codes at a time."""
        return torch.cat(
            list(self.decode_chunks([codes] if chunk is None else codes.split(chunk, dim=1))), dim=2
        )

    def decode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Frames of codes that come in pieces of any length: s a frame of codes, one for the very first."""
        memory: Memory = {}
        for codes in chunks:
            yield self._decoded(self.quantiser.vectors(codes), memory)


def build(
    channels: int,
    text_width: int | None = None,
    *,
    codes: int = 8192,
    levels: Sequence[int] | None = None,
    update: Update = "ema",
    beta: float = 0.25,
    decay: float = 0.99,
    dead: float = 0.03,
    rate: float = 0.0,
    stride: Sequence[int] = (1, 16, 16),
    width: int = 128,
    multipliers: Sequence[int] = (1, 1, 2, 2, 4),
    depth: int = 2,
    dct: bool = False,
) -> VQ:
    """A VQ autoencoder whose codes are vectors of `channels`. Raises ValueError where options do not fit together.

    Args:
        text_width: an autoencoder reads no text; must be None.
        codes, update, beta, decay, dead, rate: of the `Codebook`.
        levels: of the channels, for FSQ in place of a codebook; (8, 8, 8, 16) are 8192 codes.
        stride, width, multipliers, depth, dct: see `models.autoencoders.vae`.
    """
    if text_width is not None:
        raise ValueError("a VQ autoencoder takes no text: leave text_width unset")
    if levels is not None and len(levels) != channels:
        raise ValueError(f"{len(levels)} levels for {channels} channels: give one for each")
    if levels is not None and rate:
        raise ValueError(f"rate {rate:g} with levels: these have no codebook: leave one of them out")
    quantiser = Codebook(codes, channels, update, beta, decay, dead, rate) if levels is None else FSQ(levels)
    return VQ(quantiser, stride, width, multipliers, depth, dct)
