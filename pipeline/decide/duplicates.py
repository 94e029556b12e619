"""Near-duplicate clips: exact cosine search, block by block, keeping the best of what looks alike.

The search is greedy in order of rank: a clip is dropped when it is similar to a better clip that is
kept, and names the first such clip. Unlike the connected components of a union-find, this never
chains: where A resembles B and B resembles C but A not C, both A and C stay, and every dropped clip is
itself at or above the threshold with the clip it names.

Exact and yet cheap: unit vectors a, b are split by an orthonormal basis U of a few directions into
Uᵀa and the rest, whose length is r_a. By Cauchy–Schwarz

    a·b ≤ (Uᵀa)·(Uᵀb) + r_a r_b,

so the bound is itself a short dot product, and only pairs whose bound reaches the threshold are
compared in full. U is the span in which the vectors have most of their energy (their second moment's
leading eigenvectors), which makes the bound tight.
"""

from __future__ import annotations

import numpy as np

DIRECTIONS = 48  # of the bound; the full comparison decides, so this changes time alone
SKETCH_FROM = 8192  # clips; below, full comparisons are cheaper than finding the directions
SAMPLE = 8192  # clips the directions are found on
ROWS, COLUMNS = 512, 16384  # of a block: 32 MiB of float32
SLACK = 1e-6  # rounding of a float32 dot product: equal vectors reach a threshold of 1


def near_duplicates(
    vectors: list[np.ndarray], source: np.ndarray, within: list[float], across: list[float]
) -> np.ndarray:
    """Which clips repeat a better one.

    Two clips are near-duplicates where every kind of vector agrees.

    Args:
        vectors: of each kind, float32 [n, d], unit rows, best clip first.
        source: int [n], which source a clip is from.
        within: of each kind, least cosine of near-duplicates of one source.
        across: the same, of different sources.

    Returns int64 [n]: −1 for a clip to keep, else the row of the kept clip it repeats (a smaller row).
    Memory: the vectors plus (DIRECTIONS + 1) floats a clip plus one block.
    """
    n = len(source)
    repeats = np.full(n, -1, np.int64)
    kept = np.empty(n, np.int64)
    n_kept = 0
    short, least = _bound(vectors[0]), min(within[0], across[0])

    def similar(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """bool [rows, columns]."""
        found = np.zeros((len(rows), len(columns)), bool)
        r, c = np.arange(len(rows)), np.arange(len(columns))
        if short is not None:
            possible = short[rows] @ short[columns].T >= least - 1e-4
            r, c = np.flatnonzero(possible.any(1)), np.flatnonzero(possible.any(0))
        if len(r) and len(c):
            same = source[rows[r], None] == source[columns[c]]
            alike = np.ones(same.shape, bool)
            for x, w, a in zip(vectors, within, across, strict=True):
                alike &= x[rows[r]] @ x[columns[c]].T >= np.where(same, w - SLACK, a - SLACK)
            found[np.ix_(r, c)] = alike
        return found

    for start in range(0, n, ROWS):
        rows = np.arange(start, min(start + ROWS, n))
        for k in range(0, n_kept, COLUMNS):
            columns = kept[k : min(k + COLUMNS, n_kept)]
            hit = similar(rows, columns)
            any_hit = hit.any(1)
            repeats[rows[any_hit]] = columns[hit[any_hit].argmax(1)]
            rows = rows[~any_hit]
        hit = np.triu(similar(rows, rows), 1)
        for i in np.flatnonzero(hit.any(1)):
            if repeats[rows[i]] < 0:
                later = rows[hit[i]]
                repeats[later[repeats[later] < 0]] = rows[i]
        rows = rows[repeats[rows] < 0]
        kept[n_kept : n_kept + len(rows)] = rows
        n_kept += len(rows)
    return repeats


def _bound(x: np.ndarray) -> np.ndarray | None:
    """float32 [n, DIRECTIONS + 1] whose dot products are never below those of the unit rows of x."""
    n, d = x.shape
    if n < SKETCH_FROM or d <= 2 * DIRECTIONS:
        return None
    sample = x[np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64)]
    basis = np.linalg.eigh(sample.T @ sample)[1][:, -DIRECTIONS:].astype(np.float32)  # [d, DIRECTIONS]
    short = np.empty((n, DIRECTIONS + 1), np.float32)
    short[:, :-1] = x @ basis
    short[:, -1] = np.sqrt(np.maximum(1 - np.square(short[:, :-1]).sum(1), 0))
    return short
