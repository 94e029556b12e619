"""Sampling: against the formula computed without a cache, one prompt at a time; and what a trained model gives back."""

import pytest
import torch

from models.language.generate import PICTURE, Sampling, draw, frames, go_on, guided, write
from models.language.layout import Layout, Part
from models.language.loss import Goal, shifted, token_weights
from models.language.world import Goals, Places, World

LAYOUT = Layout.of_bytes(codes=16, frame=4)
GREEDY = Sampling(temperature=0.0)
PROMPTS = [["a cat"], ["a dog that runs"], [torch.tensor([[1, 2, 3, 4]]), "more"]]


def world() -> World:
    torch.manual_seed(0)
    model = World(300, 24, dim=32, ffn=48, heads=4, groups=2, depth=2).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else None
    return model


def drawn(*shape: int, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- guidance and drawing


def test_guidance_of_one_is_conditional_of_zero_unconditional_to_the_bit():
    c, u = drawn(3, 50) * 100, drawn(3, 50, seed=1)
    assert torch.equal(guided(c, u, 1.0), c)
    assert torch.equal(guided(c, u, 0.0), u)
    torch.testing.assert_close(guided(c, u, 5.0), u + 5 * (c - u))


@torch.no_grad()
def test_frames_without_guidance_are_those_of_scale_one_and_of_scale_zero_those_of_no_text():
    model = world()
    seeds = [3, 4, 5]
    plain = frames(model, LAYOUT, PROMPTS, 2, seeds, first=Sampling(), rest=Sampling())
    near = frames(model, LAYOUT, PROMPTS, 2, seeds, first=Sampling(1 + 1e-7), rest=Sampling(1 + 1e-7))
    assert torch.equal(plain, near)
    none = frames(model, LAYOUT, [[]] * 3, 2, seeds, first=Sampling(), rest=Sampling())
    zero = frames(model, LAYOUT, PROMPTS, 2, seeds, first=Sampling(0.0), rest=Sampling(0.0))
    assert torch.equal(none, zero)
    assert not torch.equal(none, plain)


def test_only_the_k_likeliest_are_drawn_as_often_as_they_should_be():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0, 1.5]])
    how = Sampling(temperature=0.5, top_k=3)
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.cat([draw(logits, how, [generator]) for _ in range(4000)]), minlength=5)
    expected = torch.zeros(5)
    expected[[1, 2, 4]] = (logits[0, [1, 2, 4]] / 0.5).softmax(0)
    torch.testing.assert_close(counts / 4000, expected, atol=0.03, rtol=0)
    assert counts[[0, 3]].sum() == 0
    assert draw(logits, Sampling(top_k=1), [generator]) == draw(logits, GREEDY, [generator]) == 1


# ---------------------------------------------------------------- against an uncached loop


def likeliest_codes(model, parts, count: int, scales) -> torch.Tensor:
    """Frames of one prompt: each code from two whole passes, with and without the prompt's parts."""
    sequences = [LAYOUT.lay_out(x, end=False, opened=True)[:2] for x in (parts, [])]
    codes = []
    for i in range(count):
        for _ in range(LAYOUT.frame):
            c, u = (model(t[None], v[None]).vision[0, -1, : LAYOUT.codes] for t, v in sequences)
            codes.append((u + scales[min(i, 1)] * (c - u)).argmax()[None])
            sequences = [and_then(s, codes[-1]) for s in sequences]
        sequences = [and_then(s, torch.tensor([LAYOUT.eof])) for s in sequences]
    return torch.cat(codes).view(count, LAYOUT.frame)


def and_then(sequence, token):
    return torch.cat([sequence[0], token]), torch.cat([sequence[1], torch.tensor([True])])


@pytest.mark.parametrize("scales", [(5.0, 1.0), (5.0, 2.0), (1.0, 1.0), (1.0, 3.0)])
@torch.no_grad()
def test_frames_equal_those_of_an_uncached_loop_over_prompts(scales):
    """Prompts of different lengths in one batch; guidance that ends after the first frame."""
    model = world()
    hows = [Sampling(scale, 0.0) for scale in scales]
    found = frames(model, LAYOUT, PROMPTS, 3, [0, 0, 0], first=hows[0], rest=hows[1])
    for row, parts in zip(found, PROMPTS, strict=True):
        assert torch.equal(row, likeliest_codes(model, parts, 3, scales))


@torch.no_grad()
def test_given_frames_are_kept_and_go_on_as_if_they_had_been_drawn():
    model, how = world(), Sampling(3.0, 0.0)
    whole = frames(model, LAYOUT, PROMPTS, 3, [0, 0, 0], first=how, rest=how)
    again = frames(model, LAYOUT, PROMPTS, 3, [0, 0, 0], given=whole[:, :2], first=how, rest=how)
    assert torch.equal(whole, again)
    with pytest.raises(ValueError, match="ask for more"):
        frames(model, LAYOUT, PROMPTS, 2, [0, 0, 0], given=whole[:, :2])


@torch.no_grad()
def test_text_equals_that_of_an_uncached_loop():
    model = world()
    found = write(model, LAYOUT, PROMPTS, 12, [0, 0, 0])
    for text, parts in zip(found, PROMPTS, strict=True):
        tokens, vision, _ = LAYOUT.lay_out(parts, end=False)
        row = []
        while len(row) < 12 and LAYOUT.end not in row:
            row.append(int(model(tokens[None], vision[None]).text[0, -1, : LAYOUT.words].argmax()))
            tokens = torch.cat([tokens, torch.tensor(row[-1:])])
            vision = torch.cat([vision, torch.tensor([False])])
        assert text == LAYOUT.decode([t for t in row if t != LAYOUT.end])


@torch.no_grad()
def test_what_is_drawn_depends_on_the_seed_and_not_on_the_batch():
    model = world()
    together = frames(model, LAYOUT, PROMPTS, 2, [1, 2, 3])
    assert torch.equal(together[1:2], frames(model, LAYOUT, PROMPTS[1:2], 2, [2]))
    assert not torch.equal(together[1:2], frames(model, LAYOUT, PROMPTS[1:2], 2, [7]))
    texts = write(model, LAYOUT, PROMPTS, 8, [1, 2, 3], Sampling())
    assert texts[2:] == write(model, LAYOUT, PROMPTS[2:], 8, [3], Sampling())
    with pytest.raises(ValueError, match="one for each"):
        frames(model, LAYOUT, PROMPTS, 1, [1])


@torch.no_grad()
def test_no_mark_is_drawn_within_a_frame_however_likely():
    model = world()
    with torch.no_grad():
        model.vision_head.weight[16:] *= 100
    laid = LAYOUT.lay_out(["a cat"], end=False, opened=True)
    assert model(laid.tokens[None], laid.vision[None]).vision[0, -1].argmax() >= 16
    assert frames(model, LAYOUT, PROMPTS, 3, [0, 1, 2], first=PICTURE).max() < 16


# ---------------------------------------------------------------- a trained model


DOCUMENTS = [
    ["red", torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])],
    ["blue", torch.tensor([[9, 9, 2, 2]])],
    [torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), "red"],
    [torch.tensor([[9, 9, 2, 2]]), "blue"],
    ["both", torch.tensor([[9, 9, 2, 2]]), "and", torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), "end"],
]


@pytest.fixture(scope="module")
def trained() -> World:
    """Knows the documents by heart, from one packed sequence."""
    torch.manual_seed(0)
    model = World(258, 18, dim=48, ffn=96, heads=4, depth=2)
    laid = [LAYOUT.lay_out(parts) for parts in DOCUMENTS]
    lengths = [x.length for x in laid]
    tokens, vision, learnt = (torch.cat(x) for x in zip(*laid, strict=True))
    targets, learnt, seen = (shifted(x, lengths) for x in (tokens, learnt, vision))
    goals = [Goal.of(targets, token_weights(lengths, learnt & marks)) for marks in (~seen, seen)]
    places = Places.packed(lengths, len(tokens))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(80):
        said = model(tokens[None], vision[None], places, goals=Goals(*goals))
        optimizer.zero_grad()
        (sum(said) / 2 / len(laid)).backward()
        optimizer.step()
    return model.eval()


def test_one_model_makes_pictures_videos_and_texts(trained):
    how = {"first": Sampling(2.0, 0.0), "rest": GREEDY}
    assert torch.equal(frames(trained, LAYOUT, [["blue"]], 1, [0], **how)[0], DOCUMENTS[1][1])
    assert torch.equal(frames(trained, LAYOUT, [["red"]], 2, [0], **how)[0], DOCUMENTS[0][1])
    assert write(trained, LAYOUT, [[DOCUMENTS[2][0]], [DOCUMENTS[3][0]]], 20, [0, 0]) == ["red", "blue"]


@pytest.mark.parametrize("known", [0, 1])
def test_it_says_itself_when_it_shows_something_and_when_a_video_ends(trained, known: int):
    """After 'both', and after 'both' and a picture."""
    whole = DOCUMENTS[4]
    prompt = [Part(x, learnt=False) for x in whole[: known + 1]]
    found = go_on(trained, LAYOUT, prompt, 200, 20, 0, vision=GREEDY)
    assert len(found) == len(whole) - known - 1
    for a, b in zip(found, whole[known + 1 :], strict=True):
        assert a == b if isinstance(b, str) else torch.equal(a, b)


def test_a_video_that_has_no_room_ends_earlier(trained):
    found = go_on(trained, LAYOUT, ["red"], 200, 1, 0, vision=GREEDY)
    assert torch.equal(found[0], DOCUMENTS[0][1][:1])
    assert go_on(trained, LAYOUT, ["red"], 200, 0, 0, vision=GREEDY) == []


def test_of_text_alone_it_says_as_much_as_is_written(trained):
    prompt = [DOCUMENTS[2][0]]
    for most in (1, 2, 3, 200):
        assert go_on(trained, LAYOUT, prompt, most, 2, 0) == write(trained, LAYOUT, [prompt], most, [0])
