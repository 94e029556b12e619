"""Low-rank adapters (Hu et al. 2021, "LoRA") through peft: a layer W becomes W + (alpha ÷ rank) B A.

`adapt` puts them into any module and freezes all else, so that A and B alone are trained, averaged and kept in
checkpoints. `merge` folds them in again. B is 0 at first: the module is what it was.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from jobs.training.parallelize import on_meta
from jobs.training.recipe_core import LoRA

ADAPTER = "default"  # peft's name of the only one; in parameters' names, but not in its files
PARTS = re.compile(
    r"(self_|cross_)?att(n|ention)s?\d?|cross|mlp|ffn?|feed_forward"
)  # of names, see `targets`


def adapt(module: nn.Module, blocks: Iterable[nn.Module], lora: LoRA, seed: int) -> None:
    """Put adapters beside the layers that the recipe means, in place, and freeze everything else.

    Layers keep their place; a parameter `x.weight` of an adapted one is called `x.base_layer.weight` from now on.

    Args:
        blocks: the repeated ones, where `targets: auto` looks.
        seed: of A.

    Raises ValueError where the recipe's names are those of no linear layer.
    """
    from peft import inject_adapter_in_model

    with torch.random.fork_rng([]):  # peft makes them on the CPU, whatever the layer's device
        torch.manual_seed(seed)
        inject_adapter_in_model(config(lora, targets(module, blocks, lora)), module, ADAPTER)
    if on_meta(module):  # adapters too
        module.to("meta")


def config(lora: LoRA, names: list[str]) -> Any:
    """peft's own, of adapters beside the layers of these names."""
    from peft import LoraConfig

    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)  # type: ignore[arg-type]


def targets(module: nn.Module, blocks: Iterable[nn.Module], lora: LoRA) -> list[str]:
    """Names of the layers that get an adapter.

    auto: the linear layers of attention and feed-forward in the repeated blocks, told by the parts of their names.
    Otherwise the linear layers whose names end as the recipe says, part by part.
    """
    linear = [name for name, m in module.named_modules() if type(m) is nn.Linear]
    if lora.targets == "auto":
        places = {id(m): name for name, m in module.named_modules()}
        starts = tuple(f"{places[id(block)]}." for block in blocks)
        found = [
            name
            for name in linear
            if (start := next(filter(name.startswith, starts), None)) is not None
            and any(PARTS.fullmatch(part) for part in name.removeprefix(start).split("."))
        ]
        if not found:
            raise ValueError(
                "lora.targets auto: there is no attention and no feed-forward; name linear layers"
            )
        return found
    for end in lora.targets:
        if not any(_ends(name, end) for name in linear):
            raise ValueError(f"lora.targets: no linear layer's name ends in {end!r}{_nearest(end, linear)}")
    return [name for name in linear if any(_ends(name, end) for end in lora.targets)]


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _nearest(end: str, linear: list[str]) -> str:
    """Ends of layers' names that resemble it, or all that there are."""
    ends = sorted({found[0] for name in linear if (found := re.search(r"[^.\d][^.]*(\.\d+)*$", name))})
    if close := difflib.get_close_matches(end, ends, 3, 0.5):
        return f" (did you mean {' or '.join(map(repr, close))}?)"
    return f"; there are {', '.join(ends)}"


@torch.no_grad()
def merge(module: nn.Module) -> None:
    """Add B A to the layers it stands beside; parameters have the names that they had before `adapt`."""
    from peft.tuners.lora import LoraLayer

    adapted = {name: m for name, m in module.named_modules() if isinstance(m, LoraLayer)}
    for name, layer in adapted.items():
        layer.merge()
        module.set_submodule(name, layer.get_base_layer())
    if hasattr(module, "peft_config"):
        del module.peft_config


def peft_name(name: str) -> str | None:
    """What peft's files call an adapter's weight; None of other weights."""
    if f".lora_A.{ADAPTER}." not in name and f".lora_B.{ADAPTER}." not in name:
        return None
    return f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}"


def layers(names: Iterable[str]) -> list[str]:
    """The adapted layers, of the names of a module's weights."""
    end = f".lora_A.{ADAPTER}.weight"
    return [name.removesuffix(end) for name in names if name.endswith(end)]
