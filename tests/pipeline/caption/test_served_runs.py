"""Whole runs with a served captioner: killed and resumed they pay for nothing twice, and the account adds up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from jobs import caption, curate
from pipeline.io.store import Store
from pipeline.layers import Layered
from tests.fixtures import videos
from tests.fixtures.chat_server import KEY, ChatServer, Trouble
from tests.fixtures.videos import made

SETS = ["events.min_s=0.1", "events.embedder.kind=none", "decide.rules={}", "cut.height=null"]
SETS += ["decide.duplicates.enabled=false", "shots.detector=content"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    shutil.copyfile(made(videos.multi_shot), folder / "a.mp4")
    shutil.copyfile(made(videos.delayed_start, frames=60), folder / "b.mp4")
    return folder


@pytest.fixture
def server():
    with ChatServer() as found:
        found.key = KEY
        yield found


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)


def teachers(server, *names, **more):
    one = {
        "kind": "served",
        "url": server.url,
        "model": "m",
        "key_env": "MY_KEY",
        "concurrency": 2,
        "usd_in": 1.0,
    }
    return "captions=" + json.dumps([one | {"name": n, "prompt": f"Be {n}."} | more for n in names])


def command(raw, out, *sets):
    local = ["--recipe", "smoke", "--runner", "local"]
    return [str(raw), "--out", str(out), *local, *(a for s in [*SETS, *sets] for a in ("--set", s))]


def rows(out):
    clips = Layered(Store(str(out)))
    return {r["clip_id"]: r for name in clips.files for r in clips.read(name).to_pylist()}


def costs(out):
    found = [dict(c["cost"]) for r in rows(out).values() for c in r["captions"]]
    return {
        name: sum(c[name] for c in found)
        for name in ("requests", "prompt_tokens", "completion_tokens", "usd")
    }


def test_killed_and_resumed_nothing_is_paid_for_twice_and_the_account_adds_up(raw, server, tmp_path, capsys):
    asked = command(raw, tmp_path / "run", teachers(server, "first", "second"))
    for _ in range(2):
        # two are answered, the next two never: then it is killed
        done = sum(server.answered.values())
        server.let_go.clear()
        server.troubles = [Trouble(), Trouble(), *[Trouble(stall=60)] * 4]
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.curate", *asked], stdout=-1, stderr=-1, start_new_session=True
        )
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            kept = [p for p in (tmp_path / "run/answers").rglob("*.json") if not p.name.startswith(".")]
            if server.running and len(kept) == sum(server.answered.values()) == done + 2:
                break
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        server.troubles = []
        paid = server.answered.copy()
        server.let_go.set()
        while server.running:
            time.sleep(0.01)
        server.answered = paid  # those that it stalled got no answer
    before = sum(server.answered.values())
    assert before == 4
    assert curate.main(asked) == 0
    said = capsys.readouterr().out
    clips = rows(tmp_path / "run")
    assert all(c["outcome"] == "ok" for r in clips.values() for c in r["captions"])
    assert max(server.answered.values()) == 1
    assert sum(server.answered.values()) == 2 * len(clips)
    new = 2 * len(clips) - before
    assert f"served: {new} new answer" in said
    assert f"{before} answers in the store before" in said
    total = costs(tmp_path / "run")
    assert total["requests"] == 2 * len(clips)
    assert total["usd"] == pytest.approx(total["prompt_tokens"] / 1e6)
    # as the run that nobody disturbed
    with ChatServer() as other:
        other.key = KEY
        assert curate.main(command(raw, tmp_path / "calm", teachers(other, "first", "second"))) == 0
        assert other.tokens == [total["prompt_tokens"], total["completion_tokens"]]
    assert rows(tmp_path / "calm") == clips
    text = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert KEY.encode() not in text


def test_a_teacher_added_later_says_what_it_would_have_said_and_errors_are_retried_alone(
    raw, server, tmp_path, capsys
):
    out = tmp_path / "run"
    assert curate.main(command(raw, out, teachers(server, "first"))) == 0
    n = len(rows(out))
    add = [str(out), "--runner", "local", "--recipe", "smoke"]
    add += [a for s in [*SETS, teachers(server, "first", "second")] for a in ("--set", s)]
    server.troubles = [Trouble(), Trouble(400, "not that one")]
    assert caption.main(add) == 0
    assert sum(server.answered.values()) == 2 * n - 1
    assert "HTTP 400: not that one" in capsys.readouterr().out
    assert caption.main([*add, "--retry-errors"]) == 0
    said = capsys.readouterr().out
    assert "served: 1 new answer," in said
    assert f"{2 * n - 1} answers in the store before" in said
    assert max(server.answered.values()) == 1
    both = tmp_path / "both"
    assert curate.main(command(raw, both, teachers(server, "first", "second"))) == 0
    assert rows(both) == rows(out)


def test_a_run_goes_on_with_another_server_of_the_model(raw, server, tmp_path):
    out = tmp_path / "run"
    assert curate.main(command(raw, out, teachers(server, "first"))) == 0
    before = rows(out)
    with ChatServer() as other:
        other.key = KEY
        assert curate.main(command(raw, out, teachers(other, "first", concurrency=4))) == 0
        assert not other.bodies
    assert rows(out) == before


def test_a_key_that_is_not_there_and_a_server_that_is_not_there_are_one_sentence(
    raw, server, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("MY_KEY")
    assert curate.main(command(raw, tmp_path / "run", teachers(server, "first"))) == 2
    assert "the environment variable MY_KEY is not set" in capsys.readouterr().err
    monkeypatch.setenv("MY_KEY", "another-key-entirely")
    assert curate.main(command(raw, tmp_path / "run", teachers(server, "first"))) in (2, 5)
    err = capsys.readouterr().err
    assert "does not take the key in $MY_KEY" in err
    assert "Traceback" not in err
    assert not server.bodies


def test_a_fused_caption_is_made_again_when_one_of_its_sources_is_tried_again(raw, server, tmp_path, capsys):
    """In the run itself, in a layer, and where one is in the run and the other in a layer."""
    one = {"kind": "served", "url": server.url, "model": "m", "key_env": "MY_KEY", "concurrency": 1}
    ask = [one | {"name": n, "prompt": f"Be {n}."} for n in ("first", "second")]
    ask.append(one | {"kind": "fuse", "name": "both", "prompt": "Of {captions}"})
    layer = one | {"kind": "fuse", "name": "later", "prompt": "As one: {captions}", "of": ["second", "first"]}

    def curated(out, *more):
        return curate.main([*command(raw, out, "captions=" + json.dumps(ask)), *more])

    out = tmp_path / "run"
    assert curated(tmp_path / "calm") == 0
    add = ["--runner", "local", "--set", "captions=" + json.dumps([layer])]
    assert caption.main([str(tmp_path / "calm"), *add]) == 0
    server.troubles = [Trouble(400, "not that one")]
    assert curated(out) == 0
    assert caption.main([str(out), *add]) == 0
    there = rows(out)
    (bad,) = [i for i, r in there.items() if r["captions"][0]["outcome"] == "error"]
    assert [c["made_from"] for c in there[bad]["captions"]] == [[], [], ["second"], ["second"]]
    before = len(server.bodies)
    assert curated(out, "--retry-errors") == 0
    assert len(server.bodies) == before + 3  # the one that failed, and the two that are fused of it
    assert rows(out) == rows(tmp_path / "calm")
    assert [c["made_from"] for c in rows(out)[bad]["captions"]][2:] == [
        ["first", "second"],
        ["second", "first"],
    ]


def test_a_server_is_asked_for_clips_of_several_short_sources_at_once(server, tmp_path):
    for n in range(9):
        (tmp_path / "raw").mkdir(exist_ok=True)
        shutil.copyfile(made(videos.rotated, frames=20 + n), tmp_path / f"raw/{n}.mp4")
    server.service_s = 0.2
    asked = command(tmp_path / "raw", tmp_path / "run", teachers(server, "first", concurrency=16))
    assert curate.main(asked) == 0
    units = {p.stem for p in (tmp_path / "run/videos").iterdir()}
    assert len(units) == 5  # workers have something to do
    assert server.most == 2
    # interrupted, it has the same units
    server.troubles = [Trouble()] * 3 + [Trouble(stall=60)] * 9
    other = command(tmp_path / "raw", tmp_path / "other", teachers(server, "first", concurrency=16))
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.curate", *other], stdout=-1, stderr=-1, start_new_session=True
    )
    end = time.monotonic() + 60
    while not list((tmp_path / "other").glob("videos/*.parquet")) and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    server.troubles = []
    server.let_go.set()
    assert curate.main(other) == 0
    assert {p.stem for p in (tmp_path / "other/videos").iterdir()} == units
