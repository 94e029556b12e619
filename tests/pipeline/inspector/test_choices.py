"""What people chose, as training data and as layers that `shard` goes by."""

import json

import pytest
from starlette.testclient import TestClient

from pipeline import layers
from pipeline.inspector.answers import Inspector
from pipeline.inspector.index import Index
from pipeline.inspector.server import application
from pipeline.layers import Layered
from pipeline.recipe import parse
from pipeline.shards.pack import shard
from tests.fixtures import inspected

POST = {"X-Clipmill": "1"}


@pytest.fixture
def run(own_run, rows):
    """A run, its rows by clip, and somebody who asks."""
    inspector = Inspector(Index(own_run))
    inspector.read()
    with TestClient(application(inspector), base_url="http://localhost") as client:
        yield own_run, {r["clip_id"]: r for r in rows}, client


def vote(client: TestClient, **said) -> dict:
    got = client.post("/api/vote", json=said, headers=POST)
    assert got.status_code == 200, got.text
    return got.json()


def written(row: dict) -> list[dict]:
    return [{"model": c["model"], "text": c["text"]} for c in row["captions"] if c["text"]]


def export(client: TestClient, kind: str = "choices") -> list[dict]:
    got = client.get(f"/api/export?kind={kind}")
    assert "attachment" in got.headers["content-disposition"]
    return [json.loads(line) for line in got.text.splitlines()]


def test_choices_are_exported_with_all_there_was_to_choose_from(run):
    _store, rows, client = run
    told = [clip for clip, row in rows.items() if len(written(row)) > 1]
    first, second, third = told[:3]
    model = written(rows[first])[1]["model"]
    vote(client, clip=first, kind="best", model=model, who="ann")
    vote(client, clip=first, kind="best", model=written(rows[first])[0]["model"], who="bob")
    vote(client, clip=second, kind="bad", who="ann")
    vote(client, clip=third, kind="edit", text="A grey cat sleeps.", who="bob")
    vote(client, clip=third, kind="keep", who="bob")  # is no choice of a caption
    lines = export(client)
    assert {(c["clip_id"], c["who"]) for c in lines} == {
        (first, "ann"),
        (first, "bob"),
        (second, "ann"),
        (third, "bob"),
    }
    for line in lines:
        row = rows[line["clip_id"]]
        assert line["captions"] == written(row)
        assert line["source"] == row["source"]
        standing = [line["chosen"] is not None, line["all_bad"], line["edit"] is not None]
        assert sum(standing) == 1
    by = {(c["clip_id"], c["who"]): c for c in lines}
    assert by[first, "ann"]["captions"][by[first, "ann"]["chosen"]]["model"] == model
    assert by[third, "bob"]["edit"] == "A grey cat sleeps."
    assert len(export(client, "votes")) == 5


def test_agreement_is_krippendorffs_over_clips_with_several_votes(run):
    from models.measures.captions.agreement import krippendorff_alpha

    _store, rows, client = run
    told = [clip for clip, row in rows.items() if len(written(row)) > 1][:4]
    units = []
    for i, clip in enumerate(told):
        models = [c["model"] for c in written(rows[clip])]
        chosen = [models[0], models[i % 2]]
        for who, model in zip(("ann", "bob"), chosen, strict=True):
            vote(client, clip=clip, kind="best", model=model, who=who)
        units.append(chosen)
    said = client.get("/api/votes").json()
    assert said["agreement"]["caption"]["alpha"] == pytest.approx(krippendorff_alpha(units))
    assert said["agreement"]["caption"]["pairs"] == 4
    assert said["people"] == [{"who": "ann", "votes": 4}, {"who": "bob", "votes": 4}]
    assert said["progress"] == {"clips": 4, "of": len(rows)}


def test_an_edited_caption_is_a_layer_that_shard_can_choose(run):
    store, rows, client = run
    told = [clip for clip, row in rows.items() if len(written(row)) > 1 and row["decision"]["keep"]]
    edited, chosen, undone, other = told[:4]
    vote(client, clip=edited, kind="edit", text="  A hand-written caption. ", model=None, who="ann")
    models = [c["model"] for c in written(rows[chosen])]
    favourite = next(m for m in models if m != rows[chosen]["decision"]["caption_model"])
    vote(client, clip=chosen, kind="best", model=favourite, who="ann")
    vote(client, clip=undone, kind="edit", text="Never mind.", who="ann")
    got = client.post("/api/edits", json={}, headers=POST).json()
    assert got["layers"] == {"caption:edited": 2, "judge:human": 3}
    vote(client, clip=undone, kind="undo", who="ann")
    assert client.post("/api/edits", json={}, headers=POST).json()["layers"]["caption:edited"] == 1
    assert {"caption:edited", "judge:human"} <= {layer.name for layer in layers.layers(store)}
    now = {r["clip_id"]: r for _, t in Layered(store).tables() for r in t.to_pylist()}
    assert [c["text"] for c in now[edited]["captions"] if c["model"] == "edited"] == [
        "A hand-written caption."
    ]
    assert not [c for c in now[undone]["captions"] if c["model"] == "edited"]
    # as the answer says to go on
    setting = got["next"].split("--set ")[1].strip("'")
    decided = shard(store, parse(inspected.run_json(store)["recipe"], [setting], "x")).to_pylist()
    by = {d["clip_id"]: d for d in decided}
    assert (by[edited]["caption"], by[edited]["caption_model"]) == ("A hand-written caption.", "edited")
    assert by[chosen]["caption_model"] == favourite
    assert by[other]["caption_model"] != "edited"


def test_scores_of_an_edit_go_with_its_words(run):
    store, rows, client = run
    clip = next(clip for clip, row in rows.items() if written(row))
    vote(client, clip=clip, kind="edit", text="A first try.", who="ann")
    client.post("/api/edits", json={}, headers=POST)
    judge = layers.Layer("judge:brevity", 90)
    told = [
        {"model": m, "scores": [("brevity", 0.5)], "support": []}
        for m in ("edited", written(rows[clip])[0]["model"])
    ]
    file = next(n for n, t in Layered(store).tables(["clip_id"]) if clip in t["clip_id"].to_pylist())
    layers.create(store, judge)
    layers.write(store, judge, layers.unit_of(file), [{"clip_id": clip, "judged": told}])

    def judged() -> set[str]:
        row = next(r for _, t in Layered(store).tables() for r in t.to_pylist() if r["clip_id"] == clip)
        return {c["model"] for c in row["captions"] if "brevity" in dict(c["scores"])}

    assert judged() == {t["model"] for t in told}
    vote(client, clip=clip, kind="edit", text="A second one.", who="ann")
    client.post("/api/edits", json={}, headers=POST)
    assert judged() == {told[1]["model"]}


def test_the_page_shows_the_layer_once_it_is_written(run):
    _store, rows, client = run
    clip = next(clip for clip, row in rows.items() if written(row))
    vote(client, clip=clip, kind="edit", text="Zebras graze.", who="ann")
    client.post("/api/edits", json={}, headers=POST)
    for _ in range(200):
        if client.get("/api/clips?has=edited").json().get("total") == 1 and (
            client.get("/api/clips?q=zebras").json()["total"] == 1
        ):
            break
    assert client.get("/api/clips?q=zebras").json()["rows"][0]["id"] == clip
    caption = client.get(f"/api/clip/{clip}").json()["captions"][-1]
    assert (caption["model"], caption["layer"], caption["text"]) == ("edited", True, "Zebras graze.")


@pytest.mark.parametrize(
    ("said", "status", "says"),
    [
        ({"kind": "best", "model": "nobody", "who": "x"}, 404, "no caption of 'nobody'"),
        ({"kind": "best", "who": "x"}, 400, "model"),
        ({"kind": "ab", "who": "x"}, 400, "kind"),
        ({"kind": "love", "who": "x"}, 400, "kind"),
        ({"kind": "bad"}, 400, "who"),
        ({"kind": "bad", "who": "x" * 65}, 400, "64"),
        ({"kind": "bad", "who": 3}, 400, "who"),
        ({"kind": "edit", "text": "", "who": "x"}, 400, "text"),
        ({"kind": "edit", "text": "x" * 10_001, "who": "x"}, 400, "10,000"),
        ({"kind": "bad", "who": "x", "clip": "../run"}, 404, "no clip"),
    ],
)
def test_a_vote_that_says_nothing_is_refused_and_not_kept(run, said, status, says):
    store, rows, client = run
    got = client.post("/api/vote", json={"clip": next(iter(rows))} | said, headers=POST)
    assert got.status_code == status
    assert says in got.json()["error"]
    assert not store.list("votes")


def test_layers_wait_for_whoever_writes_the_run(run):
    store, rows, client = run
    clip = next(clip for clip, row in rows.items() if written(row))
    assert "no votes" in client.post("/api/edits", json={}, headers=POST).json()["error"]
    vote(client, clip=clip, kind="edit", text="Zebras graze.", who="ann")
    with store.lock():
        got = client.post("/api/edits", json={}, headers=POST)
        assert got.status_code == 500
        assert len(got.json()["error"]) > 20
    assert client.post("/api/edits", json={}, headers=POST).status_code == 200
