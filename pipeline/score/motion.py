"""How a clip moves: optical flow parted into the camera's and the things' own, and stillness."""

from __future__ import annotations

import cv2
import numpy as np

from pipeline.record import Clip, Video

MOTION = ["motion", "motion_object", "pan_x", "pan_y", "zoom", "stillness"]


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
