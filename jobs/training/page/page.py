"""A training run as one HTML page that opens from disk: curves, samples, plan and recipe.

`write` reads what `jobs.training.page.monitor` leaves in OUT and fills `page.html`. Like the page of a curation
run, whose looks it shares, it is built with `h`, which escapes every text, and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import itertools
import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import yaml

from jobs.training.page import said
from jobs.training.page.charts import Curve, Line, chart
from jobs.training.page.measures import LEVEL, Chart, charts, headline
from pipeline.report import page as report
from pipeline.report.html import NBSP, Child, Markup, div, h, join, note, number, span

COLOURS = ("kept", "drop", "blue", "gold", "violet")  # of curves that share a chart
SHORT = 40  # points of a curve of which none are smoothed
TRAINS = {
    "diffusion": "a diffusion model",
    "vae": "a video autoencoder",
    "vq": "an autoencoder with a codebook",
    "vivit": "a classifier of videos",
    "vlm": "a vision–language model",
    "world": "a world model",
    "selector": "a selector of captions",
}
DISTANCES = ("frechet", "kernel")
VIDEO_BYTES = 4_000_000  # of mp4 on the page, together
SHEETS, SHEET_BYTES = 24, 6_000_000  # steps in the history of samples, and their JPEGs together


def parse(line: bytes) -> dict[str, Any] | None:
    """A row of metrics.jsonl; None where the line is not whole."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


class Run:
    """What a run has left in OUT so far; what of it cannot be read is not on the page, and training goes on."""

    def __init__(self, out: Path, recipe: dict[str, Any]):
        self.out, self.recipe = out, recipe
        file = out / "metrics.jsonl"
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        parsed = (row for line in lines if (row := parse(line)) is not None)
        self.rows = [row for row in parsed if is_number(row.get("time"))]
        plan = out / "plan.txt"
        self.plan = plan.read_text(encoding="utf-8", errors="replace") if plan.exists() else ""
        last = self.rows[-1]["step"] if self.rows else -1
        self.samples: dict[int, Samples] = {}
        for file in sorted((out / "samples").glob("step-*/samples.json")):
            step = said.step_of(file.parent)
            if (
                step is not None and step <= last and (found := Samples.read(file))
            ):  # not those before a resume
                self.samples[step] = found
        self.said = said.read(out / "texts", last)

    def names(self) -> list[str]:
        """Of everything that was logged, in the order it first came."""
        return [n for n in dict.fromkeys(itertools.chain(*self.rows)) if n not in ("step", "time")]

    def curve(self, name: str) -> Curve:
        found = [(r["step"], r[name]) for r in self.rows if is_number(r.get(name))]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return Curve(np.array(steps, float), np.array(values, float))

    def last(self, name: str) -> float | None:
        return next((r[name] for r in reversed(self.rows) if is_number(r.get(name))), None)


def is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


@dataclass(frozen=True)
class Samples:
    """Of a step. sheet: a picture of all. videos: name → mp4."""

    sheet: Path
    videos: list[tuple[str, Path]]

    @classmethod
    def read(cls, listed: Path) -> Samples | None:
        """None where something of it cannot be read."""
        try:
            told = json.loads(listed.read_text(encoding="utf-8"))
            videos = [(str(t["name"]), listed.parent / Path(t["file"]).name) for t in told]
            sheet = listed.parent / "sheet.png"
            return cls(sheet, videos) if all(f.is_file() for f in (sheet, *(f for _, f in videos))) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


# ---------------------------------------------------------------- sections


def overview(run: Run) -> Markup:
    """Where the run stands, in one line and eight numbers."""
    step = run.rows[-1]["step"] if run.rows else 0
    steps = (run.recipe.get("run") or {}).get("steps") or step
    loss = run.curve(first_of(run, "loss"))
    seconds = sum(gaps(run.rows))
    pace = run.curve("step_seconds").values[-20:]
    share = f"{100 * step / steps:.0f}{NBSP}% of {steps:,}" if steps else ""
    left = (steps - step) * float(pace.mean()) if len(pace) else None
    tiles = [
        ("Step", f"{step:,}", share),
        ("Loss", number(loss.smoothed().values[-1]) if len(loss.values) else "–", "smoothed"),
        ("Gradient norm", number(run.last(first_of(run, "grad_norm"))), "before clipping"),
        ("Time", span(seconds), f"{span(left)} left" if left else "spent on the steps logged"),
        (
            "Tokens a second",
            number(run.last("tokens_per_second")),
            f"{number(run.last('samples_per_second'))} samples a second",
        ),
        ("MFU", percentage(run.last("mfu")), "of the device’s peak"),
        ("Data wait", percentage(run.last("data_wait")), "of the time"),
        quality(run),
    ]
    when = time.gmtime(run.rows[-1]["time"]) if run.rows else None
    model = run.recipe.get("model") or {}
    what = " ".join(str(model[k]) for k in ("kind", "preset") if model.get(k))
    trains = str(run.recipe.get("trains", "a model"))
    under = [
        run.out.name,
        f"trains {TRAINS.get(trains, trains)}" + (f" ({what})" if what not in ("", trains) else ""),
        when and time.strftime("last step logged %Y-%m-%d %H:%M UTC", when),
    ]
    return join(
        h(
            "header",
            h("h1", f"{run.recipe.get('name', run.out.name)}: step {step:,} of {steps:,}"),
            h("p", h("bdi", " · ".join(filter(None, under))), class_="soft"),
        ),
        None if run.rows else div("panel alert", h("p", "No step was logged yet.")),
        div(
            "tiles",
            (div("panel", h("span", a, class_="label"), h("b", b), h("span", c)) for a, b, c in tiles),
        ),
    )


def first_of(run: Run, name: str) -> str:
    """A name, or that of the first phase."""
    return next((n for n in run.names() if n == name or n.endswith(f"/{name}")), name)


def gaps(rows: list[dict[str, Any]]) -> Iterable[float]:
    """Seconds between rows, without the pauses in which the run stood still."""
    for before, after in itertools.pairwise(rows):
        gap = after["time"] - before["time"]
        pace = after.get("step_seconds")
        most = 600.0 if pace is None else 60.0 + 5 * pace * (after["step"] - before["step"])
        if 0 < gap < most:
            yield gap


def percentage(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.3g}{NBSP}%"


def quality(run: Run) -> tuple[str, str, str]:
    """The figure by which models of this kind are told apart, as a number of the top."""
    if names := [n for n in run.names() if re.fullmatch(r"frechet/[^/]+", n)]:
        title, name, percent, highest = "Fréchet distance", names[0], False, False
        about = f"{name.partition('/')[2]}; "
    elif found := headline(run.names()):
        measure, name = found
        title, percent, highest, about = measure.top, measure.percent, measure.best == "high", ""
    elif run.recipe.get("trains") == "diffusion":
        return "Fréchet distance", "–", "not measured"
    else:
        return "Peak memory", f"{number(run.last('peak_memory_gb'))}{NBSP}GB", "of a process or its GPU"
    curve, said_as = run.curve(name), percentage if percent else number
    if not len(curve.values):
        return title, "–", "no number"
    best = curve.values.argmax() if highest else curve.values.argmin()
    return (
        title,
        said_as(curve.values[-1]),
        f"{about}best {said_as(curve.values[best])} at step {number(curve.steps[best])}",
    )


def drawn(run: Run, what: Chart) -> Markup | None:
    """One chart: a long noisy curve also smoothed, several in colours of their own. None of broken samples where there
    were none."""
    measure = what.measure
    lines = []
    if len(what.lines) == 1:
        (name,) = what.lines.values()
        curve = run.curve(name)
        if name == "skipped" and not curve.values.any():
            return None
        lines = [Line("logged", curve, "raw"), Line("smoothed", curve.smoothed())]
        if len(curve.values) <= SHORT or measure.calm or measure.section == "quality":
            lines = [Line(what.title, curve)]
    else:
        plain = [label for label in what.lines if label not in measure.floor]
        for label, name in what.lines.items():
            curve = run.curve(name)
            if measure.section != "quality":
                curve = curve.smoothed()
            if label in measure.floor:
                lines.append(Line(label, curve, "floor"))
                continue
            place = plain.index(label)
            colour = f"var(--{COLOURS[place]})" if place < len(COLOURS) else "var(--found)"
            lines.append(Line(label or "model", curve, colour=colour if place else None))
    return chart(what.title, lines, measure.about, percent=measure.percent)


def curves(run: Run, section: str) -> Markup | None:
    """The charts of a section."""
    names = [n for n in run.names() if not LEVEL.fullmatch(n) and n.partition("/")[0] not in DISTANCES]
    found = [c for what in charts(names) if what.measure.section == section and (c := drawn(run, what))]
    return div("curves", found) if found else None


def by_level(run: Run) -> Markup | None:
    """At which noise the loss is, and how it fell there."""
    bins = {int(m[1]): run.curve(n) for n in run.names() if (m := LEVEL.fullmatch(n))}
    found = {i / 10: bins[i] for i in sorted(bins) if len(bins[i].steps)}
    if not found:
        return None
    lines = []
    for i, (level, curve) in enumerate(found.items()):
        mix = round(100 * i / max(1, len(found) - 1))
        colour = f"color-mix(in oklab, var(--kept), var(--drop) {mix}%)"
        lines.append(Line(f"{level:.2g} – {level + 0.1:.2g}", curve.smoothed(), colour=colour))
    levels = np.array(list(found)) + 0.05
    tenth = [max(1, len(c.values) // 10) for c in found.values()]
    start = Curve(levels, np.array([c.values[:n].mean() for c, n in zip(found.values(), tenth, strict=True)]))
    now = Curve(levels, np.array([c.values[-n:].mean() for c, n in zip(found.values(), tenth, strict=True)]))
    compared = [Line("first tenth of the run", start, "first"), Line("last tenth", now)]
    return join(
        note("Level 0 is clean data, 1 pure noise."),
        div(
            "curves",
            chart("Loss by noise level", compared, across="level"),
            chart("Over time", lines, "smoothed"),
        ),
    )


def distances(run: Run) -> Markup | None:
    """Distances of sampled to real videos."""
    drawn = []
    for name in run.names():
        kind, _, network = name.partition("/")
        if kind not in DISTANCES or network.endswith("/real"):
            continue
        lines = [Line("samples", run.curve(name))]
        lines.append(Line("real against real", run.curve(f"{name}/real"), "floor"))
        title = "Fréchet distance" if kind == "frechet" else "Kernel distance"
        drawn.append(chart(title, lines, f"over {network}"))
    said = (
        "Between features of sampled and of real videos; smaller is better. Compare numbers of one run only."
    )
    return join(note(said), div("curves", drawn)) if drawn else None


def samples(run: Run) -> Markup | None:
    """The newest videos, and the contact sheets of all steps."""
    if not run.samples:
        return None
    newest = max(run.samples)
    videos = run.samples[newest].videos
    cards, left = [], VIDEO_BYTES
    for name, file in videos:
        data = file.read_bytes()
        left -= len(data)
        if left < 0:
            break
        source = "data:video/mp4;base64," + base64.b64encode(data).decode()
        video = h("video", src=source, controls="", loop="", muted="", playsinline="", preload="auto")
        cards.append(h("figure", video, h("figcaption", name, class_="words")))
    rest = len(videos) - len(cards)
    more = f"{rest} more are in samples/step-{newest:08d}." if rest else None
    return join(
        h("h3", f"Step {newest:,}"),
        div("videos", cards),
        h("p", more, class_="soft small") if more else None,
        h("h3", "Over the steps"),
        history(run),
    )


def history(run: Run) -> Markup:
    """Contact sheets, first to last, with a slider to go through them."""
    steps = sorted(run.samples)
    chosen = [steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(len(steps), SHEETS))]
    figures: list[Markup] = []
    left = SHEET_BYTES
    for step in reversed(chosen):  # the newest first, where room is short
        data = jpeg(run.samples[step].sheet)
        left -= len(data)
        if left < 0:
            break
        source = "data:image/jpeg;base64," + base64.b64encode(data).decode()
        picture = h("img", src=source, alt=f"samples at step {step:,}", loading="lazy")
        figures.append(h("figure", h("figcaption", f"step {step:,}"), picture, data_step=f"step {step:,}"))
    last = len(figures) - 1
    slider = h("input", type="range", min=0, max=last, value=last, aria_label="Step of the samples")
    return div("history", div("pick", slider, h("output")), figures[::-1])


def jpeg(sheet: Path) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    with Image.open(sheet) as picture:
        picture.convert("RGB").save(data, "JPEG", quality=85)
    return data.getvalue()


def settings(run: Run) -> Markup:
    """What was announced, and the recipe."""
    parts: list[Child] = []
    if run.plan:
        parts += [h("h4", "Plan, made before the first step"), h("pre", run.plan, class_="plan")]
    text = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    return join(parts, h("h4", "Recipe, every value"), h("pre", text))


def render(run: Run) -> str:
    """The whole page."""
    trains = str(run.recipe.get("trains", ""))
    sections = [
        ("told", said.title(trains), said.section(run.out / "texts", run.said, trains)),
        ("samples", "Samples", samples(run)),
        ("loss", "Loss", curves(run, "loss")),
        ("quality", "Quality", curves(run, "quality")),
        ("levels", "Noise levels", by_level(run)),
        ("distance", "Distance to real videos", distances(run)),
        ("speed", "Speed", curves(run, "speed")),
        ("other", "Other measures", curves(run, "other")),
        ("plan", "Plan and recipe", settings(run)),
    ]
    sections = [s for s in sections if s[2]]
    links = [("overview", "Overview"), *((name, title) for name, title, _ in sections)]
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    house = Path(report.__file__).with_suffix(".html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=html.escape(f"clipmill · {run.recipe.get('name', run.out.name)}"),
        house=house.split("<style>")[1].split("</style>")[0].strip(),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        links=join(h("a", title, href=f"#{name}") for name, title in links),
        body=join(
            h("section", overview(run), id="overview"),
            (h("section", h("h2", title), content, id=name) for name, title, content in sections),
            h("footer", "Written by clipmill train. This page loads nothing and can be sent as one file."),
        ),
    )


def write(out: Path, recipe: dict[str, Any]) -> Path:
    """Write OUT/page.html; it changes in one move. Returns where it lies. Raises OSError."""
    said.replace(out / "page.html", render(Run(out, recipe)).encode("utf-8", "replace"))
    return out / "page.html"
