"""How a run's scores are spread, with the rules' limits drawn in, and the commands that would move them."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence

import numpy as np

from pipeline.decide.rules import CHOSEN, DUPLICATE, META, NO_CAPTION
from pipeline.report.data import Limit, Run
from pipeline.report.html import (
    Child,
    Markup,
    div,
    h,
    join,
    note,
    number,
    plural,
    rect,
    share,
)

BINS = 40  # of a histogram, about
CONDITIONS = {NO_CAPTION: "a captioner could describe it", DUPLICATE: "the run keeps no better copy"}
WIDE, HIGH, HEAD = 330.0, 112.0, 16.0  # of a histogram; the head has room for the thresholds' names


def condition(limit: Limit) -> str:
    """What a clip has to satisfy, e.g. 'motion ≥ 0.3'."""
    if limit.column is None:
        return CONDITIONS.get(limit.name, "")
    label = column_label(limit.column)
    if limit.words:
        return f"{label} {limit.words}"
    if limit.min is not None and limit.max is not None:
        return f"{number(limit.min)} ≤ {label} ≤ {number(limit.max)}"
    if limit.min is not None:
        return f"{label} ≥ {number(limit.min)}"
    return f"{label} ≤ {number(limit.max)}" if limit.max is not None else ""


def column_label(column: str) -> str:
    """The name of a column as the page says it: 'score_text_area' is 'text area'."""
    known = {
        "duration_s": "duration (s)",
        "width": "width (px)",
        "height": "height (px)",
        "fps": "frame rate",
        "text": "text on screen",
        "caption_model": "captioner",
    }
    if column.startswith(CHOSEN):
        return f"{column.removeprefix(CHOSEN).replace('_', ' ')} of the caption"
    if column.startswith(META):
        return f"{column.removeprefix(META).replace('_', ' ')} of the list"
    return known.get(column, column.removeprefix("score_").replace("_", " "))


def shard_command(run: Run, setting: str = "") -> str:
    """The command that decides again, safe to paste into a shell."""
    beside = ["--out", run.store.uri] if run.media is not run.store else []
    return shlex.join(["clipmill", "shard", run.media.uri, *(["--set", setting] if setting else []), *beside])


def histograms(run: Run) -> Markup | None:
    """Every measured number, kept and dropped, with the thresholds on it."""
    if not len(run.keep):
        return None
    columns = [r.column for r in run.limits if r.column is not None and run.has(r.column)]
    columns += ["duration_s", *(n for n in run.clips.schema.names if n.startswith("score_"))]
    drawn = [chart for c in dict.fromkeys(columns) if (chart := histogram(run, c))]
    kept, dropped = h("b", "kept", class_="ink-kept"), h("b", "dropped", class_="ink-drop")
    hint = "Click a bar: the command that puts a threshold there appears here."
    return join(
        note(
            *(
                "Each bar counts clips, ",
                kept,
                " and ",
                dropped,
                " (by any rule). Dashed lines are the recipe’s ",
            ),
            "thresholds. Point at a bar for its numbers: what lies below or above it is what a threshold there ",
            "would drop.",
        ),
        div("charts", drawn),
        h("output", hint, class_="try", aria_live="polite"),
    )


def edges(values: np.ndarray, marks: Sequence[float] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Edges of about BINS bins, and of the few round steps they divide, over all values and marks.

    A few extreme values would squeeze the rest into one bar: the end bins take them instead.
    """
    low, high = float(values.min()), float(values.max())
    bulk = np.percentile(values, [0.5, 99.5])
    room = float(bulk[1] - bulk[0])
    if 0 < 4 * room < high - low:
        low, high = max(low, bulk[0] - 0.1 * room), min(high, bulk[1] + 0.1 * room)
    low, high = min([low, *marks]), max([high, *marks])
    if high - low <= 1e-9 * max(1.0, abs(low), abs(high)):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 2.5, 5, 10), key=lambda m: abs(math.log(m * power / rough)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = step * np.arange(first, last + 1)
    return np.linspace(ticks[0], ticks[-1], max(1, round(BINS / (last - first))) * (last - first) + 1), ticks


def histogram(run: Run, column: str) -> Markup | None:
    """One column as SVG; None where nothing was measured."""
    values = run.values(column)
    known = np.isfinite(values)
    if not known.any():
        return None
    rules = [r for r in run.limits if r.column == column]
    marks = [(v, word, r) for r in rules for v, word in ((r.min, "min"), (r.max, "max")) if v is not None]
    bins, ticks = edges(values[known], [m[0] for m in marks])
    inside = np.clip(values, bins[0], bins[-1])
    every, kept = (np.histogram(inside[which], bins)[0] for which in (known, known & run.keep))
    ordered = np.sort(values[known])
    below = np.searchsorted(ordered, bins).tolist()  # how many lie below each edge
    total, top = len(ordered), int(every.max())

    def x(value: float) -> float:
        return WIDE * (value - bins[0]) / (bins[-1] - bins[0])

    drawn: list[Child] = [h("line", class_="base", x1=0, x2=WIDE, y1=HIGH, y2=HIGH)]
    for i, (n, k) in enumerate(zip(every.tolist(), kept.tolist(), strict=True)):
        a, b = number(bins[i]), number(bins[i + 1])
        above = total - below[i + 1]
        tip = (
            f"{a} to {b}: {plural(n, 'clip')}, {k:,} kept\n"
            f"below {a}: {below[i]:,} ({share(below[i], total)})\nabove {b}: {above:,} ({share(above, total)})"
        )
        command = shard_command(run, setting(column, rules, bins[i], bins[i + 1]))
        left, width, base, parts = x(bins[i]), WIDE / len(every), HIGH, []
        for kind, count in (("k", k), ("d", n - k)):
            if count:  # one clip beside ten thousand is still seen
                tall = max(1.5, (HIGH - HEAD) * count / top)
                base -= tall
                parts.append(rect(kind, left + 0.5, base, width - 1, tall))
        hit = rect("hit", left, HEAD, width, HIGH - HEAD)
        drawn.append(h("g", parts, hit, data_tip=tip, data_command=command))
    for value, word, rule in marks:
        at, label = x(value), f"{word} {number(value)} {rule.name}"[:34]
        side, shift = ("start", 3) if at < WIDE / 2 else ("end", -3)
        drawn.append(h("line", class_="limit", x1=f"{at:.1f}", x2=f"{at:.1f}", y1=2, y2=HIGH))
        drawn.append(h("text", label, class_="limit-name", x=f"{at + shift:.1f}", y=10, text_anchor=side))
    for tick in ticks:
        label, side = number(tick), "middle"
        if tick == ticks[0]:
            label, side = ("≤ " if ordered[0] < tick - 1e-9 else "") + label, "start"
        elif tick == ticks[-1]:
            label, side = ("≥ " if ordered[-1] > tick + 1e-9 else "") + label, "end"
        drawn.append(h("text", label, x=f"{x(tick):.1f}", y=HIGH + 12, text_anchor=side))
    missing = len(values) - total
    about = f"median {number(float(np.median(ordered)))}" + (f", {missing:,} not measured" if missing else "")
    says = f"histogram of {column_label(column)}, {about}"
    box = f"0 0 {WIDE:.0f} {HIGH + 15:.0f}"
    svg = h("svg", drawn, class_="chart", viewBox=box, role="img", aria_label=says)
    return div("panel", h("h4", column_label(column), h("small", about)), svg)


def setting(column: str, rules: list[Limit], low: float, high: float) -> str:
    """The `--set` that moves the column's nearest threshold to the bar from `low` to `high`."""
    ends = [(abs(low - r.min), r.name, "min") for r in rules if r.min is not None]
    ends += [(abs(high - r.max), r.name, "max") for r in rules if r.max is not None]
    if not ends:
        name = "low_" + re.sub(r"\W", "_", column.removeprefix("score_"))
        return f"decide.rules.{name}={{column: {column}, min: {low:.4g}}}"
    _, name, word = min(ends)
    return f"decide.rules.{name}.{word}={low if word == 'min' else high:.4g}"
