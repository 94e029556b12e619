"""Conversations of .jsonl files, whose pictures are made sure of before any training."""

from __future__ import annotations

from pathlib import Path

from pipeline.faults import StoreError
from pipeline.shards.chat import ChatReader

LOOKED_AT = 100  # conversations of which the pictures are looked for


def talks_of(path: str, seed: int) -> ChatReader:
    """Raises StoreError, too, where of the first conversations with pictures none has one that is there."""
    reader = ChatReader(path, seed)
    named: list[str] = []
    for row in range(min(reader.samples, LOOKED_AT)):
        sample = reader.read(row)
        named += [*sample["images"], *filter(None, [sample["video"]])]
    if named and not any("://" in name or Path(name).is_file() for name in named):
        raise StoreError(
            f"none of the first {len(named):,} pictures and videos is there ({named[0]}): names are relative to the "
            "folder of the .jsonl file"
        )
    return reader
