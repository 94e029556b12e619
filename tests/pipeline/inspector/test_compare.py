"""Two runs side by side: what changed is what a loop over both finds."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from pipeline.inspector.answers import Inspector
from pipeline.inspector.compare import Comparison
from pipeline.inspector.index import Index
from pipeline.inspector.server import application
from pipeline.io.store import Store
from pipeline.recipe import parse
from pipeline.shards.pack import shard
from tests.fixtures import inspected


@pytest.fixture(scope="module")
def two(run, tmp_path_factory):
    """A run, and a copy of it with other thresholds, another choice, a unit less, and one score of one clip changed."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("a", "b"):
        shutil.copytree(run.root, folder / name)
    a = Store(str(folder / "a"))
    b = Store(str(folder / "b"))
    first, *_, last = b.list("clips", ".parquet")
    table = pq.read_table(b.path(first))
    values = table["score_motion"].to_pylist()
    at = table.schema.get_field_index("score_motion")
    pq.write_table(
        table.set_column(at, "score_motion", pa.array([values[0] + 0.25, *values[1:]])), b.path(first)
    )
    for name in (last, last.replace("clips", "videos")):
        b.delete(name)
    settings = ["decide.rules.too_short.min=5", "decide.rules.still=null", "choose={method: consensus}"]
    shard(b, parse(inspected.run_json(a)["recipe"], settings, "x"))
    return a, b


def changed(two) -> dict[str, dict[str, bool]]:
    a, b = ({r["clip_id"]: r for r in inspected.rows(s)} for s in two)
    found = {}
    for clip in a.keys() | b.keys():
        if clip not in b or clip not in a:
            found[clip] = {"gone": clip not in b, "new": clip not in a}
            continue
        x, y = a[clip], b[clip]
        found[clip] = {
            "dropped": x["decision"]["keep"] and not y["decision"]["keep"],
            "kept": y["decision"]["keep"] and not x["decision"]["keep"],
            "caption": (x["decision"]["caption"] or "") != (y["decision"]["caption"] or ""),
            "scores": any(x[k] != y[k] for k in x if k.startswith("score_")),
        }
    return found


def test_changes_are_those_a_loop_finds_both_ways(two):
    for pair in (two, two[::-1]):
        wanted = changed(pair)
        inspector = Inspector(Index(pair[0]), Inspector(Index(pair[1])))
        inspector.read()
        with TestClient(application(inspector), base_url="http://localhost") as client:
            said = client.get("/api/compare?limit=200").json()
            assert {r["id"]: set(r["changes"]) for r in said["rows"]} == {
                clip: {n for n, has in names.items() if has}
                for clip, names in wanted.items()
                if any(names.values())
            }
            for name in ("gone", "new", "dropped", "kept", "caption", "scores"):
                some = {clip for clip, names in wanted.items() if names.get(name)}
                page = client.get(f"/api/compare?limit=200&change={name}").json()
                assert {r["id"] for r in page["rows"]} == some
                assert said["counts"][name] == page["total"] == len(some)
            assert said["counts"]["same"] == sum(not any(n.values()) for n in wanted.values())
    assert said["counts"]["new"]
    assert said["counts"]["kept"]


def test_a_changed_score_is_told_with_both_values(two):
    inspector = Inspector(Index(two[0]), Inspector(Index(two[1])))
    inspector.read()
    (row,) = inspector.compared("scores", 0, 10)["rows"]
    before, after = row["scores"]["motion" if "motion" in row["scores"] else "score_motion"]
    assert after - before == pytest.approx(0.25, abs=1e-5)
    assert list(row["scores"]) == ["score_motion"]
    inspector.close()


def test_clips_of_the_other_run_are_shown_and_played(two):
    gone = Inspector(Index(two[1]), Inspector(Index(two[0])))
    gone.read()
    with TestClient(application(gone), base_url="http://localhost") as client:
        new = client.get("/api/compare?change=new").json()["rows"][0]
        clip = new["id"]
        assert client.get(f"/media/{clip}.mp4").status_code == 404
        played = client.get(f"/media/{clip}.mp4?run=other")
        assert (played.status_code, played.content[4:8]) == (200, b"ftyp")
        assert client.get(f"/still/{clip}/0.jpg?run=other").status_code == 200
        assert client.get(f"/api/clip/{clip}?run=other").json()["caption"] == new["b"]["caption"]
        assert client.get(f"/api/clip/{clip}?run=third").status_code == 404
        assert client.get("/api/run").json()["other"]["name"] == "a"


def test_two_runs_are_compared_blindly(two):
    inspector = Inspector(Index(two[0]), Inspector(Index(two[1])))
    inspector.read()
    with TestClient(application(inspector), base_url="http://localhost") as client:
        pair = client.get("/api/ab?a=chosen&b=other:chosen&who=ann").json()
        rows = [{r["clip_id"]: r["decision"]["caption"] for r in inspected.rows(s)} for s in two]
        assert {pair["left"], pair["right"]} == {some[pair["clip"]] for some in rows}
        body = {"pair": pair["pair"], "answer": "left", "who": "ann"}
        assert client.post("/api/ab", json=body, headers={"X-Clipmill": "1"}).status_code == 200
        assert client.get("/api/ab/result?a=chosen&b=other:chosen").json()["pairs"] == 1


def test_one_run_alone_is_compared_with_nothing(two):
    with TestClient(application(Inspector(Index(two[0]))), base_url="http://localhost") as client:
        got = client.get("/api/compare")
        assert (got.status_code, "RUN2" in got.json()["error"]) == (404, True)


def test_clips_with_other_ids_are_matched_where_they_overlap_by_more_than_half(two, tmp_path):
    """Against a loop over all pairs; every clip of b is shifted by up to 4 s and has another id."""
    shutil.copytree(two[0].root, tmp_path / "shifted")
    rng = np.random.default_rng(0)
    for path in (tmp_path / "shifted/clips").glob("*.parquet"):
        table = pq.read_table(path)
        rows = table.to_pylist()
        for row in rows:
            row["clip_id"] = f"{int(row['clip_id'], 16) ^ 1:020x}"
            shift = float(rng.uniform(-4, 4))
            row["start_s"], row["end_s"] = row["start_s"] + shift, row["end_s"] + shift
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    (tmp_path / "shifted/decisions.parquet").unlink()
    a, b = Index(two[0]), Index(Store(str(tmp_path / "shifted")))
    found = Comparison(a, b)

    def share(i: int, j: int) -> float:
        if a.names[i] != b.names[j]:
            return 0.0
        common = min(a.end[i], b.end[j]) - max(a.start[i], b.start[j])
        return common / (max(a.end[i], b.end[j]) - min(a.start[i], b.start[j]))

    wanted = {(i, j) for i in range(len(a)) for j in range(len(b)) if share(i, j) > 0.5}
    assert {(i, int(j)) for i, j in enumerate(found.to) if j >= 0} == wanted
    assert {(int(i), j) for j, i in enumerate(found.back) if i >= 0} == wanted
    assert 0 < len(wanted) < len(a)
