"""Qwen-VL as a model that trains: pixels, positions, logits and answers are those of transformers' own classes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from models.hub import MissingModel
from models.language import qwen_files, qwen_vl
from models.language.by_document import DOCUMENTS
from models.language.loss import Goal, shifted, token_weights
from models.language.qwen_vl import QwenVL
from tests.fixtures import tiny_qwen_vl, tiny_vlm_families

RNG = np.random.default_rng(0)
PICTURE, SMALL, WIDE = (RNG.integers(0, 256, (*s, 3), dtype=np.uint8) for s in ((50, 70), (20, 23), (30, 90)))
CLIP = RNG.integers(0, 256, (5, 40, 61, 3), dtype=np.uint8)  # an odd number of frames
SECONDS, DURATION = (0.0, 0.4, 0.9, 1.5, 2.0), 2.5
CASES = {
    "image": [PICTURE],
    "images": [PICTURE, SMALL, WIDE],
    "video": [CLIP],
    "both": [SMALL, CLIP, WIDE, CLIP[:4]],
    "text": [],
}


@pytest.fixture(scope="module", params=["2", "2.5", "3"])
def folder(request, tmp_path_factory):
    return str(tiny_qwen_vl.checkpoint(tmp_path_factory.mktemp("qwen"), request.param))


@pytest.fixture(scope="module")
def theirs(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def made(folder: str, **options) -> QwenVL:
    return qwen_vl.build(qwen_files.published(folder), weights=folder, **options).eval()


def given(folder: str, shown, asked: str = "what moves?"):
    """What its own processor makes of pictures and clips before a question, at their times."""
    processor = qwen_files.bounded(AutoProcessor.from_pretrained(folder))
    kinds = [{"type": "image" if x.ndim == 3 else "video"} for x in shown]
    chat = [{"role": "user", "content": [*kinds, {"type": "text", "text": asked}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    clips, pictures = [x for x in shown if x.ndim == 4], [x for x in shown if x.ndim == 3]
    more = {}
    if clips:
        told = [
            {"total_num_frames": 2500, "fps": 1000.0, "frames_indices": [round(1000 * t) for t in SECONDS[: len(x)]],
             "duration": DURATION, "height": 40, "width": 61}
            for x in clips
        ]  # fmt: skip
        more = {"videos": clips, "videos_kwargs": {"do_sample_frames": False, "video_metadata": told}}
    if pictures:
        more["images"] = pictures
    return dict(processor(text=[text], return_tensors="pt", **more))


def seen(model: QwenVL, shown):
    """Ours: visuals as a model takes them, and what a step of each clip's time lasts."""
    looks, visuals, lasts = model.looks, [], []
    for x in shown:
        n = 0 if x.ndim == 3 else len(x)
        frames = x if n else x[None]
        pixels = looks.scaled(looks.resized(frames, looks.sides(n, *frames.shape[1:3])))
        visuals.append(pixels if n else pixels[0])
        lasts += [looks.times(SECONDS[:n], DURATION)] if n else []
    return visuals, lasts


@torch.no_grad()
@pytest.mark.parametrize("attention", [DOCUMENTS, "sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_pixels_positions_logits_and_answers_are_its_own(folder, theirs, case, attention):
    model, shown = made(folder, attention=attention), CASES[case]
    inputs = given(folder, shown)
    tokens = inputs["input_ids"]
    visuals, lasts = seen(model, shown)
    for name, chosen in (("pixel_values", 3), ("pixel_values_videos", 4)):
        mine = [model.looks.patches(v) for v in visuals if v.ndim == chosen]
        assert torch.equal(torch.cat(mine), inputs[name]) if mine else name not in inputs
    positions = model.positions(tokens, visuals, seconds=lasts)
    if shown:
        assert torch.equal(positions, theirs.model.get_rope_index(**inputs)[0])
    expected = theirs(**inputs).logits
    got = model(tokens, visuals, positions=positions)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 0.5
    options = {"max_new_tokens": 6, "do_sample": False}
    said = model.generate(tokens, visuals, seconds=lasts, **options)
    assert torch.equal(said, theirs.generate(**inputs, **options)[:, tokens.shape[1] :])


def test_clips_of_another_length_in_time_stand_elsewhere(tmp_path):
    """Qwen2.5-VL's positions are of absolute time; the answers above would not tell if seconds were lost."""
    model = made(str(tiny_qwen_vl.checkpoint(tmp_path, "2.5")))
    visuals, _ = seen(model, [CLIP])
    tokens = given(str(tmp_path), [CLIP])["input_ids"]
    short, long = (model.positions(tokens, visuals, seconds=[s]) for s in (0.5, 2.0))
    assert not torch.equal(short[0], long[0])
    assert torch.equal(short[1:], long[1:])
    with torch.no_grad():
        assert not torch.allclose(
            model(tokens, visuals, positions=short), model(tokens, visuals, positions=long)
        )


def test_positions_are_the_class_s_own_for_any_sequence(folder, theirs):
    """Times that reach further than rows and columns among them, after which its own rule goes back."""
    model, chance = made(folder), random.Random(1)
    image, video = model.config.image_token_id, model.config.video_token_id
    for _ in range(30):
        tokens, visuals, lasts, grids = [1] * chance.randint(0, 3), [], [], ([], [])
        for _ in range(chance.randint(1, 4)):
            n, h, w = chance.choice([0, 0, 1, 3, 8, 30]), *(16 * chance.randint(1, 4) for _ in "hw")
            visuals.append(torch.zeros(3, h, w) if n == 0 else torch.zeros(n, 3, h, w))
            lasts += [chance.choice([0.13, 0.5, 1.0, 3.7])] if n else []
            t, rows, columns = model.looks.grid(n, h, w)
            grids[n > 0].append([t, 2 * rows, 2 * columns])
            for grid in model.looks.grids(n, (h, w)):
                tokens += [video if n else image] * grid.tokens + [1] * chance.randint(1, 5)
        tokens = torch.tensor([tokens])
        kinds = (tokens == image).int() + 2 * (tokens == video).int()
        expected, _ = theirs.model.get_rope_index(
            tokens,
            kinds,
            torch.tensor(grids[0]) if grids[0] else None,
            torch.tensor(grids[1]) if grids[1] else None,
            second_per_grid_ts=torch.tensor(lasts),
        )
        assert torch.equal(model.positions(tokens, visuals, seconds=lasts), expected)


def test_a_picture_costs_what_its_processor_makes_of_its_size(folder):
    model = made(folder)
    processor = qwen_files.bounded(AutoProcessor.from_pretrained(folder))
    chance = random.Random(0)
    for _ in range(25):
        height, width, n = chance.randint(5, 150), chance.randint(5, 150), chance.randint(1, 7)
        looks = model.looks
        one = processor.image_processor(torch.zeros(3, height, width, dtype=torch.uint8), return_tensors="pt")
        (grid,) = looks.grids(0, looks.sides(0, height, width))
        assert grid.tokens == int(one["image_grid_thw"].prod()) // 4
        clip = torch.zeros(
            max(n, 2), 3, height, width, dtype=torch.uint8
        )  # Qwen3-VL's refuses a single frame
        several = processor.video_processor(clip, do_sample_frames=False, return_tensors="pt")
        assert model.tokens(n, height, width) == int(several["video_grid_thw"].prod()) // 4


def folder_is_of_clips(processor) -> bool:
    """Whether its bounds are of all frames together."""
    return type(processor.video_processor).__name__ == "Qwen3VLVideoProcessor"


def test_all_frames_of_a_long_video_together_have_a_bound(folder):
    """That of the reference preprocessing, as transformers computes it when told."""
    processor = qwen_files.published(folder)
    if folder_is_of_clips(processor):
        processor.video_processor.size = {"shortest_edge": 256, "longest_edge": 20 * 1024}
    else:
        processor.video_processor.max_video_tokens = 40
    looks = qwen_vl.build(processor, weights=folder).looks
    clip = torch.zeros(20, 3, 64, 64, dtype=torch.uint8)
    grid = processor.video_processor(clip, do_sample_frames=False, return_tensors="pt")["video_grid_thw"][0]
    t, h, w = looks.grid(20, *looks.sides(20, 64, 64))
    assert [t, 2 * h, 2 * w] == grid.tolist()
    assert looks.sides(20, 64, 64) < looks.sides(2, 64, 64)


def test_bounds_of_a_recipe_are_those_of_pictures_and_frames(folder):
    model = made(folder, min_pixels=256, max_pixels=1024)
    assert model.looks.image == (256, 1024)
    assert model.tokens(2, 1000, 1000) == 4  # of 16×16 pixels
    assert made(folder).looks.image == (tiny_qwen_vl.LEAST, tiny_qwen_vl.MOST)
    more = made(folder, min_pixels=100 * tiny_qwen_vl.MOST)  # its own greatest number gives way
    assert more.looks.image == (100 * tiny_qwen_vl.MOST, 100 * tiny_qwen_vl.MOST)
    assert more.looks.video[0] == 100 * tiny_qwen_vl.MOST
    assert more.tokens(2, 16, 16) * 16 * 16 >= 50 * tiny_qwen_vl.MOST


@torch.no_grad()
def test_prompts_of_several_lengths_are_answered_as_each_is_alone(folder):
    model = made(folder, attention=DOCUMENTS)
    asked = [(CASES["both"], "what?"), ([PICTURE], "what is it, and where?"), ([], "why?")]
    rows = [given(folder, shown, text)["input_ids"][0] for shown, text in asked]
    longest = max(map(len, rows))
    tokens = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])
    there = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows])
    each = [seen(model, shown) for shown, _ in asked]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    visuals, lasts = [v for some, _ in each for v in some], [s for _, some in each for s in some]
    said = model.generate(tokens, visuals, there=there, seconds=lasts, **options)
    for row, ids, (some, seconds) in zip(said, rows, each, strict=True):
        assert torch.equal(row, model.generate(ids[None], some, seconds=seconds, **options)[0])


@torch.no_grad()
def test_what_follows_a_prompt_is_what_the_whole_gives(folder):
    model = made(folder, attention=DOCUMENTS)
    visuals, lasts = seen(model, CASES["both"])
    asked = given(folder, CASES["both"])["input_ids"]
    answers = torch.tensor([[5, 6, 7], [9, 8, 7]])
    got = model.following(asked, answers, visuals, seconds=lasts)
    for answer, mine in zip(answers, got, strict=True):
        tokens = torch.cat([asked, answer[None]], 1)
        whole = model(tokens, visuals, positions=model.positions(tokens, visuals, seconds=lasts))[0]
        n = asked.shape[1]
        torch.testing.assert_close(mine, whole[n - 1 : n + 2], atol=1e-5, rtol=1e-5)


def together(folder, model):
    """Three documents with pictures in one sequence, padding behind: tokens, visuals, lengths, positions, goal."""
    cases = [CASES["both"], CASES["text"], CASES["video"]]
    parts = [given(folder, shown, "what moves over there?")["input_ids"][0] for shown in cases]
    each = [seen(model, shown) for shown in cases]
    lengths = [len(p) for p in parts]
    tokens = torch.cat([*parts, torch.zeros(7, dtype=torch.long)])
    visuals, lasts = [v for some, _ in each for v in some], [s for _, some in each for s in some]
    positions = model.positions(tokens[None], visuals, [lengths], lasts)[:, 0]
    alone = []
    for ids, (some, seconds) in zip(parts, each, strict=True):
        alone.append((ids, some, [len(ids)], model.positions(ids[None], some, seconds=seconds)[:, 0]))
    return (tokens, visuals, lengths, positions), alone


def goal_of(model, tokens, lengths):
    text = (tokens != model.config.image_token_id) & (tokens != model.config.video_token_id)
    return Goal.of(shifted(tokens, lengths), token_weights(lengths, shifted(text, lengths)))


@pytest.mark.parametrize("attention", [DOCUMENTS, "sdpa", "eager"])
def test_packed_documents_teach_what_each_teaches_alone(folder, attention):
    """Loss and gradients of a sequence are the sums of those of its documents, in every part."""
    model = made(folder, attention=attention).train()
    whole, alone = together(folder, model)

    def loss(tokens, visuals, lengths, positions):
        model.zero_grad()
        total = model(tokens, visuals, lengths, positions, goal=goal_of(model, tokens, lengths))
        total.backward()
        return total.item(), {n: p.grad.clone() for n, p in model.named_parameters()}

    total, gradients = loss(*whole)
    each = [loss(*one) for one in alone]
    assert total == pytest.approx(sum(x for x, _ in each), rel=1e-5)
    assert {name.partition(".")[0] for name in gradients} == {"tower", "projector", "language"}
    for name, g in gradients.items():
        torch.testing.assert_close(g, sum(own[name] for _, own in each), rtol=1e-3, atol=2e-5)


@torch.no_grad()
def test_a_document_does_not_see_what_lies_beside_it(folder):
    model = made(folder, attention=DOCUMENTS)
    (tokens, visuals, lengths, positions), _ = together(folder, model)
    before = model(tokens, visuals, lengths, positions)
    other = tokens.clone()
    other[lengths[0] + 3] += 1  # in the second
    changed = model(other, [visuals[0] + 1, *visuals[1:]], lengths, positions)  # and a picture of the first
    third = slice(sum(lengths[:2]), sum(lengths))
    assert torch.equal(before[third], changed[third])
    assert not torch.allclose(before[: lengths[0]], changed[: lengths[0]])


@torch.no_grad()
def test_saved_it_is_the_published_layout_with_equal_logits_and_pixels(folder, theirs, tmp_path):
    model = made(folder, max_pixels=1024)
    for p in model.parameters():
        p.add_(0.01 * torch.randn_like(p))
    processor = qwen_files.bounded(qwen_files.published(folder), most=1024)
    qwen_vl.save(model, tmp_path, processor)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert again.state_dict().keys() == theirs.state_dict().keys()
    inputs = given(str(tmp_path), CASES["both"])
    visuals, lasts = seen(model, CASES["both"])
    patches = [model.looks.patches(v) for v in visuals if v.ndim == 3]
    assert torch.equal(torch.cat(patches), inputs["pixel_values"])
    positions = model.positions(inputs["input_ids"], visuals, seconds=lasts)
    got = model(inputs["input_ids"], visuals, positions=positions)
    torch.testing.assert_close(got, again(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert again.generation_config.eos_token_id == theirs.generation_config.eos_token_id


def test_files_of_a_processor_give_it_again(folder):
    first = qwen_files.published(folder)
    second = qwen_files.of_files(qwen_files.kept(first))
    assert type(second) is type(first)
    assert second.chat_template == first.chat_template
    picture = torch.from_numpy(PICTURE).permute(2, 0, 1)
    a, b = (p.image_processor(picture, return_tensors="pt")["pixel_values"] for p in (first, second))
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_one_begun_from_nothing_has_a_tokenizer_of_the_texts_and_the_real_processor(kind):
    config = qwen_vl.PRESETS["tiny"]["config"] | {"model_type": kind}
    if kind == "qwen2_vl":
        config = config | {"vision_config": {"embed_dim": 32, "hidden_size": 64, "depth": 1, "num_heads": 2}}
    if kind == "qwen3_vl":
        vision = {
            "hidden_size": 32,
            "out_hidden_size": 64,
            "depth": 2,
            "num_heads": 2,
            "deepstack_visual_indexes": [0],
        }
        config = config | {"vision_config": vision, "text_config": config["text_config"] | {"head_dim": 16}}
    processor = qwen_files.begun(["a red ball"], 300, config)
    torch.manual_seed(0)
    model = qwen_vl.build(processor, config=config, min_pixels=1024, max_pixels=4096)
    assert model.config.model_type == kind
    wanted = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[kind]
    assert type(processor).__name__ == f"{wanted}Processor"
    ids = processor(
        text=["<|vision_start|><|image_pad|><|vision_end|>a red ball"], images=[PICTURE], return_tensors="pt"
    )
    visuals, _ = seen(model, [PICTURE])
    with torch.no_grad():
        logits = model(ids["input_ids"], visuals)
    assert logits.shape == (1, ids["input_ids"].shape[1], len(processor.tokenizer))


def test_what_is_none_of_its_kind_is_said_in_a_sentence(folder, tmp_path):
    processor = qwen_files.published(folder)
    with pytest.raises(ValueError, match="give weights"):
        qwen_vl.build(processor)
    with pytest.raises(ValueError, match="none of qwen2_vl, qwen2_5_vl, qwen3_vl"):
        qwen_vl.build(processor, config={"model_type": "llava"})
    with pytest.raises(MissingModel, match="no option 'hidden_sizes'"):
        qwen_vl.build(processor, config={"model_type": "qwen2_vl", "hidden_sizes": 3})
    with pytest.raises(ValueError, match="attention: flex"):
        made(folder, attention="flex_attention")
    other = str(tiny_vlm_families.glm4v(tmp_path / "glm"))
    with pytest.raises(MissingModel, match="a glm4v is no model of Qwen-VL's kind that trains"):
        qwen_vl.build(qwen_files.published(other), weights=other)
    with pytest.raises(MissingModel, match="no such folder"):
        qwen_files.published(str(tmp_path / "nothing"))
    bare = tmp_path / "bare"
    AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(bare)
    with pytest.raises(MissingModel, match="processor of"):
        qwen_files.published(str(bare))
    cut = {n: x for n, x in load_file(bare / "model.safetensors").items() if "layers.1" not in n}
    save_file(cut, bare / "model.safetensors", {"format": "pt"})
    with pytest.raises(MissingModel, match=r"lacks \d+ weights"):
        qwen_vl.build(processor, weights=str(bare))
    model = made(folder)
    with pytest.raises(ValueError, match="placeholders"):
        model(given(folder, [PICTURE])["input_ids"])
