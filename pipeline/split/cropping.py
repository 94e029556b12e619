"""The part of the stored picture that a container says is shown: mp4's `clap`, Matroska's PixelCrop.

libavformat reads them (since 7.1) but PyAV does not hand them on, and older ones do not read them at all, so the
headers are read here. Whatever is not as the standards say means: no crop.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

Crop = tuple[int, int, int, int]  # left, top, right, bottom: pixels cut off
NONE: Crop = (0, 0, 0, 0)
MOST = 1 << 26  # bytes of headers to look at


def container_crop(path: str, format_name: str, nth: int, size: tuple[int, int]) -> Crop:
    """What a container cuts off the pictures of its n-th video track.

    Args:
        format_name: libavformat's name of the demuxer.
        size: width and height of the decoded pictures.
    """
    try:
        with open(path, "rb") as f:
            if format_name.startswith("mov,"):
                crop = _mp4(f, nth, size)
            elif format_name.startswith("matroska"):
                crop = _matroska(f, nth)
            else:
                return NONE
    except (OSError, ValueError, IndexError, struct.error, ZeroDivisionError):
        return NONE
    left, top, right, bottom = crop
    return crop if left + right < size[0] and top + bottom < size[1] else NONE


# ISO base media file format (ISO/IEC 14496-12) -----------------------------------------------------


def _mp4(f: BinaryIO, nth: int, size: tuple[int, int]) -> Crop:
    tracks = [t for t in _inside(_moov(f)[1], b"trak") if _handler(t) == b"vide"]
    return _clap(tracks[nth], size)


def _moov(f: BinaryIO) -> tuple[int, bytes]:
    """Place and content of the movie box."""
    end = f.seek(0, 2)
    at = 0
    while at + 8 <= end:
        f.seek(at)
        head = f.read(16)
        length, kind = struct.unpack(">I4s", head[:8])
        start = at + 8
        if length == 1:
            length, start = struct.unpack(">Q", head[8:])[0], at + 16
        length = length or end - at
        if kind == b"moov":
            f.seek(start)
            return start, f.read(min(length - (start - at), MOST))
        at += max(length, 8)
    raise ValueError("no movie box")


def forget_turn(path: Path) -> None:
    """Take the display matrix of the only track out of an mp4 that an ffmpeg before 7 has written.

    Those copy the source's to what they encode, even where they were told not to turn it.
    """
    with open(path, "r+b") as f:
        start, moov = _moov(f)
        tkhd = moov.index(b"tkhd")  # comes before anything that could hold these letters by chance
        f.seek(start + tkhd + (44 if moov[tkhd + 4] == 0 else 56))
        f.write(struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of the boxes that follow one another in `data`."""
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if length == 1:
            length, start = struct.unpack_from(">Q", data, start)[0], start + 8
        if length and length < start - at:
            return
        length = length or len(data) - at
        yield kind, data[start : at + length]
        at += length


def _inside(data: bytes, *path: bytes) -> list[bytes]:
    """Content of every box at that path of names."""
    for name in path[:1]:
        return [found for kind, inner in _boxes(data) if kind == name for found in _inside(inner, *path[1:])]
    return [data]


def _handler(trak: bytes) -> bytes:
    return next((hdlr[8:12] for hdlr in _inside(trak, b"mdia", b"hdlr")), b"")


def _clap(trak: bytes, size: tuple[int, int]) -> Crop:
    """The clean aperture of a track's first sample entry, to whole pixels (8.5.2 and 12.1.4).

    The aperture's centre is that of the picture, (side − 1) ÷ 2, moved by an offset.
    """
    stsd = _inside(trak, b"mdia", b"minf", b"stbl", b"stsd")[0]
    entry = next(_boxes(stsd[8:]))[1]
    for clap in _inside(entry[78:], b"clap"):  # behind the fields of a visual sample entry
        values = struct.unpack(">8i", clap[:32])
        sides = [Fraction(n, d) for n, d in zip(values[::2], values[1::2], strict=True)]
        cut = []
        for whole, shown, offset in zip(size, sides[:2], sides[2:], strict=True):
            if not 0 < shown <= whole:
                return NONE
            first = Fraction(whole - 1, 2) + offset - (shown - 1) / 2
            last = first + shown - 1
            if first < 0 or last > whole - 1:
                return NONE
            cut.append((int(first), whole - 1 - int(last)))
        (left, right), (top, bottom) = cut
        return left, top, right, bottom
    return NONE


# Matroska (RFC 9559) and its EBML (RFC 8794) ---------------------------------------------------------

SEGMENT, TRACKS, TRACK, TYPE, VIDEO = 0x18538067, 0x1654AE6B, 0xAE, 0x83, 0xE0
CROPS = (0x54CC, 0x54BB, 0x54DD, 0x54AA)  # left, top, right, bottom
UNKNOWN_SIZE = -1


def _matroska(f: BinaryIO, nth: int) -> Crop:
    end = f.seek(0, 2)
    at = 0
    while at < end:
        f.seek(at)
        kind, length, start = _element(f.read(12), 0)
        if kind == SEGMENT:
            at += start  # its children follow
            continue
        if kind == TRACKS and 0 <= length <= MOST:
            f.seek(at + start)
            tracks = [d for k, d in _elements(f.read(length)) if k == TRACK]
            videos = [t for t in tracks if _uint(dict(_elements(t)).get(TYPE, b"")) == 1]
            shown = dict(_elements(dict(_elements(videos[nth]))[VIDEO])) if videos[nth:] else {}
            left, top, right, bottom = (_uint(shown.get(c, b"")) for c in CROPS)
            return left, top, right, bottom
        if length == UNKNOWN_SIZE:  # a cluster of a live stream: the tracks come before it
            return NONE
        at += start + length
    return NONE


def _element(data: bytes, at: int) -> tuple[int, int, int]:
    """Id, size (UNKNOWN_SIZE: up to where it ends by itself) and place of the content of an element."""
    n = 9 - data[at].bit_length()
    if n > 4:
        raise ValueError("no EBML id")
    kind = int.from_bytes(data[at : at + n], "big")
    at += n
    n = 9 - data[at].bit_length()
    if n > 8:
        raise ValueError("no EBML size")
    size = int.from_bytes(data[at : at + n], "big") & ((1 << 7 * n) - 1)
    return kind, UNKNOWN_SIZE if size == (1 << 7 * n) - 1 else size, at + n


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        kind, length, start = _element(data, at)
        if length == UNKNOWN_SIZE:
            return
        yield kind, data[start : start + length]
        at = start + length


def _uint(data: bytes) -> int:
    return int.from_bytes(data, "big")
