"""Every file of a folder is taken, lies beside one that is, or is named as left out."""

from __future__ import annotations

import logging
import re
import subprocess
import tempfile
from pathlib import Path

import av
import imageio_ffmpeg
import pyarrow.fs as pafs
import pytest
from av.format import ContainerFormat

from pipeline.io.ffmpeg import FORMATS
from pipeline.sources import listing
from pipeline.sources.kinds import NOT_VIDEOS, UNSURE, VIDEOS, is_leftover, is_video
from pipeline.sources.listing import list_sources
from pipeline.sources.signed import split_options
from tests.fixtures import videos


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ".scratch"))


@pytest.fixture
def top(tmp_path: Path) -> Path:
    (tmp_path / "top").mkdir()
    return tmp_path / "top"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"text\n")


def names(*args: object) -> list[str]:
    return [s.name for s in list_sources([str(a) for a in args])]


def test_every_extension_that_libavformat_lists_for_what_we_open_is_known() -> None:
    for demuxer in FORMATS.split(","):
        try:
            theirs = ContainerFormat(demuxer, "r").extensions
        except ValueError:
            continue
        for extension in theirs:
            assert f".{extension}" in VIDEOS | NOT_VIDEOS | UNSURE, (demuxer, extension)


def test_every_file_is_taken_or_counted_as_left_out(top: Path, caplog: pytest.LogCaptureFixture) -> None:
    """However the extensions are mixed, the counts add up to what is there."""
    taken = [f"v{i}{s}" for i, s in enumerate(sorted(VIDEOS))]
    other = [
        "a.jpg",
        "b.jpg",
        "c.txt",
        "d.swf",
        "sub/e.xyz",
        "README",
        "f.mp4.part",
        "v9.f137.mp4",
        "g.gif",
        "._v1.mp4",
    ]
    touch(top, *taken, *other, ".hidden")
    with caplog.at_level(logging.WARNING):
        assert sorted(names(top)) == sorted(taken)
    [line] = caplog.messages
    assert f"{len(taken)} video{'' if len(taken) == 1 else 's'}; left out {len(other)} other files: " in line
    counts = {label: int(n) for n, label in re.findall(r"(\d+) ([^,]+)", line.split("other files: ")[1])}
    assert counts == {
        ".jpg": 2,
        ".txt": 1,
        ".swf": 1,
        ".xyz": 1,
        ".gif": 1,
        "without extension": 1,
        "hidden": 1,
        "unfinished or in pieces (a downloader's)": 2,
    }


@pytest.mark.parametrize(
    "name",
    [
        *(
            "a.mp4.part",
            "a.webm.part-Frag3.part",
            "a.mp4.ytdl",
            "a.mp4.crdownload",
            "a.f137.mp4",
            "a.f251.webm",
        ),
        *(
            "a.f137.mp4.part",
            "a.temp.mp4",
            "a.mp4.aria2",
            "a.mp4.download",
            "a.fhls-1080p.mp4",
            "a.f140-1.m4a",
        ),
    ],
)
def test_leftovers_of_downloaders_are_left_out_unless_asked_for(
    top: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    touch(top, name, "b.mp4", "c.fast.mp4", "of1.mp4", "f16.mp4")
    kept = ["b.mp4", "c.fast.mp4", "f16.mp4", "of1.mp4"]
    with caplog.at_level(logging.WARNING):
        assert names(top) == names(f"{top}/*") == kept
        assert names(f"{top}/*.mp4") == kept
    assert "1 unfinished or in pieces" in caplog.text
    assert names(top / name) == [name]
    tail = name[1:]
    assert names(f"{top}/*{tail}") == [name]


def test_one_stream_of_a_download_is_told_from_a_video_about_a_dash(top: Path) -> None:
    touch(top, "x-dash.mp4", "x-dash.m4a", "y-dash.mp4", "y.mp4", "100m-dash.mp4", "-dash.mp4")
    assert names(top) == ["-dash.mp4", "100m-dash.mp4", "y.mp4"]
    assert names(f"{top}/*-dash.mp4") == ["-dash.mp4", "100m-dash.mp4", "x-dash.mp4", "y-dash.mp4"]
    assert is_leftover("x-dash.mp4", {"x-dash.m4a"})
    assert not is_leftover("x-dash.mp4", {"x-dash.mp4", "xy.mp4"})


FORMATS_TO_WRITE = [
    "mp4",
    "mov",
    "matroska",
    "webm",
    "avi",
    "flv",
    "mpegts",
    "mpeg",
    "asf",
    "nut",
    "ivf",
    "mpeg2video",
]
CODECS = {
    "flv": "flv",
    "webm": "libvpx",
    "ivf": "libvpx",
    "mpeg": "mpeg2video",
    "mpeg2video": "mpeg2video",
    "ogg": "libtheora",
}


@pytest.mark.parametrize("format", [*FORMATS_TO_WRITE, "ogg"])
def test_a_file_without_extension_is_known_by_its_content(top: Path, format: str) -> None:
    path = top / "no_extension"
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-f",
        "lavfi",
        "-i",
        "testsrc=s=64x48:r=25:d=0.5",
    ]
    codec = CODECS.get(format, "mpeg4")
    subprocess.run([*command, "-c:v", codec, "-f", format, str(path)], check=True)
    with av.open(str(path)) as container:  # it is a video, says libavformat
        assert container.streams.video
    assert names(top) == ["no_extension"]
    path.rename(top / "odd.dat")
    assert names(top) == ["odd.dat"]


def test_what_is_no_video_by_its_content_is_left_out(top: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(top, "a.mp4", "README", "go.mod")
    (top / "song").write_bytes(videos.made(videos.audio_only, suffix=".aac").read_bytes())
    (top / "picture").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))
    (top / "sound.ogg").write_bytes(b"OggS\0\2" + bytes(22) + b"\1\x1e\1vorbis" + bytes(900))
    (top / "empty").touch()
    (top / "fifo").symlink_to("/dev/zero")
    with caplog.at_level(logging.WARNING):
        assert names(top) == ["a.mp4"]
    assert "5 without extension" in caplog.text
    for brand in (b"M4A ", b"heic", b"avif", b"mif1"):
        assert not is_video(b"\0\0\0\x20ftyp" + brand + bytes(100))


# Beside -------------------------------------------------------------------------------------------


def test_what_lies_beside_a_video_is_its_metadata_as_in_a_tar(
    top: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(top, "a.mp4", "sub/a.mkv", "b.mp4", "lonely.txt", "c.mp4")
    (top / "a.json").write_text('{"title": "one", "n": 2, "from": "https://h/x?token=abcdefgh"}')
    (top / "a.txt").write_bytes("a dög\n".encode("latin-1"))
    (top / "sub/a.txt").write_text("  another\n")
    (top / "b.txt").write_bytes(b"x" * (1 << 20) + b"y")  # too long to be said of a video
    (top / "c.json").write_text("{broken")
    expected = {
        "a.mp4": {"title": "one", "n": "2", "from": "https://h/x", "caption": "a dög"},
        "b.mp4": {},
        "c.mp4": {"json": "{broken"},
        "sub/a.mkv": {"caption": "another"},
    }
    with caplog.at_level(logging.WARNING):
        assert {s.name: s.meta for s in list_sources([str(top)])} == expected
    assert "left out 1 other file: 1 .txt" in caplog.text
    assert "b.txt: larger than 1 MiB" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert {s.name: s.meta for s in list_sources([f"{top}/*"])} == expected
        assert {s.name: s.meta for s in list_sources([f"{top}/**"])} == expected
    assert caplog.text.count("left out 1 other file: 1 .txt") == 2
    [source] = list_sources([str(top / "a.mp4")])
    assert source.meta == expected["a.mp4"]


def test_a_row_of_a_list_has_its_own_columns_only(top: Path) -> None:
    touch(top, "a.mp4", "a.txt")
    (top / "l.csv").write_text("path,title\na.mp4,t\n")
    assert list_sources([str(top / "l.csv")])[0].meta == {"title": "t"}


def test_a_bucket_is_sorted_out_like_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "s3"
    fs = pafs.SubTreeFileSystem(str(root), pafs.LocalFileSystem())
    touch(
        root / "bucket" / "p", "a.divx", "b.jpg", "x.f137.mp4", "q/x-dash.mp4", "q/x-dash.m4a", "q/d-dash.mp4"
    )
    key = lambda uri, *_: (fs, split_options(uri)[0].split("://")[1])  # noqa: E731
    monkeypatch.setattr(listing, "object_store", key)
    with caplog.at_level(logging.WARNING):
        assert names("s3://bucket/p") == names("s3://bucket/p/**") == ["a.divx", "q/d-dash.mp4"]
    assert caplog.text.count("left out 4 other files: 3 unfinished") == 2
    assert names("s3://bucket/p/*.f137.mp4") == ["x.f137.mp4"]
