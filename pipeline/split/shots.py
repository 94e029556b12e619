"""Where the camera cuts: every frame's 48 × 27 thumb in, shots that cover the video out.

`transnetv2` is the network of `models.curation.transnet`. It costs 80 GFLOP for 50 frames, so it looks only at
windows in which a cheap difference of the thumbs says that something may have changed; everywhere
else the probability of a boundary is taken as 0. `content` is PySceneDetect's ContentDetector.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np

from pipeline.recipe import Shots
from pipeline.record import Shot, Video
from pipeline.split.transitions import Span, find, without
from pipeline.stages import Produces, Resources, each
from pipeline.watch import telling

SPAN = 8  # frames the cheap difference looks ahead: a fade or dissolve adds up over several


class ShotStage:
    """Sets `video.shots` and `counts['shots']`, and lets go of the thumbs.

    Where the source's list gives intervals nothing is detected: each becomes one shot. Detector `whole` makes one
    clip of a video (of each stretch between two starts of its clock).
    """

    name = "shots"
    whole_source = True

    def __init__(self, options: Shots):
        self.options = options
        self.resources = Resources(cpus=1.0)
        self.produces = Produces()

    def setup(self) -> None:
        if self.options.detector == "transnetv2":
            from models.curation.transnet import TransNetV2

            self.net = TransNetV2(device=self.resources.device())

    def __call__(self, videos: list[Video]) -> list[Video]:
        for video in each(videos):
            assert video.frames is not None
            if "shots" in video.counts:
                continue
            if video.source.intervals is not None:
                shots = given_shots(video, video.source.intervals)
            else:
                assert video.frames.thumbs is not None
                cuts, transitions = self.cuts(video.frames.thumbs)
                edges = sorted({0, *cuts, *video.breaks(), len(video.frames.pts)})
                shots = [Shot(a, b) for a, b in without(edges, transitions)]
                if self.options.transitions == "trim":
                    video.counts["transitions"] = len(transitions)
                    video.counts["transition_frames"] = sum(b - a for a, b in transitions)
            video.shots = shots
            video.frames.thumbs = None
            video.counts["shots"] = len(shots)
        return videos

    def cuts(self, thumbs: np.ndarray) -> tuple[list[int], list[Span]]:
        """First frames of all shots but the first, and the frames that belong to none.

        Args:
            thumbs: uint8 [n, 27, 48, 3] RGB.
        """
        o, many = self.options, None
        if o.detector == "whole":
            return [], []
        if o.detector == "content":
            found = content_cuts(thumbs, o.content_threshold, o.min_shot_frames)
        else:
            from models.curation.transnet import boundary_probabilities

            chosen = candidate_windows(thumbs, o.candidate_threshold)
            one, many = boundary_probabilities(self.net, thumbs, telling(chosen)).T
            found = boundary_cuts(one, o.threshold)
        return found, [] if o.transitions == "keep" else find(thumbs, found, many)


def candidate_windows(thumbs: np.ndarray, threshold: float) -> list[int]:
    """Windows of `models.curation.transnet` in which the colours change enough for a boundary.

    Frame i is compared with frame i + 8 (or the last one) by the earth mover's distance of their
    colours, per channel, mean of the three, in grey levels 0 … 255; where that reaches the threshold
    every window that answers for a frame of i … i + 8 is a candidate. Sorted pixel values forget where
    things are, so motion counts little and a change of scene much. Threshold 0 takes every window.
    """
    from models.curation.transnet import STRIDE

    n = len(thumbs)
    marked: set[int] = set()
    for start in range(0, n, 1024):  # some at a time, to bound memory
        levels = np.sort(thumbs[start : start + 1024 + SPAN].reshape(-1, 27 * 48, 3), axis=1).astype(np.int16)
        first = np.arange(min(1024, n - start))
        second = np.minimum(first + SPAN, len(levels) - 1)
        changed = np.abs(levels[second] - levels[first]).mean((1, 2)) >= threshold
        for i, j in zip(first[changed] + start, second[changed] + start, strict=True):
            marked.update(range(i // STRIDE, j // STRIDE + 1))
    return sorted(marked)


def boundary_cuts(probabilities: np.ndarray, threshold: float) -> list[int]:
    """First frames of new shots, from float [n] boundary probabilities.

    The network marks the last frame of a shot, or the frames of a gradual transition. As in the
    paper's predictions_to_scenes a new shot begins with the first frame after a run of probabilities
    above the threshold; the run itself stays with the shot before, so that every frame has a shot.
    """
    above = np.concatenate([probabilities > threshold, [False]])
    ends = np.flatnonzero(above[:-1] & ~above[1:]) + 1
    return [int(f) for f in ends if f < len(probabilities)]


def content_cuts(thumbs: np.ndarray, threshold: float, min_shot_frames: int) -> list[int]:
    """Cuts by PySceneDetect's ContentDetector on the thumbs, in mode SUPPRESS as Panda-70M was made.

    A cut is where the mean change of hue (0–179), saturation and value (0–255) reaches the threshold and
    the last cut is at least `min_shot_frames` back. Frames are counted, so time stamps play no part.
    PySceneDetect itself looks at about 256 pixels across; at 48, scores come out a little lower, and so
    do the numbers of cuts.
    """
    import cv2

    found, last = [], 0
    for start in range(0, len(thumbs) - 1, 1024):
        block = thumbs[start : start + 1025]  # one frame of the block before, to compare with
        hsv = cv2.cvtColor(block.reshape(-1, 48, 3), cv2.COLOR_RGB2HSV).reshape(len(block), -1)
        change = cv2.absdiff(hsv[1:], hsv[:-1]).mean(1)
        for i in np.flatnonzero(change >= threshold) + start + 1:
            if i - last >= min_shot_frames:
                last = int(i)
                found.append(last)
    return found


def given_shots(video: Video, intervals: tuple[tuple[float, float], ...]) -> list[Shot]:
    """The frames with start ≤ t < end of each interval (seconds on the source's clock), by first frame.

    Interval ends are met to a microsecond. What lies outside the video, or holds no frame, becomes a
    warning and is counted; equal intervals become one.
    """
    assert video.frames is not None
    first, last = video.time_of(0), video.time_of(len(video.frames.pts))
    shots = set()
    for start_s, end_s in intervals:
        start, end = frames_within(video, start_s, end_s)
        if start < end:
            shots.add((start, end))
        if (start, end) != (frame_at(video, start_s), frame_at(video, end_s)):
            video.warnings.append(
                f"interval {start_s:g}–{end_s:g} s is cut short: the clock starts again in it"
            )
        elif start >= end or end_s > last + 0.5:
            fate = "holds no frame" if start >= end else "is cut short"
            video.warnings.append(
                f"interval {start_s:g}–{end_s:g} s {fate}: the video lasts from {first:g} to {last:g} s"
            )
    return [Shot(a, b) for a, b in sorted(shots)]


def frames_within(video: Video, start_s: float, end_s: float) -> tuple[int, int]:
    """The frames with start ≤ t < end; of an interval in which the clock starts again, the longest part."""
    assert video.frames is not None
    start, end = frame_at(video, start_s), frame_at(video, end_s)
    inner = [f for f in video.frames.restarts[:, 0].tolist() if start < f < end]
    return max(pairwise([start, *inner, end]), key=lambda part: part[1] - part[0])


def frame_at(video: Video, seconds: float) -> int:
    """The first frame shown at `seconds` or later; n where there is none."""
    assert video.frames is not None
    tick = math.ceil((Fraction(seconds) - Fraction(1, 10**6)) / video.time_base)
    return int(np.searchsorted(video.frames.pts, tick))
