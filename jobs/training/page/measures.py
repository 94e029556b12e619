"""What logged names are called on the page of a run, which share a chart, and which figure stands at the top."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

LEVEL = re.compile(r"loss/level_(\d+)")  # tenths of the noise level


@dataclass(frozen=True)
class Measure:
    """A logged name, or several that share a chart.

    Args:
        name: what matches the whole of it; its groups fill `title` and `line`.
        title: of the chart. line: of the curve in it, where there are several. about: beside the title.
        floor: of lines, those to compare with (drawn broken). best: 'high' or 'low', what is better, if anything.
        top: how it is called among the numbers at the top, where it is a figure by which such models are told apart.
    """

    section: str
    name: str
    title: str
    line: str = ""
    about: str = ""
    percent: bool = False
    calm: bool = False  # few points or no noise: one curve as it was logged
    floor: tuple[str, ...] = ()
    best: str = ""
    top: str = ""


PARTS = "text|vision|rivals|contrastive|matching"
HELD_OUT = "held-out clips"
MEASURES = (
    Measure("loss", "loss", "Loss"),
    Measure("loss", "(.+)/loss", "Loss, {0}"),
    Measure("loss", f"loss/({PARTS})", "Loss by part", "{0}"),
    Measure("loss", "grad_norm", "Gradient norm", about="before clipping"),
    Measure("loss", "(.+)/grad_norm", "Gradient norm, {0}", about="before clipping"),
    Measure("loss", "lr", "Learning rate", calm=True),
    Measure("loss", "(.+)/lr", "Learning rate, {0}", calm=True),
    Measure("speed", "tokens_per_second", "Tokens a second"),
    Measure("speed", "samples_per_second", "Samples a second"),
    Measure("speed", "step_seconds", "Seconds a step"),
    Measure("speed", "mfu", "Model FLOPs utilisation", percent=True),
    Measure("speed", "data_wait", "Waiting for data", about="share of the time", percent=True),
    Measure("speed", "(?:filled|packed)", "Packing", about="places of a sequence with a token", percent=True),
    Measure("speed", "peak_memory_gb", "Peak memory", about="GB", calm=True),
    Measure("speed", "skipped", "Broken samples skipped"),
    # how good it is, of clips it was not trained on
    Measure(
        "quality", "cider", "CIDEr-D", about="captions against the chosen ones", best="high", top="CIDEr-D"
    ),
    Measure(
        "quality",
        "(?:exact|captions/exact)",
        "Captions that equal the chosen one",
        about="but for case",
        percent=True,
        best="high",
        top="Captions right",
    ),
    Measure("quality", "needles/found", "Needles found", percent=True, best="high", top="Needles found"),
    Measure("quality", "held_out/loss/(.+)", "Loss", "{0}", HELD_OUT),
    Measure(
        "quality", "held_out/psnr(.*)", "PSNR", "{0}", f"dB, {HELD_OUT}", best="high", top="PSNR, held out"
    ),
    Measure("quality", "held_out/ssim(.*)", "SSIM", "{0}", HELD_OUT, best="high"),
    Measure(
        "quality",
        "chosen/(.+)",
        "The chosen caption scores best",
        "{0}",
        "of a clip’s own",
        percent=True,
        floor=("chance",),
        best="high",
    ),
    Measure(
        "quality",
        "text_of_clip/R@(.+)",
        "Clip to text: right among the first",
        "{0}",
        percent=True,
        best="high",
        top="Clip to text, R@1",
    ),
    Measure(
        "quality",
        "clip_of_text/R@(.+)",
        "Text to clip: right among the first",
        "{0}",
        percent=True,
        best="high",
        top="Text to clip, R@1",
    ),
    Measure("quality", "auc", "AUC", about="own against others’ captions", best="high", top="AUC"),
    Measure(
        "quality",
        "accuracy/([^/]+)(?:/(commonest))?",
        "Right: {0}",
        "{1}",
        percent=True,
        floor=("commonest",),
        best="high",
    ),
    # the rest
    Measure("other", "psnr", "PSNR", about="dB, clips of the step"),
    Measure("other", "l1", "Absolute error", about="of pixels in −1 … 1"),
    Measure("other", "error", "Squared error", about="before it is weighted"),
    Measure("other", "kl", "KL divergence", about="nats a pixel value"),
    Measure("other", "perceptual", "Perceptual distance"),
    Measure("other", "adversarial", "Adversarial loss"),
    Measure("other", "adaptive_weight", "Weight of the adversarial loss"),
    Measure("other", "codebook", "Commitment loss"),
    Measure("other", "codes/usage", "Codes in use", about="share of the codebook", percent=True, calm=True),
    Measure(
        "other", "codes/perplexity", "Perplexity of the codes", about="as many, if used evenly", calm=True
    ),
    Measure("other", "codes/again", "Vectors of the codebook begun again", about="a step"),
)


@dataclass
class Chart:
    """Names that share a chart: label of the curve → logged name."""

    measure: Measure
    title: str
    lines: dict[str, str] = field(default_factory=dict)


def measure_of(name: str) -> tuple[Measure, tuple[str, ...]]:
    """The first that a name matches, and what its groups hold; one of its own for a name that none knows."""
    for measure in MEASURES:
        if found := re.fullmatch(measure.name, name):
            return measure, tuple(part or "" for part in found.groups())
    return Measure("other", re.escape(name), name), ()


LABELS = Measure("loss", "", "Loss by kind of label", "{0}")


def charts(names: Iterable[str]) -> list[Chart]:
    """In the order of the list above, then of the names."""
    found: dict[tuple[str, str], Chart] = {}
    every = list(names)
    for name in every:
        measure, parts = measure_of(name)
        if f"accuracy/{name}" in every:
            measure, parts = LABELS, (name,)
        title = measure.title.format(*parts) if parts else measure.title
        chart = found.setdefault((measure.name, title), Chart(measure, title))
        line = measure.line.format(*parts).strip("/_ ").replace("_", " ")
        chart.lines[line] = name
    known = {measure: n for n, measure in enumerate(MEASURES)}
    return sorted(found.values(), key=lambda chart: known.get(chart.measure, len(known)))


def headline(names: Iterable[str]) -> tuple[Measure, str] | None:
    """The figure by which models of this kind are told apart, and its name."""
    every = list(names)
    for measure, name in itertools.product(MEASURES, every):
        if measure.top and re.fullmatch(measure.name, name):
            return measure, name
    return None
