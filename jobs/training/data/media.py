"""Pictures and videos that somebody hands in, by name, address or bytes: the same pixels wherever they lie."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from pipeline.faults import StoreError
from pipeline.io.store import Store
from pipeline.shards.pixels import BrokenSample
from pipeline.split import shown
from pipeline.split.opening import DecodeError

Media = bytes | str  # a video or a picture, or where it lies


@dataclass(frozen=True)
class Visual:
    """A picture or clip as it is looked at.

    frames: uint8 [T, 3, H, W]. seconds: of each, () of a picture. text: what is written about it.
    codes: int64 [N, codes of a frame], of a model that made it of codes.
    """

    frames: Tensor
    seconds: tuple[float, ...] = ()
    duration: float = 0.0
    text: str = ""
    codes: Tensor | None = None


def at_hand(media: Media) -> Media:
    """Bytes of a clip, or a file of this machine. Raises BrokenSample."""
    if isinstance(media, bytes):
        return media
    if "://" not in media:
        return here(media)
    folder, _, name = media.rpartition("/")
    try:
        return Store(folder).read_bytes(name)
    except (StoreError, OSError) as e:
        raise BrokenSample(f"{media}: {e}") from e


def here(media: str) -> str:
    """The same name, of a file of this machine made sure of; addresses are not looked at. Raises BrokenSample."""
    if "://" not in media and not Path(media).is_file():
        raise BrokenSample(f"{media} is not there")
    return media


def as_shown(
    media: Media, numbers: Sequence[int], size: Callable[[float], shown.Size] | None = None
) -> np.ndarray:
    """Frames of a video as the mill sees sources, uint8 [T, H, W, 3]. Raises BrokenSample.

    Args:
        media: at hand. numbers, size: see `pipeline.split.shown.read`.
    """
    if isinstance(media, bytes):
        with tempfile.NamedTemporaryFile(suffix=".video") as file:
            file.write(media)
            file.flush()
            return as_shown(file.name, numbers, size)
    try:
        return shown.read(media, size, numbers=numbers).pictures
    except DecodeError as e:
        raise BrokenSample(f"{media}: {e}") from e
