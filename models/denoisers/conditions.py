"""What the denoisers share: how text, known frames and a low-resolution video enter; latents to patches and back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.attention import Mask
from models.diffusion.condition import Condition


class Caption(nn.Module):
    """Text features as a network wants them: padding 0, and a learned token where there is no text."""

    def __init__(self, width: int):
        super().__init__()
        self.null = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, condition: Condition, batch: int) -> tuple[Tensor, Tensor]:
        """[B, L, W] and bool [B, L], True where a token is: at least one in every row."""
        text, mask = condition.text, condition.text_mask
        if text is None:
            null = self.null.expand(batch, 1, -1)
            return null, torch.ones(null.shape[:2], dtype=torch.bool, device=null.device)
        check_text(text, len(self.null))
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        # in the first place of rows without a token; no shape depends on the data
        stand_in = (~mask.any(dim=1, keepdim=True)) & (torch.arange(text.shape[1], device=text.device) == 0)
        text = torch.where(stand_in[..., None], self.null.to(text.dtype), text)
        mask = mask | stand_in
        return torch.where(mask[..., None], text, 0.0), mask


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU("tanh"), nn.Linear(hidden, outputs))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def input_channels(channels: int, context: bool, upsample: bool) -> int:
    """Of what `with_conditions` returns."""
    return channels + (channels + 1) * context + channels * upsample


def with_conditions(z: Tensor, condition: Condition, context: bool, upsample: bool) -> Tensor:
    """z and what is known of the video, as further channels: [B, C (+ C + 1) (+ C), T, h, w].

    Without known frames those channels are 0, as for a text-to-video sample of a model that knows both.
    Raises ValueError for a field that the model was not built to take, or lacks.
    """
    known, mask, low = condition.known, condition.known_mask, condition.low
    if not 0 <= condition.images <= z.shape[2]:
        raise ValueError(f"condition.images={condition.images}, but there are only {z.shape[2]} frames")
    if (known is not None or mask is not None) and not context:
        raise ValueError("condition.known: this model takes no known frames; build it with context=True")
    if (known is None) != (mask is None):
        raise ValueError("condition.known and condition.known_mask belong together: give both or neither")
    if (low is not None or condition.low_level is not None) and not upsample:
        raise ValueError(
            "condition.low: this model takes no low-resolution video; build it with upsample=True"
        )
    if upsample and low is None:
        raise ValueError("condition.low is missing: this model upsamples; give it the low-resolution video")
    parts = {"z": z}
    if context:
        parts["condition.known"] = torch.zeros_like(z) if known is None else known
        mask = z.new_zeros(1, 1, 1, 1, 1) if mask is None else mask
        parts["condition.known_mask"] = mask.expand(len(z), 1, *z.shape[2:])
    if low is not None:
        parts["condition.low"] = low
    for name, part in parts.items():
        if part.shape[2:] != z.shape[2:]:
            raise ValueError(
                f"{name} has shape {tuple(part.shape)}, z {tuple(z.shape)}: bring it to z's size"
            )
    return torch.cat([part.to(z.dtype) for part in parts.values()], dim=1) if len(parts) > 1 else z


def low_level(level: Tensor, condition: Condition) -> Tensor:
    """[B], of the noise on `condition.low`; 0 where it is not said."""
    return torch.zeros_like(level) if condition.low_level is None else condition.low_level


def no_text(condition: Condition) -> None:
    """Raise ValueError where a model without text is given one."""
    if condition.text is not None:
        raise ValueError("condition.text: this model takes no text; build it with a text_width")


def check_text(text: Tensor, width: int) -> None:
    """Raise ValueError for text [B, L, W] of another width than the model was built for."""
    if text.shape[-1] != width:
        raise ValueError(
            f"condition.text has {text.shape[-1]} features a token, the model was built for {width}: "
            "use the text encoder it was trained with"
        )


def over_time(layer: Callable[[Tensor], Tensor], x: Tensor, mask: Mask | None) -> Tensor:
    """What attention over time adds to x [B, T, …]: 0 for independent images and for a clip of one frame.

    So pictures depend on no temporal layer, however they come. An empty batch goes through where there are none but
    pictures, since every parameter is to take part in every step.

    Args:
        mask: `Mask.frames`, or None where all frames are the clip's.
    """
    moving = x.shape[1] if mask is None else mask.moving
    if moving <= 1:
        return torch.cat([layer(x[:0]), torch.zeros_like(x)])
    if mask is None:
        return layer(x)
    return torch.cat([layer(x[:, :moving]), torch.zeros_like(x[:, moving:])], dim=1)


def patchify(z: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B, C, T, h, w] → [B, T/p, h/q, w/r, p·q·r·C] for patch (p, q, r)."""
    if any(size % side for size, side in zip(z.shape[2:], patch, strict=True)):
        shape, sides = ("×".join(map(str, sizes)) for sizes in (z.shape[2:], patch))
        raise ValueError(f"latents of {shape} do not divide into patches of {sides}: choose sizes that do")
    p, q, r = patch
    z = z.unflatten(4, (-1, r)).unflatten(3, (-1, q)).unflatten(2, (-1, p))  # B C T p h q w r
    return z.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4)


def unpatchify(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Undoes `patchify`."""
    x = x.unflatten(4, (*patch, -1)).permute(0, 7, 1, 4, 2, 5, 3, 6)  # B C T p h q w r
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
