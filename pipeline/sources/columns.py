"""The columns of a list that mean something here: how they are found, and what their cells say.

| column | meaning |
|---|---|
| path, url | the video; path goes before url |
| timestamp | clips: a list of [start, end] pairs, or one pair |
| start and end, also start_s/end_s, start_time/end_time, start_sec/end_sec | one clip a row |
| caption | a text, or a list of texts |

Names are taken in any letter case. Times are seconds, m:s or h:m:s. All other columns are metadata.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
from dataclasses import dataclass
from typing import Any

from pipeline.sources.names import SourceError, log, metadata

NAMES = ("path", "url", "timestamp", "caption")
PAIRS = (("start", "end"), ("start_s", "end_s"), ("start_time", "end_time"), ("start_sec", "end_sec"))
# What others call a path; told, not guessed: a list may well hold several.
LIKE_PATH = frozenset(
    "video videos file files filename file_name filepath file_path video_path video_file video_name video_url "  # noqa: SIM905
    "videopath videourl src uri link href address s3_path mp4".split()
)
LIKE_AUDIO = frozenset("audio audio_path audio_url wav sound soundtrack audio_file".split())  # noqa: SIM905
LIKE_TIMES = frozenset(
    "start_frame end_frame start_ms end_ms begin clip_start clip_end start_pts end_pts timestamps".split()  # noqa: SIM905
)


def mistyped(name: str) -> str:
    """The name of a column with a meaning that a name with none is nearly; '' where it may well be metadata's."""
    known = [*NAMES, *(n for pair in PAIRS for n in pair)]
    return "" if name in known else next(iter(difflib.get_close_matches(name.lower(), known, 1, 0.8)), "")


@dataclass(frozen=True)
class Columns:
    """What the columns of one list are called here, in their order, and which two hold a clip's start and end."""

    names: list[str]
    pair: tuple[str, str] | None

    def row(self, values: Any) -> dict[str, Any]:
        return dict(zip(self.names, values, strict=False))


def columns_of(theirs: list[str], uri: str, renames: dict[str, str]) -> Columns:
    """Names of a list's columns: renamed (theirs → ours, any letter case), known ones in lower case.

    Raises SourceError where none is a path or url, or a renamed one is not there.
    """
    renames = {k.lower(): v for k, v in renames.items()}
    plain = [str(n).strip() for n in theirs]
    low = [n.lower() for n in plain]
    known = (*NAMES, *(n for pair in PAIRS for n in pair))
    ours = [renames.get(n) or (n if n in known else p) for n, p in zip(low, plain, strict=True)]
    shown = ", ".join(repr(n[:40]) for n in plain[:8]) or "none"
    for there, here in renames.items():
        if there not in low and (here not in ours or here in ("path", "url")):
            raise SourceError(f"{uri}: no column named {there!r} to take as {here}; its columns are {shown}")
    first: dict[str, int] = {}  # of the columns that would share a name of ours, the one that has it
    for i, name in enumerate(ours):
        rank = (low[i] in renames, plain[i] == name)
        held = first.setdefault(name, i)
        if rank > (low[held] in renames, plain[held] == ours[held]):
            first[name] = i
    taken = {*known, *renames.values()}
    names = [
        name if first[name] == i or name not in taken else p if p != name else f"{p} (of the list)"
        for i, (name, p) in enumerate(zip(ours, plain, strict=True))
    ]
    if "path" not in names and "url" not in names:
        like = next((p for p, n in zip(plain, low, strict=True) if n in LIKE_PATH), None)
        raise SourceError(
            f"{uri}: a list needs a column named path or url, or --columns path={like or 'NAME'}; "
            f"its columns are {shown}"
        )
    pair = next((p for p in PAIRS if p[0] in names and p[1] in names), None)
    return Columns(names, pair)


def tell_unused(columns: Columns, uri: str) -> None:
    """Say once which columns look as if they meant something, and do not."""
    used = {*NAMES, *(columns.pair or ())}
    lone = {n for pair in PAIRS for n in pair}
    for like, why in (
        (LIKE_PATH, "look like paths; to use one as the video, say --columns path={}"),
        (LIKE_AUDIO, "look like sound; the sound is taken from the video itself"),
        (LIKE_TIMES | lone, "look like times; for clips name two, say --columns start={},end=…"),
    ):
        found = [n for n in columns.names if n.lower() in like and n not in used]
        if found:
            log.warning(
                "%s: columns kept as metadata only, though they %s: %s",
                uri,
                why.format(found[0]),
                ", ".join(found),
            )


# Cells --------------------------------------------------------------------------------------------

Times = dict[tuple[float, float], dict[str, str]]


def clips_of(row: dict[str, Any], pair: tuple[str, str] | None) -> Times | None:
    """Given clips (start, end), seconds, and the metadata of each; None where the row gives none.

    The `timestamp` column holds a list of [start, end] pairs, and columns with as many items belong to the clips;
    or it holds one pair, as the two columns of `pair` do, and then the whole row belongs to that clip. What is used
    is taken out of the row. What is no time at all is metadata. Raises ValueError.
    """
    pairs = listed(row.get("timestamp"))
    if pairs is not None:
        return _stamped(row, pairs)
    if str(row.get("timestamp", "")).startswith("["):
        raise ValueError("timestamp is not a list of [start, end] pairs")
    if pair is None:
        return None
    start, end = pair
    times = [_time(row.get(name)) for name in pair]
    if times[0] is None and times[1] is None:
        return None
    if times[0] is None or times[1] is None:
        name = start if times[0] is None else end
        raise ValueError(f"{name} is no time: {row.get(name)!r}; write seconds or h:m:s")
    if not 0 <= times[0] < times[1] < math.inf:
        raise ValueError(f"the clip from {row[start]} to {row[end]} does not end after its start")
    for name in pair:
        del row[name]
    meta = described(row)
    row.clear()
    return {(times[0], times[1]): meta}


def _stamped(row: dict[str, Any], pairs: list[Any]) -> Times:
    del row["timestamp"]
    one = len(pairs) == 2 and not any(isinstance(p, list | tuple) for p in pairs)
    try:
        times = [(seconds(a), seconds(b)) for a, b in ([pairs] if one else pairs)]
    except (ValueError, TypeError) as e:
        raise ValueError(f"timestamp is not a list of [start, end] pairs: {e}") from e
    if not times or not all(0 <= a < b < math.inf for a, b in times):
        raise ValueError("timestamp has a clip that does not end after its start, or none")
    columns = {c: [v] for c, v in row.items()} if one else {}
    for column, value in () if one else row.items():
        items = listed(value)
        if items is not None and len(items) == len(times):
            columns[column] = items
    clips: Times = {}
    for i, time in enumerate(times):
        clips.setdefault(time, described({c: values[i] for c, values in columns.items()}))
    for column in columns:
        del row[column]
    return clips


def described(row: dict[str, Any]) -> dict[str, str]:
    """The metadata of a row. Of a list of captions the first is the caption, and all are kept in `captions`."""
    said = listed(row.get("caption"))
    if said and all(isinstance(text, str) for text in said):
        texts = [text.strip() for text in said if text.strip()]
        row = {**row, "caption": texts[0] if texts else ""}
        if len(texts) > 1:
            row.setdefault("captions", texts)
    return metadata(row)


def listed(value: Any) -> list[Any] | None:
    """A list, also one written as a Python literal, as in Panda-70M's CSV; None for anything else."""
    if isinstance(value, str) and value.startswith("["):
        # where every ' delimits a string this is JSON but for the quotes, and read ten times as fast
        plain = '"' not in value and "\\" not in value
        try:
            value = json.loads(value.replace("'", '"') if plain else value)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                return None
    return list(value) if isinstance(value, list | tuple) else None


def _time(value: Any) -> float | None:
    try:
        return seconds(value)
    except ValueError:
        return None


def seconds(value: Any) -> float:
    """12.5, '12.5', '1:02.5' or '0:01:02.5' (',5' as in subtitles too) in seconds. Raises ValueError."""
    total = 0.0
    for part in str(value).replace(",", ".").split(":"):
        total = total * 60 + float(part)
    return total
