"""Questions about scenes of the small world, as conversations to learn from and as multiple choice to be asked.

No question names an attribute that another asks for, so a conversation gives nothing away.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from models.measures.multiple_choice import LETTERS, lettered
from pipeline.toy.world import BACKGROUNDS, COLOURS, COUNTS, DIRECTIONS, SHAPES, Attributes

QUESTIONS = {
    "count": "How many objects are there?",
    "colour": "Which colour do the objects have?",
    "shape": "Which shape do the objects have?",
    "direction": "Which way do the objects move?",
    "background": "Which colour does the background have?",
}
VALUES = {
    "count": list(COUNTS),
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    "direction": list(DIRECTIONS),
    "background": list(BACKGROUNDS),
}


def choices(rng: np.random.Generator, attributes: Attributes) -> list[dict[str, Any]]:
    """A question an attribute: 'kind', 'question', 'options' in an order drawn, 'answer' (the right one's place)."""
    asked = []
    for kind, question in QUESTIONS.items():
        options = [VALUES[kind][i] for i in rng.permutation(len(VALUES[kind]))]
        right = options.index(str(getattr(attributes, kind)))
        asked.append({"kind": kind, "question": question, "options": options, "answer": right})
    return asked


def conversation(
    rng: np.random.Generator, attributes: Attributes, by_letter: bool = False
) -> list[dict[str, str]]:
    """Messages of all questions in an order drawn, answered by a word; by_letter: of options that are given."""
    messages = []
    asked = choices(rng, attributes)
    for i in rng.permutation(len(asked)):
        options, right = asked[i]["options"], asked[i]["answer"]
        question = lettered(asked[i]["question"], options) if by_letter else asked[i]["question"]
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": LETTERS[right] if by_letter else options[right]})
    return messages
