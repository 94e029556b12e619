"""Long sources in chunks, and units that turn out long in smaller ones, once what needs a whole source is done.

Shots, events and scores that compare the clips of a source are decided over all of it, so chunks change no clip.
From there on a chunk, the clips of at most `limits.chunk_s` seconds with their part of the frames, is a unit of its
own: committed on its own, and on Ray given to any worker of the next pool. How long a source is shows only in
decoding it, so the sources of a unit are decoded until there are UNIT_S seconds; these go on before the next is
decoded.

Chunk k of n of a source is unit '<unit>-<k>' (`chunk_unit`). See `pipeline.run.commit` for how they become one source
again. A chunk that an earlier run has finished counts only where the source would be divided just so again, into the
same clips of the same bytes with the same metadata (`division_key`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace

from pipeline.record import Clip, Frames, Video

UNIT_S = 1800.0  # seconds of the sources whose frames are held at a time; one source may have more


def divided(videos: list[Video], unit: list[Video], chunk_s: float) -> Iterator[list[Video]]:
    """The units that sources become.

    Args:
        videos: sources of one unit, their clips known.
        unit: all of that unit.
    """
    name, place = unit[0].unit, {id(v): n for n, v in enumerate(unit)}
    parts = {id(v): [] if v.error else parted(v.clips, chunk_s) for v in videos}
    short = [v for v in videos if len(parts[id(v)]) < 2]
    if short:
        if len(short) < len(unit):
            for v in short:
                v.unit = f"{name}_{place[id(short[0])]:02}"
        yield short
    for v in videos:
        clips = parts[id(v)]
        if len(clips) > 1:
            base = name if len(unit) == 1 else f"{name}_{place[id(v)]:02}"
            key = division_key(v, clips)
            todo = [k for k in range(len(clips)) if (k, key) not in v.committed]
            # all of them are there, but nobody has put them together: the last one does
            for k in todo or [len(clips) - 1]:
                yield [_chunk(v, chunk_unit(base, k), k, clips, key)]


def chunk_unit(unit: str, k: int) -> str:
    """Name of the unit that is chunk k of a source."""
    return f"{unit}-{k:03}"


def of_chunk(unit: str) -> tuple[str, int] | None:
    """What `chunk_unit` made the name of: the source's unit and k. None: of nothing."""
    found = re.fullmatch(r"(.+)-(\d{3,})", unit)
    return (found[1], int(found[2])) if found else None


def division_key(v: Video, parts: list[list[Clip]]) -> str:
    """16 hex digits that name how a source is divided: its bytes, its chunks' clips, what its list says of them."""
    said = [v.source.intervals_key(), v.source.interval_meta_key(), list(v.source.meta.items())]
    inside = [v.sha256, v.source.uri, *said, [[c.clip_id for c in part] for part in parts]]
    return hashlib.sha256(json.dumps(inside).encode()).hexdigest()[:16]


def parted(clips: list[Clip], chunk_s: float) -> list[list[Clip]]:
    """Clips in groups of at most `chunk_s` seconds from the first start to the last end; a longer clip is alone."""
    groups: list[list[Clip]] = []
    for clip in sorted(clips, key=lambda c: (c.start_frame, c.end_frame)):
        if groups and max(c.end_s for c in [*groups[-1], clip]) - groups[-1][0].start_s <= chunk_s:
            groups[-1].append(clip)
        else:
            groups.append([clip])
    return groups


def _chunk(v: Video, unit: str, k: int, parts: list[list[Clip]], key: str) -> Video:
    own = parts[k]
    return replace(
        v,
        unit=unit,
        chunk=k,
        chunks=len(parts),
        division=key,
        clips=own,
        frames=None if v.frames is None else _frames(v.frames, own),
        warnings=list(v.warnings),
        counts=dict(v.counts),
        seconds={} if k else dict(v.seconds),
    )


def _frames(frames: Frames, clips: list[Clip]) -> Frames:
    """The samples of some clips; of the rest, a few bytes a frame, all, as frames are named by their index."""
    start, end = clips[0].start_frame, max(c.end_frame for c in clips)
    return replace(frames, samples=[s for s in frames.samples if start <= s.frame < end])
