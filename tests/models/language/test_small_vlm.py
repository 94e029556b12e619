"""The small VLM: causal, conditioned on every frame, trained on the caption's tokens only."""

import math

import torch

from models.language import text
from models.language.small_vlm import SmallVLM, caption_loss


def model() -> SmallVLM:
    torch.manual_seed(0)
    return SmallVLM(frames=2, size=32, length=32, width=48, depth=2, heads=4).eval()


def test_text_tokens_survive_the_round_trip():
    said = ["", "hello", "naïve 猫 🎬", "x" * 100]
    assert text.decode(text.encode(said, 64)[:, 1:]) == [s[:62] for s in said]


def test_a_token_sees_no_later_token():
    m, video = model(), torch.randn(1, 2, 3, 32, 32)
    a, b = text.encode(["abcdef"], 16), text.encode(["abcxyz"], 16)
    la, lb = m(video, a), m(video, b)
    torch.testing.assert_close(la[:, :4], lb[:, :4])
    assert (la[:, 4:] - lb[:, 4:]).abs().max() > 1e-3


def test_every_frame_reaches_every_text_position():
    m, video, words = model(), torch.randn(1, 2, 3, 32, 32), text.encode(["abc"], 8)
    base = m(video, words)
    for frame in range(2):
        other = video.clone()
        other[:, frame] += 1
        assert ((m(other, words) - base).abs().amax((0, 2)) > 1e-6).all()


def test_the_loss_ignores_padding_and_is_the_uniform_one_for_equal_logits():
    class Flat(torch.nn.Module):
        def forward(self, video, tokens):
            return torch.zeros(*tokens.shape, text.VOCABULARY)

    short, long = (caption_loss(Flat(), torch.zeros(1), text.encode(["abc"], n)) for n in (8, 64))
    assert abs(short.item() - math.log(text.VOCABULARY)) < 1e-5
    assert short == long
