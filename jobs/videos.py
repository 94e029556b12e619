"""Videos to look at: mp4 files and contact sheets. A video is uint8 [T, H, W, 3]."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

FRAMES, HEIGHT, WIDTH = 8, 96, 1400  # of a contact sheet: pictures a row, their height, most of the whole
LINE = 20  # pixels, of words


def taken(out: Path) -> bool:
    """Whether a folder to write into is there already with something in it, or is a file."""
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def check(video: np.ndarray) -> None:
    """Raises ValueError for another type or shape."""
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or not len(video):
        raise ValueError(f"a sample is {video.dtype} {list(video.shape)}: give uint8 [T, H, W, 3]")


def write_mp4(path: Path, video: np.ndarray, fps: float, side: int = 1, crf: int = 18) -> None:
    """H.264 of every frame once, with the settings of the mill's clips.

    Args:
        side: pixels that the shorter side has at least, for a browser: smaller pictures and such with odd sides are
            enlarged by whole pixels, so that halved chroma (4:2:0) costs them no colour.

    Raises ValueError for another type or shape, FFmpegError.
    """
    from pipeline.io.ffmpeg import encode_rgb
    from pipeline.recipe import Cut
    from pipeline.split.encode import encoder

    check(video)
    odd = any(length % 2 for length in video.shape[1:3])
    if side > 1:
        times = -(-side // min(video.shape[1:3]))
        times += times % 2 if odd else 0
        video, odd = video.repeat(times, 1).repeat(times, 2), False
    height, width = video.shape[1:3]
    coded = [str(x) for k, v in encoder(Cut(crf=crf), fps).items() for x in (f"-{k}", v)]
    output = ["-pix_fmt", "yuv444p" if odd else "yuv420p", *coded, "-bitexact", "-movflags", "+faststart"]
    pictures = np.ascontiguousarray(video).tobytes()
    encode_rgb(pictures, width, height, fps, [*output, "-y", "-f", "mp4", f"file:{path}"], stall_s=120)


def contact_sheet(videos: dict[str, np.ndarray]) -> Image.Image:
    """A row of at most 8 frames, from the first to the last, for every video, its name below."""
    from PIL import Image, ImageDraw, ImageFont

    rows = [row_of(video) for video in videos.values()]
    total = max(320, *(row.width for row in rows))
    font = ImageFont.load_default(size=15)
    texts = []
    for name in videos:
        letters = 0.9 * (total - 16) / max(font.getlength(name) / max(len(name), 1), 1)
        texts.append(textwrap.wrap(name, max(int(letters), 1)))
    height = sum(row.height + LINE * len(lines) + 16 for row, lines in zip(rows, texts, strict=True))
    sheet = Image.new("RGB", (total + 16, height + 8), "white")
    draw, top = ImageDraw.Draw(sheet), 8
    for row, lines in zip(rows, texts, strict=True):
        sheet.paste(row, (8, top))
        draw.multiline_text((8, top + row.height + 4), "\n".join(lines), "black", font, spacing=2)
        top += row.height + LINE * len(lines) + 16
    return sheet


def row_of(video: np.ndarray) -> Image.Image:
    """Frames side by side, 2 pixels apart, at most WIDTH in all."""
    from PIL import Image

    check(video)
    chosen = video[np.linspace(0, len(video) - 1, min(len(video), FRAMES)).round().astype(int)]
    width = max(1, round(HEIGHT * video.shape[2] / video.shape[1]))
    how = Image.Resampling.NEAREST if video.shape[1] < HEIGHT else Image.Resampling.LANCZOS
    row = Image.new("RGB", (len(chosen) * (width + 2) - 2, HEIGHT), "white")
    for i, frame in enumerate(chosen):
        row.paste(Image.fromarray(frame).resize((width, HEIGHT), how), (i * (width + 2), 0))
    row.thumbnail((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    return row
