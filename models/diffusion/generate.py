"""What a trained denoiser is for: prediction, extension, interpolation, super-resolution, and Video LDM's cascade.

`drawer` binds a network, its process, a sampler and its guidance into a function

    draw(shape [B, C, T, h, w], condition) → latents

and every task is a short function over such a function:

    text → video             draw(shape, Condition(text, text_mask))
    image → video            draw(shape, with_known(condition, image, [0], T))
    prediction               draw(shape, with_known(condition, first_frames, range(K), T))
    any length               extend(draw, first_frames, frames, block, context, condition)
    frames between           interpolate(draw, keys, factor, window, condition)
    larger frames            upsample(draw, low, condition)
    keys → frames → pixels   cascade(keyframes, between, decode, sharpen)

An autoencoder that joins frames gives the first frame of a clip a latent of its own and joins those after it, so what
goes on from a video, or lies between frames, is encoded anew as the beginning of a clip: `extend_frames`,
`interpolate_frames`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from models.diffusion.condition import Condition
from models.diffusion.guidance import classifier_free, reconstruction, replacement
from models.diffusion.objective import Process, at_level
from models.diffusion.samplers import Sampler, dpmpp_2m, normal, timesteps

Shape = tuple[int, int, int, int, int]
Draw = Callable[[Shape, Condition], Tensor]


def drawer(
    model: nn.Module,
    process: Process,
    *,
    sampler: Sampler = dpmpp_2m,
    steps: int = 32,
    spacing: Literal["time", "logsnr"] = "time",
    guidance: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
    tell_known: bool = True,
    reconstruct: float = 0.0,
    retime: Callable[[Tensor, Shape], Tensor] = lambda times, shape: times,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Draw:
    """How latents are drawn from one network, in eval mode.

    Where the condition has known frames, they are in the result exactly, and the others are made to fit by
    what the network was trained for (`tell_known`), by reconstruction guidance, or by both.

    Args:
        sampler: of `models.diffusion.samplers`; options of its own are bound with `functools.partial`.
        guidance, interval, rescale: `guidance.classifier_free`.
        tell_known: pass `condition.known` to the network; False for one that was not trained with it.
        reconstruct: w_r of `guidance.reconstruction` for known frames; 0 is none.
        retime: what the training did to the times of latents of such a shape; not of steps equal in log SNR.
        generator: of all the noise, on any device.
    """
    evenly = timesteps(steps, process.schedule, spacing, process.start)

    @torch.no_grad()
    def draw(shape: Shape, condition: Condition) -> Tensor:
        times = retime(evenly, shape) if spacing == "time" else evenly
        known, held = condition.known, condition.settled
        told = condition if tell_known else replace(condition, known=None, known_mask=None)
        denoise = classifier_free(model, process, told, guidance, interval=interval, rescale=rescale)
        if known is not None and held is not None:
            if reconstruct:
                seen = partial(torch.mul, held.to(device, dtype))
                denoise = reconstruction(denoise, process.schedule, seen(known), seen, reconstruct)
            denoise = replacement(denoise, known, held)
        z = normal(torch.empty(shape, dtype=dtype, device=device), generator)
        return sampler(denoise, z, times, process.schedule, generator)

    return draw


# --- known frames -------------------------------------------------------------------------------------------


def with_known(
    condition: Condition, frames: Tensor, at: Sequence[int], total: int, held: Sequence[int] | None = None
) -> Condition:
    """The condition with frames [B, C, K, h, w] given at K places among `total`; those `held` are in the result (all).

    Raises ValueError where the places do not fit the frames or lie outside.
    """
    places = list(at)
    if len(places) != frames.shape[2] or len(set(places)) != len(places):
        raise ValueError(f"{frames.shape[2]} known frames for places {places}: give one place to each")
    if places and not 0 <= min(places) <= max(places) < total:
        raise ValueError(f"known frames at {places} do not lie within {total} frames")
    b, c, _, h, w = frames.shape
    known = frames.new_zeros(b, c, total, h, w)
    mask, fixed = frames.new_zeros(2, b, 1, total, 1, 1)
    known[:, :, places] = frames
    mask[:, :, places] = 1
    if held is None:
        return replace(condition, known=known, known_mask=mask, held=None)
    fixed[:, :, list(held)] = 1
    return replace(condition, known=known, known_mask=mask, held=fixed)


def extend(draw: Draw, first: Tensor, frames: int, block: int, context: int, condition: Condition) -> Tensor:
    """A video of any length, block after block, each given the last frames before it (Ho et al. 2022, sec. 3.1).

    Args:
        first: [B, C, K, h, w] with K ≥ context: an image, a video, or a block that was drawn.
        frames: of the result, `first` among them.
        block: frames the network draws at a time.
        context: how many of them are the last of those before; 1 ≤ context < block.

    Returns:
        [B, C, frames, h, w]
    """
    if not 1 <= context < block:
        raise ValueError(f"{context} frames of context in a block of {block}: give 1 to {block - 1}")
    if first.shape[2] < context:
        raise ValueError(f"{first.shape[2]} first frames are fewer than the {context} frames of context")
    b, c, _, h, w = first.shape
    video = first
    while video.shape[2] < frames:
        given = with_known(condition, video[:, :, -context:], range(context), block)
        video = torch.cat([video, draw((b, c, block, h, w), given)[:, :, context:]], dim=2)
    return video[:, :, :frames]


def extend_frames(
    draw: Draw,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    video: Tensor,
    frames: int,
    block: Shape,
    context: int,
    joined: int,
    condition: Condition,
) -> Tensor:
    """`extend` under a causal autoencoder: each block begins with the last frames before it, encoded as a beginning.

    Args:
        encode, decode: video [B, T, …] → latents [B, C, T', h, w] and back.
        video: [B, T, …], all of which is in the result.
        block: of the latents that the network draws at a time.
        context: latent frames of it that are given; fewer where the video is shorter.
        joined: frames that a latent joins, but for the first.

    Returns:
        [B, frames, …]
    """
    if not 1 <= context < block[2]:
        raise ValueError(f"{context} frames of context in a block of {block[2]}: give 1 to {block[2] - 1}")
    while video.shape[1] < frames:
        k = min(context, 1 + (video.shape[1] - 1) // joined)
        last = 1 + (k - 1) * joined
        given = with_known(condition, encode(video[:, -last:]), range(k), block[2])
        video = torch.cat([video, decode(draw(block, given))[:, last:]], dim=1)
    return video[:, :frames]


def key_places(keys: int, factor: int) -> range:
    """Where key frames come to lie: 0, r, 2r, … of r (T − 1) + 1 frames."""
    return range(0, factor * (keys - 1) + 1, factor)


def interpolate(draw: Draw, keys: Tensor, factor: int, window: int, condition: Condition) -> Tensor:
    """Frames between key frames (Blattmann et al. 2023, sec. 3.2.2).

    Windows share a key frame, which is in both exactly, so each is drawn for itself.

    Args:
        keys: [B, C, T, h, w]
        factor: r, steps from one key frame to the next.
        window: frames the network draws at a time, more than r; its key frames are at 0, r, 2r, … Those it
            draws after its last key frame are dropped.

    Returns:
        [B, C, r (T − 1) + 1, h, w], the key frames at `key_places(T, r)`
    """
    b, c, total, h, w = keys.shape
    parts = [keys[:, :, :1]]
    for first, start, stop in _windows(total - 1, window, factor):
        places = key_places(stop - first + 1, factor)
        given = with_known(condition, keys[:, :, first : stop + 1], places, window)
        drawn = draw((b, c, window, h, w), given)
        parts.append(drawn[:, :, factor * (start - first) + 1 : factor * (stop - first) + 1])
    return torch.cat(parts, dim=2)


def interpolate_frames(
    draw: Draw,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    keys: Tensor,
    factor: int,
    window: Shape,
    joined: int,
    condition: Condition,
) -> Tensor:
    """`interpolate` under a causal autoencoder, as a network is trained for it: see `Condition.held`.

    A key frame is the last that a latent stands for, and is told by the latent that it has as a video of its own. The
    first of a window is that frame.

    Args:
        keys: [B, K, …]; encode, decode: as `extend_frames`.
        factor: r, latents from one key frame to the next; window: of latents, more than r in time.
        joined: s, frames that a latent joins, but for the first.

    Returns:
        [B, r s (K − 1) + 1, …], what is drawn for the key frames at `key_places(K, r s)`, the first as it was given
    """
    alone = torch.cat([encode(keys[:, i : i + 1]) for i in range(keys.shape[1])], dim=2)  # B C K h w
    step = factor * joined
    parts = [keys[:, :1]]
    for first, start, stop in _windows(keys.shape[1] - 1, window[2], factor):
        places = key_places(stop - first + 1, factor)
        given = with_known(condition, alone[:, :, first : stop + 1], places, window[2], held=[0])
        drawn = decode(draw(window, given))
        parts.append(drawn[:, step * (start - first) + 1 : step * (stop - first) + 1])
    return torch.cat(parts, dim=1)


# --- super-resolution ---------------------------------------------------------------------------------------


def upsample(
    draw: Draw,
    low: Tensor,
    condition: Condition,
    *,
    level: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Latents of a sharper video like `low`, by a network that is told of it.

    Args:
        low: [B, C, T, h, w], brought to the size of the result (say enlarged, then encoded).
        level: angle of noise 0…1 added to it, for a network trained with `low_level`, against the faults of a
            `low` that was drawn too (Ho et al. 2022b, cascaded diffusion); none: it is told as it is.
    """
    b, c, t, h, w = low.shape
    if level is None:
        return draw((b, c, t, h, w), replace(condition, low=low))
    levels = torch.full((b,), level, device=low.device)
    noisy = at_level(low, levels.to(low.dtype), normal(low, generator))
    return draw((b, c, t, h, w), replace(condition, low=noisy, low_level=levels))


def cascade(
    keyframes: Callable[[], Tensor],
    between: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    sharpen: Callable[[Tensor], Tensor] | None = None,
    *,
    times: int = 2,
) -> Tensor:
    """Video LDM whole: key frames → frames between, `times` times by one network → pixels → more pixels.

    Blattmann et al. 2023, fig. 5: key frames at 1.875 a second, 7.5 and 30 after two interpolations by 4.

    Args:
        keyframes: () → latents [B, C, T, h, w].
        between: latents of T frames → of r (T − 1) + 1, say `partial(interpolate, draw, factor=4, …)`.
        decode: latents → video [B, 3, T, H, W].
        sharpen: video → larger video; none: not upsampled.
    """
    latents = keyframes()
    for _ in range(times):
        latents = between(latents)
    video = decode(latents)
    return video if sharpen is None else sharpen(video)


def _windows(steps: int, window: int, factor: int) -> Iterator[tuple[int, int, int]]:
    """(first key frame, the one from which frames are new, last) of windows over so many steps between key frames.

    The last begins earlier where it would hold fewer key frames than those before it.
    Raises ValueError where a window is too short.
    """
    if factor < 1 or window <= factor:
        raise ValueError(f"a window of {window} frames holds no two key frames {factor} apart")
    size = (window - 1) // factor
    for start in range(0, steps, size):
        stop = min(start + size, steps)
        yield max(0, stop - size), start, stop
