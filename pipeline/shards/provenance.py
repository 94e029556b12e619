"""key.json: where a sample is from, what was measured, by whom, and why it was kept.

Every sample's JSON has the same keys with values of the same kind, whatever the clip: readers that infer columns from
the first samples (HF `datasets`) must not meet an empty list, a null or another set of keys first. So

- `meta` (the list's columns), the `scores` of a caption and `kept.rules`, whose keys differ or which may be empty, are
  strings of JSON: `json.loads(sample["meta"])`;
- `text` (what was read in the picture) has a line a string, `kept.over_duplicates` the clip ids with a space between,
  and so have `flags` and `made_from` of a caption;
- what nobody said is the empty string. A score that could not be measured is null, the others are numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pipeline.layers import Layer
from pipeline.recipe import Recipe
from pipeline.tables import CLIP_SCHEMA

# Columns of clips/ that stay out of the index: long, or about the staging tars.
NOT_INDEXED = {
    *("captions", "text", "sample_frames", "sample_pts", "stills_offset", "stills_sizes", "stills_sha256"),
    *("media_tar", "media_offset", "media_size", "media_sha256"),
}
INDEXED = [f.name for f in CLIP_SCHEMA if f.name not in NOT_INDEXED]
VIDEO_COLUMNS = ["source", "width", "height", "fps", "duration_s", "codec", "rotation", "sample_aspect_ratio"]


def made_by(recipe: Recipe, run: dict[str, Any], layers: Iterable[Layer]) -> dict[str, Any]:
    """What made every sample of a run and the layers over it."""
    captioners = [c.model_dump(mode="json") for c in recipe.captions]
    captioners += [layer.section for layer in layers if layer.captions]
    return {
        "clipmill": run.get("versions", {}).get("clipmill"),
        "recipe": recipe.name,
        "measure_key": run["measure_key"],
        "models": [
            {"model": c["model"], "revision": c.get("revision")} for c in captioners if c.get("model")
        ],
        "versions": run.get("versions", {}),
    }


def provenance(
    clip: dict[str, Any],
    verdict: dict[str, Any],
    video: dict[str, Any],
    rules: dict[str, dict[str, Any]],
    copies: list[str],
) -> dict[str, Any]:
    """key.json of a clip, but for `made_by`.

    Args:
        clip: its row of clips/.
        verdict: caption and caption_model of its decision.
        video: its source's VIDEO_COLUMNS.
        rules: what was asked of it, by name.
        copies: clip ids of duplicates that it stands for.
    """
    scores = {k.removeprefix("score_"): v for k, v in clip.items() if k.startswith("score_")}
    captions = [c | {"scores": dict(c["scores"] or [])} for c in clip["captions"] or []]
    meta = dict(clip["meta"] or [])
    chosen: dict[str, Any] = next((c for c in captions if c["model"] == verdict["caption_model"]), {})
    told: dict[str, float] = chosen.get("scores") or {}
    values = clip | {f"caption.{name}": value for name, value in told.items()} | verdict
    values["caption_flags"] = " ".join(chosen.get("flags") or [])
    values |= {f"meta.{name}": value for name, value in meta.items()}
    asked = {name: rule | {"value": values.get(rule["column"])} for name, rule in rules.items()}
    return (
        {name: clip[name] for name in INDEXED if name != "meta"}
        | {"media_sha256": clip["media_sha256"], "video": video, "meta": _text(meta)}
        | {"caption": verdict["caption"] or "", "caption_model": verdict["caption_model"] or ""}
        | {"captions": [_plain(c) for c in captions]}
        | {"text": "\n".join(" ".join(t.split()) for t in clip["text"] or []), "scores": scores}
        | {"kept": {"rules": _text(asked), "over_duplicates": " ".join(copies)}}
    )


def _plain(caption: dict[str, Any]) -> dict[str, Any]:
    """A candidate without nulls (columns that older runs lack, words that nobody said), in one kind of value each."""
    texts = {
        name: caption.get(name) or "" for name in ("model", "text", "outcome", "prompt", "reason", "raw")
    }
    lists = {name: " ".join(caption.get(name) or []) for name in ("flags", "made_from")}
    return texts | lists | {"scores": _text(caption["scores"])}


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)
