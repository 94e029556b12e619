"""What can be measured of a clip without a neural network: motion, picture quality, overlays.

Everything is read from what the one decode left behind: `Frames.grey` (about 128 pixels, 8 a second) for
motion and `Frames.samples` (JPEG, 2 a second, each decoded once to 256 pixels) for the rest. Nothing depends
on the codec, and speeds are displacements ÷ seconds of PTS, so nothing depends on the frame rate either. A
measure that cannot be made is left out of `clip.scores` (a null column), never set to 0.

| score | meaning |
|---|---|
| motion | mean length of the optical flow, picture diagonals a second |
| motion_object | the part of it that the camera does not explain, diagonals a second |
| pan_x, pan_y | net camera travel, picture widths (right +) and heights (down +) a second |
| zoom | net natural logarithm of scale a second, zooming in + |
| stillness | fraction of the clip's time in which nothing has changed for half a second |
| sharpness | variance of the Laplacian of luma at 256 pixels, median over samples |
| exposure | mean luma, 0 (black) to 1 (white), black borders aside |
| clipped | fraction of pixels crushed to black or blown to white, black borders aside |
| black_borders | fraction of the picture in black bars along its sides |
| watermark | fraction of the picture under overlays that stay put while the content around them changes |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from pipeline.recipe import Scores
from pipeline.record import Clip, Sample, Video
from pipeline.samples import samples
from pipeline.stages import Produces, Resources

MOTION = ["motion", "motion_object", "pan_x", "pan_y", "zoom", "stillness"]
PICTURE = ["sharpness", "exposure", "clipped", "black_borders"]

PICTURE_SIZE = 256  # longer side of a decoded sample, pixels


class ScoreStage:
    """Adds the scores of the table above to every clip; drops `Frames.grey`, which nothing later needs."""

    name = "scores"
    resources = Resources(cpus=1.0)

    def __init__(self, recipe: Scores):
        self.recipe = recipe
        self.produces = Produces(
            scores=MOTION * recipe.motion + PICTURE * recipe.picture + ["watermark"] * recipe.watermark
        )

    def setup(self) -> None:
        cv2.setNumThreads(1)

    def __call__(self, videos: list[Video]) -> list[Video]:
        for video in videos:
            if video.frames is None:
                continue
            if self.recipe.motion:
                for clip in video.clips:
                    _put(clip, motion_of(video, clip))
            if self.recipe.picture or self.recipe.watermark:
                for first in range(0, len(video.clips), COMPANY):
                    self._score_pictures(video, video.clips[first : first + COMPANY])
            video.frames.grey = None
        return videos

    def _score_pictures(self, video: Video, clips: list[Clip]) -> None:
        evidence: list[Evidence | None] = []
        for clip in clips:
            pictures = decode_grey(samples(video, clip))
            if not len(pictures):
                evidence.append(None)
                continue
            area = active_area(pictures)
            if self.recipe.picture:
                _put(clip, picture_scores(pictures, area))
            if self.recipe.watermark:
                evidence.append(Evidence.of(pictures, area))
        if self.recipe.watermark:
            for clip, share in zip(clips, watermarks(evidence), strict=True):
                if share is not None:
                    _put(clip, {"watermark": share})


def _put(clip: Clip, scores: dict[str, float]) -> None:
    clip.scores |= {name: round(float(value), 6) for name, value in scores.items()}


# ---------------------------------------------------------------------------------------------- motion

STILL_S = 0.5  # a picture is still when it equals the one so long ago …
STILL_LEVELS = 6  # … within this many grey levels …
STILL_SHARE = 0.002  # … in all but this share of its pixels
GRID = 4  # flow is read every so many pixels
MIN_FLOW_SIZE = 16  # pixels of the shorter side below which there is no flow to be had


def motion_of(video: Video, clip: Clip) -> dict[str, float]:
    """`MOTION` of a clip; empty where two grey frames of one shot are not to be had.

    Flow is taken between neighbouring grey frames of the same shot, so a cut is never read as motion.
    Sums of displacements are divided by the seconds they took: speeds are means over time.
    """
    frames = video.frames
    if frames is None or frames.grey is None:
        return {}
    first, last = np.searchsorted(frames.grey_frame, [clip.start_frame, clip.end_frame])
    index = frames.grey_frame[first:last]
    seconds = (frames.pts[index] - frames.pts[0]) * float(video.time_base)
    shot = np.searchsorted([s.start_frame for s in video.shots], index, side="right")
    grey = frames.grey[first:last]
    pairs = np.flatnonzero(shot[1:] == shot[:-1])
    if not len(pairs):
        return {}

    height, width = grey.shape[1:]
    if min(height, width) < MIN_FLOW_SIZE:
        return {"stillness": stillness(grey, seconds, shot)}
    took = (seconds[pairs + 1] - seconds[pairs]).sum()
    flow = optical_flow(grey, pairs)  # [p, rows, columns, 2]
    trust = np.stack([_texture(grey[i]) for i in pairs])  # [p, rows, columns]
    camera, travel = camera_motion(flow, trust)
    # Where there is no texture there is no evidence of motion of its own: it goes with the camera.
    own = trust[..., None] * (flow - camera)
    diagonal = np.hypot(height, width)
    return {
        "motion": np.hypot(*np.moveaxis(camera + own, -1, 0)).mean((1, 2)).sum() / diagonal / took,
        "motion_object": np.hypot(*np.moveaxis(own, -1, 0)).mean((1, 2)).sum() / diagonal / took,
        "pan_x": -travel[:, 0].sum() / width / took,  # the picture moves left when the camera moves right
        "pan_y": -travel[:, 1].sum() / height / took,
        "zoom": travel[:, 2].sum() / took,
        "stillness": stillness(grey, seconds, shot),
    }


def optical_flow(grey: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Flow from grey[i] to grey[i + 1] for every i in pairs, on a grid of every `GRID`th pixel.

    Dense inverse search (Kroeger et al., ECCV 2016) at half the size. It follows about 10 of 128 pixels
    between two frames, at 8 frames a second a pan of 0.6 picture widths a second; faster ones read low.

    Args: grey uint8 [m, h, w]; pairs int [p]. Returns float32 [p, h / 4, w / 4, 2], pixels (x, y).
    """
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    dis.setFinestScale(1)
    dis.setPatchStride(6)
    flow = np.zeros((len(pairs), *_on_grid(grey[0]).shape, 2), np.float32)
    for out, i in zip(flow, pairs, strict=True):
        if not np.array_equal(grey[i], grey[i + 1]):
            out[:] = _on_grid(dis.calc(grey[i], grey[i + 1], None))  # type: ignore[call-overload]
    return flow


def _on_grid(picture: np.ndarray) -> np.ndarray:
    return picture[GRID // 2 :: GRID, GRID // 2 :: GRID]


def _texture(grey: np.ndarray) -> np.ndarray:
    """How far flow can be trusted, 0 (flat) to 1, on the grid of `optical_flow`."""
    dx, dy = cv2.spatialGradient(grey)
    slope = cv2.blur(np.abs(dx).astype(np.float32) + np.abs(dy), (9, 9)) / 8  # levels a pixel
    return np.clip(_on_grid(slope) - 0.5, 0, 1)


def camera_motion(flow: np.ndarray, trust: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The similarity (pan, zoom, roll) that explains most of each flow field.

    u = a + z x − r y, v = b + z y + r x with x, y from the picture's centre, by iteratively reweighted least
    squares with Cauchy weights (Holland & Welsch 1977), so that what moves by itself does not count.

    Args: flow float [p, h, w, 2] on a grid of `GRID` pixels; trust [p, h, w], 0 to 1.
    Returns: its flow [p, h, w, 2], and [p, 4]: a, b (pixels), log scale, roll (radians).
    """
    count, height, width, _ = flow.shape
    y, x = np.mgrid[:height, :width].astype(np.float32) * GRID
    x, y = x - x.mean(), y - y.mean()
    every = np.s_[:, ::2, ::2] if min(height, width) >= 8 else np.s_[:]  # four numbers need no more points
    fx, fy = (np.broadcast_to(q, flow.shape[:3])[every].reshape(count, -1) for q in (x, y))
    u, v = flow[every][..., 0].reshape(count, -1), flow[every][..., 1].reshape(count, -1)
    trusted = trust[every].reshape(count, -1) + 1e-6
    a, b = np.median(u, 1, keepdims=True), np.median(v, 1, keepdims=True)
    z = r = np.zeros_like(a)
    for _ in range(6):
        error = np.hypot(u - (a + z * fx - r * fy), v - (b + z * fy + r * fx))
        scale = np.maximum(1.5 * np.median(error, 1, keepdims=True), 0.05)
        w = trusted / (1 + (error / scale) ** 2)
        w /= w.sum(1, keepdims=True)
        mx, my, mu, mv = ((w * q).sum(1, keepdims=True) for q in (fx, fy, u, v))
        dx, dy, du, dv = fx - mx, fy - my, u - mu, v - mv
        spread = (w * (dx**2 + dy**2)).sum(1, keepdims=True) + 1e-9
        z = (w * (dx * du + dy * dv)).sum(1, keepdims=True) / spread
        r = (w * (dx * dv - dy * du)).sum(1, keepdims=True) / spread
        a, b = mu - z * mx + r * my, mv - z * my - r * mx
    travel = np.concatenate([a, b, np.log(np.hypot(1 + z, r)), np.arctan2(r, 1 + z)], 1)
    a, b, z, r = (q[..., None] for q in (a, b, z, r))
    return np.stack([a + z * x - r * y, b + z * y + r * x], -1), travel


def stillness(grey: np.ndarray, seconds: np.ndarray, shot: np.ndarray) -> float:
    """Fraction of the time between grey frames in which nothing changed for `STILL_S`.

    Half a second tells a slow zoom over a photograph from a photograph, and animation drawn on every
    second frame from a frozen picture. Cuts are no change, and the steps across them no time.
    """
    still = total = 0.0
    for number in np.unique(shot):
        first, last = np.searchsorted(shot, number), np.searchsorted(shot, number, side="right") - 1
        for i in range(first + 1, last + 1):
            # The half second that ends here; at the start of a shot, its first half second.
            since = max(seconds[i] - STILL_S, seconds[first])
            back = np.searchsorted(seconds, since + 1e-6, side="right") - 1
            front = min(max(i, np.searchsorted(seconds, since + STILL_S - 1e-6)), last)
            step = seconds[i] - seconds[i - 1]
            changed = cv2.absdiff(grey[front], grey[back]) > STILL_LEVELS
            still += step * (changed.mean() <= STILL_SHARE)
            total += step
    return still / total


# ------------------------------------------------------------------------------------- picture quality

BLACK = 20  # luma at or below which a border counts as black (JPEG ringing included)


def decode_grey(jpegs: Sequence[Sample]) -> np.ndarray:
    """uint8 [n, h, w] luma, longer side `PICTURE_SIZE` whatever the source's size: sharpness needs one scale.

    Large JPEGs are decoded at a half, a quarter or an eighth by scaling the DCT, which is several times
    cheaper than decoding and shrinking.
    """
    if not jpegs:
        return np.empty((0, 0, 0), np.uint8)
    # An eighth of the size tells the size: all samples of a video have one.
    longer = 8 * max(_decode(jpegs[0], cv2.IMREAD_REDUCED_GRAYSCALE_8).shape)
    reduced = {8: cv2.IMREAD_REDUCED_GRAYSCALE_8, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4}
    reduced |= {2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 1: cv2.IMREAD_GRAYSCALE}
    flag = next((flag for k, flag in reduced.items() if longer // k >= PICTURE_SIZE), cv2.IMREAD_GRAYSCALE)
    pictures = np.stack([_decode(s, flag) for s in jpegs])
    height, width = pictures.shape[1:]
    scale = PICTURE_SIZE / max(height, width)
    if scale == 1:
        return pictures
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.stack([cv2.resize(p, size, interpolation=how) for p in pictures])


def _decode(sample: Sample, flag: int) -> np.ndarray:
    picture = cv2.imdecode(np.frombuffer(sample.jpeg, np.uint8), flag)
    if picture is None:
        raise ValueError(f"the sample of frame {sample.frame} is not a JPEG")
    return picture


def active_area(pictures: np.ndarray) -> tuple[slice, slice] | None:
    """Rows and columns inside the black bars of all pictures [n, h, w]; None where everything is black."""
    bright = pictures.max(0) > BLACK
    # A line belongs to a bar while a stray bright pixel or two (noise, ringing) is all it has.
    rows = np.flatnonzero(bright.mean(1) > 0.02)
    columns = np.flatnonzero(bright.mean(0) > 0.02)
    if not len(rows) or not len(columns):
        return None
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def picture_scores(pictures: np.ndarray, area: tuple[slice, slice] | None) -> dict[str, float]:
    """`PICTURE` of uint8 [n, h, w]. An all-black clip has an exposure and nothing else."""
    if area is None:
        return {"exposure": pictures.mean() / 255}
    inside = pictures[:, area[0], area[1]]
    return {
        # Pech-Pacheco et al. 2000
        "sharpness": float(np.median([cv2.Laplacian(p, cv2.CV_16S).var() for p in inside])),
        "exposure": inside.mean() / 255,
        "clipped": float(((inside <= 3) | (inside >= 252)).mean()),
        "black_borders": 1 - inside[0].size / pictures[0].size,
    }


# ------------------------------------------------------------------------------------------- watermark

EDGE = 3.0  # levels a pixel: weaker mean gradients are no evidence
SCATTER = 0.25  # a gradient persists while its variance over time is below this share of its square
CONTRAST = 45  # the ratio variance ÷ square is at least so many times larger around an overlay than in it
CHANGE = 8  # levels: a pixel that differs more has changed
CHANGED = 0.75  # share of the pairs half a clip apart in which a pixel of changing content has changed
RING = 8  # pixels around an overlay in which the content must change
COMPANY = 100  # neighbouring clips of a source that are compared: bounds the memory of a long one to 100 MB
MIN_MOMENTS = 5  # samples of a clip, or clips of a source: among fewer, unrelated edges often agree
MIN_CHANGING = 0.1  # share of the picture that must change for the absence of overlays to mean anything


@dataclass
class Evidence:
    """Which edges stay and which content changes, over the samples of a clip or the clips of a source.

    The mean of the gradient over time keeps what stays and averages out what moves (the idea by which
    Dekel et al., CVPR 2017, find watermarks over image collections).
    """

    gx: np.ndarray  # float32 [h, w], mean gradient, levels a pixel
    gy: np.ndarray
    energy: np.ndarray  # float32 [h, w], mean squared length of the gradient
    mean: np.ndarray  # float32 [h, w], mean luma
    changing: np.ndarray  # bool [h, w], content that differs between most moments half the time apart
    inside: np.ndarray  # bool [h, w], clear of black borders
    count: int

    @classmethod
    def of(cls, pictures: np.ndarray, area: tuple[slice, slice] | None) -> Evidence:
        """Evidence of one clip's samples, uint8 [n, h, w]."""
        shape = pictures.shape[1:]
        inside = np.zeros(shape, bool)
        if area is not None:
            margin = 3  # a border's own edge is no overlay
            rows, columns = area
            inside[
                rows.start + margin * (rows.start > 0) : rows.stop - margin * (rows.stop < shape[0]),
                columns.start + margin * (columns.start > 0) : columns.stop
                - margin * (columns.stop < shape[1]),
            ] = True
        gx, gy, energy = (np.zeros(shape, np.float32) for _ in range(3))
        for picture in pictures:
            dx, dy = (cv2.Sobel(picture, cv2.CV_32F, *xy, scale=1 / 8) for xy in ((1, 0), (0, 1)))
            cv2.accumulate(dx, gx)
            cv2.accumulate(dy, gy)
            cv2.accumulateSquare(dx, energy)
            cv2.accumulateSquare(dy, energy)
        n = len(pictures)
        mean = pictures.mean(0, dtype=np.float32)
        return cls(gx / n, gy / n, energy / n, mean, _changing(pictures), inside, n)

    @classmethod
    def across(cls, clips: list[Evidence]) -> Evidence:
        """Evidence of a source, each clip counting once: what stays from shot to shot is laid over."""
        means = np.stack([c.mean for c in clips])
        return cls(
            np.mean([c.gx for c in clips], axis=0),
            np.mean([c.gy for c in clips], axis=0),
            np.mean([c.energy for c in clips], axis=0),
            means.mean(0),
            _changing(means),
            np.logical_and.reduce([c.inside for c in clips]),
            len(clips),
        )

    def persistent(self) -> np.ndarray:
        """bool [h, w]: edges of one place, strength and direction throughout."""
        square = self.gx**2 + self.gy**2
        return (square > EDGE**2) & (self.energy - square < SCATTER * square) & self.inside

    def telling(self) -> bool:
        """Enough changes for an overlay to stand out."""
        return self.changing.mean() >= MIN_CHANGING


def _changing(pictures: np.ndarray) -> np.ndarray:
    """bool [h, w]: neighbourhoods in which a third of the pixels differ between most pairs half a clip apart."""
    lag = len(pictures) // 2
    if lag == 0:
        return np.zeros(pictures.shape[1:], bool)
    differs = np.zeros(pictures.shape[1:], np.float32)
    for early, late in zip(pictures, pictures[lag:], strict=False):
        cv2.accumulate((cv2.absdiff(early, late) > CHANGE).astype(np.uint8), differs)
    often = (differs >= CHANGED * (len(pictures) - lag)).astype(np.float32)
    return cv2.blur(often, (9, 9)) > 0.3


@dataclass
class Overlay:
    """A group of edges that stays, and the solid shape around them."""

    box: tuple[slice, slice]
    shape: np.ndarray  # bool, of the box
    edges: np.ndarray  # bool, of the box


def overlays(e: Evidence) -> list[Overlay]:
    """Groups of persistent edges, in more than one direction, on changing content.

    A static background fails the last condition: what surrounds its edges does not change either, or
    holds persistent edges of its own. A horizon under a pan fails the second.
    """
    persistent = e.persistent()
    height, width = persistent.shape
    found = []
    solid = cv2.morphologyEx(persistent.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((7, 7), np.uint8))
    crowd = cv2.dilate(persistent.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(solid, connectivity=8)
    for label in range(1, count):
        x, y, w, h, size = (int(q) for q in boxes[label])
        if size < 25 or w * h > height * width / 4:
            continue
        box = np.s_[y : y + h, x : x + w]
        shape = labels[box] == label
        edges = shape & persistent[box]
        gx, gy = e.gx[box][edges], e.gy[box][edges]
        if len(gx) < 12:
            continue
        tensor = np.array([[gx @ gx, gx @ gy], [gx @ gy, gy @ gy]], np.float64)
        weak, strong = np.linalg.eigvalsh(tensor)
        if weak < 0.1 * strong or not _on_changing_content(x, y, w, h, e.changing, crowd):
            continue
        overlay = Overlay(box, shape, edges)
        if _stands_out(e, overlay, persistent):
            found.append(overlay)
    return found


def _stands_out(e: Evidence, overlay: Overlay, persistent: np.ndarray) -> bool:
    """Its edges stay far better than those around it.

    Where a camera zooms in or turns around, edges stay too, but less and less with the distance.
    """
    rows, columns = overlay.box
    ring = np.s_[
        max(0, rows.start - RING) : rows.stop + RING, max(0, columns.start - RING) : columns.stop + RING
    ]
    solid = np.zeros(e.inside.shape, bool)
    solid[overlay.box] = overlay.shape
    near = cv2.dilate(persistent[ring].astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    around = ~(solid[ring] | near)
    square, energy = e.gx[ring] ** 2 + e.gy[ring] ** 2, e.energy[ring]
    if energy[around].sum() < EDGE**2 * around.sum():
        return True  # hardly an edge around it that could move
    # The square of a mean of n independent gradients has their variance ÷ n in it.
    moving = energy[around].sum() * e.count / (e.count - 1) - square[around].sum() / (1 - 1 / e.count)
    # Few moments can look settled by chance: never less than half the chance level.
    staying = max(float(energy[around].sum() - moving), float(energy[around].sum()) / (2 * e.count))
    at = overlay.edges
    own = e.gx[overlay.box][at] ** 2 + e.gy[overlay.box][at] ** 2
    scatter = float(((e.energy[overlay.box][at] - own) / own).mean())
    return float(moving) >= CONTRAST * scatter * staying


def _on_changing_content(x: int, y: int, w: int, h: int, changing: np.ndarray, crowd: np.ndarray) -> bool:
    """The ring around a box changes, on every side within the picture, and is not full of other edges."""
    top, left, bottom, right = max(0, y - RING), max(0, x - RING), y + h + RING, x + w + RING
    sides = [
        np.s_[top:y, left:right],
        np.s_[y + h : bottom, left:right],
        np.s_[y : y + h, left:x],
        np.s_[y : y + h, x + w : right],
    ]
    sides = [s for s in sides if min(changing[s].shape) >= 3]
    area = sum(changing[s].size for s in sides)
    return (
        area > 0
        and all(changing[s].mean() >= 0.4 for s in sides)
        and sum(int(changing[s].sum()) for s in sides) >= 0.6 * area
        and sum(int(crowd[s].sum()) for s in sides) <= 0.25 * area
    )


def watermarks(evidence: list[Evidence | None]) -> list[float | None]:
    """Share of the picture under overlays, for every clip of one source.

    A clip's own samples find what stays while its content moves; the clips of a source together find what
    stays from shot to shot, even over shots in which nothing moves. None where neither can tell.
    """
    known = [e for e in evidence if e is not None]
    source = Evidence.across(known) if len(known) >= MIN_MOMENTS else None
    if source is not None and not source.telling():
        source = None
    common = overlays(source) if source is not None else []
    shares: list[float | None] = []
    for e in evidence:
        alone = e is not None and e.count >= MIN_MOMENTS and e.telling()
        if e is None or not (alone or source is not None):
            shares.append(None)
            continue
        covered = np.zeros(e.inside.shape, bool)
        own = overlays(e) if alone else []
        for overlay in own + [o for o in common if source is not None and _shows(e, o, source)]:
            covered[overlay.box] |= overlay.shape
        shares.append(float(covered.mean()))
    return shares


def _shows(clip: Evidence, overlay: Overlay, source: Evidence) -> bool:
    """Whether a clip has an overlay of its source: most of its edges, in strength and direction."""
    at, edges = overlay.box, overlay.edges
    gx, gy = source.gx[at][edges], source.gy[at][edges]
    off = (clip.gx[at][edges] - gx) ** 2 + (clip.gy[at][edges] - gy) ** 2
    return float((off < (gx**2 + gy**2) / 4).mean()) > 0.6
