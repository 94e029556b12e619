from __future__ import annotations

import copy
import itertools
import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from pipeline import recipe
from pipeline.caption import choose
from pipeline.caption.choose import ChooseStage, best, consensus, similarity
from pipeline.caption.judge import JudgeStage, build
from pipeline.recipe_choose import ClipScoreJudge
from pipeline.record import Caption
from pipeline.tables import CAPTION
from tests.fixtures.clips import noise, video

TEXTS = [
    "A brown dog runs over the green grass.",
    "The dog is running over grass.",
    "Two dogs on the grass",
    "A red car drives past a house; a red car!",
    "The text on screen reads “SALE”.",
    "",
    "the of and",
]


def row(text, outcome="ok", **scores):
    return {"model": "m", "text": text, "outcome": outcome, "prompt": "", "scores": scores}


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("rows", "index"),
    [
        ([], None),
        ([row("", "empty"), row("", "error")], None),
        ([row("", "empty", consensus=0.9), row("a", consensus=0.0)], 1),
        ([row("a", consensus=0.2), row("b", consensus=0.3), row("c", consensus=0.1)], 1),
        ([row("a", consensus=0.2), row("b", consensus=0.2)], 0),
        ([row("a"), row("b")], 0),
        ([row("a"), row("b", consensus=0.0)], 1),
        ([row("a", consensus=float("nan")), row("b", consensus=0.0)], 1),
        ([row("a", consensus=math.inf), row("b", consensus=0.0)], 1),
        ([row("a", consensus=0.1) | {"flags": ["loop"]}, row("b", consensus=0.2) | {"flags": ["leak"]}], 1),
        ([row("a", "truncated", consensus=0.9), row("b", consensus=0.1)], 1),
        ([row("a", "truncated", consensus=0.1), row("b", "truncated", consensus=0.2)], 1),
        ([row("a", "error", consensus=0.9), row("b")], 1),
        ([row("a", clip_score=2.0, consensus=0.1), row("b", consensus=0.2)], 1),
    ],
)
def test_the_best_is_the_highest_then_the_earliest_never_an_empty_one(rows, index):
    assert best(rows, recipe.Choose()) == index


@pytest.mark.parametrize(
    ("order", "rows", "index"),
    [
        (["c", "b"], [("a", "x"), ("b", "x"), ("c", "x")], 2),
        (["c", "b"], [("a", "x"), ("b", "x"), ("c", "")], 1),
        (["c"], [("b", "x"), ("a", "x")], 0),
        (["c", "b"], [("a", "x"), ("b", "x"), ("c", "x", "truncated")], 1),
        (["c"], [("a", "x", "truncated"), ("c", "x", "truncated")], 1),
        (["a"], [("a", "x", "error"), ("b", "x")], 1),
        (["a"], [("a", "")], None),
    ],
)
def test_an_order_takes_the_first_that_says_something_whole_ones_first(order, rows, index):
    rows = [row(text, *outcome) | {"model": model} for model, text, *outcome in rows]
    assert best(rows, recipe.Choose(method="order", order=order)) == index


def test_an_order_of_captioners_that_are_not_there_names_the_nearest():
    choose.check_names(recipe.Choose(method="order", order=("tags",)), ["tags", "given"])
    choose.check_names(recipe.Choose(order=("gone",)), ["tags"])  # another method does not read it
    with pytest.raises(
        recipe.RecipeError, match=r"no captioner 'tag' \(did you mean 'tags'\?\); there are tags, given"
    ):
        choose.check_names(recipe.Choose(method="order", order=("given", "tag")), ["tags", "given"])
    with pytest.raises(recipe.RecipeError, match="needs choose"):
        recipe.load("smoke", ["choose.method=order"])


def test_a_flag_that_is_misspelt_is_told_and_one_of_ones_own_is_not():
    choose.check_names(recipe.Choose(avoid=("loop", "too_rude")), ["tags"])
    with pytest.raises(
        recipe.RecipeError, match=r"choose.avoid: no flag 'refusl' \(did you mean 'refusal'\?\)"
    ):
        choose.check_names(recipe.Choose(avoid=("loop", "refusl")), ["tags"])


def test_captions_without_spaces_between_words_agree_by_their_characters():
    alike, other = similarity("一只狗在跑", "一只狗在跑步"), similarity("一只狗在跑", "红色的汽车")
    assert alike > 0.8
    assert other == 0
    assert similarity("犬が走る", "犬が走る。") == pytest.approx(1)


def test_what_chooses_is_no_part_of_what_is_measured_but_the_scores_that_open_clip_needs_are():
    key = recipe.load("embedded").measure_key()
    assert (
        recipe.load("embedded", ["choose.method=order", "choose.order=[tags-baseline]"]).measure_key() == key
    )
    judges = "choose.judges=[{kind: clip_score, frames: %d}]"
    measured = [recipe.load("embedded", ["choose.method=clip_score", judges % n]) for n in (4, 8)]
    assert len({key, *(r.measure_key() for r in measured)}) == 3


def test_options_of_when_there_was_one_judge_still_mean_it():
    new = recipe.Choose(method="clip_score", judges=[{"kind": "clip_score", "model": "x", "frames": 12}])
    assert recipe.Choose(method="open_clip", model="x", frames=12) == new
    assert recipe.Choose(method="consensus", clip_score=False, model="x", frames=12) == recipe.Choose()


def test_each_method_reads_its_own_score():
    rows = [row("a", consensus=0.9, clip_score=0.1), row("b", consensus=0.1, clip_score=0.9)]
    assert [best(rows, recipe.Choose(method=m)) for m in ("consensus", "clip_score")] == [0, 1]


def test_weights_add_scores_up_and_a_missing_one_counts_nothing():
    rows = [row("a", x=0.9, y=0.1), row("b", x=0.5, y=0.6), row("c", x=1.2)]
    for weights, index in (
        ({"x": 1.0}, 2),
        ({"y": 1.0}, 1),
        ({"x": 1.0, "y": 0.9}, 2),
        ({"x": 1.0, "y": 2.0}, 1),
    ):
        assert best(rows, recipe.Choose(method="weights", weights=weights)) == index
    odd = [row("a", x=math.nan, y=0.9), row("b", x=-math.inf, y=math.inf), row("c", y=0.1)]
    assert best(odd, recipe.Choose(method="weights", weights={"x": 1.0, "y": 1.0})) == 0
    with pytest.raises(recipe.RecipeError, match=r"weights\.x: input should be a finite number"):
        recipe.parse({"name": "x", "choose": {"method": "weights", "weights": {"x": math.nan}}}, [], "x")
    with pytest.raises(recipe.RecipeError, match=r"method weights needs choose\.weights"):
        recipe.load("smoke", ["choose.method=weights"])


def test_a_caption_with_a_flag_to_avoid_stands_only_where_no_other_does():
    rows = [row("a", x=0.9) | {"flags": ["refusal"]}, row("b", "truncated", x=0.1), row("c", x=0.1)]
    choose_x = recipe.Choose(method="x")
    assert [best(rows[:n], choose_x) for n in (1, 2, 3)] == [0, 1, 2]
    assert best(rows, recipe.Choose(method="x", avoid=())) == 0


def test_the_choice_is_the_same_on_rows_read_back_from_parquet(tmp_path):
    import pyarrow.parquet as pq

    scores = [0.123456, 0.123457, 0.123457, 0.0]  # neighbours at the kept precision stay apart in float32
    rows = [row(str(i), consensus=s) for i, s in enumerate(scores)]
    stored = [r | {"scores": list(r["scores"].items())} for r in rows]
    pq.write_table(pa.table({"captions": pa.array([stored], pa.list_(CAPTION))}), tmp_path / "x.parquet")
    read = pq.read_table(tmp_path / "x.parquet")["captions"][0].as_py()
    assert best(read, recipe.Choose()) == best(rows, recipe.Choose()) == 1


def test_choosing_imports_nothing_heavy():
    code = (
        "import sys, pipeline.caption.choose\n"
        "heavy = ('torch', 'transformers', 'open_clip', 'cv2', 'av', 'ray', 'onnxruntime')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


# ---------------------------------------------------------------- agreement


def brute_force(a, b):
    """Cosine of (1 + ln tf) vectors over an explicit vocabulary of stop-word-free 1-2-grams, in numpy."""

    def grams(text):
        kept = choose.words(text)
        return kept + [f"{kept[i]} {kept[i + 1]}" for i in range(len(kept) - 1)]

    vocabulary = sorted({*grams(a), *grams(b)})
    u, v = (np.array([grams(t).count(g) for g in vocabulary], float) for t in (a, b))
    u, v = (np.where(x > 0, 1 + np.log(np.maximum(x, 1)), 0) for x in (u, v))
    norm = np.linalg.norm(u) * np.linalg.norm(v)
    return u @ v / norm if norm else 0.0


def test_similarity_is_the_cosine_of_weighted_words_and_pairs():
    for a, b in itertools.product(TEXTS, TEXTS):
        assert similarity(a, b) == pytest.approx(brute_force(a, b), abs=1e-12)
        assert similarity(a, b) == similarity(b, a)


def test_similarity_by_hand():
    assert similarity("red dog", "A red cat.") == pytest.approx(1 / 3)  # red | dog, cat, both pairs
    assert similarity("a dog runs", "Dogs run") == pytest.approx(1)
    assert similarity("dog dog", "dog") == pytest.approx((1 + math.log(2)) / math.hypot(1 + math.log(2), 1))
    assert similarity("The video shows a bus.", "This clip shows an opera glass") == 0
    assert similarity("", "a dog") == similarity("the of", "the of") == 0


def test_consensus_is_the_mean_over_the_other_texts_that_say_something():
    scores = consensus(TEXTS)
    for i, text in enumerate(TEXTS):
        others = [t for j, t in enumerate(TEXTS) if j != i and t]
        if text:
            assert scores[i] == pytest.approx(np.mean([brute_force(text, t) for t in others]), abs=1e-12)
        else:
            assert scores[i] is None
    assert consensus(["a dog", "", ""]) == [None, None, None]


def test_consensus_does_not_depend_on_the_order_of_captioners():
    expected = dict(zip(TEXTS, consensus(TEXTS), strict=True))
    for order in itertools.islice(itertools.permutations(TEXTS), 0, 5040, 97):
        assert dict(zip(order, consensus(order), strict=True)) == expected


def test_what_most_say_wins():
    texts = ["A cat sits on a sofa.", "A dog runs over grass.", "A dog is running.", "The dog runs on grass"]
    assert (
        best([row(t, consensus=s) for t, s in zip(texts, consensus(texts), strict=True)], recipe.Choose())
        != 0
    )


# ---------------------------------------------------------------- the stage


def said(v, *texts):
    for clip in v.clips:
        clip.captions = [Caption(f"m{i}", t, "ok" if t else "empty") for i, t in enumerate(texts)]
    return v


def test_the_stage_scores_every_caption_and_again_the_same():
    stage = ChooseStage()
    stage.setup()
    v = said(video([noise(0)] * 2, [(0, 1), (1, 2)]), "red dog", "a red cat", "")
    v.clips[0].captions[2].scores = {"consensus": 0.5, "other": 1.0}  # from when it was not empty
    once = copy.deepcopy(stage([v])[0].clips)
    assert [c.scores for c in once[0].captions] == [
        {"consensus": 0.333333},
        {"consensus": 0.333333},
        {"other": 1.0},
    ]
    assert stage([v])[0].clips == once


def test_clip_scores_are_put_beside_the_consensus_and_come_from_the_clips_own_frames():
    class Scorer:
        def __call__(self, frames, clips):
            frames, found = list(frames), []
            for n, texts in clips:
                own, frames = frames[:n], frames[n:]
                found.append([[own[0][0, 0, 0] / 100 + i for i in range(len(t))] for t in texts])
            return found

    stage = JudgeStage(ClipScoreJudge(kind="clip_score", pretrained="x", frames=1))
    stage.judge = build(stage.section)
    stage.judge.scorer = Scorer()
    grey = np.full((16, 16, 3), 100, np.uint8)
    v = said(video([grey, grey // 2], [(0, 1), (1, 2)]), "One. Two.", "", "One")
    stage([v])
    scores = [[c.scores.get("clip_score") for c in clip.captions] for clip in v.clips]
    assert scores == [[1.5, None, 1.0], [1.0, None, 0.5]]
    support = [[c.support.get("clip_score") for c in clip.captions] for clip in v.clips]
    assert support == [[[1.0, 2.0], None, [1.0]], [[0.5, 1.5], None, [0.5]]]


def test_missing_weights_are_a_recipe_error_before_any_work():
    for pretrained in ("", "no_such_tag", "/no/such/file.pt"):
        with pytest.raises(
            recipe.RecipeError, match=r"choose.judges: open_clip ViT-B-32.*neither a weights file nor"
        ):
            build(ClipScoreJudge(kind="clip_score", pretrained=pretrained)).check()
