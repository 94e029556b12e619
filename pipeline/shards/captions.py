"""Which caption of a sample a trainer sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

CaptionRule = Literal["chosen", "sample", "fields"] | Callable[[dict[str, Any], np.random.Generator], str]


def caption_of(meta: dict[str, Any], rule: CaptionRule, rng: np.random.Generator) -> str:
    """Of a sample's key.json by a rule (see `ShardReader`); '' where it has none."""
    if callable(rule):
        return rule(meta, rng)
    told = [c for c in meta.get("captions", []) if c["text"]]
    if rule == "fields":
        from pipeline.caption.structured import record_of, sampled

        scores = {k: v for k, v in json_of(meta.get("scores") or {}).items() if v is not None}
        found = (r for c in told if (r := record_of(c.get("raw") or "", scores)))
        if (record := next(found, None)) is not None:
            return sampled(record, str(rng.integers(1 << 62)))
        return meta.get("caption") or ""
    if rule == "chosen" or not told:
        return meta.get("caption") or ""
    weights = np.array([max([0.0, *json_of(c["scores"]).values()]) for c in told])
    weights = np.maximum(weights, 1e-3) / np.maximum(weights, 1e-3).sum()
    return told[int(np.searchsorted(np.cumsum(weights)[:-1], rng.random(), "right"))]["text"]


def json_of(told: Any) -> dict[str, Any]:
    """What a map of key.json holds: JSON text (see `pipeline.shards.provenance`); older shards have a map."""
    return json.loads(told) if isinstance(told, str) else told
