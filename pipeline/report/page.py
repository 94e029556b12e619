"""A finished run as one HTML page that opens offline: what came out, what was dropped, and why.

`write` reads the run's parquet files, decodes a bounded number of pictures straight from the staging
tars, and fills `report.html`. The page is built with `h`, which escapes every text it is given, so a
file name or caption can hold anything; a content security policy backs it up.
"""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from pipeline.io.store import Store, below
from pipeline.report.data import DROPPED_SHOWN, Limit, Run, all_pictures, choose
from pipeline.report.histograms import column_label, condition, histograms, shard_command
from pipeline.report.html import (
    NBSP,
    Child,
    Line,
    Markup,
    bar,
    bars,
    clock,
    counted,
    div,
    h,
    join,
    note,
    number,
    plural,
    share,
    size_of,
    span,
    table,
)

SOURCES_SHOWN = 300  # rows of the table


# ---- the sections of the page, from the top ----------------------------------------------------------


def overview(run: Run) -> Markup:
    """The run in one sentence, eight numbers and one bar."""
    videos, keep = run.videos, run.keep
    errors = [v for v in videos if v["status"] == "error"]
    good = [v for v in videos if v["status"] == "ok"]
    warned = sum(bool(v["warnings"]) for v in videos)
    length = np.nan_to_num(run.values("duration_s"))
    read, frames = sum(v["duration_s"] or 0.0 for v in good), sum(v["frames"] or 0 for v in good)
    found, kept = float(length.sum()), float(length[keep].sum())
    twin = np.array([d is not None for d in run.duplicate_of], bool) & ~keep
    tars, packed = run.shards()
    wall = run.info.get("wall_s") or 0.0
    machine = [plural(int(n), what) for what in ("CPU", "GPU") if (n := run.info.get(f"{what.lower()}s"))]
    tiles = [
        ("Sources", f"{len(videos):,}", f"{plural(len(errors), 'error')}, {warned:,} with warnings"),
        ("Clips found", f"{len(keep):,}", f"{span(found)}, {span(found / max(1, len(keep)))} on average"),
        ("Clips kept", f"{keep.sum():,}", f"{share(keep.sum(), len(keep))} of the clips found"),
        ("Video in", span(read), f"{frames:,} frames"),
        ("Video out", span(kept), f"{share(kept, read)} of the video in"),
        ("Shards", plural(tars, "tar"), size_of(packed)),
        ("Speed", f"{number(read / wall)}{NBSP}×", f"real time; {number(frames / wall)} frames a second")
        if wall
        else ("Speed", "–", "not recorded"),
        (
            "Wall time",
            span(wall) if wall else "–",
            f"on {' and '.join(machine)}" if machine else "not recorded",
        ),
    ]
    when = str(run.info.get("finished") or run.info.get("started") or "")[:16].replace("T", " ")
    recipe = run.recipe.get("name")
    under = [run.store.uri, recipe and f"recipe {recipe}", when and f"{when} UTC"]
    title = f"{keep.sum():,} of {plural(len(keep), 'clip')} kept from {plural(len(videos), 'source')}"
    return join(
        h("header", h("h1", title), h("p", h("bdi", " · ".join(filter(None, under))), class_="soft")),
        notices(run, errors),
        div(
            "tiles",
            (div("panel", h("span", a, class_="label"), h("b", b), h("span", c)) for a, b, c in tiles),
        ),
        where_it_went(read, found, kept, float(length[twin].sum())),
    )


def notices(run: Run, errors: list[dict[str, Any]]) -> Markup | None:
    """What a reader must know before believing the numbers."""
    said: list[Child] = []
    if not run.videos:
        said.append("No source was processed: this run is empty.")
    elif not run.info.get("finished"):
        said.append("This run has not finished: run the same clipmill curate command again to go on.")
    if undecided := int((~run.decided).sum()):
        said.append(
            [f"{plural(undecided, 'clip')} not decided on yet: run ", h("code", shard_command(run)), "."]
        )
    if errors:
        stages = ", ".join(f"{n:,} in {s}" for s, n in Counter(v["stage"] for v in errors).most_common())
        why = h("a", "See why", href="#sources")
        said.append([f"{plural(len(errors), 'source')} could not be used ({stages}). ", why])
    return div("panel alert", (h("p", s) for s in said)) if said else None


def where_it_went(read: float, found: float, kept: float, twins: float) -> Markup | None:
    """Every second of video read, in one bar."""
    parts = [
        ("is-kept", "kept", kept),
        ("is-drop", "dropped by a rule", found - kept - twins),
        ("is-twin", "near-duplicates", twins),
        ("is-rest", "in no clip (too short, or at a cut)", max(0.0, read - found)),
    ]
    parts = [p for p in parts if p[2] > 1e-6]
    whole = sum(p[2] for p in parts)
    strip, key = [], []
    for kind, what, seconds in parts:
        says = f"{span(seconds)}, {share(seconds, whole)}"
        strip.append(h("i", class_=kind, style=f"flex:{seconds / whole:.5f}", data_tip=f"{what}: {says}"))
        key.append(h("li", h("i", class_=kind), f"{what} ", h("span", says, class_="soft")))
    title = h("h4", f"Where {span(read)} of video went")
    return div("panel flow", title, div("split", strip), h("ul", key, class_="key")) if parts else None


def drops(run: Run) -> Markup | None:
    """What each rule drops by itself, and what is left as they are applied in order."""
    total = int(run.decided.sum())
    if not total:
        return None
    rows: list[Sequence[Child]] = [["found", "", "", "", bar(total, total, "found")]]
    for limit in run.limits:
        alone, left = bar(limit.alone, total, "drop"), bar(limit.left, total, "kept")
        rows.append([h("b", limit.name, class_="words"), condition(limit), alone, f"{limit.only:,}", left])
    before: Counter[str] = Counter()
    for video in run.videos:
        before.update(dict(video["counts"] or []))
    on_the_way = ", ".join(f"{what.replace('_', ' ')} {n:,}" for what, n in before.items() if n)
    head = ["Rule", "Keeps a clip when", "Drops alone", "Only it#", "Left after it"]
    return join(
        note(
            "A clip is kept when it passes every rule. ‘Drops alone’ counts the clips a rule drops by itself, ",
            "‘only it’ those no other rule would have dropped, ‘left after it’ what remains as the rules are ",
            "applied from the top. A score that was not measured passes.",
        ),
        div("panel", table("funnel", head, rows)),
        h("p", f"Counted on the way to the clips: {on_the_way}.", class_="soft small")
        if on_the_way
        else None,
    )


def sheets(run: Run) -> list[tuple[str, str, Markup | None]]:
    """The sections with pictures: kept, dropped by rule, duplicates."""
    shown = choose(run)
    rows = shown.rows()
    details, got = run.details(rows), all_pictures(run, rows)

    def cards(which: list[int], rule: Limit | None = None) -> Iterable[Markup]:
        for i in which:
            why = h("span", reason(rule, details[i]), class_="why") if rule else None
            yield card(run, i, details[i], got[i], why)

    kept = note(
        f"{len(shown.kept):,} of {int(run.keep.sum()):,}, spread evenly over the sources. Move over a picture to ",
        "run through the clip, click it for every caption and score.",
    )
    groups = []
    for rule in run.limits:
        which = shown.dropped.get(rule.name)
        if which is None or not rule.alone:
            continue
        title = h("h3", rule.name, h("small", f"{condition(rule)} · drops {plural(rule.alone, 'clip')}"))
        elsewhere = h("p", "Each of them is shown under another rule.", class_="soft")
        groups.append(join(title, div("sheet", cards(which, rule)) if which else elsewhere))
    dropped = note(
        f"Up to {DROPPED_SHOWN} a rule, the closest calls first: if those look good, the threshold is too strict. ",
        "A clip that fails several rules is shown once.",
    )
    pairs = []
    for original, copy in shown.twins:
        same = details[original]["source"] == details[copy]["source"]
        label = h("span", f"copy, {'same' if same else 'another'} source", class_="why")
        kept_one = card(run, original, details[original], got[original], h("span", "kept", class_="why good"))
        pairs.append(div("panel", kept_one, card(run, copy, details[copy], got[copy], label)))
    copies = sum(d is not None for d in run.duplicate_of)
    twins = note(f"{plural(copies, 'clip')} dropped for a better copy, each beside the one that was kept.")
    return [
        ("kept", "Kept clips", join(kept, div("sheet", cards(shown.kept))) if shown.kept else None),
        ("dropped", "Dropped clips", join(dropped, groups) if groups else None),
        ("duplicates", "Duplicates", join(twins, div("twins", pairs)) if pairs else None),
    ]


def card(run: Run, i: int, row: dict[str, Any], got: list[bytes] | str, why: Markup | None) -> Markup:
    """One clip: its pictures, why it is here, what was said of it, and where it is from."""
    when = f"{clock(row['start_s'])} – {clock(row['end_s'])}"
    inside: list[Child] = [got] if isinstance(got, str) else []
    if not isinstance(got, str):
        data = [base64.b64encode(jpeg).decode() for jpeg in got]
        inside += [h("img", src=f"data:image/jpeg;base64,{d}", alt="") for d in data]
        inside.append(h("span", [h("i")] * len(got), class_="dots"))
    inside.append(h("span", span(row["duration_s"]), class_="time"))
    kind = "frames blind" if isinstance(got, str) else "frames"
    label = f"Open the clip at {when} of {row['name']}"
    picture = h("button", inside, class_=kind, data_at="1", type="button", aria_label=label)

    decision = run.decisions.slice(i, 1).to_pylist()[0]
    said, model = decision["caption"], decision["caption_model"]
    captions = [candidate(c, c["model"] == model and c["text"] == said) for c in row["captions"] or []]
    facts = [(column_label(n), number(v)) for n, v in row.items() if n.startswith("score_") and v is not None]
    facts += [("text read", " · ".join(row["text"][:6]))] if row["text"] else []
    facts += [("frames", f"{row['start_frame']:,} – {row['end_frame']:,} at {number(row['fps'])} a second")]
    facts += [("clip", row["clip_id"])]
    facts += [("shard", f"{decision['shard']} at byte {decision['offset']:,}")] if decision["offset"] else []
    facts += [("fails", ", ".join(run.dropped_by[i]))] if run.dropped_by[i] else []
    facts += [(f"source: {k}", (v or "")[:300]) for k, v in row["meta"] or []]
    listed = h("dl", ([h("dt", a), h("dd", b, class_="words")] for a, b in facts), class_="facts")
    about = f"{plural(len(captions), 'caption')}, every score" if captions else "every score"
    body = div(
        "body",
        why,
        h("p", said, class_="said words") if said else None,
        h(
            "p",
            h("bdi", row["name"], title=row["source"]),
            f"{when} · {row['width']} × {row['height']}",
            class_="from",
        ),
        h("details", h("summary", about), div("more", h("ul", captions, class_="said-by"), listed)),
    )
    return h("article", picture, body, class_="clip")


def candidate(caption: dict[str, Any], chosen: bool) -> Markup:
    """One captioner's sentence with its scores."""
    who = [caption["model"], *(f"{n.replace('_', ' ')} {number(s)}" for n, s in caption["scores"] or [])]
    if caption["outcome"] not in ("ok", None):
        who.append(caption["outcome"])
    text = h("span", caption["text"] or caption.get("reason") or "(nothing)", class_="words")
    return h("li", h("span", " · ".join(who), class_="who"), text, class_="chosen" if chosen else None)


def reason(rule: Limit, row: dict[str, Any]) -> str:
    """'motion 0.12 < 0.3', or the rule's name where it is not about one measured number."""
    value = row.get(rule.column) if rule.column else None
    if value is None or rule.words:
        return rule.name.replace("_", " ")
    below = rule.min is not None and value < rule.min
    sign, bound = ("<", rule.min) if below else (">", rule.max)
    return f"{column_label(rule.column or '')} {value:.4g} {sign} {number(bound)}"


def shape(run: Run) -> Markup | None:
    """Lengths, sizes, buckets and caption models of the kept clips."""
    kept = int(run.keep.sum())
    if not kept:
        return None
    length = run.values("duration_s")[run.keep]
    lengths = []
    limits = [0.0, *((run.recipe.get("shards") or {}).get("lengths_s") or (4, 8, 16, 32)), math.inf]
    for low, high in itertools.pairwise(limits):
        label = f"{number(low)} – {number(high)} s" if high < math.inf else f"{number(low)} s and longer"
        lengths.append(Line(label, int(((length >= low) & (length < high)).sum()), kept))
    clips, decisions = run.clips.filter(pa.array(run.keep)), run.decisions.filter(pa.array(run.keep))
    sizes = zip(clips["width"].to_pylist(), clips["height"].to_pylist(), strict=True)
    tars = [s or "not packed" for s in decisions["shard"].to_pylist()]
    buckets = Counter(t.removeprefix("shards/").rpartition("/")[0] or t for t in tars)
    authors = Counter(m or "no caption" for m in decisions["caption_model"].to_pylist())
    words = [len(c.split()) for c in decisions["caption"].to_pylist() if c]
    said = f"{sum(words) / len(words):.1f} words on average" if words else "none"
    return div(
        "bars",
        bars("Length", "kept clips", lengths),
        bars("Resolution", "kept clips", counted(Counter(f"{w} × {t}" for w, t in sizes), kept)),
        bars("Buckets", f"{plural(len(set(tars)), 'tar')} of one shape and length", counted(buckets, kept)),
        bars("Chosen captions", said, counted(authors, kept)),
    )


def sources(run: Run) -> Markup | None:
    """Every source, those with trouble first."""
    if not run.videos:
        return None
    kept = Counter(itertools.compress(run.clips["source"].to_pylist(), run.keep))
    by_trouble = sorted(
        run.videos, key=lambda v: (v["status"] != "error", not v["warnings"], v["name"] or v["source"])
    )
    rows: list[Sequence[Child]] = []
    for v in by_trouble[:SOURCES_SHOWN]:
        state, kind, trouble = "ok", "tag", ""
        if v["status"] == "error":
            state, kind, trouble = f"failed in {v['stage']}", "tag bad", v["error"] or ""
        elif v["warnings"]:
            state, kind, trouble = "warning", "tag odd", "; ".join(v["warnings"])
        name, size = h("bdi", v["name"] or v["source"], title=v["source"]), f"{v['width']} × {v['height']}"
        picture = f"{size}, {v['fps'] or 0:.4g} fps".replace(" ", NBSP) if v["width"] else "–"
        length = span(v["duration_s"]) if v["duration_s"] is not None else "–"
        spent = span(sum(s for _, s in v["seconds"] or []))
        counts = f"{v['clips'] or 0:,}", f"{kept[v['source']]:,}"
        reason = h("span", trouble, class_="reason words")
        rows.append(
            [name, h("span", state, class_=kind), reason, length, picture, v["codec"] or "–", *counts, spent]
        )
    titles = [
        "Source",
        "State",
        "What went wrong",
        "Length#",
        "Picture",
        "Codec",
        "Clips#",
        "Kept#",
        "Time spent#",
    ]
    hint = "Find a source, stage or reason"
    rest = len(run.videos) - len(rows)
    return join(
        h("input", class_="find", type="search", placeholder=hint, aria_label=hint, data_rows="source-table"),
        div("panel tall", table("sources", titles, rows, name="source-table")),
        h("p", f"{rest:,} more sources are in videos/*.parquet.", class_="soft small") if rest else None,
    )


def timing(run: Run) -> Markup | None:
    """Where the seconds went: by stage, and the sources that took longest."""
    stages: Counter[str] = Counter()
    for v in run.videos:
        stages.update(dict(v["seconds"] or []))
    whole = stages.total()
    if not whole:
        return None
    read = sum(v["duration_s"] or 0.0 for v in run.videos if v["status"] == "ok")
    by_stage = []
    for stage, t in stages.items():
        below = f"{span(60 * t / read)} a minute of video" if read else ""
        by_stage.append(Line(stage, t, whole, f"{span(t)}, {share(t, whole)}", below))
    spent = sorted(
        ((sum(s for _, s in v["seconds"] or []), n) for n, v in enumerate(run.videos)), reverse=True
    )
    slowest = []
    for t, n in spent[:10]:
        v = run.videos[n]
        most = max(v["seconds"] or [("nothing", 0.0)], key=lambda s: s[1])[0]
        length = f"{span(v['duration_s'])} of video, " if v["duration_s"] else ""
        slowest.append(Line(v["name"] or v["source"], t, spent[0][0], span(t), f"{length}mostly {most}"))
    return join(
        note(f"{span(whole)} of work on {span(read)} of video, all workers added up."),
        div(
            "bars two",
            bars("Stages", "in the order the data flows", by_stage),
            bars("Slowest sources", "all stages together", slowest, "found"),
        ),
    )


def settings(run: Run) -> Markup:
    """How to decide again, and how the run was made."""
    example = "decide.rules.too_short={column: duration_s, min: 3}"
    for rule in run.limits:
        for word, value in (("min", rule.min), ("max", rule.max)):
            if value is not None:
                example = f"decide.rules.{rule.name}.{word}={value:g}"
    parts: list[Child] = [
        note(
            "Clips, scores and captions are measured once. Thresholds are applied afterwards: change one, and the ",
            "shards are packed again without running a model.",
        ),
        h("pre", shard_command(run, example), class_="all"),
    ]
    if command := run.info.get("command"):
        parts += [h("h4", "The run was made by"), h("pre", str(command), class_="all")]
    if run.recipe:
        text = yaml.safe_dump(
            run.recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
        )
        parts += [h("h4", "Its recipe, every value"), h("pre", text)]
    facts = dict(run.info.get("versions") or {})
    facts |= {
        k.replace("_", " "): run.info[k] for k in ("started", "finished", "measure_key") if run.info.get(k)
    }
    listed = ([h("dt", str(a)), h("dd", str(b))] for a, b in facts.items())
    return join(parts, h("dl", listed, class_="facts"))


def page(run: Run) -> str:
    """The whole page."""
    sections = [
        ("funnel", "Funnel", drops(run)),
        *sheets(run),
        ("scores", "Scores", histograms(run)),
        ("shape", "Shape of the set", shape(run)),
        ("sources", "Sources", sources(run)),
        ("time", "Time", timing(run)),
        ("recipe", "Recipe", settings(run)),
    ]
    sections = [s for s in sections if s[2]]
    links = [("overview", "Overview"), *((name, title) for name, title, _ in sections)]
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    return Template(template).substitute(
        title=html.escape(f"clipmill · {run.store.uri}"),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        links=join(h("a", title, href=f"#{name}") for name, title in links),
        body=join(
            h("section", overview(run), id="overview"),
            (h("section", h("h2", title), content, id=name) for name, title, content in sections),
            h("footer", "Written by clipmill report. This page loads nothing and can be sent as one file."),
        ),
    )


def write(store: Store) -> str:
    """Write `report.html` into the run; returns where it lies.

    Raises StoreError where there is no run, or a file of it cannot be read or written.
    """
    # A run's command line may hold a file name that is no Unicode; the page shows what it can of it.
    store.write_bytes("report.html", page(Run(store)).encode("utf-8", "replace"))
    return below(store.uri, "report.html")
