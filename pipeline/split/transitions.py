"""Frames that belong to no shot: those of dissolves, fades and wipes.

TransNetV2 has a second head, which was trained to mark every frame of a transition where the first marks one in its
middle (Souček & Lokoč 2020, section 3.2: 'many hot'). Its runs give dissolves, to a frame or two. Fades are told by
their contrast, and wipes, which the network mostly overlooks, by how each pixel changes: once, at its own time. Slides
and wipes with soft edges are not known.
"""

from __future__ import annotations

import numpy as np

Span = tuple[int, int]  # frames [start, end)

LOW, HIGH = (
    0.1,
    0.5,
)  # 'many hot' of a frame at the edge of a transition, and of one within one that has no boundary
SUDDEN = 0.4  # share of all change that one step makes in a hard cut
OTHER = 8.0  # grey levels by which the pictures before and after differ, mean over the picture, at least
FLAT = 8.0  # grey levels of contrast (standard deviation) that a picture of one colour has at most
RISE = 0.015  # by which each frame of a fade has more contrast than the one before
PARTLY = 0.9  # of a shot's contrast that a frame surely on its way has at most
LONGEST = 40  # frames a wipe, and half a fade, may last
ONCE = 0.6  # share of a pixel's movement that one step makes where it is wiped over
NOISE = 5.0  # grey levels that a pixel may move from frame to frame and be still
WIPED = 0.45  # share of the picture that is
BLOCK = 1024  # frames looked at at a time, to bound memory


def find(thumbs: np.ndarray, cuts: list[int], many: np.ndarray | None = None) -> list[Span]:
    """All transitions, in order and apart.

    Args:
        thumbs: uint8 [n, 27, 48, 3] RGB.
        cuts: first frames of shots, as a detector gave them.
        many: TransNetV2's probability of 'many hot' [n]; without it only fades and wipes are found.
    """
    spans = sorted([*fades(thumbs), *wipes(thumbs), *([] if many is None else gradual(many, cuts, thumbs))])
    found: list[Span] = []
    for start, end in spans:
        if found and start < found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def gradual(many: np.ndarray, cuts: list[int], thumbs: np.ndarray) -> list[Span]:
    """Dissolves and fades, from the probability of 'many hot' [n] and the boundaries of the first head.

    A run that a boundary touches, or that is sure by itself, is a transition unless one step makes most of its change:
    a hard cut loses no frame.
    """
    found = []
    for start, end in _runs(many > LOW):
        bounded = any(start <= c <= end for c in cuts)
        sure = int((many[start:end] > HIGH).sum()) >= 4
        if end - start > 2 and (bounded or sure) and start > 0 and end < len(thumbs):
            steps = _change(thumbs[start - 1 : end], thumbs[start : end + 1])
            if (
                steps.max() < SUDDEN * steps.sum()
                and _change(thumbs[start - 1 : end], thumbs[end]).max() >= OTHER
            ):
                found.append((start, end))
    return found


def fades(thumbs: np.ndarray) -> list[Span]:
    """Fades out and in: to a picture of one colour and from it, the contrast falling and rising step by step."""
    contrast = np.concatenate(
        [_sums(thumbs[i : i + BLOCK]).std((1, 2)) / 3 for i in range(0, len(thumbs), BLOCK)]
    )
    found: list[Span] = []
    for flat_start, flat_end in _runs(contrast < FLAT):
        start, end = flat_start, flat_end
        while (
            start > 1
            and contrast[start - 2] > contrast[start - 1] * (1 + RISE)
            and flat_start - start < LONGEST
        ):
            start -= 1
        while (
            end < len(thumbs) - 1
            and contrast[end + 1] > contrast[end] * (1 + RISE)
            and end - flat_end < LONGEST
        ):
            end += 1
        out = contrast[start:flat_start] < PARTLY * contrast[start - 1] if start else contrast[:0]
        back = contrast[flat_end:end] < PARTLY * contrast[end] if end < len(thumbs) else contrast[:0]
        if max(out.sum(), back.sum()) >= 2:  # else it is cut to and from, as a flash is
            found.append((start, end))
    return found


def wipes(thumbs: np.ndarray) -> list[Span]:
    """Wipes: stretches of up to LONGEST frames in which most pixels change for good, each in one step of its own."""
    import cv2

    n = len(thumbs)
    found: list[Span] = []
    for at in range(0, max(1, n - 8), 8):
        if at % BLOCK == 0:
            block = thumbs[at : at + BLOCK + LONGEST + 9]
            changes = _sums(cv2.absdiff(block[1:], block[:-1])) if len(block) > 1 else block[:0, ..., 0]
        window = thumbs[at : at + LONGEST + 9]
        if len(window) < 8 or _change(window[0], window[-1]) < 2 * OTHER:
            continue
        # [m, 27, 48] and [27, 48], thrice the grey levels
        steps, total = changes[at % BLOCK :][: len(window) - 1], _sums(cv2.absdiff(window[-1], window[0]))
        path = np.where(steps > 3 * NOISE, steps, 0).sum(0)
        once = (total > 60) & (steps.max(0) > ONCE * path) & (steps.max(0) > 0.5 * total)
        when = np.sort(steps.argmax(0)[once])
        if once.mean() < WIPED or np.bincount(when).max() > len(when) / 3:
            continue
        start, end = (int(when[int(q * (len(when) - 1))]) for q in (0.01, 0.99))
        if start >= 2 and end < len(steps) - 2 and end - start >= 3:  # it is seen whole
            span = (at + start + 1, at + end + 1)
            if not found or span[0] >= found[-1][1]:
                found.append(span)
            elif span[1] - span[0] > found[-1][1] - found[-1][0]:
                found[-1] = span
    return found


def without(edges: list[int], transitions: list[Span]) -> list[Span]:
    """Shots between these edges (0, cuts, n) less the transitions; each transition is a cut as well."""
    inside = {c for a, b in transitions for c in edges if a <= c <= b}
    marks = sorted([*((c, c) for c in edges if c not in inside), *transitions])
    n = edges[-1]
    shots, start = [], 0
    for a, b in [*marks, (n, n)]:
        if a > start:
            shots.append((start, a))
        start = max(start, b)
    return shots


def _sums(pictures: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] → int16 [...], the three channels' sum."""
    red, green, blue = (pictures[..., i].astype(np.int16) for i in range(3))
    return red + green + blue


def _change(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean absolute difference of pictures [..., 27, 48, 3], grey levels."""
    return np.abs(a.astype(np.int16) - b).mean((-3, -2, -1))


def _runs(marked: np.ndarray) -> list[Span]:
    """Runs of True in bool [n]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
