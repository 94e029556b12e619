"""Reads the small world of `pipeline.toy.world` back from pictures: its captioner, its judge and its ruler.

Nothing here is learnt. Objects are the connected patches of vivid colour; a shape is the drawn one that the
object, averaged over all frames, correlates with best, at the size of this world's objects and, as far as that
can be seen, at any; a direction is a straight line through the centroids.
An attribute is None wherever the pictures do not settle it, so blank or confused pictures are never right by
luck. It holds on H.264, on noise of ±10 grey levels and on the softness of a small diffusion model's samples,
from about 24 pixels a side.

Pictures are uint8 [T, H, W, 3] RGB.
"""

from __future__ import annotations

import colorsys
import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import permutations
from pathlib import Path

import cv2
import numpy as np

from pipeline.toy import world
from pipeline.toy.world import COLOURS, COUNTS, DIRECTIONS, SHAPES, SIDE, TEXTURE, Attributes, coverage, parse

VIVID = 80  # largest less smallest of R, G, B at the edge of an object; its middle has 150 to 195
SMALLEST, LARGEST = 0.35 * SIDE**2, 1.5 * SIDE**2  # share of the picture that an object covers: half … 1 box
DEBRIS = 0.1 * SIDE**2  # a patch too small for an object but too large to be overlooked
AGREEING = 0.75  # share of the frames that must hold the same number of objects
HUE = 25 / 360  # farthest from a named colour; the names are at least 55° apart
DARK, LIGHT = 75, 180  # grey levels below and above which a background is black or white
STILL, MOVING = 0.035, 0.06  # picture sides in the whole clip
ASTRAY = 0.35  # most travel across a direction, as a share of that along it
ALIKE, CLEARLY = 0.93, 0.005  # least correlation with a shape at its own size, and more than with any other
FORM = 0.003  # how much better another shape may fit at whatever size fits it best
TEXTURED = 4.0  # grey levels of the background's waves from which there are any
PATCH, WINDOW = 24, 2.2  # the mean picture of an object: pixels a side, and the side in units of the object's
EQUAL = {"circle": 2 / np.pi**0.5, "square": 1.0, "triangle": 2**0.5}  # sides of boxes of shapes of area 1


@dataclass(frozen=True)
class Reading:
    """What the pictures show. confidence: 0 to 1 for every attribute, 0 where it is None."""

    attributes: Attributes
    confidence: dict[str, float]

    def caption(self) -> str:
        """The sentence, or '' where anything is not known."""
        return self.attributes.caption()


@dataclass(frozen=True)
class Blob:
    """One object in one frame, lengths in pixels."""

    centre: tuple[float, float]
    area: float
    colour: str | None
    cover: np.ndarray  # float32 [h, w], 0 to 1, of this object alone, in a box around it …
    corner: tuple[int, int]  # … that begins here


def read(frames: np.ndarray) -> Reading:
    """All attributes of a clip, each None where it cannot be told."""
    vivid = _vividness(frames)
    seen, agree = _steady([_blobs(f, v) for f, v in zip(frames, vivid, strict=True)])
    size, side = max(frames.shape[1:3]), float(np.prod(frames.shape[1:3])) ** 0.5
    tracks = _tracks(seen)
    found = {
        "count": (list(COUNTS)[len(tracks) - 1], agree) if 1 <= len(tracks) <= 3 else (None, 0.0),
        "colour": _same([_colour(track) for track in tracks.values()]),
        "shape": _same([_shape(track, side) for track in tracks.values()]),
        "direction": _same(
            [_direction(*_line(_path(track)), len(frames), size) for track in tracks.values()]
        ),
        "background": _background(frames, vivid),
        "pan": _pan(frames, vivid) if tracks else (None, 0.0),
    }
    return Reading(
        Attributes(**{name: value for name, (value, _) in found.items()}),
        {name: round(sure, 4) if value else 0.0 for name, (value, sure) in found.items()},
    )


def identity() -> str:
    """First 12 digits of the SHA-256 of this file and the world's: judgements of one reader compare."""
    sources = (Path(__file__), Path(world.__file__))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


def judge(frames: np.ndarray, caption: str) -> dict[str, bool]:
    """Which attributes that a caption states the pictures show. Raises ValueError at another world's caption."""
    wanted, seen = parse(caption), read(frames).attributes
    return {f.name: getattr(wanted, f.name) == getattr(seen, f.name) for f in fields(Attributes)}


def trajectory(frames: np.ndarray) -> np.ndarray:
    """Centroids of the objects, float64 [T, objects, 2] as x, y in pixels.

    NaN in frames that do not hold the number of objects that most do; no objects where frames disagree.
    """
    vivid = _vividness(frames)
    tracks = _tracks(_steady([_blobs(f, v) for f, v in zip(frames, vivid, strict=True)])[0])
    positions = np.full((len(frames), len(tracks), 2), np.nan)
    for i, track in tracks.items():
        for t, blob in track:
            positions[t, i] = blob.centre
    return positions


def velocity(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The motion law, measured: the best constant velocity, and how far an object strays from it.

    Args: positions [T, objects, 2], frames with NaN are left out.
    Returns: velocities [objects, 2], pixels a frame, and root mean square deviations [objects], pixels; NaN
    where fewer than three frames hold the object, through which any line can be laid.
    """
    speeds = np.full(positions.shape[1:], np.nan)
    astray = np.full(len(speeds), np.nan)
    for i, path in enumerate(positions.swapaxes(0, 1)):
        t = np.flatnonzero(np.isfinite(path).all(1))
        if len(t) > 2:
            speeds[i], astray[i] = _line([(int(k), (float(path[k, 0]), float(path[k, 1]))) for k in t])
    return speeds, astray


# ---------------------------------------------------------------- objects


def _vividness(frames: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W], largest less smallest of R, G, B; single wild pixels are smoothed a little."""
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"pictures are uint8 [T, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    sigma = 0.5 * max(1.0, frames.shape[1] / 64)
    vivid = np.empty(frames.shape[:3], np.uint8)
    for frame, out in zip(frames, vivid, strict=True):
        r, g, b = cv2.split(cv2.GaussianBlur(frame, (3, 3), sigma))
        out[:] = cv2.max(cv2.max(r, g), b) - cv2.min(cv2.min(r, g), b)
    return vivid


def _blobs(frame: np.ndarray, vivid: np.ndarray) -> list[Blob] | None:
    """The objects of a frame; None where something is there that is no object."""
    mask = cv2.threshold(vivid, VIVID, 1, cv2.THRESH_BINARY)[1]
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    if count > 20 or mask.mean() > 0.5:  # noise, or no ground
        return None
    ground = np.median(frame[mask == 0][::3], axis=0)
    found = []
    for i in range(1, count):
        if stats[i, cv2.CC_STAT_AREA] <= DEBRIS * vivid.size:
            continue
        x, y, w, h = (int(k) for k in stats[i, :4])
        box = np.s_[max(0, y - 3) : y + h + 3, max(0, x - 3) : x + w + 3]
        blob = _blob(frame[box], vivid[box], labels[box], i, ground, (max(0, x - 3), max(0, y - 3)))
        if not SMALLEST < blob.area / vivid.size < LARGEST:
            return None
        found.append(blob)
    return found


def _blob(
    frame: np.ndarray,
    vivid: np.ndarray,
    labels: np.ndarray,
    i: int,
    ground: np.ndarray,
    corner: tuple[int, int],
) -> Blob:
    """Patch i of a box cut out at `corner`: each pixel lies between the colours of the ground and its middle."""
    own = labels == i
    middle = own & (vivid >= 0.9 * np.percentile(vivid[own], 90))
    colour = frame[middle].mean(0) - ground
    around = cv2.dilate(own.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    around &= own | (labels == 0)
    cover = np.clip((frame - ground) @ colour / (colour @ colour), 0, 1).astype(np.float32) * around
    area = float(cover.sum())
    x = float(cover.sum(0) @ np.arange(cover.shape[1])) / area
    y = float(cover.sum(1) @ np.arange(cover.shape[0])) / area
    return Blob((x + corner[0], y + corner[1]), area, _named(colour + ground), cover, corner)


def _named(rgb: np.ndarray) -> str | None:
    hues = {name: colorsys.rgb_to_hsv(*(c / 255 for c in colour))[0] for name, colour in COLOURS.items()}
    hue = colorsys.rgb_to_hsv(*(c / 255 for c in rgb.tolist()))[0]
    away = {name: abs((hue - h + 0.5) % 1 - 0.5) for name, h in hues.items()}
    name = min(away, key=lambda n: away[n])
    return name if away[name] <= HUE else None


def _steady(blobs: list[list[Blob] | None]) -> tuple[list[tuple[int, list[Blob]]], float]:
    """(frame, objects) of the frames that hold as many as most do, and their share; none if too few agree."""
    most, frames = Counter(-1 if b is None else len(b) for b in blobs).most_common(1)[0]
    share = frames / len(blobs)
    if most < 1 or share < AGREEING:
        return [], 0.0
    return [(t, b) for t, b in enumerate(blobs) if b is not None and len(b) == most], share


def _tracks(seen: list[tuple[int, list[Blob]]]) -> dict[int, list[tuple[int, Blob]]]:
    """Each object through time: every frame's objects in the order that moves them least since the last."""
    if not seen or len(seen[0][1]) > 5:
        return {}
    ordered = [seen[0][1]]
    for _, blobs in seen[1:]:
        before = ordered[-1]
        ordered.append(list(min(permutations(blobs), key=functools.partial(_moved, before))))
    times = [t for t, _ in seen]
    return {i: list(zip(times, track, strict=True)) for i, track in enumerate(zip(*ordered, strict=True))}


def _moved(before: Sequence[Blob], after: Sequence[Blob]) -> float:
    pairs = zip(before, after, strict=True)
    return sum((a.centre[0] - b.centre[0]) ** 2 + (a.centre[1] - b.centre[1]) ** 2 for a, b in pairs)


# ---------------------------------------------------------------- attributes, each with its confidence

Told = tuple[str | None, float]


def _same(told: list[Told]) -> Told:
    """What is told of all objects; None where they differ."""
    names = {name for name, _ in told}
    return (names.pop(), min(sure for _, sure in told)) if len(names) == 1 else (None, 0.0)


def _colour(track: list[tuple[int, Blob]]) -> Told:
    name, frames = Counter(blob.colour for _, blob in track).most_common(1)[0]
    share = frames / len(track)
    return (name, share) if share >= AGREEING else (None, 0.0)


def _shape(track: list[tuple[int, Blob]], side: float) -> Told:
    """The shape that the object's mean picture correlates with best, each drawn as large as this world draws it.

    A soft circle differs from a soft square by its size more than by its form; but where the form alone speaks
    for another shape, as a small square's does, it is neither. side: of the picture, pixels.
    """
    blobs = [blob for _, blob in track]
    scores = _correlations(blobs, SIDE * side, dict.fromkeys(SHAPES, 1.0))
    forms = _correlations(blobs, float(np.median([b.area for b in blobs])) ** 0.5, EQUAL)
    best, second = sorted(scores, key=lambda s: -scores[s])[:2]
    margin = scores[best] - scores[second]
    if scores[best] < ALIKE or margin < CLEARLY or forms[best] < max(forms.values()) - FORM:
        return None, 0.0
    return best, min(1.0, margin / (5 * CLEARLY))


def _correlations(blobs: list[Blob], unit: float, sides: dict[str, float]) -> dict[str, float]:
    """Of the mean picture with each shape, whose box has sides of so many units of so many pixels."""
    scale = WINDOW * unit / PATCH  # pixels of the frame a pixel here
    mean = np.mean([_patch(b, scale) for b in blobs], axis=0).ravel()
    mean = mean - mean.mean()
    mean /= np.linalg.norm(mean) + 1e-9
    return {shape: float((templates(shape, side) @ mean).max()) for shape, side in sides.items()}


def _patch(blob: Blob, scale: float) -> np.ndarray:
    """float32 [PATCH, PATCH] of the coverage around an object's centre."""
    x, y = (c - k - scale * (PATCH - 1) / 2 for c, k in zip(blob.centre, blob.corner, strict=True))
    to_box = np.array([[scale, 0, x], [0, scale, y]])
    return cv2.warpAffine(blob.cover, to_box, (PATCH, PATCH), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


@functools.cache
def templates(shape: str, side: float) -> np.ndarray:
    """A shape at several softnesses, [n, PATCH · PATCH], each of mean 0 and length 1; its box has this side."""
    fine = 4
    at = ((np.arange(PATCH * fine) + 0.5) / (PATCH * fine) - 0.5) * WINDOW
    x, y = np.meshgrid(at, at)
    sharp = coverage(shape, x, y, side, at[1] - at[0]).astype(np.float32)
    drawn = []
    for blur in (0.05, 0.1, 0.15, 0.2):
        soft = cv2.GaussianBlur(sharp, (0, 0), blur / WINDOW * PATCH * fine)
        t = cv2.resize(soft, (PATCH, PATCH), interpolation=cv2.INTER_AREA).ravel()
        t = t - t.mean()
        drawn.append(t / np.linalg.norm(t))
    return np.stack(drawn)


def _path(track: list[tuple[int, Blob]]) -> list[tuple[int, tuple[float, float]]]:
    return [(t, blob.centre) for t, blob in track]


def _line(path: list[tuple[int, tuple[float, float]]]) -> tuple[np.ndarray, float]:
    """Least-squares velocity [2] of (frame, (x, y)), and the root mean square distance from that line."""
    t = np.array([k for k, _ in path], np.float64)
    at = np.array([p for _, p in path])
    t, at = t - t.mean(), at - at.mean(0)
    speed = (t @ at) / max(float(t @ t), 1e-9)
    return speed, float(np.sqrt(((at - t[:, None] * speed) ** 2).sum(1).mean()))


def _direction(speed: np.ndarray, astray: float, frames: int, size: int) -> Told:
    """One of DIRECTIONS, from the way that a constant velocity takes in the whole clip."""
    if frames < 2 or astray > 0.05 * size:
        return None, 0.0
    travel = speed * (frames - 1) / size
    if np.abs(travel).max() <= STILL:
        return "still", 1 - float(np.abs(travel).max()) / STILL / 2
    axis = int(np.abs(travel).argmax())
    along, across = abs(float(travel[axis])), abs(float(travel[1 - axis]))
    if along < MOVING or across > ASTRAY * along:
        return None, 0.0
    way = [0, 0]
    way[axis] = int(np.sign(travel[axis]))
    name = next(n for n, d in DIRECTIONS.items() if d == tuple(way))
    return name, 1 - across / along


def _background(frames: np.ndarray, vivid: np.ndarray) -> Told:
    """Black or white where most of the ground is."""
    ground = np.stack([cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames])[vivid <= VIVID]
    if len(ground) < 0.5 * vivid.size:
        return None, 0.0
    dark, light = float((ground < DARK).mean()), float((ground > LIGHT).mean())
    if max(dark, light) < 0.9:
        return None, 0.0
    return ("black", dark) if dark > light else ("white", light)


def _pan(frames: np.ndarray, vivid: np.ndarray) -> Told:
    """Which way the camera turns, by the phase of the background's waves from frame to frame."""
    height, width = vivid.shape[1:]
    wave = np.exp(-2j * np.pi * TEXTURE[1] * (np.arange(width) + 0.5) / width)
    basis = np.stack([np.ones(width), wave.real, wave.imag], 1)
    found = []
    for frame, v in zip(frames, vivid, strict=True):
        ground = cv2.dilate(v, np.ones((5, 5), np.uint8)) <= VIVID / 4
        rows = ground.sum(0)
        columns = rows >= max(2, height // 8)
        if columns.sum() < width // 2:
            return None, 0.0
        level = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) * ground).sum(0)[columns] / rows[columns]
        _, a, b = np.linalg.lstsq(basis[columns], level, rcond=None)[0]
        found.append(complex(a, b))
    waves = np.array(found)
    strength = float(np.abs(waves).mean())
    if strength < TEXTURED or len(waves) < 2:
        return "none", 1 - min(1.0, strength / TEXTURED) / 2
    turns = waves[1:] * waves[:-1].conj()
    steady, turn = float(abs(turns.sum()) / np.abs(turns).sum()), float(np.angle(turns.sum()))
    if steady < 0.7:
        return None, 0.0
    return ("none" if abs(turn) < 0.1 else "right" if turn > 0 else "left"), steady
