"""clipmill report: one page for a run, one line for anything else."""

from pathlib import Path

import pytest

from jobs import captions, shard
from jobs.report import main
from tests.fixtures import run_folder


def test_writes_the_page_and_says_where(tmp_path: Path, capsys):
    run_folder.make_run_folder(tmp_path / "a run")
    assert main([str(tmp_path / "a run")]) == 0
    said = capsys.readouterr().out.strip()
    assert said == str(tmp_path / "a run/report.html")
    assert Path(said).read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("wrong", ["missing", "empty", "file", "broken.json", "broken.parquet"])
def test_what_is_no_run_is_one_line_and_exit_2(tmp_path: Path, capsys, wrong: str):
    where = tmp_path / wrong
    if wrong == "file":
        where.write_text("not a folder")
    elif wrong != "missing":
        where.mkdir()
    if wrong == "broken.json":
        (where / "run.json").write_text("{")
    if wrong == "broken.parquet":
        (where / "videos").mkdir()
        (where / "videos/000000.parquet").write_bytes(b"PAR1")
    assert main([str(where)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("clipmill report: ")
    assert str(where) in said.err


def test_an_output_that_cannot_be_written_is_one_line_and_exit_2(tmp_path: Path, capsys):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "report.html").mkdir()
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("job", [main, shard.main, captions.main])
def test_advice_for_a_folder_that_is_no_run_can_be_followed(tmp_path: Path, capsys, job):
    """Nothing is made in a folder that holds something else: `curate --out` refuses it."""

    def told(folder: Path) -> str:
        assert job([str(folder)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    (tmp_path / "videos").mkdir()
    assert f"--out {tmp_path}/videos\n" in told(tmp_path / "videos")
    (tmp_path / "videos/a.mp4").write_text("")
    assert f"but other files: give the --out folder of a run, or make one beside it: clipmill curate SOURCE --out " \
        f"{tmp_path}/videos-run" in told(tmp_path / "videos")  # fmt: skip
    run_folder.make_run_folder(tmp_path / "project/run")
    assert f"there is one in {tmp_path}/project/run" in told(tmp_path / "project")
