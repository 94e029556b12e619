"""A run on a real S3 server is inspected as one on a disk: bytes by range, votes an object each, nothing copied."""

import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from pipeline.inspector.answers import Inspector
from pipeline.inspector.index import Index
from pipeline.inspector.server import application
from pipeline.inspector.votes import Votes
from pipeline.io.store import Store

POST = {"X-Clipmill": "1"}


@pytest.fixture
def far(made_run, object_store, monkeypatch) -> Store:
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    store = Store(object_store.bucket() + "/run")
    for path in sorted(Path(made_run.root).rglob("*")):
        name = path.relative_to(made_run.root).as_posix()
        if path.is_file() and not name.startswith("."):
            store.write_bytes(name, path.read_bytes())
    return store


def test_what_is_said_and_played_is_that_of_the_run_on_the_disk(far, inspector, rows):
    there = Inspector(Index(far))
    there.read()
    near = TestClient(application(inspector), base_url="http://localhost")
    clip, still = rows[3]["clip_id"], next(r for r in rows if r["stills_sizes"])["clip_id"]
    before = far.list()
    with TestClient(application(there), base_url="http://localhost") as client:
        for path in ("/api/clips?q=dog&sort=-gap&limit=200", "/api/facets?kept=1", f"/api/clips?like={clip}"):
            said, wanted = (c.get(path).json() for c in (client, near))
            assert said | {"ms": 0} == wanted | {"ms": 0}
        for path in (f"/media/{clip}.mp4", f"/still/{still}/0.jpg"):
            assert client.get(path).content == near.get(path).content
        for asked in ("bytes=0-99", "bytes=1000-", "bytes=-1"):
            got, wanted = (c.get(f"/media/{clip}.mp4", headers={"Range": asked}) for c in (client, near))
            assert (got.status_code, got.content) == (206, wanted.content)
    assert far.list() == before


def test_votes_are_an_object_each_and_seen_by_the_next_server(far, rows):
    clip = rows[0]["clip_id"]
    model = next(c["model"] for c in rows[0]["captions"] if c["text"])
    with TestClient(application(Inspector(Index(far))), base_url="http://localhost") as client:
        for who in ("ann", "bob"):
            body = {"clip": clip, "kind": "best", "model": model, "who": who}
            assert client.post("/api/vote", json=body, headers=POST).status_code == 200
    names = far.list("votes")
    assert len(names) == 2
    assert {json.loads(far.read_bytes(n))["who"] for n in names} == {"ann", "bob"}
    mine = Votes(far)
    assert mine.tally(clip)["best"] == {model: 2}
    Votes(far).add({"clip": clip, "kind": "undo", "who": "ann"})
    mine.look(now=True)
    assert mine.tally(clip)["best"] == {model: 1}
