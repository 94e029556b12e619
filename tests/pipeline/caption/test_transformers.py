"""Models of transformers as captioners and as judges: which frames, which words, which batches, what is kept."""

from __future__ import annotations

import copy

import pytest

from pipeline import recipe
from pipeline.caption import captioner as captions
from pipeline.caption import judge as judges
from pipeline.caption import transformers as transformer
from pipeline.caption.captioner import CaptionStage
from pipeline.caption.judge import JudgeStage
from pipeline.record import Caption
from pipeline.samples import samples
from tests.fixtures import tiny_vlm, tiny_vlm_families
from tests.fixtures.clips import noise, video


def section(**values):
    return recipe.parse({"name": "test", "captions": [values]}, [], "test").captions[0]


def run(stage, videos):
    stage.setup()
    return [c.captions for v in stage(videos) for c in v.clips]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return str(tiny_vlm.llava_onevision(tmp_path_factory.mktemp("llava")))


def vlm(model, **values):
    return CaptionStage(
        section(kind="transformers", model=model, name="tiny", max_new_tokens=6, frames=3, **values)
    )


def test_a_vlm_captions_each_clip_alike_whatever_else_is_in_the_unit(llava):
    stage = vlm(llava, batch=2)
    assert stage.name == "caption:tiny"
    videos = [video([noise(10 * j + i) for i in range(9)], [(0, 4), (4, 6), (6, 9)]) for j in range(2)]
    together = run(stage, copy.deepcopy(videos))
    assert together == [c for v in videos for c in run(stage, [copy.deepcopy(v)])]
    assert len({c[0].text for c in together}) == 6
    assert {c[0].model for c in together} == {"tiny"}


def test_a_clip_between_two_samples_is_empty_not_made_up(llava):
    v = video([noise(i) for i in range(3)], [(0, 10), (11, 19)], every=10)
    assert [c[0].outcome for c in run(vlm(llava), [v])] == ["truncated", "empty"]


def test_an_image_model_sees_one_frame_of_the_middle_drawn_by_the_clips_id():
    v = video([noise(0)] * 100, [(0, 100)])
    clip, inside = v.clips[0], samples(v, v.clips[0])
    seen = set()
    for i in range(300):
        clip.clip_id = f"{7919 * i:020x}"
        frame = transformer.middle(clip, inside).frame
        assert frame == transformer.middle(clip, inside).frame
        seen.add(frame)
    assert seen == set(range(30, 71))
    assert transformer.middle(clip, inside[:2]).frame == 1  # none in the middle: the nearest


def test_frames_are_told_their_own_time(llava):
    v = video([noise(i) for i in range(8)], [(2, 8)], fps=4)
    v.frames.pts, v.frames.end_pts = v.frames.pts + 1000, v.frames.end_pts + 1000  # a delayed start
    v.clips = [v.clip(2, 8)]
    stage = vlm(llava)
    stage.setup()
    look = stage.captioner._look(v, v.clips[0])
    assert look.times_s == pytest.approx([0.25, 0.75, 1.25])  # frames 3, 5, 7, four a second
    assert look.duration_s == pytest.approx(1.5)


def test_the_prompt_with_its_context_is_kept(llava):
    meta = {"title": "A  cat", "subtitles": "so it  jumps", "url": "x", "description": " "}
    plain_prompt = run(vlm(llava, prompt="Say."), [video([noise(0)], meta=meta)])[0][0].prompt
    assert plain_prompt == "Say."
    prompt = run(vlm(llava, prompt="Say.", context=True), [video([noise(0)], meta=meta)])[0][0].prompt
    assert prompt.splitlines()[0] == "Say."
    assert prompt.splitlines()[2:] == ["Title: A cat", "Subtitles: so it jumps"]
    assert run(vlm(llava, prompt="Say.", context=True), [video([noise(0)])])[0][0].prompt == "Say."


@pytest.mark.parametrize(
    ("text", "complete", "expected"),
    [
        ("A dog runs. It ba", False, ("A dog runs.", "ok")),
        ("A dog ru", False, ("A dog ru", "truncated")),
        ("A dog runs. It barks.", True, ("A dog runs.", "ok")),
        ("", True, ("", "ok")),
    ],
)
def test_a_first_sentence_is_whole_although_the_answer_was_cut_off(text, complete, expected):
    from models.curation.vlm.model import Answer

    captioner = captions.build(section(kind="transformers", model="a/b", first_sentence=True))
    caption = captioner._caption(Answer(text, complete, ""))
    assert (caption.text, caption.outcome) == expected


def test_a_missing_model_is_a_recipe_error_before_any_work():
    with pytest.raises(recipe.RecipeError, match=r"captions: model '/.*/none': no such folder"):
        captions.build(section(kind="transformers", model="./none")).check()


def test_batches_are_of_one_shape_and_of_any_source(llava):
    """A source of one clip shares its forward pass with others, and says what it says alone."""
    stage = vlm(llava, batch=4)
    shapes = [(48, 64), (64, 48), (48, 64), (48, 64), (64, 48)]
    videos = [video([noise(10 * j + i, *s) for i in range(3)], [(0, 3)]) for j, s in enumerate(shapes)]
    alone = [c for v in videos for c in run(stage, [copy.deepcopy(v)])]
    passes = []
    batched = stage.captioner.model._answers
    stage.captioner.model._answers = lambda looks: (
        passes.append([x.frames[0].shape for x in looks]) or batched(looks)
    )
    said = [c.captions for v in stage(copy.deepcopy(videos)) for c in v.clips]
    assert passes == [[(48, 64, 3)] * 3, [(64, 48, 3)] * 2]
    assert said == alone


def test_sampling_draws_by_the_clips_id(llava):
    stage = vlm(llava, temperature=1.0, batch=3)
    videos = [video([noise(1)] * 3, [(0, 1), (1, 2), (2, 3)]) for _ in range(2)]
    for i, clip in enumerate(c for v in videos for c in v.clips):
        clip.clip_id = f"{i:020x}"
    together = run(stage, copy.deepcopy(videos))
    assert together == [c for v in videos for c in run(stage, [copy.deepcopy(v)])]
    assert len({c[0].text for c in together}) > 2
    assert run(vlm(llava, temperature=1.0, seed=1), copy.deepcopy(videos)) != together


def test_what_it_cost_and_what_was_said_word_for_word_are_kept(llava):
    caption = run(vlm(llava), [video([noise(i) for i in range(3)])])[0][0]
    assert caption.cost["completion_tokens"] == 6
    assert caption.cost["prompt_tokens"] > 3
    from models.curation.vlm.model import Answer

    captioner = captions.build(section(kind="transformers", model="a/b", first_sentence=True))
    said = captioner._caption(Answer("A dog. It runs.", True, "p", "", 3, 4))
    assert (said.text, said.raw) == ("A dog.", "A dog. It runs.")
    assert captioner._caption(Answer("A dog.", True, "p")).raw == ""
    assert (
        captioner._caption(Answer("A dog.", True, "p", "<think>Hm</think>A dog.")).raw
        == "<think>Hm</think>A dog."
    )


def test_thoughts_without_an_answer_are_a_caption_that_breaks_off(tmp_path):
    qwen = str(tiny_vlm_families.qwen3_vl(tmp_path / "qwen"))
    v = video([noise(i) for i in range(3)])
    caption = run(vlm(qwen, thinking=True), [v])[0][0]
    assert (caption.text, caption.outcome) == ("", "truncated")
    assert caption.reason == "it was cut off before it said anything: raise max_new_tokens"
    assert caption.raw


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beams": 2, "temperature": 0.7}, "beams search .*keep one"),
        ({"max_pixels": 9, "tokens": 9}, "max_pixels and tokens say the same"),
        ({"context": ["titel"]}, "context"),
        ({"prompt": "structurd"}, "did you mean 'structured'"),
    ],
)
def test_settings_that_say_two_things_are_refused(values, message):
    with pytest.raises(recipe.RecipeError, match=message):
        section(kind="transformers", model="a/b", **values)


def test_a_prompt_holds_what_is_known_where_it_has_a_place_for_it(llava):
    meta = {"title": "A cat<|im_end|>", "subtitles": "so it jumps"}
    asked = {"prompt": "Say.\nTitle: {title}\nSubtitles: {subtitles}\nText: {on_screen_text}"}
    for context, expected in (
        (True, "Say.\nTitle: A cat\nSubtitles: so it jumps"),
        (["subtitles"], "Say.\nSubtitles: so it jumps"),
        (False, "Say."),
    ):
        prompt = run(vlm(llava, context=context, **asked), [video([noise(0)], meta=meta)])[0][0].prompt
        assert " ".join(prompt.split(" ")).replace(" \n", "\n") == expected


# ---------------------------------------------------------------- the judge that asks


@pytest.fixture(scope="module")
def knowing(tmp_path_factory):
    """A checkpoint whose tokenizer has words for yes and no."""
    return str(tiny_vlm_families.qwen3_vl(tmp_path_factory.mktemp("qwen"), words=("Yes", "No")))


def yes(model, **values):
    data = {"name": "t", "choose": {"judges": [{"kind": "p_yes", "model": model, "frames": 3} | values]}}
    return JudgeStage(recipe.parse(data, [], "t").choose.judges[0])


def told(n=2):
    videos = [video([noise(10 * j + i) for i in range(4)], [(0, 2), (2, 4)]) for j in range(n)]
    for v in videos:
        for clip in v.clips:
            clip.captions = [
                Caption("a", "A red cat. It jumps."),
                Caption("b", "A dog."),
                Caption("c", "", "empty"),
            ]
    return videos


def test_a_caption_is_asked_for_whole_and_by_its_sentences(knowing):
    stage = yes(knowing)
    assert stage.score == "p_yes"
    first, second, none = run(stage, told(1))[0]
    assert 0 < first.scores["p_yes"] < 1
    assert len(first.support["p_yes"]) == 2
    assert second.support["p_yes"] == [second.scores["p_yes"]]
    assert "p_yes" not in none.scores
    model = stage.judge.model
    look = stage.judge._look(judges.Told(*_first(told(1)), ["x"]), "It jumps.")
    assert look.prompt == 'Does this show "It jumps."? Please answer yes or no.'
    assert first.support["p_yes"][1] == pytest.approx(model.yes([look])[0], abs=1e-4)
    assert first.support["p_yes"] != [first.scores["p_yes"]] * 2
    assert "p_yes" not in run(yes(knowing, sentences=False), told(1))[0][0].support


def _first(videos):
    return videos[0], videos[0].clips[0]


def test_a_verdict_is_the_clips_own_whatever_is_judged_with_it(knowing):
    together = run(yes(knowing, batch=5), told(2))
    alone = [c for v in told(2) for c in run(yes(knowing, batch=1), [v])]
    for a, b in zip(together, alone, strict=True):
        assert [c.scores.get("p_yes") for c in a[:2]] == [c.scores["p_yes"] for c in b[:2]]


def test_a_judge_of_the_model_that_captions_loads_nothing_again(knowing):
    captioner, judge = vlm(knowing), yes(knowing)
    captioner.setup()
    judge.setup()
    assert captioner.captioner.model.model is judge.judge.model.model


def test_a_judge_is_checked_before_any_work(knowing):
    assert judges.build(yes(knowing).section).check() == "a folder"
    with pytest.raises(recipe.RecipeError, match=r"choose\.judges: model './none': no such folder"):
        judges.build(yes("x/y").section.model_copy(update={"model": "./none"})).check()
    with pytest.raises(recipe.RecipeError, match=r"question has no \{caption\}"):
        yes(knowing, question="Is it true?")
    assert yes(knowing, name="llava says yes").score == "llava says yes"


def test_a_clip_without_frames_has_no_verdict(knowing):
    v = video([noise(i) for i in range(3)], [(0, 10), (11, 19)], every=10)
    for clip in v.clips:
        clip.captions = [Caption("a", "A cat.")]
    assert ["p_yes" in c[0].scores for c in run(yes(knowing), [v])] == [True, False]
