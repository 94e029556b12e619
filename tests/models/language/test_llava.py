"""LLaVA-type models: pictures in their places, documents apart, the same numbers in transformers' own classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPConfig, CLIPModel

from models.curation.vlm.loading import Wanted
from models.curation.vlm.model import VLM, Look
from models.hub import MissingModel
from models.language import exported, loss
from models.language.by_document import DOCUMENTS, attend, stand_in
from models.language.llava import ONEVISION, PRESETS, Llava, Placeholders, build, check
from models.language.towers import OpenClipTower, tower
from tests.fixtures.tiny_vlm import _qwen_tokenizer, llava_onevision, qwen2_5_vl

SIDE = 32
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
SIGLIP = {"model_type": "siglip_vision_model", **SMALL, "image_size": SIDE, "patch_size": 8}
CLIP = SIGLIP | {"model_type": "clip_vision_model"}
VIVIT = {
    "model_type": "vivit",
    "frames": 4,
    "size": SIDE,
    "tubelet": (2, 8, 8),
    "dim": 24,
    "depth": 1,
    "heads": 2,
}
QWEN2 = {"model_type": "qwen2", **SMALL, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = QWEN2 | {"model_type": "llama"}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return _qwen_tokenizer(["<image>", "<video>"])


@pytest.fixture
def made(tokenizer):
    def make(tower=SIGLIP, language=QWEN2, seed: int = 0, **options) -> Llava:
        torch.manual_seed(seed)
        image, video = (tokenizer.convert_tokens_to_ids(t) for t in ("<image>", "<video>"))
        model = build(
            Placeholders(image, video), tower=tower, language=language, vocabulary=len(tokenizer), **options
        )
        with torch.no_grad():  # wide, so that pictures visibly change what is said
            for p in model.parameters():
                if p.ndim > 1:
                    p.normal_(std=0.1)
        return model.eval()

    return make


def sequence(model: Llava, *parts: int | torch.Tensor) -> torch.Tensor:
    """Tokens: so many of text, or what a picture takes."""
    found = []
    for part in parts:
        if isinstance(part, int):
            found.append(torch.randint(0, 200, (part,)))
        else:
            frames = len(part) if part.ndim == 4 else 1
            id = model.placeholders.video if part.ndim == 4 else model.placeholders.image
            found.append(torch.full((model.tokens(frames, *part.shape[-2:]),), id))
    return torch.cat(found)


def picture(frames: int | None = None, side: int = SIDE) -> torch.Tensor:
    return torch.randn(*(() if frames is None else (frames,)), 3, side, side)


@pytest.mark.parametrize("tower", [SIGLIP, CLIP, VIVIT], ids=["siglip", "clip", "vivit"])
@pytest.mark.parametrize("language", [QWEN2, LLAMA, GPT2], ids=["qwen2", "llama", "gpt2"])
@torch.no_grad()
def test_visual_tokens_stand_where_their_placeholders_are_in_order(made, tower, language):
    model = made(tower, language)
    first, clip = picture(), picture(4)
    tokens = sequence(model, 3, first, 2, clip, 4)
    x = model.embed(tokens[None], [first, clip])[0]
    seen = [model.see([v])[0] for v in (first, clip)]
    a, b = len(seen[0]), len(seen[1])
    torch.testing.assert_close(x[3 : 3 + a], seen[0])
    torch.testing.assert_close(x[5 + a : 5 + a + b], seen[1])
    words = torch.cat([tokens[:3], tokens[3 + a : 5 + a], tokens[-4:]])
    there = torch.cat([x[:3], x[3 + a : 5 + a], x[-4:]])
    assert torch.equal(there, model.language.get_input_embeddings()(words))


@torch.no_grad()
def test_a_tower_for_video_shares_the_projector_with_the_one_for_images(made):
    """Video-LLaVA: what they see is united before the language model."""
    model = made(SIGLIP, video_tower=VIVIT | {"dim": 32})
    one, clip = picture(), picture(4)
    got = model.see([clip, one])
    torch.testing.assert_close(got[0], model.projector(model.video_tower(clip[None]))[0])
    torch.testing.assert_close(got[1], model.projector(model.tower(one[None, None]))[0])
    tokens = sequence(model, 2, clip, 3, one, 2)
    assert model(tokens, [clip, one]).shape == (len(tokens), 405)
    with pytest.raises(ValueError, match="one projector serves both"):
        made(SIGLIP, video_tower=VIVIT)


def test_as_many_placeholders_as_visual_tokens_are_asked_for(made):
    model = made()
    with pytest.raises(ValueError, match="16 placeholders, but 32 visual tokens"):
        model(sequence(model, 2, picture()), [picture(2)])


@pytest.mark.parametrize(
    ("language", "attention"),
    [
        (QWEN2, "sdpa"),
        (QWEN2, "eager"),
        (QWEN2, "flex_attention"),
        (LLAMA, "sdpa"),
        (QWEN2, DOCUMENTS),
        (LLAMA, DOCUMENTS),
    ],
)
@torch.no_grad()
def test_packed_documents_give_what_each_gives_alone(made, language, attention):
    model = made(language=language, attention=attention)
    one, two = picture(), picture(2)
    a, b = sequence(model, 3, one, 5), sequence(model, 2, two, 4)
    alone = [model(a, [one]), model(b, [two])]
    padding = torch.zeros(6, dtype=torch.long)
    packed = model(torch.cat([a, b, padding]), [one, two], [len(a), len(b)])
    torch.testing.assert_close(packed[: len(a)], alone[0], atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(packed[len(a) : -6], alone[1], atol=2e-6, rtol=2e-6)
    assert packed.isfinite().all()


@pytest.mark.parametrize("lengths", [[[20, 9, 3], [5, 25]], [[32], [20]], [[7], []]])
def test_document_by_document_is_what_a_mask_gives_gradients_too(made, lengths):
    """Packed rows, whole ones, and such with padding behind a single document."""
    tokens = torch.randint(3, 200, (2, 32))
    there = torch.zeros(2, 32, dtype=torch.bool)
    for row, own in zip(there, lengths, strict=True):
        row[: sum(own)] = True
    found = []
    for attention in ("sdpa", DOCUMENTS):
        torch.manual_seed(1)
        model = made(attention=attention)
        logits = model(tokens, lengths=lengths)[there]
        logits.square().mean().backward()
        found.append([logits, *(p.grad for p in model.language.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_a_language_model_that_keeps_no_documents_apart_is_named():
    module = torch.nn.Linear(1, 1)
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="Linear does not know of packed documents"):
        attend(module, x, x, x, stand_in(x.device))


@torch.no_grad()
def test_document_by_document_generates_as_ever(made):
    tokens = torch.randint(3, 200, (2, 6))
    there = torch.ones(2, 6, dtype=torch.bool)
    there[0, :3] = False
    said = []
    for attention in ("sdpa", DOCUMENTS):
        torch.manual_seed(1)
        said.append(
            made(attention=attention).generate(tokens, there=there, max_new_tokens=5, do_sample=False)
        )
    assert torch.equal(*said)


@torch.no_grad()
def test_editing_a_document_leaves_the_others_as_they_are_to_the_bit(made):
    """In both directions, the words and the picture."""
    model = made()
    pictures = [picture(), picture(), picture()]
    parts = [sequence(model, 3, p, 4) for p in pictures]
    tokens, lengths = torch.cat(parts), [len(p) for p in parts]
    before = model(tokens, pictures, lengths)
    for edited in range(3):
        start = sum(lengths[:edited])
        words = tokens.clone()
        words[start] = (words[start] + 7) % 200
        others = [picture() if i == edited else p for i, p in enumerate(pictures)]
        after = model(words, others, lengths)
        same = torch.ones(len(tokens), dtype=torch.bool)
        same[start : start + lengths[edited]] = False
        assert torch.equal(after[same], before[same])
        assert not torch.allclose(after[~same], before[~same], atol=1e-3)


@torch.no_grad()
def test_rows_with_lengths_of_their_own_and_chosen_places(made):
    model = made()
    one, two = picture(), picture()
    a, b = sequence(model, 3, one, 5), sequence(model, 3, two, 5)
    whole = model(torch.stack([a, b]), [one, two], [[len(a)], [4, len(b) - 4]])
    torch.testing.assert_close(whole[0], model(a, [one]))
    torch.testing.assert_close(whole[1], model(b, [two], [4, len(b) - 4]))
    keep = torch.tensor([1, len(a) - 2])
    kept = model(torch.stack([a, b]), [one, two], [[len(a)], [4, len(b) - 4]], keep=keep)
    torch.testing.assert_close(kept, whole[:, keep])


@pytest.mark.parametrize("language", [QWEN2, QWEN2 | {"model_type": "granite", "logits_scaling": 2.0}])
def test_the_loss_of_packed_answers_is_that_of_its_logits_gradients_too(made, language):
    model = made(language=language)
    pictures = [picture(), picture()]
    parts = [sequence(model, 3, p, 4) for p in pictures]
    tokens, lengths = torch.cat(parts), [len(p) for p in parts]
    supervised = torch.zeros(len(tokens), dtype=torch.bool)
    supervised[lengths[0] - 4 : lengths[0] - 1] = supervised[-3:-1] = True
    targets = loss.shifted(tokens, lengths)
    weights = loss.token_weights(lengths, supervised)
    model(tokens, pictures, lengths, goal=loss.Goal.of(targets, weights)).backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = [
        F.cross_entropy(model(p, [v])[-4:-1], p[-3:]) for p, v in zip(parts[:1], pictures[:1], strict=True)
    ]
    alone.append(F.cross_entropy(model(parts[1], pictures[1:])[-3:-1], targets[-3:-1]))
    sum(alone).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, atol=2e-6, rtol=2e-5)


def test_a_language_model_that_would_let_packed_documents_leak_is_refused(made):
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model = made(language=QWEN2 | sliding)
    with pytest.raises(ValueError, match="packing off"):
        model(sequence(model, 8), lengths=[4, 4])


@torch.no_grad()
def test_cached_generation_equals_the_likeliest_token_again_and_again(made):
    model = made()
    clip = picture(3)
    tokens = sequence(model, 3, clip, 4)
    said = model.generate(
        tokens[None], [clip], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
    )[0]
    for token in said:
        assert token == model(tokens, [clip])[-1].argmax()
        tokens = torch.cat([tokens, token[None]])


def test_every_trained_weight_gets_a_gradient_with_and_without_pictures(made):
    for eye in ({"tower": SIGLIP}, {"tower": CLIP}, {"tower": VIVIT}, {"video_tower": VIVIT | {"dim": 32}}):
        model = made(**eye).train()
        every = [picture(), picture(2)]
        for visuals in (every, every[:1], every[1:], []):
            parts = (3, *visuals, 3)
            model.zero_grad(set_to_none=True)
            model(sequence(model, *parts), visuals).square().mean().backward()
            assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@torch.no_grad()
def test_the_tower_takes_the_named_hidden_state_of_the_whole_model(tmp_path):
    """CLIP's vision part out of a two-tower checkpoint, layer −2, without class token."""
    config = CLIPConfig(vision_config=CLIP, text_config=SMALL | {"vocab_size": 50})
    whole = CLIPModel(config).eval()
    whole.save_pretrained(tmp_path)
    frames = picture(2)
    states = whole.vision_model(pixel_values=frames, output_hidden_states=True).hidden_states
    ours = tower(str(tmp_path))
    assert ours.width == 32
    assert torch.equal(ours(frames[None])[0].flatten(1, 2), states[-2][:, 1:])
    assert not torch.equal(ours(frames[None])[0].flatten(1, 2), states[-1][:, 1:])


@torch.no_grad()
def test_open_clip_towers_give_the_output_of_the_block_before_the_last():
    from open_clip.transformer import VisionTransformer

    visual = VisionTransformer(SIDE, 8, 32, 3, 2, 2.0, output_dim=16).eval()
    visual.image_mean = visual.image_std = None
    caught = []
    visual.transformer.resblocks[-2].register_forward_hook(lambda m, i, o: caught.append(o))
    frames = picture(2)
    ours = OpenClipTower(visual)
    caught.clear()
    got = ours(frames[None])[0].flatten(1, 2)
    visual.transformer.batch_first or caught.append(caught.pop().transpose(0, 1))
    assert got.shape == (2, 16, 32)
    torch.testing.assert_close(got, caught[0][:, 1:])


# ---------------------------------------------------------------- in the layout of transformers


def saved(model: Llava, tokenizer, folder):
    exported.save(model, folder, tokenizer)
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.mark.parametrize("tower", [SIGLIP, CLIP], ids=["siglip", "clip"])
@pytest.mark.parametrize("language", [QWEN2 | {"tie_word_embeddings": True}, LLAMA], ids=["qwen2", "llama"])
@torch.no_grad()
def test_llava_saved_gives_the_same_logits_in_transformers(made, tokenizer, tmp_path, tower, language):
    model = made(tower, language)
    theirs = saved(model, tokenizer, tmp_path)
    assert type(theirs).__name__ == "LlavaForConditionalGeneration"
    one, clip = picture(), picture(3)
    tokens = sequence(model, 3, one, 2, clip, 4)
    ours = model(tokens, [one, clip])
    as_images = tokens.where(tokens != model.placeholders.video, model.placeholders.image)
    got = theirs(input_ids=as_images[None], pixel_values=torch.cat([one[None], clip])).logits[0]
    torch.testing.assert_close(got, ours, atol=1e-5, rtol=1e-5)
    again = exported.load(str(tmp_path)).eval()
    torch.testing.assert_close(again(as_images, [one, clip]), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tower", [SIGLIP, CLIP], ids=["siglip", "clip"])
@torch.no_grad()
def test_onevision_saved_gives_the_same_logits_in_transformers(made, tokenizer, tmp_path, tower):
    model = made(tower, projector=ONEVISION, layer=-1)
    theirs = saved(model, tokenizer, tmp_path)
    assert type(theirs).__name__ == "LlavaOnevisionForConditionalGeneration"
    clip, one, two = picture(3), picture(), picture()
    tokens = sequence(model, 3, one, 1, two, 2, clip, 4)
    ours = model(tokens, [one, two, clip])
    got = theirs(
        input_ids=tokens[None],
        pixel_values_videos=clip[None],
        pixel_values=torch.stack([one, two])[:, None],
        image_sizes=torch.tensor([[SIDE, SIDE]] * 2),
        batch_num_images=torch.tensor([2]),
    ).logits[0]
    torch.testing.assert_close(got, ours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        exported.load(str(tmp_path)).eval()(tokens, [one, two, clip]), ours, atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_a_side_that_is_no_multiple_of_a_patch_is_seen_as_transformers_sees_it(made, tokenizer, tmp_path):
    """SigLIP so400m's 384 pixels have 27 patches of 14, here 30 have 3 of 8."""
    model = made(SIGLIP | {"image_size": 30}, projector=ONEVISION, layer=-1)
    theirs, clip = saved(model, tokenizer, tmp_path), picture(2, side=30)
    assert model.tokens(2, 30, 30) == 2 * 2 * 2 + 1
    tokens = sequence(model, 2, clip, 3)
    got = theirs(input_ids=tokens[None], pixel_values_videos=clip[None]).logits[0]
    torch.testing.assert_close(got, model(tokens, [clip]), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="do not divide into patches"):
        model.tokens(2, 36, 36)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "vit", "beit"])
@torch.no_grad()
def test_other_vision_models_are_towers_too_on_other_sides_as_well(kind):
    options = {n: x for n, x in SIGLIP.items() if n != "intermediate_size"} if "dino" in kind else SIGLIP
    made = tower(options | {"model_type": kind}).eval()
    assert made(picture(2)[None]).shape == (1, 2, 4, 4, 32)
    assert made(torch.randn(1, 1, 3, SIDE, 2 * SIDE)).shape == (1, 1, 4, 8, 32)
    assert made.before == (5 if kind.endswith("registers") else 1)


@pytest.mark.parametrize("kind", ["siglip2_vision_model", "videomae", "pixtral"])
def test_what_sees_no_plain_pictures_is_no_tower(kind):
    options = {n: x for n, x in SIGLIP.items() if n != "image_size"} if kind.startswith("siglip2") else SIGLIP
    with pytest.raises(ValueError, match="takes no plain pictures"):
        tower(options | {"model_type": kind})


@torch.no_grad()
def test_checkpoints_of_others_load_and_give_their_logits(tmp_path):
    """As published ones: LLaVA-OneVision, written by transformers."""
    theirs = AutoModelForImageTextToText.from_pretrained(llava_onevision(tmp_path / "onevision")).eval()
    ours = exported.load(str(tmp_path / "onevision")).eval()
    clip = picture(3, side=28)
    tokens = sequence(ours, 3, clip, 4)
    got, expected = (
        ours(tokens, [clip]),
        theirs(input_ids=tokens[None], pixel_values_videos=clip[None]).logits[0],
    )
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)
    with pytest.raises(MissingModel, match="is a qwen2_5_vl"):
        exported.load(str(qwen2_5_vl(tmp_path / "qwen")))


@pytest.mark.parametrize(("options", "input"), [({"projector": ONEVISION}, "video"), ({}, "images")])
def test_trained_in_two_stages_saved_and_served_by_the_mills_captioner(
    made, tokenizer, tmp_path, options, input
):
    """The captioner's greedy answer is ours, of the same pixels and prompt."""
    model = made(**options)
    clip = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    tokens = sequence(model, 3, clip, 6)
    for parts in (["projector"], ["projector", "language"]):  # stage 1, stage 2
        model.requires_grad_(False)
        trained = [p.requires_grad_() for part in parts for p in getattr(model, part).parameters()]
        optimizer = torch.optim.AdamW(trained, 1e-3)
        losses = []
        for _ in range(4):
            error = F.cross_entropy(model(tokens, [clip])[-6:-1], tokens[-5:])
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            losses.append(error.item())
        assert losses[-1] < losses[0]
    saved(model, tokenizer, tmp_path)

    vlm = VLM(Wanted(str(tmp_path)), max_new_tokens=5)
    assert vlm.input == input
    frames = [np.full((SIDE, SIDE, 3), 60 * i + 20, np.uint8) for i in range(3)]
    look = Look(frames, [0.0, 0.5, 1.0], 1.5, "what happens?")
    answer = vlm([look])[0]
    given = vlm.inputs([look])
    ids = given["input_ids"][0]
    pixels = (torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    visuals = [pixels] if input == "video" else list(pixels)
    said = model.generate(ids[None], visuals, max_new_tokens=5, do_sample=False)[0]
    assert " ".join(tokenizer.decode(said, skip_special_tokens=True).split()) == answer.text
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer.convert_tokens_to_ids("<video>") == model.placeholders.video


@pytest.mark.parametrize(
    "options",
    [
        {"projector": {"map": "linear"}},
        {"projector": {"map": "qformer", "heads": 2}},
        {"projector": {"pool": 2, "newline": "row"}},
        {"tower": VIVIT},
        {"language": QWEN2 | {"model_type": "granite", "logits_scaling": 2.0}},
    ],
    ids=["linear", "qformer", "rows", "vivit", "scaled"],
)
def test_what_no_class_of_transformers_computes_is_not_exported(made, tokenizer, tmp_path, options):
    with pytest.raises(ValueError, match="export:"):
        exported.save(made(**options), tmp_path, tokenizer)
    assert not any(tmp_path.iterdir())


@torch.no_grad()
def test_made_on_the_meta_device_a_checkpoint_has_all_it_needs(tokenizer, made, tmp_path):
    """Of pretrained parts no weights are read then."""
    whole = made()
    whole.tower.model.save_pretrained(tmp_path / "tower")
    whole.language.save_pretrained(tmp_path / "language")
    for file in tmp_path.glob("*/*.safetensors"):
        file.unlink()
    parts = {"tower": str(tmp_path / "tower"), "language": str(tmp_path / "language")}
    with torch.device("meta"):
        empty = build(whole.placeholders, **parts, vocabulary=len(tokenizer)).eval()
    assert not dict(empty.named_buffers()).keys() - empty.state_dict().keys()
    assert all(x.is_meta for x in empty.state_dict().values())
    empty.load_state_dict(whole.state_dict(), assign=True)
    one = picture()
    tokens = sequence(whole, 3, one, 4)
    assert torch.equal(empty(tokens, [one]), whole(tokens, [one]))
    with pytest.raises(MissingModel, match="no "):
        build(whole.placeholders, **parts)


def test_where_the_parts_come_from_is_told_without_loading_them(made, tmp_path):
    made().language.save_pretrained(tmp_path)
    assert check(SIGLIP, str(tmp_path)) == [
        "tower: a siglip_vision_model begun from nothing",
        f"language: {tmp_path} a folder",
    ]
    with pytest.raises(MissingModel, match="no such folder"):
        check("./nowhere", str(tmp_path))


def test_presets_name_what_build_takes(made):
    assert PRESETS["llava-1.5-7B"].get("layer", -2) == -2
    tiny = build(Placeholders(300, 301), vocabulary=302, **PRESETS["tiny"])
    assert tiny.tokens(1, 64, 64) == 16
    assert len(list(tiny.blocks())) == 4


def test_published_parts_load_in_silence_and_one_that_lacks_weights_is_refused(tmp_path, capfd):
    """Of a model of pictures and texts the text's weights go unread; those that a part reads itself are all there."""
    from safetensors.torch import load_file, save_file

    from tests.fixtures.shrunken import speaking

    at = speaking(tmp_path)
    capfd.readouterr()
    build(Placeholders(8, 9), tower=at["siglip"], language=at["qwen2"], vocabulary=1000)
    assert capfd.readouterr().err == ""
    for part, name in (("siglip", "vision_model.encoder"), ("qwen2", "model.layers.0")):
        file = tmp_path / part / "model.safetensors"
        weights = load_file(file)
        lost = next(key for key in weights if key.startswith(name))
        save_file({k: v for k, v in weights.items() if k != lost}, file, {"format": "pt"})
        with pytest.raises(MissingModel, match=f"{part}' lacks 1 weights of a .*first: name another"):
            build(Placeholders(8, 9), tower=at["siglip"], language=at["qwen2"])
        save_file(weights, file, {"format": "pt"})
