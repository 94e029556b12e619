"""Graphs that `compute.compile` makes of each denoiser's blocks, and graph breaks, counted by torch's own counters.

    .venv/bin/python -m bench.compiled [--out bench/results/compiled.md]

Small networks of every kind of block, compiled block by block as the trainer does it, go forward and backward over five
shapes: a clip batch (B 2, T 4, 8×8 latents), two others, a batch of pictures (T 1), a single clip (B 1); a packed
network over five compositions of three shapes. A kind of block may have 16 graphs; what more it needed, and any break,
would be a sentence under the table. Graphs are counted after the first shape, after the third and at the end: sizes
vary from the second on, a size of 1 is always its own. The counting needs no code generator: blocks run on torch's
`eager` backend.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jobs.training.diffusion.task import blocks_of
from jobs.training.parallelize import checkpoint_activations, compile_blocks
from jobs.training.recipe_core import import_spec
from models.diffusion.condition import Condition

CHANNELS, TEXT, WORDS = 4, 8, 5
SHAPES = [(2, 4, 8), (3, 2, 4), (2, 3, 16), (2, 1, 8), (1, 4, 8)]  # B, T, h = w
PACKED = [(1, 1, 0), (2, 0, 3), (0, 2, 1), (4, 5, 6), (1, 7, 2)]  # clips of each of these:
LATENTS = [(1, 4, 4), (2, 4, 6), (3, 6, 4)]
UNET = {"width": 8, "multipliers": [1, 2], "depth": 1, "head_dim": 4}
TRANSFORMER = {"dim": 16, "depth": 4, "heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dit, full": ("dit", TRANSFORMER | {"attention": "full"}),
    "dit, factorised": ("dit", TRANSFORMER | {"attention": "factorised", "qk_norm": True}),
    "dit, alternating (Latte)": ("dit", TRANSFORMER | {"attention": "alternating"}),
    "sora": ("sora", TRANSFORMER | {"ffn": 16}),
    "sora, packed": ("sora", TRANSFORMER | {"ffn": 16}),
    "unet3d": ("unet3d", UNET | {"cross_attention": True, "places": True}),
    "video_ldm": ("video_ldm", UNET),
}


def condition(clips: int, generator: torch.Generator) -> Condition:
    there = torch.arange(WORDS) < torch.randint(2, WORDS + 1, (clips, 1), generator=generator)
    return Condition(text=torch.randn(clips, WORDS, TEXT, generator=generator), text_mask=there)


def passes(model: Any, packed: bool) -> Iterator[Callable[[], Tensor]]:
    """A forward pass of each shape, or composition."""
    generator = torch.Generator().manual_seed(0)
    if packed:
        for clips in PACKED:
            z = [torch.randn(n, CHANNELS, *s) for n, s in zip(clips, LATENTS, strict=True) if n]
            told = [condition(len(x), generator) for x in z]
            level = [torch.rand(len(x)) for x in z]
            yield lambda z=z, level=level, told=told: torch.cat(  # type: ignore[misc]
                [x.flatten() for x in model.packed(z, level, told)]
            )
        return
    for b, t, side in SHAPES:
        z, level, asked = torch.randn(b, CHANNELS, t, side, side), torch.rand(b), condition(b, generator)
        yield lambda z=z, level=level, asked=asked: model(z, level, asked)  # type: ignore[misc]


def count(name: str, mode: str) -> tuple[int, int, list[int], int, list[str]]:
    """Blocks, kinds of them, graphs after each pass, graph breaks, what could not be compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    kind, options = MODELS[name]
    torch.manual_seed(0)
    model: nn.Module = import_spec(kind).build(CHANNELS, TEXT, **options)
    blocks = list(blocks_of(model))
    kinds = {(type(b), str([p.shape for p in b.parameters()])) for b in blocks}
    uncompiled: list[str] = []
    checkpoint_activations(blocks, mode)  # type: ignore[arg-type]
    compile_blocks(blocks, uncompiled)
    counters, graphs = torch._dynamo.utils.counters, []
    for forward in passes(model, "packed" in name):
        forward().square().mean().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    return len(blocks), len(kinds), graphs, sum(counters["graph_break"].values()), uncompiled


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.getLogger("torch.__trace").propagate = False
    torch.compiler.set_default_backend("eager")
    rows = [
        "| denoiser | checkpointing | blocks, kinds | graphs: 1, 3, 5 shapes | a kind | graph breaks |",
        "|---" * 6 + "|",
    ]
    said: list[str] = []
    for name in MODELS:
        for mode in ("none", "selective", "full"):
            blocks, kinds, graphs, breaks, uncompiled = count(name, mode)
            many = f"{graphs[-1] / kinds:.1f} on average" if kinds > 1 else str(graphs[-1])
            rows.append(
                f"| {name} | {mode} | {blocks}, {kinds} | {graphs[0]}, {graphs[2]}, {graphs[4]} | {many} | {breaks} |"
            )
            said += [f"{name}, {mode}: {sentence}" for sentence in uncompiled]
            print(rows[-1], flush=True)
    doc = __doc__ or ""
    text = [
        f"# Graphs of compiled blocks\n\n`.venv/bin/python -m bench.compiled`, torch {torch.__version__}\n",
        doc.split("\n\n", 2)[2],
    ]
    if args.out:
        args.out.write_text("\n".join([*text, *rows, "", *said]).rstrip() + "\n")


if __name__ == "__main__":
    main()
