"""What the web application gives to whom: right bytes, only what is looked up, and nothing to strangers."""

import hashlib
import io
import re
import shutil
import tarfile
from pathlib import Path

import av
import pytest
from starlette.testclient import TestClient

from pipeline.caption.text import sentences
from pipeline.faults import StoreError
from pipeline.inspector.answers import Inspector
from pipeline.inspector.guard import MOST_BODY
from pipeline.inspector.index import Index
from pipeline.inspector.server import application
from pipeline.io.store import Store
from tests.fixtures import inspected
from tests.fixtures.inspected import LAYER

HERE = "http://localhost:8765"
POST = {"X-Clipmill": "1"}


def client_of(inspector: Inspector, **kwargs) -> TestClient:
    return TestClient(application(inspector, **kwargs), base_url=HERE, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(inspector: Inspector) -> TestClient:
    return client_of(inspector)  # without its life: the inspector is the session's


def mp4(store: Store, row: dict) -> bytes:
    with tarfile.open(store.path(row["media_tar"])) as tar:
        member = tar.extractfile(f"{row['clip_id']}.mp4")
        assert member is not None
        return member.read()


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        (None, 0, None),
        ("bytes=0-", 0, None),
        ("bytes=0-0", 0, 1),
        ("bytes=10-99", 10, 100),
        ("bytes=100-99999999", 100, None),
        ("bytes=-100", -100, None),
        ("bytes=-99999999", 0, None),
        ("bytes=5-2", 0, None),  # these four are no ranges, and are not heeded
        ("bytes=0-1,5-6", 0, None),
        ("items=0-1", 0, None),
        ("bytes=-", 0, None),
    ],
)
def test_a_range_of_an_mp4_is_that_of_the_member_of_its_tar(client, run, rows, asked, start, end):
    for row in rows[:: len(rows) // 4]:
        data = mp4(run, row)
        wanted = data[start:end]
        part = asked is not None and re.fullmatch(r"bytes=(\d+-\d*|-\d+)", asked) and asked != "bytes=5-2"
        headers = {"Range": asked} if asked else {}
        got = client.get(f"/media/{row['clip_id']}.mp4", headers=headers)
        assert got.content == wanted
        assert got.status_code == (206 if part else 200)
        assert got.headers["content-type"] == "video/mp4"
        first = len(data) + start if start < 0 else start
        said = f"bytes {first}-{first + len(wanted) - 1}/{len(data)}" if part else None
        assert got.headers.get("content-range") == said
        head = client.head(f"/media/{row['clip_id']}.mp4", headers=headers)
        assert (head.status_code, head.content) == (got.status_code, b"")
        for name in ("content-length", "content-range", "accept-ranges", "content-type"):
            assert head.headers.get(name) == got.headers.get(name)


@pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=-0"])
def test_a_range_beyond_the_end_is_416_and_says_the_size(client, run, rows, asked):
    got = client.get(f"/media/{rows[0]['clip_id']}.mp4", headers={"Range": asked})
    assert got.status_code == 416
    assert got.headers["content-range"] == f"bytes */{len(mp4(run, rows[0]))}"


def test_an_mp4_larger_than_a_block_comes_whole_and_in_ranges(client, run, rows, monkeypatch):
    from pipeline.inspector import media

    monkeypatch.setattr(media, "BLOCK", 1000)
    data = mp4(run, rows[1])
    assert len(data) > 3000
    assert client.get(f"/media/{rows[1]['clip_id']}.mp4").content == data
    got = client.get(f"/media/{rows[1]['clip_id']}.mp4", headers={"Range": "bytes=900-3100"})
    assert got.content == data[900:3101]


def test_stills_are_those_beside_the_mp4(client, run, rows):
    with_stills = [r for r in rows if r["stills_sizes"]]
    assert 0 < len(with_stills) < len(rows)
    for row in with_stills[:3]:
        tar = Path(run.path(row["media_tar"])).read_bytes()
        at = row["stills_offset"]
        for k, size in enumerate(row["stills_sizes"]):
            got = client.get(f"/still/{row['clip_id']}/{k}.jpg")
            assert (got.content, got.headers["content-type"]) == (tar[at : at + size], "image/jpeg")
            at += size
        assert client.get(f"/still/{row['clip_id']}/{k + 1}.jpg").status_code == 404


def test_where_no_still_was_kept_frames_of_the_mp4_are_shown(client, run, rows):
    import cv2
    import numpy as np

    row = next(r for r in rows if not r["stills_sizes"] and r["duration_s"] > 5)
    with av.open(io.BytesIO(mp4(run, row))) as container:
        frames = [f.to_ndarray(format="bgr24").astype(float) for f in container.decode(video=0)]
    nearest = []
    for k in range(3):
        got = client.get(f"/still/{row['clip_id']}/{k}.jpg")
        assert got.status_code == 200, got.text
        shown = cv2.imdecode(np.frombuffer(got.content, np.uint8), cv2.IMREAD_COLOR).astype(float)
        nearest.append(int(np.argmin([np.abs(shown - f).mean() for f in frames])))
    thirds = [(k + 0.5) / 3 * len(frames) for k in range(3)]
    assert np.abs(np.array(nearest) - thirds).max() <= 2
    assert client.get(f"/still/{row['clip_id']}/3.jpg").status_code == 404


def test_without_media_the_shards_are_played_and_then_nothing(own_run, rows):
    store = own_run
    data = {r["clip_id"]: mp4(store, r) for r in rows}
    kept = [r["clip_id"] for r in rows if r["decision"]["keep"]]
    gone = [r["clip_id"] for r in rows if not r["decision"]["keep"]]
    assert kept
    assert gone
    shutil.rmtree(store.path("media"))
    inspector = Inspector(Index(store))
    with client_of(inspector) as client:
        for clip in kept:
            assert client.get(f"/media/{clip}.mp4").content == data[clip]
            assert client.get(f"/still/{clip}/0.jpg").content.startswith(b"\xff\xd8")
        got = client.get(f"/media/{gone[0]}.mp4")
        assert (got.status_code, "media is gone" in got.json()["error"]) == (404, True)
    later = Inspector(Index(store))
    shutil.rmtree(store.path("shards"))  # while it is looked at: told, and no half answer
    with client_of(later) as client:
        for path in (f"/media/{kept[-1]}.mp4", f"/still/{kept[-1]}/1.jpg", f"/api/frames/{kept[-1]}"):
            got = client.get(path)
            assert (got.status_code, "missing" in got.json()["error"]) == (500, True)
    with client_of(Inspector(Index(store))) as client:
        for path in (f"/media/{kept[0]}.mp4", f"/still/{kept[0]}/0.jpg", f"/api/frames/{kept[0]}"):
            got = client.get(path)
            assert (got.status_code, "media is gone" in got.json()["error"]) == (404, True)


@pytest.mark.parametrize("name", ["run.json", "layers/x/layer.json", "decisions.parquet"])
def test_a_file_that_is_damaged_is_named(own_run, name):
    own_run.write_bytes(name, b"{")
    with pytest.raises(StoreError, match=re.escape(name) + ".*damaged"):
        Index(own_run)


def test_when_each_frame_is_shown_is_what_a_decoder_says(client, run, rows):
    for row in rows[:3]:
        with av.open(io.BytesIO(mp4(run, row))) as container:
            wanted = [f.time for f in container.decode(video=0)]
        said = client.get(f"/api/frames/{row['clip_id']}").json()["times"]
        assert said == pytest.approx([t - wanted[0] for t in wanted], abs=1e-5)


@pytest.mark.parametrize("clip", ["\\ud800", "\\u0000", "x" * 64, "../x", " "])
def test_a_vote_on_no_clip_is_refused_with_a_sentence(client, clip):
    body = f'{{"clip": "{clip}", "kind": "keep", "who": "ann"}}'
    got = client.post("/api/vote", content=body, headers=POST | {"Content-Type": "application/json"})
    assert got.status_code in (400, 404)
    assert len(got.json()["error"]) > 10


def test_another_set_of_shards_is_inspected_with_the_media_of_its_run(run, rows, tmp_path):
    from pipeline.recipe import parse
    from pipeline.shards.pack import shard

    recipe = parse(inspected.run_json(run)["recipe"], ["decide.rules.too_short.min=5"], "x")
    shard(run, recipe, Store(str(tmp_path / "strict")))
    inspector = Inspector(Index(Store(str(tmp_path / "strict"))))
    with client_of(inspector) as client:
        said = client.get("/api/clips?rule=too_short&limit=200").json()
        short = [r for r in rows if r["duration_s"] < 5]
        assert [r["id"] for r in said["rows"]] == [r["clip_id"] for r in short]
        assert client.get(f"/media/{short[0]['clip_id']}.mp4").content == mp4(run, short[0])


# ---------------------------------------------------------------- one clip


def test_a_clip_has_every_caption_with_all_that_is_known_of_it(client, rows):
    for row in rows[::5]:
        said = client.get(f"/api/clip/{row['clip_id']}").json()
        assert [c["model"] for c in said["captions"]] == [c["model"] for c in row["captions"]]
        for told, caption in zip(said["captions"], row["captions"], strict=True):
            assert told["text"] == caption["text"]
            assert told["scores"] == pytest.approx(caption["scores"])
            assert told["flags"] == caption["flags"]
            assert told["layer"] == (caption["model"] == LAYER)
            assert told["sentences"] == sentences(caption["text"])
            assert told["chosen"] == (caption["model"] == row["decision"]["caption_model"])
        assert said["text"] == row["text"]
        assert said["meta"] == row["meta"]
        assert said["sample_frames"] == [f - row["start_frame"] for f in row["sample_frames"]]
        times = [f / 12 - row["start_s"] for f in row["sample_frames"]]
        assert said["sample_times"] == pytest.approx(times, abs=1e-5)
        ok = {r["name"]: r["ok"] for r in said["rules"]}
        assert [name for name, passed in ok.items() if not passed] == row["decision"]["dropped_by"]
        assert said["duplicate_of"] == row["decision"]["duplicate_of"]
        for rule in said["rules"]:
            if rule["column"] in row:
                assert rule["value"] == pytest.approx(row[rule["column"]])


def test_neighbours_in_the_source_are_the_clip_before_and_after(client, rows):
    for i, row in enumerate(rows):
        said = client.get(f"/api/clip/{row['clip_id']}").json()
        before = rows[i - 1] if i and rows[i - 1]["source"] == row["source"] else None
        after = rows[i + 1] if i + 1 < len(rows) and rows[i + 1]["source"] == row["source"] else None
        assert said["before"] == (before and before["clip_id"])
        assert said["after"] == (after and after["clip_id"])


def test_copies_know_each_other(client, rows):
    copies = [r for r in rows if r["decision"]["duplicate_of"]]
    assert copies
    for row in copies:
        original = client.get(f"/api/clip/{row['decision']['duplicate_of']}").json()
        assert row["clip_id"] in original["duplicates"]


def test_captions_are_data_to_the_last_letter(client, rows):
    hostile = next(c["text"] for r in rows for c in r["captions"] if "<script>" in c["text"])
    clip = next(r["clip_id"] for r in rows if any(c["text"] == hostile for c in r["captions"]))
    got = client.get(f"/api/clip/{clip}")
    assert got.headers["content-type"].startswith("application/json")
    assert hostile in [c["text"] for c in got.json()["captions"]]


# ---------------------------------------------------------------- who may ask what


@pytest.mark.parametrize(
    "path",
    [
        "/media/../run.json.mp4",
        "/media/%2e%2e%2frun.json.mp4",
        "/media/..%2f..%2f..%2fetc%2fpasswd.mp4",
        "/still/../0.jpg",
        "/still/..%2frun/0.jpg",
        "/api/clip/..%2f..%2frun.json",
        "/api/clip/%00",
        "/../server.py",
        "/..%2fserver.py",
        "/%2e%2e/index.py",
        "/web/../server.py",
        "/.%2fserver.py",
        "//etc/passwd",
        "/%2fetc%2fpasswd",
        "/run.json",
    ],
)
def test_no_path_leaves_the_page_and_the_run(client, path):
    got = client.get(path)
    assert got.status_code in (404, 400, 405)
    assert got.headers["content-type"] == "application/json"
    assert set(got.json()) == {"error"}


def test_every_answer_forbids_what_a_page_could_be_made_to_do(client, rows):
    for path in ("/", "/api/run", f"/media/{rows[0]['clip_id']}.mp4", "/nothing", "/api/clips?kept=x"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "localhost.evil.example", "127.0.0.1.nip.io", ""]
)
def test_a_name_that_was_made_to_point_here_is_refused(client, host):
    for path in ("/", "/api/run"):
        got = client.get(path, headers={"Host": host})
        assert got.status_code == 403
        assert "localhost" in got.json()["error"]


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1:8765", "[::1]:8765", "LOCALHOST"])
def test_names_of_this_machine_are_answered(client, host):
    assert client.get("/api/funnel", headers={"Host": host}).status_code == 200


def test_with_a_token_nothing_is_said_before_it_is_known(inspector):
    with_token = application(inspector, "s3cret")
    client = TestClient(with_token, base_url="http://host.example:8765")
    for path in ("/", "/api/run", "/media/x.mp4", "/?token=wrong", "/api/run?token="):
        got = client.get(path, follow_redirects=False)
        assert (got.status_code, list(got.json())) == (401, ["error"])
    assert client.post("/api/vote?token=s3cret", json={}, headers=POST).status_code == 401
    got = client.get("/?token=s3cret&kept=1", follow_redirects=False)
    assert got.status_code == 303
    assert got.headers["location"] == "/?kept=1"
    cookie = got.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert client.get("/api/funnel").status_code == 200  # the cookie is kept
    assert (
        TestClient(with_token).get("/api/funnel", headers={"Cookie": "clipmill_inspect=x"}).status_code == 401
    )


def test_a_redirect_never_leads_elsewhere(inspector):
    client = TestClient(application(inspector, "s3cret"))
    got = client.get("http://host.example//evil.example/?token=s3cret", follow_redirects=False)
    assert got.headers["location"].startswith("/")
    assert not got.headers["location"].startswith("//")


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, b"{}", 403),
        ({"X-Clipmill": "1", "Content-Type": "text/plain"}, b"{}", 400),
        ({"X-Clipmill": "1", "Content-Type": "application/json"}, b"{", 400),
        ({"X-Clipmill": "1", "Content-Type": "application/json"}, b"[]", 400),
        ({"X-Clipmill": "1", "Content-Type": "application/json"}, b"[" * 100_000, 400),
        ({"X-Clipmill": "1", "Content-Type": "application/json"}, b" " * (MOST_BODY + 1), 413),
    ],
)
def test_what_changes_something_is_asked_for_by_the_page_only(client, headers, body, status):
    got = client.post("/api/vote", content=body, headers=headers)
    assert got.status_code == status
    assert set(got.json()) == {"error"}


@pytest.mark.parametrize(
    "path",
    [
        "/api/clips?limit=201",
        "/api/clips?limit=-1",
        "/api/clips?offset=x",
        "/api/clips?offset=" + "9" * 30,
        "/api/histogram?column=nothing",
        "/api/histogram?column=words&bins=0",
        "/api/histogram?column=words&bins=201",
        "/api/export?kind=secrets",
        "/api/ab?a=x",
        "/api/clips?q=" + "a" * 20_000,
    ],
)
def test_a_wrong_question_is_400_with_a_sentence(client, path):
    got = client.get(path)
    assert got.status_code == 400
    assert len(got.json()["error"]) > 10


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS"])
def test_other_methods_are_refused(client, method):
    assert client.request(method, "/api/run").status_code == 405


def test_nothing_in_the_run_changes_by_looking(own_run):
    def state() -> dict[str, str]:
        files = (p for p in Path(own_run.root).rglob("*") if p.is_file())
        return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    before = state()
    inspector = Inspector(Index(own_run))
    inspector.read()
    with client_of(inspector) as client:
        ids = [r["id"] for r in client.get("/api/clips").json()["rows"]]
        for path in ("/api/run", "/api/facets", "/api/votes", "/api/export", f"/api/clip/{ids[0]}"):
            assert client.get(path).status_code == 200
        client.get(f"/media/{ids[0]}.mp4")
        client.get(f"/still/{ids[-1]}/0.jpg")
    assert state() == before


def test_before_the_captions_are_read_the_rest_is_answered(run, rows):
    inspector = Inspector(Index(run))
    with client_of(inspector) as client:
        said = client.get("/api/run").json()
        assert said["reading"] == {
            "captions": 0, "words": 0, "of": len(rows), "done": False, "failed": ""
        }  # fmt: skip
        assert client.get("/api/clips?kept=1&sort=-duration_s").json()["rows"][0]["caption"]
        for asked in ("sort=agreement", "flag=loop", f"has={LAYER}", "range=words:1:"):
            got = client.get(f"/api/clips?{asked}")
            assert (got.status_code, "still being read" in got.json()["error"]) == (400, True)
        assert client.get("/api/clips?q=dog").json()["total"] == 0
        inspector.read()
        assert client.get("/api/run").json()["reading"]["done"]
        assert client.get("/api/clips?sort=agreement").status_code == 200
        assert client.get("/api/clips?q=dog").json()["total"] > 0


def test_measures_are_read_when_they_are_first_asked_for_and_not_for_the_first_page(run, rows):
    inspector = Inspector(Index(run))
    with client_of(inspector) as client:
        first = client.get("/api/clips").json()
        names = {c["name"] for c in client.get("/api/run").json()["columns"]}
        assert [r["id"] for r in first["rows"]] == [r["clip_id"] for r in rows][: len(first["rows"])]
        assert names == {"duration_s", "width", "height"}  # nothing else was read
        said = client.get("/api/clips?sort=score_motion&limit=200").json()["rows"]
        wanted = sorted(rows, key=lambda r: r["score_motion"])
        assert [r["id"] for r in said] == [r["clip_id"] for r in wanted]
        known = {c["name"] for c in client.get("/api/run").json()["columns"]}
        assert {"score_motion", "score_sharpness", "fps"} <= known
        assert client.get(f"/media/{rows[0]['clip_id']}.mp4").content == mp4(run, rows[0])


def test_an_undecided_run_shows_the_caption_that_would_be_chosen(own_run, rows):
    from pipeline.caption.choose import best
    from pipeline.recipe_choose import Choose

    own_run.delete("decisions.parquet")
    inspector = Inspector(Index(own_run))
    inspector.read()
    with client_of(inspector) as client:
        said = client.get("/api/clips").json()["rows"]
        choose = Choose.model_validate(inspected.run_json(own_run)["recipe"]["choose"])
        for told, row in zip(said, rows, strict=True):
            i = best(row["captions"], choose)
            assert told["kept"] is None
            assert told["caption"] == ("" if i is None else row["captions"][i]["text"])
