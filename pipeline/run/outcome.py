"""What came out of a run, for the person who started it: counts, reasons, the command that goes on from here."""

from __future__ import annotations

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.caption import answers
from pipeline.decide.rules import funnel
from pipeline.faults import counted
from pipeline.io.store import Store
from pipeline.layers import Layered, unit_of
from pipeline.run.commit import tables

REASONS = 5  # shown of each kind of trouble
WARNINGS = 3  # shown of what was survived
EXAMPLES = 3  # names shown of each reason
CAPTION_WARNING = re.compile(
    r"caption:(.+?): clip ([0-9a-f]{20}): (.*)", re.S
)  # see pipeline.caption.captioner
NO_FRAME = re.compile(r"interval (\S+ s) holds no frame: ")  # see pipeline.split.shots.given_shots


class Exit(IntEnum):
    """What `clipmill curate` leaves as its exit status."""

    OK = 0  # something is kept
    NOTHING_KEPT = 1
    BAD_INPUT = 2  # as argparse has it
    ERRORS = 3  # something is kept, but not everything went well; only with --strict
    OUTPUT = 4
    ENDED = 5  # the workers or the cluster
    INTERRUPTED = 130
    TERMINATED = 143


@dataclass
class Reason:
    """Faults of one wording."""

    text: str  # of the first of them, without its source's name
    count: int = 0
    names: list[str] = field(default_factory=list)  # the first few

    def line(self) -> str:
        more = ", …" if self.count > len(self.names) else ""
        return f"{self.count:>7,} × {self.text}" + (f" ({', '.join(self.names)}{more})" if self.names else "")


@dataclass
class Outcome:
    """The state of a run's folder. Counts are of everything in it, not of the last command alone."""

    clips: int = 0
    kept: int = 0
    seconds: float = 0.0  # of all clips
    kept_s: float = 0.0
    dropped: dict[str, int] = field(
        default_factory=dict
    )  # rule, in order → clips that fail it and none before
    sources: int = 0  # without error
    without_clip: list[Reason] = field(default_factory=list)  # why sources without error gave no clip
    earlier: int = 0  # sources that failed in an earlier command
    unlisted: int = 0  # of all sources, those that the list at hand does not name
    empty: list[str] = field(default_factory=list)  # given intervals that hold no frame: 'a.mp4 500–510 s'
    warned: int = 0  # sources without error that have other warnings, captioners' apart
    warnings: list[Reason] = field(default_factory=list)  # theirs, most frequent first
    errors: dict[str, list[Reason]] = field(
        default_factory=dict
    )  # kind of fault → its reasons, most frequent first
    caption_errors: dict[str, list[Reason]] = field(default_factory=dict)  # captioner → its reasons
    silent: dict[str, dict[str, int]] = field(
        default_factory=dict
    )  # captioner whose captions hold no text but flags: 'broken_json' → clips
    behind: dict[str, int] = field(default_factory=dict)  # layer → clips of which it says nothing
    tars: int = 0
    served: dict[str, float] = field(
        default_factory=dict
    )  # what the last command asked of served models, see pipeline.caption.answers.account

    @property
    def failed(self) -> int:
        """Sources that ended in an error."""
        return _total(self.errors)

    @property
    def captions_failed(self) -> int:
        return _total(self.caption_errors)

    def exit(self, strict: bool = False) -> Exit:
        if not self.kept:
            return Exit.NOTHING_KEPT
        return Exit.ERRORS if strict and (self.failed or self.captions_failed) else Exit.OK

    def plain(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "clips": self.clips,
            "kept": self.kept,
            "seconds": round(self.seconds, 3),
            "kept_s": round(self.kept_s, 3),
            "dropped": self.dropped,
            "sources": {
                "ok": self.sources,
                "errors": {k: sum(r.count for r in v) for k, v in self.errors.items()},
                "unlisted": self.unlisted,
                "warned": self.warned,
            },
            "without_clip": _count(self.without_clip),
            "empty_intervals": len(self.empty),
            "caption_errors": {k: sum(r.count for r in v) for k, v in self.caption_errors.items()},
            "tars": self.tars,
            "served": self.served,
        }

    def lines(self, command: str, where: dict[str, str], sources: bool = True, folder: str = "") -> list[str]:
        """What a person reads at the end.

        Args:
            command: that was run; with --retry-errors it is the one that tries again.
            where: what lies where, in the order it is named.
            sources: it tries them again too, and not captions alone.
            folder: the run's, as typed.
        """
        said = [
            f"kept {self.kept:,} of {counted(self.clips, 'clip')} ({self.kept_s:,.1f} of {self.seconds:,.1f} s)"
        ]
        if not self.clips:
            said = ["kept nothing: no source gave a clip"]
        gone = [f"{rule} {n:,}" for rule, n in self.dropped.items() if n]
        if gone:
            said.append(f"dropped by, in order: {', '.join(gone)}")
        ours = f"sources: {self.sources:,} ok, {counted(self.failed, 'error')}"
        if self.earlier:
            ours += (
                ", all before this command"
                if self.earlier == self.failed
                else f", {self.earlier:,} of them before this command"
            )
        if self.unlisted:
            are = "is" if self.unlisted == 1 else "are"
            ours += f"; of which {self.unlisted:,} {are} no longer in the list"
        said.append(ours)
        for kind, reasons in self.errors.items():
            said += _shown(f"  {KINDS.get(kind, kind)}: {_count(reasons):,}", reasons)
        if n := _count(self.without_clip):
            why = ", ".join(f"{r.text} {r.count:,}" for r in self.without_clip)
            names = [name for r in self.without_clip for name in r.names][:EXAMPLES]
            said.append(
                f"{counted(n, 'source')} gave no clip ({why}): {', '.join(names)}{', …' if n > len(names) else ''}"
            )
        if n := len(self.empty):
            more = ", …" if n > EXAMPLES else ""
            hold = "holds" if n == 1 else "hold"
            said.append(
                f"{counted(n, 'given interval')} {hold} no frame: {', '.join(self.empty[:EXAMPLES])}{more}"
            )
        if self.warned:
            said += _shown(
                f"{counted(self.warned, 'source')} with warnings:", self.warnings, WARNINGS, "warnings"
            )
        for captioner, reasons in self.caption_errors.items():
            said += _shown(
                f"captions: {counted(_count(reasons), 'clip')} on which {captioner} failed", reasons
            )
        for captioner, flags in self.silent.items():
            odd = ", ".join(f"{flag} {n:,}" for flag, n in flags.items())
            said.append(
                f"captions: {captioner} says nothing of any clip, flags: {odd}; what it answered: clipmill inspect "
                f"{shlex.quote(folder)}"
            )
        for layer, n in self.behind.items():
            said.append(
                f"layer {layer} lacks {counted(n, 'clip')}; add them: clipmill caption {shlex.quote(folder)}"
            )
        if self.served:
            tokens = self.served["prompt_tokens"] + self.served["completion_tokens"]
            asked, before = (
                counted(int(self.served[k]), n) for k, n in (("requests", "new answer"), ("before", "answer"))
            )
            said.append(
                f"served: {asked}, {tokens:,.0f} tokens, {self.served['usd']:,.2f} USD; {before} in the store before"
            )
        if (self.failed and sources) or self.captions_failed:
            again = command if "--retry-errors" in command.split() else f"{command} --retry-errors"
            mend = (
                ", once it is mended" if not self.captions_failed and self.errors.keys() == {"source"} else ""
            )
            said.append(f"try what failed again{mend}, and nothing else: {again}")
        return said + [f"{what}: {place}" for what, place in where.items()]


KINDS = {
    "source": "the source's own fault",
    "transient": "the moment's fault, tried again by the same command",
    "worker": "its worker's fault",
}


# Counts of a source (pipeline.split.events) that say why it has no clip, and how that is told
NO_CLIP = {
    "events_too_short": "shorter than events.min_s",
    "pieces_missed_cut": "changes more than events.max_inner",
    "pieces_unseen": "shots too short for a sample",
}


def outcome(
    store: Store,
    listed: Collection[str] | None = None,
    answered: Collection[str] = frozenset(),
    before: Collection[str] = frozenset(),
) -> Outcome:
    """Read what a run's folder holds: videos/, clips/, decisions.parquet and answers/.

    Args:
        listed: uris of the list at hand, where there is one.
        answered: files of answers/ that were there before the command.
        before: units that were there before it.
    """
    found = Outcome(served=answers.account(store, set(answered)))
    failed: list[dict[str, Any]] = []
    warnings: list[tuple[str, str]] = []
    clipless: list[tuple[str, str]] = []
    columns = ["source", "name", "status", "error", "error_kind", "stage", "warnings", "clips", "counts"]
    for file, table in tables(store, store.list("videos", ".parquet"), columns):
        rows = table.to_pylist()
        bad = [r for r in rows if r["status"] != "ok"]
        failed += bad
        found.earlier += len(bad) if unit_of(file) in before else 0
        good = [r for r in rows if r["status"] == "ok"]
        found.sources += len(good)
        found.unlisted += sum(r["source"] not in listed for r in rows) if listed is not None else 0
        for row in good:
            warnings += _warnings(found, row)
            clipless += [] if row["clips"] else [(_why_no_clip(row), row["name"])]
    found.without_clip = grouped(clipless)
    by_kind: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in failed:
        text = f"{row['stage']}: {_nameless(row['error'] or '', row['name'], row['source'])}"
        by_kind[row["error_kind"] or "source"].append((text, row["name"]))
    found.errors = {kind: grouped(by_kind[kind]) for kind in sorted(by_kind, key=lambda k: -len(by_kind[k]))}
    found.warnings = grouped(warnings)
    _clips(store, found)
    return found


def _why_no_clip(row: dict[str, Any]) -> str:
    """What most of a source without clips came to."""
    counts = dict(row["counts"] or [])
    most = max(NO_CLIP, key=lambda name: counts.get(name, 0))
    if counts.get(most):
        return NO_CLIP[most]
    return "no frame in a given interval" if any(map(NO_FRAME.match, row["warnings"] or [])) else "no shot"


def _warnings(found: Outcome, row: dict[str, Any]) -> list[tuple[str, str]]:
    """(text, name) of a source's warnings, but for those that are counted elsewhere: empty intervals, captions."""
    others = []
    for text in row["warnings"] or []:
        if empty := NO_FRAME.match(text):
            found.empty.append(f"{row['name']} {empty[1]}")
        elif not CAPTION_WARNING.match(text):
            others.append((_nameless(text, row["name"], row["source"]), row["name"]))
    found.warned += bool(others)
    return others


def _clips(store: Store, found: Outcome) -> None:
    """Clips, decisions and captions of the outcome."""
    parts = []
    wrong: dict[str, list[tuple[str, str]]] = defaultdict(list)
    flags: dict[str, Counter[str]] = defaultdict(Counter)  # of captioners, without text
    says: set[str] = set()
    view = Layered(store)
    found.behind = view.behind()
    for _, table in view.tables(["clip_id", "name", "duration_s", "captions"]):
        parts.append(table.select(["clip_id", "duration_s"]))
        said = table["captions"].combine_chunks().flatten()
        has_text = pc.greater(pc.utf8_length(said.field("text")), 0)
        says |= set(pc.unique(said.field("model").filter(has_text)).to_pylist())
        odd = pc.and_(pc.invert(has_text), pc.greater(pc.list_value_length(said.field("flags")), 0))
        for caption in said.filter(odd).to_pylist():
            flags[caption["model"]].update(caption["flags"])
        if len(said) and pc.any(pc.equal(said.field("outcome"), "error")).as_py():
            for row in table.to_pylist():
                for c in row["captions"] or []:
                    if c["outcome"] == "error":
                        wrong[c["model"]].append((c["reason"] or "", row["name"]))
    found.caption_errors = {m: grouped(wrong[m]) for m in sorted(wrong, key=lambda m: -len(wrong[m]))}
    found.silent = {m: dict(flags[m].most_common()) for m in sorted(flags.keys() - says - wrong.keys())}
    if not parts or not store.exists("decisions.parquet"):
        return
    clips, decisions = pa.concat_tables(parts), store.read_table("decisions.parquet")
    at = pc.index_in(decisions["clip_id"], value_set=clips["clip_id"].combine_chunks())
    seconds, keep = clips["duration_s"].take(at), decisions["keep"]
    found.clips, found.kept = len(decisions), pc.sum(keep).as_py() or 0
    found.seconds = pc.sum(seconds).as_py() or 0.0
    found.kept_s = pc.sum(seconds.filter(keep)).as_py() or 0.0
    found.dropped = {drop.rule: drop.in_order for drop in funnel(decisions)}
    found.tars = len(pc.unique(decisions["shard"].drop_null()))


def grouped(faults: Iterable[tuple[str, str]]) -> list[Reason]:
    """(text, name) pairs by text, most frequent first; numbers in it make no difference."""
    found: dict[str, Reason] = {}
    for text, name in faults:
        reason = found.setdefault(re.sub(r"[0-9a-f]{20}|\d+(\.\d+)?", "0", text), Reason(text))
        reason.count += 1
        if len(reason.names) < EXAMPLES and name not in reason.names:
            reason.names.append(name)
    return sorted(found.values(), key=lambda r: -r.count)


def _nameless(text: str, name: str, uri: str) -> str:
    for known in sorted({name, uri}, key=len, reverse=True):
        text = text.removeprefix(f"{known}: ").replace(known, "…")
    return text


def _count(reasons: list[Reason]) -> int:
    return sum(r.count for r in reasons)


def _total(groups: dict[str, list[Reason]]) -> int:
    return sum(map(_count, groups.values()))


def _shown(title: str, reasons: list[Reason], most: int = REASONS, column: str = "error") -> list[str]:
    more = len(reasons) - most
    rest = (
        [f"          and {counted(more, 'more reason')}, see the column '{column}' of videos/"]
        if more > 0
        else []
    )
    return [title, *(r.line() for r in reasons[:most]), *rest]
