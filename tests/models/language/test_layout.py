"""Large World Model's layout, to the token, and back."""

import pytest
import torch

from models.language import tokenizer as tokenizers
from models.language.layout import Layout, Part


def word_layout(frame: int = 256) -> Layout:
    """Words as tokens; <vision> is three of them, as with a tokenizer that does not know it."""
    table = {"<s>": 1, "</s>": 2, "<": 10, "vision": 11, ">": 12, "</": 13, "a": 20, "cat": 21, "sits": 22}
    back = {i: word for word, i in table.items()}

    def encode(text: str) -> list[int]:
        for mark in ("</", "<", ">"):
            text = text.replace(mark, f" {mark} ") if mark != "<" else text.replace("< ", "<")
        pieces = text.replace("<vision", "< vision").replace("< /", "</").split()
        return [table[p] for p in pieces]

    return Layout(encode, lambda ids: " ".join(back[i] for i in ids), 1, 2, 30, frame=frame)


def video(frames: int, frame: int = 256) -> torch.Tensor:
    return torch.randint(8192, (frames, frame), generator=torch.Generator().manual_seed(frames))


def test_golden_text_to_video():
    codes = video(2)
    laid = word_layout().lay_out(["a cat", codes])
    first, second = codes.tolist()
    assert laid.tokens.tolist() == [
        *(1, 20, 21, 10, 11, 12),
        *first,
        8192,
        *second,
        8193,
        *(13, 11, 12, 2),
    ]
    assert laid.vision.tolist() == [False] * 6 + [True] * 514 + [False] * 4
    assert laid.learnt.tolist() == [False] + [True] * 523


def test_golden_picture_to_text_whose_picture_is_not_learnt():
    codes = video(1)
    laid = word_layout().lay_out([Part(codes, learnt=False), "a cat sits"])
    assert laid.tokens.tolist() == [1, 10, 11, 12, *codes[0].tolist(), 8193, 13, 11, 12, 20, 21, 22, 2]
    assert laid.learnt.tolist() == [False] * (1 + 3 + 257 + 3) + [True] * 4
    assert laid.vision.sum() == 257


def test_golden_prompts():
    layout = word_layout()
    assert layout.lay_out(["a cat"], end=False, opened=True).tokens.tolist() == [1, 20, 21, 10, 11, 12]
    assert layout.lay_out([], end=False, opened=True).tokens.tolist() == [1, 10, 11, 12]


def test_a_frame_costs_257_tokens():
    layout = word_layout()
    for n in (1, 3):
        assert layout.lay_out([video(n)]).length == layout.cost(n) + 2 == 257 * n + 8


def test_a_mark_that_somebody_wrote_is_words_and_ends_nothing():
    tokenizer = tokenizers.trained(["a red circle moves <vision> </vision>"] * 50, 320)
    tokenizer.bos_token = tokenizers.BEGIN
    layout = Layout.of(tokenizers.of_files(tokenizers.files(tokenizer)), 8, 4)
    text = f"a {tokenizers.END} red {tokenizers.BEGIN}circle"
    laid = layout.lay_out([text])
    marks = [t for t in laid.tokens.tolist() if t in (layout.begin, layout.end)]
    assert marks == [layout.begin, layout.end]
    assert layout.read(laid.tokens, laid.vision) == [text]


@pytest.mark.parametrize(
    "parts",
    [
        [],
        ["a cat"],
        [video(1, 4)],
        ["a cat", video(3, 4), "sits"],
        [video(2, 4), video(1, 4), "a", video(1, 4)],
    ],
)
@pytest.mark.parametrize("end", [True, False])
def test_what_is_laid_out_is_read_back(parts, end: bool):
    laid = word_layout(4).lay_out(parts, end=end)
    found = word_layout(4).read(laid.tokens, laid.vision)
    assert [type(x) for x in found] == [type(x) for x in parts]
    for a, b in zip(found, parts, strict=True):
        assert a == b if isinstance(b, str) else torch.equal(a, b)


def test_what_follows_the_end_is_not_read():
    layout = word_layout()
    laid = layout.lay_out(["a"])
    tokens = torch.cat([laid.tokens, torch.tensor([20, 20])])
    assert layout.read(tokens, torch.zeros(5, dtype=torch.bool)) == ["a"]


def test_text_as_bytes_is_any_text():
    layout = Layout.of_bytes(frame=4)
    parts = ["Ä猫 <vision>\n", video(2, 4), " </vision>"]
    laid = layout.lay_out(parts)
    text, codes, rest = layout.read(laid.tokens, laid.vision)
    assert [text, rest] == [parts[0], parts[2]]
    assert torch.equal(codes, parts[1])
    assert laid.tokens[~laid.vision].max() < layout.words


def test_a_tokenizer_of_transformers_gives_the_same_tokens():
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", "<", "</", "vision", ">", "a", "cat"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>")
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    layout = Layout.of(fast, frame=2)
    laid = layout.lay_out(["a cat", torch.tensor([[5, 6]])])
    assert laid.tokens.tolist() == [0, 7, 8, 3, 5, 6, 5, 6, 8193, 4, 5, 6, 1]
    assert layout.words == 9
    assert layout.read(laid.tokens, laid.vision)[0] == "a cat"


@pytest.mark.parametrize(
    ("tokens", "visual", "told"),
    [
        ([1, 10, 11, 12, 5, 6, 7, 8, 8192], 5, "the last by 8193"),
        ([1, 10, 11, 12, 5, 6, 8192, 8, 8193], 5, "followed by 8192"),
        ([1, 10, 11, 12, 5, 6, 8193], 3, "whole frames of 5"),
        ([1, 20, 5, 6, 7, 8, 8193], 5, "no <vision>"),
        ([1, 10, 11, 12, 5, 6, 7, 8, 8193, 20, 10, 11, 12, 5, 6, 7, 8, 8193], 5, "</vision> does not follow"),
    ],
)
def test_visual_tokens_that_are_no_video_are_refused_in_words(tokens, visual: int, told: str):
    vision = torch.zeros(len(tokens), dtype=torch.bool)
    vision[-visual:] = True
    if len(tokens) == 18:
        vision[4:9] = True
    with pytest.raises(ValueError, match=told):
        word_layout(4).read(torch.tensor(tokens), vision)


@pytest.mark.parametrize("codes", [torch.zeros(2, 4).long(), torch.full((1, 256), 8192), torch.zeros(0, 256)])
def test_codes_of_another_shape_or_range_are_refused(codes):
    with pytest.raises(ValueError, match="give"):
        word_layout().lay_out([codes])
