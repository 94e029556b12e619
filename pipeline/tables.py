"""The parquet tables a run ends up in: their columns, each with what it means, and how a record becomes a row.

videos/ has a row a source (VIDEO_SCHEMA), clips/ a row a clip (CLIP_SCHEMA and a column per score and embedding),
decisions.parquet one a clip again (DECISION_SCHEMA), so that decisions can change while measures stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline.geometry import MATRICES, PRIMARIES, TRANSFERS
from pipeline.record import Caption, Clip, Video


def _described(fields: list[tuple[str, pa.DataType, str]]) -> pa.Schema:
    return pa.schema([pa.field(n, t, metadata={"doc": doc}) for n, t, doc in fields])


CAPTION = pa.struct(
    [
        ("model", pa.string()),
        ("text", pa.string()),
        ("outcome", pa.string()),
        ("prompt", pa.string()),
        ("scores", pa.map_(pa.string(), pa.float32())),
        ("reason", pa.string()),  # of outcome 'error', one sentence; '' otherwise
        ("raw", pa.string()),  # what was said, word for word, where that is not the text
        ("flags", pa.list_(pa.string())),  # see pipeline.caption.hygiene
        ("support", pa.map_(pa.string(), pa.list_(pa.float32()))),  # by score: a number a sentence
        ("cost", pa.map_(pa.string(), pa.float64())),  # tokens, usd
        ("made_from", pa.list_(pa.string())),  # models of the captions that it puts together
    ]
)

VIDEO_SCHEMA = _described(
    [
        ("source", pa.string(), "absolute path or URL"),
        ("name", pa.string(), "path below the SOURCE argument"),
        ("unit", pa.string(), "unit of work it was committed with"),
        ("sha256", pa.string(), "of the source's bytes; null where they could not be read"),
        ("status", pa.string(), "'ok' or 'error'"),
        ("error", pa.string(), "one sentence; null when ok"),
        ("stage", pa.string(), "stage that failed; null when ok"),
        ("error_at", pa.string(), "UTC time of the failure, ISO 8601"),
        ("error_kind", pa.string(), "whose fault: 'source', 'worker' or 'transient'; null when ok"),
        ("warnings", pa.list_(pa.string()), "trouble that was survived"),
        ("duration_s", pa.float64(), "first PTS to end of last frame, seconds"),
        ("width", pa.int32(), "upright, stored pixels"),
        ("height", pa.int32(), "upright, stored pixels"),
        ("fps", pa.float64(), "mean frame rate from PTS"),
        ("frames", pa.int64(), "decoded frames"),
        ("codec", pa.string(), "name of the video codec"),
        ("rotation", pa.int32(), "degrees counter-clockwise applied to make it upright"),
        ("sample_aspect_ratio", pa.float64(), "pixel width ÷ height"),
        ("clips", pa.int32(), "rows it has in clips/"),
        ("counts", pa.map_(pa.string(), pa.int64()), "shots, events dropped while splitting, …"),
        ("seconds", pa.map_(pa.string(), pa.float64()), "wall seconds per stage"),
        ("meta", pa.map_(pa.string(), pa.string()), "the other columns of the list it came from"),
        ("size", pa.int64(), "bytes of the source; null where listing did not know"),
        ("mtime_ns", pa.int64(), "when it was last modified, ns since 1970; null where it is not local"),
        ("intervals_key", pa.string(), "hash of the clips that the list gives; '' where it gives none"),
        ("interval_meta_key", pa.string(), "hash of what the list says of each of these clips"),
        ("chunks", pa.int32(), "units it was divided into after splitting, 1 for most"),
        ("pix_fmt", pa.string(), "libav's name of the pixel format"),
        (
            "crop",
            pa.list_(pa.int32(), 4),
            "left, top, right, bottom that the container cuts off, stored pixels",
        ),
        ("mirrored", pa.bool_(), "its left and right are swapped to show it"),
        ("interlaced", pa.float32(), "share of the frames that are flagged as interlaced, 0 to 1"),
        ("field_order", pa.string(), "'top' or 'bottom' is shown first; null where progressive or unknown"),
        ("hdr", pa.string(), "'pq' or 'hlg'; null where not high dynamic range"),
        ("color_matrix", pa.string(), "ffmpeg's names; 'unknown' is taken for BT.601, null of RGB and grey"),
        ("color_primaries", pa.string(), "ffmpeg's names, 'unknown' where the source does not say"),
        ("color_transfer", pa.string(), "ffmpeg's names, 'unknown' where the source does not say"),
        ("full_range", pa.bool_(), "luma from 0 to 255, not from 16 to 235"),
        (
            "salt",
            pa.string(),
            "name that is in its clip ids: the one it was measured under, with a number where that is taken",
        ),
        ("time_base", pa.string(), "seconds a tick of the stream, as a fraction"),
    ]
)

# The fixed part of clips/*.parquet; `clip_schema` adds a column per score and per embedding.
CLIP_SCHEMA = _described(
    [
        ("clip_id", pa.string(), "20 hex digits, see pipeline.record.clip_id"),
        ("source", pa.string(), "as in videos/"),
        ("name", pa.string(), "as in videos/"),
        ("source_sha256", pa.string(), "of the source's bytes"),
        ("start_s", pa.float64(), "PTS of the first frame, seconds on the source's clock"),
        ("end_s", pa.float64(), "PTS at which the last frame ends, seconds"),
        ("start_frame", pa.int64(), "first frame, index in presentation order"),
        ("end_frame", pa.int64(), "one past the last frame"),
        ("duration_s", pa.float64(), "end_s − start_s"),
        ("width", pa.int32(), "of the clip, pixels"),
        ("height", pa.int32(), "of the clip, pixels"),
        ("fps", pa.float64(), "mean frame rate of the source"),
        ("captions", pa.list_(CAPTION), "every candidate, with what scored it"),
        ("text", pa.list_(pa.string()), "text read in the picture, most prominent first"),
        ("meta", pa.map_(pa.string(), pa.string()), "the source's metadata"),
        ("media_tar", pa.string(), "staging tar with the clip's mp4, relative to the output"),
        ("media_offset", pa.int64(), "first byte of the mp4 in that tar"),
        ("media_size", pa.int64(), "bytes of the mp4"),
        ("media_sha256", pa.string(), "of the mp4's bytes"),
        ("stills_offset", pa.int64(), "first byte of the JPEGs of sample_frames in that tar; null without"),
        ("stills_sizes", pa.list_(pa.int32()), "bytes of each of these JPEGs"),
        ("stills_sha256", pa.string(), "of their bytes, one after another"),
        (
            "sample_frames",
            pa.list_(pa.int64()),
            "frames that captioners, scores and choosers were shown a choice of, numbered as start_frame",
        ),
        ("sample_pts", pa.list_(pa.int64()), "PTS of each, ticks of its source's time_base"),
    ]
)

DECISION_SCHEMA = _described(
    [
        ("clip_id", pa.string(), "as in clips/"),
        ("source", pa.string(), "as in clips/"),
        ("keep", pa.bool_(), "it is in the shards"),
        ("dropped_by", pa.list_(pa.string()), "every rule it fails, in the recipe's order"),
        ("duplicate_of", pa.string(), "clip_id of the copy that was kept"),
        ("caption", pa.string(), "the chosen caption"),
        ("caption_model", pa.string(), "who wrote it"),
        ("shard", pa.string(), "tar, relative to the output; null when dropped"),
        ("offset", pa.int64(), "first byte of the mp4 in that tar"),
        ("size", pa.int64(), "bytes of the mp4"),
        ("tar", pa.string(), "the same tar, relative to shards/, as in shards/index.parquet"),
    ]
)


def clip_schema(scores: list[str], embeddings: dict[str, int]) -> pa.Schema:
    """CLIP_SCHEMA plus one `score_*` column a measure and one `emb_*` column a model."""
    schema = CLIP_SCHEMA
    for name in scores:
        schema = schema.append(pa.field(f"score_{name}", pa.float64()))
    for name, size in embeddings.items():
        schema = schema.append(pa.field(f"emb_{name}", pa.list_(pa.float32(), size)))
    return schema


def video_row(v: Video) -> dict[str, Any]:
    """A row of VIDEO_SCHEMA."""
    known = v.error is None
    seen, g, c = bool(v.width), v.geometry, v.geometry.colours
    return {
        "source": v.source.uri,
        "name": v.source.name,
        "unit": v.unit,
        "sha256": v.sha256 or None,
        "status": "ok" if known else "error",
        "error": None if v.error is None else v.error.message,
        "stage": None if v.error is None else v.error.stage,
        "error_at": None if v.error is None else v.error.at,
        "error_kind": None if v.error is None else v.error.kind,
        "warnings": v.warnings,
        "duration_s": v.duration_s if v.width else None,
        "width": v.width or None,
        "height": v.height or None,
        "fps": v.fps or None,
        "frames": v.counts.get("frames"),
        "codec": v.codec or None,
        "rotation": v.rotation if v.width else None,
        "sample_aspect_ratio": float(v.sar) if v.width else None,
        "clips": len(v.clips) if known else 0,
        "counts": list(v.counts.items()),
        "seconds": list(v.seconds.items()),
        "meta": list(v.source.meta.items()),
        "size": v.source.bytes,
        "mtime_ns": v.source.mtime_ns,
        "intervals_key": v.source.intervals_key(),
        "interval_meta_key": v.source.interval_meta_key(),
        "chunks": v.chunks,
        "pix_fmt": v.pix_fmt or None,
        "crop": list(g.crop) if seen else None,
        "mirrored": g.orientation.mirrored if seen else None,
        "interlaced": v.interlaced if seen else None,
        "field_order": v.field_order or None,
        "hdr": c.hdr or None,
        "color_matrix": MATRICES[c.matrix] if seen and c.model == "yuv" else None,
        "color_primaries": PRIMARIES[c.primaries] if seen else None,
        "color_transfer": TRANSFERS[c.transfer] if seen else None,
        "full_range": c.full_range if seen else None,
        "salt": v.salt,
        "time_base": str(v.time_base) if seen else None,
    }


def caption_row(caption: Caption) -> dict[str, Any]:
    """A CAPTION."""
    maps = {name: list(getattr(caption, name).items()) for name in ("scores", "support", "cost")}
    return {f.name: maps.get(f.name, getattr(caption, f.name)) for f in CAPTION}


def caption_of(row: Mapping[str, Any]) -> Caption:
    """A CAPTION as a record again; an older run's lacks what came later."""
    found = {f.name: row[f.name] for f in CAPTION if row.get(f.name) is not None}
    return Caption(**(found | {name: dict(row.get(name) or []) for name in ("scores", "support", "cost")}))


def clip_row(v: Video, c: Clip, scores: list[str], embeddings: dict[str, int]) -> dict[str, Any]:
    """A row of `clip_schema(scores, embeddings)`; what was not measured is null."""
    assert c.media is not None
    stills = c.media.stills
    row: dict[str, Any] = {
        "clip_id": c.clip_id,
        "source": v.source.uri,
        "name": v.source.name,
        "source_sha256": v.sha256,
        "start_s": c.start_s,
        "end_s": c.end_s,
        "start_frame": c.start_frame,
        "end_frame": c.end_frame,
        "duration_s": c.duration_s,
        "width": c.media.width,
        "height": c.media.height,
        "fps": v.fps,
        "captions": [caption_row(k) for k in c.captions],
        "text": c.text,
        "meta": list((v.source.meta | c.meta).items()),
        "media_tar": c.media.tar,
        "media_offset": c.media.offset,
        "media_size": c.media.size,
        "media_sha256": c.media.sha256,
        "stills_offset": stills.offset if stills else None,
        "stills_sizes": stills.sizes if stills else None,
        "stills_sha256": stills.sha256 if stills else None,
        "sample_frames": c.sample_frames,
        "sample_pts": c.sample_pts,
    }
    row |= {f"score_{name}": c.scores.get(name) for name in scores}
    row |= {f"emb_{name}": c.embeddings.get(name) for name in embeddings}
    return row
