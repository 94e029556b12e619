"""clipmill inspect: one line for what is wrong, an address for what is right, a file where one is asked for."""

import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from jobs.inspect import listen, main
from tests.fixtures import inspected

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    return inspected.make(tmp_path_factory.mktemp("inspect") / "a run", sources=3, clips=2).uri


@pytest.mark.parametrize("wrong", ["missing", "empty", "broken.json", "broken.parquet", "broken decisions"])
def test_what_is_no_run_is_one_line_and_exit_2(tmp_path, capsys, wrong):
    where = tmp_path / wrong
    if wrong != "missing":
        where.mkdir()
    if wrong == "broken.json":
        (where / "run.json").write_text("{")
    if wrong == "broken.parquet":
        for name in ("videos", "clips"):
            (where / name).mkdir()
            (where / name / "000000.parquet").write_bytes(b"PAR1")
    if wrong == "broken decisions":
        (where / "run.json").write_text("{}")
        (where / "decisions.parquet").write_bytes(b"no parquet")
    assert main([str(where), "--port", "0"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("clipmill inspect: ")
    assert str(where) in said.err


def test_a_sample_is_one_file(run, tmp_path, capsys):
    file = tmp_path / "sample.html"
    assert main([run, "--static", str(file), "--sample", "3", "--view", "#kept=1&sort=-duration_s"]) == 0
    assert str(file) in capsys.readouterr().out
    assert file.read_text(encoding="utf-8").lower().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--view", "flag=nothing"], "no flag"),
        (["--view", "srt=agreement"], "there is no 'srt' (did you mean 'sort'?)"),
        (["--view", "range=x:a:b"], "COLUMN:MIN:MAX"),
        (["--sample", "0"], "--sample"),
    ],
)
def test_a_wrong_sample_is_one_line_and_exit_2(run, tmp_path, capsys, more, says):
    file = tmp_path / "sample.html"
    assert main([run, "--static", str(file), *more]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert says in said
    assert not file.exists()


def test_a_port_that_is_taken_is_passed_over():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with listen("127.0.0.1", port) as other:
            assert port < other.getsockname()[1] < port + 20


def test_an_address_that_is_not_here_is_a_sentence():
    with pytest.raises(OSError, match=r"cannot listen at 192\.0\.2\.1"):
        listen("192.0.2.1", 8765)


def test_at_another_address_a_token_is_made_printed_and_asked_for(run):
    command = [sys.executable, "-m", "jobs.cli", "inspect", run, "--host", "0.0.0.0", "--port", "0"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[-1].replace("0.0.0.0", "127.0.0.1")
            bare, _, token = address.partition("?token=")
            assert len(token) >= 20
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(bare + "api/run", timeout=20)
            request = urllib.request.Request(bare + "api/run", headers={"Authorization": f"Bearer {token}"})
            with urllib.request.urlopen(request, timeout=20) as answer:
                assert answer.status == 200
            process.terminate()
            assert process.wait(20) in (0, -15, 143)
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
