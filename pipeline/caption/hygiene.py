"""What is odd about a caption, as named flags beside the untouched text.

The table below says what each flag means; rules read them as `caption_flags`, and `choose.avoid` names those with
which a caption stands only where no other does.
"""

from __future__ import annotations

from pipeline.record import Caption, Clip, Video

FLAGS: dict[str, str] = {}


def tidy(caption: Caption, video: Video, clip: Clip) -> None:
    """Give a caption its flags, and its text what is not the model's own to say; `raw` keeps what was said."""
