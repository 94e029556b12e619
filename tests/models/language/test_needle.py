"""A number hidden in a long document: the document is as long as it may be, and finding is writing it to the letter."""

import numpy as np
import pytest
import torch

from models.language import needle
from models.language.layout import Layout
from models.language.world import World

LAYOUT = Layout.of_bytes(codes=0, frame=1)


def hidden(room: int, seed: int = 0, **options) -> needle.Needle:
    rng = np.random.default_rng(seed)
    return needle.hidden(lambda: "two red circles move left", LAYOUT.encode, room, rng, **options)


@pytest.mark.parametrize("count", [1, 3])
def test_a_document_fills_its_room_and_holds_each_number_once_before_it_is_asked_for(count):
    for seed in range(20):
        made = hidden(500, seed, count=count)
        length = sum(len(LAYOUT.encode(part.content)) for part in made.parts())
        assert 500 - len(" two red circles move left.") < length <= 500
        assert len(made.asked) == count
        for question, answer in made.asked:
            assert made.text.count(question + answer) == 1
            assert answer.strip(" .").isdigit()


def test_only_the_answers_are_learnt():
    made = hidden(400, count=2)
    laid = LAYOUT.lay_out(made.parts(), end=False)
    learnt = LAYOUT.decode(laid.tokens[laid.learnt].tolist())
    assert learnt == "".join(answer for _, answer in made.asked)


def test_a_depth_is_where_it_lies():
    places = [hidden(1000, depth=depth).text.index("magic") for depth in (0, 0.5, 1)]
    assert places[0] < 50
    assert 350 < places[1] < 550
    assert places[2] > 850


def test_too_little_room_is_said():
    with pytest.raises(ValueError, match="do not fit 60 tokens"):
        hidden(60, count=2)


class Copying(World):
    """Says what a document had at its first mention of the last words, or with `wrong` something else."""

    def __init__(self, wrong: bool = False):
        super().__init__(LAYOUT.words, None, dim=8, ffn=8, heads=2, depth=1)
        self.wrong = wrong

    def forward(self, tokens, vision=None, places=None, **options):
        said = super().forward(tokens, vision, places, **options)
        row, logits = tokens[0].tolist(), torch.zeros_like(said.text)
        for i in range(20, len(row)):
            last = row[i - 14 : i + 1]
            at = next(k for k in range(14, i + 1) if row[k - 14 : k + 1] == last)
            logits[0, i, row[at + 1] if at < i and not self.wrong else 0] = 1
        return said._replace(text=logits)


def test_a_model_that_copies_finds_every_number_and_one_that_does_not_finds_none():
    asked = [hidden(400, seed, count=2) for seed in range(5)]
    assert needle.found(Copying(), LAYOUT, asked) == [[True, True]] * 5
    assert needle.found(Copying(wrong=True), LAYOUT, asked) == [[False, False]] * 5
