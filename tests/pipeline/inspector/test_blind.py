"""Blind comparison: nothing tells the sides apart but the captions, and it ends when the answers say so."""

import json

import numpy as np
import pytest
from starlette.testclient import TestClient

from pipeline.inspector.answers import Inspector
from pipeline.inspector.index import Index
from pipeline.inspector.server import application
from tests.fixtures.run_folder import CAPTIONERS

A, B = CAPTIONERS[0], CAPTIONERS[1]
POST = {"X-Clipmill": "1"}


@pytest.fixture
def run(own_run, rows):
    return own_run, rows


def client_of(store) -> TestClient:
    inspector = Inspector(Index(store))
    inspector.read()
    return TestClient(application(inspector), base_url="http://localhost")


def ask(client, who="ann", a=A, b=B) -> dict:
    return client.get(f"/api/ab?a={a}&b={b}&who={who}").json()


def answer(client, pair: str, said: str, who="ann") -> None:
    got = client.post("/api/ab", json={"pair": pair, "answer": said, "who": who}, headers=POST)
    assert got.status_code == 200, got.text


def text_of(rows, clip: str, model: str) -> str:
    row = next(r for r in rows if r["clip_id"] == clip)
    return next(c["text"] for c in row["captions"] if c["model"] == model)


def test_every_pair_is_asked_once_on_both_sides_with_no_name_told(run):
    store, rows = run
    both = [
        r["clip_id"] for r in rows if sum(bool(c["text"]) for c in r["captions"] if c["model"] in (A, B)) == 2
    ]
    asked, left = [], 0
    with client_of(store) as client:
        while "pair" in (pair := ask(client)):
            texts = [text_of(rows, pair["clip"], m) for m in (A, B)]
            assert sorted((pair["left"], pair["right"])) == sorted(texts)
            bare = json.dumps({k: v for k, v in pair.items() if k not in ("left", "right")})
            assert not any(name in bare for name in CAPTIONERS)
            assert pair["done"] == len(asked)
            left += pair["left"] == texts[0]
            asked.append(pair["clip"])
            answer(client, pair["pair"], "tie")
        assert "no clip is left" in pair["error"]
    assert sorted(asked) == sorted(both)
    assert 0.2 < left / len(asked) < 0.8  # a coin
    assert asked != [r["clip_id"] for r in rows if r["clip_id"] in asked]  # drawn, not in order


def test_the_same_pairs_come_in_the_same_order_again_and_after_a_restart(run):
    store, _ = run
    with client_of(store) as client:
        first = ask(client)
        assert ask(client)["pair"] == first["pair"]
        assert ask(client, a=B, b=A)["left"] == first["left"]
    with client_of(store) as client:
        answer(client, first["pair"], "left")  # asked by the server that is gone
        assert ask(client)["pair"] != first["pair"]
        assert ask(client)["done"] == 1


def test_several_people_share_the_work_and_then_check_each_other(run):
    store, _ = run
    with client_of(store) as client:
        seen = []
        for i in range(6):
            who = ("ann", "bob")[i % 2]
            pair = ask(client, who)
            seen.append(pair["clip"])
            answer(client, pair["pair"], "left", who)
        assert len(set(seen)) == 6
        while "pair" in (pair := ask(client, "ann")):
            answer(client, pair["pair"], "left", "ann")
        mine = [v for v in client.get("/api/export?kind=votes").text.splitlines() if '"who": "ann"' in v]
        assert set(seen) <= {json.loads(v)["clip"] for v in mine}  # bob's too, at last


@pytest.mark.parametrize("better", [A, B, None])
def test_the_result_is_that_of_bradley_and_terry_on_what_was_answered(run, better):
    from models.measures.captions.bradley_terry import enough, interval

    store, rows = run
    rng = np.random.default_rng(0)
    answers = []
    with client_of(store) as client:
        while "pair" in (pair := ask(client)):
            is_left = pair["left"] == text_of(rows, pair["clip"], A)
            sides = (A, B) if is_left else (B, A)
            said = (
                ("left", "right")[sides.index(better)]
                if better
                else ("left", "right", "tie")[rng.integers(3)]
            )
            answer(client, pair["pair"], said)
            answers.append((pair["clip"], *sides, {"left": 1.0, "right": 0.0, "tie": 0.5}[said]))
        said = client.get(f"/api/ab/result?a={A}&b={B}").json()
    wanted = interval(answers, sorted((A, B)))
    assert said["pairs"] == said["clips"] == len(answers) > 15
    for model in said["models"]:
        rated = wanted[model["name"]]
        assert (model["score"], model["low"], model["high"]) == pytest.approx(
            (rated.score, rated.low, rated.high)
        )
    verdict = enough(answers, sorted((A, B)))
    assert (said["enough"], said["why"]) == (verdict.enough, verdict.why)
    if better:
        assert said["enough"]
        assert max(said["models"], key=lambda m: m["score"])["name"] == better
    wins = np.array(said["wins"])
    assert wins.sum() == len(answers)
    assert said["ties"] == sum(x[3] == 0.5 for x in answers)


def test_a_changed_mind_counts_once(run):
    store, _ = run
    with client_of(store) as client:
        pair = ask(client)
        answer(client, pair["pair"], "left")
        answer(client, pair["pair"], "right")
        said = client.get(f"/api/ab/result?a={A}&b={B}").json()
        assert said["pairs"] == 1
        answer(client, pair["pair"], "left", "bob")
        assert client.get(f"/api/ab/result?a={A}&b={B}").json()["pairs"] == 2


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (f"/api/ab?a={A}&b=nobody", "nothing called 'nobody'"),
        (f"/api/ab?a={A}&b={A}", "with itself"),
        (f"/api/ab?a={A}&b=other:{A}", "nothing called"),
    ],
)
def test_what_cannot_be_compared_is_a_sentence(run, path, says):
    with client_of(run[0]) as client:
        got = client.get(path)
        assert (got.status_code, says in got.json()["error"]) == (404, True)


@pytest.mark.parametrize(
    "said",
    [
        {"pair": "x.y", "answer": "left"},
        {"pair": "", "answer": "left"},
        {"pair": None},
        {"pair": "../x", "answer": "left"},
    ],
)
def test_an_answer_to_no_pair_is_refused(run, said):
    with client_of(run[0]) as client:
        got = client.post("/api/ab", json=said | {"who": "ann"}, headers=POST)
        assert got.status_code in (400, 404)
        assert not run[0].list("votes")
        pair = ask(client)["pair"]
        got = client.post("/api/ab", json={"pair": pair, "answer": "both", "who": "ann"}, headers=POST)
        assert got.status_code == 404
