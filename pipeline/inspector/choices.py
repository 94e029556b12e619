"""What votes become: training data for a selector, and layers that `clipmill shard` chooses by.

Two layers, written anew each time from all that stands:

- `caption:edited`: the text that a person wrote, as a candidate of its own;
- `judge:human`: a score `human` of every caption that was voted on, the share of people who would have it.

With `choose={method: weights, weights: {human: 10, consensus: 1}}` people decide where they did, and consensus does
where nobody voted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from pipeline import layers
from pipeline.faults import StoreError
from pipeline.inspector.captions import HUMAN
from pipeline.inspector.index import Index
from pipeline.inspector.votes import Votes
from pipeline.layers import Layer
from pipeline.record import Caption
from pipeline.tables import caption_row

EDITED = "edited"
LAYERS = (f"caption:{EDITED}", f"judge:{HUMAN}")


def choices(index: Index, votes: Votes) -> Iterator[dict[str, Any]]:
    """Every standing choice of every person, with all the captions there were to choose from: Panda-70M's form.

    `chosen`: index into `captions`; none where all are bad or the person wrote another (`edit`). Raises StoreError.
    """
    wanted = votes.clips("best") + votes.clips("bad") + votes.clips("edit")
    rows = {row: clip for clip in dict.fromkeys(wanted) if (row := index.row(clip)) is not None}
    for row, clip in index.many(sorted(rows)):
        captions = [{"model": c["model"], "text": c["text"]} for c in clip["captions"] or [] if c["text"]]
        models = [c["model"] for c in captions]
        for vote in votes.of(rows[row]):
            if vote["kind"] not in ("best", "bad", "edit"):
                continue
            model = vote.get("model") if vote["kind"] == "best" else None
            yield {
                "clip_id": rows[row],
                "source": clip["source"],
                "start_s": clip["start_s"],
                "end_s": clip["end_s"],
                "captions": captions,
                "chosen": models.index(model) if model in models else None,
                "chosen_model": model,
                "all_bad": vote["kind"] == "bad",
                "edit": vote["text"] if vote["kind"] == "edit" else None,
                "who": vote["who"],
                "at": vote["at"],
            }


def write_layers(index: Index, votes: Votes) -> dict[str, int]:
    """Both layers; returns the clips that each has. Raises StoreError, also while something else writes the run."""
    store = index.media
    edited: dict[str, list[dict[str, Any]]] = defaultdict(list)  # by unit
    judged: dict[str, list[dict[str, Any]]] = defaultdict(list)
    wanted = {c for kind in ("best", "bad", "edit") for c in votes.clips(kind)}
    rows = {row: clip for clip in wanted if (row := index.row(clip)) is not None}
    for row, clip in index.many(sorted(rows)):
        its = [v for v in votes.of(rows[row]) if v["kind"] in ("best", "bad", "edit")]
        edits = [v for v in its if v["kind"] == "edit" and v["text"].strip()]
        if edits:
            made_from = [edits[-1]["model"]] if edits[-1]["model"] else []
            caption = Caption(EDITED, edits[-1]["text"].strip(), made_from=made_from)
            edited[clip["unit"]].append({"clip_id": rows[row], "caption": caption_row(caption)})
        models = dict.fromkeys(c["model"] for c in clip["captions"] or [] if c["text"])
        for_it = {m: sum(v["kind"] == "best" and v["model"] == m for v in its) for m in models}
        if edits:
            for_it[EDITED] = len(edits)
        told = [{"model": m, "scores": [(HUMAN, n / len(its))], "support": []} for m, n in for_it.items()]
        judged[clip["unit"]].append({"clip_id": rows[row], "judged": told})
    if not rows:
        raise StoreError(f"{store.uri} has no votes on captions yet")
    with store.lock():
        layers.unjudge(store, EDITED)
        there = {layer.name: layer for layer in layers.layers(store)}
        number = max((layer.number for layer in there.values()), default=0)
        for name, by_unit in zip(LAYERS, (edited, judged), strict=True):
            number += name not in there
            at = there[name].number if name in there else number
            layer = Layer(name, at, made=datetime.now(UTC).isoformat(timespec="seconds"))
            if name in there:
                layers.remove(store, name)
            if by_unit:
                layers.create(store, layer)
            for unit, of_unit in by_unit.items():
                layers.write(store, layer, unit, of_unit)
    return {n: sum(map(len, u.values())) for n, u in zip(LAYERS, (edited, judged), strict=True)}
