"""What a prompt says of when its frames are, where nothing else tells a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Told = Callable[[Sequence[float], float], str]  # seconds of the frames, of the whole clip → a sentence


def plain(seconds: Sequence[float], duration: float) -> str:
    """As the mill's captioners are told; '' of a single frame."""
    if len(seconds) == 1:
        return ""
    when = ", ".join(f"{s:.1f}" for s in seconds)
    return f"These {len(seconds)} frames of one video of {duration:.1f} seconds are shown at {when} seconds."


def llava_next(seconds: Sequence[float], duration: float) -> str:
    """As LLaVA-NeXT-Video is told."""
    times = ",".join(f"{s:.2f}s" for s in seconds)
    return (
        f"The video lasts for {duration:.2f} seconds, and {len(seconds)} frames are uniformly sampled from it. "
        f"These frames are located at {times}."
    )


TOLD: dict[str, Told] = {"none": lambda seconds, duration: "", "prompt": plain, "llava_next": llava_next}
