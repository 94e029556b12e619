"""M-RoPE: positions and rotation against transformers' Qwen2-VL and Qwen2.5-VL, and the rule written out."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from models.language.llava import Placeholders, build
from models.language.positions import Grid, MRotary, multimodal, packed, turn_by_three

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = SIZES | {
    "num_key_value_heads": 1,
    "vocab_size": 50,
    "bos_token_id": None,
    "eos_token_id": None,
    "rms_norm_eps": 1e-6,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}


def wide(model):
    """Weights with which positions change the numbers visibly."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.2)
    return model.eval()


def qwen(kind: str):
    torch.manual_seed(0)
    text = TEXT | {"rope_parameters": MROPE, "pad_token_id": None}
    if kind == "2":
        vision = {"embed_dim": 8, "hidden_size": 64, "depth": 1, "num_heads": 1, "spatial_merge_size": 2}
        config = Qwen2VLConfig(text_config=text, vision_config=vision)
        return wide(Qwen2VLForConditionalGeneration(config))
    vision = {"hidden_size": 8, "out_hidden_size": 64, "depth": 1, "num_heads": 1, "tokens_per_second": 2}
    return wide(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)))


@pytest.mark.parametrize("kind", ["2", "2.5"])
def test_positions_are_those_of_transformers(kind):
    """Text, an image, text, a video of 3 times, an image right after some text."""
    model = qwen(kind)
    seconds = 0.5  # of a step of time: one place at 2 places a second
    grids = [Grid(3, 1, 4, 6), Grid(30, 3, 4, 5), Grid(92, 1, 2, 2)]
    kinds = torch.zeros(1, 100, dtype=torch.int32)
    for grid, modality in zip(grids, (1, 2, 1), strict=True):
        kinds[0, grid.start : grid.start + grid.tokens] = modality
    thw = [[g.t, 2 * g.h, 2 * g.w] for g in grids]  # transformers counts patches before they are merged 2×2
    more = {} if kind == "2" else {"second_per_grid_ts": torch.tensor([seconds])}
    theirs, _ = model.model.get_rope_index(
        torch.zeros(1, 100, dtype=torch.long),
        kinds,
        torch.tensor([thw[0], thw[2]]),
        torch.tensor([thw[1]]),
        **more,
    )
    assert torch.equal(multimodal(100, grids), theirs[:, 0])


def test_what_follows_a_clip_begins_after_its_greatest_number():
    """Of 9 times, 2 rows and 3 columns, two places a time."""
    got = multimodal(2 + 54 + 2, [Grid(2, 9, 2, 3, step=2.0)])
    expected = [[0] * 3, [1] * 3]
    expected += [[2 + 2 * t, 2 + h, 2 + w] for t in range(9) for h in range(2) for w in range(3)]
    expected += [[19] * 3, [20] * 3]  # 2 + 2 · 8 + 1
    assert got.T.tolist() == expected


def test_text_alone_counts_and_packed_documents_begin_anew():
    assert torch.equal(multimodal(7), torch.arange(7).expand(3, -1))
    grids = [Grid(1, 1, 2, 2), Grid(9, 2, 1, 2)]
    got = packed([7, 8], grids, 18)
    assert torch.equal(got[:, :7], multimodal(7, grids[:1]))
    assert torch.equal(got[:, 7:15], multimodal(8, [Grid(2, 2, 1, 2)]))
    assert torch.equal(got[:, 15:], multimodal(3))


def test_pictures_that_overlap_or_go_beyond_the_end_are_refused():
    with pytest.raises(ValueError, match="overlaps"):
        multimodal(20, [Grid(2, 1, 3, 3), Grid(8, 1, 1, 1)])
    with pytest.raises(ValueError, match="after the 10 tokens"):
        multimodal(10, [Grid(2, 1, 3, 3)])


@torch.no_grad()
def test_a_plain_language_model_then_computes_what_qwen2_vl_does_with_the_same_weights():
    theirs = qwen("2").double()
    ours = Qwen2ForCausalLM(
        Qwen2Config(**TEXT, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    ).eval()
    ours.double().model.load_state_dict(theirs.model.language_model.state_dict())
    x, text = torch.randn(1, 40, 64).double(), torch.arange(40)[None]

    def states(model, places):
        return model(inputs_embeds=x, attention_mask=torch.ones(1, 40), position_ids=places).last_hidden_state

    before = states(ours.model, text)
    turn_by_three(ours, [4, 6, 6])
    assert torch.equal(states(ours.model, text), before)
    same = states(ours.model, text.expand(3, 1, -1))
    torch.testing.assert_close(same, before)

    places = multimodal(40, [Grid(4, 3, 2, 4)])[:, None]
    expected = states(theirs.model.language_model, places)
    got = states(ours.model, places)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(got, before, atol=1e-3)


@torch.no_grad()
def test_packed_documents_with_three_positions_give_what_each_gives_alone():
    tower = SIZES | {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8}
    model = wide(build(Placeholders(48, 49), tower=tower, language={"model_type": "qwen2"} | TEXT))
    turn_by_three(model.language)
    clip = torch.randn(3, 3, 16, 16)
    one, two = torch.randint(0, 48, (9,)), torch.randint(0, 48, (20,))
    two[4:16] = 49
    alone = model(one), model(two, [clip], positions=multimodal(20, [Grid(4, 3, 2, 2)]))
    places = packed([9, 20], [Grid(13, 3, 2, 2)], 29)
    together = model(torch.cat([one, two]), [clip], [9, 20], places)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    plain = model(torch.cat([one, two]), [clip], [9, 20])
    assert not torch.allclose(plain, together, atol=1e-3)


def test_sections_must_add_up_and_rotary_positions_must_be_there():
    model = Qwen2ForCausalLM(Qwen2Config(**TEXT))
    with pytest.raises(ValueError, match="do not add up to 16"):
        turn_by_three(model, [4, 4, 4])
    turn_by_three(model)
    assert isinstance(model.model.rotary_emb, MRotary)
    assert model.model.rotary_emb.sections == (4, 6, 6)
