"""The run's log: every process writes to it, with the source in work, and no secret gets in."""

import logging
import os
import subprocess
import sys

import pytest

from pipeline.faults import StoreError
from pipeline.io.store import Store
from pipeline.record import Source, Video
from pipeline.run.log import TOLD, attach, log, logging_to, without_secrets
from pipeline.stages import each
from pipeline.watch import at


def test_lines_name_the_source_in_work_and_runs_append(tmp_path):
    at("")  # another test may have left one in work
    store = Store(str(tmp_path))
    with logging_to(store) as name:
        log.info("before")
        for _ in each([Video(Source("/videos/a b.mp4", "a b.mp4"), "u")]):
            log.info("within")
    with logging_to(store):
        log.info("again")
    lines = (tmp_path / name).read_text().splitlines()
    assert [line.split(" ", 3)[3] for line in lines] == ["before", "[/videos/a b.mp4] within", "again"]
    assert not log.handlers


def test_warnings_reach_the_terminal_and_the_rest_only_when_verbose(tmp_path, capsys):
    store = Store(str(tmp_path))
    for verbose in (False, True):
        with logging_to(store, verbose):
            log.info("quiet")
            log.warning("loud")
            log.info("printed anyway", extra=TOLD)
    assert capsys.readouterr().err.splitlines() == ["loud", "quiet", "loud"]


def test_warnings_of_one_kind_do_not_fill_the_terminal(tmp_path, capsys):
    with logging_to(Store(str(tmp_path))) as name:
        for n in range(20):
            log.warning("clip %d failed", n)
    assert len(capsys.readouterr().err.splitlines()) == 4
    assert len((tmp_path / name).read_text().splitlines()) == 20


@pytest.mark.parametrize(
    ("why", "says"),
    [
        (KeyboardInterrupt(), "stopped by Ctrl-C"),
        (KeyboardInterrupt("SIGTERM"), "stopped by SIGTERM"),
        (StoreError("the disk is full;\nfree room"), "ended: the disk is full; free room"),
        (ValueError("a bug"), "ended: ValueError: a bug at test_log.py:"),
    ],
)
def test_a_run_that_ends_early_says_why_in_the_log_and_whoever_started_it_on_the_terminal(
    tmp_path, capsys, why, says
):
    with pytest.raises(type(why)), logging_to(Store(str(tmp_path))):
        raise why
    (line,) = (tmp_path / "run.log").read_text().splitlines()
    assert says in line
    assert capsys.readouterr().err == ""


def test_a_worker_process_writes_to_the_same_file_and_is_shown_when_verbose(tmp_path, capsys):
    code = "from pipeline.run.log import TOLD, attach, log; attach(); attach(); log.info('from the worker')"
    with logging_to(Store(str(tmp_path)), verbose=True):
        subprocess.run([sys.executable, "-c", code], check=True)
    (line,) = (tmp_path / "run.log").read_text().splitlines()
    assert line.endswith("from the worker")
    assert f" {os.getpid()} " not in line
    assert "from the worker" in capsys.readouterr().err


def test_a_process_of_no_run_keeps_its_logging():
    before = log.handlers, log.level, log.propagate
    attach()
    assert (log.handlers, log.level, log.propagate) == before
    assert logging.getLogger().level == logging.WARNING


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("get https://h/a.mp4?X-Amz-Signature=abc&x=1 now", "get https://h/a.mp4?x=1 now"),
        ("https://h/a?sig=s3cr&Expires=1", "https://h/a?Expires=1"),
        ("s3://bucket/k?secret_key=abc", "s3://bucket/k"),
        ("--set captions.0.options.api_key=abc --out run", "--set captions.0.options.api_key=… --out run"),
        ("https://me:pass@host/a", "https://host/a"),
        ("clipmill curate raw --set cut.crf=18", "clipmill curate raw --set cut.crf=18"),
    ],
)
def test_secrets_are_left_out(text, left):
    assert without_secrets(text) == left


def test_a_log_of_an_object_store_is_uploaded_when_the_run_ends(tmp_path):
    store = Store(str(tmp_path))
    (tmp_path / "log").mkdir()  # buckets have no folders
    store.local = False  # written as to a bucket: aside, then in one piece
    with logging_to(store) as name:
        log.info("hello")
        assert not store.exists(name)
    assert name.startswith("log/")
    assert store.read_bytes(name).decode().strip().endswith("hello")
