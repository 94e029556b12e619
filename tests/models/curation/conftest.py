"""Tiny vision-language checkpoints, each made and loaded once."""

from __future__ import annotations

import pytest
import torch

from models.curation.vlm.loading import Wanted
from models.curation.vlm.model import VLM, Look
from tests.fixtures import tiny_vlm, tiny_vlm_families
from tests.fixtures.clips import noise

PROMPT = "Describe the video."


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A checkpoint's folder, by the name of what makes it."""
    made = {}

    def get(name):
        if name not in made:
            make = getattr(tiny_vlm, name, None) or getattr(tiny_vlm_families, name)
            made[name] = make(tmp_path_factory.mktemp(name))
        return made[name]

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small to share
    yield get
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def vlm(folder):
    """A model, by name, input and settings."""
    made = {}

    def get(name, input=None, **settings):
        key = (name, input, *sorted(settings.items()))
        if key not in made:
            made[key] = VLM(Wanted(str(folder(name))), input=input, **{"max_new_tokens": 10} | settings)
        return made[key]

    return get


def look(seed, frames=4, height=48, width=64, seconds=2.0, prompt=PROMPT, key=""):
    return Look(
        [noise(100 * seed + i, height, width) for i in range(frames)],
        [i * seconds / frames for i in range(frames)],
        seconds,
        prompt,
        key,
    )


def greedy(model, one, steps):
    """Token by token, without cache, batch or generate(): the reference for decoder-only models."""
    inputs = model.inputs([one])
    found = []
    for _ in range(steps):
        with torch.inference_mode():
            token = int(model.model(**inputs).logits[0, -1].argmax())
        if token in model.eos:
            return found, True
        found.append(token)
        for name, x in inputs.items():
            if name == "input_ids":
                inputs[name] = torch.cat([x, torch.tensor([[token]])], 1)
            elif name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
                inputs[name] = torch.cat([x, torch.full((1, 1), int(name == "attention_mask"))], 1)
    return found, False
