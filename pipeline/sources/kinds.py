"""Which files of a folder are videos: by name, by their first bytes, and what is left out and why."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Collection

from pipeline.sources.names import SIDECARS, suffix_of

# Extensions of what pipeline.io.ffmpeg.FORMATS opens, by libavformat's demuxer. Its own lists of extensions are
# shorter, and hold sound and pictures too; a test compares them with these.
BY_DEMUXER = {
    "mov": ".mp4 .m4v .mov .qt .mqv .3g2 .3gp .3gp2 .3gpp .3gpp2 .f4v .ismv .mj2 .mp4v .psp",
    "matroska": ".mkv .mk3d .webm",
    "avi": ".avi .divx .xvid .amv",
    "mpegts": ".ts .m2t .m2ts .mts .tp .trp .tod",
    "mpeg": ".mpg .mpeg .mpe .m2p .vob .vro .evo",
    "mpegvideo": ".m1v .m2v .mpv",
    "flv": ".flv",
    "asf": ".asf .wmv .wm .dvr-ms",
    "ogg": ".ogv .ogm",
    "rm": ".rm .rmvb",
    "h264": ".264 .avc .h264 .h26l",
    "hevc": ".265 .h265 .hevc",
    "av1": ".obu",
    "others": ".dv .dif .ivf .mxf .nut .wtv .y4m",
}
VIDEOS = frozenset(" ".join(BY_DEMUXER.values()).split())
# Those demuxers' files that are no videos.
NOT_VIDEOS = frozenset(".avif .heic .heif .ism .isma .m4a .m4b .mka .mks .gif .apng .swf".split())  # noqa: SIM905
# Extensions that say nothing: the content decides.
UNSURE = frozenset(("", ".dat", ".mod", ".ogg", ".ogx"))
HEAD = 1024  # bytes of a file that tell what it is

LEFTOVERS = re.compile(
    r"\.(part|partial|ytdl|crdownload|download|opdownload|filepart|aria2|!ut|!qb|tmp|unconfirmed)$"
    r"|\.part-frag\d+(\.part)?$"
    r"|\.temp\.[a-z0-9]+$"
    r"|\.f(\d{2,4}(-[\w.]+)?|hls[\w-]*|dash[\w=-]*)\.[a-z0-9]+$",  # one stream of several, not yet joined
    re.I,
)
PIECE = re.compile(r"[-_.]dash\.[a-z0-9]+$", re.I)
LEFTOVER = "unfinished or in pieces (a downloader's)"


LOOKED_FOR = "a video is what ffmpeg reads, e.g. .mp4, .mov, .mkv, .webm, .avi"


def why_not(
    name: str, beside: Collection[str] = (), head: Callable[[], bytes] | None = None, spelt: str = ""
) -> str | None:
    """None for a video; of another file what it is counted under.

    Args:
        name: of the file, without folders.
        beside: names in its folder.
        head: reads its first bytes; without it a file is judged by its name alone.
        spelt: a pattern with an extension ('*.tar', '*.f137.mp4') that it matches: whatever it is was asked for.
    """
    asked = re.sub(r"\[.*?\]|[*?]", "x", spelt)
    if is_leftover(name, beside) and not (LEFTOVERS.search(asked) or PIECE.search(asked)):
        return LEFTOVER
    if spelt:
        return None
    suffix = suffix_of(name)
    if suffix in VIDEOS or (suffix in UNSURE and head is not None and is_video(head())):
        return None
    return suffix or "without extension"


def is_leftover(name: str, beside: Collection[str] = ()) -> bool:
    """A download that is not finished, or one stream of it ('x-dash.mp4' only where the others lie beside)."""
    if LEFTOVERS.search(name):
        return True
    if PIECE.search(name) is None:
        return False
    stem = PIECE.sub("", name)
    return any(
        other != name and (posixpath.splitext(other)[0] == stem or PIECE.sub("", other) == stem)
        for other in beside
        if other.startswith(stem)
    )


def sidecars_of(name: str, beside: Collection[str]) -> list[str]:
    """The names beside a video that hold what is said of it."""
    stem = posixpath.splitext(name)[0]
    return [stem + suffix for suffix in SIDECARS if stem + suffix in beside]


def counted(why: Counter[str]) -> str:
    """'3 .jpg, 1 .txt'."""
    return ", ".join(f"{n} {label}" for label, n in sorted(why.items(), key=lambda i: (-i[1], i[0])) if n)


def is_video(head: bytes) -> bool:
    """Do a file's first bytes begin a video? Of sound in a video's container it says no where that shows."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return head[4:8] != b"ftyp" or head[8:11] not in (
            b"M4A",
            b"M4B",
            b"hei",
            b"mif",
            b"msf",
            b"avi",
            b"cr3",
        )
    if head[:4] == b"RIFF":
        return head[8:12] in (b"AVI ", b"AMV ")
    if head[:4] == b"OggS":
        return any(mark in head for mark in (b"\x80theora", b"\x01video", b"BBCD\0", b"OVP80", b"\x80daala"))
    for size, first in ((188, 0), (192, 4), (204, 0)):  # MPEG-TS packets
        if len(head) > first + 2 * size and {head[first + i * size] for i in range(3)} == {0x47}:
            return True
    return head.startswith(MAGIC)


MAGIC = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"\x00\x00\x01\xba",  # MPEG program stream
    b"\x00\x00\x01\xb3",  # MPEG-1 and 2 video
    b"FLV\x01",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF, WMV
    b".RMF",
    b"DKIF",  # IVF
    b"nut/multimedia container",
    b"YUV4MPEG2",
    b"\x06\x0e\x2b\x34\x02\x05\x01\x01",  # MXF
    b"\xb7\xd8\x00\x20\x37\x49\xda\x11\xa6\x4e\x00\x07\xe9\x5e\xad\x8d",  # WTV
)
