"""The bytes that a page plays and shows: mp4s and JPEGs, by byte range from wherever they lie.

Nothing is unpacked and nothing copied. A clip's mp4 is read from its staging tar, or from its shard where the tars were
deleted; its stills from beside it, or else decoded from the mp4 by a confined child process.
"""

from __future__ import annotations

import io
import queue
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.inspector.index import Index
from pipeline.io.store import Ranges, Store

BLOCK = 1 << 20  # bytes read at a time
STILL_SIDE = 512  # pixels, of a frame that is decoded
STALL_S, CHILD_GB = 20.0, 4.0
MOST_MP4 = 256 << 20  # bytes of an mp4 that frames are decoded from
KEPT_STILLS = 32 << 20  # bytes of decoded ones
SHOWN = 3  # frames of a clip without stills


@dataclass(frozen=True)
class Place:
    """Where some bytes lie."""

    store: Store
    tar: str
    offset: int
    size: int


class Gone(Exception):
    """There are no such bytes; the message is a sentence."""


class Decoder:
    """One confined child that opens mp4s, and the one thread that talks to it: a child lives as long as the thread
    that started it."""

    def __init__(self) -> None:
        self._child: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")

    def call(self, work: Callable[[], Any]) -> Any:
        """What it returns, run in that thread."""
        return self._thread.submit(work).result()

    def child(self, function: str, *args: Any) -> Any:
        """What a function of this module returns in the child; to be called in that thread. Raises Gone."""
        from pipeline.io.isolate import Child, ChildError

        self._child = self._child or Child(CHILD_GB)
        try:
            return self._child.call(f"{__name__}:{function}", *args, stall_s=STALL_S)
        except (ChildError, OSError, MemoryError) as e:
            raise Gone(str(e)) from e

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self._child is not None:
            self._child.close()


class Media:
    """Of one run.

    Args: decoder: one that is shared; none: one of its own.
    """

    def __init__(self, index: Index, decoder: Decoder | None = None):
        self.index = index
        self.decoder = decoder or Decoder()
        self._tars = set(index.media.list("media", ".tar"))
        self._shards = set(index.store.list("shards", ".tar"))
        self._idle: dict[int, queue.LifoQueue[Ranges]] = {}
        self._stills: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    def place(self, row: int) -> Place:
        """Of a clip's mp4. Raises Gone, StoreError."""
        index = self.index
        tar, offset, size = index.mp4(row)
        if tar in self._tars:
            return Place(index.media, tar, offset, size)
        if (shard := index.shard[row]) in self._shards and shard is not None and index.shard_offset[row] >= 0:
            return Place(index.store, shard, int(index.shard_offset[row]), size)
        raise Gone(
            "the clip's media is gone: its staging tar was deleted, and it is in no shard that is there"
        )

    def read(self, place: Place) -> bytes:
        """Raises StoreError."""
        return b"".join(self.blocks(place, 0, place.size))

    def blocks(self, place: Place, start: int, end: int) -> Iterator[bytes]:
        """Bytes [start, end) of what lies there, a block at a time. Raises StoreError."""
        idle = self._idle.setdefault(id(place.store), queue.LifoQueue())
        for at in range(start, end, BLOCK):
            try:
                ranges = idle.get_nowait()
            except queue.Empty:
                ranges = Ranges(place.store, keep_open=16)
            data = ranges.read(place.tar, place.offset + at, min(BLOCK, end - at))
            idle.put(ranges)
            yield data

    def still(self, row: int, k: int) -> bytes:
        """A clip's k-th still, a JPEG; decoded where none was kept: the k-th of SHOWN. Raises Gone, StoreError."""
        index = self.index
        found = index.still(row, k)
        if found is not None and found[0] in self._tars:
            return self.read(Place(index.media, *found))
        if not 0 <= k < max(SHOWN, index.still_count(row)):
            raise Gone(f"the clip has no still {k}")
        return self.decoder.call(partial(self._decoded, row, k))

    def _decoded(self, row: int, k: int) -> bytes:
        """Of those decoded before, or else decoded now; in the one thread that does this."""
        key = row, k
        if key not in self._stills:
            self._stills[key] = self._decode(row, k)
        self._stills.move_to_end(key)
        while sum(map(len, self._stills.values())) > KEPT_STILLS:
            self._stills.popitem(last=False)
        return self._stills[key]

    def _decode(self, row: int, k: int) -> bytes:
        place = self.place(row)
        if place.size > MOST_MP4:
            raise Gone("the clip has no stills, and is too large to decode one")
        count = max(self.index.still_count(row), SHOWN)
        at = (k + 0.5) / count * float(self.index.end[row] - self.index.start[row])
        try:
            return self.decoder.child("frame", self.read(place), at)
        except Gone as e:
            raise Gone(f"the clip has no stills, and none can be decoded: {e}") from e

    def times(self, row: int) -> list[float]:
        """When each frame of a clip's mp4 is shown, seconds from its start. Raises Gone, StoreError."""
        place = self.place(row)
        if place.size > MOST_MP4:
            raise Gone("the clip is too large to look for its frames")
        return self.decoder.call(lambda: self.decoder.child("frame_times", self.read(place)))

    def close(self) -> None:
        self.decoder.close()


def frame(mp4: bytes, at: float, beat: Callable[[], None]) -> bytes:
    """The frame of an mp4 that is shown at a time, seconds from its start, as a JPEG. Runs in the child."""
    import av
    import cv2

    with av.open(io.BytesIO(mp4), mode="r", format="mp4") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        base = stream.time_base or 1
        wanted = float((stream.start_time or 0) * base) + at
        container.seek(int(wanted / base), stream=stream, backward=True)
        shown: Any = None
        for picture in container.decode(stream):
            beat()
            if shown is not None and picture.time > wanted:
                break
            shown = picture
        if shown is None:
            raise ValueError("no frame in it")
        width = shown.width * float(stream.sample_aspect_ratio or 1)
    scale = min(1.0, STILL_SIDE / max(width, shown.height))
    size = max(2, round(width * scale)), max(2, round(shown.height * scale))
    small = cv2.resize(shown.to_ndarray(format="bgr24"), size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()


def frame_times(mp4: bytes, beat: Callable[[], None]) -> list[float]:
    """When each frame of an mp4 is shown, seconds from its start; nothing is decoded. Runs in the child."""
    import av

    with av.open(io.BytesIO(mp4), mode="r", format="mp4") as container:
        stream = container.streams.video[0]
        first = float((container.start_time or 0) / av.time_base)
        found = []
        for packet in container.demux(stream):
            beat()
            if packet.pts is not None and packet.size and not packet.is_discard:
                found.append(round(float(packet.pts * packet.time_base) - first, 6))
    return sorted(found)


def asked_range(header: str | None, size: int) -> tuple[int, int] | None:
    """[start, end) of a Range header; none: all of it (also for what is no single range, as RFC 9110 allows).

    Raises IndexError where no byte is in it.
    """
    said = re.fullmatch(r"bytes=(\d{0,19})-(\d{0,19})", (header or "").strip().replace(" ", ""))
    if said is None or said.group(0) == "bytes=-":
        return None
    first, last = said.groups()
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < int(first):
            return None  # not a range
    if start >= size or start >= end:
        raise IndexError
    return start, end
