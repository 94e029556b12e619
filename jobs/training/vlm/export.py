"""A trained vision–language model as a checkpoint of transformers' LLaVA or LLaVA-OneVision."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from jobs.training.vlm.speaker import SETTINGS, Speaker, load_speaker
from models.language import exported
from models.language.budget import Sampling
from models.language.llava import Llava


def export(model: Path, to: Path, dtype: str = "float32") -> str:
    """Weights, configuration and processor, and `clipmill.json`: which frames it is shown, how it is asked.

    Returns how the mill's captioner is told to use it. Raises ValueError where no class of transformers computes the
    same.
    """
    import transformers

    transformers.logging.disable_progress_bar()
    speaker = load_speaker(model)
    if speaker.visuals.static is not None:
        raise ValueError(
            "export: it was trained without the tokens of what stands still (frames.static), which transformers' "
            "classes always have: train with frames: {static: null}"
        )
    assert isinstance(speaker.model, Llava)
    kind = exported.kind_of(speaker.model)
    stored = speaker.model.to(getattr(torch, dtype))
    exported.save(stored, to, speaker.chat.tokenizer, speaker.chat.template)
    (to / SETTINGS).write_text(json.dumps(settings(speaker), indent=2) + "\n")
    lines = [f"a {kind} of transformers", f"captions: [{captioner(speaker, kind)}]"]
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


def captioner(speaker: Speaker, kind: str) -> str:
    """A line of a curation recipe, as the model was trained to be asked."""
    told = "prompt" if speaker.visuals.told == "prompt" else "none"
    given = "images" if kind == "llava" else "video"
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
