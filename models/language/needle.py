"""A number hidden in a long document and asked for at its end: whether a model uses the whole of its context.

    … two red circles move left on black. The magic number of Lagos is 4821. one blue square … on white.
    The magic number of Lagos is → 4821

After the needle in a haystack of Kamradt (2023), as Large World Model measures retrieval (Liu et al. 2024, sec. 3.3):
the haystack is other text, the number is drawn, so it can be had from nowhere else. A document may hide several, which
are asked for one after the other, in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.language.layout import Layout, Part
from models.language.world import Places, World

CITIES = (
    "Accra",
    "Berlin",
    "Cairo",
    "Delhi",
    "Lagos",
    "Lima",
    "Oslo",
    "Paris",
    "Quito",
    "Rome",
    "Seoul",
    "Tokyo",
)
DIGITS = 4
EXAMPLE = " The magic number of Lagos is 4821."


@dataclass(frozen=True)
class Needle:
    """text: with the numbers in it, and whatever else. asked: (what it is asked with, the answer), one after the
    other."""

    text: str
    asked: tuple[tuple[str, str], ...]

    def parts(self) -> list[Part]:
        """As a document: the answers alone are learnt."""
        found = [Part(self.text, learnt=False)]
        for question, answer in self.asked:
            found += [Part(question, learnt=False), Part(answer)]
        return found


def hidden(
    sentences: Callable[[], str],
    encode: Callable[[str], Sequence[int]],
    room: int,
    rng: np.random.Generator,
    *,
    count: int = 1,
    depth: float | None = None,
) -> Needle:
    """A document of at most `room` tokens, filled with sentences as far as they fit.

    Args:
        sentences: gives the next one. encode: text → tokens.
        count: of the numbers, at most as many as there are cities.
        depth: where the number lies, 0 the beginning and 1 the end of the text; None: anywhere.

    Raises ValueError where not even the numbers fit.
    """
    cities = [CITIES[i] for i in rng.permutation(len(CITIES))[:count]]
    told = [f" The magic number of {city} is" for city in cities]
    numbers = [f" {rng.integers(10 ** (DIGITS - 1), 10**DIGITS)}." for _ in cities]
    asked = [(told[i], numbers[i]) for i in rng.permutation(count)]
    needles = [a + b for a, b in zip(told, numbers, strict=True)]
    left = room - sum(len(encode(needle)) for needle in needles) - sum(len(encode(a + b)) for a, b in asked)
    if left < 0:
        raise ValueError(
            f"{count} numbers and their questions do not fit {room} tokens: give fewer, or more room"
        )
    straw: list[str] = []
    while (used := len(encode(sentence := f" {sentences()}."))) <= left:
        straw.append(sentence)
        left -= used
    places = sorted(
        (round((rng.random() if depth is None else depth) * len(straw)) for _ in needles), reverse=True
    )
    for place, needle in zip(places, needles, strict=True):
        straw.insert(place, needle)
    return Needle("".join(straw), tuple(asked))


@torch.no_grad()
def found(model: World, layout: Layout, needles: Sequence[Needle]) -> list[list[bool]]:
    """Of each document whether each number is written by the likeliest tokens, in one pass through all of it.

    That a number's tokens are all the likeliest given those before is the same as that greedy decoding writes it.
    """
    device = model.embed.weight.device
    right = []
    for needle in needles:
        laid = layout.lay_out(needle.parts(), end=False)
        tokens, vision = (x[None].to(device) for x in (laid.tokens, laid.vision))
        places = Places.packed([laid.length], laid.length, device)
        said: Tensor = model(tokens[:, :-1], vision[:, :-1], places.part(0, laid.length - 1)).text[0]
        likeliest = said[:, : layout.words].argmax(-1).cpu() == laid.tokens[1:]
        asked, end = [], len(laid.tokens)
        for question, answer in reversed(needle.asked):
            start = end - len(layout.encode(answer))
            asked.append(bool(likeliest[start - 1 : end - 1].all()))
            end = start - len(layout.encode(question))
        right.append(asked[::-1])
    return right
