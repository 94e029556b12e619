"""`models.language.world` in the folders of `transformers`' LLaMA: read and written.

    config.json          LlamaConfig's fields, and `vision_vocab_size`
    model.safetensors    or several with an index, or pytorch_model.bin: as LlamaForCausalLM names its weights
    vision.safetensors   the embedding and the head of visual tokens, which LLaMA does not have

So `LlamaForCausalLM.from_pretrained` reads what is written here, as a model of text.

Ours turns neighbouring features as a pair, theirs features W/2 apart: the rows of queries and keys have another
order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
OF_A_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
VISION = ("vision_embed.weight", "vision_head.weight")


def options(folder: str) -> dict[str, Any]:
    """Options of the `World` that a folder's config.json tells of. Raises ValueError for what is no plain LLaMA."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"weights={folder} holds no config.json: give a folder of a LLaMA model")
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    unlike = {
        "model_type": config.get("model_type") != "llama",
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "rope_scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
    }
    if wrong := [name for name, is_so in unlike.items() if is_so]:
        told = rope if wrong[0] == "rope_scaling" else config.get(wrong[0])
        raise ValueError(
            f"weights={folder} has {wrong[0]} {told}: only models of LLaMA's plain form can be taken"
        )
    heads = config["num_attention_heads"]
    return {
        "words": config["vocab_size"],
        "codes": config.get("vision_vocab_size"),
        "dim": config["hidden_size"],
        "ffn": config["intermediate_size"],
        "heads": heads,
        "groups": config.get("num_key_value_heads") or heads,
        "head": config.get("head_dim") or config["hidden_size"] // heads,
        "depth": config["num_hidden_layers"],
        "theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        "eps": config.get("rms_norm_eps", 1e-6),
        "tied": config.get("tie_word_embeddings", False),
    }


@torch.no_grad()
def load(model: Any, folder: str) -> None:
    """Begin with a folder's weights; where it has none of visual tokens, those stay as they are.

    Raises ValueError: what does not fit.
    """
    theirs, own = _weights(Path(folder)), model.state_dict()
    taken: dict[str, Tensor] = {name: theirs[name] for name in VISION if name in theirs}
    for ours, name in _names(len(model.blocks)).items():
        if name not in theirs and name == "lm_head.weight" and model.tied:
            name = "model.embed_tokens.weight"
        if name not in theirs:
            raise ValueError(f"weights={folder} lacks {name}: give the folder of a whole LLaMA model")
        taken[ours] = _to_pairs(theirs[name], model.head_width) if _turned(ours) else theirs[name]
    for name, x in taken.items():
        if name not in own or own[name].shape != x.shape:
            wanted = "none" if name not in own else tuple(own[name].shape)
            raise ValueError(f"weights={folder}: its {name} is {tuple(x.shape)}, this model's {wanted}")
    model.load_state_dict(taken, strict=False)


def save(model: Any, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
    """Write a `World` into a folder, from where `load` and `LlamaForCausalLM.from_pretrained` take it.

    Args:
        state: weights to write in place of its own (averaged ones; those gathered of a sharded model).
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = model.state_dict() if state is None else state
    named = {}
    for ours, name in _names(len(model.blocks)).items():
        if not (model.tied and ours == "head.weight"):
            x = _to_halves(own[ours], model.head_width) if _turned(ours) else own[ours]
            named[name] = x.detach().cpu().contiguous()
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    seen = {name: own[name].detach().cpu().contiguous() for name in VISION if name in own}
    if seen:
        save_file(seen, folder / "vision.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.embed.num_embeddings,
        "hidden_size": model.embed.embedding_dim,
        "intermediate_size": model.ffn,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.groups,
        "head_dim": model.head_width,
        "num_hidden_layers": len(model.blocks),
        "rope_theta": model.theta,
        "rms_norm_eps": model.eps,
        "tie_word_embeddings": model.tied,
        "hidden_act": "silu",
        "torch_dtype": str(named["model.norm.weight"].dtype).removeprefix("torch."),
    }
    if seen:
        config["vision_vocab_size"] = len(seen[VISION[0]])
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _names(depth: int) -> dict[str, str]:
    """Our names of weights → theirs."""
    found = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in NAMES.items()}
    for i in range(depth):
        found |= {
            f"blocks.{i}.{ours}.weight": f"model.layers.{i}.{theirs}.weight"
            for ours, theirs in OF_A_BLOCK.items()
        }
    return found


def _turned(name: str) -> bool:
    return name.endswith(("attention.q.weight", "attention.k.weight"))


def _to_pairs(weight: Tensor, head: int) -> Tensor:
    """Rows [heads · W, D] of halves (i, i + W/2) to neighbours (2i, 2i + 1)."""
    return weight.unflatten(0, (-1, 2, head // 2)).transpose(1, 2).flatten(0, 2)


def _to_halves(weight: Tensor, head: int) -> Tensor:
    return weight.unflatten(0, (-1, head // 2, 2)).transpose(1, 2).flatten(0, 2)


def _weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by name."""
    from safetensors.torch import load_file

    safe, pickled = sorted(folder.glob("*.safetensors")), sorted(folder.glob("pytorch_model*.bin"))
    found: dict[str, Tensor] = {}
    for path in safe or pickled:
        found |= load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    if not found:
        raise ValueError(f"weights={folder} holds neither *.safetensors nor pytorch_model*.bin")
    return found
