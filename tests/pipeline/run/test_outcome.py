"""What a run tells at its end: counts that add up, reasons most frequent first, an exit status scripts can use."""

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.io.store import Store
from pipeline.layers import Layer, clip_files, create, remove, unit_of, write
from pipeline.record import Caption
from pipeline.run import commit
from pipeline.run.outcome import Exit, Outcome, Reason, grouped, outcome
from pipeline.shards import pack
from pipeline.tables import caption_row
from tests.fixtures.run_folder import make_run_folder


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("outcome") / "run"
    recipe = make_run_folder(folder)
    store = Store(str(folder))
    pack.shard(store, recipe)
    return store


def test_counts_are_those_of_the_tables(store):
    found = outcome(store)
    decisions = store.read_table("decisions.parquet").to_pylist()
    clips = {
        c["clip_id"]: c["duration_s"]
        for n in store.list("clips", ".parquet")
        for c in pq.read_table(store.path(n)).to_pylist()
    }
    kept = [d["clip_id"] for d in decisions if d["keep"]]
    assert (found.clips, found.kept) == (len(clips), len(kept))
    assert found.seconds == pytest.approx(sum(clips.values()))
    assert found.kept_s == pytest.approx(sum(clips[c] for c in kept))
    assert found.kept + sum(found.dropped.values()) == found.clips
    assert (found.sources, found.failed) == (6, 2)
    assert found.tars == len(store.list("shards", ".tar"))


def test_a_person_reads_what_was_kept_dropped_and_why_sources_failed(store):
    said = "\n".join(outcome(store).lines("clipmill curate x --out run", {"shards": "run/shards"}))
    assert "kept 11 of 16 clips (" in said
    assert "too_short" not in said  # drops nothing
    assert (
        said.index("still") < said.index("too_much_text") < said.index("no_caption") < said.index("duplicate")
    )
    assert "2 × decode: no video stream: the file holds sound only (broken 0.mp4, broken 1.mp4)" in said
    assert "clipmill curate x --out run --retry-errors" in said
    assert said.endswith("shards: run/shards")


def test_a_captioner_of_whose_answers_nothing_was_of_use_is_told(store):
    layer = Layer("caption:fields", 1)
    create(store, layer)
    try:
        for name in clip_files(store):
            broken = caption_row(Caption("fields", "", "empty", flags=["broken_json"]))
            ids = store.read_table(name, ["clip_id"])["clip_id"].to_pylist()
            write(store, layer, unit_of(name), [{"clip_id": i, "caption": broken} for i in ids])
        found = outcome(store)
        assert found.silent == {"fields": {"broken_json": found.clips}}
        said = "\n".join(found.lines("clipmill caption run", {}, folder="run"))
        assert f"fields says nothing of any clip, flags: broken_json {found.clips}; " in said
        told = caption_row(Caption("fields", "A tram."))
        name = clip_files(store)[0]
        first = store.read_table(name, ["clip_id"])["clip_id"][0].as_py()
        write(store, layer, unit_of(name), [{"clip_id": first, "caption": told}])
        assert outcome(store).silent == {}
    finally:
        remove(store, "caption:fields")


def test_reasons_are_grouped_over_names_and_numbers_most_frequent_first():
    faults = [("lasts 12.5 s", "a"), ("moov atom not found", "b"), ("lasts 7 s", "c"), ("lasts 99 s", "d")]
    faults += [("lasts 98 s", "e")]
    first, second = grouped(faults)
    assert (first.text, first.count, first.names) == ("lasts 12.5 s", 4, ["a", "c", "d"])
    assert first.line().strip() == "4 × lasts 12.5 s (a, c, d, …)"
    assert (second.text, second.count) == ("moov atom not found", 1)


@pytest.mark.parametrize(
    ("kept", "errors", "captions", "strict", "status"),
    [
        (1, 0, 0, False, Exit.OK),
        (1, 3, 3, False, Exit.OK),
        (1, 0, 0, True, Exit.OK),
        (1, 1, 0, True, Exit.ERRORS),
        (1, 0, 1, True, Exit.ERRORS),
        (0, 0, 0, False, Exit.NOTHING_KEPT),
        (0, 1, 0, True, Exit.NOTHING_KEPT),
    ],
)
def test_the_exit_status(kept, errors, captions, strict, status):
    found = Outcome(clips=5, kept=kept)
    found.errors = {"source": [Reason("x", errors)]} if errors else {}
    found.caption_errors = {"m": [Reason("x", captions)]} if captions else {}
    assert found.exit(strict) == status


def test_an_empty_run_says_so(tmp_path):
    found = outcome(Store(str(tmp_path)))
    assert found.lines("c", {})[0] == "kept nothing: no source gave a clip"
    assert found.exit() == Exit.NOTHING_KEPT


def test_warnings_and_given_intervals_without_a_frame_are_told_with_counts(tmp_path):
    make_run_folder(tmp_path / "run")
    store = Store(str(tmp_path / "run"))
    said = [
        ["interval 500–510 s holds no frame: the video lasts from 0 to 20 s", "the sound ends early: eof"],
        ["the sound ends early: eof", f"caption:tags-baseline: clip {'a' * 20}: no"],
    ]
    good = 0
    for name in store.list("videos", ".parquet"):
        table = store.read_table(name)
        warnings = []
        for status in table["status"].to_pylist():
            warnings.append(said[good] if status == "ok" and good < len(said) else [])
            good += status == "ok"
        at = table.schema.get_field_index("warnings")
        new = pa.array(warnings, table.schema.field(at).type)
        store.write_table(name, table.set_column(at, table.schema.field(at), new))
    found = outcome(store)
    assert (len(found.empty), found.warned) == (1, 2)
    lines = found.lines("c", {})
    assert any(re.fullmatch(r"1 given interval holds no frame: \S.* 500–510 s", line) for line in lines)
    assert (
        lines[lines.index("2 sources with warnings:") + 1]
        .strip()
        .startswith("2 × the sound ends early: eof (")
    )


def test_sources_that_are_no_longer_in_the_list_are_counted_apart(store):
    uris = sorted(commit.known_sources(store))
    assert outcome(store, set(uris)).unlisted == 0
    found = outcome(store, set(uris[2:]))
    assert "sources: 6 ok, 2 errors; of which 2 are no longer in the list" in found.lines("c", {})
