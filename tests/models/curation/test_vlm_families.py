"""What holds for every family of vision-language models, on tiny checkpoints of their real classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.curation.vlm.families import FAMILIES
from models.curation.vlm.model import _metadata
from tests.fixtures.clips import noise
from tests.models.curation.conftest import PROMPT, greedy, look

VIDEO = [
    "qwen2_5_vl",
    "qwen3_vl",
    "glm4v",
    "internvl",
    "llava_onevision",
    "llava_next_video",
    "video_llava",
    "smolvlm",
    "gemma4",
]
CASES = [(name, "video") for name in VIDEO] + [
    ("qwen2_5_vl", "images"),
    ("qwen3_vl", "images"),
    ("glm4v", "images"),
    ("smolvlm", "images"),
    ("gemma3", "images"),
    ("gemma4", "images"),
    ("llava_onevision", "image"),
    ("blip2", "image"),
]
ENCODERS = [("blip2_t5", "image"), ("florence2", "image")]
TASK = "<MORE_DETAILED_CAPTION>"


def prompted(model, one):
    return replace(one, prompt=TASK) if model.family.tasks else one


def first_logits(model, looks):
    """float32 [B, V] of the first token of the answers."""
    return model._first_logits(model.inputs(looks))


def said(model, one):
    """The prompt as the model reads it, visual tokens and all."""
    return model.processor.tokenizer.decode(model.inputs([one])["input_ids"][0])


@pytest.mark.parametrize(("name", "input"), CASES)
def test_an_answer_is_the_greedy_continuation_without_prompt_and_control_tokens(vlm, name, input):
    model = vlm(name, input, max_new_tokens=6)
    for seed in range(2):
        answer = model([look(seed)])[0]
        ids, complete = greedy(model, look(seed), 6)
        text = model.processor.tokenizer.decode(ids, skip_special_tokens=True)
        assert answer.text == " ".join(text.split())
        assert answer.complete == complete
        assert PROMPT not in answer.text
        assert answer.new_tokens == len(ids) + complete
        assert answer.prompt_tokens == model.inputs([look(seed)])["input_ids"].shape[1]


@pytest.mark.parametrize(("name", "input"), CASES + ENCODERS)
def test_a_batch_says_what_single_looks_say(vlm, name, input):
    model = vlm(name, input)
    looks = [look(0), look(1, frames=3), look(2), look(3, height=64, width=48), look(4, frames=1), look(5)]
    if not model.family.tasks:  # prompts of several lengths: rows are padded
        looks[2] = replace(looks[2], prompt=PROMPT + " Say nothing else, and be short.")
    looks = [prompted(model, one) for one in looks]
    answers = model(looks)
    assert answers == [model([one])[0] for one in looks]
    assert answers == model(looks)
    assert len({a.text for a in answers}) > 1
    assert all(PROMPT not in a.text for a in answers)

    together = first_logits(model, [looks[0], looks[2], looks[5]])
    alone = torch.cat([first_logits(model, [looks[i]]) for i in (0, 2, 5)])
    assert (together - alone).abs().max() <= 1e-4 * alone.abs().max()


@pytest.mark.parametrize("name", VIDEO)
def test_one_frame_and_odd_counts_are_answered_and_the_last_frame_counts(vlm, name):
    model = vlm(name, "video")
    for frames in (1, 2, 3, 5):
        one = look(0, frames=frames)
        other = replace(one, frames=[*one.frames[:-1], noise(999)])
        a, b = (first_logits(model, [x]) for x in (one, other))
        assert (a - b).abs().max() > 1e-3 * a.abs().max()
        assert model([one])[0].new_tokens > 0


@pytest.mark.parametrize(("name", "input"), CASES + ENCODERS)
def test_pictures_without_contrast_and_of_any_shape_are_answered(vlm, name, input):
    model = vlm(name, input, max_new_tokens=2)
    shapes = [(48, 64), (160, 48), (16, 320), (47, 63), (1, 1)]
    looks = [prompted(model, look(7, 2, *shape)) for shape in shapes]
    looks += [replace(looks[0], frames=[np.full_like(f, grey) for f in looks[0].frames]) for grey in (0, 255)]
    assert all(answer.new_tokens for answer in model(looks))
    for one in looks:
        pixels = [x for n, x in model.inputs([one]).items() if n.startswith("pixel_values")]
        assert pixels
        assert all(torch.isfinite(x).all() for x in pixels)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_a_frame_too_few_is_the_last_one_again_at_its_own_time(vlm, name):
    model = vlm(name, "video")
    for frames in (1, 3):
        one = replace(look(0, frames=frames, seconds=30.0), times_s=[4.0, 12.0, 20.0][:frames])
        twice = replace(one, frames=one.frames + one.frames[-1:], times_s=one.times_s + one.times_s[-1:])
        given, filled = model.inputs([one]), model.inputs([twice])
        for key in ("input_ids", "pixel_values_videos", "video_grid_thw"):
            assert torch.equal(given[key], filled[key]), key


@pytest.mark.parametrize(
    ("name", "input"), [(n, "video") for n in VIDEO] + [("gemma3", "images"), ("qwen3_vl", "images")]
)
def test_the_order_of_frames_changes_what_is_seen(vlm, name, input):
    model = vlm(name, input)
    one = look(0)
    a, b = (first_logits(model, [x]) for x in (one, replace(one, frames=one.frames[::-1])))
    assert (a - b).abs().max() > 1e-3 * a.abs().max()


TIMES = [0.4, 63.2, 69.9, 75.3]  # of four frames in a clip of 80 s
TOLD = {
    "qwen3_vl": ["<31.8 seconds>", "<72.6 seconds>"],  # the middle of each two
    "glm4v": ["<|end_of_image|>0<", "<|end_of_image|>69<"],  # the first of each two
    "smolvlm": ["0:01:20", *(f"Frame from 0{m}:{s:02d}:" for m, s in ((0, 0), (1, 3), (1, 9), (1, 15)))],
    "gemma4": ["00:00 <", "01:03 <", "01:09 <", "01:15 <"],
}


@pytest.mark.parametrize("name", VIDEO)
def test_a_family_is_told_the_times_that_are_given_where_it_can_be(vlm, name):
    model = vlm(name, "video")
    text = said(model, replace(look(0, seconds=80.0), times_s=TIMES))
    at = [text.index(words) for words in TOLD.get(name, [])]
    assert at == sorted(at)
    assert bool(at) == (bool(model.family.times) and name != "qwen2_5_vl")  # of that one see the next test
    assert "75.3" not in text


def test_qwen2_5_is_told_how_much_time_lies_between(vlm):
    model = vlm("qwen2_5_vl", "video")
    for frames, seconds in ((4, 2.0), (8, 30.0)):
        inputs = model.inputs([look(0, frames=frames, seconds=seconds)])
        assert inputs["video_grid_thw"][0, 0] == frames // 2  # two frames a step
        assert inputs["second_per_grid_ts"][0] == pytest.approx(2 * seconds / frames)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "llava_onevision", "internvl", "smolvlm"])
def test_pictures_one_by_one_come_with_their_times_in_the_prompt(vlm, name):
    model = vlm(name, "images")
    one = replace(look(0, seconds=80.0), times_s=TIMES)
    words = "These 4 frames of one video of 80.0 seconds are shown at 0.4, 63.2, 69.9, 75.3 seconds."
    assert said(model, one).count(words) == 1
    assert model([one])[0].prompt == f"{words}\n{PROMPT}"
    assert words not in said(vlm(name, "images", times="none"), one)
    single = look(0, frames=1)
    assert model([single])[0].prompt == PROMPT


@pytest.mark.parametrize("name", [n for n in VIDEO if n != "smolvlm"])
def test_inputs_are_what_the_processors_own_chat_makes(vlm, name):
    """SmolVLM's own chat cannot be given frames that are chosen already (transformers 5.23)."""
    model = vlm(name, "video")
    one = look(0)
    content = [{"type": "video", "video": np.stack(one.frames)}, {"type": "text", "text": PROMPT}]
    settings = {
        "do_sample_frames": False,
        "video_metadata": [_metadata(one)],
        "input_data_format": "channels_last",
    }
    reference = model.processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        enable_thinking=False,
        processor_kwargs={"videos_kwargs": settings | model._size(4)},
    )
    given = model.inputs([one])
    tensors = {k: v for k, v in reference.items() if isinstance(v, torch.Tensor)}
    assert tensors.keys() == given.keys()
    assert all(torch.equal(v, given[k]) for k, v in tensors.items())


@pytest.mark.parametrize(
    ("name", "input"), [("blip2", "image"), ("florence2", "image"), ("gemma3", "images")]
)
def test_a_family_without_video_is_shown_what_it_takes_where_nobody_says_what(vlm, name, input):
    model = vlm(name)
    assert model.input == input
    assert model([look(0, prompt=model.prompt)])[0].new_tokens > 0


def test_florence_is_asked_by_the_token_of_a_task(vlm):
    model = vlm("florence2", "image")
    assert model.prompt == TASK
    assert "Describe with a paragraph what is shown in the image." in said(model, look(0, prompt=TASK))
    assert model([look(0, prompt=TASK)])[0].prompt == TASK


@pytest.mark.parametrize("name", [*VIDEO, "gemma3", "blip2"])
def test_nothing_in_a_cleaned_text_acts_as_a_control_token(vlm, name):
    model = vlm(name)
    tokens = model.processor.tokenizer.added_tokens_decoder
    evil = f"cats {''.join(str(t) for t in tokens.values())} obey"
    clean = model.clean(evil)
    assert clean.split() == ["cats", "obey"]
    plain, given = (
        model.inputs([look(0, prompt=p)])["input_ids"][0].tolist() for p in (PROMPT, f"{PROMPT} {clean}")
    )
    assert len(given) > len(plain)
    assert all(given.count(token) == plain.count(token) for token in tokens)


def test_every_family_that_is_told_apart_is_known_to_transformers():
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    assert set(FAMILIES) <= set(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
