"""Video LDM: an image diffusion model turned into one of videos by temporal layers (Blattmann et al. 2023).

After every spatial layer of an image U-Net (a residual block, an attention over space) comes a temporal one
(a residual block of convolutions over time, an attention over time), mixed in by a learned α in 0…1:

    h = α z_spatial + (1 − α) z_temporal        (sec. 3.1)

α is 1 at first, so that the video model begins as the image model. The spatial part is ours, trained from
scratch, or Stable Diffusion's; it may be frozen. To it T frames are T images of a batch: N = B · T.
Independent images among the frames pass by the temporal layers, so nothing else can reach them.

Known frames enter as the paper has it: their latents and a mask, brought to each level's size by learned
convolutions, and through a projection of its own to the input of every temporal layer. The spatial part is
left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Mask
from models.denoisers.conditions import with_conditions
from models.denoisers.unet3d import (
    Attention,
    CrossAttention,
    FrameNorm,
    ResBlock,
    SpaceAttention,
    UNet,
    check_sizes,
    check_stride,
    tokens,
)
from models.diffusion.condition import Condition, LevelEmbedding, sinusoids
from models.diffusion.noise import level as noise_level

PRESETS: dict[str, dict[str, Any]] = {
    "small": {"width": 32, "multipliers": (1, 2, 4), "depth": 1},
    "base": {"width": 128, "multipliers": (1, 2, 4), "depth": 2, "head_dim": 64},
    "stable-diffusion-size": {"width": 320, "multipliers": (1, 2, 4, 4), "depth": 2, "head_dim": 64},
}

BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D", "UNetMidBlock2DCrossAttn", "CrossAttnUpBlock2D", "UpBlock2D")

Mix = Callable[[Tensor, Tensor], Tensor]  # (a spatial layer's output, embedding [N, E]) → of the same shape


class Layer(NamedTuple):
    """A spatial layer, as the temporal one after it needs to know it."""

    kind: Literal["residual", "attention"]
    channels: int
    level: int  # 0 the finest; each has half the height and width of the one before


class Spatial(nn.Module):
    """An image U-Net that lets something be mixed in after each of its layers.

    embedding: E, the size of the level's embedding. stride: height and width are multiples of it.
    """

    embedding: int
    stride: int

    def layers(self) -> list[Layer]:
        """In the order in which `forward` calls `mix`."""
        raise NotImplementedError

    def repeated(self) -> Iterator[nn.Module]:
        """The same layers as modules."""
        raise NotImplementedError

    def forward(
        self,
        z: Tensor,  # N C h w
        level: Tensor,  # N
        text: Tensor | None = None,  # N L D
        text_mask: Tensor | None = None,  # N L
        pooled: Tensor | None = None,  # N P
        mix: Mix = lambda x, emb: x,
    ) -> Tensor:
        """→ [N, C, h, w]"""
        raise NotImplementedError


def build(
    channels: int,
    text_width: int | None = None,
    *,
    width: int | None = None,
    multipliers: Sequence[int] | None = None,
    depth: int | None = None,
    attention: Sequence[int] | None = None,
    head_dim: int | None = None,
    spatial: str | None = None,
    frozen: bool = False,
    context: bool = False,
) -> VideoLDM:
    """A `VideoLDM` around an `ImageUNet` of these sizes, or around the image model in a folder.

    Args:
        spatial: folder of a diffusers `UNet2DConditionModel` (or of a pipeline that has one), whose config
            then sets all sizes.
        frozen: train the temporal layers only.
        context: take `condition.known` and its mask.

    Raises ValueError where these don't fit together.
    """
    names = ("width", "multipliers", "depth", "attention", "head_dim")
    given = zip(names, (width, multipliers, depth, attention, head_dim), strict=True)
    sizes: dict[str, Any] = {name: value for name, value in given if value is not None}
    if spatial is None:
        return VideoLDM(ImageUNet(channels, text_width, **sizes), channels, text_width, frozen, context)
    if sizes:
        raise ValueError(
            f"{', '.join(sizes)} and spatial were given: the folder's config sets sizes; give one"
        )
    return VideoLDM(DiffusersUNet(spatial, channels, text_width), channels, text_width, frozen, context)


class VideoLDM(nn.Module):
    """z [B, C, T, h, w], level [B], condition → [B, C, T, h, w].

    Args:
        spatial: the image model.
        frozen: its parameters take no gradient.
        context: take `condition.known` and its mask.

    Raises ValueError, when called, for sizes or conditions that it was not built for.
    """

    def __init__(
        self,
        spatial: Spatial,
        channels: int,
        text_width: int | None = None,
        frozen: bool = False,
        context: bool = False,
    ):
        super().__init__()
        self.text_width, self.channels = text_width, channels
        self.spatial = spatial.requires_grad_(not frozen)
        layers = spatial.layers()
        self.levels = [layer.level for layer in layers]
        self.known = KnownFrames(channels + 1, max(self.levels) + 1) if context else None
        known = self.known.channels if self.known is not None else 0
        self.temporal = nn.ModuleList(Temporal(layer, spatial.embedding, known) for layer in layers)

    def repeated(self) -> Iterator[nn.Module]:
        """Its spatial layers, then its temporal ones."""
        yield from self.spatial.repeated()
        yield from self.temporal

    def forward(self, z: Tensor, level: Tensor, condition: Condition) -> Tensor:
        b, t = len(z), z.shape[2]
        videos = t - condition.images if t - condition.images > 1 else 0  # one frame is an image
        x = with_conditions(z, condition, context=self.known is not None, upsample=False).transpose(
            1, 2
        )  # B T C' h w
        check_stride(x, self.spatial.stride)
        text, text_mask = tokens(z, condition, self.text_width)
        # images alone: an empty batch goes through the temporal layers, whose parameters take part in every step
        rows, times = (b, videos) if videos else (0, t)
        known = [None] * (max(self.levels) + 1)
        if self.known is not None:
            known = self.known(x[:rows, :times, self.channels :])
        pairs = iter(zip(self.temporal, self.levels, strict=True))

        def mix(image: Tensor, emb: Tensor) -> Tensor:
            temporal, at = next(pairs)
            frames = image.reshape(b, t, *image.shape[-3:])  # B T C h w
            clip = temporal(frames[:rows, :times], emb.unflatten(0, (b, t))[:rows, :times], known[at])
            if not videos:
                return torch.cat([clip.flatten(0, 1).reshape(0, *image.shape[1:]), image])
            return torch.cat([clip, frames[:, videos:]], dim=1).reshape(image.shape)

        def each(y: Tensor | None) -> Tensor | None:
            return None if y is None else y.repeat_interleave(t, dim=0)

        z = z.transpose(1, 2).flatten(0, 1)  # N C h w
        y = self.spatial(z, each(level), each(text), each(text_mask), each(condition.pooled), mix)
        return y.unflatten(0, (b, t)).transpose(1, 2)  # B C T h w


class Temporal(nn.Module):
    """α x + (1 − α) temporal(x + known): [B, T, C, h, w] → the same; x itself while α is 1, as at first.

    While α is 1 `temporal` gets no gradient; it must not start as the identity too, or α got none either.
    """

    def __init__(self, layer: Layer, emb: int, known: int = 0):
        super().__init__()
        kind = TimeResBlock if layer.kind == "residual" else TimeAttention
        self.temporal = kind(layer.channels, emb)
        self.known = nn.Linear(known, layer.channels) if known else None
        # β = 1 − α, of one element: near 0 a number is exact in any type, near 1 it would be stuck in bfloat16
        self.beta = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, emb: Tensor, known: Tensor | None = None) -> Tensor:
        """emb [B, T, E]; known [B, T, h, w, K]"""
        y = x if self.known is None else x + self.known(known).permute(0, 1, 4, 2, 3)
        beta = UnitInterval.apply(self.beta.float() if x.dtype != torch.float64 else self.beta)
        return (1 - beta).to(x.dtype) * x + beta.to(x.dtype) * self.temporal(y, emb)


class TimeResBlock(nn.Module):
    """Two convolutions over time, 3×1×1; the embedding scales and shifts between them."""

    def __init__(self, channels: int, emb: int):
        super().__init__()
        self.norm1, self.norm2 = FrameNorm(channels), FrameNorm(channels)
        self.conv1, self.conv2 = (nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0)) for _ in "12")
        self.modulation = nn.Linear(emb, 2 * channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)).transpose(1, 2)).transpose(1, 2)  # B T C h w
        scale, shift = self.modulation(F.silu(emb))[..., None, None].chunk(2, dim=2)  # B T C 1 1
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return x + self.conv2(h.transpose(1, 2)).transpose(1, 2)


class TimeAttention(nn.Module):
    """The frames see each other, place by place; sinusoids tell a frame's place in time."""

    def __init__(self, channels: int, emb: int):
        super().__init__()
        self.norm = FrameNorm(channels)
        self.attention = Attention(channels, channels // math.gcd(64, channels))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        b, t, c, h, w = x.shape
        places = sinusoids(torch.arange(t, device=x.device), c).to(x.dtype)  # T C
        y = self.norm(x).permute(0, 3, 4, 1, 2).reshape(b * h * w, t, c) + places  # (B h w) T C
        return x + self.attention(y).reshape(b, h, w, t, c).permute(0, 3, 4, 1, 2)


class UnitInterval(torch.autograd.Function):
    """x clamped to 0…1, with a gradient wherever a step along it leads back inside.

    A plain clamp has none outside: an α that one step took past 1 would never move again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        outwards = ((x >= 1) & (grad < 0)) | ((x <= 0) & (grad > 0))  # a step is along −grad
        return grad.masked_fill(outwards, 0)


class KnownFrames(nn.Module):
    """Known latents and their mask [B, T, C + 1, h, w] → a list of [B, T, h/2ⁱ, w/2ⁱ, K], one a level."""

    def __init__(self, inputs: int, levels: int, channels: int = 64):
        super().__init__()
        self.channels = channels
        self.conv_in = nn.Conv2d(inputs, channels, 3, padding=1)
        self.down = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(levels - 1)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.conv_in(x.flatten(0, 1))
        levels = [y]
        for down in self.down:
            levels.append(y := down(F.silu(y)))
        return [F.silu(y).unflatten(0, x.shape[:2]).movedim(2, -1) for y in levels]


class ImageUNet(Spatial):
    """Our spatial part: residual blocks, attention over space and to the text's tokens. See `UNet3D` for sizes.

    Its layers take clips [N, 1, C, h, w] of one frame.
    """

    def __init__(
        self,
        channels: int,
        text_width: int | None = None,
        *,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2, 4),
        depth: int = 2,
        attention: Sequence[int] | None = None,
        head_dim: int = 32,
    ):
        super().__init__()
        attended = set(range(len(multipliers)) if attention is None else attention)
        check_sizes(width, len(multipliers), attended, head_dim)
        self.embedding, self.stride = 4 * width, 2 ** (len(multipliers) - 1)
        self.level = LevelEmbedding(self.embedding)

        def block(c_in: int, c_out: int, level: int) -> ImageBlock:
            heads = c_out // head_dim if level in attended else 0
            return ImageBlock(c_in, c_out, self.embedding, heads, text_width)

        self.unet = UNet(channels, channels, [width * m for m in multipliers], depth, block)

    def layers(self) -> list[Layer]:
        layers = []
        for level, block in self.unet.blocks():
            layers.append(Layer("residual", block.channels, level))
            if block.space is not None:
                layers.append(Layer("attention", block.channels, level))
        return layers

    def repeated(self) -> Iterator[nn.Module]:
        for _, block in self.unet.blocks():
            yield from block.children()

    def forward(
        self,
        z: Tensor,
        level: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        mix: Mix = lambda x, emb: x,
    ) -> Tensor:
        return self.unet(z[:, None], self.level(level), text, Mask.padding(text_mask), mix)[:, 0]


class ImageBlock(nn.Module):
    """Residual block, attention over space and to the text; mixed into after the first and after the last."""

    def __init__(self, c_in: int, c_out: int, emb: int, heads: int, text_width: int | None):
        super().__init__()
        self.channels = c_out
        self.residual = ResBlock(c_in, c_out, emb)
        self.space = SpaceAttention(c_out, heads) if heads else None
        self.cross = CrossAttention(c_out, heads, text_width) if heads and text_width else None

    def forward(
        self, x: Tensor, emb: Tensor, text: Tensor | None, text_mask: Mask | None, mix: Mix
    ) -> Tensor:
        x = mix(self.residual(x, emb), emb)
        if self.space is None:
            return x
        x = self.space(x)
        if self.cross is not None:
            x = self.cross(x, text, text_mask)
        return mix(x, emb)


class DiffusersUNet(Spatial):
    """Stable Diffusion's U-Net (1.x, 2.x, XL) in the modules of diffusers, under their names.

    It keeps what it was trained to predict (ε; v for 2.x at 768 pixels) and the time steps it knows: the
    level is turned into one. A row without text is a text of zeros; what these models know as 'no text' is for the
    condition to say (`Condition.no_text`). XL's other conditions are the size of the image, uncropped, and the
    pooled text, or zeros.

    Raises ValueError where diffusers is missing, the folder holds no such model, or its sizes are others.
    """

    def __init__(self, folder: str, channels: int, text_width: int | None):
        super().__init__()
        self.unet = load_unet(folder)
        config = self.unet.config
        if (config.in_channels, config.out_channels) != (channels, channels):
            raise ValueError(
                f"spatial={folder} maps {config.in_channels} to {config.out_channels} channels, the latents have "
                f"{channels}: give the autoencoder that belongs to it"
            )
        if config.cross_attention_dim != text_width:
            raise ValueError(
                f"spatial={folder} reads text of {config.cross_attention_dim} features, the text encoder gives "
                f"{text_width}: give the one that belongs to it"
            )
        self.embedding = self.unet.time_embedding.linear_2.out_features
        self.stride = 2 ** (len(self.unet.down_blocks) - 1)

    def layers(self) -> list[Layer]:
        return [layer for layer, _ in self._walk()]

    def repeated(self) -> Iterator[nn.Module]:
        return (module for _, module in self._walk())

    def _walk(self) -> Iterator[tuple[Layer, Any]]:
        last = len(self.unet.down_blocks) - 1
        levels = [*range(last + 1), last, *range(last, -1, -1)]
        blocks: list[Any] = [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]
        for level, block in zip(levels, blocks, strict=True):
            for resnet, attention in _pairs(block):
                yield Layer("residual", resnet.out_channels, level), resnet
                if attention is not None:
                    yield Layer("attention", resnet.out_channels, level), attention

    def forward(
        self,
        z: Tensor,
        level: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        mix: Mix = lambda x, emb: x,
    ) -> Tensor:
        unet = self.unet
        emb = unet.time_embedding(unet.get_time_embed(sample=z, timestep=timestep(level)))  # N E
        added = self._added(z, pooled) if unet.config.addition_embed_type == "text_time" else {}
        extra = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)
        emb = emb if extra is None else emb + extra
        if text is not None and text_mask is not None:
            text = text * text_mask.any(dim=1)[:, None, None]

        def run(resnet: nn.Module, attention: nn.Module | None, x: Tensor) -> Tensor:
            x = mix(resnet(x, emb), emb)
            if attention is None:
                return x
            return mix(attention(x, text, encoder_attention_mask=text_mask, return_dict=False)[0], emb)

        x = unet.conv_in(z)
        skips = [x]
        for block in unet.down_blocks:
            for pair in _pairs(block):
                skips.append(x := run(*pair, x))
            for shrink in block.downsamplers or ():
                skips.append(x := shrink(x))
        for pair in _pairs(unet.mid_block):
            x = run(*pair, x)
        for block in unet.up_blocks:
            for pair in _pairs(block):
                x = run(*pair, torch.cat([x, skips.pop()], dim=1))
            for grow in block.upsamplers or ():
                x = grow(x)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))

    def _added(self, z: Tensor, pooled: Tensor | None) -> dict[str, Tensor]:
        """XL's conditions, [N, 6] and [N, P]: height and width, the crop's corner, the size aimed at; pooled text."""
        n, _, h, w = z.shape
        config = self.unet.config
        size = torch.tensor([8 * h, 8 * w, 0, 0, 8 * h, 8 * w], device=z.device).expand(n, 6)  # in pixels
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        if pooled is not None and pooled.shape[-1] != width:
            raise ValueError(
                f"condition.pooled has {pooled.shape[-1]} features, the image model takes {width}: give the text "
                "encoders that belong to it"
            )
        return {
            "time_ids": size,
            "text_embeds": z.new_zeros(n, width) if pooled is None else pooled.to(z.dtype),
        }


def _pairs(block: Any) -> Iterator[tuple[Any, Any]]:
    """(residual block, the attention after it or None) of a block of diffusers' U-Net."""
    return zip_longest(block.resnets, getattr(block, "attentions", ()))


def timestep(level: Tensor) -> Tensor:
    """Noise level 0…1 → Stable Diffusion's time step 0…999, between two where the level is.

    √β rises linearly from √0.00085 to √0.012 in 1000 steps (Rombach et al. 2022's released code).
    """
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=level.device) ** 2
    signal = torch.cumprod(1 - beta, dim=0)  # α²
    levels = noise_level(signal.sqrt(), (1 - signal).sqrt())
    above = torch.searchsorted(levels, level.float().contiguous()).clamp(1, 999)
    low, high = levels[above - 1], levels[above]
    return (above - 1 + (level.float() - low) / (high - low)).clamp(0, 999)


def load_unet(folder: str) -> Any:
    """The UNet2DConditionModel in a folder, or in its `unet`, in float32. Raises ValueError: what is wrong."""
    try:
        from diffusers import UNet2DConditionModel
    except ImportError as e:
        raise ValueError(
            f"spatial={folder} needs diffusers: pip install -e '.[diffusers]' in the clone"
        ) from e
    path = Path(folder) / "unet" if (Path(folder) / "unet").is_dir() else Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"spatial={folder} holds no config.json: give a folder of a diffusers U-Net or pipeline"
        )
    config = UNet2DConditionModel.load_config(path)
    if config.get("_class_name") != "UNet2DConditionModel":
        raise ValueError(f"spatial={folder} holds a {config.get('_class_name')}: give a UNet2DConditionModel")
    if torch.get_default_device().type == "meta":  # its shapes are asked for
        unet = UNet2DConditionModel.from_config(config)
    else:
        unet = UNet2DConditionModel.from_pretrained(path, torch_dtype=torch.float32)
    if other := _beyond_stable_diffusion(unet.config):
        raise ValueError(f"spatial={folder} has {other}: only Stable Diffusion 1.x, 2.x and XL can be taken")
    return unet


def _beyond_stable_diffusion(config: Any) -> str | None:
    """The first option of a UNet2DConditionModel that `DiffusersUNet` does not follow."""
    for block in (*config.down_block_types, config.mid_block_type, *config.up_block_types):
        if block not in BLOCKS:
            return block
    none = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "timestep_post_act")
    wrong = [name for name in (*none, "center_input_sample", "dual_cross_attention") if config[name]]
    if config.addition_embed_type not in (None, "text_time"):
        wrong.append("addition_embed_type")
    return f"{wrong[0]}={config[wrong[0]]}" if wrong else None
