"""Decisions over measured tables: rules, captions, duplicates, the funnel."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipeline.decide.rules import decide, funnel
from pipeline.io.store import Store
from pipeline.layers import clip_files
from pipeline.recipe import Recipe, RecipeError, parse
from pipeline.tables import DECISION_SCHEMA, clip_schema
from tests.fixtures.run_folder import (
    CAPTIONERS,
    EMBEDDING,
    EMBEDDING_SIZE,
    NEAR_DUPLICATES,
    RECIPE,
    make_run_folder,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("decide") / "run"
    return Store(str(root)), make_run_folder(root)


def clips_of(store: Store) -> list[dict]:
    return [row for name in clip_files(store) for row in store.read_table(name).to_pylist()]


def with_decide(recipe: Recipe, **decide_section) -> Recipe:
    return parse(recipe.model_dump(mode="json") | {"decide": decide_section}, [], "test")


def by_id(table: pa.Table) -> dict[str, dict]:
    return {row["clip_id"]: row for row in table.to_pylist()}


def test_every_measured_clip_has_one_row_with_the_contract_schema(run):
    store, recipe = run
    table = decide(store, recipe).decisions
    assert table.schema.equals(DECISION_SCHEMA)
    assert sorted(table["clip_id"].to_pylist()) == sorted(c["clip_id"] for c in clips_of(store))


def test_dropped_by_names_every_failed_rule_in_the_recipes_order(run):
    store, recipe = run
    rows = by_id(decide(store, recipe).decisions)
    for clip in clips_of(store):
        expected = []
        if clip["duration_s"] < 2.0:
            expected.append("too_short")
        if clip["score_motion"] < 0.1:
            expected.append("still")
        if clip["score_text_area"] > 0.5:
            expected.append("too_much_text")
        if not any(c["text"] for c in clip["captions"]):
            expected.append("no_caption")
        row = rows[clip["clip_id"]]
        assert [r for r in row["dropped_by"] if r != "duplicate"] == expected
        assert row["keep"] == (not row["dropped_by"])
    assert ["still", "too_much_text"] in [r["dropped_by"] for r in rows.values()]


def test_the_caption_is_the_one_with_the_best_score(run):
    store, recipe = run
    rows = by_id(decide(store, recipe).decisions)
    for clip in clips_of(store):
        told = [c for c in clip["captions"] if c["text"]]
        best = max(told, key=lambda c: dict(c["scores"])["consensus"], default={"text": None, "model": None})
        assert (rows[clip["clip_id"]]["caption"], rows[clip["clip_id"]]["caption_model"]) == (
            best["text"],
            best["model"],
        )


def test_near_duplicates_are_found_and_the_named_copy_is_kept(run):
    store, recipe = run
    table = decide(store, recipe).decisions
    names = sorted({c["name"] for c in clips_of(store)})
    clips = sorted(clips_of(store), key=lambda c: (c["name"], c["start_frame"]))
    of = {s: [c["clip_id"] for c in clips if c["name"] == names[s]] for s in range(len(names))}
    rows = by_id(table)
    dropped = {r["clip_id"]: r["duplicate_of"] for r in rows.values() if r["duplicate_of"]}
    pairs = {frozenset((of[s][c], of[t][d])) for (s, c), (t, d) in NEAR_DUPLICATES.items()}
    assert {frozenset(pair) for pair in dropped.items()} == pairs
    for copy, original in dropped.items():
        assert rows[copy]["dropped_by"] == ["duplicate"]
        assert rows[original]["keep"]


def test_the_better_of_two_duplicates_is_kept(tmp_path):
    recipe = make_run_folder(tmp_path, sources=2, clips=3, units=1, errors=0)
    store = Store(str(tmp_path))
    table = store.read_table("clips/000000-fixture.parquet")
    same = pa.array(
        [[1.0] + [0.0] * (EMBEDDING_SIZE - 1)] * len(table), pa.list_(pa.float32(), EMBEDDING_SIZE)
    )
    width = pa.array([100, 100, 200, 100], pa.int32())
    height = pa.array([100] * 4, pa.int32())
    for name, column in ((f"emb_{EMBEDDING}", same), ("width", width), ("height", height)):
        table = table.set_column(table.schema.get_field_index(name), name, column)
    store.write_table("clips/000000-fixture.parquet", table)
    decisions = decide(store, recipe).decisions
    best = table["clip_id"][2].as_py()
    assert decisions.filter(decisions["keep"])["clip_id"].to_pylist() == [best]
    assert set(decisions.filter(pc.invert(decisions["keep"]))["duplicate_of"].to_pylist()) == {best}


def test_a_clip_that_a_rule_drops_does_not_make_its_copy_a_duplicate(run):
    store, recipe = run
    original = next(
        r["duplicate_of"] for r in decide(store, recipe).decisions.to_pylist() if r["duplicate_of"]
    )
    clip = next(c for c in clips_of(store) if c["clip_id"] == original)
    only = {"column": "score_motion", "min": clip["score_motion"] + 1e-9}
    rows = by_id(decide(store, with_decide(recipe, rules={"only": only})).decisions)
    assert rows[original]["dropped_by"] == ["only"]
    assert original not in {r["duplicate_of"] for r in rows.values()}


def test_bounds_are_inclusive_and_null_passes(tmp_path):
    recipe = make_run_folder(tmp_path, sources=2, units=1, errors=0)
    store = Store(str(tmp_path))
    table = store.read_table("clips/000000-fixture.parquet")
    column = pa.array([1.0, 2.0, 3.0, None], pa.float64())
    table = table.set_column(table.schema.get_field_index("score_motion"), "score_motion", column)
    store.write_table("clips/000000-fixture.parquet", table)
    rule = {"column": "score_motion", "min": 1.0, "max": 2.0}
    recipe = with_decide(recipe, rules={"r": rule}, duplicates={"enabled": False})
    rows = by_id(decide(store, recipe).decisions)
    assert [rows[i]["keep"] for i in table["clip_id"].to_pylist()] == [True, True, False, True]


def test_a_rule_may_use_the_chosen_captions_score(run):
    store, recipe = run
    strict = with_decide(recipe, rules={"sure": {"column": "caption.consensus", "min": 0.6}})
    rows = by_id(decide(store, strict).decisions)
    for clip in clips_of(store):
        scores = [dict(c["scores"]).get("consensus", np.nan) for c in clip["captions"]]
        assert ("sure" in rows[clip["clip_id"]]["dropped_by"]) == (max(scores) < 0.6)


@pytest.mark.parametrize(
    ("column", "says"),
    [
        ("score_beauty", "not measured.*score_motion"),
        ("source", "not a number.*duration_s"),
        ("caption.beauty", "no chosen caption.*caption.consensus"),
    ],
)
def test_a_rule_on_a_column_that_is_not_there_is_one_clear_error(run, column, says):
    store, recipe = run
    with pytest.raises(RecipeError, match=says):
        decide(store, with_decide(recipe, rules={"r": {"column": column, "min": 1}}))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A run of four clips whose list, screens and captions say something."""
    root = tmp_path_factory.mktemp("told")
    recipe = make_run_folder(root, sources=2, units=1, errors=0)
    store = Store(str(root))
    name = "clips/000000-fixture.parquet"
    table = store.read_table(name)

    def captions(text):
        scores = [("consensus", 0.5), ("clip_score", 9.0 if "cat" in text.lower() else 1.0)]
        given = {
            "model": "given",
            "text": text,
            "outcome": "ok",
            "prompt": "",
            "scores": scores,
            "reason": "",
        }
        tags = given | {
            "model": "tags",
            "text": f"tags of {text}",
            "scores": [("consensus", 0.4), ("clip_score", 5.0)],
        }
        return [tags, given]

    columns = {
        "meta": [
            [("views", "10"), ("licence", "CC-BY")], [("views", "2e3"), ("licence", "cc0")],
            [("views", "many"), ("licence", "All rights")], [("size", "1")],
        ],
        "text": [["SALE", "50 % off"], [], ["Final sale"], ["EXIT"]],
        "captions": [captions(t) for t in ("A dog runs.", "A CAT sleeps.", "A concatenation.", "ein Straßenhund")],
    }  # fmt: skip
    for column, values in columns.items():
        i = table.schema.get_field_index(column)
        table = table.set_column(i, column, pa.array(values, table.schema.field(column).type))
    store.write_table(name, table)
    return store, recipe, table["clip_id"].to_pylist()


def kept(told, rule: dict, **choose) -> list[bool]:
    """Which of the four clips a rule keeps."""
    store, recipe, ids = told
    data = recipe.model_dump(mode="json") | {"choose": choose}
    data["decide"] = {"rules": {"r": rule}, "duplicates": {"enabled": False}}
    rows = by_id(decide(store, parse(data, [], "test")).decisions)
    return [rows[i]["keep"] for i in ids]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"column": "caption", "contains": "cat"}, [0, 1, 1, 0]),
        ({"column": "caption", "contains": ["dog", "STRASSENHUND"]}, [1, 0, 0, 1]),
        ({"column": "caption", "excludes": ["cat", "dog"]}, [0, 0, 0, 1]),
        ({"column": "caption", "matches": r"\bcat\b"}, [0, 1, 0, 0]),
        ({"column": "caption", "not_matches": r"\bcat\b"}, [1, 0, 1, 1]),
        ({"column": "caption", "contains": "a", "not_matches": "^a c"}, [1, 0, 0, 1]),
        ({"column": "text", "excludes": "sale"}, [0, 1, 0, 1]),
        ({"column": "text", "matches": "^50"}, [0, 0, 0, 0]),
        ({"column": "text", "matches": "(?m)^50"}, [1, 0, 0, 0]),
        ({"column": "meta.licence", "matches": "^cc"}, [1, 1, 0, 0]),
        ({"column": "meta.licence", "excludes": "rights"}, [1, 1, 0, 1]),  # one that is not there is empty
        ({"column": "meta.views", "min": 100}, [0, 1, 1, 1]),  # what is no number was not measured
        ({"column": "meta.views", "contains": "many"}, [0, 0, 1, 0]),
        ({"column": "name", "contains": "video 0"}, [1, 1, 1, 0]),
        ({"column": "caption_model", "contains": "given"}, [1, 1, 1, 1]),
    ],
)
def test_a_rule_may_ask_of_texts_and_of_the_lists_own_columns(told, rule, expected):
    assert kept(told, rule) == [bool(x) for x in expected]


def test_who_is_preferred_is_decided_later(told):
    by_given = {"column": "caption_model", "contains": "given"}
    assert kept(told, by_given, method="consensus") == [True] * 4
    assert kept(told, by_given, method="open_clip") == [False, True, True, False]  # 9 and 1 beside 5
    assert kept(told, by_given, method="order", order=["tags"]) == [False] * 4
    assert kept(told, by_given, method="order", order=["given", "tags"]) == [True] * 4


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (
            {"column": "meta.view", "min": 1},
            r"no clip has the column 'meta.view' \(did you mean 'meta.views'\?",
        ),
        ({"column": "meta.licence", "min": 1}, r"no value of 'meta.licence' is a number \(one is 'CC-BY'\)"),
        ({"column": "caption", "min": 1}, "column 'caption' is not a number, use contains"),
        (
            {"column": "duration_s", "contains": "1"},
            "column 'duration_s' is a number: give it a min or a max",
        ),
        ({"column": "captions", "contains": "1"}, r"column 'captions' is no text \(did you mean 'caption'\?"),
        ({"column": "score_motoin", "min": 1}, r"did you mean 'score_motion'\?"),
        ({"column": "caption.consenus", "min": 1}, r"did you mean 'caption.consensus'\?"),
    ],
)
def test_a_rule_on_what_no_clip_has_names_the_nearest(told, rule, says):
    with pytest.raises(RecipeError, match=says) as e:
        kept(told, rule)
    assert "\n" not in str(e.value)


def test_a_choice_by_what_was_not_measured_is_one_sentence(run, told):
    store, recipe = run
    for choose, says in (
        ({"method": "open_clip"}, "no caption has the score 'clip_score'"),
        (
            {"method": "order", "order": ["tag-baseline"]},
            r"no captioner 'tag-baseline' \(did you mean 'tags-baseline'",
        ),
    ):
        data = recipe.model_dump(mode="json") | {"choose": choose}
        with pytest.raises(RecipeError, match=says):
            decide(store, parse(data, [], "test"))


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        (
            {"r": {"column": "caption", "matches": "(a"}},
            r"rules.r.matches: not a regular expression: .* \(got",
        ),
        ({"r": {"column": "caption", "contains": ""}}, "an empty text is in every text"),
        ({"r": {"column": "caption", "contains": "a", "max": 3}}, "make two rules"),
        ({"r": {"column": "duration_s"}}, "needs a min, a max or both"),
        ({"r": {"column": "duration_s", "min": 3, "max": 2}}, "no clip could pass"),
        ({"duplicate": {"column": "duration_s", "min": 3}}, "clipmill's own"),
    ],
)
def test_a_rule_that_cannot_work_is_refused_with_the_recipe(run, rules, says):
    with pytest.raises(RecipeError, match=says):
        with_decide(run[1], rules=rules)


def test_without_captioners_a_clip_needs_no_caption(tmp_path):
    recipe = make_run_folder(tmp_path, errors=0)
    recipe = recipe.model_copy(update={"captions": ()})
    decisions = decide(Store(str(tmp_path)), recipe).decisions
    assert not any("no_caption" in d for d in decisions["dropped_by"].to_pylist())


def test_units_without_a_videos_file_do_not_count(tmp_path):
    recipe = make_run_folder(tmp_path)
    store = Store(str(tmp_path))
    store.delete("videos/000001-fixture.parquet")
    committed = store.read_table("clips/000000-fixture.parquet")["clip_id"].to_pylist()
    assert sorted(decide(store, recipe).decisions["clip_id"].to_pylist()) == sorted(committed)


def test_of_two_rows_with_one_id_the_first_by_source_counts(tmp_path):
    recipe = make_run_folder(tmp_path, sources=2, units=2, errors=0)
    store = Store(str(tmp_path))
    first = store.read_table("clips/000000-fixture.parquet")
    again = first.set_column(1, "source", pa.array(["/earlier"] * len(first)))
    store.write_table("clips/000001-fixture.parquet", again)
    decided = decide(store, recipe)
    assert decided.decisions["source"].to_pylist() == ["/earlier"] * len(first)
    assert (decided.file == 1).all()


def test_a_run_without_clips_decides_nothing(tmp_path):
    recipe = make_run_folder(tmp_path, sources=1, clips=2, units=1)  # the last source has two clips fewer
    store = Store(str(tmp_path))
    assert clip_files(store) == []
    decided = decide(store, recipe)
    assert decided.decisions.schema.equals(DECISION_SCHEMA)
    assert len(decided.decisions) == 0
    assert [d.left for d in funnel(decided.decisions)] == [0] * len(funnel(decided.decisions))
    store.write_table("clips/000000-fixture.parquet", clip_schema(["motion"], {"x": 4}).empty_table())
    loose = with_decide(recipe, rules={})
    assert len(decide(store, loose).decisions) == 0


def test_the_funnel_counts_each_rule_alone_and_in_order(run):
    store, recipe = run
    decisions = decide(store, recipe).decisions
    lines = funnel(decisions)
    dropped = decisions["dropped_by"].to_pylist()
    assert [line.rule for line in lines] == [*RECIPE["decide"]["rules"], "no_caption", "duplicate"]
    for i, line in enumerate(lines):
        so_far = {x.rule for x in lines[: i + 1]}
        assert line.alone == sum(line.rule in d for d in dropped)
        assert line.in_order == sum(bool(d) and d[0] == line.rule for d in dropped)
        assert line.left == sum(not so_far & set(d) for d in dropped)
    assert lines[-1].left == sum(decisions["keep"].to_pylist())


def test_decisions_do_not_depend_on_how_sources_were_dealt_to_units(tmp_path):
    tables = []
    for units in (1, 3):
        recipe = make_run_folder(tmp_path / str(units), units=units)
        tables.append(decide(Store(str(tmp_path / str(units))), recipe).decisions)
    assert tables[0].equals(tables[1])


def test_the_signature_saves_clips_that_only_mean_the_same(tmp_path):
    """Two sources that look alike to the embedder are duplicates only if the signatures agree, too."""
    recipe = make_run_folder(tmp_path, sources=3, clips=2, units=1, errors=0)
    store = Store(str(tmp_path))
    table = store.read_table("clips/000000-fixture.parquet").take([0, 2])
    assert len(set(table["source"].to_pylist())) == 2
    n = len(table)
    same = pa.array([[1.0] + [0.0] * (EMBEDDING_SIZE - 1)] * n, pa.list_(pa.float32(), EMBEDDING_SIZE))
    table = table.set_column(table.schema.get_field_index(f"emb_{EMBEDDING}"), f"emb_{EMBEDDING}", same)
    store.write_table("clips/000000-fixture.parquet", table)
    assert sum(decide(store, recipe).decisions["keep"].to_pylist()) == 1
    signatures = pa.array(np.eye(n, dtype=np.float32).tolist(), pa.list_(pa.float32(), n))
    store.write_table("clips/000000-fixture.parquet", table.append_column("emb_signature", signatures))
    assert sum(decide(store, recipe).decisions["keep"].to_pylist()) == n


def test_deciding_loads_no_model_library(tmp_path):
    make_run_folder(tmp_path / "run", sources=2, errors=0)
    code = (
        "import sys\nfrom jobs.shard import main\n"
        f"assert main([{str(tmp_path / 'run')!r}]) == 0\n"
        "heavy = {'torch', 'av', 'cv2', 'ray', 'transformers', 'open_clip', 'onnxruntime', 'PIL', 'webdataset'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_decisions_say_by_what_they_were_made(run):
    store, recipe = run
    metadata = decide(store, recipe).decisions.schema.metadata
    assert json.loads(metadata[b"decide"]) == recipe.decide.model_dump(mode="json")
    assert set(CAPTIONERS) >= set(filter(None, decide(store, recipe).decisions["caption_model"].to_pylist()))
    assert dataclasses.is_dataclass(funnel(decide(store, recipe).decisions)[0])


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (
            {"column": "meta.views", "min": 100},
            "2 clips have no number in meta.views (e.g. 'many'); they pass rule 'r'",
        ),
        ({"column": "meta.size", "max": 3}, "3 clips have no number in meta.size; they pass rule 'r'"),
        ({"column": "duration_s", "min": 3}, ""),  # all have one
        ({"column": "meta.views", "contains": "many"}, ""),
        ({"column": "caption.clip_score", "min": 2}, ""),
    ],
)
def test_clips_that_pass_a_rule_for_want_of_a_number_are_counted_once(told, caplog, rule, says):
    kept(told, rule)
    assert [r.getMessage() for r in caplog.records] == ([says] if says else [])


def test_a_measure_that_some_clips_lack_passes_without_a_word(tmp_path, caplog):
    recipe = make_run_folder(tmp_path, sources=2, units=1, errors=0)
    store = Store(str(tmp_path))
    name = "clips/000000-fixture.parquet"
    table = store.read_table(name)
    i = table.schema.get_field_index("score_motion")
    rules = with_decide(recipe, rules={"r": {"column": "score_motion", "min": 1.0}})
    values = pa.array([1.0, 2.0, 3.0, None], pa.float64())
    store.write_table(name, table.set_column(i, table.schema.field(i), values))
    assert all(decide(store, rules).decisions["keep"].to_pylist())
    assert not caplog.records


def test_a_slip_in_the_name_of_a_flag_is_told_and_a_flag_of_ones_own_is_not_refused(run):
    store, recipe = run
    for asked, known in (("openr", False), ("opener", True), ("open", True), ("shaky-cam", True)):
        rule = {"column": "caption_flags", "excludes": [asked]}
        if known:
            decide(store, with_decide(recipe, rules={"f": rule}))
        else:
            with pytest.raises(RecipeError, match=r"rules\.f: no flag 'openr' \(did you mean 'opener'\?\)"):
                decide(store, with_decide(recipe, rules={"f": rule}))
