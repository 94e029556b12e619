"""Overlays that stay put while the content around them changes: logos, watermarks, inserted pictures."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

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
