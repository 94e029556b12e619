"""HTML that escapes what it is given, numbers as people read them, and the pieces pages are made of."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class Markup(str):
    """HTML that is ready; everything else `h` is given gets escaped."""

    __slots__ = ()


Child = str | None | Iterable["Child"]


def h(tag: str, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """One element: `h("td", "a < b", class_="num")`. Attributes that are None are left out."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    end = "" if tag in ("img", "input", "br") else f"</{tag}>"
    return Markup(f"<{tag}{written}>{join(*children)}{end}")


def div(kind: str, *children: Child) -> Markup:
    return h("div", *children, class_=kind)


def note(*children: Child) -> Markup:
    return h("p", *children, class_="note")


def join(*children: Child) -> Markup:
    """Children one after the other, escaped where they are not Markup."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(html.escape(child))
        elif child is not None:
            parts.append(join(*child))
    return Markup("".join(parts))


# ---- numbers as people read them ---------------------------------------------------------------------


NBSP = "\N{NO-BREAK SPACE}"


def number(x: float | None) -> str:
    """Three digits that matter, thousands in full: 0.3, 12.4, 4,096."""
    if x is None or not math.isfinite(x):
        return "–"
    text = f"{x:,.0f}" if abs(x) >= 1000 or float(x).is_integer() else f"{x:.3g}"
    return text.replace("-", "−")


def share(part: float, whole: float) -> str:
    """A percentage; never '0 %' for something nor '100 %' for less than all."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 1:
        return f"<{NBSP}1{NBSP}%"
    return f">{NBSP}99{NBSP}%" if 99 < percent < 100 else f"{percent:.0f}{NBSP}%"


def span(seconds: float) -> str:
    """A length of time: '12 ms', '3.2 s', '4 min 12 s', '1.25 h'."""
    if 0 < seconds < 0.0995:
        return f"{1000 * seconds:.2g}{NBSP}ms"
    if seconds < 59.95:
        return f"{seconds:.3g}{NBSP}s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}{NBSP}min" + (f" {rest}{NBSP}s" if rest else "")
    return f"{seconds / 3600:,.2f}{NBSP}h"


def clock(seconds: float) -> str:
    """A place in a video: '0:04.2', '1:02:03.5'."""
    tenths = round(seconds * 10)
    minutes, tenths = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}:{minutes:02d}" if hours else f"{minutes}") + f":{tenths // 10:02d}.{tenths % 10}"


def size_of(count: float) -> str:
    """Bytes: '512 B', '3.4 MB', '1.2 TB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g}{NBSP}{unit}"
        count /= 1000
    return f"{count:.3g}{NBSP}TB"


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


# ---- pieces of the page ------------------------------------------------------------------------------


def bar(part: float, whole: float, kind: str, text: str = "") -> Markup:
    """A count with its share as a bar; `kind` colours it, `text` stands in for the count."""
    width = 100 * min(1.0, part / whole) if whole else 0
    fill = h("i", class_=f"is-{kind}", style=f"width:{width:.2f}%") if part else None
    return div("bar", h("b", text or [f"{part:,.0f} ", h("small", share(part, whole))]), h("span", fill))


def table(kind: str, head: Sequence[str], rows: Iterable[Sequence[Child]], name: str | None = None) -> Markup:
    """A table in a box that scrolls sideways where the screen is narrow; a head ending in '#' is numbers."""
    kinds = ["num" if title.endswith("#") else None for title in head]
    top = (h("th", t.rstrip("#"), class_=k, scope="col") for t, k in zip(head, kinds, strict=True))
    body = (h("tr", (h("td", c, class_=k) for c, k in zip(r, kinds, strict=True))) for r in rows)
    return div("wide", h("table", h("thead", h("tr", top)), h("tbody", body), class_=kind, id=name))


@dataclass(frozen=True)
class Line:
    """A labelled bar."""

    label: str
    part: float
    whole: float
    beside: str = ""  # instead of the count
    below: str = ""  # the label


def bars(title: str, about: str, lines: Iterable[Line], kind: str = "kept") -> Markup:
    """A panel of labelled bars."""
    rows = []
    for line in lines:
        label = [h("bdi", line.label), h("span", line.below, class_="below") if line.below else None]
        rows.append(h("tr", h("td", label), h("td", bar(line.part, line.whole, kind, line.beside))))
    return div("panel", h("h4", title, h("small", about)), h("table", h("tbody", rows)))


def counted(counts: Counter[str], whole: int, most: int = 10) -> list[Line]:
    """The commonest of some counts, and the others together."""
    lines = [Line(label, n, whole) for label, n in counts.most_common(most)]
    if len(counts) > most:
        lines.append(Line(f"{len(counts) - most:,} more", counts.total() - sum(n.part for n in lines), whole))
    return lines


def rect(kind: str, x: float, y: float, width: float, height: float) -> Markup:
    numbers = {"x": x, "y": y, "width": width, "height": height}
    return h("rect", class_=kind, **{name: f"{value:.1f}" for name, value in numbers.items()})
