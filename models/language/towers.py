"""What a vision–language model sees with: any vision model of `transformers` or open_clip, and our ViViT.

All are called as

    features = tower(clips)      [B, T, 3, H, W] → [B, t, h, w, width]

An image is a clip of one frame. Towers of images see each frame by itself (t = T); a video tower joins frames.
Class tokens and registers are left out. Pixels are scaled as the tower's own preprocessing has it: `mean`, `std`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from models.encoders import vivit_file
from models.encoders.vivit import ViViT
from models.hub import MissingModel, transformers_weights, whole

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIVIT = "vivit:"
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

EVERYWHERE = ("head_dim", "rope_theta", "rope_scaling", "dtype")  # options that models know and do not list


class Tower(nn.Module):
    """See the top of this file.

    width: of its features. step: frames, rows and columns of a feature. size: pixels of a side it was made for.
    mean, std: (c − mean) / std is what it takes for a colour c of 0…1.
    """

    width: int
    step: tuple[int, int, int]
    size: int
    mean: tuple[float, ...] = HALF[0]
    std: tuple[float, ...] = HALF[1]

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of the features of a clip. Raises ValueError for sides that are no multiple of a patch.

        At its own size a tower may leave some pixels out: 384 has 27 patches of 14.
        """
        _, p, q = self.step
        if (height % p or width % q) and (height, width) != (self.size, self.size):
            raise ValueError(
                f"frames of {height}×{width} pixels do not divide into patches of {p}×{q}: choose sizes that do"
            )
        return -(-frames // self.step[0]), height // p, width // q

    def each(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Clips [T, 3, H, W] of any shapes → [t, h, w, width] each, in one pass for all of a shape."""
        seen: dict[int, Tensor] = {}
        for numbers in alike(clips, lambda clip: clip.shape):
            seen |= zip(numbers, self(torch.stack([clips[i] for i in numbers])), strict=True)
        return [seen[i] for i in range(len(clips))]


class FrameTower(Tower):
    """Sees frames one by one; a subclass has `see`: [N, 3, H, W] → [N, before + h·w, width], patches row by row.

    before: class token and registers.
    """

    before: int

    def forward(self, clips: Tensor) -> Tensor:
        t, h, w = self.grid(clips.shape[1], *clips.shape[3:])
        seen = self.see(clips.flatten(0, 1))[:, -h * w :]
        return seen.unflatten(0, (-1, t)).unflatten(2, (h, w))

    def each(self, clips: Sequence[Tensor]) -> list[Tensor]:
        seen: dict[int, Tensor] = {}
        for numbers in alike(clips, lambda clip: clip.shape[1:]):  # one pass for all frames of a size
            parts = self(torch.cat([clips[i] for i in numbers])[None])[0].split(
                [len(clips[i]) for i in numbers]
            )
            seen |= zip(numbers, parts, strict=True)
        return [seen[i] for i in range(len(clips))]

    def see(self, frames: Tensor) -> Tensor:
        raise NotImplementedError

    def _freeze_unused(self, kind: str) -> None:
        """What lies behind the layer that is looked at, or beside it, is not trained; found out on shapes alone.

        DDP wants a gradient of everything that is. Raises ValueError for a model that does not see plain pictures.
        """
        parameters = {
            name: torch.empty_like(p, device="meta").requires_grad_() for name, p in self.named_parameters()
        }
        buffers = {name: b.to("meta") for name, b in self.named_buffers()}
        blank = torch.empty(2, 3, self.size, self.size, device="meta")
        weights = {f"tower.{name}": x for name, x in (parameters | buffers).items()}
        _, h, w = self.grid(1, self.size, self.size)
        with torch.enable_grad():
            try:
                seen: Tensor = torch.func.functional_call(_Seeing(self), weights, (blank,))
                self.before = seen.shape[1] - h * w
                if len(seen) != 2 or self.before < 0:
                    raise ValueError(f"it gives {list(seen.shape)} of two pictures of {h}×{w} patches")
            except (TypeError, ValueError, RuntimeError) as e:
                raise ValueError(
                    f"tower {kind} takes no plain pictures: name a CLIP, SigLIP, DINO or ViT model"
                ) from e
            seen.sum().backward()
        for name, p in self.named_parameters():
            if parameters[name].grad is None:
                p.requires_grad_(False)


class _Seeing(nn.Module):
    """`see` as a module's call."""

    def __init__(self, tower: FrameTower):
        super().__init__()
        self.tower = tower

    def forward(self, frames: Tensor) -> Tensor:
        return self.tower.see(frames)


def alike(clips: Sequence[Tensor], key: Callable[[Tensor], Any]) -> list[list[int]]:
    """Their numbers, together where they have the same key."""
    groups: dict[Any, list[int]] = {}
    for i, clip in enumerate(clips):
        groups.setdefault(key(clip), []).append(i)
    return list(groups.values())


class TransformersTower(FrameTower):
    """A vision model of `transformers`.

    Args:
        model: takes `pixel_values` and gives hidden states (CLIP, SigLIP, DINOv2, ViT, …).
        layer: of its hidden states, counted as `transformers` does: −2 is the one before the last, as LLaVA has it.
    """

    def __init__(self, model: Any, layer: int = -2):
        super().__init__()
        config = model.config
        depth = config.num_hidden_layers
        if not -depth - 1 <= layer <= depth:
            raise ValueError(
                f"layer {layer}: the tower has hidden states 0 to {depth}, or −1 to {-depth - 1}"
            )
        self.model, self.layer = model, layer
        if not isinstance(
            getattr(config, "image_size", None), int
        ):  # SigLIP 2's NaFlex: of any number of patches
            raise ValueError(
                f"tower {config.model_type} takes no plain pictures: name a CLIP, SigLIP, DINO or ViT model"
            )
        self.width, self.size = config.hidden_size, config.image_size
        self.step = (1, config.patch_size, config.patch_size)
        self.interpolates = "interpolate_pos_encoding" in signature(type(model).forward).parameters
        kind = config.model_type
        self.mean, self.std = (CLIP_MEAN, CLIP_STD) if "clip" in kind and "siglip" not in kind else HALF
        if kind.startswith(("dino", "ijepa")):
            self.mean, self.std = IMAGENET
        self._freeze_unused(kind)

    def see(self, frames: Tensor) -> Tensor:
        own = frames.shape[-2:] == (self.size, self.size)  # other sides: positions are interpolated
        more = {} if own or not self.interpolates else {"interpolate_pos_encoding": True}
        return self.model(pixel_values=frames, output_hidden_states=True, **more).hidden_states[self.layer]


class OpenClipTower(FrameTower):
    """The vision transformer of an open_clip model (`model.visual`), its own or timm's.

    Args:
        layer: −1 the last block's output, −2 that of the one before.
    """

    def __init__(self, visual: Any, layer: int = -2):
        super().__init__()
        if layer >= 0:
            raise ValueError(f"layer {layer}: count open_clip's blocks from the end, −1 the last")
        if not hasattr(visual, "trunk") and not hasattr(visual, "transformer"):
            raise ValueError(
                f"tower: open_clip's {type(visual).__name__} has no tokens: name a vision transformer"
            )
        self.model, self.layer = visual, layer
        size, patch = visual.image_size, visual.patch_size if hasattr(visual, "patch_size") else None
        if patch is None:
            embed = getattr(visual.trunk, "patch_embed", None)
            if embed is None:
                raise ValueError("tower: this model of timm has no patches: name a vision transformer")
            patch = embed.patch_size
        sides = patch if isinstance(patch, tuple) else (patch, patch)
        self.step, self.size = (1, sides[0], sides[1]), size if isinstance(size, int) else size[0]
        self.width = visual.trunk.embed_dim if hasattr(visual, "trunk") else visual.conv1.out_channels
        told = getattr(visual, "preprocess_cfg", None) or {}
        self.mean = tuple(visual.image_mean or told.get("mean") or CLIP_MEAN)
        self.std = tuple(visual.image_std or told.get("std") or CLIP_STD)
        self._freeze_unused("open_clip's")

    def see(self, frames: Tensor) -> Tensor:
        given = self.model.forward_intermediates(
            frames, indices=[self.layer], stop_early=True, intermediates_only=True, output_fmt="NLC"
        )
        return given["image_intermediates"][0]


class ViViTTower(Tower):
    """Our video transformer; a clip too short for a tubelet, as an image is, has its last frame again."""

    def __init__(self, model: ViViT, size: int):
        super().__init__()
        self.model, self.size = model, size
        self.width, self.step = model.embed.out_channels, model.tubelet

    def forward(self, clips: Tensor) -> Tensor:
        t, h, w = self.grid(clips.shape[1], *clips.shape[3:])
        if missing := t * self.step[0] - clips.shape[1]:
            clips = torch.cat([clips, clips[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        return self.model(clips.transpose(1, 2)).tokens.unflatten(2, (h, w))


def tower(what: str | dict[str, Any], layer: int = -2) -> Tower:
    """A tower as a recipe names it.

    Args:
        what: hub id or folder of a `transformers` model (of CLIP or SigLIP the vision part); 'open_clip:NAME' or
            'open_clip:NAME:PRETRAINED'; 'vivit:FOLDER', that clipmill train vivit wrote; or a configuration to begin
            from nothing: {'model_type': 'siglip_vision_model', …} as `transformers` has it, {'model_type': 'vivit',
            'frames': …, 'size': …, …} as `ViViT` does.

    Raises MissingModel or ValueError, one sentence with the fix.
    """
    if isinstance(what, dict):
        options = dict(what)
        if options.get("model_type") == "vivit":
            options.pop("model_type")
            return ViViTTower(ViViT(**options), options.get("size", 224))
        return TransformersTower(_from_config(options), layer)
    if what.startswith(VIVIT):
        path = what.removeprefix(VIVIT)
        try:
            made_of = vivit_file.options(path)
            network = ViViT(**made_of) if on_meta() else vivit_file.made(vivit_file.read(path), path)
        except ValueError as e:
            raise MissingModel(f"tower {what!r}: {e}") from e
        return ViViTTower(network, made_of.get("size", 224))
    if what.startswith("open_clip:"):
        import open_clip

        name, _, weights = what.removeprefix("open_clip:").partition(":")
        try:
            given = None if on_meta() else weights or None
            model = open_clip.create_model(name, given, device=torch.get_default_device())
            return OpenClipTower(model.visual, layer)
        except RuntimeError as e:
            raise MissingModel(
                f"tower {what!r}: open_clip cannot make it ({e}): see open_clip.list_pretrained()"
            ) from e
    seeing = TransformersTower(_pretrained(what), layer)
    seeing.mean, seeing.std = _scaling(what) or (seeing.mean, seeing.std)
    return seeing


def _scaling(model: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation of the pixels as its preprocessing has them, if it comes with one."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(model)
        return tuple(processor.image_mean), tuple(processor.image_std)
    except (OSError, ValueError, TypeError, AttributeError, ImportError):
        return None


def on_meta() -> bool:
    """Whether what is made now has shapes alone, and is given its weights later."""
    return torch.get_default_device().type == "meta"


def configuration(options: Mapping[str, Any]) -> Any:
    """A configuration of transformers by its model_type and options.

    Raises ValueError for an option that the model does not have, which transformers itself would keep and not use; and
    what `AutoConfig.for_model` does.
    """
    from transformers import AutoConfig

    given = dict(options)
    kind = given.pop("model_type", None)
    own = AutoConfig.for_model(kind)
    known = {*EVERYWHERE, *signature(type(own)).parameters}
    if unknown := [name for name in given if name not in known and not hasattr(own, name)]:
        close = get_close_matches(unknown[0], [*known, *vars(own)], 1)
        meant = f"; {close[0]} is one" if close else ""
        raise ValueError(f"{kind} has no option {unknown[0]!r}{meant}")
    return AutoConfig.for_model(kind, **given)


def _from_config(options: dict[str, Any]) -> Any:
    from transformers import AutoModel

    kind = options.get("model_type")
    try:
        return AutoModel.from_config(configuration(options))
    except (KeyError, ValueError, TypeError) as e:
        raise ValueError(f"tower: transformers makes no vision model of type {kind!r}: {e}") from e


def _pretrained(model: str) -> Any:
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(model)
        vision = getattr(config, "vision_config", config)
        if on_meta():
            return AutoModel.from_config(vision, dtype=torch.float32)
        transformers_weights(model)
        unread = ("pooler", "head")  # features are hidden states
        return whole(AutoModel.from_pretrained, model, without=unread, config=vision, dtype=torch.float32)
    except (OSError, KeyError, ValueError) as e:
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise MissingModel(
            f"tower {model!r} is none that transformers loads ({first}): name a vision model"
        ) from e
