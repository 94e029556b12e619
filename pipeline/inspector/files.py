"""Columns of all clip files of a run, with its layers over them, read with as few threads and bytes as will do."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.layers import READERS, Layered, read_ahead
from pipeline.tables import CLIP_SCHEMA

REPEATED = ["source", "name", "media_tar"]  # texts that many clips share: read as dictionaries
TYPES = {
    f.name: pa.dictionary(pa.int32(), pa.string()) if f.name in REPEATED else f.type for f in CLIP_SCHEMA
}
READERS_HERE = 2  # files at a time from a disk: more threads than cores only wait for one another


def read_columns(layered: Layered, names: Sequence[str]) -> tuple[np.ndarray, dict[str, pa.ChunkedArray]]:
    """Clips of each file, int64 [files], and the columns, of all files one after the other. Raises StoreError."""
    readers = READERS_HERE if layered.store.local else READERS
    found = read_ahead(lambda name: _read(layered, name, names), layered.files, readers=readers)
    tables = [table for _, table in found]
    sizes = np.array([len(t) for t in tables], np.int64)
    return sizes, {
        c: pa.chunked_array([k for t in tables for k in t[i].chunks], TYPES.get(c, pa.float64()))
        for i, c in enumerate(names)
    }


def _read(layered: Layered, name: str, wanted: Sequence[str]) -> pa.Table:
    def read(file: Any) -> pa.Table:
        parquet = pq.ParquetFile(native(file), read_dictionary=REPEATED)
        there = set(parquet.schema_arrow.names)
        return parquet.read([c for c in wanted if c in there], use_threads=False)

    table: pa.Table = layered.store.files.using(name, read)
    over = {c for layer in layered.over.get(name, ()) for c in layer.schema().names}
    again = [c for c in wanted if (c in over and c != "clip_id") or c not in table.column_names]
    found = {c: table[c] for c in table.column_names}
    if again:
        found |= zip(again, layered.read(name, again).columns, strict=True)
    return pa.table([_typed(found[c], TYPES.get(c, pa.float64())) for c in wanted], names=list(wanted))


def native(file: Any) -> Any:
    """A file that Arrow reads by itself: of one of Python's each read takes the interpreter's lock, and threads wait
    for one another."""
    return pa.OSFile(file.name) if isinstance(file, io.BufferedReader) else file


def _typed(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A column as all files have it: older ones may lack it, or know another type."""
    if column.type == kind:
        return column
    if pa.types.is_null(column.type):
        return pa.chunked_array([pa.nulls(len(column), kind)])
    return column.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else column.cast(kind)


def numbers(column: pa.ChunkedArray, dtype: Any) -> np.ndarray:
    """[n]; null is NaN, or −1 of whole numbers."""
    empty = np.nan if np.issubdtype(dtype, np.floating) else -1
    found, at = np.empty(len(column), dtype), 0
    for chunk in column.chunks:
        some = chunk if not chunk.null_count or empty is np.nan else chunk.fill_null(-1)
        found[at : at + len(chunk)] = some.to_numpy(zero_copy_only=False)
        at += len(chunk)
    return found
