"""Filters, orders and counts over columns are those of a loop over the files' rows."""

import math
import re
import unicodedata
from collections import Counter

import numpy as np
import pytest

from pipeline.inspector.answers import Inspector
from pipeline.inspector.query import Filters, Wrong, ascending
from pipeline.inspector.search import expression
from tests.fixtures.inspected import LAYER
from tests.fixtures.run_folder import CAPTIONERS


def chosen(row: dict) -> dict | None:
    return next((c for c in row["captions"] if c["model"] == row["decision"]["caption_model"]), None)


def column(name: str, row: dict) -> float:
    """What a column says of a clip, the long way."""
    stands = chosen(row)
    told = [c for c in row["captions"] if c["text"]]
    fits = [c["scores"]["visual_fit"] for c in row["captions"] if "visual_fit" in c["scores"]]
    agree = [c["scores"]["consensus"] for c in row["captions"] if "consensus" in c["scores"]]
    if name == "agreement":
        return sum(agree) / len(agree) if agree else math.nan
    if name == "fit" or name == "caption.visual_fit":
        return stands["scores"].get("visual_fit", math.nan) if stands else math.nan
    if name == "caption.consensus":
        return stands["scores"].get("consensus", math.nan) if stands else math.nan
    if name == "gap":
        return max(fits) - min(fits) if len(fits) > 1 else math.nan
    if name == "flag_count":
        return sum(len(c["flags"]) for c in row["captions"])
    if name == "captions":
        return len(told)
    if name == "words":
        return len(stands["text"].split()) if stands else math.nan
    value = row[name]
    return math.nan if value is None else float(value)


COLUMNS = [
    *(
        "agreement",
        "fit",
        "gap",
        "flag_count",
        "captions",
        "words",
        "caption.consensus",
        "caption.visual_fit",
    ),
    *("duration_s", "score_motion", "score_sharpness", "width"),
]


@pytest.mark.parametrize("name", COLUMNS)
def test_every_column_is_what_the_rows_say(inspector: Inspector, rows: list[dict], name: str):
    np.testing.assert_allclose(inspector.index.numbers[name], [column(name, r) for r in rows], rtol=1e-6)
    assert len({column(name, r) for r in rows}) > 1  # it tells clips apart


def found(inspector: Inspector, query: str) -> list[str]:
    items = [tuple(part.split("=", 1)) for part in query.split("&")]
    ids = inspector.index.ids
    return [ids[int(r)].as_py() for r in inspector.query.found(Filters.of(items)).rows]


FILTERS = {
    "kept=1": lambda r: r["decision"]["keep"],
    "kept=0": lambda r: not r["decision"]["keep"],
    "rule=still": lambda r: "still" in r["decision"]["dropped_by"],
    "rule=duplicate": lambda r: "duplicate" in r["decision"]["dropped_by"],
    f"model={CAPTIONERS[1]}": lambda r: r["decision"]["caption_model"] == CAPTIONERS[1],
    f"has={LAYER}": lambda r: any(c["model"] == LAYER and c["text"] for c in r["captions"]),
    "flag=loop": lambda r: any("loop" in c["flags"] for c in r["captions"]),
    "source=/videos/a folder/video 3.mp4": lambda r: r["source"].endswith("video 3.mp4"),
    "source=a folder/video 3.mp4": lambda r: r["source"].endswith("video 3.mp4"),
    "range=duration_s:3:6": lambda r: 3 <= r["duration_s"] <= 6,
    "range=score_sharpness::0.3": lambda r: column("score_sharpness", r) <= np.float32(0.3),
    "range=score_sharpness:0.2:&range=gap:0.5:": lambda r: (
        column("score_sharpness", r) >= np.float32(0.2) and column("gap", r) >= 0.5
    ),
    f"kept=1&flag=refusal&has={LAYER}&range=words:5:": lambda r: (
        r["decision"]["keep"]
        and any("refusal" in c["flags"] for c in r["captions"])
        and any(c["model"] == LAYER and c["text"] for c in r["captions"])
        and column("words", r) >= 5
    ),
    "kept=1&kept=0&rule=duplicate&rule=still": lambda r: (
        {"still", "duplicate"} & set(r["decision"]["dropped_by"]) != set()
    ),
    "flag=loop&flag=refusal&range=duration_s:3:": lambda r: (
        any({"loop", "refusal"} & set(c["flags"]) for c in r["captions"]) and r["duration_s"] >= 3
    ),
    "source=/videos/a folder/video 3.mp4&source=a folder/video 4.mp4&source=": lambda r: r["source"].endswith(
        ("video 3.mp4", "video 4.mp4")
    ),
    "bucket=no such bucket": lambda r: False,
}


@pytest.mark.parametrize("query", FILTERS)
def test_a_filter_lets_through_what_a_loop_would(inspector: Inspector, rows: list[dict], query: str):
    wanted = [r["clip_id"] for r in rows if FILTERS[query](r)]
    assert found(inspector, query) == wanted
    if "no such" not in query:
        assert 0 < len(wanted) < len(rows)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_is_that_of_a_stable_sort(seed: int):
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=2000) * 10.0 ** rng.integers(-40, 38, 2000)).astype(np.float32)
    values[rng.integers(0, 2000, 900)] = rng.choice([0.0, -0.0, 1.5, np.nan, -np.nan, np.inf, -np.inf], 900)
    for some in (values, -values, values[:0]):
        np.testing.assert_array_equal(ascending(some), np.argsort(some, kind="stable"))


def test_a_bucket_is_the_folder_of_the_shard(inspector: Inspector, rows: list[dict]):
    shards = {r["clip_id"]: r["decision"]["shard"] for r in rows}
    for bucket in inspector.run()["buckets"]:
        assert found(inspector, f"bucket={bucket}") == [
            r["clip_id"] for r in rows if (shards[r["clip_id"]] or "").startswith(f"shards/{bucket}/")
        ]
    assert len(inspector.run()["buckets"]) > 1


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("minus", ["", "-"])
def test_an_order_is_by_value_then_by_source_and_clips_without_it_come_last(
    inspector: Inspector, rows: list[dict], name: str, minus: str
):
    values = inspector.index.numbers[name]
    sign = -1 if minus else 1
    wanted = sorted(range(len(rows)), key=lambda i: (np.isnan(values[i]), sign * np.nan_to_num(values[i]), i))
    assert found(inspector, f"sort={minus}{name}") == [rows[i]["clip_id"] for i in wanted]


def test_a_random_order_is_the_same_again_and_another_with_another_seed(
    inspector: Inspector, rows: list[dict]
):
    first = found(inspector, "sort=random:1")
    assert first == found(inspector, "sort=random:1")
    assert first != found(inspector, "sort=random:2")
    assert sorted(first) == sorted(r["clip_id"] for r in rows)


def test_pages_put_together_are_the_whole(inspector: Inspector):
    filters = Filters.of([("sort", "-gap"), ("kept", "1")])
    every = inspector.clips(filters, 0, 200)
    pages = [inspector.clips(filters, at, 7)["rows"] for at in range(0, every["total"], 7)]
    assert [r for page in pages for r in page] == every["rows"]
    assert every["total"] == len(every["rows"])


@pytest.mark.parametrize("bins", [1, 7, 40])
@pytest.mark.parametrize("name", ["agreement", "score_sharpness", "flag_count", "duration_s"])
def test_a_histogram_counts_what_numpy_counts(inspector: Inspector, rows: list[dict], name: str, bins: int):
    """Whatever range of its own column is filtered by; a value at an edge may fall to either side by rounding."""
    said = inspector.query.histogram(name, bins, Filters.of([("kept", "1"), ("range", f"{name}:1e9:")]))
    values = inspector.index.numbers[name][[r["decision"]["keep"] for r in rows]].astype(float)
    there = values[np.isfinite(values)]
    edges = np.array(said["edges"])
    inner = np.clip(there, edges[0], edges[-1])
    wide = edges[1] - edges[0]
    off = (inner - edges[0]) / wide
    sure = np.abs(off - off.round()) > 1e-3
    least = np.histogram(inner[sure], edges)[0]
    assert (np.array(said["counts"]) >= least).all()
    assert sum(said["counts"]) == len(there)
    assert said["missing"] == len(values) - len(there)
    assert said["kept"] == said["counts"]


def test_facets_are_counts_of_what_passes(inspector: Inspector, rows: list[dict]):
    said = inspector.query.facets(Filters.of([("range", "duration_s:3:")]))
    some = [r for r in rows if r["duration_s"] >= 3]
    assert said["total"] == len(some)
    assert said["models"] == Counter(m for r in some if (m := r["decision"]["caption_model"]))
    flags = Counter(f for r in some for f in {f for c in r["captions"] for f in c["flags"]})
    assert {k: v for k, v in said["flags"].items() if v} == flags
    assert {k: v for k, v in said["rules"].items() if v} == Counter(
        d for r in some for d in r["decision"]["dropped_by"]
    )
    assert said["sources"] == Counter(r["source"] for r in some)
    assert said["kept"]["1"] == sum(r["decision"]["keep"] for r in some)
    has = Counter(m for r in some for m in {c["model"] for c in r["captions"] if c["text"]})
    assert said["has"] == has


def test_flags_of_the_chosen_caption_are_told_from_those_of_others(inspector: Inspector, rows: list[dict]):
    said = {r["id"]: r for r in inspector.clips(Filters.of([]), 0, len(rows))["rows"]}
    expected = {
        r["clip_id"]: {
            f for c in r["captions"] if c["model"] == r["decision"]["caption_model"] for f in c["flags"]
        }
        for r in rows
    }
    assert {i: set(r["chosen_flags"]) for i, r in said.items()} == expected
    assert any(expected.values())
    assert any(set(r["flags"]) - expected[i] for i, r in said.items())


def test_what_else_a_filter_may_be_set_to_keeps_its_count(inspector: Inspector, rows: list[dict]):
    said = inspector.query.facets(Filters.of([("kept", "1"), ("flag", "loop")]))
    loop = [r for r in rows if any("loop" in c["flags"] for c in r["captions"])]
    kept = [r for r in rows if r["decision"]["keep"]]
    assert said["total"] == sum(r in loop for r in kept)
    assert said["kept"]["0"] == sum(not r["decision"]["keep"] for r in loop)
    flags = Counter(f for r in kept for f in {f for c in r["captions"] for f in c["flags"]})
    assert {k: v for k, v in said["flags"].items() if v} == flags
    assert len(flags) > 1
    assert said["models"] == Counter(m for r in kept if r in loop if (m := r["decision"]["caption_model"]))


def test_the_funnel_is_that_of_the_decisions(inspector: Inspector, rows: list[dict]):
    dropped = [r["decision"]["dropped_by"] for r in rows]
    left = len(rows)
    for rule in inspector.run()["rules"]:
        left -= sum(bool(d) and d[0] == rule["name"] for d in dropped)
        assert rule["alone"] == sum(rule["name"] in d for d in dropped)
        assert rule["left"] == left


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("kept=2", "write 1 or 0"),
        ("rule=stil", "did you mean 'still'"),
        ("flag=lop", "did you mean 'loop'"),
        ("sort=score_motoin", "did you mean 'score_motion'"),
        ("sort=random:x", "random:SEED"),
        ("sort=random:²", "random:SEED"),
        ("&".join(f"source={i}" for i in range(101)), "at most 100"),
        ("range=duration_s:a:b", "COLUMN:MIN:MAX"),
        ("range=duration_s:nan:", "COLUMN:MIN:MAX"),
        ("range=:1:2", "COLUMN:MIN:MAX"),
        ("voted=maybe", "none, any"),
        ("like=nobody", "no such clip"),
        ("text=a dog", "visual_fit"),
        ("q=" + "x" * 501, "at most 500"),
    ],
)
def test_what_cannot_be_asked_is_a_sentence(inspector: Inspector, query: str, says: str):
    with pytest.raises(Wrong, match=re.escape(says)):
        found(inspector, query)


# ---------------------------------------------------------------- words


def plain(text: str) -> list[str]:
    """Words as unicode61 sees them: no case, no marks on letters."""
    bare = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(c))
    # in these scripts each character is a word
    return re.findall("[\u3040-\u30ff\u3400-\u9fff]|[^\\W_\u3040-\u30ff\u3400-\u9fff]+", bare)


def texts(row: dict) -> dict[str, list[list[str]]]:
    return {
        "caption": [plain(c["text"]) for c in row["captions"]],
        "text": [plain(t) for t in row["text"]],
        "name": [plain(row["name"])],
        "meta": [plain(v) for v in row["meta"].values()],
    }


def has(row: dict, words: str, field: str = "", begins: bool = False) -> bool:
    wanted = plain(words)
    for name, several in texts(row).items():
        for some in several:
            for i in range(len(some) - len(wanted) + 1):
                part = some[i : i + len(wanted)]
                same = part[:-1] == wanted[:-1] and (
                    part[-1].startswith(wanted[-1]) if begins else part[-1] == wanted[-1]
                )
                if same and field in ("", name):
                    return True
    return False


SEARCHES = {
    "dog": lambda r: has(r, "dog"),
    "DOG grass": lambda r: has(r, "dog") and has(r, "grass"),
    '"a dog"': lambda r: has(r, "a dog"),
    "lauft": lambda r: has(r, "läuft"),
    "Café": lambda r: True,
    "coa*": lambda r: has(r, "coa", begins=True),
    "dog -grass": lambda r: has(r, "dog") and not has(r, "grass"),
    "-dog": lambda r: not has(r, "dog"),
    "text:exit": lambda r: has(r, "exit", "text"),
    'text:"gate 7"': lambda r: has(r, "gate 7", "text"),
    "name:3": lambda r: has(r, "3", "name"),
    "<script>": lambda r: has(r, "script"),
    "OR": lambda r: has(r, "or"),
    "dog AND NOT NEAR(cat, 3)": lambda r: False,
    '"unfinished gradient': lambda r: has(r, "unfinished gradient"),
    "*": lambda r: True,
    "狗": lambda r: has(r, "狗"),
    "草地 走": lambda r: has(r, "草地") and has(r, "走"),
    "地草": lambda r: False,
}


@pytest.mark.parametrize("asked", SEARCHES)
def test_a_search_finds_what_a_loop_over_words_finds(inspector: Inspector, rows: list[dict], asked: str):
    wanted = [r["clip_id"] for r in rows if SEARCHES[asked](r)]
    assert found(inspector, f"q={asked}") == wanted


def test_searches_tell_clips_apart(rows: list[dict]):
    told = [sum(map(test, rows)) for test in SEARCHES.values()]
    assert sum(0 < n < len(rows) for n in told) >= 8


@pytest.mark.parametrize(
    "asked", ['a"b', "'; DROP TABLE words; --", "x:y:z", "NEAR", "^a", "(", "a\0b", "- -"]
)
def test_nothing_typed_is_an_operator(inspector: Inspector, asked: str):
    text = expression(asked)
    assert inspector.search.rows(asked).dtype == bool
    assert text is None or re.fullmatch(r'(\(?"[^"]*"( AND "[^"]*")*\)?)', text)


# ---------------------------------------------------------------- what looks alike


def test_clips_like_one_are_sorted_by_cosine(inspector: Inspector, rows: list[dict]):
    me = rows[5]
    a = np.array(me["emb_efficientnet_lite0"])
    others = [r for r in rows if r is not me]

    def cosine(r: dict) -> float:
        b = np.array(r["emb_efficientnet_lite0"])
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    wanted = sorted(others, key=lambda r: -cosine(r))
    answer = inspector.clips(Filters.of([("like", me["clip_id"])]), 0, 200)
    assert [r["id"] for r in answer["rows"]] == [r["clip_id"] for r in wanted]
    np.testing.assert_allclose(
        [r["similarity"] for r in answer["rows"]], [cosine(r) for r in wanted], atol=1e-5
    )
    neighbours = inspector.clip(5)["neighbours"]
    assert [n["id"] for n in neighbours] == [r["clip_id"] for r in wanted][:12]


def test_many_vectors_lie_in_a_file_and_say_the_same(inspector: Inspector, monkeypatch):
    from pipeline.inspector import near

    monkeypatch.setattr(near, "IN_MEMORY", 0)
    vectors = near.Vectors(inspector.index, "emb_efficientnet_lite0")
    vectors.read()
    vectors.done.set()
    vectors._begun = True
    assert vectors._vectors.dtype == np.float16
    assert inspector.near.pictures is not None
    np.testing.assert_allclose(vectors.like(3), inspector.near.pictures.like(3), atol=2e-3)
