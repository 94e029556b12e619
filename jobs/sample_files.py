"""What `clipmill sample` writes: mp4 files, a contact sheet, and what they were drawn with."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def file_name(number: int, prompt: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", f"{number:03d} {prompt}".lower()).strip("-")[:60]
    return f"{slug}.mp4"


def write_videos(
    folder: Path,
    videos: Mapping[str, np.ndarray],
    rows: list[dict[str, Any]],
    used: dict[str, Any],
    fps: float,
) -> None:
    """Args: videos: file → uint8 [T, H, W, 3]. rows: what is said of each. used: see `said`."""
    from jobs.videos import contact_sheet, write_mp4

    for name, video in videos.items():
        write_mp4(folder / name, video, fps)
    names = {row["file"]: f"{i:03d} {row['name']}".strip() for i, row in enumerate(rows)}
    contact_sheet({names[name]: video for name, video in videos.items()}).save(folder / "sheet.png")
    for name, content in (("samples", rows), ("sampling", used)):
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def said(used: dict[str, Any]) -> str:
    """A line a model."""
    lines = []
    for folder, how in used["models"].items():
        words = ", ".join(f"{name} {value}" for name, value in how.items())
        lines.append(f"{folder}: {words}, seed {used['seed']}")
    return "\n".join(lines)


WRITTEN = re.compile(
    r"\d{3}[-a-z0-9]*\.mp4|sheet\.png|samples\.json|sampling\.json|eval\.json|captions\.json"
)


@contextlib.contextmanager
def new_folder(out: Path, replace: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when all is there, and then holds nothing else.

    Raises ValueError where `out` is in use, or holds other things than a sampling writes.
    """
    held = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    if held and not replace:
        raise ValueError(
            f"--out {out} is not empty, and one folder holds one sampling: name another, or give --replace to put this "
            "one in place of an earlier one"
        )
    if foreign := next((name for name in held if not WRITTEN.fullmatch(name)), None):
        raise ValueError(f"--out {out} holds {foreign}, which no sampling wrote: name another folder")
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if out.exists():
            shutil.rmtree(out)
        aside.replace(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
