"""Curves over the steps of training, as SVG that needs no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.report.html import NBSP, Child, Markup, div, h, number

POINTS = 400  # of a curve at most; of more rows, the mean of each stretch
COLUMNS = 80  # of a chart that answer to the pointer


@dataclass(frozen=True)
class Curve:
    """Values at increasing steps."""

    steps: np.ndarray
    values: np.ndarray

    def thinned(self) -> Curve:
        """Of at most POINTS points, each the mean of a stretch of as many."""
        if len(self.steps) <= POINTS:
            return self
        parts = [np.array_split(x, POINTS) for x in (self.steps, self.values)]
        return Curve(*(np.array([p.mean() for p in part]) for part in parts))

    def smoothed(self) -> Curve:
        """Exponential mean over about a fortieth of the points, unbiased at the start."""
        keep = 1 - 1 / max(1.0, len(self.values) / 40)
        total = weight = 0.0
        found = []
        for value in self.values.tolist():
            total, weight = keep * total + value, keep * weight + 1
            found.append(total / weight)
        return Curve(self.steps, np.array(found))


WIDE, HIGH, LEFT, TOP = 370.0, 170.0, 38.0, 8.0  # of a chart; the left has room for the ticks' numbers


@dataclass(frozen=True)
class Line:
    """A curve in a chart; colour is any CSS colour instead of the kind's."""

    label: str
    curve: Curve
    kind: str = "line"
    colour: str | None = None


def chart(
    title: str, lines: Sequence[Line], about: str = "", percent: bool = False, across: str = "step"
) -> Markup | None:
    """A panel with curves over the steps; None where there is nothing to draw."""
    lines = [line for line in lines if len(line.curve.steps)]
    if not lines:
        return None
    if all(len(line.curve.steps) == 1 for line in lines):
        return figures(title, lines, about, percent, across)
    scale = Scale.of(lines, percent)
    drawn: list[Child] = []
    for tick in scale.ticks:
        y = f"{scale.y(tick):.1f}"
        drawn.append(h("line", class_="grid", x1=LEFT, x2=WIDE, y1=y, y2=y))
        drawn.append(h("text", scale.label(tick), x=LEFT - 5, y=float(y) + 3.5, text_anchor="end"))
    for tick in scale.across:
        place = f"{min(max(scale.x(tick), LEFT + 8), WIDE - 14):.1f}"
        drawn.append(h("text", short(tick), x=place, y=HIGH + 14, text_anchor="middle"))
    for line in lines:
        points = scale.points(line.curve.thinned())
        style = f"stroke:{line.colour}" if line.colour else None
        drawn.append(h("polyline", class_=line.kind, points=points, style=style))
        if len(line.curve.steps) <= 40 and line.kind == "line" and not line.colour:
            places = (p.split(",") for p in points.split())
            drawn += [h("circle", class_="dot", cx=x, cy=y, r=2.2) for x, y in places]
    drawn += answers(lines, scale, across)
    box = f"0 0 {WIDE:.0f} {HIGH + 18:.0f}"
    svg = h("svg", drawn, class_="chart", viewBox=box, role="img", aria_label=f"{title} by {across}")
    about = ", ".join(filter(None, [about, "log scale" if scale.log else ""]))
    return div("panel", h("h4", title, h("small", about)), svg, key(lines))


def figures(title: str, lines: Sequence[Line], about: str, percent: bool, across: str) -> Markup:
    """A panel with numbers, of curves that have one point each."""
    said = []
    for line in lines:
        value = float(line.curve.values[0])
        text = f"{100 * value:.3g}{NBSP}%" if percent else number(value)
        said.append(h("li", h("b", text), f" {line.label}" if len(lines) > 1 else None))
    step = f"at {across} {number(float(lines[0].curve.steps[0]))}"
    return div(
        "panel",
        h("h4", title, h("small", about)),
        h("ul", said, class_="figures"),
        h("small", step, class_="soft"),
    )


def key(lines: Sequence[Line]) -> Markup | None:
    if len(lines) < 2:
        return None
    colours = {"raw": "var(--kept)", "first": "var(--found)", "floor": "var(--drop)"}
    items = []
    for line in lines:
        style = f"background:{line.colour or colours.get(line.kind, 'var(--kept)')}"
        style += ";opacity:.4" if line.kind == "raw" else ""
        items.append(h("li", h("i", class_="stroke", style=style), line.label))
    return h("ul", items, class_="key")


@dataclass(frozen=True)
class Scale:
    """Places of steps and values in a chart."""

    first: float
    last: float
    low: float
    high: float
    log: bool
    percent: bool
    ticks: list[float]
    across: list[float]

    @classmethod
    def of(cls, lines: Sequence[Line], percent: bool) -> Scale:
        """Ends at all of the calm curves and most of the raw ones, so that a few peaks flatten nothing."""
        values = np.concatenate(
            [
                np.clip(v, *np.percentile(v, [1, 99])) if line.kind == "raw" else v
                for line in lines
                for v in [line.curve.values]
            ]
        )
        steps = np.concatenate([line.curve.steps for line in lines])
        low, high = float(values.min()), float(values.max())
        log = low > 0 and high > 20 * low and not percent
        if log:
            ticks = log_ticks(low, high)
        else:
            if 0 <= low < 0.6 * high or (percent and low >= 0):
                low = 0.0
            if high - low <= 1e-9 * max(1.0, abs(high)):
                low, high = (0.0, 2 * high or 1.0) if high >= 0 else (low - 0.5, high + 0.5)
            ticks = linear_ticks(low, high)
            low, high = min(low, ticks[0]), max(high, ticks[-1])
        first, last = float(steps.min()), float(steps.max())
        if last <= first:
            first, last = first - 1, last + 1
        across = [t for t in linear_ticks(first, last, 5) if first <= t <= last]
        return cls(first, last, low, high, log, percent, ticks, across)

    def x(self, step: float) -> float:
        return LEFT + (WIDE - LEFT) * (step - self.first) / (self.last - self.first)

    def y(self, value: float) -> float:
        if self.log:
            value = max(value, self.low)
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return HIGH - (HIGH - TOP) * min(1.0, max(0.0, share))

    def points(self, curve: Curve) -> str:
        pairs = zip(curve.steps.tolist(), curve.values.tolist(), strict=True)
        return " ".join(f"{self.x(s):.1f},{self.y(v):.1f}" for s, v in pairs)

    def label(self, tick: float) -> str:
        return f"{number(100 * tick)}{NBSP}%" if self.percent else short(tick)


def linear_ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers from at or below `low` to the last at or below `high`, about `most`."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.floor(high / step + 1e-9)
    return [round(step * i, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 (or 1 alone) times powers of ten between the two, at least one."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    stride = max(1, len(decades) // 6)
    found = [m * 10.0**d for d in decades[::stride] for m in factors if low <= m * 10.0**d <= high]
    return found or [low]


def short(x: float) -> str:
    """A number in few letters: 12k, 1.5M, 0.0003 as 3e−4."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= unit and (unit > 1e3 or abs(x) >= 1e4):
            return f"{x / unit:.4g}{name}"
    if x and abs(x) < 1e-3:
        mantissa, power = f"{x:.1e}".split("e")
        return f"{float(mantissa):g}e{int(power)}".replace("-", "−")
    return f"{x:.4g}".replace("-", "−")


def answers(lines: Sequence[Line], scale: Scale, across: str) -> list[Markup]:
    """Columns over a chart that say every curve's mean between two steps."""
    places = np.unique(np.concatenate([line.curve.steps for line in lines]))
    found = []
    for part in np.array_split(places, min(COLUMNS, len(places))):
        first, last = float(part[0]), float(part[-1])
        said = [f"{across} {number(first)}" + (f" to {number(last)}" if last > first else "")]
        for line in lines:
            inside = (line.curve.steps >= first) & (line.curve.steps <= last)
            if inside.any():
                mean = float(line.curve.values[inside].mean())
                says = f"{100 * mean:.3g}{NBSP}%" if scale.percent else f"{mean:.4g}".replace("-", "−")
                said.append(f"{line.label}: {says}" if len(lines) > 1 else says)
        middle = scale.x((first + last) / 2)
        width = max((WIDE - LEFT) / min(COLUMNS, len(places)), scale.x(last) - scale.x(first))
        hit = h(
            "rect",
            class_="hit",
            x=f"{middle - width / 2:.1f}",
            y=TOP,
            width=f"{width:.1f}",
            height=HIGH - TOP,
        )
        spot = h("line", class_="spot", x1=f"{middle:.1f}", x2=f"{middle:.1f}", y1=TOP, y2=HIGH)
        found.append(h("g", hit, spot, data_tip="\n".join(said)))
    return found
