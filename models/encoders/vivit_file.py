"""A trained ViViT where it lies: the folder of a training, or a file of {'options', 'weights'}."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.encoders.vivit import ViViT


def read(path: str | Path) -> dict[str, Any]:
    """{'options', 'weights'}; of a training's averages the longest, where there are any.

    Args:
        path: of a folder of 'clipmill train vivit', or of a file of torch.save({'options': …, 'weights': …}, file).

    Raises ValueError where it holds something else.
    """
    from safetensors import SafetensorError

    path = Path(path)
    try:
        if path.is_dir():
            return {"options": _options(path), "weights": _weights(path, "vivit")}
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {"options": saved["options"], "weights": saved["weights"]}
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError, pickle.UnpicklingError) as e:
        raise ValueError(_none(path)) from e


def options(path: str | Path) -> dict[str, Any]:
    """Those of `ViViT`, without reading weights. Raises ValueError as `read`."""
    if not Path(path).is_dir():
        found: dict[str, Any] = read(path)["options"]
        return found
    try:
        return _options(Path(path))
    except (OSError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as e:
        raise ValueError(_none(path)) from e


def made(saved: Mapping[str, Any], name: str | Path) -> ViViT:
    """The network of what was `read`. Raises ValueError where options and weights do not fit each other."""
    try:
        network = ViViT(**saved["options"])
        network.load_state_dict(saved["weights"])
    except (TypeError, RuntimeError) as e:
        raise ValueError(_none(name)) from e
    return network


def _none(path: str | Path) -> str:
    return (
        f"{path} holds no ViViT: train one (clipmill train vivit), or write a file with "
        "torch.save({'options': …, 'weights': model.state_dict()}, file)"
    )


def _options(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)["vivit"]
    return found


def _weights(folder: Path, phase: str) -> dict[str, Tensor]:
    """Weights that training left in a folder: averaged as long as any is, where the last step has averages."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    found = load_file(folder / "model.safetensors")
    with safe_open(folder / "model.safetensors", "pt") as f:
        averages = folder / f"ema/{int(f.metadata()['step']):08d}.safetensors"
    if averages.is_file():
        averaged = load_file(averages)  # phase/σ_rel/name
        lengths = {key.split("/")[1] for key in averaged}
        start = f"{phase}/{max(lengths, key=float)}/"
        found |= {f"{phase}/{k.removeprefix(start)}": x for k, x in averaged.items() if k.startswith(start)}
    return {k.removeprefix(f"{phase}/"): x for k, x in found.items() if k.startswith(f"{phase}/")}
