"""The loop closes: curate, vote, train a selector and a student, caption the run with them, compare blind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from jobs import caption, curate, export, toy, train
from pipeline.inspector.answers import Inspector
from pipeline.inspector.index import Index
from pipeline.inspector.server import application
from pipeline.io.store import Store
from pipeline.layers import Layered
from pipeline.shards.index import read_index
from tests.fixtures.shrunken import TINY_VLM

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
POST = {"X-Clipmill": "1"}
READERS = "pipeline.toy.captioner"
TEACHERS = (
    f"captions=[{{kind: python, captioner: '{READERS}:CarelessReader'}}, "
    f"{{kind: python, captioner: '{READERS}:ToyReader'}}]"
)


def command(main, *args: str | Path, sets: tuple[str, ...] = ()) -> None:
    assert main([*map(str, args), *(x for s in sets for x in ("--set", s))]) == 0


def client_of(run: Path, before: Path | None = None) -> TestClient:
    other = Inspector(Index(Store(str(before)))) if before else None
    inspector = Inspector(Index(Store(str(run))), other)
    inspector.read()
    return TestClient(application(inspector), base_url="http://localhost")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A curated run in which a careless captioner is preferred, what people said of it, and what was trained."""
    at = tmp_path_factory.mktemp("loop")
    command(toy.main, "--out", at / "toy", "--videos", "4", "--scenes", "3")
    local = ("--recipe", "toy", "--runner", "local", "--out", at / "run")
    preferred = "choose={method: order, order: [careless-0]}"
    command(curate.main, at / "toy/videos", *local, sets=(TEACHERS, preferred))
    clips = read_index(f"{at / 'run'}/shards", ["clip_id"])["clip_id"].to_pylist()
    with client_of(at / "run") as client:
        for clip in clips:
            vote = {"clip": clip, "kind": "best", "model": "toy-reader", "who": "ann"}
            got = client.post("/api/vote", json=vote, headers=POST)
            assert got.status_code == 200, got.text
    shutil.copytree(at / "run", at / "before")
    common = ("data.workers=0", "ema.lengths=[]")
    plan = (
        *common,
        "features={video: [visual_fit], frames: 4}",
        "model={kind: selector, preset: tiny}",
        "data.batch=9",
    )
    sized = ("run={steps: 150, sample_every: 150, log_every: 150}", "optimizer={lr: 0.003, warmup: 5}")
    out = ("--recipe", "selector", "--out", at / "selector", "--device", "cpu")
    command(train.main, "selector", at / "run", *out, sets=(*plan, *sized))
    small = (f"model={TINY_VLM}", "frames.frames=2", "data={tokens: 256, lanes: 1, pool: 2, workers: 0}")
    run = ("run={steps: 3, sample_every: 0}", "held_out=0")
    out = ("--recipe", "small-vlm", "--out", at / "model", "--device", "cpu")
    command(train.main, "vlm", at / "run", *out, sets=(*small, *run))
    command(export.main, at / "model", "--to", at / "student")
    student = f"{{kind: transformers, name: student, model: {at}/student, frames: 2, max_new_tokens: 8}}"
    judged = f"choose={{judges: [{{kind: selector, model: {at}/selector/selector.pt}}], method: selector}}"
    sets = (f"{TEACHERS[:-1]}, {student}]", judged)
    command(caption.main, at / "run", "--runner", "local", sets=sets)
    return at


def rows(run: Path) -> list[dict]:
    return [row for _, t in Layered(Store(str(run))).tables(["clip_id", "captions"]) for row in t.to_pylist()]


def test_student_and_selector_see_every_clip_and_the_likeliest_caption_stands(world):
    index = read_index(f"{world / 'run'}/shards", ["clip_id", "caption", "caption_model"]).to_pylist()
    chosen = {row["clip_id"]: row for row in index}
    assert len(chosen) == 12
    for row in rows(world / "run"):
        told = {c["model"]: c for c in row["captions"]}
        assert told.keys() == {"toy-reader", "careless-0", "student"}
        scores = {m: dict(c["scores"])["selector"] for m, c in told.items() if c["text"]}
        assert {"toy-reader", "careless-0"} <= scores.keys()
        usable = {m: s for m, s in scores.items() if told[m]["outcome"] == "ok" and not told[m]["flags"]}
        assert chosen[row["clip_id"]]["caption_model"] == max(usable, key=lambda m: usable[m])


def test_what_people_voted_for_stands_more_often_than_before(world):
    right = {}
    for name in ("before", "run"):
        found = read_index(f"{world / name}/shards", ["caption_model"])["caption_model"].to_pylist()
        right[name] = found.count("toy-reader")
    assert right["before"] == 0
    assert right["run"] >= 8  # of the nine that it was trained on, and three that it was not


def test_the_inspector_compares_before_and_after_blind(world):
    a, b = "chosen", "other:chosen"
    truth = {r["clip_id"]: {c["model"]: c["text"] for c in r["captions"]} for r in rows(world / "run")}
    asked = []
    with client_of(world / "run", world / "before") as client:
        while "pair" in (pair := client.get(f"/api/ab?a={a}&b={b}&who=bob").json()):
            assert not {"toy-reader", "careless-0", "selector"} & set(json.dumps(pair).split('"'))
            better = "left" if pair["left"] == truth[pair["clip"]]["toy-reader"] else "right"
            said = {"pair": pair["pair"], "answer": better, "who": "bob"}
            assert client.post("/api/ab", json=said, headers=POST).status_code == 200
            asked.append(pair["clip"])
        result = client.get(f"/api/ab/result?a={a}&b={b}").json()
    assert result["pairs"] == len(asked) >= 8
    rated = {m["name"]: m["score"] for m in result["models"]}
    assert rated[a] > rated[b]
