"""Identity follows content: what the list at hand says of the sources that are committed already.

A source is known by its uri, and its content by its sha256. Size and time of modification, kept with its row,
say cheaply that its bytes are still the same; only where they differ are local files hashed. Of remote ones
only a size can tell.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.faults import counted
from pipeline.io.store import Store
from pipeline.record import Source
from pipeline.run.commit import Known, Revision, drop, revise
from pipeline.sources.fetch import local_path, sha256_of

HASHERS = 4  # files hashed at a time
NAMED = 3  # sources named in a line for a person


@dataclass
class Compared:
    """How a list differs from the record. Uris are those of the record."""

    moved: dict[str, Source] = field(default_factory=dict)  # committed uri → where its content lies now
    changed: list[str] = field(default_factory=list)  # other bytes, or other given clips, than were measured
    mended: list[str] = field(default_factory=list)  # changed too, of sources that failed: nothing is lost
    edited: list[str] = field(default_factory=list)  # other metadata
    gone: list[str] = field(default_factory=list)  # not in the list
    touched: list[str] = field(default_factory=list)  # same bytes, newer time of modification


def dated(sources: Iterable[Source]) -> list[Source]:
    """The sources with size and time of modification, where they are local; of a tar's member, of the tar."""
    stats: dict[str, tuple[int, int] | None] = {}
    found = []
    for s in sources:
        path = local_path(s)
        if path is not None and path not in stats:
            try:
                stat = Path(path).stat()
                stats[path] = (stat.st_size, stat.st_mtime_ns)
            except (OSError, ValueError):
                stats[path] = None
        if path is not None and (now := stats[path]) is not None:
            s = replace(s, size=s.size if s.member else now[0], mtime_ns=now[1])
        found.append(s)
    return found


def compare(listed: Sequence[Source], known: Known) -> Compared:
    """Args: listed: as `dated` gives them, each uri once."""
    found = Compared()
    here = {s.uri: s for s in listed}
    doubtful = []
    for uri, row in known.items():
        source = here.get(uri)
        if source is None:
            found.gone.append(uri)
            continue
        if source.problem:
            continue
        other = source.meta != row["meta"] and row["status"] == "ok"
        if _fingerprinted(row):
            other = other or row["interval_meta_key"] != source.interval_meta_key()
            sizes = {row["size"], source.bytes} - {None}
            if row["intervals_key"] != source.intervals_key() or len(sizes) > 1:
                found.changed.append(uri)
            elif row["mtime_ns"] and source.mtime_ns and row["mtime_ns"] != source.mtime_ns:
                doubtful.append(uri)
        if other:
            found.edited.append(uri)
    for uri, sha256 in zip(doubtful, _hashes([here[u] for u in doubtful]), strict=True):
        if sha256 is not None:  # else it cannot be read now
            (found.touched if sha256 == known[uri]["sha256"] else found.changed).append(uri)
    found.mended = [uri for uri in found.changed if known[uri]["status"] != "ok"]
    found.changed = [uri for uri in found.changed if known[uri]["status"] == "ok"]
    _find_moved(found, listed, known)
    return found


def _fingerprinted(row: Mapping[str, Any]) -> bool:
    """It was committed by a clipmill that kept what `compare` looks at."""
    return row.get("intervals_key") is not None


def _find_moved(found: Compared, listed: Sequence[Source], known: Known) -> None:
    """Content that is committed under a uri that no longer stands for it, and is listed under a new one."""
    left: dict[tuple[int | None, str], list[str]] = defaultdict(list)
    for uri in [*found.gone, *found.changed]:
        row = known[uri]
        if row["status"] == "ok" and row["sha256"] and row.get("size") is not None and _fingerprinted(row):
            left[row["size"], row["intervals_key"]].append(uri)
    if not left:
        return
    new = []
    for s in listed:
        if s.uri not in known and left.get((s.bytes, s.intervals_key())) and local_path(s):
            new.append(s)
    for source, sha256 in zip(new, _hashes(new), strict=True):
        places = left[source.bytes, source.intervals_key()]
        same = [u for u in places if known[u]["sha256"] == sha256]
        if same:
            was = next((u for u in same if known[u]["name"] == source.name), same[0])
            places.remove(was)
            found.moved[was] = source
    for uris in (found.gone, found.changed, found.edited):
        uris[:] = [u for u in uris if u not in found.moved]


def _hashes(sources: Sequence[Source]) -> list[str | None]:
    with ThreadPoolExecutor(HASHERS) as pool:
        return list(pool.map(sha256_of, sources))


def untaken(
    listed: Iterable[Source], known: Known, found: Compared, committed: Collection[str]
) -> list[Source]:
    """The sources, each told which clip ids its name would give that clips of moved content have already.

    Moved content keeps its ids, which hold the name it was measured under; other content may get that name now, and
    the same content, which must not get the same ids. Args: committed: uris, as `apply` gives them.
    """
    moved: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for uri, row in known.items():
        now = found.moved.get(uri)
        at, name = (now.uri, now.name) if now else (uri, row["name"])
        salt = row.get("salt") or row["name"]
        if at in committed and row["sha256"] and salt != name:
            moved[salt.partition("\0")[0]].add((row["sha256"], salt))
    return [replace(s, taken=frozenset(moved[s.name])) if s.name in moved else s for s in listed]


def apply(
    store: Store,
    found: Compared,
    listed: Sequence[Source],
    known: Known,
    *,
    redo_changed: bool = False,
    refresh_metadata: bool = False,
    prune: bool = False,
) -> tuple[list[str], set[str]]:
    """Bring the record up to date: moved sources and failed ones of other bytes always, the rest where asked.

    Returns a line for each, and the uris that are committed now.
    """
    here = {s.uri: s for s in listed}
    revisions = {was: Revision(source, moved=True) for was, source in found.moved.items()}
    revisions |= {uri: Revision(here[uri]) for uri in found.touched}
    if refresh_metadata:
        revisions |= {
            uri: Revision(here[uri], metadata=True) for uri in found.edited if uri not in found.changed
        }
    gone = found.mended + (found.changed if redo_changed else []) + (found.gone if prune else [])
    kept = revise(store, revisions, known)
    drop(store, gone, known)
    now = {found.moved[uri].uri if uri in found.moved else uri for uri in known.keys() - set(gone)}
    return _lines(found, known, redo_changed, refresh_metadata, prune, kept), now


def _lines(
    found: Compared, known: Known, redo: bool, refresh: bool, prune: bool, kept: Mapping[str, int]
) -> list[str]:
    """Args: kept: clips whose own metadata was not taken over, by source."""
    said = []
    if found.moved:
        places = [f"{known[was]['name']} → {s.name}" for was, s in found.moved.items()]
        said.append(
            f"{counted(len(found.moved), 'source')} moved or renamed, not measured again: {_some(places)}"
        )
    if found.changed:
        names = _some([known[u]["name"] for u in found.changed])
        then = (
            "measured again" if redo else "the clips are of the old bytes; --redo-changed measures them again"
        )
        said.append(f"{counted(len(found.changed), 'source')} changed since measured, {then}: {names}")
    if found.mended:
        names = _some([known[u]["name"] for u in found.mended])
        said.append(
            f"{counted(len(found.mended), 'source')} that failed changed since, measured again: {names}"
        )
    if found.edited:
        names = _some([known[u]["name"] for u in found.edited])
        then = "taken over" if refresh else "the clips have the old; --refresh-metadata takes it over"
        said.append(
            f"{counted(len(found.edited), 'source')} with other metadata in the list, {then}: {names}"
        )
    if kept:
        names = _some([known[u]["name"] for u in kept])
        said.append(
            f"{counted(sum(kept.values()), 'clip')} not told apart by the times of the given clips, which keep the "
            f"metadata they had: {names}"
        )
    if found.gone:
        names = _some([known[u]["name"] for u in found.gone])
        then = "pruned" if prune else "the clips stay; --prune takes them out"
        said.append(f"{counted(len(found.gone), 'source')} no longer in the list, {then}: {names}")
    return said


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
