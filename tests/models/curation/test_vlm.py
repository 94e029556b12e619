"""The transformers adapter: search, sampling, thoughts, sizes, judging; on tiny checkpoints."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

from models.curation.vlm import loading, reasoning
from models.curation.vlm.families import family_of, size_settings
from models.curation.vlm.loading import Wanted
from models.curation.vlm.model import VLM, Look
from models.hub import MissingModel
from tests.models.curation.conftest import PROMPT, greedy, look


def test_beam_search_finds_a_likelier_answer_and_the_same_one_again(folder, vlm):
    model = vlm("llava_onevision", "video", beams=4, max_new_tokens=3)
    assert model([look(0), look(1)]) == [model([look(i)])[0] for i in range(2)]
    with torch.inference_mode():
        inputs = model.inputs([look(0)])
        wide, narrow = (
            model.model.generate(**inputs, **model.generate | {"num_beams": beams}) for beams in (4, 1)
        )
        given = inputs["input_ids"].shape[1]

        def likelihood(ids):
            whole = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            scores = model.model(**whole).logits.log_softmax(-1)[0, given - 1 : -1]
            return scores.gather(1, ids[0, given:, None]).sum()

    assert wide.shape == narrow.shape
    with torch.inference_mode():
        assert likelihood(wide) >= likelihood(narrow)


def test_pictures_reach_the_model_in_their_own_order_of_axes(vlm):
    """3 rows, or 3 columns, are not taken for colour channels."""
    model = vlm("llava_onevision", "video")
    for height, width in ((3, 40), (40, 3), (1, 1)):
        picture = np.zeros((height, width, 3), np.uint8)
        picture[..., 0] = 255  # red
        pixels = model.inputs([Look([picture] * 2, [0.0, 0.5], 1.0, PROMPT)])["pixel_values_videos"]
        mean = pixels[0].mean((0, 2, 3))  # [3]
        assert mean[0] > 0 > mean[1]
        assert mean[0] > 0 > mean[2]


@pytest.mark.parametrize(("name", "input"), [("llava_onevision", "video"), ("blip2", "image")])
def test_an_answer_that_ends_is_complete_and_one_cut_off_is_not(folder, vlm, tmp_path, name, input):
    ids, complete = greedy(vlm(name, input), look(0), 10)
    assert not complete
    end = next(i for i in range(1, 10) if ids[i] not in ids[:i])
    copy = shutil.copytree(folder(name), tmp_path / "m")
    settings = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [ids[end]]}))

    ended = VLM(Wanted(str(copy)), input=input, max_new_tokens=end + 1)
    cut = VLM(Wanted(str(copy)), input=input, max_new_tokens=end)
    text = " ".join(ended.processor.tokenizer.decode(ids[:end], skip_special_tokens=True).split())
    answers = [model([look(0)])[0] for model in (ended, cut)]
    assert [(a.text, a.complete) for a in answers] == [(text, True), (text, False)]


def test_sampling_settings_of_a_checkpoint_do_not_make_answers_random(folder, vlm, tmp_path):
    copy = shutil.copytree(folder("llava_onevision"), tmp_path / "m")
    settings = json.loads((copy / "generation_config.json").read_text())
    sampled = settings | {"do_sample": True, "temperature": 1.7, "top_k": 5, "top_p": 0.9}
    (copy / "generation_config.json").write_text(json.dumps(sampled))
    a, b = VLM(Wanted(str(copy)), max_new_tokens=10), vlm("llava_onevision")
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert a([look(0)]) == b([look(0)])


def test_a_model_that_also_speaks_answers_in_text(vlm):
    """Qwen2.5-Omni, of AutoModelForMultimodalLM alone: the part that writes."""
    model = vlm("qwen2_5_omni", "video", max_new_tokens=4)
    looks = [look(0, frames=1), look(1, frames=3), look(2, frames=3)]
    answers = model(looks)
    assert answers == [model([one])[0] for one in looks]
    assert [a.new_tokens for a in answers] == [4] * 3
    assert len({a.text for a in answers}) > 1
    assert "video_second_per_grid" in model.inputs(looks[1:])  # its times
    assert loading.check(model.wanted) == "a folder"


# ---------------------------------------------------------------- sampling


def test_a_sampled_answer_depends_on_seed_and_key_alone(vlm):
    settings = {"temperature": 1.0, "max_new_tokens": 8}
    model, again = vlm("qwen3_vl", "video", **settings), vlm("qwen3_vl", "video", **settings | {"seed": 1})
    looks = [look(0, key=f"clip{i}") for i in range(6)]
    alone = [model([x])[0] for x in looks]
    torch.manual_seed(5)
    assert model(looks) == alone
    assert model(looks[::-1]) == alone[::-1]
    assert len({a.text for a in alone}) > 3
    assert [a.text for a in again(looks)] != [a.text for a in alone]


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 0.6)])
def test_first_tokens_are_drawn_from_the_softmax_of_the_logits(vlm, temperature, top_p):
    model = vlm("llava_onevision", "video", temperature=temperature, top_p=top_p, max_new_tokens=1)
    n = 3000
    wide = (
        model._first_logits(model.inputs([look(0)]))[0].double() / 4
    )  # [V]: flatter, so that there is a choice
    p = (wide / temperature).softmax(0)
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < top_p).sum()) + 1]  # the smallest set with at least top_p
    expected = torch.zeros_like(p)
    expected[kept] = p[kept] / p[kept].sum()

    from models.curation.vlm.sampling import OwnChance

    keys = [str(i) for i in range(n)]
    drawn = OwnChance(keys, 0, temperature, top_p)(None, wide.float().expand(n, -1)).argmax(1)
    counts = torch.bincount(drawn, minlength=len(p)).double()
    assert counts[expected == 0].sum() == 0
    # chi-square of the cells that expect at least 5, the others as one; 5 sigma above its mean
    big = expected * n >= 5
    seen = torch.cat([counts[big], counts[~big].sum()[None]])
    want = torch.cat([expected[big], expected[~big].sum()[None]]) * n
    seen, want = seen[want > 0], want[want > 0]
    cells = len(want) - 1
    assert cells >= 3
    assert ((seen - want) ** 2 / want).sum() < cells + 5 * math.sqrt(2 * cells)


# ---------------------------------------------------------------- thoughts


@pytest.mark.parametrize(
    ("text", "prompt", "left"),
    [
        ("A dog runs.", "", "A dog runs."),
        ("<think>Hm.\nA dog?</think>\n\nA dog runs.", "", "\n\nA dog runs."),
        ("Hm, a dog.</think>A dog runs.", "assistant\n<think>\n", "A dog runs."),
        ("Hm, a dog, or", "assistant\n<think>\n", ""),
        ("<think>Hm, a dog, or", "", ""),
        ("A dog.", "assistant\n<think>\n\n</think>\n\n", "A dog."),
        ("<|channel>thought\nHm.<channel|>A dog.", "", "A dog."),
        ("<think>Hm.</think><answer>A dog.</answer>", "", "A dog."),
        ("<|begin_of_box|>A dog.<|end_of_box|>", "", "A dog."),
        ("[THINK]a[/THINK]A dog.", "", "A dog."),
        ("A <b>dog</b> thinks.", "", "A <b>dog</b> thinks."),
    ],
)
def test_thoughts_are_told_from_what_is_said(text, prompt, left):
    assert reasoning.said(text, prompt) == left


def test_a_model_that_may_think_is_told_whether_it_shall_and_thoughts_stay_out_of_the_text(vlm):
    quiet, thinking = vlm("qwen3_vl", "video"), vlm("qwen3_vl", "video", thinking=True)
    assert quiet._text(look(0)).endswith("<think></think>")
    assert quiet([look(0)])[0].text
    assert thinking._text(look(0)).endswith("<think>")
    answer = thinking([look(0)])[0]  # a random model never ends its thoughts
    assert (answer.text, answer.complete) == ("", False)
    assert answer.raw
    ids = thinking.processor.tokenizer.encode("so.</think> A dog.<|im_end|>")
    ended = thinking._answer(ids, look(0), 1)
    assert (ended.text, ended.complete) == ("A dog.", True)
    assert ended.raw == "so.</think> A dog."


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("frames", [2, 4, 8])
@pytest.mark.parametrize(
    ("kind", "processor"),
    [
        ("qwen2_5_vl", Qwen2VLVideoProcessor()),
        # as released with Qwen3-VL-8B-Instruct
        ("qwen3_vl", Qwen3VLVideoProcessor(size={"shortest_edge": 4096, "longest_edge": 25165824})),
    ],
)
def test_a_frame_costs_what_it_costs_in_qwens_reference_preprocessing(kind, processor, frames):
    """qwen-vl-utils 0.0.14: at most 768 tokens a frame; sides are rounded down to whole cells."""
    cell = processor.patch_size * processor.merge_size
    shown = np.zeros((frames, 720, 1280, 3), np.uint8)
    family = type("P", (), {"video_processor": processor})
    settings = size_settings(family_of(kind), family, "video", frames, None)
    grid = processor(videos=[shown], return_tensors="pt", do_sample_frames=False, **settings)[
        "video_grid_thw"
    ][0]
    scale = math.sqrt(720 * 1280 / (768 * cell * cell))
    expected = [math.floor(side / scale / cell) * processor.merge_size for side in (720, 1280)]
    assert grid.tolist() == [frames // 2, *expected]


@pytest.mark.parametrize("input", ["video", "images"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v", "gemma4"])
def test_max_pixels_bounds_each_frame_and_tokens_say_the_same(vlm, folder, name, input):
    wide = look(0, frames=4, height=240, width=320)

    def visual_tokens(**settings):
        model = vlm(name, input, **settings)
        ids = model.inputs([wide])["input_ids"][0].tolist()
        config = model.model.config
        return sum(ids.count(token) for token in {config.image_token_id, config.video_token_id})

    cell = {"qwen2_5_vl": 28, "qwen3_vl": 32, "glm4v": 28, "gemma4": 12}[name] ** 2
    steps = 2 if input == "video" and name != "gemma4" else 4
    for few, many in ((6, 20), (20, 60)) if name != "gemma4" else ((70, 140), (140, 280)):
        counts = [visual_tokens(max_pixels=n * cell) / steps for n in (few, many)]
        assert counts[0] < counts[1]
        assert all(0.5 * n <= count <= n for n, count in zip((few, many), counts, strict=True))
        assert visual_tokens(tokens=few) == visual_tokens(max_pixels=few * cell)


def test_tiles_of_a_picture_are_bounded_too(vlm):
    one = look(0, frames=1, height=56, width=56)
    few, many = (
        vlm("internvl", "images", max_pixels=n * 28 * 28).inputs([one])["pixel_values"] for n in (1, 4)
    )
    assert (len(few), len(many)) == (1, 5)  # four and the whole


@pytest.mark.parametrize("settings", [{"max_pixels": 10000}, {"tokens": 9}])
def test_a_model_of_one_size_says_so(vlm, settings):
    with pytest.raises(MissingModel, match=r"pictures have .*take (max_pixels|tokens) away"):
        vlm("video_llava", "video", **settings)
    with pytest.raises(MissingModel, match=r"is too little; its least is 10080"):
        vlm("gemma4", "video", max_pixels=50)


# ---------------------------------------------------------------- a judge that is loaded already


@pytest.mark.parametrize(
    ("name", "input"),
    [("qwen3_vl", "video"), ("internvl", "video"), ("gemma3", "images"), ("blip2_t5", "image")],
)
def test_yes_is_the_share_of_yes_among_yes_and_no_of_one_forward_pass(folder, tmp_path, name, input):
    model = VLM(Wanted(str(shutil.copytree(folder(name), tmp_path / "m"))), input=input)
    tokenizer = model.processor.tokenizer
    tokenizer.add_tokens(["Yes", "No"])  # which a vocabulary of random weights lacks
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No"))
    if max(yes, no) >= model.model.get_input_embeddings().num_embeddings:
        model.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    looks = [
        look(i, prompt=f'Does this show "{words}"?') for i, words in enumerate(("a cat", "a big red dog"))
    ]
    found = model.yes(looks)
    for one, p in zip(looks, found, strict=True):
        inputs = model.inputs([one])
        if name == "blip2_t5":
            inputs["decoder_input_ids"] = torch.tensor(
                [[model.model.config.text_config.decoder_start_token_id]]
            )
        with torch.inference_mode():
            logits = model.model(**inputs).logits[0, -1].double()
        assert p == pytest.approx(float(logits[yes].exp() / (logits[yes].exp() + logits[no].exp())), rel=1e-4)
        assert p == pytest.approx(model.yes([one])[0], rel=1e-4)
    assert found[0] != found[1]


def test_a_model_without_words_for_yes_and_no_is_no_judge(vlm):
    with pytest.raises(MissingModel, match="no single token for 'Yes'"):
        vlm("llava_next_video", "video").yes([look(0)])


# ---------------------------------------------------------------- checkpoints of one's own


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm", "blip2"])
def test_a_checkpoint_trained_and_saved_says_what_it_says_in_memory(vlm, folder, tmp_path, name):
    teacher = VLM(Wanted(str(shutil.copytree(folder(name), tmp_path / "before"))), max_new_tokens=8)
    before = teacher([look(0), look(1)])
    inputs = teacher.inputs([look(0)])
    optimizer = torch.optim.SGD(teacher.model.parameters(), lr=0.5)
    labels = inputs["input_ids"]
    teacher.model(**inputs, labels=labels).loss.backward()
    optimizer.step()
    after = teacher([look(0), look(1)])
    assert after != before
    teacher.model.save_pretrained(tmp_path / "student")
    teacher.processor.save_pretrained(tmp_path / "student")
    student = VLM(Wanted(str(tmp_path / "student")), max_new_tokens=8)
    assert student.model is not teacher.model
    assert student([look(0), look(1)]) == after


def test_who_wants_the_same_model_has_the_same_weights(folder):
    wanted = Wanted(str(folder("qwen2_5_vl")))
    a, b = VLM(wanted, input="video"), VLM(wanted, input="images", beams=2)
    assert a.model is b.model
    other = VLM(replace(wanted, dtype="bfloat16"))
    assert other.model is not a.model
    assert other.model.dtype == torch.bfloat16
    assert other([look(0)])[0].new_tokens > 0
