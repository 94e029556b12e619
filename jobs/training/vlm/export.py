"""A trained vision–language model as a checkpoint of transformers: LLaVA, LLaVA-OneVision, Qwen-VL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from jobs.training.vlm.kinds import kind
from jobs.training.vlm.model import trained_at
from jobs.training.vlm.recipe import VLMRecipe
from jobs.training.vlm.speaker import SETTINGS, Speaker, of_training
from models.hub import MissingModel
from models.language.budget import Sampling


def export(model: Path, to: Path, dtype: str = "float32") -> str:
    """Weights, configuration and processor, and `clipmill.json`: which frames it is shown, how it is asked.

    Returns how the mill's captioner is told to use it. Raises ValueError where no class of transformers computes the
    same.
    """
    import transformers

    transformers.logging.disable_progress_bar()
    trained = trained_at(str(model))
    try:
        speaker = of_training(trained, torch.device("cpu"))
        recipe = VLMRecipe.model_validate(trained.recipe)
        network: Any = speaker.model.to(getattr(torch, dtype))
        name, given = kind(recipe.model.kind).save(network, to, recipe, trained.state["tokenizer"])
    except MissingModel as e:
        raise ValueError(str(e)) from e
    (to / SETTINGS).write_text(json.dumps(settings(speaker), indent=2) + "\n")
    lines = [f"a {name} of transformers", f"captions: [{captioner(speaker, given)}]"]
    if lost := unsaid(speaker.sampling, speaker.visuals.told):
        lines.append(
            f"no captioner can be told {' and '.join(lost)}, as it was trained: the mill asks it otherwise"
        )
    return "\n".join(lines)


def settings(speaker: Speaker) -> dict[str, object]:
    """What `speaker.load_speaker` reads again."""
    return {
        "frames": vars(speaker.sampling),
        "times": speaker.visuals.told,
        "prompts": speaker.prompts,
        "most": speaker.most,
    }


def captioner(speaker: Speaker, given: str) -> str:
    """A line of a curation recipe, as the model was trained to be asked."""
    told = "prompt" if speaker.visuals.told == "prompt" else "none"
    prompt = json.dumps(speaker.prompts[0])
    return (
        f"{{kind: transformers, name: student, model: FOLDER, input: {given}, frames: {speaker.sampling.frames}, "
        f"times: {told}, prompt: {prompt}, max_new_tokens: {speaker.most}}}"
    )


def unsaid(sampling: Sampling, told: str) -> list[str]:
    """What of a model's settings a captioner of the mill has no option for."""
    found = [] if sampling.fps is None else [f"frames.fps {sampling.fps:g}"]
    found += ["frames.ends"] if sampling.ends else []
    return found + (["frames.times llava_next"] if told == "llava_next" else [])
