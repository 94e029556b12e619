"""Text encoders: what `transformers` itself gives for one caption alone, frozen, with rows of 'no text'."""

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from models.encoders.text import PretrainedText, WordText, hashes, words
from models.hub import MissingModel
from tests.fixtures.tiny_vlm import _bpe

TEXTS = ["a red square moves", "", "the camera holds still over a blue background while a red square moves"]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


def _save(folder, kind):
    """A tiny checkpoint of the real classes; returns the folder."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_bpe(["<pad>", "</s>"]),
        eos_token="</s>",
        pad_token=None if kind == "qwen3" else "<pad>",
        padding_side="left",
    )
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    clip = SMALL | ids | {"max_position_embeddings": 12}
    t5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_heads": 2, "decoder_start_token_id": 0}
    match kind:
        case "t5":
            model = T5ForConditionalGeneration(T5Config(**t5, **ids, pad_token_id=tokenizer.pad_token_id))
        case "clip_text":
            model = CLIPTextModel(CLIPTextConfig(**clip))
        case "clip":
            vision = SMALL | {"image_size": 28, "patch_size": 14}
            model = CLIPModel(CLIPConfig(text_config=clip, vision_config=vision))
        case "qwen3":
            model = Qwen3Model(Qwen3Config(**SMALL, **ids, num_key_value_heads=2, head_dim=16))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    return {kind: _save(root / kind, kind) for kind in ("t5", "clip", "clip_text", "qwen3")}


CLASSES = {"t5": T5EncoderModel, "clip": CLIPTextModel, "clip_text": CLIPTextModel, "qwen3": Qwen3Model}


@pytest.mark.parametrize("layer", [None, -2])
@pytest.mark.parametrize("kind", CLASSES)
def test_features_are_those_of_the_library_for_the_caption_alone_without_padding(folders, kind, layer):
    encoder = PretrainedText(folders[kind], length=40, layer=layer)
    features, mask = encoder(TEXTS)
    assert features.shape == (3, encoder.length, encoder.width)
    assert encoder.width == 32
    assert encoder.length == (12 if kind.startswith("clip") else 40)
    reference = CLASSES[kind].from_pretrained(folders[kind]).eval()
    for i in (0, 2):
        n = int(mask[i].sum())
        ids = torch.tensor([encoder.tokenizer(TEXTS[i])["input_ids"][:n]])
        assert mask[i, :n].all()
        with torch.no_grad():
            out = reference(input_ids=ids, output_hidden_states=True)
        expected = out.last_hidden_state if layer is None else out.hidden_states[layer]
        torch.testing.assert_close(features[i, :n], expected[0], atol=2e-5, rtol=1e-4)
    assert mask[2].sum() > mask[0].sum()


@pytest.mark.parametrize("kind", ["t5", "words"])
def test_no_caption_is_a_row_without_tokens(folders, kind):
    encoder = WordText(32, 16, 1) if kind == "words" else PretrainedText(folders[kind])
    _, mask = encoder(["", "  ", "x"])
    assert mask.dtype == torch.bool
    assert not mask[:2].any()
    assert mask[2].any()


def test_a_frozen_encoder_takes_no_gradient_and_stays_in_eval_mode(folders):
    encoder = PretrainedText(folders["t5"])
    torch.nn.ModuleList([encoder]).train()
    features, _ = encoder(TEXTS)
    assert not features.requires_grad
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not any(m.training for m in encoder.modules())


@pytest.mark.parametrize("depth", [0, 2])
def test_words_depend_on_no_other_caption_and_on_their_order(depth):
    torch.manual_seed(0)
    encoder = WordText(8, 16, depth).eval()
    both, mask = encoder(["red circle", "a much longer caption of ten words, signs and all"])
    alone, _ = encoder(["red circle"])
    assert both.shape == (2, 8, 16)
    assert mask.sum(1).tolist() == [2, 8]  # cut to the length
    torch.testing.assert_close(both[:1], alone)
    turned, _ = encoder(["circle red"])
    assert not torch.allclose(alone[0, :2].sum(0), turned[0, :2].sum(0))  # no bag of words


def test_words_are_small_and_signs_and_chinese_letters_stand_alone():
    assert words("Two RED circles, moving!") == ["two", "red", "circles", ",", "moving", "!"]
    assert words("红色 круг été") == ["红", "色", "круг", "été"]
    assert words(" \n") == []


def test_words_that_share_a_row_of_the_table_differ_by_their_other_row():
    """1,000 words in 256 rows: every row is shared, yet hardly a pair of words is one."""
    places = {tuple(sorted(h % 256 for h in hashes(f"word{i}"))) for i in range(1000)}
    assert len(places) > 950  # of 32,896 pairs, 1,000 drawn at random meet about 15 times


def test_padding_is_not_looked_at():
    torch.manual_seed(0)
    encoder = WordText(16, 16, 2).eval()
    features, mask = encoder(["a b c"])
    with torch.no_grad():
        encoder.position[3:] += 100
    assert torch.equal(encoder(["a b c"])[0][mask], features[mask])


def test_every_parameter_of_the_word_encoder_is_trained():
    encoder = WordText(16, 16, 2)
    encoder(["a b c"])[0].square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_a_missing_model_is_one_sentence(tmp_path, folders):
    with pytest.raises(MissingModel, match="no such folder"):
        PretrainedText("./nothing")
    with pytest.raises(MissingModel, match=r"config\.json"):
        PretrainedText(str(tmp_path))
    with pytest.raises(ValueError, match="layer 9"):
        PretrainedText(folders["t5"], layer=9)
