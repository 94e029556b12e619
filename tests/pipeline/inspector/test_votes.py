"""Votes: nothing that was answered is lost, whoever votes at the same time and whatever is killed."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from pipeline.faults import StoreError
from pipeline.inspector import votes as module
from pipeline.inspector.votes import Votes
from pipeline.io.store import Store

ROOT = Path(__file__).parent.parent.parent.parent


def lines(store: Store) -> list[dict]:
    """Every whole line of votes/, by hand."""
    found = []
    for path in sorted(Path(store.path("votes")).glob("*.jsonl")):
        for line in path.read_bytes().split(b"\n")[:-1]:
            found.append(json.loads(line))
    return found


@pytest.fixture
def store(tmp_path) -> Store:
    (tmp_path / "run").mkdir()
    return Store(str(tmp_path / "run"))


def best(clip: str, model: str, who: str) -> dict:
    return {"clip": clip, "kind": "best", "model": model, "who": who}


def test_the_newest_of_a_person_counts_for_each_question(store):
    votes = Votes(store)
    votes.add(best("c", "m1", "ann"))
    votes.add(best("c", "m2", "ann"))
    votes.add({"clip": "c", "kind": "keep", "who": "ann"})
    votes.add({"clip": "c", "kind": "bad", "who": "bob"})
    votes.add({"clip": "c", "kind": "drop", "who": "bob"})
    votes.add({"clip": "c", "kind": "edit", "text": "A cat.", "model": "m1", "who": "bob"})
    assert votes.tally("c") == {"best": {"m2": 1}, "bad": 0, "edit": 1, "keep": 1, "drop": 1}
    assert votes.people() == {"ann": 2, "bob": 2}
    assert [sorted(unit) for unit in votes.units("caption")] == [["edit", "m2"]]
    assert [sorted(unit) for unit in votes.units("keep")] == [["drop", "keep"]]
    assert len(lines(store)) == 6  # and nothing is ever taken out


def test_undo_takes_back_the_newest_that_stands_and_only_ones_own(store):
    votes = Votes(store)
    votes.add(best("c", "m1", "ann"))
    votes.add(best("c", "m2", "ann"))
    votes.add({"clip": "c", "kind": "keep", "who": "ann"})
    votes.add(best("c", "m3", "bob"))
    undo = {"clip": "c", "kind": "undo", "who": "ann"}
    stands = []
    for _ in range(4):
        votes.add(undo)
        stands.append({q: v.get("model") for q, v in votes.standing("c", "ann").items()})
    assert stands == [{"caption": "m2"}, {"caption": "m1"}, {}, {}]
    assert votes.tally("c")["best"] == {"m3": 1}
    assert votes.clips("best") == ["c"]
    votes.add(undo | {"who": "bob"})
    assert votes.clips() == []


def test_a_vote_that_is_sent_twice_counts_once(store):
    votes = Votes(store)
    for model, name in (("a", "1" * 32), ("b", "2" * 32)):
        votes.add(best("c", model, "Ana") | {"id": name})
    undo = {"clip": "c", "kind": "undo", "who": "Ana", "id": "3" * 32}
    votes.add(undo)
    votes.add(undo)  # the answer was lost, it is sent again
    assert [v["model"] for v in votes.of("c")] == ["a"]
    assert [v["model"] for v in Votes(store).of("c")] == ["a"]
    assert len(lines(store)) == 3


def test_a_later_reader_sees_what_the_writer_saw(store):
    votes = Votes(store)
    for i in range(40):
        who = ("ann", "bob")[i % 2]
        kind = ("best", "bad", "keep", "undo", "drop")[i % 5]
        votes.add({"clip": f"c{i % 7}", "kind": kind, "who": who, "model": f"m{i % 3}"})
    again = Votes(store)
    for i in range(7):
        assert again.tally(f"c{i}") == votes.tally(f"c{i}")
    assert again.people() == votes.people()


def test_the_order_of_votes_survives_a_clock_that_is_set_back(store, monkeypatch):
    votes = Votes(store)
    real = module.datetime

    class Back(real):
        @classmethod
        def now(cls, tz=None):
            return real(2020, 1, 1, tzinfo=tz)

    votes.add(best("c", "first", "ann"))
    monkeypatch.setattr(module, "datetime", Back)
    votes.add(best("c", "second", "ann"))
    votes.add(best("c", "third", "ann"))
    monkeypatch.undo()
    assert votes.tally("c")["best"] == Votes(store).tally("c")["best"] == {"third": 1}


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_half_a_line_that_a_kill_left_is_not_a_vote_and_spoils_no_other(store, cut):
    Votes(store).add(best("c", "m1", "ann"))
    (path,) = Path(store.path("votes")).glob("*.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:cut].replace(b'"id"', b'"ID"'))
    votes = Votes(store)
    votes.add(best("c", "m2", "bob"))
    assert Votes(store).tally("c")["best"] == {"m1": 1, "m2": 1}


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"kind": "best"}'),
        b'{"kind":"ab","id":"1","at":"","clip":"c","who":"x"}',
        b'{"id": 3, "at": "x", "clip": "c", "who": "w", "kind": "bad"}',
    ],
)
def test_a_line_that_is_no_vote_is_passed_over(store, line):
    Path(store.path("votes")).mkdir()
    Path(store.path("votes/x.jsonl")).write_bytes(line + b"\n" + line + b"\n")
    votes = Votes(store)
    assert votes.people() == {}
    votes.add(best("c", "m", "ann"))
    assert Votes(store).people() == {"ann": 1}


def test_a_vote_that_cannot_be_written_does_not_count_and_the_next_does(store, monkeypatch):
    votes = Votes(store)
    votes.add(best("c", "m1", "ann"))
    real = os.write

    def full(fd: int, data: bytes) -> int:
        real(fd, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "write", full)
    with pytest.raises(StoreError, match="the vote was not kept"):
        votes.add(best("c", "m2", "ann"))
    assert votes.tally("c")["best"] == {"m1": 1}
    monkeypatch.undo()
    votes.add(best("d", "m3", "bob"))
    again = Votes(store)
    assert again.tally("c")["best"] == {"m1": 1}
    assert again.tally("d")["best"] == {"m3": 1}


def test_what_another_server_writes_is_seen(store):
    mine, other = Votes(store), Votes(store)
    other.add(best("c", "m1", "bob"))
    mine.look(now=True)
    assert mine.tally("c")["best"] == {"m1": 1}
    mine.add(best("c", "m1", "ann"))
    other.look(now=True)
    assert other.tally("c") == mine.tally("c")
    assert len(list(Path(store.path("votes")).glob("*.jsonl"))) == 2


# ---------------------------------------------------------------- real servers


class Server:
    """`clipmill inspect` as a process."""

    def __init__(self, store: Store, *more: str):
        command = [sys.executable, "-m", "jobs.inspect", store.uri, "--port", "0", *more]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[-1].rstrip("/")

    def post(self, path: str, body: dict) -> dict:
        headers = {"X-Clipmill": "1", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.loads(answer.read())


def test_two_voters_at_two_servers_and_a_kill_lose_nothing(own_run, rows):
    store = own_run
    rows = [r for r in rows if any(c["text"] for c in r["captions"])]
    servers = [Server(store), Server(store)]
    answered: list[dict] = []

    def vote(who: str, server: Server) -> None:
        for i in range(10_000):
            row = rows[i % len(rows)]
            model = next(c["model"] for c in row["captions"] if c["text"])
            try:
                said = server.post("/api/vote", best(row["clip_id"], model, who))
            except (OSError, http.client.HTTPException):
                return  # it was killed
            answered.append(said["vote"])

    # two people at the server that is killed, one at the other
    people = [("ann", servers[0]), ("bob", servers[0]), ("cleo", servers[1])]
    threads = [threading.Thread(target=vote, args=p) for p in people]
    try:
        for t in threads:
            t.start()
        while len(answered) < 60:
            time.sleep(0.01)
        servers[0].process.send_signal(signal.SIGKILL)
        for t in threads[:2]:
            t.join(30)
        for _ in range(3):
            servers[1].post("/api/vote", {"clip": rows[0]["clip_id"], "kind": "keep", "who": "dan"})
        servers[1].process.send_signal(signal.SIGKILL)
        threads[2].join(30)
    finally:
        for server in servers:
            server.process.kill()
            server.process.wait()
    by_who = Counter(v["who"] for v in answered)
    assert min(by_who[w] for w in ("ann", "bob", "cleo")) >= 5
    kept = {v["id"]: v for v in lines(store)}
    assert all(kept.get(v["id"]) == v for v in answered)
    assert len(kept) == len(lines(store))  # none twice
    again = Votes(store)
    for row in rows:
        its = [v for v in kept.values() if v["clip"] == row["clip_id"] and v["kind"] == "best"]
        newest = {
            w: max((v for v in its if v["who"] == w), key=lambda v: v["at"]) for w in {v["who"] for v in its}
        }
        assert again.tally(row["clip_id"]).get("best", {}) == Counter(v["model"] for v in newest.values())


def test_the_server_says_what_was_kept(own_run, rows):
    store, clip = own_run, rows[0]["clip_id"]
    server = Server(store)
    try:
        said = server.post("/api/vote", {"clip": clip, "kind": "drop", "who": " ann \n lee "})
        assert said["tally"]["drop"] == 1
        assert lines(store) == [said["vote"]]
        assert said["vote"]["who"] == "ann lee"
        assert server.get("/api/clips?voted=drop")["rows"][0]["id"] == clip
        assert server.get("/api/clips?voted=none")["total"] == server.get("/api/clips")["total"] - 1
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 0
    finally:
        server.process.kill()
        server.process.wait()
