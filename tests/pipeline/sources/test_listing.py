from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import os
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from pipeline.faults import SourceFault
from pipeline.record import Source
from pipeline.sources import fetch, listing, network
from pipeline.sources.listing import UNKNOWN_BYTES, list_sources, unit_name, units
from pipeline.sources.names import SourceError, split_options, tar_of


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".scratch").mkdir()
    monkeypatch.setenv(network.ALLOW, "1")  # servers on this machine
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ".scratch"))


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "top").mkdir()
    return tmp_path / "top"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogateescape"))


def names(*args: object, recursive: bool = True) -> list[str]:
    return [s.name for s in list_sources([str(a) for a in args], recursive)]


def uris(*args: object) -> list[str]:
    return [s.uri for s in list_sources([str(a) for a in args])]


def refused(*args: object) -> str:
    with pytest.raises(SourceError) as e:
        list_sources([str(a) for a in args])
    assert "\n" not in str(e.value)
    return str(e.value)


def problem(source: Source) -> str:
    """What fetching the source raises."""
    with pytest.raises(SourceFault) as e, fetch.localised(source):
        pass
    return str(e.value)


# Files, folders, globs ----------------------------------------------------------------------------


def test_a_file_is_taken_whatever_its_extension(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(top, "-v.bin")
    [source] = list_sources([str(top / "-v.bin")])
    assert source == Source(str(top / "-v.bin"), "-v.bin", size=6)
    monkeypatch.chdir(top)
    assert list_sources(["-v.bin", "./-v.bin", f"file://{top}/-v.bin", f"FILE://localhost{top}/-v.bin"]) == [
        source
    ]
    monkeypatch.setenv("HOME", str(top))
    assert list_sources(["~/-v.bin"]) == [source]


def test_a_folder_gives_its_videos_sorted_without_hidden_ones(top: Path) -> None:
    touch(
        top,
        "b.MP4",
        "a/c.webm",
        "a/b.mov",
        "z.txt",
        ".h.mp4",
        "._b.mp4",
        ".git/x.mp4",
        "B/x.mkv",
        "x.mp4/y.avi",
    )
    assert names(top) == ["B/x.mkv", "a/b.mov", "a/c.webm", "b.MP4", "x.mp4/y.avi"]
    assert names(top, recursive=False) == ["b.MP4"]
    assert uris(top)[0] == str(top / "B/x.mkv")


def test_linked_folders_are_entered_once_and_circles_not_at_all(top: Path, tmp_path: Path) -> None:
    touch(top, "real/a.mp4", "real/deep/b.mp4")
    touch(tmp_path, "outside/c.mp4")
    (tmp_path / "outside/back").symlink_to(top)
    (top / "circle").symlink_to(".")
    (top / "real/deep/up").symlink_to("../..")
    (top / "again").symlink_to("real")
    (top / "out1").symlink_to(tmp_path / "outside")
    (top / "out2").symlink_to(tmp_path / "outside")
    (top / "self.mp4").symlink_to("self.mp4")
    assert names(top) == ["out1/c.mp4", "real/a.mp4", "real/deep/b.mp4", "self.mp4"]
    assert names(f"{top}/**/*.mp4") == names(top)
    assert "circle" in problem(list_sources([str(top / "self.mp4")])[0])


def test_the_folder_itself_may_be_a_link(top: Path, tmp_path: Path) -> None:
    touch(top, "a/b.mp4")
    (tmp_path / "link").symlink_to(top)
    assert uris(tmp_path / "link") == [str(tmp_path / "link/a/b.mp4")]


def test_a_folder_that_may_not_be_entered_is_an_error_row(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(top, "a.mp4", "locked/b.mp4")
    scandir = os.scandir

    def locked(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    good, bad = list_sources([str(top)])
    assert (good.name, bad.name) == ("a.mp4", "locked")
    assert problem(bad) == f"{top}/locked: cannot look into this folder: Permission denied"


def test_what_is_not_there_is_said_before_any_work(top: Path) -> None:
    assert "no such file or folder" in refused(top / "none.mp4")
    assert "no SOURCE" in refused()
    assert "matches" in refused(top / "*.mp4")
    assert "unknown kind of address" in refused("ftp://host/v.mp4")
    touch(top, "a.txt", "b.tar", "c.json")
    message = refused(top)
    assert str(top) in message
    assert ".mp4" in message
    assert f"{top}/*.tar" in message
    assert "JSON Lines" in refused(top / "c.json")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", ["a1/x.mp4", "a2/deep/w.mp4", "a2/y.mp4", "b.mp4"]),
        ("*.mp4", ["b.mp4"]),
        ("a?/*.mp4", ["a1/x.mp4", "a2/y.mp4"]),
        ("a[2]", ["a2/deep/w.mp4", "a2/y.mp4"]),
        ("**", ["a1/x.mp4", "a2/deep/w.mp4", "a2/y.mp4", "b.mp4"]),
        ("**/*.mp4", ["a1/x.mp4", "a2/deep/w.mp4", "a2/y.mp4", "b.mp4"]),
        ("a2/**/w.mp4", ["deep/w.mp4"]),
        ("**/deep/*", ["a2/deep/w.mp4"]),
        ("**/*.bin", ["a1/c.bin"]),
    ],
)
def test_globs(top: Path, pattern: str, expected: list[str]) -> None:
    touch(top, "b.mp4", "a1/x.mp4", "a1/c.bin", "a2/y.mp4", "a2/deep/w.mp4", "a2/.h/z.mp4", ".h.mp4", "n.jpg")
    assert names(f"{top}/{pattern}") == expected


def test_a_file_whose_name_looks_like_a_glob_is_that_file(top: Path) -> None:
    touch(top, "a[1].mp4", "a1.mp4")
    assert names(top / "a[1].mp4") == ["a[1].mp4"]


def test_a_source_is_listed_once(top: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(top, "a/x.mp4", "b.mp4")
    (top / "l.txt").write_text("a/x.mp4\n./a/../b.mp4\n")
    with caplog.at_level(logging.WARNING):
        found = uris(top, top / "a", f"{top}/a/../b.mp4", top / "l.txt")
    assert found == [str(top / "a/x.mp4"), str(top / "b.mp4")]
    assert "4 sources are listed more than once" in caplog.text


def test_names_are_unique_so_that_equal_copies_get_ids_of_their_own(top: Path) -> None:
    touch(top, "train/x.mp4", "val/x.mp4", "val/y.mp4")
    forwards = {s.uri: s.name for s in list_sources([f"{top}/train", f"{top}/val"])}
    backwards = {s.uri: s.name for s in list_sources([f"{top}/val", f"{top}/train"])}
    assert len(set(forwards.values())) == 3
    assert forwards == backwards
    assert forwards[f"{top}/val/y.mp4"] == "y.mp4"


@pytest.mark.parametrize(
    "name",
    [
        "a b.mp4",
        'it\'s "q".mp4',
        "a.b.c.mp4",
        "-rf.mp4",
        "a\nb.mp4",
        "日本é.mp4",
        "\udcff\udcfe.mp4",
        "a#b%41?.mp4",
    ],
)
def test_any_name_goes_through_parquet_and_leads_back_to_the_file(top: Path, name: str) -> None:
    touch(top, name)
    (top / "l.csv").write_bytes(
        b'path,title\n"' + name.replace('"', '""').encode("utf-8", "surrogateescape") + b'",x\n'
    )
    for arg in (top, top / name, top / "l.csv"):
        [source] = list_sources([str(arg)])
        table = pa.table({"source": [source.uri], "name": [source.name]})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        back = pq.read_table(buffer).to_pylist()[0]
        assert back == {"source": source.uri, "name": source.name}
        with fetch.localised(Source(back["source"], back["name"])) as local:
            assert Path(local.path).read_bytes() == name.encode("utf-8", "surrogateescape")


def test_names_that_differ_in_undecodable_bytes_stay_apart(top: Path) -> None:
    touch(top, "\udcff.mp4", "\udcfe.mp4", "\\udcff.mp4", "%FF.mp4")
    found = list_sources([str(top)])
    assert len({s.uri for s in found}) == len({s.name for s in found}) == 4


# Lists --------------------------------------------------------------------------------------------

ROWS = [
    {"path": "a.mp4", "title": 'say "hi", twice', "description": "two\nlines; é", "views": "3"},
    {"path": "sub/b.mp4", "title": "", "description": "", "views": "4"},
    {"path": "/abs/c.mp4", "title": "c", "description": "d", "views": ""},
    {"path": "https://h/d.mp4?x=1", "title": "'", "description": "\t", "views": "5"},
]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8-sig") as f:  # with a BOM, as Excel writes it
            writer = csv.DictWriter(f, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_list_gives_the_same_sources(top: Path, suffix: str) -> None:
    found = list_sources([str(write(top / f"l{suffix}", ROWS))])
    assert [s.uri for s in found] == [f"{top}/a.mp4", f"{top}/sub/b.mp4", "/abs/c.mp4", "https://h/d.mp4?x=1"]
    assert [s.name for s in found] == ["a.mp4", "sub/b.mp4", "abs/c.mp4", "https://h/d.mp4?x=1"]
    for source, row in zip(found, ROWS, strict=True):
        assert source.meta == {k: v for k, v in row.items() if k != "path" and v}


def test_a_text_list_is_an_address_a_line(top: Path) -> None:
    (top / "l.txt").write_bytes(b"\xef\xbb\xbfhttps://h/a.mp4\r\n\r\n# why\r\n b c.mp4 \r\n~/d.mp4")
    assert uris(top / "l.txt") == ["https://h/a.mp4", f"{top}/b c.mp4", str(Path.home() / "d.mp4")]


def test_a_list_saved_by_excel_as_unicode(top: Path) -> None:
    (top / "l.tsv").write_text("URL\ttitle\nhttps://h/a.mp4\té\n", encoding="utf-16")
    assert list_sources([str(top / "l.tsv")])[0].meta == {"title": "é"}


def test_a_list_in_another_encoding_gives_storable_text(top: Path) -> None:
    (top / "l.csv").write_bytes("url,títle\nhttps://h/é.mp4,é\n".encode("latin-1"))
    [source] = list_sources([str(top / "l.csv")])
    assert source.uri == source.name == "https://h/%E9.mp4"
    assert source.meta == {"títle": "é"}
    (top / "l.jsonl").write_text(
        '{"url": "https://h/\\ud800.mp4", "a": "\\ud800"}\n{"path": "\\ud800.mp4"}\n'
    )
    for source in list_sources([str(top / "l.jsonl")]):
        "".join([source.uri, source.name, *source.meta.values(), source.problem or ""]).encode()


def test_columns_that_are_not_text_become_json_and_pictures_are_left_out(top: Path) -> None:
    table = pa.table(
        {"url": ["u://v"], "n": [7], "x": [0.5], "tags": [["a", "é"]], "ok": [True], "jpg": [b"\xff"]}
    )
    pq.write_table(table, top / "l.parquet")
    [source] = list_sources([str(top / "l.parquet")])
    assert source.meta == {"n": "7", "x": "0.5", "tags": '["a", "é"]', "ok": "true"}


def test_path_goes_before_url_and_the_url_is_kept(top: Path) -> None:
    (top / "l.csv").write_text("url,Path\nhttps://h/a,a.mp4\nhttps://h/b,\n")
    first, second = list_sources([str(top / "l.csv")])
    assert (first.uri, first.meta) == (f"{top}/a.mp4", {"url": "https://h/a"})
    assert (second.uri, second.meta) == ("https://h/b", {})


def test_a_bad_row_is_an_error_row_and_the_others_go_on(top: Path) -> None:
    (top / "l.csv").write_text('path,t\na.mp4,x\n,y\nb.mp4,p,q\n"c"d,x\ne.mp4,"never closed\nf.mp4,z\n')
    found = list_sources([str(top / "l.csv")])
    assert [s.uri for s in found if not s.problem] == [f"{top}/a.mp4"]
    messages = [problem(s) for s in found if s.problem]
    assert all(m.startswith(f"{top}/l.csv, row ") for m in messages)
    assert [m.split(": ")[0].rsplit(" ", 1)[1] for m in messages] == ["3", "4", "5", "7"]
    (top / "l.jsonl").write_text('{"url": "u://a"}\n{"url": \n[1]\n{"url": 5}\n{"url": "u://b"}\n')
    found = list_sources([str(top / "l.jsonl")])
    assert [s.problem is None for s in found] == [True, False, False, False, True]
    assert len({s.uri for s in found}) == 5


def test_spaces_around_an_address_are_dropped_and_those_of_a_file_name_kept(top: Path) -> None:
    (top / "l.csv").write_text("path\n a.mp4 \n https://h/b.mp4 \n")
    assert uris(top / "l.csv") == [f"{top}/ a.mp4 ", "https://h/b.mp4"]


def test_a_missing_file_of_a_list_is_found_missing_when_fetched(top: Path) -> None:
    (top / "l.txt").write_text("none.mp4\n")
    assert problem(list_sources([str(top / "l.txt")])[0]) == f"{top}/none.mp4: no such file; check the path"


def test_a_list_that_is_none_is_refused(top: Path) -> None:
    (top / "a.csv").write_text("path;title\na.mp4;x\n")
    assert "path;title" in refused(top / "a.csv")
    (top / "b.csv").write_text("path,title\n")
    assert "no rows" in refused(top / "b.csv")
    (top / "c.parquet").write_bytes(b"no parquet")
    assert "Parquet" in refused(top / "c.parquet")
    (top / "d.jsonl").write_text('{"video": "a.mp4"}\n')
    assert "'video'" in refused(top / "d.jsonl")
    (top / "e.csv").mkdir()
    assert "no videos in this folder" in refused(top / "e.csv")
    (top / "e.csv/list.tsv").write_text("path\na.mp4\n")
    said = refused(top / "e.csv")
    assert f"no videos in this folder; to use its .tsv files, pass {top}/e.csv/*.tsv (" in said
    assert len(said.replace(str(top), "")) < 160


# Panda-70M ----------------------------------------------------------------------------------------

PANDA = (
    "videoID,url,timestamp,caption,matching_score,desirable_filtering,shot_boundary_detection\r\n"
    "abc,https://www.youtube.com/watch?v=abc,\"[['0:00:12.345', '0:00:20.1'], ['1:02:03.004', '1:02:09.000']]\","
    '"[""It\'s a \'dog\', running."", \'A person says ""hi"".\']","[0.4618, 0.2957]",'
    "\"['desirable', 'low_desirable_score']\","
    "\"[[['0:00:00.000', '0:00:07.755']], [['0:00:00.000', '0:00:05.996']]]\"\r\n"
)


def test_pandas_own_csv_gives_its_clips_with_what_is_said_of_each(top: Path) -> None:
    (top / "panda.csv").write_text(PANDA, newline="")
    [source] = list_sources([str(top / "panda.csv")])
    assert source.uri == "https://www.youtube.com/watch?v=abc"
    assert source.meta == {"videoID": "abc"}
    assert source.intervals == ((12.345, 20.1), (3600 + 2 * 60 + 3.004, 3600 + 2 * 60 + 9.0))
    assert source.interval_meta == (
        {
            "caption": "It's a 'dog', running.",
            "matching_score": "0.4618",
            "desirable_filtering": "desirable",
            "shot_boundary_detection": '[["0:00:00.000", "0:00:07.755"]]',
        },
        {
            "caption": 'A person says "hi".',
            "matching_score": "0.2957",
            "desirable_filtering": "low_desirable_score",
            "shot_boundary_detection": '[["0:00:00.000", "0:00:05.996"]]',
        },
    )


def test_the_same_clips_as_real_lists(top: Path) -> None:
    row = {"url": "u://v", "timestamp": [["0:01", "2.5"], [3, 4]], "caption": ["a", "b"], "n": 1}
    pq.write_table(
        pa.Table.from_pylist([row | {"timestamp": [["0:01", "2.5"], ["3", "4"]]}]), top / "l.parquet"
    )
    (top / "l.jsonl").write_text(json.dumps(row))
    for name in ("l.parquet", "l.jsonl"):
        [source] = list_sources([str(top / name)])
        assert source.intervals == ((1.0, 2.5), (3.0, 4.0))
        assert source.interval_meta == ({"caption": "a"}, {"caption": "b"})
        assert source.meta == {"n": "1"}


def test_a_list_with_one_row_a_clip_gives_one_source_a_video(top: Path) -> None:
    rows = [
        {"url": url, "timestamp": f"['0:00:0{i}', '0:00:0{i + 1}']", "caption": f"{url} {i}"}
        for url in ("u://a", "u://b")
        for i in range(3)
    ]
    path = write(top / "l.csv", rows)
    for args in ([path], [path, path]):
        a, b = list_sources([str(p) for p in args])
        assert a.intervals == b.intervals == ((0.0, 1.0), (1.0, 2.0), (2.0, 3.0))
        assert [m["caption"] for m in b.interval_meta] == ["u://b 0", "u://b 1", "u://b 2"]
        assert a.meta == {}


@pytest.mark.parametrize(
    "timestamp",
    [
        "[['0:00:05', '0:00:02']]",
        "[['a', 'b']]",
        "[['0:00:05']]",
        "[]",
        "[[1, 2]",
        "[['nan', '1']]",
        "[[-1, 1]]",
        "[" * 999,
    ],
)
def test_times_that_make_no_clips_are_an_error_row(top: Path, timestamp: str) -> None:
    [source] = list_sources([str(write(top / "l.csv", [{"url": "u://v", "timestamp": timestamp}]))])
    assert "l.csv, row 2: timestamp" in problem(source)


def test_a_timestamp_that_is_a_date_is_metadata(top: Path) -> None:
    [source] = list_sources([str(write(top / "l.csv", [{"url": "u://v", "timestamp": "2024-01-01 10:00"}]))])
    assert (source.intervals, source.meta) == (None, {"timestamp": "2024-01-01 10:00"})


# Tars ---------------------------------------------------------------------------------------------


def pack(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


SAMPLES = [
    ("s/0001.json", b'{"title": "one", "n": 2, "tags": ["x"]}'),
    ("s/0001.mp4", b"first" * 1000),
    ("s/0001.txt", "a dög\n".encode()),
    ("s/0002.webm", b"second" * 999),
    ("s/0003.jpg", b"no video"),
    ("s/._0004.mp4", b"no video either"),
    ("s/" + "long" * 60 + ".mp4", b"third"),
    ("s/0005.left.mp4", b"left"),
    ("s/0005.json", b"{broken"),
    ("s/0005.right.mp4", b""),
    ("\udcff#%.mp4", b"name"),
]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_videos_of_a_tar_are_listed_byte_exact(top: Path, format: int) -> None:
    path = pack(top / "a b#c.tar", SAMPLES, format)
    found = list_sources([str(path)])
    videos = [(n, d) for n, d in SAMPLES if n.endswith((".mp4", ".webm")) and "._" not in n]
    data = path.read_bytes()
    for source, (name, expected) in zip(found, videos, strict=True):
        assert source.name == f"a b#c.tar/{name.encode('utf-8', 'backslashreplace').decode()}"
        assert tar_of(source.uri) == str(path)
        source.uri.encode()
        assert source.member is not None
        offset, size = source.member
        assert data[offset : offset + size] == expected
        assert source.size == len(expected)
        with fetch.localised(source) as local:
            assert Path(local.path).read_bytes() == expected
    assert [s.meta for s in found] == [
        {"title": "one", "n": "2", "tags": '["x"]', "caption": "a dög"},
        {},
        {},
        {"json": "{broken"},
        {"json": "{broken"},
        {},
    ]


def test_a_tar_below_a_glob_and_in_a_list(top: Path) -> None:
    pack(top / "x1.tar", SAMPLES[:3])
    pack(top / "x2.tar", SAMPLES[:3])
    assert names(f"{top}/*.tar") == ["x1.tar/s/0001.mp4", "x2.tar/s/0001.mp4"]
    (top / "l.csv").write_text("path,set\nx1.tar,A\n")
    [source] = list_sources([str(top / "l.csv")])
    assert (source.name, source.meta["set"]) == ("x1.tar/s/0001.mp4", "A")


def test_names_in_a_tar_never_lead_out_of_it(top: Path) -> None:
    pack(top / "x.tar", [("../../etc/a.mp4", b"a"), ("/abs/b.mp4", b"b")])
    assert names(top / "x.tar") == ["x.tar/etc/a.mp4", "x.tar/abs/b.mp4"]


def test_a_cut_off_or_damaged_tar_gives_what_is_whole_and_an_error_row(top: Path) -> None:
    members = [(f"{i}.mp4", bytes([i]) * 2000) for i in range(5)]
    data = pack(top / "whole.tar", members).read_bytes()
    with tarfile.open(top / "whole.tar") as tar:
        offsets = [m.offset for m in tar]
        ends = [m.offset_data + m.size for m in tar]
    for size in range(1, len(data) - 20 * 512, 97):
        (top / "cut.tar").write_bytes(data[:size])
        whole = sum(end <= size for end in ends)
        *good, bad = list_sources([str(top / "cut.tar")])
        assert [s.name for s in good] == [f"cut.tar/{i}.mp4" for i in range(whole)]
        assert f"{top}/cut.tar: damaged tar" in problem(bad)
    (top / "hit.tar").write_bytes(data[: offsets[2]] + b"\xa5" * 512 + data[offsets[2] + 512 :])
    *good, bad = list_sources([str(top / "hit.tar"), str(top / "whole.tar")])[:3]
    assert [s.name for s in good] == ["hit.tar/0.mp4", "hit.tar/1.mp4"]
    assert f"no header at byte {offsets[2]}" in problem(bad)
    for content in (b"", b"text\n" * 1000):
        (top / "none.tar").write_bytes(content)
        [bad] = list_sources([str(top / "none.tar")])
        assert "damaged tar" in problem(bad)


def test_a_tar_without_videos_is_refused_alone_and_an_error_row_among_others(top: Path) -> None:
    pack(top / "a.tar", [("a.jpg", b"")])
    pack(top / "b.tar", SAMPLES[:3])
    assert "no videos in this tar" in refused(top / "a.tar")
    bad, good = list_sources([f"{top}/*.tar"])
    assert "no videos in this tar" in problem(bad)
    assert good.name == "b.tar/s/0001.mp4"


# Remote -------------------------------------------------------------------------------------------


class FileServer(BaseHTTPRequestHandler):
    """Serves byte ranges of the files in a folder, and counts what it sent."""

    sent = 0

    def __init__(self, root: Path, *args: object):
        self.root = root
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        try:
            body = (self.root / self.path.strip("/")).read_bytes()
        except FileNotFoundError:
            self.send_error(404)
            return
        if asked := self.headers.get("Range"):
            first, last = (int(n) for n in asked.removeprefix("bytes=").split("-"))
            piece = body[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(piece) - 1}/{len(body)}")
            body = piece
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        FileServer.sent += len(body)
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site(top: Path) -> Iterator[str]:
    FileServer.sent = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(FileServer, top)) as server:
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_an_address_is_listed_without_asking_for_it(site: str) -> None:
    [source] = list_sources([f"{site}/none.mp4?a=1"])
    assert source == Source(f"{site}/none.mp4?a=1", f"{site}/none.mp4?a=1")
    assert FileServer.sent == 0


def test_a_list_on_the_web_means_its_neighbours(site: str, top: Path) -> None:
    (top / "sub").mkdir()
    (top / "sub/l.csv").write_text("path\na.mp4\n../b.mp4\nhttps://h/c.mp4\n")
    assert uris(f"{site}/sub/l.csv") == [f"{site}/sub/a.mp4", f"{site}/b.mp4", "https://h/c.mp4"]
    assert "HTTP 404" in refused(f"{site}/none.csv")


def test_a_tar_on_the_web_is_listed_by_its_headers(site: str, top: Path) -> None:
    big = [(f"{i}.mp4", bytes([i]) * 1_000_000) for i in range(3)]
    pack(top / "x.tar", big)
    found = list_sources([f"{site}/x.tar"])
    assert FileServer.sent < 600_000
    assert [s.uri for s in found] == [f"{site}/x.tar#{i}.mp4" for i in range(3)]
    with fetch.localised(found[2]) as local:
        assert Path(local.path).read_bytes() == big[2][1]
    assert "HTTP 404" in refused(f"{site}/none.tar")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """s3://bucket served from a folder."""
    root = tmp_path / "s3"
    (root / "bucket").mkdir(parents=True)
    fs = pafs.SubTreeFileSystem(str(root), pafs.LocalFileSystem())
    for module in (fetch, listing):
        key = lambda uri, *_: (fs, split_options(uri)[0].split("://")[1])  # noqa: E731
        monkeypatch.setattr(module, "object_store", key)
    return root / "bucket"


def test_objects_prefixes_and_globs_of_a_bucket(bucket: Path) -> None:
    touch(bucket, "p/a b.mp4", "p/q/c.webm", "p/n.txt", "p/.h.mp4", "p/x1/d.mp4", "e.mp4")
    [source] = list_sources(["s3://bucket/p/a b.mp4"])
    assert source == Source("s3://bucket/p/a b.mp4", "a b.mp4", size=9)
    assert names("s3://bucket/p/") == names("s3://bucket/p") == ["a b.mp4", "q/c.webm", "x1/d.mp4"]
    assert uris("gs://bucket/p?region=x")[1] == "gs://bucket/p/q/c.webm?region=x"
    assert names("s3://bucket/*.mp4") == ["e.mp4"]
    assert names("s3://bucket/p/?1/*.mp4") == ["x1/d.mp4"]
    assert names("s3://bucket/**/*.webm") == ["p/q/c.webm"]
    assert "no such object" in refused("s3://bucket/none")
    assert "matches" in refused("s3://bucket/*.avi")
    touch(bucket, "t/a.csv")
    assert "s3://bucket/t/*.csv" in refused("s3://bucket/t")


def test_lists_and_tars_in_a_bucket(bucket: Path) -> None:
    (bucket / "lists").mkdir()
    (bucket / "lists/l.csv").write_text("path\n../v/a.mp4\n")
    assert uris("s3://bucket/lists/l.csv") == ["s3://bucket/v/a.mp4"]
    pack(bucket / "x.tar", SAMPLES)
    found = list_sources(["s3://bucket/*.tar"])
    assert len(found) == 6
    with fetch.localised(found[0]) as local:
        assert Path(local.path).read_bytes() == SAMPLES[1][1]


def test_a_list_in_a_bucket_names_neither_local_files_nor_other_buckets(bucket: Path) -> None:
    (bucket / "lists").mkdir()
    rows = ["/etc/passwd", "file:///etc/passwd", "~/x.mp4", "../../other/x.mp4", "/etc/x.tar"]
    (bucket / "lists/l.txt").write_text("\n".join([*rows, "../v/a.mp4"]))
    *bad, good = list_sources(["s3://bucket/lists/l.txt"])
    assert good.uri == "s3://bucket/v/a.mp4"
    assert len(bad) == len(rows)
    for source in bad:
        assert "cannot name files of this machine" in problem(
            source
        ) or "out of the list's bucket" in problem(source)


# Units --------------------------------------------------------------------------------------------


def bytes_of(sources: list[Source]) -> int:
    return sum(UNKNOWN_BYTES if s.size is None else s.size for s in sources)


def test_units_are_contiguous_bounded_and_keep_large_sources_alone() -> None:
    sizes = [10, 20, None, 100, 5, 5, None, 90, 200, 1, *[1] * 9]
    listed = [Source(f"/{i}", f"{i}", size=size) for i, size in enumerate(sizes)]
    groups = units(listed, max_bytes=90, max_sources=4)
    assert [s for g in groups for s in g] == listed
    assert groups == units(listed, max_bytes=90, max_sources=4)
    for group in groups:
        assert len(group) <= 4
        assert len(group) == 1 or bytes_of(group) <= 90
    for a, b in itertools.pairwise(groups):  # no group could have taken the next source as well
        assert len(a) == 4 or bytes_of([*a, b[0]]) > 90
    assert units([]) == []


def test_short_sources_go_together_and_long_ones_stay_alone_as_far_as_sizes_and_intervals_tell() -> None:
    minute = UNKNOWN_BYTES
    sizes = [minute // 20] * 6 + [2 * minute, None] + [minute // 2] * 3
    listed = [Source(f"/{i}", f"{i}", size=size) for i, size in enumerate(sizes)]
    assert [len(g) for g in units(listed, max_bytes=64 << 20, max_sources=4, short=1)] == [4, 2, 1, 1, 2, 1]
    assert [len(g) for g in units(listed, max_bytes=64 << 20, max_sources=4, short=2)] == [4, 2, 2, 2, 1]
    # of a source of unknown size a few seconds are given
    given = [Source(f"/{i}", f"{i}", intervals=((5.0, 8.0), (9.0, 12.0))) for i in range(4)]
    assert [len(g) for g in units(given, max_bytes=64 << 20, max_sources=8, short=1)] == [4]


def test_a_units_name_depends_on_its_uris_alone() -> None:
    a, b = Source("/a", "a", size=1), Source("/b", "b")
    assert unit_name([a, b]) == unit_name([Source("/a", "other", {"x": "y"}), b])
    assert len({unit_name(g) for g in ([a], [b], [a, b], [b, a], [Source("/a/b", "")])}) == 5
    assert len(unit_name([a])) == 16
    int(unit_name([a]), 16)


# Scale --------------------------------------------------------------------------------------------


def test_a_long_list_costs_little_a_row(top: Path) -> None:
    import resource
    import time

    with open(top / "l.csv", "w") as f:
        f.write("path,title\n")
        f.writelines(f"folder/{i}.mp4,Title {i}\n" for i in range(50_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    assert len(list_sources([str(top / "l.csv")])) == 50_000
    assert time.process_time() - start < 10  # about 1 s on an idle machine
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 << 10  # KiB; about 40 MiB


def test_sources_of_unknown_size_are_bounded_by_a_guess():
    listed = [Source(f"http://h/{i}.mp4", f"{i}") for i in range(20)]
    assert {len(g) for g in units(listed)} == {4}
    assert [len(g) for g in units([*listed[:3], Source("/a", "a", size=60 << 20)])] == [3, 1]
