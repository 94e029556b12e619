"""NExT-QA (Xiao et al. 2021), multiple choice and open.

    train.csv, val.csv, test.csv
        video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4   answer: 0 … 4, multiple choice
        video,frame_count,width,height,question,answer,qid,type                  answer: a few words, open
    add_reference_answer_test.json      {video: {qid: another right answer}}, of the open ones
    4010069381.mp4 …                    at any depth (NExTVideo/1164/4010069381.mp4)

Kinds: causal (why, how), temporal (before, now, after) and descriptive; the letters are the files' own.
"""

from __future__ import annotations

from pathlib import Path

from jobs.benchmarks.items import (
    NOWHERE,
    BenchmarkError,
    Folder,
    Found,
    Item,
    check_split,
    read_csv,
    read_json,
)

SPLITS = ("train", "val", "test")
OPTIONS = ("a0", "a1", "a2", "a3", "a4")
COLUMNS = ("video", "question", "answer", "qid", "type")
KINDS = {"C": "causal", "T": "temporal", "D": "descriptive"}


def questions(folder: Folder, split: str) -> Found:
    """Questions of both kinds, whichever the file has."""
    check_split(split, SPLITS)
    path = folder.file(f"{split}.csv")
    more = {}
    for extra in folder.files(f"add_reference_answer_{split}.json"):
        more = read_json(extra)
    return folder.with_videos(_item(path, row, more) for row in read_csv(path, COLUMNS))


def _item(path: Path, row: dict[str, str], more: dict[str, dict[str, str]]) -> tuple[str, Item]:
    video, question, answer, qid, kind = (row[name] for name in COLUMNS)
    id, group = f"{video}_{qid}", (KINDS.get(kind[:1], kind), kind)
    if OPTIONS[0] not in row:
        answers = [answer, *filter(None, [more.get(video, {}).get(qid)])]
        return video, Item(id, NOWHERE, question=question, answers=tuple(answers), group=group)
    if answer not in {str(i) for i in range(len(OPTIONS))}:
        raise BenchmarkError(f"{path}: question {id} has the answer {answer!r}, not 0 to 4: fetch it again")
    options = tuple(row[name] for name in OPTIONS)
    return video, Item(id, NOWHERE, question=question, options=options, answer=int(answer), group=group)
