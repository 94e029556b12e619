"""Large World Model's published weights with a visual half, which are JAX's: a stream of msgpack, weight by weight.

Each record is (path of names, the array as flax writes it): ('transformer', 'h', 'scan_decoder', 'attention', 'wq',
'kernel') is [layers, in, out], all layers in one; where they are apart, their number is in place of 'scan_decoder'.
Features are turned in neighbouring pairs there as here. The models of text are in `transformers`' layout too, see
`models.language.llama`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

THETA, EPS = 5e7, 1e-6  # of the models with a context of a million tokens; the file tells neither
NAMES = {
    "transformer.wte.embedding": "embed",
    "transformer.vte.embedding": "vision_embed",
    "transformer.ln_f.kernel": "norm",
    "lm_head.kernel": "head",
    "vision_head.kernel": "vision_head",
}
OF_A_BLOCK = {
    "attention_norm.kernel": "attention_norm",
    "attention.wq.kernel": "attention.q",
    "attention.wk.kernel": "attention.k",
    "attention.wv.kernel": "attention.v",
    "attention.wo.kernel": "attention.out",
    "ffn_norm.kernel": "mlp_norm",
    "feed_forward.w1.kernel": "mlp.gate",
    "feed_forward.w3.kernel": "mlp.up",
    "feed_forward.w2.kernel": "mlp.down",
}


def options(state: dict[str, Tensor], heads: int | None = None) -> dict[str, Any]:
    """Options of the `World` of weights that were `read`; heads: None: of width 128, as all that are published have."""
    (words, dim), codes = state["embed.weight"].shape, state.get("vision_embed.weight")
    heads = heads or dim // 128
    return {
        "words": words,
        "codes": None if codes is None else len(codes),
        "dim": dim,
        "ffn": len(state["blocks.0.mlp.gate.weight"]),
        "heads": heads,
        "groups": len(state["blocks.0.attention.k.weight"]) // (dim // heads),
        "depth": sum(name.endswith(".mlp_norm.weight") for name in state),
        "theta": THETA,
        "eps": EPS,
    }


def read(path: str) -> dict[str, Tensor]:
    """A `World`'s weights, by its names. Raises ValueError for a file that is no such stream."""
    import msgpack

    state: dict[str, Tensor] = {}
    try:
        with Path(path).open("rb") as file:
            for key, value in msgpack.Unpacker(file, max_buffer_size=0):
                names = [name for name in key if name != "params"]
                state |= _ours(names, _array(msgpack.unpackb(value, ext_hook=_unpacked)))
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as e:
        raise ValueError(
            f"weights={path} is not a stream of Large World Model's weights: {e or type(e).__name__}"
        ) from e
    lacking = {"embed.weight", "norm.weight", "head.weight", "blocks.0.mlp.gate.weight"} - state.keys()
    if lacking:
        raise ValueError(f"weights={path} lacks {min(lacking)}: give a whole model's")
    return state


def _ours(names: list[str], x: Tensor) -> dict[str, Tensor]:
    """One record under our names, matrices as [out, in]."""
    whole = ".".join(names)
    if whole in NAMES:
        return {f"{NAMES[whole]}.weight": _turned_over(x) if names[-1] == "kernel" else x}
    if names[:2] != ["transformer", "h"] or ".".join(names[3:]) not in OF_A_BLOCK:
        raise ValueError(f"{whole} is unknown")
    name = OF_A_BLOCK[".".join(names[3:])]
    layers = enumerate(x) if names[2] == "scan_decoder" else [(int(names[2]), x)]
    return {f"blocks.{i}.{name}.weight": _turned_over(layer) for i, layer in layers}


def _turned_over(x: Tensor) -> Tensor:
    return x.T.contiguous() if x.ndim == 2 else x


def _unpacked(code: int, data: bytes) -> Any:
    """An array in flax's form: (shape, name of its type, its bytes), msgpack within msgpack."""
    import msgpack

    if code != 1:
        raise ValueError(f"a value of kind {code}")
    shape, kind, buffer = msgpack.unpackb(data, raw=True)
    dtypes = {b"float32": torch.float32, b"float16": torch.float16, b"bfloat16": torch.bfloat16}
    return torch.frombuffer(bytearray(buffer), dtype=dtypes[kind]).view(tuple(shape))


def _array(value: Any) -> Tensor:
    """Arrays of more than 1 GiB come in pieces."""
    if isinstance(value, dict):
        shape = [value["shape"][str(i)] for i in range(len(value["shape"]))]
        pieces = [value["chunks"][str(i)].flatten() for i in range(len(value["chunks"]))]
        value = torch.cat(pieces)
        if len(value) != math.prod(shape):
            raise ValueError(f"an array of shape {shape} has {len(value)} values")
        value = value.view(shape)
    if not isinstance(value, Tensor):
        raise ValueError(f"{type(value).__name__} in place of an array")
    return value
