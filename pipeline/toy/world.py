"""A small world whose truth is known: one to three objects of one shape and colour move over black or white.

What training and sampling must get right is then a matter of fact: a clip is described completely by six
attributes, its caption is one sentence made from them, and `pipeline.toy.reader` reads them back from the
pictures. Lengths are in picture sides and times in frames until `render` draws them, so one scene may be
drawn at any size.

The laws, which extension and interpolation are judged by: every object keeps one velocity, stays wholly in
the picture and touches no other. Neighbouring scenes of a video differ in their background, so that a cut
can be seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import combinations, pairwise, product

import numpy as np

COUNTS = {"one": 1, "two": 2, "three": 3}
COLOURS = {
    "red": (220, 40, 40),
    "yellow": (225, 210, 30),
    "green": (40, 190, 60),
    "blue": (50, 70, 225),
    "purple": (170, 50, 200),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
BACKGROUNDS = {"black": 24, "white": 232}
PANS = ("none", "left", "right")  # which way the camera turns; the background goes the other way

SIDE = 0.24  # of the box around an object
GAP = 0.07  # between two objects' boxes at least
EDGE = (
    0.165  # between an object's centroid and the picture's edge at least: a triangle's tip is 0.16 above it
)
SPEEDS = (1.0 / 64, 1.8 / 64)  # a frame
PAN_SPEEDS = (1.0 / 64, 2.0 / 64)
TEXTURE = (12.0, 4)  # of a background under a moving camera: grey levels, waves a picture side
LENGTHS = (16, 24)  # frames of a scene


@dataclass(frozen=True)
class Attributes:
    """All that there is to say of a clip; None is what nobody knows."""

    count: str | None = None
    colour: str | None = None
    shape: str | None = None
    direction: str | None = None
    background: str | None = None
    pan: str | None = "none"

    def known(self) -> bool:
        return None not in (getattr(self, f.name) for f in fields(self))

    def caption(self) -> str:
        """'two red circles move left on black', at most 62 letters; '' where an attribute is not known."""
        if not self.known():
            return ""
        s, verb_s = ("", "s") if self.count == "one" else ("s", "")
        verb = f"stand{verb_s} still" if self.direction == "still" else f"move{verb_s} {self.direction}"
        camera = "" if self.pan == "none" else f", camera pans {self.pan}"
        return f"{self.count} {self.colour} {self.shape}{s} {verb} on {self.background}{camera}"


_CAPTION = re.compile(
    rf"(?P<count>{'|'.join(COUNTS)}) (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})s? "
    rf"(?:moves? |stands? )(?P<direction>{'|'.join(DIRECTIONS)}) on (?P<background>{'|'.join(BACKGROUNDS)})"
    r"(?:, camera pans (?P<pan>left|right))?"
)


def parse(caption: str) -> Attributes:
    """The attributes that a caption states. Raises ValueError where it is not a sentence of this world."""
    found = _CAPTION.fullmatch(caption)
    attributes = found and Attributes(**found.groupdict("none"))
    if not attributes or attributes.caption() != caption:
        raise ValueError(f"caption {caption!r} is none of this world's, such as {EXAMPLE.caption()!r}")
    return attributes


def stated(text: str) -> Attributes:
    """The attributes that a text states; none of them where it is no sentence of this world."""
    try:
        return parse(text)
    except ValueError:
        return Attributes(pan=None)


EXAMPLE = Attributes("two", "red", "circle", "left", "black")


def every(pans: tuple[str, ...] = ("none",)) -> Iterator[Attributes]:
    """All combinations of attributes."""
    for values in product(COUNTS, COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS, pans):
        yield Attributes(*values)


def one_off(attributes: Attributes) -> list[Attributes]:
    """All combinations that differ in the value of one attribute, the camera left as it is."""
    values = {
        "count": list(COUNTS),
        "colour": list(COLOURS),
        "shape": list(SHAPES),
        "direction": list(DIRECTIONS),
        "background": list(BACKGROUNDS),
    }
    return [
        replace(attributes, **{name: value})
        for name, every in values.items()
        for value in every
        if value != getattr(attributes, name)
    ]


MOST_HELD_OUT = 0.5


def held_out(share: float) -> frozenset[Attributes]:
    """Combinations of count, colour, shape, direction and background that are never shown, so many of the whole.

    Every pair of attributes loses nearly the same share of its combinations, so that each is still seen: what a
    model draws of them it has put together from parts it knows. Depends on the share alone, and a larger one holds a
    smaller one. Raises ValueError for a share outside 0 … 0.5.
    """
    if not 0 <= share <= MOST_HELD_OUT:
        raise ValueError(f"a share of {share:g} cannot be held out: give 0 to {MOST_HELD_OUT:g}")
    left = list(every())
    order = np.random.default_rng(0).permutation(len(left))
    left = [left[i] for i in order]
    pairs = list(combinations(("count", "colour", "shape", "direction", "background"), 2))
    size = {pair: len({tuple(getattr(a, name) for name in pair) for a in left}) for pair in pairs}
    lost: dict[tuple[str, ...], int] = {}  # combinations held out, of each two values
    keys = {a: [(*pair, *(getattr(a, name) for name in pair)) for pair in pairs] for a in left}
    found = []
    for _ in range(round(share * len(left))):
        # the least squares of shares: a pair of values with few combinations counts each of them for more
        cost = {a: sum((2 * lost.get(k, 0) + 1) * size[k[0], k[1]] ** 2 for k in keys[a]) for a in left}
        chosen = min(left, key=lambda a: cost[a])
        left.remove(chosen)
        found.append(chosen)
        for key in keys[chosen]:
            lost[key] = lost.get(key, 0) + 1
    return frozenset(found)


@dataclass(frozen=True)
class Scene:
    """A stretch of a video between two cuts.

    start: centres (x, y) at its first frame, [objects][2], in picture sides from the upper left corner.
    velocity: of every object, and pan: of the background, picture sides a frame.
    """

    attributes: Attributes
    frames: int
    start: tuple[tuple[float, float], ...]
    velocity: tuple[float, float]
    pan: float
    phase: float  # of the background's waves

    def positions(self) -> np.ndarray:
        """Centres, float64 [T, objects, 2], in picture sides."""
        return np.array(self.start) + np.arange(self.frames)[:, None, None] * np.array(self.velocity)


def scene(rng: np.random.Generator, attributes: Attributes, lengths: tuple[int, int] = LENGTHS) -> Scene:
    """One of the scenes with these attributes: objects in lanes along their way, anywhere in them.

    Args:
        lengths: fewest and most frames. Raises ValueError where objects could not stay in the picture.
    """
    assert attributes.count is not None
    assert attributes.direction is not None
    longest = 1 + int((1 - 2 * EDGE) / SPEEDS[1])
    if not 2 <= lengths[0] <= lengths[1] <= longest:
        raise ValueError(
            f"a scene has 2 to {longest} frames, fewest before most: got {lengths[0]}–{lengths[1]}"
        )
    frames = int(rng.integers(lengths[0], lengths[1] + 1))
    way = np.array(DIRECTIONS[attributes.direction])
    axis = int(np.abs(way).argmax()) if way.any() else int(rng.integers(2))  # along which the lanes run
    speed = rng.uniform(*SPEEDS) * abs(way[axis])
    travel = speed * (frames - 1) * way[axis]
    low, high = EDGE, 1 - EDGE
    along = rng.uniform(low - min(travel, 0), high - max(travel, 0), COUNTS[attributes.count])
    step = SIDE + GAP
    spare = high - low - step * (len(along) - 1)
    across = low + step * np.arange(len(along)) + np.sort(rng.uniform(0, spare, len(along)))
    start = np.stack([along, across] if axis == 0 else [across, along], axis=1)
    turn = {"none": 0, "left": 1, "right": -1}[attributes.pan or "none"]
    return Scene(
        attributes=attributes,
        frames=frames,
        start=tuple((float(x), float(y)) for x, y in start),
        velocity=(float(speed * way[0]), float(speed * way[1])),
        pan=float(turn * rng.uniform(*PAN_SPEEDS)),
        phase=float(rng.uniform(0, 2 * np.pi)),
    )


def story(
    rng: np.random.Generator,
    scenes: int,
    pan: float = 0.0,
    without: frozenset[Attributes] = frozenset(),
    within: frozenset[Attributes] | None = None,
) -> list[Scene]:
    """The scenes of one video, every attribute drawn evenly, black and white backgrounds in turn.

    Args:
        pan: share of the scenes in which the camera moves.
        without: combinations that are never drawn, however the camera moves, see `held_out`.
        within: the only combinations that are drawn, instead of all; some of them on each background.
    """
    first = int(rng.integers(2))
    told = []
    for i in range(scenes):
        attributes = _drawn(rng, list(BACKGROUNDS)[(first + i) % 2], pan)
        if within is not None:
            some = [a for a in every() if a in within and a.background == attributes.background]
            attributes = replace(some[int(rng.integers(len(some)))], pan=attributes.pan)
        while replace(attributes, pan="none") in without:
            attributes = _drawn(rng, attributes.background, pan)
        told.append(scene(rng, attributes))
    return told


def _drawn(rng: np.random.Generator, background: str | None, pan: float) -> Attributes:
    return Attributes(
        count=str(rng.choice(list(COUNTS))),
        colour=str(rng.choice(list(COLOURS))),
        shape=str(rng.choice(SHAPES)),
        direction=str(rng.choice(list(DIRECTIONS))),
        background=background,
        pan=str(rng.choice(PANS[1:])) if rng.random() < pan else "none",
    )


def render(scene: Scene, size: int) -> np.ndarray:
    """uint8 [T, size, size, 3] RGB; edges are smooth over one pixel, so positions are exact to a fraction."""
    assert scene.attributes.background is not None
    assert scene.attributes.colour is not None
    assert scene.attributes.shape is not None
    centre = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(centre, centre)  # [size, size] each
    colour = np.array(COLOURS[scene.attributes.colour], np.float64)
    pictures = np.empty((scene.frames, size, size, 3), np.uint8)
    for t, centres in enumerate(scene.positions()):
        ground = np.full((size, size), float(BACKGROUNDS[scene.attributes.background]))
        if scene.pan:
            levels, waves = TEXTURE
            ground += levels * np.sin(2 * np.pi * waves * (x - scene.pan * t) + scene.phase)
        cover = np.zeros((size, size))
        for cx, cy in centres:
            cover = np.maximum(cover, coverage(scene.attributes.shape, x - cx, y - cy, SIDE, 1 / size))
        picture = ground[..., None] * (1 - cover[..., None]) + colour * cover[..., None]
        pictures[t] = picture.round().astype(np.uint8)
    return pictures


def coverage(shape: str, x: np.ndarray, y: np.ndarray, side: float, pixel: float) -> np.ndarray:
    """How much of each pixel an object covers, 0 to 1, at x, y from its centroid.

    By the distance to its outline; all shapes fill a box of `side` along both axes. y points down.
    """
    half = side / 2
    if shape == "circle":
        inside = half - np.hypot(x, y)
    elif shape == "square":
        inside = half - np.maximum(np.abs(x), np.abs(y))
    elif shape == "triangle":  # tip up; its centroid is a third of its height above its base
        steep = (2 * side / 3 + y - 2 * np.abs(x)) / np.sqrt(5)
        inside = np.minimum(side / 3 - y, steep)
    else:
        raise ValueError(f"shape {shape!r} is none of {', '.join(SHAPES)}")
    return np.clip(inside / pixel + 0.5, 0, 1)


def cuts(scenes: list[Scene]) -> list[tuple[int, int]]:
    """Frames [start, end) of each scene in its video."""
    edges = np.cumsum([0, *(s.frames for s in scenes)]).tolist()
    return list(pairwise(edges))
