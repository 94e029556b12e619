"""The frames of an item's video, as the model that is asked looks at videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from jobs.benchmarks.items import Item
from pipeline.shards.pixels import BrokenSample

if TYPE_CHECKING:
    from jobs.speaking import Speaking
    from jobs.training.data.media import Visual

ENDS = 1 << 20  # bytes of a file's begin and end by which its weights are known

T = TypeVar("T")


def look(speaker: Speaking, item: Item) -> Visual:
    """Frames of the video, or of the stretch of it. Raises BrokenSample."""
    media = media_of(item)
    return speaker.frames(media) if item.span is None else speaker.stretch(media, *item.span)


def media_of(item: Item) -> str | bytes:
    """Its video's name, or the clip itself."""
    return str(item.video) if isinstance(item.video, Path) else item.video()


def seen(
    speaker: Speaking, items: Sequence[Item], size: int
) -> Iterator[tuple[list[tuple[Item, Visual]], dict[str, str]]]:
    """Batches of so many items with what is looked at, and of those that cannot be: id → why."""
    for at in range(0, len(items), size):
        found, broken = [], {}
        for item in items[at : at + size]:
            try:
                found.append((item, look(speaker, item)))
            except (BrokenSample, OSError) as e:
                broken[item.id] = " ".join(str(e).split())
        yield found, broken


def drawn(items: Sequence[T], n: int | None, seed: int) -> list[T]:
    """n of them, drawn by the seed, in their order; all where n is none or they are fewer."""
    import numpy as np

    if n is None or n >= len(items):
        return list(items)
    chosen = np.random.default_rng(seed).permutation(len(items))[:n]
    return [items[i] for i in sorted(chosen.tolist())]


def weights_of(folder: Path) -> str:
    """Names a model: 12 hex digits, of the sizes, begins and ends of its files of weights."""
    found = blake2b(digest_size=6)
    for path in sorted(
        [*folder.glob("*.safetensors"), *folder.glob("ema/*.safetensors"), *folder.glob("*.bin")]
    ):
        with path.open("rb") as f:
            size = path.stat().st_size
            found.update(f"{path.name} {size} ".encode() + f.read(ENDS))
            f.seek(max(0, size - ENDS))
            found.update(f.read(ENDS))
    return found.hexdigest()


def named(items: Sequence[Item]) -> str:
    """Names what is asked: 12 hex digits, of all items' ids and texts."""
    found = blake2b(digest_size=6)
    for item in items:
        told = (item.id, item.captions, item.question, item.options, item.answer, item.answers, item.span)
        found.update(repr(told).encode())
    return found.hexdigest()


Tell = Callable[[int, int], None]  # so many done of so many


def teller(what: str) -> Tell:
    """Says on stderr how far it is, at most every two seconds."""
    import sys
    import time

    last = [0.0]

    def tell(done: int, of: int) -> None:
        if time.monotonic() - last[0] > 2 or done == of:
            last[0] = time.monotonic()
            print(f"{what}: {done:,} of {of:,}", file=sys.stderr, flush=True)

    return tell
