"""What lists may hold: clips, captions, other names and encodings; and what is told of the rest."""

from __future__ import annotations

import csv
import errno
import json
import logging
import random
import tempfile
from collections.abc import Iterator
from datetime import time, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import curate
from pipeline.faults import SourceFault
from pipeline.record import Source
from pipeline.sources import fetch, lists
from pipeline.sources.columns import seconds
from pipeline.sources.listing import list_sources
from pipeline.sources.names import SourceError
from tests.fixtures import videos


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ".scratch"))


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING)
    return caplog


def written(folder: Path, rows: list[dict[str, object]], suffix: str = ".csv") -> str:
    path = folder / f"l{suffix}"
    if suffix == ".csv":
        with open(path, "w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def listed(
    folder: Path, rows: list[dict[str, object]], suffix: str = ".csv", **named: dict[str, str]
) -> list[Source]:
    return list_sources([written(folder, rows, suffix)], **named)  # type: ignore[arg-type]


def problem(source: Source) -> str:
    with pytest.raises(SourceFault) as e, fetch.localised(source):
        pass
    return str(e.value)


# Clips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "names", [("start", "end"), ("Start", "END"), ("start_s", "end_s"), ("start_time", "end_time")]
)
def test_rows_with_start_and_end_are_the_clips_of_their_video(
    tmp_path: Path, suffix: str, names: tuple[str, str]
) -> None:
    start, end = names
    rows = [
        {"path": "a.mp4", start: "1.5", end: "3", "caption": "one"},
        {"path": "b.mp4", start: "0:01:02.25", end: "1:05", "caption": "two"},
        {"path": "a.mp4", start: "0", end: "1.5", "caption": "three"},
        {"path": "a.mp4", start: "1.5", end: "3", "caption": "again"},
    ]
    a, b = listed(tmp_path, rows, suffix)
    assert (a.intervals, [m["caption"] for m in a.interval_meta]) == (
        ((1.5, 3.0), (0.0, 1.5)),
        ["one", "three"],
    )
    assert (b.intervals, b.interval_meta) == (((62.25, 65.0),), ({"caption": "two"},))
    assert a.meta == b.meta == {}


def test_numbers_and_times_of_a_table_are_times(tmp_path: Path) -> None:
    for start, end in (
        (1.5, 3),
        (timedelta(seconds=1.5), timedelta(seconds=3)),
        (time(0, 0, 1, 500000), time(0, 0, 3)),
    ):
        [source] = listed(tmp_path, [{"path": "a", "start": start, "end": end}], ".parquet")
        assert source.intervals == ((1.5, 3.0),)


def test_seconds_reads_what_a_clock_shows() -> None:
    rng = random.Random(0)
    for _ in range(200):
        ms = rng.randrange(10**8)
        h, m, s = ms // 3_600_000, ms // 60_000 % 60, ms / 1000 % 60
        for text in (f"{h}:{m:02}:{s:06.3f}", f"{h}:{m:02}:{s:06.3f}".replace(".", ","), str(ms / 1000)):
            assert seconds(text) == pytest.approx(ms / 1000, abs=1e-6)


@pytest.mark.parametrize(
    ("start", "end"),
    [("3", "1"), ("1", "1"), ("-1", "1"), ("nan", "1"), ("0", "inf"), ("1", ""), ("", "2"), ("1", "x")],
)
def test_a_row_whose_times_make_no_clip_is_an_error_row(tmp_path: Path, start: str, end: str) -> None:
    [source] = listed(tmp_path, [{"path": "a.mp4", "start": start, "end": end}])
    assert "l.csv, row 2: " in problem(source)


def test_rows_without_times_are_whole_videos_and_dates_are_metadata(
    tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    [a, b] = listed(
        tmp_path,
        [
            {"path": "a.mp4", "start_time": "", "end_time": ""},
            {"path": "b.mp4", "start_time": "2024-01-01 10:00", "end_time": "2024-01-02"},
        ],
    )
    assert (a.intervals, a.meta) == (None, {})
    assert (b.intervals, b.meta) == (None, {"start_time": "2024-01-01 10:00", "end_time": "2024-01-02"})
    [c] = listed(tmp_path, [{"path": "c.mp4", "start": "5"}])
    assert (c.intervals, c.meta) == (None, {"start": "5"})
    assert "look like times" in told.text


def test_a_hundred_thousand_clips_of_one_video_are_joined_quickly(tmp_path: Path) -> None:
    import time as clock

    with open(tmp_path / "l.csv", "w") as f:
        f.write("path,start,end\n")
        f.writelines(f"a.mp4,{i},{i + 1}\n" for i in range(20_000))
    start = clock.process_time()
    [source] = list_sources([str(tmp_path / "l.csv")])
    assert len(source.intervals or ()) == 20_000
    assert clock.process_time() - start < 5  # 0.3 s on an idle machine


# Captions and columns -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_caption_in_any_case_and_several_in_one_cell(tmp_path: Path, suffix: str) -> None:
    several: object = ["a dog runs", "", " a dog "]
    rows: list[dict[str, object]] = [
        {"path": "a.mp4", "Caption": str(several) if suffix == ".csv" else several}
    ]
    [source] = listed(tmp_path, rows, suffix)
    assert source.meta == {"caption": "a dog runs", "captions": '["a dog runs", "a dog"]'}
    [source] = listed(tmp_path, [{"path": "a.mp4", "CAPTION": "[Music] plays"}], suffix)
    assert source.meta == {"caption": "[Music] plays"}


def test_a_list_of_captions_for_each_clip(tmp_path: Path) -> None:
    row: dict[str, object] = {"path": "a", "timestamp": [[0, 1], [1, 2]], "caption": [["x", "y"], ["z"]]}
    [source] = listed(tmp_path, [row], ".jsonl")
    assert source.interval_meta == ({"caption": "x", "captions": '["x", "y"]'}, {"caption": "z"})


def test_columns_can_be_named_on_the_command_line(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"Clip": "a.mp4", "text": "hello", "t0": "1", "t1": "2", "path": "old", "n": "3"}
    ]
    assert curate.renamed("path=clip, caption=text") == {"clip": "path", "text": "caption"}
    columns = curate.renamed("path=clip,caption=text,start=t0,end=t1")
    for suffix in (".csv", ".jsonl", ".parquet"):
        [source] = listed(tmp_path, rows, suffix, columns=columns)
        assert (source.uri, source.intervals) == (f"{tmp_path}/a.mp4", ((1.0, 2.0),))
        assert source.interval_meta == ({"caption": "hello", "n": "3", "path (of the list)": "old"},)
    with pytest.raises(SourceError, match="no column named 'films' to take as path; its columns are 'Clip'"):
        listed(tmp_path, rows, columns={"films": "path"})


@pytest.mark.parametrize("text", ["path", "path=", "=x", "path=a,,b=c"])
def test_a_wrong_columns_argument_is_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        curate.main(["a", "--out", "b", "--columns", text])
    assert "write it as path=my_col,caption=text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("captoin", "caption"),
        ("Path", "path"),
        ("urls", "url"),
        ("strat", "start"),
        ("timestmp", "timestamp"),
    ],
)
def test_a_mistyped_name_in_columns_is_told_with_the_nearest(
    name: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as e:
        curate.main(["a", "--out", "b", "--columns", f"end=t1,{name}=text"])
    assert e.value.code == 2
    assert f"{name}: did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["views", "title", "id", "score", "caption", "start_s"])
def test_other_names_rename_metadata(name: str) -> None:
    assert curate.renamed(f"{name}=theirs") == {"theirs": name}


def test_a_list_without_path_names_the_column_that_looks_like_one(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="--columns path=video_path"):
        listed(tmp_path, [{"id": "1", "video_path": "a.mp4"}])


# What is told -------------------------------------------------------------------------------------


def test_what_is_not_used_is_told_once_with_counts(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    rows: list[dict[str, object]] = [
        {"path": f"{i}.mp4" if i % 10 else "", "filename": "x", "audio": "a.wav", "start_frame": i}
        for i in range(100)
    ]
    assert len(listed(tmp_path, rows)) == 100
    lines = [r.getMessage() for r in told.records]
    assert sum("look like paths" in line and "filename" in line for line in lines) == 1
    assert sum("look like sound" in line and "audio" in line for line in lines) == 1
    assert sum("look like times" in line and "start_frame" in line for line in lines) == 1
    assert sum("10 rows cannot be used" in line for line in lines) == 1
    assert len(lines) == 4
    told.clear()
    table = pa.table({"path": ["a"], "jpg": [b"x"]})
    pq.write_table(table, tmp_path / "b.parquet")
    list_sources([str(tmp_path / "b.parquet")])
    assert "columns that hold bytes are not used: jpg" in told.text


def test_nothing_is_told_of_a_list_that_is_used_whole(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    listed(tmp_path, [{"path": "a.mp4", "caption": "é", "start": "1", "end": "2", "title": "t"}])
    assert told.records == []


# Encodings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_list_in_latin_1_is_read_and_the_guess_is_named(
    tmp_path: Path, told: pytest.LogCaptureFixture, encoding: str, suffix: str
) -> None:
    title = "Crème brûlée – “so”" if encoding == "cp1252" else "Crème brûlée"
    tab = "\t" if suffix == ".tsv" else ","
    path = tmp_path / f"l{suffix}"
    path.write_bytes(f"path{tab}títle\ncafé.mp4{tab}{title}\n".encode(encoding))
    (tmp_path / "café.mp4").write_bytes(b"video")  # on disk in UTF-8
    [source] = list_sources([str(path)])
    assert source.meta == {"títle": title}
    assert source.uri == f"{tmp_path}/café.mp4"
    assert "3 cells were taken for Windows-1252" in told.text


def test_a_path_whose_bytes_are_on_disk_as_they_are_in_the_list_is_that_file(tmp_path: Path) -> None:
    raw = bytes(tmp_path) + b"/caf\xe9.mp4"
    Path(raw.decode("utf-8", "surrogateescape")).write_bytes(b"video")
    (tmp_path / "l.csv").write_bytes(b"path,t\ncaf\xe9.mp4,x\n")
    [source] = list_sources([str(tmp_path / "l.csv")])
    with fetch.localised(source) as local:
        assert Path(local.path).read_bytes() == b"video"


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_parquet_is_named_as_such(tmp_path: Path, keep: float) -> None:
    path = Path(written(tmp_path, [{"path": f"{i}.mp4"} for i in range(1000)], ".parquet"))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(SourceError, match=r"l.parquet: a Parquet file that is cut off"):
        list_sources([str(path)])


def test_a_list_that_breaks_while_it_is_read_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "l.tsv").write_bytes("path\na.mp4\n".encode("utf-16")[:-1])
    with pytest.raises(SourceError, match=r"l\.tsv: not well encoded"):
        list_sources([str(tmp_path / "l.tsv")])

    def broken(path: str, reading: object) -> Iterator[tuple[int, dict[str, object]]]:
        yield 1, {"path": "a.mp4"}
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "l.csv").write_text("path\na.mp4\n")
    monkeypatch.setitem(lists.READERS, ".csv", broken)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match=r"l\.csv: cannot be read: Input/output error"):
        list_sources([str(tmp_path / "l.csv")])


# To the end ---------------------------------------------------------------------------------------


def test_clips_of_a_list_and_whole_videos_and_any_name_come_out(tmp_path: Path) -> None:
    """Two rows of one video, whose name is not UTF-8; and a video of two shots taken whole."""
    (tmp_path / "in").mkdir()
    name = "-caf\udce9.mp4"
    (tmp_path / "in" / name).write_bytes(videos.made(videos.cfr, frames=50).read_bytes())
    (tmp_path / "in" / "shots.mp4").write_bytes(videos.made(videos.multi_shot).read_bytes())
    rows = [
        b"path,start,end,Caption",
        b"in/-caf\xe9.mp4,0,0.4,one",
        b"in/-caf\xe9.mp4,1,2,two",
        b"in/shots.mp4,,,all",
    ]
    (tmp_path / "l.csv").write_bytes(b"\n".join(rows))
    out = tmp_path / "out"
    args = [str(tmp_path / "l.csv"), "--out", str(out), "--recipe", "smoke", "--runner", "local", "--whole"]
    curate.main([*args, "--set", "captions=[{kind: given}]"])
    clips = [c for f in (out / "clips").glob("*.parquet") for c in pq.read_table(f).to_pylist()]
    found = {(c["start_s"], c["end_s"]): c["captions"][0]["text"] for c in clips}
    assert found == {(0.0, 0.4): "one", (1.0, 2.0): "two", (0.0, 5.0): "all"}


def test_a_mended_row_leaves_no_error_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(videos.made(videos.cfr, frames=10).read_bytes())
    args = [str(tmp_path / "l.csv"), "--out", str(tmp_path / "out"), "--recipe", "smoke", "--runner", "local"]

    def rows() -> dict[str, str | None]:
        curate.main([*args, "--whole", "--set", "captions=[]"])
        files = (tmp_path / "out/videos").glob("*.parquet")
        return {r["name"]: r["stage"] for f in files for r in pq.read_table(f).to_pylist()}

    (tmp_path / "l.csv").write_text("path,start,end\na.mp4,,\nb.mp4,3,1\n")
    bad = "l.csv#3"
    assert rows() == {"a.mp4": None, bad: "list"}
    assert rows() == {"a.mp4": None, bad: "list"}
    assert "are mended" not in capsys.readouterr().err
    (tmp_path / "l.csv").write_text("path,start,end\na.mp4,,\nb.mp4,,\n")
    assert rows() == {"a.mp4": None, "b.mp4": None}
    said = capsys.readouterr().err
    assert "1 error of listing mended or gone" in said
    assert "no longer in the list" not in said


def test_a_file_whose_name_begins_with_a_dash_can_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "-dash.mp4").write_bytes(b"video")
    monkeypatch.chdir(tmp_path)
    given: list[str] = []

    def take(args: list[str], *_: object) -> None:
        given.extend(args)
        raise SourceError("that is enough")

    monkeypatch.setattr("pipeline.run.job.curate", take)
    curate.main(["-dash.mp4", "--out", "out", "--recipe", "smoke"])
    assert [s.uri for s in list_sources(given)] == [f"{tmp_path}/-dash.mp4"]
