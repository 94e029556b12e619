"""ActivityNet Captions (Krishna et al. 2017) and ActivityNet-QA (Yu et al. 2019).

train.json, val_1.json, val_2.json  {"v_…": {"duration": 82.73, "timestamps": [[0.83, 19.86], …], "sentences": […]}}
train_q.json, val_q.json, test_q.json   [{"video_name": …, "question": …, "question_id": …}]
train_a.json, val_a.json, test_a.json   [{"answer": …, "type": 3, "question_id": …}]
v_….mp4                             at any depth
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jobs.benchmarks.items import (
    NOWHERE,
    BenchmarkError,
    Folder,
    Found,
    Item,
    check_split,
    fields,
    read_json,
)

SPLITS = ("train", "val_1", "val_2")
QUESTIONS = ("train", "val", "test")
KINDS = (
    ("motion",),
    ("spatial relationship",),
    ("temporal relationship",),
    *(("free", kind) for kind in ("yes/no", "colour", "object", "location", "number", "other")),
)  # by `type` of an answer


def captions(folder: Folder, split: str) -> Found:
    """Stretches of videos, where people saw an event, with their sentence; both places and sentences are given."""
    check_split(split, SPLITS)
    return folder.with_videos(_stretches(folder.file(f"{split}.json")))


def paragraphs(folder: Folder, split: str) -> Found:
    """Whole videos with their sentences one after the other, which is what retrieval is judged by."""
    check_split(split, SPLITS)
    path = folder.file(f"{split}.json")
    rows = ((name, fields(path, row, "sentences")[0]) for name, row in _rows(path))
    return folder.with_videos(
        (name, Item(name, NOWHERE, captions=(" ".join(s.strip() for s in sentences),)))
        for name, sentences in rows
    )


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    told = read_json(path)
    if not isinstance(told, dict):
        raise BenchmarkError(f"{path} has no videos by name: it is not the benchmark's own file")
    yield from told.items()


def _stretches(path: Path) -> Iterator[tuple[str, Item]]:
    for name, row in _rows(path):
        duration, places, sentences = fields(path, row, "duration", "timestamps", "sentences")
        for i, ((start, end), sentence) in enumerate(zip(places, sentences, strict=True)):
            start, end = sorted(
                min(max(0.0, t), duration) for t in (start, end)
            )  # some are the wrong way round
            yield name, Item(f"{name}:{i}", NOWHERE, captions=(sentence.strip(),), span=(start, end))


def questions(folder: Folder, split: str) -> Found:
    """Open questions, of a word or a few each."""
    check_split(split, QUESTIONS)
    asked, told = folder.file(f"{split}_q.json"), folder.file(f"{split}_a.json")
    answers = {}
    for row in read_json(told):
        id, answer, kind = fields(told, row, "question_id", "answer", "type")
        answers[id] = (answer, KINDS[kind] if kind in range(len(KINDS)) else (str(kind),))
    return folder.with_videos(_questions(asked, answers))


def _questions(path: Path, answers: dict[str, tuple[str, tuple[str, ...]]]) -> Iterator[tuple[str, Item]]:
    for row in read_json(path):
        name, question, id = fields(path, row, "video_name", "question", "question_id")
        if id in answers:
            answer, kind = answers[id]
            yield f"v_{name}", Item(id, NOWHERE, question=question, answers=(answer,), group=kind)
