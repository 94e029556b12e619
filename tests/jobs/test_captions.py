"""clipmill captions: every number against one worked out by hand from the run's rows."""

import json
import math
from collections import defaultdict

import numpy as np
import pytest
import scipy.stats

from jobs import captions
from pipeline import layers
from pipeline.caption.choose import best, similarity
from pipeline.io.store import Store
from pipeline.recipe_choose import Choose
from pipeline.report.captioners import Mean
from tests.fixtures.run_folder import CAPTIONERS, make_run_folder

NEW = "new/model"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """16 clips of three captioners, one of them silent on a clip; a fourth as a layer with costs, flags and seconds."""
    root = tmp_path_factory.mktemp("captions") / "run"
    make_run_folder(root)
    store = Store(str(root))
    layer = layers.Layer(f"caption:{NEW}", 1)
    layers.create(store, layer)
    for name in layers.clip_files(store):
        rows = []
        for i, clip in enumerate(store.read_table(name, ["clip_id"])["clip_id"].to_pylist()):
            said = {
                "model": NEW,
                "text": "" if i == 0 else f"A dog {i} runs.",
                "outcome": "error" if i == 0 else "ok",
                "scores": [] if i == 0 else [("consensus", 0.95 if i % 2 else 0.05)],
                "flags": ["loop"] if i == 1 else [],
                "cost": [("prompt_tokens", 10.0), ("completion_tokens", 2.0), ("usd", 0.001)],
            }
            rows.append({"clip_id": clip, "seconds": 0.5 + i, "caption": said})
        layers.write(store, layer, layers.unit_of(name), rows)
    return root


def rows_of(run):
    clips = layers.Layered(Store(str(run)))
    return [
        row
        for _, table in clips.tables(["clip_id", "source", "captions", "meta"])
        for row in table.to_pylist()
    ]


def told(run, capsys, *args):
    assert captions.main([str(run), "--json", "-", *args]) == 0
    return json.loads(capsys.readouterr().out)


def test_picks_scores_flags_costs_and_seconds_are_those_of_the_rows(run, capsys):
    found, rows = told(run, capsys), rows_of(run)
    picked = [r["captions"][i]["model"] for r in rows if (i := best(r["captions"], Choose())) is not None]
    assert found["clips"] == len(rows) == 16
    by_model = {m["model"]: m for m in found["models"]}
    assert set(by_model) == {*CAPTIONERS, NEW}
    for name, m in by_model.items():
        its = [c for r in rows for c in r["captions"] if c["model"] == name]
        scores = [dict(c["scores"])["consensus"] for c in its if c["scores"]]
        assert m["picked"] == picked.count(name)
        assert m["scores"]["consensus"]["mean"] == pytest.approx(np.mean(scores))
        assert m["scores"]["consensus"]["clips"] == len(scores)
        assert m["words"]["mean"] == pytest.approx(
            np.mean([len(c["text"].split()) for c in its if c["text"]])
        )
        assert m["vocabulary"] > 0
    new = by_model[NEW]
    assert new["layer"]
    assert new["outcomes"] == {"ok": 14, "error": 2}
    assert new["flags"] == {"loop": 2 / 16}
    assert new["cost"] == pytest.approx({"prompt_tokens": 160, "completion_tokens": 32, "usd": 0.016})
    sizes = [len(t) for _, t in layers.Layered(Store(str(run))).tables(["clip_id"])]
    assert new["seconds_a_clip"] == pytest.approx(sum(0.5 * n + n * (n - 1) / 2 for n in sizes) / 16)
    assert by_model[CAPTIONERS[0]]["outcomes"] == {"ok": 15, "empty": 1}


def test_agreement_is_the_mean_similarity_of_each_two(run, capsys):
    found, rows = told(run, capsys)["agreement"], rows_of(run)
    for i, a in enumerate(found["models"]):
        for j, b in enumerate(found["models"]):
            texts = [{c["model"]: c["text"] for c in r["captions"] if c["text"]} for r in rows]
            pairs = [similarity(t[a], t[b]) for t in texts if a in t and b in t]
            assert found["mean_similarity"][i][j] == (None if i == j else pytest.approx(np.mean(pairs)))


def test_the_set_cover_is_the_one_of_the_scores_and_its_threshold(run, capsys):
    cover, rows = told(run, capsys, "--cover", "consensus:0.6")["cover"], rows_of(run)
    good = [
        {c["model"] for c in r["captions"] if dict(c["scores"]).get("consensus", -1) >= np.float32(0.6)}
        for r in rows
    ]
    assert cover["least"] == 0.6
    kept: list[str] = []
    for step in cover["steps"]:
        adds = {m: sum(m in g and not g & set(kept) for g in good) for m in {*CAPTIONERS, NEW}}
        assert adds[step["model"]] == max(adds.values())
        kept.append(step["model"])
        assert step["covered"] == pytest.approx(sum(bool(g & set(kept)) for g in good) / 16)
        assert step["alone"] == pytest.approx(sum(step["model"] in g for g in good) / 16)
    assert all(not g - set(kept) or g & set(kept) for g in good)
    tops = [
        max([dict(c["scores"])["consensus"] for c in r["captions"] if c["scores"]], default=math.nan)
        for r in rows
    ]
    assert told(run, capsys)["cover"]["least"] == pytest.approx(np.nanmedian(tops))


def test_votes_cover_what_people_called_the_best(run, capsys):
    assert captions.main([str(run), "--cover", "votes"]) == 2
    assert "nobody has voted on captions yet" in capsys.readouterr().err
    from pipeline.inspector.votes import Votes

    votes = Votes(Store(str(run)))
    ids = [r["clip_id"] for r in rows_of(run)]
    for clip, model in zip(ids, [NEW, NEW, CAPTIONERS[1]], strict=False):
        votes.add({"clip": clip, "kind": "best", "model": model, "who": "ann"})
    votes.add({"clip": ids[3], "kind": "bad", "who": "ann"})
    votes.add({"clip": ids[4], "kind": "keep", "who": "ann"})
    votes.close()
    cover = told(run, capsys, "--cover", "votes")["cover"]
    assert cover["clips"] == 4
    assert [(s["model"], s["covered"]) for s in cover["steps"]] == [(NEW, 0.5), (CAPTIONERS[1], 0.75)]


def test_references_are_a_model_or_a_column_of_the_list(run, capsys):
    from models.measures.captions.rouge_l import rouge_l

    found, rows = told(run, capsys, "--reference", "meta.title"), rows_of(run)
    title = [dict(r["meta"])["title"] for r in rows]
    for m in found["models"]:
        texts = [next((c["text"] for c in r["captions"] if c["model"] == m["model"]), "") for r in rows]
        assert m["against"]["clips"] == 16
        assert m["against"]["rouge_l"] == pytest.approx(
            np.mean([rouge_l(a, [b]) for a, b in zip(texts, title, strict=True)])
        )
    by_model = told(run, capsys, "--reference", NEW)["models"]
    assert {"against" in m for m in by_model if m["model"] == NEW} == {False}
    assert {m["against"]["clips"] for m in by_model if m["model"] != NEW} == {14}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--reference", "meta.titel"], "did you mean 'meta.title'"),
        (["--reference", "new/modle"], "did you mean 'new/model'"),
        (["--cover", "consensu"], "did you mean 'consensus'"),
        (["--cover", "consensus:high"], "'high' is no number"),
        (["--cover", "consensus", "--set", "choose.method=consensu"], "did you mean 'consensus'"),
        (["--set", "choose.method=order", "--set", "choose.order=[new/modle]"], "did you mean 'new/model'"),
        (["--set", "choose.methd=x"], "did you mean"),
    ],
)
def test_a_mistake_is_one_line_with_what_there_is(run, capsys, args, said):
    assert captions.main([str(run), *args]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_the_tables_name_every_captioner_and_what_to_keep(run, capsys):
    assert captions.main([str(run), "--keep", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("16 clips, chosen by consensus")
    for name in (*CAPTIONERS, NEW):
        assert out.count(name) >= 3
    assert "12 tokens/clip, $1.00/1000 clips" in out
    assert out.splitlines()[-1].startswith("1 ")


def test_an_interval_knows_that_clips_of_one_source_go_together():
    rng = np.random.default_rng(0)
    held = {"clustered": 0, "naive": 0}
    for _ in range(400):
        mean = Mean()
        values = [rng.normal() + 0.2 * rng.normal(size=rng.integers(1, 12)) for _ in range(60)]
        for i, v in enumerate(values):
            mean.add({str(i): (len(v), float(v.sum()))})
        told = mean.told()
        flat = np.concatenate(values)
        assert told["mean"] == pytest.approx(flat.mean())
        held["clustered"] += told["low"] <= 0 <= told["high"]
        held["naive"] += abs(flat.mean()) <= 1.96 * flat.std(ddof=1) / math.sqrt(len(flat))
    assert held["clustered"] / 400 > 0.91
    assert held["naive"] / 400 < 0.8


@pytest.mark.parametrize("sources", [3, 6])
def test_an_interval_of_few_sources_holds_the_truth_as_often_as_it_says(sources):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        mean = Mean()
        mean.add({str(i): (4, 4 * x) for i, x in enumerate(rng.normal(size=sources))})
        told = mean.told()
        held += told["low"] <= 0 <= told["high"]
    assert 0.93 <= held / 1000 <= 0.97


@pytest.mark.parametrize("keep", ["0", "-1", "two"])
def test_what_is_no_number_to_keep_is_told(run, capsys, keep):
    with pytest.raises(SystemExit):
        captions.main([str(run), "--keep", keep])
    assert f"'{keep}' is no whole number from 1 on" in capsys.readouterr().err


def test_more_to_keep_than_there_are_is_all_of_them(run, capsys):
    assert captions.main([str(run), "--keep", "99"]) == 0
    assert len(capsys.readouterr().out.rpartition("keep (")[2].splitlines()) <= 1 + len(CAPTIONERS) + 1


def test_the_interval_is_the_cluster_robust_formula_written_out():
    groups = {"a": [1.0, 2.0], "b": [4.0], "c": [0.0, 1.0, 5.0]}
    mean = Mean()
    mean.add({k: (len(v), sum(v)) for k, v in groups.items()})
    m = np.mean([x for v in groups.values() for x in v])
    meat = defaultdict(float)
    for k, v in groups.items():
        meat[k] = sum(x - m for x in v) ** 2
    half = scipy.stats.t.ppf(0.975, 2) * math.sqrt(sum(meat.values()) * 3 / 2) / 6
    assert mean.told()["high"] - m == pytest.approx(half)
    assert Mean().told()["mean"] is None
    one = Mean()
    one.add({"a": (2, 3.0)})
    assert one.told() == {"mean": 1.5, "low": None, "high": None, "clips": 2}
