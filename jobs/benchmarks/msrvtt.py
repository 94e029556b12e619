"""MSR-VTT (Xu et al. 2016), its split 1k-A for retrieval (Yu et al. 2018) and MSRVTT-QA (Xu et al. 2017).

train_val_videodatainfo.json, test_videodatainfo.json (or one file with all of it)
    {"videos": [{"video_id": "video0", "split": "train", …}], "sentences": [{"video_id": …, "caption": …, "sen_id": …}]}
MSRVTT_JSFUSION_test.csv        key,vid_key,video_id,sentence: the 1,000 pairs of split 1k-A
train_qa.json, val_qa.json, test_qa.json
    [{"id": 158581, "video_id": 6513, "category_id": 14, "question": …, "answer": …}]
video0.mp4 …                    at any depth
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jobs.benchmarks.items import (
    NOWHERE,
    BenchmarkError,
    Folder,
    Found,
    Item,
    check_split,
    fields,
    read_csv,
    read_json,
)

SPLITS = {"train": "train", "val": "validate", "test": "test"}
PAIRS = "1k-A"


def captions(folder: Folder, split: str) -> Found:
    """Videos with all captions that people wrote; of 1k-A the one of its pair."""
    check_split(split, [*SPLITS, PAIRS])
    if split == PAIRS:
        path = folder.file("MSRVTT_JSFUSION_test.csv")
        rows = read_csv(path, ["video_id", "sentence"])
        return folder.with_videos(
            (row["video_id"], Item(row["video_id"], NOWHERE, captions=(row["sentence"],))) for row in rows
        )
    return folder.with_videos(_of_split(folder, SPLITS[split]))


def _of_split(folder: Folder, split: str) -> Iterator[tuple[str, Item]]:
    paths = folder.files("*videodatainfo*.json", "MSRVTT_data.json", "MSR_VTT.json")
    if not paths:
        raise BenchmarkError(
            f"{folder.path}: there is no *videodatainfo*.json of MSR-VTT or MSRVTT_data.json: put it there"
        )
    told: dict[str, list[str]] = {}
    for path in paths:
        videos, sentences = fields(path, read_json(path), "videos", "sentences")
        of = dict(fields(path, video, "video_id", "split") for video in videos)
        said = defaultdict(list)
        for sentence in sentences:
            name, caption = fields(path, sentence, "video_id", "caption")
            said[name].append(caption)
        for name in of:
            if of[name] == split and said[name]:
                told.setdefault(name, said[name])
    for name in sorted(told, key=lambda name: (len(name), name)):  # video2 before video10
        yield name, Item(name, NOWHERE, captions=tuple(told[name]))


def questions(folder: Folder, split: str) -> Found:
    """Open questions, of one word each."""
    check_split(split, SPLITS)
    path = folder.file(f"{split}_qa.json")
    return folder.with_videos(asked(path, lambda number: f"video{number}"))


def asked(path: Path, name: Callable[[Any], str]) -> Iterator[tuple[str, Item]]:
    """Of MSRVTT-QA and MSVD-QA, whose kinds of questions are by their first word.

    Args:
        name: of a video's file, by its number.
    """
    for row in read_json(path):
        id, number, question, answer = fields(path, row, "id", "video_id", "question", "answer")
        kind = question.split()[:1]
        yield name(number), Item(str(id), NOWHERE, question=question, answers=(answer,), group=tuple(kind))
