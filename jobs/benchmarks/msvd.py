"""MSVD (Chen and Dolan 2011, 'YouTube2Text') and MSVD-QA (Xu et al. 2017).

AllVideoDescriptions.txt    '-4wsuPCjDBc_5_15 a squirrel is eating a peanut': video, caption; lines before them explain
or video_corpus.csv         VideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description
or raw-captions.pkl         {video: [[word, …], …]}
train_list.txt, val_list.txt, test_list.txt     names of the videos of a split, a line each
train_qa.json, val_qa.json, test_qa.json        [{"id": …, "video_id": 1201, "question": …, "answer": …}]
youtube_mapping.txt         '-4wsuPCjDBc_5_15 vid1': of the numbers in these
-4wsuPCjDBc_5_15.avi …      at any depth
"""

from __future__ import annotations

import pickle
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from jobs.benchmarks.items import NOWHERE, BenchmarkError, Folder, Found, Item, check_split, read_csv
from jobs.benchmarks.msrvtt import asked

SPLITS = ("train", "val", "test")
EVERY = "all"
_NAME = re.compile(r"(?P<name>\S+_\d+_\d+)\s+(?P<caption>\S.*)")


def captions(folder: Folder, split: str) -> Found:
    """Videos with all English captions that people wrote."""
    check_split(split, [*SPLITS, EVERY])
    told = _told(folder)
    listed = None if split == EVERY else folder.file(f"{split}_list.txt").read_text(encoding="utf-8").split()
    names = sorted(told) if listed is None else listed
    return folder.with_videos(
        (name, Item(name, NOWHERE, captions=tuple(told[name]))) for name in names if told.get(name)
    )


def questions(folder: Folder, split: str) -> Found:
    """Open questions, of one word each."""
    check_split(split, SPLITS)
    mapping = folder.file("youtube_mapping.txt")
    pairs = [line.split() for line in mapping.read_text(encoding="utf-8").splitlines() if line.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise BenchmarkError(f"{mapping} has lines of more than 'name vidN': fetch it again")
    names = {number: name for name, number in pairs}
    path = folder.file(f"{split}_qa.json")
    return folder.with_videos(asked(path, lambda number: names.get(f"vid{number}", f"vid{number}")))


def _told(folder: Folder) -> dict[str, list[str]]:
    """Captions of each video."""
    told: dict[str, list[str]] = defaultdict(list)
    path = folder.file("AllVideoDescriptions.txt", "video_corpus.csv", "raw-captions.pkl")
    if path.suffix == ".txt":
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if found := _NAME.match(line):
                told[found["name"]].append(found["caption"].strip())
    elif path.suffix == ".csv":
        for row in read_csv(path, ["VideoID", "Start", "End", "Language", "Description"]):
            if row["Language"] == "English" and row["Description"].strip():
                told["_".join((row["VideoID"], row["Start"], row["End"]))].append(row["Description"].strip())
    else:
        told |= {name: [" ".join(words) for words in several] for name, several in _plain(path).items()}
    return told


class _Plain(pickle.Unpickler):
    """Lists, dictionaries and texts; a pickle may otherwise run any program."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def _plain(path: Path) -> dict[str, list[list[str]]]:
    """Raises BenchmarkError for a pickle that holds anything but captions."""
    try:
        with path.open("rb") as f:
            found: dict[str, list[list[str]]] = _Plain(f, encoding="utf-8").load()
        assert all(isinstance(words, list) for several in found.values() for words in several)
    except Exception as e:  # what a broken pickle raises is not written anywhere
        raise BenchmarkError(f"{path} is no pickle of captions ({e}): fetch it again") from e
    return found
