"""Commits: the videos' file is the mark; a unit without it never happened."""

from pipeline.io.store import Store
from pipeline.run import commit
from pipeline.run.worker import run_local
from pipeline.stages import produced
from tests.fixtures.toy_stages import Toy, units


def run(store: Store, *names: str) -> None:
    stages = [Toy()]
    run_local([*stages, commit.CommitStage(store.uri, produced(stages))], units(*names))


def test_every_source_gets_a_row_and_every_clip_one(tmp_path):
    store = Store(str(tmp_path))
    run(store, "a", "bad", "b")
    rows = {r["source"]: r for n in store.list("videos") for r in store.read_table(n).to_pylist()}
    assert {s: r["status"] for s, r in rows.items()} == {"/a": "ok", "/bad": "error", "/b": "ok"}
    assert (rows["/bad"]["stage"], rows["/bad"]["error"], rows["/bad"]["clips"]) == ("toy", "bad", 0)
    clips = [r for n in store.list("clips") for r in store.read_table(n).to_pylist()]
    assert sorted(c["clip_id"] for c in clips) == ["a", "b"]
    assert all(c["score_toy"] == 1.0 and c["media_offset"] == 512 for c in clips)


def test_done_is_what_has_a_videos_row(tmp_path):
    store = Store(str(tmp_path))
    run(store, "a", "b")
    assert commit.done_sources(store) == {"/a", "/b"}
    store.delete("videos/unit-a.parquet")
    assert commit.done_sources(store) == {"/b"}


def test_sweeping_removes_exactly_what_was_not_committed(tmp_path):
    store = Store(str(tmp_path))
    run(store, "a", "b")
    for name in ("a", "b"):
        store.write_bytes(f"media/unit-{name}.tar", b"x")
    (tmp_path / "media/.unit-c.tar.1234.partial").write_bytes(b"x")
    store.delete("videos/unit-a.parquet")
    commit.sweep_uncommitted(store)
    assert store.list() == ["clips/unit-b.parquet", "media/unit-b.tar", "videos/unit-b.parquet"]
    assert not list((tmp_path / "media").glob(".*"))


def test_a_tar_that_no_row_speaks_of_is_swept(tmp_path):
    """Two workers did a unit with other bytes (one was taken for dead); the rows are the other one's."""
    store = Store(str(tmp_path))
    run(store, "a")
    (used,) = store.read_table("clips/unit-a.parquet", ["media_tar"])["media_tar"].to_pylist()
    store.write_bytes(used, b"x")
    store.write_bytes("media/unit-a.0123456789ab.tar", b"y")
    commit.sweep_uncommitted(store)
    assert store.list("media") == [used]


def test_forgetting_errors_leaves_the_good_rows_of_the_same_unit(tmp_path):
    store = Store(str(tmp_path))
    stages = [Toy()]
    both = [v for u in units("a", "bad") for v in u]
    for v in both:
        v.unit = "one"
    run_local([*stages, commit.CommitStage(store.uri, produced(stages))], [both])
    run(store, "bad-2")
    known = commit.known_sources(store)
    assert commit.failed(known) == ["/bad", "/bad-2"]
    assert commit.failed(known, ["transient"]) == []
    commit.drop(store, commit.failed(known), known)
    assert commit.done_sources(store) == {"/a"}
    assert store.list("videos") == ["videos/one.parquet"]
    assert store.list("clips") == ["clips/one.parquet"]


def test_a_unit_that_ends_without_clips_leaves_no_rows_of_an_earlier_try(tmp_path):
    store = Store(str(tmp_path))
    store.write_bytes("clips/unit-bad.parquet", b"of a killed run")
    run(store, "bad")
    assert store.list("clips") == []
