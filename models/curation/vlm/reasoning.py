"""Telling what a thinking model says from what it thinks."""

from __future__ import annotations

import re

# How thoughts begin and end: Qwen, GLM and most others; Gemma 4; Seed; Kimi; Magistral
MARKS = (
    ("<think>", "</think>"),
    ("<|channel>thought", "<channel|>"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("[THINK]", "[/THINK]"),
)
WRAPPING = re.compile(r"</?answer>|<\|(?:begin|end)_of_box\|>")  # GLM puts around what it says


def said(text: str, prompt: str = "") -> str:
    """An answer without thoughts, and without what wraps the rest.

    Thoughts that never end take all that follows with them; those whose beginning the prompt holds, all before their
    end.

    Args:
        prompt: as the model was given it; a chat template may begin the thoughts.
    """
    for opening, closing in MARKS:
        if prompt.rstrip().endswith(opening):
            text = opening + text
        text = re.sub(f"{re.escape(opening)}.*?(?:{re.escape(closing)}|$)", "", text, flags=re.DOTALL)
        text = text.rpartition(closing)[2]
    return WRAPPING.sub("", text)


def thinks(text: str, prompt: str = "") -> bool:
    """Whether an answer holds thoughts, or wrapping."""
    return said(text, prompt) != text
