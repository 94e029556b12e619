"""Video-MME (Fu et al. 2024).

test-00000-of-00001.parquet     video_id, duration (short, medium, long), domain, sub_category, url, videoID,
                                question_id, task_type, question, options (["A. …", …]), answer ("C")
026dzf-vc5g.mp4 …               by videoID, at any depth
subtitle/068rdc75mHM.srt …      by videoID, at any depth; of 744 of the 900 videos
"""

from __future__ import annotations

import re
import string

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.benchmarks.items import NOWHERE, BenchmarkError, Folder, Found, Item, check_split

COLUMNS = ["duration", "domain", "videoID", "question_id", "task_type", "question", "options", "answer"]
_LETTER = re.compile(r"^[A-Z]\.\s*")


def questions(folder: Folder, split: str) -> Found:
    """Multiple choice; kinds are by length, by domain and by task."""
    check_split(split, ["test"])
    path = folder.file("test-*.parquet")
    try:
        rows = pq.read_table(path, columns=COLUMNS).to_pylist()
    except (OSError, pa.ArrowException) as e:
        raise BenchmarkError(f"{path} is not Video-MME's table ({e}): fetch it again") from e
    return folder.with_videos((row["videoID"], _item(row)) for row in rows)


def _item(row: dict) -> Item:
    return Item(
        row["question_id"],
        NOWHERE,
        question=row["question"],
        options=tuple(_LETTER.sub("", option) for option in row["options"]),
        answer=string.ascii_uppercase.index(row["answer"].strip()[0]),
        group=(row["duration"], row["domain"], row["task_type"]),
    )
