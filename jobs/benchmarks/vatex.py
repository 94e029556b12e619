"""VATEX (Wang et al. 2019), its English captions.

vatex_training_v1.0.json, vatex_validation_v1.0.json, vatex_public_test_english_v1.1.json
    [{"videoID": "G9zN5TTuGO4_000179_000189", "enCap": [… ten …], "chCap": [… ten …]}]
G9zN5TTuGO4_000179_000189.mp4 …     at any depth
"""

from __future__ import annotations

from jobs.benchmarks.items import NOWHERE, Folder, Found, Item, check_split, fields, read_json

SPLITS = {
    "train": "vatex_training*.json",
    "val": "vatex_validation*.json",
    "test": "vatex_public_test_english*.json",
}


def captions(folder: Folder, split: str) -> Found:
    """Videos with their English captions."""
    check_split(split, SPLITS)
    path = folder.file(SPLITS[split])
    rows = (fields(path, row, "videoID", "enCap") for row in read_json(path))
    return folder.with_videos((name, Item(name, NOWHERE, captions=tuple(said))) for name, said in rows)
