"""What a model says beside what it should, in files and on the page.

texts/step-00000500.json  [{"wanted", "said", "frames"}, …], of the clips that are looked at, in order
texts/seen/<sha256>.jpg   "frames": the pictures that the model saw, side by side, once for all steps
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.videos import row_of
from pipeline.report.html import Child, Markup, div, h, join, note

if TYPE_CHECKING:
    from jobs.training.task import Told

FRAMES, STEPS = 4, 12  # on the page: pictures of a clip, earlier steps
STRIP_BYTES = 4_000_000  # of pictures on the page, together
WORD = re.compile(r"\w+|[^\w\s]")
NAMES = {  # what a model trains → title, what it says, what is wanted of it, both together
    "vivit": (
        "Labels",
        "named",
        "caption",
        "The likeliest label of each kind, beside the caption of the clip.",
    ),
    "selector": (
        "Choices",
        "it chooses",
        "chosen",
        "What it would choose of a clip’s candidates, beside the chosen caption.",
    ),
}
CAPTIONS = ("Captions", "it says", "chosen", "What it says of held-out clips, beside their chosen captions.")


def replace(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def write(root: Path, step: int, told: Sequence[Told]) -> None:
    """root/step-….json; it appears whole, after the pictures that it names."""
    (root / "seen").mkdir(parents=True, exist_ok=True)
    listed = []
    for t in told:
        row: dict[str, Any] = {"wanted": t.wanted, "said": t.said}
        if t.frames is not None:
            data = strip(t.frames.numpy())
            row["frames"] = f"seen/{hashlib.sha256(data).hexdigest()[:16]}.jpg"
            if not (root / row["frames"]).exists():
                replace(root / row["frames"], data)
        listed.append(row)
    replace(root / f"step-{step:08d}.json", json.dumps(listed, indent=1, ensure_ascii=False).encode())


def strip(video: np.ndarray) -> bytes:
    """A JPEG of some frames [T, H, W, 3] side by side, from the first to the last."""
    some = video[np.linspace(0, len(video) - 1, min(FRAMES, len(video))).round().astype(int)]
    data = io.BytesIO()
    row_of(some).save(data, "JPEG", quality=85)
    return data.getvalue()


def step_of(path: Path) -> int | None:
    """Of step-00000500 and step-00000500.json; None of other names."""
    found = re.fullmatch(r"step-(\d+)", path.stem)
    return int(found[1]) if found else None


def read(root: Path, last: int) -> dict[int, list[dict[str, Any]]]:
    """Step → what was said then, up to a step: what is beyond was before a resume. What cannot be read is left out."""
    found: dict[int, list[dict[str, Any]]] = {}
    for file in sorted(root.glob("step-*.json")):
        step = step_of(file)
        if step is None or step > last:
            continue
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        # an earlier version's were texts by caption
        if isinstance(told, list) and all(
            isinstance(row, dict) and {"wanted", "said"} <= row.keys() for row in told
        ):
            found[step] = told
    return found


# ---------------------------------------------------------------- the page


def section(root: Path, said: dict[int, list[dict[str, Any]]], trains: str) -> Markup | None:
    """A card a clip: what it shows, what is wanted and what is said now, with what was said at earlier steps."""
    if not said:
        return None
    newest = max(said)
    _, says, wants, about = NAMES.get(trains, CAPTIONS)
    cards, left = [], STRIP_BYTES
    for place, row in enumerate(said[newest]):
        shown: Markup | None = None
        file = root / row["frames"] if "frames" in row else None
        if file is not None and file.is_file() and (left := left - file.stat().st_size) > 0:
            source = "data:image/jpeg;base64," + base64.b64encode(file.read_bytes()).decode()
            shown = h("img", src=source, alt="frames of the clip", loading="lazy")
        alike = row["wanted"].strip().lower() == row["said"].strip().lower()
        differing = trains != "vivit" and not alike
        cards.append(
            h(
                "article",
                shown,
                h(
                    "dl",
                    h("dt", wants),
                    h(
                        "dd",
                        marked(row["wanted"], row["said"]) if differing else row["wanted"],
                        class_="words wanted",
                    ),
                    h("dt", says, h("b", " the same", class_="ink-kept") if alike else None),
                    h(
                        "dd",
                        marked(row["said"], row["wanted"]) if differing else row["said"] or "–",
                        class_="words",
                    ),
                ),
                earlier(said, newest, place, row["wanted"]),
                class_="told",
            )
        )
    return join(note(f"Step {newest:,}. {about}"), div("tolds", cards))


def title(trains: str) -> str:
    return NAMES.get(trains, CAPTIONS)[0]


def earlier(said: dict[int, list[dict[str, Any]]], newest: int, place: int, wanted: str) -> Markup | None:
    """What was said of the same clip before, the latest first."""
    rows: list[Child] = []
    for step in sorted((s for s in said if s != newest), reverse=True):
        at = said[step]
        if place < len(at) and at[place]["wanted"] == wanted:
            rows.append(
                h("tr", h("td", f"{step:,}", class_="num"), h("td", at[place]["said"] or "–", class_="words"))
            )
    if not rows:
        return None
    chosen = [
        rows[i] for i in sorted({round(i) for i in np.linspace(0, len(rows) - 1, min(len(rows), STEPS))})
    ]
    head = h("tr", h("th", "step", class_="num", scope="col"), h("th", "", scope="col"))
    return h("details", h("summary", "at earlier steps"), h("table", h("thead", head), h("tbody", chosen)))


def marked(text: str, other: str) -> list[Child]:
    """A text with the words marked that another does not have there."""
    places = [(m.start(), m.end()) for m in WORD.finditer(text)]
    words = [text[a:b].lower() for a, b in places]
    blocks = difflib.SequenceMatcher(None, words, WORD.findall(other.lower()), autojunk=False)
    found: list[Child] = []
    at = 0
    for what, first, end, *_ in blocks.get_opcodes():
        if what == "equal" or first == end:
            continue
        a, b = places[first][0], places[end - 1][1]
        found += [text[at:a], h("mark", text[a:b])]
        at = b
    return [*found, text[at:]] if text else ["–"]
