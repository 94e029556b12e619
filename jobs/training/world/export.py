"""A trained world model in the layout of transformers' LLaMA."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from jobs.training.world.system import load_world
from models.language import llama

SETTINGS = "clipmill.json"


def export(model: Path, to: Path, dtype: str = "float32") -> str:
    """Weights and configuration as LlamaForCausalLM reads them, a model of text; beside them the visual embedding and
    head (vision.safetensors), which LLaMA does not have, the tokenizer where text is not bytes, and `clipmill.json`:
    how codes are laid out.

    `model: {kind: world, weights: FOLDER}` of a recipe goes on from it. Returns what to say. Raises ValueError.
    """
    system = load_world(str(model), device="cpu")
    llama.save(system.model.to(getattr(torch, dtype)), to)
    for name, text in (system.tokenizer or {}).items():
        (to / name).write_text(text)
    layout = system.layout
    told = {"text": "bytes" if system.tokenizer is None else "tokenizer", "words": layout.words}
    told |= {"begin": layout.begin, "end": layout.end, "codes": layout.codes, "frame": layout.frame}
    (to / SETTINGS).write_text(json.dumps(told, indent=2) + "\n")
    return "a LlamaForCausalLM of transformers\nmodel: {kind: world, weights: FOLDER}"
