"""A run that others change while it is looked at: noticed, and read anew without a question that waits or fails."""

import threading
import time

import pytest
from starlette.testclient import TestClient

from pipeline import layers
from pipeline.inspector import session
from pipeline.inspector.answers import Inspector
from pipeline.inspector.index import Index
from pipeline.inspector.server import application
from pipeline.layers import Layer
from pipeline.recipe import parse
from pipeline.record import Caption
from pipeline.shards.pack import shard
from pipeline.tables import caption_row
from tests.fixtures import inspected

POST = {"X-Clipmill": "1"}


@pytest.fixture
def client(own_run, monkeypatch):
    monkeypatch.setattr(session, "LOOK_S", 0.0)
    inspector = Inspector(Index(own_run))
    inspector.read()
    with TestClient(application(inspector), base_url="http://localhost") as client:
        yield client


def add_layer(store, text: str) -> dict:
    """A caption of one clip, as `clipmill caption` writes it; the clip's row."""
    layer = Layer("caption:third", 7)
    layers.create(store, layer)
    name, table = next(iter(layers.Layered(store).tables()))
    row = table.to_pylist()[0]
    said = {"clip_id": row["clip_id"], "caption": caption_row(Caption("third", text))}
    layers.write(store, layer, layers.unit_of(name), [said])
    return row


def renewed(client) -> dict:
    before = client.get("/api/state").json()["opened"]
    assert client.post("/api/renew", json={}, headers=POST).status_code == 200
    for _ in range(600):
        state = client.get("/api/state").json()
        if state["opened"] > before and not state["reading"]:
            return state
        time.sleep(0.02)
    raise AssertionError(state)


def test_a_layer_that_someone_adds_is_told_and_shown_after_it_is_read_anew(client, own_run):
    assert client.get("/api/state").json()["changed"] == []
    row = add_layer(own_run, "Zebras graze.")
    assert client.get("/api/state").json()["changed"] == ["layers"]
    assert client.get("/api/clips?q=zebras").json()["total"] == 0
    vote = {"clip": row["clip_id"], "kind": "keep", "who": "ann"}
    client.post("/api/vote", json=vote, headers=POST)
    assert renewed(client)["changed"] == []
    assert client.get("/api/run").json()["opened"] == 2
    (found,) = client.get("/api/clips?q=zebras&has=third").json()["rows"]
    assert (found["id"], found["votes"]["keep"]) == (row["clip_id"], 1)
    layers.remove(own_run, "caption:third")
    assert client.get("/api/state").json()["changed"] == ["layers"]


def test_other_decisions_are_told_and_shown_after_they_are_read_anew(client, own_run):
    kept = client.get("/api/clips?kept=1").json()["total"]
    recipe = parse(inspected.run_json(own_run)["recipe"], ["decide.rules.too_short.min=5"], "x")
    left = sum(shard(own_run, recipe)["keep"].to_pylist())
    assert left < kept
    assert client.get("/api/state").json()["changed"] == ["decisions"]
    renewed(client)
    assert client.get("/api/clips?kept=1").json()["total"] == left


def test_what_is_asked_meanwhile_is_answered(client, own_run):
    add_layer(own_run, "Zebras graze.")
    said, stop = [], threading.Event()

    def ask() -> None:
        while not stop.is_set():
            for path in ("clips?q=dog&sort=-gap", "facets?kept=1", "histogram?column=gap", "run"):
                said.append(client.get(f"/api/{path}").status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(3):
            renewed(client)
    finally:
        stop.set()
        asking.join()
    assert set(said) == {200}
    assert len(said) > 12


def test_a_run_that_cannot_be_read_any_more_is_told_and_the_old_one_stays(client, own_run):
    for name in layers.clip_files(own_run)[:1]:
        own_run.write_bytes(name, b"no parquet")
    client.post("/api/renew", json={}, headers=POST)
    for _ in range(300):
        state = client.get("/api/state").json()
        if not state["reading"]:
            break
        time.sleep(0.02)
    assert "clips/" in state["failed"]
    assert client.get("/api/clips?sort=gap").json()["total"] > 0
