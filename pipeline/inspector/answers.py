"""What the inspector answers, as plain data: a run, its clips, one clip, votes and comparisons.

Every name that is given is looked up among those that there are; what is not there is NotThere, what cannot be answered
Wrong, each with a sentence.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.caption.text import sentences
from pipeline.decide.rules import CHOSEN, META
from pipeline.faults import StoreError
from pipeline.inspector import choices
from pipeline.inspector.blind import Blind, NoPair
from pipeline.inspector.captions import HUMAN
from pipeline.inspector.compare import Comparison
from pipeline.inspector.index import Index, finite
from pipeline.inspector.media import Media
from pipeline.inspector.near import Near, NotReady
from pipeline.inspector.query import FIXED, Filters, Query, Wrong, summary
from pipeline.inspector.search import Search
from pipeline.inspector.votes import KINDS, QUESTION, Votes

WEB = Path(__file__).parent / "web"
MOST_EDIT, MOST_WHO = 10_000, 64  # characters
LARGE, FIRST_PAGE_S = 200_000, 1.0  # clips, seconds
log = logging.getLogger("clipmill")

LABELS = {
    "agreement": "agreement of the captions",
    "fit": "fit of the chosen caption",
    "gap": "gap between models",
    "flag_count": "flags",
    "captions": "captions",
    "words": "words of the chosen caption",
    "duration_s": "seconds",
}


class NotThere(Exception):
    """What was asked for does not exist; the message is a sentence."""


class Inspector:
    """A run, and what is known of it besides its columns.

    Args:
        other: a run to compare it with.
        before: the same run as it was read before; votes, decoder and encoder are kept.
    """

    def __init__(self, index: Index, other: Inspector | None = None, before: Inspector | None = None):
        self.index, self.other = index, other
        self.media: Media = Media(index, before.media.decoder if before else None)
        self.near: Near = Near(index, before.near.encoder if before else None)
        self.search = Search(index)
        self._known_ends: dict[str, tuple[np.ndarray, tuple[float | None, float | None]]] = {}
        self.votes: Votes = before.votes if before else Votes(index.media)
        self.query = Query(index, lambda q: self.search.rows(q), self._alike, self._voted, self._version)
        self.failed = ""  # why the captions could not be read
        self.comparison = None if other is None else Comparison(index, other.index)
        self.blind = Blind(index, self.votes, other.index if other else None, self._in_other)
        self._busy = threading.Lock()

    def start(self) -> None:
        """Read captions and words in the background; of a large run once the first page had its time."""
        background = threading.Timer(FIRST_PAGE_S if len(self.index) > LARGE else 0.0, self.read)
        background.daemon = True
        background.start()

    def read(self) -> None:
        with self._busy:
            try:
                for index in (self.index, *([self.other.index] if self.other else ())):
                    index.read_measures()
                    index.read_captions()
                self.search.fill()
            except StoreError as e:
                self.failed = str(e)
                log.error("%s", e)

    def renewed(self) -> Inspector:
        """The run as it is now, complete; takes the place of this one. Raises StoreError."""
        other = self.other and Inspector(Index(self.other.index.store), before=self.other)
        new = Inspector(Index(self.index.store), other, before=self)
        new.read()
        if new.failed:
            raise StoreError(new.failed)
        for old in (self, self.other):
            if old is not None:
                old.search.stop()  # what is still asked of it is answered
        return new

    def close(self) -> None:
        self.search.close()
        self.media.close()
        self.votes.close()
        if self.other is not None:
            self.other.close()

    def _alike(self, asked: int | str) -> np.ndarray:
        try:
            return self.near.like(asked) if isinstance(asked, int) else self.near.described(asked)
        except NotReady as e:
            raise Wrong(str(e)) from e

    def _voted(self, kind: str) -> np.ndarray:
        self.votes.look()
        ids = pa.array(self.votes.clips(kind), pa.large_string())
        return pc.is_in(self.index.ids, value_set=ids).to_numpy(zero_copy_only=False)

    def _version(self, filters: Filters) -> Any:
        """What an answer depends on besides the columns."""
        words = self.search.done if filters.q else 0
        if filters.voted:
            self.votes.look()
        return words, self.votes.version if filters.voted else 0

    def _in_other(self, row: int) -> int | None:
        at = -1 if self.comparison is None else int(self.comparison.to[row])
        return None if at < 0 else at

    def of(self, run: str) -> Inspector:
        """This run, or the 'other'. Raises NotThere."""
        if run in ("", "this"):
            return self
        if run in ("other", "2") and self.other is not None:
            return self.other
        raise NotThere(f"there is no run {run[:40]!r} here")

    def row(self, clip_id: str) -> int:
        row = self.index.row(clip_id)
        if row is None:
            raise NotThere(f"there is no clip {clip_id[:40]!r} in this run")
        return row

    # ------------------------------------------------------------ answers

    def run(self) -> dict[str, Any]:
        index = self.index
        models = index.models.counts()
        names = dict.fromkeys([*models, *index.model.names])
        return {
            "name": _name(index),
            "uri": index.store.uri,
            "recipe": index.recipe.get("name"),
            "command": index.info.get("command"),
            "finished": index.info.get("finished"),
            "counts": {
                "clips": len(index),
                "kept": int(np.count_nonzero(index.kept == 1)),
                "undecided": int(np.count_nonzero(index.kept < 0)),
                "sources": len(index.sources.counts()),
                "seconds": round(float(np.nansum(index.numbers["duration_s"], dtype=np.float64)), 3),
            },
            "models": [
                {"name": n, "layer": n in index.layer_models, "clips": models.get(n, 0)} for n in names
            ],
            "columns": self._columns(),
            "flags": [{"name": n, "clips": c} for n, c in index.flags.counts().items()],
            "rules": index.rules,
            "buckets": list(index.buckets.counts()),
            "layers": [{"name": layer.name, "made": layer.made} for layer in index.layered.layers],
            "chooser": index.recipe.get("choose") or {},
            "fit_score": index.fit_score,
            "other": self.other and {"name": _name(self.other.index), "uri": self.other.index.store.uri},
            "can": {"like": self.near.pictures is not None, "text": self.near.words is not None},
            "reading": {
                "captions": index.captions_read,
                "words": self.search.done,
                "of": len(index),
                "done": index.ready and self.search.done >= len(index),
                "failed": self.failed,
            },
        }

    def _columns(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for name, values in self.index.numbers.items():
            ends = self._ends(name, values)
            label = LABELS.get(name, name.removeprefix("score_").replace("_", " "))
            if name.startswith(CHOSEN):
                label = f"{name.removeprefix(CHOSEN)} of the chosen caption"
            found.append(
                {"name": name, "kind": "number", "min": ends[0], "max": ends[1], "label": label}
                | {"made_of_captions": name in FIXED or name.startswith(CHOSEN)}
            )
        return found

    def _ends(self, name: str, values: np.ndarray) -> tuple[float | None, float | None]:
        """The least and the greatest of a column, looked for once."""
        known = self._known_ends.get(name)
        if known is None or known[0] is not values:
            some = values[np.isfinite(values)]
            ends = (finite(float(some.min())), finite(float(some.max()))) if len(some) else (None, None)
            known = self._known_ends[name] = (values, ends)
        return known[1]

    def clips(self, filters: Filters, offset: int, limit: int) -> dict[str, Any]:
        self.votes.look()
        found = self.query.found(filters)
        rows: list[dict[str, Any]] = []
        page = found.rows[offset : offset + limit].tolist()
        for row, caption in zip(page, self.index.chosen(page), strict=True):
            rows.append(summary(self.index, row, caption))
            rows[-1]["votes"] = self.votes.tally(rows[-1]["id"])
            if row in found.similarity:
                rows[-1]["similarity"] = finite(found.similarity[row])
        return {"total": len(found.rows), "rows": rows}

    def clip(self, row: int) -> dict[str, Any]:
        index = self.index
        all_ = index.details(row)
        self.votes.look()
        near = self.near.neighbours(row)
        clip_id = index.ids[row].as_py()
        before, after = index.source_neighbours(row)
        original = int(index.original[row])
        start = all_["start_frame"]
        frames = [f - start for f in all_.get("sample_frames") or []]
        captions = [self._caption(c, row) for c in all_["captions"] or []]
        scores = {n.removeprefix("score_"): v for n, v in all_.items() if n.startswith("score_")}
        return summary(index, row, *index.chosen([row])) | {
            "stills": index.still_count(row),
            "fps": all_["fps"],
            "frames": all_["end_frame"] - start,
            "sample_frames": frames,
            "sample_times": self._times(all_, frames),
            "scores": {n: None if v is None else finite(v) for n, v in scores.items()},
            "text": all_["text"] or [],
            "meta": all_["meta"],
            "captions": captions,
            "rules": self._rules(row, all_, captions),
            "provenance": self._provenance(all_),
            "duplicate_of": None if original < 0 else index.ids[original].as_py(),
            "duplicates": [index.ids[r].as_py() for r in index.copies(row)],
            "neighbours": [{"id": index.ids[r].as_py(), "similarity": finite(s)} for r, s in near or []],
            "neighbours_pending": near is None,
            "before": None if before is None else index.ids[before].as_py(),
            "after": None if after is None else index.ids[after].as_py(),
            "votes": self.votes.of(clip_id),
            "tally": self.votes.tally(clip_id),
            "media": {"tar": all_["media_tar"], "offset": all_["media_offset"], "size": all_["media_size"]},
        }

    def frames(self, row: int) -> dict[str, Any]:
        """When each frame of a clip is shown. Raises Gone, StoreError."""
        return {"times": self.media.times(row)}

    def _times(self, all_: dict[str, Any], frames: list[int]) -> list[float]:
        """When the frames that models were shown are shown, seconds from the clip's start."""
        pts, base = all_.get("sample_pts"), self.index.time_base(all_)
        if pts and base:
            return [round(float(p * base) - all_["start_s"], 6) for p in pts]
        return [round(f / all_["fps"], 6) if all_["fps"] else 0.0 for f in frames]

    def _caption(self, caption: dict[str, Any], row: int) -> dict[str, Any]:
        support = {n: [finite(x) for x in v or []] for n, v in caption["support"].items()}
        return {
            "model": caption["model"],
            "layer": caption["model"] in self.index.layer_models,
            "text": caption["text"] or "",
            "raw": caption.get("raw") or "",
            "outcome": caption["outcome"],
            "reason": caption.get("reason") or "",
            "prompt": caption.get("prompt") or "",
            "flags": caption.get("flags") or [],
            "made_from": caption.get("made_from") or [],
            "cost": caption["cost"],
            "scores": {n: None if v is None else finite(v) for n, v in caption["scores"].items()},
            "support": support,
            "sentences": sentences(caption["text"] or ""),
            "chosen": bool(caption["text"]) and caption["model"] == self.index.model[row],
        }

    def _rules(self, row: int, all_: dict[str, Any], captions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What every rule asked of a clip, and what it found."""
        chosen = next((c for c in captions if c["chosen"]), None)
        dropped = set(self.index.dropped.of(row))
        found = []
        for rule in self.index.rules:
            column = rule["column"] or ""
            value = all_.get(column)
            if column.startswith(META):
                value = all_["meta"].get(column.removeprefix(META))
            elif column.startswith(CHOSEN):
                value = chosen["scores"].get(column.removeprefix(CHOSEN)) if chosen else None
            elif column in ("caption", "caption_model"):
                value = chosen["text" if column == "caption" else "model"] if chosen else None
            elif column == "caption_flags":
                value = " ".join(chosen["flags"]) if chosen else None
            if isinstance(value, float):
                value = finite(value)
            asked = {k: rule[k] for k in ("name", "column", "min", "max", "words")}
            found.append(asked | {"value": value, "ok": rule["name"] not in dropped})
        return found

    def _provenance(self, all_: dict[str, Any]) -> dict[str, Any]:
        info = self.index.info
        return {
            "source_sha256": all_["source_sha256"],
            "media_sha256": all_["media_sha256"],
            "unit": all_["unit"],
            "start_frame": all_["start_frame"],
            "end_frame": all_["end_frame"],
            "recipe": self.index.recipe.get("name"),
            "measure_key": info.get("measure_key"),
            "versions": info.get("versions") or {},
            "layers": {layer.name: layer.made for layer in self.index.layered.layers},
        }

    # ------------------------------------------------------------ votes

    def vote(self, said: dict[str, Any]) -> dict[str, Any]:
        """Keep a vote. Raises Wrong, NotThere, StoreError."""
        clip, kind = _text(said, "clip", 64), _text(said, "kind", 16)
        row = self.row(clip)
        if kind not in KINDS or kind == "ab":
            raise Wrong(f"kind: one of {', '.join(k for k in KINDS if k != 'ab')}")
        vote = {"clip": clip, "kind": kind, "who": _who(said)}
        if said.get("id"):  # of whoever sends it, so that one that is sent again counts once
            vote["id"] = _text(said, "id", 36)
        if kind in ("best", "edit"):
            model = _text(said, "model", 500) if kind == "best" or said.get("model") else ""
            written = [c["model"] for c in self.index.details(row)["captions"] or [] if c["text"]]
            if model and model not in written:
                raise NotThere(f"no caption of {model[:80]!r} on this clip; there are {', '.join(written)}")
            vote["model"] = model
        if kind == "edit":
            vote["text"] = _text(said, "text", MOST_EDIT)
        kept = self.votes.add(vote)
        return {"ok": True, "vote": kept, "votes": self.votes.of(clip), "tally": self.votes.tally(clip)}

    def voters(self) -> dict[str, Any]:
        """Who voted how often, and how far they agree."""
        from models.measures.captions.agreement import alpha_interval, krippendorff_alpha

        self.votes.look(now=True)
        agreement = {}
        for question in dict.fromkeys(QUESTION.values()):
            units = self.votes.units(question)
            several = [u for u in units if len(u) > 1]
            ends = alpha_interval(units) if several else None
            agreement[question] = {
                "alpha": krippendorff_alpha(units),
                "low": ends and ends[0],
                "high": ends and ends[1],
                "clips": len(several),
                "pairs": sum(len(u) * (len(u) - 1) // 2 for u in several),
                "answered": len(units),
            }
        voted = len(self.votes.clips())
        return {
            "people": [{"who": who, "votes": n} for who, n in self.votes.people().items()],
            "agreement": agreement,
            "progress": {"clips": voted, "of": len(self.index)},
        }

    def export(self, kind: str) -> Iterator[dict[str, Any]]:
        """Lines of an export. Raises Wrong; StoreError while it is read."""
        self.votes.look(now=True)
        if kind == "choices":
            return choices.choices(self.index, self.votes)
        if kind == "votes":
            return iter(self.votes.all())
        raise Wrong(f"kind={kind[:40]}: write choices or votes")

    def edits(self) -> dict[str, Any]:
        """Make layers of what people wrote and chose; seen once the run is read anew. Raises StoreError."""
        self.votes.look(now=True)
        written = choices.write_layers(self.index, self.votes)
        uri = self.index.media.uri
        weights = f"{{{HUMAN}: 10, consensus: 1}}"
        return {
            "ok": True,
            "layers": written,
            "next": f"clipmill shard {uri} --set 'choose={{method: weights, weights: {weights}}}'",
        }

    # ------------------------------------------------------------ comparisons

    def pair(self, a: str, b: str, who: str, seed: int) -> dict[str, Any]:
        """The next blind pair. Raises NotThere."""
        self.votes.look()
        try:
            pair = self.blind.next(a, b, who, seed)
            enough = self.blind.enough(a, b)
        except NoPair as e:
            raise NotThere(str(e)) from e
        done = len(self.votes.ab((a, b)))
        return {"pair": pair.name, "clip": pair.clip, "left": pair.left, "right": pair.right} | {
            "done": done,
            "enough": enough,
        }

    def answer(self, said: dict[str, Any]) -> dict[str, Any]:
        """Keep an answer to a blind pair. Raises NotThere, StoreError."""
        try:
            self.blind.answer(_text(said, "pair", 120), _text(said, "answer", 8), _who(said))
        except NoPair as e:
            raise NotThere(str(e)) from e
        return {"ok": True}

    def result(self, a: str, b: str) -> dict[str, Any]:
        """Raises NotThere."""
        self.votes.look(now=True)
        try:
            return self.blind.result(a, b)
        except NoPair as e:
            raise NotThere(str(e)) from e

    def compared(self, change: str, offset: int, limit: int) -> dict[str, Any]:
        """Raises NotThere, Wrong."""
        if self.comparison is None:
            raise NotThere("there is one run here; give a second: clipmill inspect RUN RUN2")
        return self.comparison.rows(change, offset, limit)


def _name(index: Index) -> str:
    return index.store.uri.split("?")[0].rstrip("/").rpartition("/")[2]


def _text(said: dict[str, Any], name: str, most: int) -> str:
    """A text of a request's body. Raises Wrong."""
    value = said.get(name)
    if not isinstance(value, str) or not value.strip():
        raise Wrong(f"{name}: a text is needed")
    if len(value) > most:
        raise Wrong(f"{name}: at most {most:,} characters")
    return value


def _who(said: dict[str, Any]) -> str:
    return " ".join(_text(said, "who", MOST_WHO).split())
