"""Published weights of Wan 2.1 (Wan team 2025) in the Sora-like transformer, which then computes what Wan does.

What sets Wan apart, beside its sizes: queries and keys are normalised over the whole width, the network is told
rectified flow's time × 1000, and texts are filled up to 512 tokens with zeros that are looked at like words.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

OPTIONS: dict[str, Any] = {"qk_norm": "width", "flow_time": True, "text_length": 512}  # of `Sora`

EMBEDDER = "condition_embedder."
NAMES = {  # ours → diffusers'
    "level.mlp.0": EMBEDDER + "time_embedder.linear_1",
    "level.mlp.2": EMBEDDER + "time_embedder.linear_2",
    "ada": EMBEDDER + "time_proj",
    "words.0": EMBEDDER + "text_embedder.linear_1",
    "words.2": EMBEDDER + "text_embedder.linear_2",
    "out": "proj_out",
}
OF_A_BLOCK = {
    "attention.proj": "attn1.to_out.0",
    "cross.q": "attn2.to_q",
    "cross.proj": "attn2.to_out.0",
    "cross_norm": "norm2",
    "mlp.0": "ffn.net.0.proj",
    "mlp.2": "ffn.net.2",
}
JOINED = {  # one matrix here, several there
    "attention.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross.kv": ("attn2.to_k", "attn2.to_v"),
}
NORMS = {
    "attention.q_norm": "attn1.norm_q",
    "attention.k_norm": "attn1.norm_k",
    "cross.q_norm": "attn2.norm_q",
    "cross.k_norm": "attn2.norm_k",
}


def flow_time(level: Tensor) -> Tensor:
    """Noise level, the angle (2/π) arctan(σ/α), → σ/(α + σ): t of rectified flow, of any schedule."""
    angle = level * (math.pi / 2)
    return angle.sin() / (angle.sin() + angle.cos())


@torch.no_grad()
def load(model: nn.Module, folder: str) -> None:
    """Begin with the WanTransformer3DModel in a folder, or in its `transformer`.

    Channels that Wan does not have (known frames, a low-resolution video) get 0, so that the model says at first what
    Wan says; 'no text' begins as zeros. Raises ValueError: what does not fit.
    """
    (config, state), shape = _read(folder), model.state_dict()
    blocks: Any = model.blocks
    if (heads := blocks[0].attention.heads) != config["num_attention_heads"]:
        raise ValueError(
            f"weights={folder} has {config['num_attention_heads']} heads, this model {heads}: use the preset"
        )
    taken = {"table": state["scale_shift_table"][0]}
    patches = state["patch_embedding.weight"]
    weight = patches.permute(0, 2, 3, 4, 1)  # D p q r C, as `patchify` lays them out
    volume = patches.shape[2:].numel()
    embed = torch.zeros_like(shape["embed.weight"])
    wide = embed.unflatten(1, (volume, -1)) if embed.shape[1] % volume == 0 else embed[..., None]
    if len(wide) != len(weight) or model.patch != patches.shape[2:] or wide.shape[2] < weight.shape[-1]:
        raise ValueError(_differs(folder, "patch_embedding.weight", patches, embed))
    wide[:, :, : weight.shape[-1]] = weight.flatten(1, 3)
    taken |= {"embed.weight": embed, "embed.bias": state["patch_embedding.bias"]}
    if "caption.null" in shape:
        taken["caption.null"] = torch.zeros_like(shape["caption.null"])
    kinds = ("weight", "bias")
    taken |= {f"{ours}.{k}": state[f"{theirs}.{k}"] for ours, theirs in NAMES.items() for k in kinds}
    for block in (f"blocks.{i}." for i in range(config["num_layers"])):
        taken[f"{block}table"] = state[f"{block}scale_shift_table"][0]
        for kind in kinds:
            for ours, theirs in OF_A_BLOCK.items():
                taken[f"{block}{ours}.{kind}"] = state[f"{block}{theirs}.{kind}"]
            for ours, several in JOINED.items():
                taken[f"{block}{ours}.{kind}"] = torch.cat([state[f"{block}{n}.{kind}"] for n in several])
        for ours, theirs in NORMS.items():
            taken[f"{block}{ours}.weight"] = state[f"{block}{theirs}.weight"]
    extra = {name for name in shape if name.startswith("low_level.")}
    for name in sorted(shape.keys() | taken.keys()):
        if (name in shape and name in taken and shape[name].shape == taken[name].shape) or name in extra:
            continue
        raise ValueError(_differs(folder, name, taken.get(name), shape.get(name)))
    model.load_state_dict(taken, strict=False)


def _differs(folder: str, name: str, there: Tensor | None, here: Tensor | None) -> str:
    has, wants = ("none" if x is None else "×".join(map(str, x.shape)) for x in (there, here))
    return (
        f"weights={folder}: its {name} is {has}, this model's {wants}: use the preset, the autoencoder and the text "
        "encoder that it was trained with"
    )


def _read(folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Its config and state."""
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as e:
        raise ValueError(
            f"weights={folder} needs diffusers: pip install -e '.[diffusers]' in the clone"
        ) from e
    inside = Path(folder) / "transformer"
    path = inside if inside.is_dir() else Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"weights={folder} holds no config.json: give a folder of a diffusers Wan transformer"
        )
    config = WanTransformer3DModel.load_config(path)
    if config.get("_class_name") != "WanTransformer3DModel":
        raise ValueError(
            f"weights={folder} holds a {config.get('_class_name')}: give a WanTransformer3DModel"
        )
    for name, wanted in (
        ("image_dim", None),
        ("added_kv_proj_dim", None),
        ("cross_attn_norm", True),
        ("eps", 1e-6),
    ):
        if config.get(name, wanted) != wanted:
            raise ValueError(
                f"weights={folder} has {name} {config[name]}: only Wan's text-to-video transformers can be taken"
            )
    try:
        found = WanTransformer3DModel.from_pretrained(path, torch_dtype=torch.float32)
    except OSError as e:
        raise ValueError(f"weights={folder} cannot be read: {str(e).splitlines()[0]}") from e
    return dict(found.config), found.state_dict()
