"""Questions of one's own, as `clipmill toy --questions` writes them, and the clips of a run.

choices.json    [{"id": …, "video": "scenes/a.mp4", "question": …, "options": […], "answer": 2, "kind": …}]
                without options it is an open question, and the answer a text or a list of right ones
"""

from __future__ import annotations

from functools import partial

from jobs.benchmarks.items import BenchmarkError, Folder, Found, Item, fields, read_json
from pipeline.io.store import Store, below
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader


def questions(folder: Folder, split: str) -> Found:
    """Those of NAME.json, by default choices.json; paths are relative to it."""
    path = folder.path / f"{split}.json"
    if not path.is_file():
        raise BenchmarkError(f"{folder.path} has no {split}.json of questions: name another with --split")
    rows = read_json(path)
    missing: list[str] = []
    items: list[Item] = []
    if not isinstance(rows, list):
        raise BenchmarkError(f"{path} is no list of questions")
    for i, row in enumerate(rows):
        id, video, question, answer = fields(path, row, "id", "video", "question", "answer")
        options = tuple(row.get("options") or ())
        if options and not (isinstance(answer, int) and 0 <= answer < len(options)):
            raise BenchmarkError(
                f"{path}: question {i + 1} has the answer {answer!r}, which is no place in its options"
            )
        if not (path.parent / video).is_file():
            missing.append(video)
            continue
        right = () if options else tuple(answer) if isinstance(answer, list) else (str(answer),)
        items.append(
            Item(
                str(id),
                path.parent / video,
                question=question,
                options=options,
                answer=answer if options else None,
                answers=right,
                group=(row["kind"],) if row.get("kind") else (),
            )
        )
    if not items:
        raise BenchmarkError(
            f"{path}: none of its videos is there ({missing[0] if missing else 'it is empty'})"
        )
    return Found(items, sorted(set(missing)))


def clips(shards: str) -> Found:
    """Clips of a run with their caption, in the index's order. Raises StoreError where there are no shards.

    Args:
        shards: RUN/shards or RUN.
    """
    inside = below(shards, "shards")
    folder = inside if Store(inside).exists("index.parquet") else shards
    reader = ShardReader(folder, frames=1, decode=False, shuffle=False)
    index = read_index(folder)
    told = index["caption"].to_pylist() if "caption" in index.column_names else None
    items = []
    for row, key in enumerate(reader.keys):
        caption = (told[row] if told else reader.read(row)["caption"]) or ""
        items.append(Item(str(key), partial(_bytes, reader, row), captions=(caption,)))
    return Found(items)


def _bytes(reader: ShardReader, row: int) -> bytes:
    data: bytes = reader.read(row)["video"]
    return data
