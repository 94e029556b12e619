"""Full text over captions, on-screen text, names and metadata: SQLite's FTS5.

The table keeps words and where they stand, no text ('contentless'), in a temporary database of SQLite's own: a file
without a name, gone with the process. It is filled in the background; a search before that answers from the clips that
are in it already.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.inspector.index import Index
from pipeline.inspector.nested import whole

CACHE = 64 << 20  # bytes of the table kept in memory; the rest lies in the file
AT_ONCE = 500  # clips
FIELDS = ("caption", "text", "name", "meta")
SCHEMA = (
    f"CREATE VIRTUAL TABLE words USING fts5({', '.join(FIELDS)}, content='', "
    'tokenize="unicode61 remove_diacritics 2")'
)
# Chinese, Japanese and Korean put no space between words: there each character is one, and words are phrases
_WORD_EACH = re.compile("([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])")
_TERM = re.compile(r'(-?)(?:(caption|text|name|meta):)?(?:"([^"]*)"?|([^\s"]+))')


def expression(asked: str) -> str | None:
    """The FTS5 expression of what a person types: all words; "a phrase"; begin*; -without; caption:word.

    Every word is quoted, so nothing typed is ever an operator. None where no word is asked for; words that are only
    excluded are excluded of everything ('' AND NOT cannot be said in FTS5: the caller turns the answer around).
    """
    wanted, unwanted = _terms(asked)
    if not wanted:
        return None
    text = " AND ".join(wanted)
    return f"({text}) NOT ({' OR '.join(unwanted)})" if unwanted else text


def _terms(asked: str) -> tuple[list[str], list[str]]:
    wanted: list[str] = []
    unwanted: list[str] = []
    for minus, field, phrase, word in _TERM.findall(asked.replace("\0", " ")):
        said = phrase or word
        begins = bool(word) and word.endswith("*")
        said = _spaced(said.rstrip("*") if begins else said)
        if not any(c.isalnum() for c in said):
            continue
        term = (
            (f"{field} : " if field else "") + '"' + said.replace('"', '""') + '"' + ("*" if begins else "")
        )
        (unwanted if minus else wanted).append(term)
    return wanted, unwanted


def _spaced(text: str) -> str:
    return text if text.isascii() else _WORD_EACH.sub(r" \1 ", text)


class Search:
    """The words of a run's clips.

    done: rows that are in it, of `len(index)`.
    """

    def __init__(self, index: Index):
        self.index, self.done = index, 0
        self._closed, self._lock = threading.Event(), threading.Lock()
        self._db = sqlite3.connect("", check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = OFF")  # nothing is ever taken back
        self._db.execute(f"PRAGMA cache_size = -{CACHE >> 10}")
        self._db.execute(SCHEMA)

    def stop(self) -> None:
        """Fill it no further; the database goes with the last who asks it."""
        self._closed.set()

    def close(self) -> None:
        self.stop()
        with self._lock:
            self._db.close()

    def fill(self) -> None:
        """Read all texts; may run in the background. Raises StoreError."""
        index = self.index
        insert = f"INSERT INTO words(rowid, {', '.join(FIELDS)}) VALUES (?, ?, ?, ?, ?)"
        for i, (_, table) in enumerate(index.layered.tables(["captions", "text", "name", "meta"])):
            rows = index.position[index.first[i] : index.first[i] + index.sizes[i]]
            there = np.flatnonzero(rows >= 0)
            if len(there) < len(rows):
                table = table.take(pa.array(there))
            texts = [[_spaced(text) for text in column.to_pylist()] for column in _texts(table)]
            lines = list(zip(rows[there].tolist(), *texts, strict=True))
            for at in range(0, len(lines), AT_ONCE):  # a search waits for no more than that
                with self._lock:
                    if self._closed.is_set():
                        return
                    self._db.executemany(insert, lines[at : at + AT_ONCE])
                    self._db.commit()
            self.done += len(there)

    def rows(self, asked: str) -> np.ndarray:
        """bool [n]: the clips that have what is asked for, see `expression`."""
        mask = np.zeros(len(self.index), bool)
        text = expression(asked)
        if text is not None:
            mask[self._match(text)] = True
            return mask
        _, unwanted = _terms(asked)
        if unwanted:
            mask[self._match(" OR ".join(unwanted))] = True
        return ~mask

    def _match(self, text: str) -> np.ndarray:
        # One string of all numbers: making a Python object of each takes longer than the search
        query = "SELECT group_concat(rowid) FROM words WHERE words MATCH ?"
        with self._lock:
            (found,) = self._db.execute(query, (text,)).fetchone()
        return np.fromstring(found, np.int64, sep=",") if found else np.zeros(0, np.int64)


def _texts(table: pa.Table) -> Sequence[pa.Array]:
    """A string a clip for each of FIELDS."""
    captions, text, meta = (whole(table[c]) for c in ("captions", "text", "meta"))
    said = _joined(captions, captions.values.field("text"))
    return said, _joined(text, text.values), table["name"], _joined(meta, meta.items)


def _joined(lists: pa.Array, values: pa.Array) -> pa.Array:
    """The texts of each list (or map), one after another; '' where there are none."""
    offsets = lists.offsets
    found = pc.binary_join(pa.ListArray.from_arrays(offsets, values.fill_null("")), "\n")
    return pc.if_else(lists.is_valid(), found, "")
