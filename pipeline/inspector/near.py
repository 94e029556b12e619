"""Clips that look alike, and clips that words describe: cosine of embeddings, every clip looked at.

Vectors are read when they are first asked for. They lie in memory as float32 where they are few, else as float16 in a
temporary file that is mapped: so many clips that they fill memory still have neighbours, at the speed of the disk.
"""

from __future__ import annotations

import tempfile
import threading
from typing import Any

import numpy as np

from pipeline.decide.rules import SIGNATURE
from pipeline.faults import StoreError
from pipeline.inspector.index import Index
from pipeline.inspector.nested import whole

IN_MEMORY = 1 << 30  # bytes of float32
BLOCK = 1 << 15  # vectors looked at a time
WAIT_S = 8.0  # for vectors that are being read
WORDS = "emb_visual_words"  # of models.measures.visual_fit


class NotReady(Exception):
    """The vectors are still being read, or there are none; the message is a sentence."""


class Vectors:
    """One embedding of every clip."""

    def __init__(self, index: Index, column: str):
        self.index, self.column = index, column
        self.failed = ""
        self.done, self._begun, self._lock = threading.Event(), False, threading.Lock()
        self._vectors: Any = None
        self._has = np.zeros(len(index), bool)

    def begin(self) -> bool:
        """Read them in the background; whether they are there."""
        with self._lock:
            if not self._begun:
                self._begun = True
                threading.Thread(target=self._read, daemon=True).start()
        return self.done.is_set() and not self.failed

    def _read(self) -> None:
        try:
            self.read()
        except StoreError as e:
            self.failed = str(e)
        finally:
            self.done.set()

    def read(self) -> None:
        """Raises StoreError."""
        index = self.index
        for i, (_, table) in enumerate(index.layered.tables([self.column])):
            column = whole(table[self.column])
            rows = index.position[index.first[i] : index.first[i] + index.sizes[i]]
            there = column.is_valid().to_numpy(zero_copy_only=False)
            if self._vectors is None:
                self._vectors = self._room(column.type.list_size)
            x = column.drop_null().flatten().to_numpy().reshape(-1, column.type.list_size).astype(np.float32)
            x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
            wanted = rows[there] >= 0
            self._vectors[rows[there][wanted]] = x[wanted]
            self._has[rows[there][wanted]] = True

    def _room(self, size: int) -> Any:
        shape = len(self.index), size
        if shape[0] * size * 4 <= IN_MEMORY:
            return np.zeros(shape, np.float32)
        file = tempfile.TemporaryFile(prefix="clipmill-inspect-")  # noqa: SIM115 (as long as its map)
        return np.memmap(file, np.float16, "w+", shape=shape)

    def _wait(self) -> None:
        self.begin()
        if not self.done.wait(WAIT_S):
            raise NotReady("the embeddings are still being read; ask again in a moment")
        if self.failed or self._vectors is None:
            raise NotReady(self.failed or "no clip has this embedding")

    def like(self, row: int) -> np.ndarray:
        """Cosine of every clip to one, float32 [n], NaN where there is none; of the clip itself NaN too."""
        self._wait()
        if not self._has[row]:
            raise NotReady("this clip has no embedding")
        found = self.to(np.asarray(self._vectors[row], np.float32))
        found[row] = np.nan
        return found

    def to(self, vector: np.ndarray) -> np.ndarray:
        """Cosine of every clip to a vector of unit length, float32 [n]."""
        self._wait()
        found = np.empty(len(self._has), np.float32)
        for at in range(0, len(found), BLOCK):
            found[at : at + BLOCK] = np.asarray(self._vectors[at : at + BLOCK], np.float32) @ vector
        found[~self._has] = np.nan
        return found


class Encoder:
    """Of sentences, loaded when the first one comes, or before."""

    def __init__(self) -> None:
        self._words: Any = None
        self._lock = threading.Lock()

    def load(self) -> Any:
        from models.measures.visual_fit import Words

        with self._lock:
            self._words = self._words or Words()
            return self._words

    def embed(self, text: str) -> np.ndarray:
        """float32 [d], of unit length."""
        words = self.load()
        with self._lock:
            return words.embed([text])[0]


class Near:
    """Of one run: by pictures, and by words.

    Args: encoder: one that is shared.
    """

    def __init__(self, index: Index, encoder: Encoder | None = None):
        self.encoder = encoder or Encoder()
        names = [n for n in index.layered.schema().names if n.startswith("emb_") and n != SIGNATURE]
        semantic = [n for n in names if n != WORDS]
        self.pictures = Vectors(index, (semantic or names)[0]) if names else None
        self.words = Vectors(index, WORDS) if WORDS in names else None

    def like(self, row: int) -> np.ndarray:
        """Raises NotReady."""
        if self.pictures is None:
            raise NotReady("this run has no embeddings to find similar clips by")
        return self.pictures.like(row)

    def described(self, text: str) -> np.ndarray:
        """How well words fit every clip, float32 [n]: visual fit. Raises NotReady."""
        if self.words is None:
            raise NotReady(
                "this run has no embedding that words find clips by; add the judge visual_fit with "
                "'clipmill caption', or search the captions' words with q="
            )
        self.words.begin()  # meanwhile
        return self.words.to(self.encoder.embed(text))

    def warm(self) -> bool:
        """Whether words can be sought by; what that takes is being loaded from now on."""
        if self.words is not None:
            self.words.begin()
            threading.Thread(target=self.encoder.load, daemon=True).start()
        return self.words is not None

    def wait(self) -> None:
        """Until the embeddings are read."""
        if self.pictures is not None:
            self.pictures.begin()
            self.pictures.done.wait()

    def neighbours(self, row: int, most: int = 12) -> list[tuple[int, float]] | None:
        """The nearest clips and their cosine; none while the embeddings are being read."""
        if self.pictures is None:
            return []
        if not self.pictures.begin():
            return [] if self.pictures.failed else None
        try:
            found = self.pictures.like(row)
        except NotReady:
            return []
        some = np.flatnonzero(np.isfinite(found))
        if len(some) > most:
            some = some[np.argpartition(-found[some], most)[:most]]
        best = some[np.argsort(-found[some], kind="stable")]
        return [(int(r), float(found[r])) for r in best]
