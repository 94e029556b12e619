"""Our vision–language models as `transformers` checkpoints, and back: others can use them, the mill's captioner too.

    LLaVA            MLP, whole grids, nothing between frames; a video is its frames as several images
    LLaVA-OneVision  MLP, video pooled by two (bilinear), a newline after each clip or image (`llava.ONEVISION`)

Published weights of both classes (llava-hf/llava-1.5-7b-hf, llava-hf/llava-onevision-qwen2-7b-ov-hf, …) load the same
way. Other settings have no class of `transformers` that computes the same, and are not exported.

LLaVA-OneVision's own processor cuts a single image into tiles; ours are one tile, as its several images are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.hub import MissingModel, transformers_weights
from models.language.llava import ONEVISION, Llava, Placeholders, scales_logits
from models.language.projectors import Projector, projector
from models.language.towers import TransformersTower

IMAGE, VIDEO = "<image>", "<video>"
# ChatML, with pictures where they stand in a message's content
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'video' %}<video>\n{% elif c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN: dict[str, Any] = {"map": "mlp", "pool": 1, "newline": "none"}


def kind_of(model: Llava) -> str:
    """'llava' or 'llava_onevision'. Raises ValueError, one sentence, where no class computes the same."""
    p, tower, config = model.projector, model.tower, model.language.config
    if not isinstance(tower, TransformersTower) or model.video_tower is not None:
        raise ValueError("export: transformers' LLaVA classes take one vision model of transformers as tower")
    if model.reader is not None:
        raise ValueError(
            "export: transformers' LLaVA classes read nothing beside what is seen: leave reader out"
        )
    if not isinstance(p, Projector):
        raise ValueError("export: transformers' LLaVA classes have no Q-Former: use map: mlp")
    if scales_logits(config):
        raise ValueError(
            f"export: transformers' LLaVA classes do not scale logits, as {config.model_type} does"
        )
    if getattr(model.language.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(
            f"export: transformers' LLaVA classes have no bias of logits, as {config.model_type} has"
        )
    if tower.before > 1:
        raise ValueError(
            f"export: the tower has {tower.before} tokens before its patches, LLaVA classes drop one at most"
        )
    if p.map == "mlp" and p.shuffle == p.temporal == 1:
        if p.pool == 1 and p.line == "none":
            return "llava"
        if (p.pool, p.mode, p.line, p.whole_images) == (2, "bilinear", "clip", True):
            return "llava_onevision"
    raise ValueError(
        "export: no class of transformers has this projector: use map: mlp alone (LLaVA), or with pool: 2, newline: "
        "clip and whole_images: true (LLaVA-OneVision)"
    )


def save(model: Llava, folder: Path, tokenizer: Any, chat: str = CHAT) -> None:
    """Weights, configuration and processor, as `transformers` loads them.

    Args:
        tokenizer: knows <image> and <video> by the ids of `model.placeholders`.
        chat: template of its conversations.

    Raises ValueError as `kind_of`, and where the tokenizer has other placeholders.
    """
    kind = kind_of(model)
    for name, id in ((IMAGE, model.placeholders.image), (VIDEO, model.placeholders.video)):
        if (has := tokenizer.convert_tokens_to_ids(name)) != id:
            raise ValueError(
                f"export: the tokenizer has {name} as {has}, the model as {id}: give its own tokenizer"
            )
    published = _model(model, kind)
    published.save_pretrained(folder)
    _processor(model, kind, tokenizer, chat).save_pretrained(folder)


def load(folder: str) -> Llava:
    """A model of these classes, from a folder or by hub id. Raises MissingModel: one sentence with the fix."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers import logging as told

    transformers_weights(folder)
    told.disable_progress_bar()
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind not in ("llava", "llava_onevision"):
            raise MissingModel(f"model {folder!r} is a {kind}: name a llava or llava_onevision")
        return of(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        raise MissingModel(f"model {folder!r} cannot be loaded: {str(e).strip().splitlines()[0]}") from e


def of(published: Any) -> Llava:
    """A LlavaForConditionalGeneration or LlavaOnevisionForConditionalGeneration, whose weights it shares."""
    from transformers import AutoModelForCausalLM

    config = published.config
    onevision = config.model_type == "llava_onevision"
    tower = TransformersTower(published.model.vision_tower, config.vision_feature_layer)
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise ValueError("a projector without bias, or with another activation than gelu, is not known here")
    if (config.vision_feature_select_strategy == "default") != (tower.before == 1):
        raise ValueError("vision_feature_select_strategy: a class token among the patches is not known here")
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(config.text_config)
    setattr(language, language.base_model_prefix, published.model.language_model)
    language.set_output_embeddings(published.lm_head)
    language.generation_config = published.generation_config
    dim = language.get_input_embeddings().embedding_dim
    ours = projector(tower.width, dim, ONEVISION if onevision else PLAIN)
    theirs = published.model.multi_modal_projector.state_dict()
    ours.load_state_dict(theirs | ({"newline": published.model.image_newline.detach()} if onevision else {}))
    video = config.video_token_index if onevision else config.image_token_index
    return Llava(tower, ours, language, Placeholders(config.image_token_index, video))


def _model(model: Llava, kind: str) -> Any:
    """The same weights, not copied, in the class of `transformers`."""
    import transformers

    tower, language = model.tower, model.language
    assert isinstance(tower, TransformersTower)
    _, h, w = tower.grid(1, tower.size, tower.size)
    told: dict[str, Any] = {
        "vision_config": tower.model.config,
        "text_config": language.config,
        "image_token_index": model.placeholders.image,
        "vision_feature_layer": tower.layer,
        "vision_feature_select_strategy": "default" if tower.before else "full",
        "tie_word_embeddings": language.config.tie_word_embeddings,
    }
    config: Any
    cls: Any
    if kind == "llava":
        config, cls = transformers.LlavaConfig, transformers.LlavaForConditionalGeneration
        told["image_seq_length"] = h * w
    else:
        config, cls = transformers.LlavaOnevisionConfig, transformers.LlavaOnevisionForConditionalGeneration
        told |= {
            "video_token_index": model.placeholders.video,
            "image_grid_pinpoints": [[tower.size, tower.size]],
        }
    with torch.device("meta"):
        published: Any = cls(config(**told))
    weights = _weights(model)
    published.load_state_dict({name: weights[name] for name in published.state_dict()}, assign=True)
    published.tie_weights()
    published.generation_config = language.generation_config
    return published


def _weights(model: Llava) -> dict[str, torch.Tensor]:
    base = model.language.base_model_prefix
    names = {
        "tower.model.": "model.vision_tower.",
        "projector.newline": "model.image_newline",
        "projector.": "model.multi_modal_projector.",
        f"language.{base}.": "model.language_model.",
        "language.": "",
    }
    weights = {}
    for name, value in model.state_dict().items():
        ours, theirs = next((a, b) for a, b in names.items() if name.startswith(a))
        weights[theirs + name.removeprefix(ours)] = value
    return weights


def _processor(model: Llava, kind: str, tokenizer: Any, chat: str) -> Any:
    import transformers

    tower = model.tower
    assert isinstance(tower, TransformersTower)
    _, h, w = tower.grid(1, tower.size, tower.size)
    scaled: dict[str, Any] = {"image_mean": list(tower.mean), "image_std": list(tower.std)}
    size = {"height": tower.size, "width": tower.size}
    strategy = "default" if tower.before else "full"
    if kind == "llava":
        return transformers.LlavaProcessor(
            transformers.CLIPImageProcessor(size=size, do_center_crop=False, **scaled),
            tokenizer,
            patch_size=tower.step[1],
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=tower.before,
            chat_template=chat,
        )
    pinpoints = [[tower.size, tower.size]]
    return transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints, **scaled),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=size, **scaled),
        num_image_tokens=h * w + tower.before,
        vision_feature_select_strategy=strategy,
        chat_template=chat,
    )
