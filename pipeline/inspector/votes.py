"""What people said of clips: appended, never changed, on the disk before it is answered.

    RUN/votes/<time>-<session>.jsonl    on a disk: a line a vote; each server writes a file of its own
    RUN/votes/<time>-<id>.json          on an object store: an object a vote

A vote: `id`, `clip`, `kind`, `who`, `at` (UTC, ISO 8601) and, by kind,

- best: `model`, whose caption is the best; bad: none will do; edit: `text`, a better one (from that of `model`);
- keep, drop: whether the clip should stay;
- undo: takes back the newest of that person's on that clip that still stands;
- ab: `left` and `right`, whose captions were shown without their names, and `answer`: left, right or tie.

Of one person the newest counts: on a clip for each question, of A/B on each clip and pair.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.faults import StoreError
from pipeline.io.files import fix
from pipeline.io.store import Store, fsync

QUESTION = {"best": "caption", "bad": "caption", "edit": "caption", "keep": "keep", "drop": "keep"}
KINDS = (*QUESTION, "undo", "ab")
FOLDER = "votes"
LOOK_S, LOOK_FAR_S = 2.0, 15.0  # how often others' votes are looked for, on a disk and on an object store


class Votes:
    """Those of a run, our own and those that others' servers write. Raises StoreError where they cannot be read.

    version: grows with every vote.
    """

    def __init__(self, store: Store):
        self.store, self.version = store, 0
        self._lock = threading.RLock()
        self._seen: set[str] = set()  # ids
        self._of: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)  # (clip, who) → in order
        self._people: dict[str, set[str]] = defaultdict(set)  # clip → who
        self._tallies: dict[str, dict[str, Any]] = {}  # by clip
        self._ab: dict[tuple[str, str, frozenset[str]], dict[str, Any]] = {}  # who, clip, the pair
        self._read: dict[str, int] = {}  # file → bytes that were read
        self._file: int | None = None
        self._name = ""
        self._torn = False  # the last line may be half there
        self._last = ""
        self._looked = -1e9
        self.look()

    # ------------------------------------------------------------ writing

    def add(self, vote: dict[str, Any]) -> dict[str, Any]:
        """Keep a vote for good; returns it with its id and time. Raises StoreError, and then it does not count.

        One whose id is there already is kept no second time.
        """
        with self._lock:
            if vote.get("id") in self._seen:
                return vote
            at = datetime.now(UTC).isoformat(timespec="microseconds")
            while (
                at <= self._last
            ):  # a clock that stands still, or was set back, must not turn the order around
                at = datetime.fromtimestamp(
                    datetime.fromisoformat(self._last).timestamp() + 1e-6, UTC
                ).isoformat(timespec="microseconds")
            self._last = at
            vote = {"id": uuid.uuid4().hex, "at": at, **vote}
            if self.store.local:
                self._append(json.dumps(vote, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            else:
                name = f"{FOLDER}/{at.replace(':', '').replace('+0000', 'Z')}-{vote['id']}.json"
                self.store.write_bytes(name, json.dumps(vote, ensure_ascii=False).encode("utf-8", "replace"))
                self._read[name] = 1
            self._count([vote])
            return vote

    def _append(self, line: bytes) -> None:
        try:
            if self._file is None:
                folder = Path(self.store.path(FOLDER))
                folder.mkdir(parents=True, exist_ok=True)
                self._name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:12]}.jsonl"
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
                self._file = os.open(folder / self._name, flags, 0o644)
                for above in (folder, folder.parent):
                    fsync(above)
            line = (b"\n" if self._torn else b"") + line
            self._torn = True
            if os.write(self._file, line) != len(line):
                raise OSError(28, "the disk is full")
            os.fsync(self._file)
            self._torn = False
        except OSError as e:
            raise StoreError(
                f"cannot write {self.store.path(FOLDER)}: {e.strerror}; {fix(e.errno)}; the vote was not kept"
            ) from e

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    # ------------------------------------------------------------ reading

    def look(self, now: bool = False) -> None:
        """Take in what others have written since. Raises StoreError."""
        wait = LOOK_S if self.store.local else LOOK_FAR_S
        with self._lock:
            if not now and time.monotonic() - self._looked < wait:
                return
            self._looked = time.monotonic()
            found = []
            for name in self.store.list(FOLDER):
                if name.endswith(".jsonl") and self.store.local:
                    found += self._tail(name)
                elif name.endswith((".json", ".jsonl")) and name not in self._read:
                    self._read[name] = 1
                    found += [_vote(line) for line in self.store.read_bytes(name).split(b"\n")]
            self._count(v for v in found if v is not None)

    def _tail(self, name: str) -> list[dict[str, Any] | None]:
        """What a file has beyond what was read of it, whole lines only: the last one may still be written."""
        start = self._read.get(name, 0)
        path = self.store.path(name)
        try:
            if Path(path).stat().st_size <= start:
                return []
            with open(path, "rb") as f:
                f.seek(start)
                data = f.read()
        except OSError as e:
            raise StoreError(f"cannot read {path}: {e.strerror}; choose a folder you may read") from e
        whole = data[: data.rfind(b"\n") + 1]
        self._read[name] = start + len(whole)
        return [_vote(line) for line in whole.split(b"\n")]

    def _count(self, votes: Iterable[dict[str, Any]]) -> None:
        for vote in votes:
            if vote["id"] in self._seen:
                continue
            self._seen.add(vote["id"])
            clip, who = vote["clip"], vote["who"]
            self.version += 1
            if vote["kind"] == "ab":
                key = who, clip, frozenset((vote["left"], vote["right"]))
                if key not in self._ab or _order(vote) > _order(self._ab[key]):
                    self._ab[key] = vote
                continue
            its = self._of[clip, who]
            its.append(vote)
            its.sort(key=_order)
            self._people[clip].add(who)
            self._tallies.pop(clip, None)

    # ------------------------------------------------------------ what stands

    def standing(self, clip: str, who: str) -> dict[str, dict[str, Any]]:
        """By question: what a person holds of a clip."""
        with self._lock:
            stack: list[dict[str, Any]] = []
            for vote in self._of.get((clip, who), ()):
                if vote["kind"] == "undo":
                    del stack[-1:]
                else:
                    stack.append(vote)
            return {QUESTION[v["kind"]]: v for v in stack}

    def of(self, clip: str) -> list[dict[str, Any]]:
        """All that stands of a clip, the oldest first."""
        with self._lock:
            people = sorted(self._people.get(clip, ()))
            return sorted((v for who in people for v in self.standing(clip, who).values()), key=_order)

    def tally(self, clip: str) -> dict[str, Any]:
        """How many said what of a clip: best by model; bad, edit, keep and drop. Empty where nobody said anything."""
        with self._lock:
            if clip not in self._people:
                return {}
            if clip not in self._tallies:
                its = self.of(clip)
                kinds = Counter(v["kind"] for v in its)
                best = Counter(v["model"] for v in its if v["kind"] == "best")
                self._tallies[clip] = {"best": dict(best)} | {
                    k: kinds[k] for k in ("bad", "edit", "keep", "drop")
                }
            return self._tallies[clip]

    def clips(self, kind: str = "any") -> list[str]:
        """Clips of which such a vote stands."""

        def has(tally: dict[str, Any]) -> bool:
            return any(tally.values()) if kind == "any" else bool(tally.get(kind))

        with self._lock:
            return [clip for clip in self._people if has(self.tally(clip))]

    def all(self) -> list[dict[str, Any]]:
        """Every vote that was cast and counts or did, answers to A/B too, the oldest first."""
        with self._lock:
            return sorted([v for its in self._of.values() for v in its] + list(self._ab.values()), key=_order)

    def people(self) -> dict[str, int]:
        """Standing votes by who cast them."""
        with self._lock:
            found = Counter(who for clip, who in list(self._of) for _ in self.standing(clip, who))
            return dict((found + Counter(who for who, _, _ in self._ab)).most_common())

    def units(self, question: str) -> list[list[str]]:
        """Of each clip what people answered to a question, as labels: a model, 'bad', 'edit'; 'keep', 'drop'."""
        with self._lock:
            found = []
            for clip in self._people:
                its = [v for v in self.of(clip) if QUESTION[v["kind"]] == question]
                found.append([v["model"] if v["kind"] == "best" else v["kind"] for v in its])
            return [unit for unit in found if unit]

    def ab(self, pair: Iterable[str]) -> list[dict[str, Any]]:
        """Answers to blind comparisons of two."""
        both = frozenset(pair)
        with self._lock:
            return sorted((v for (_, _, its), v in self._ab.items() if its == both), key=_order)

    def __len__(self) -> int:
        return len(self._seen)


def _order(vote: dict[str, Any]) -> tuple[str, str]:
    return vote["at"], vote["id"]


def _vote(line: bytes) -> dict[str, Any] | None:
    """A vote; none for what is none: half a line that a killed server left was never answered."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        vote = json.loads(line)
        keys = ("id", "at", "clip", "who", *(("left", "right", "answer") if vote["kind"] == "ab" else ()))
        if vote["kind"] in KINDS and all(isinstance(vote[k], str) for k in keys):
            if vote["kind"] in ("best", "edit"):
                vote["model"] = str(vote.get("model") or "")
            if vote["kind"] == "edit":
                vote["text"] = str(vote.get("text") or "")
            return vote
    return None
