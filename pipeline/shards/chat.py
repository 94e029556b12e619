"""Conversations in JSONL files, as a source of samples beside shards: instruction data, or text alone.

A line is one sample:

    {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A ball."}],
     "video": "clips/ball.mp4"}

Roles are system (first, if at all), user and assistant, who speaks at least once. `images` (a list) and `video` name
files, relative to the folder of the JSONL file, or addresses. Other fields are handed on as `meta`, but for `image` and
`videos`, as others call these, which would be passed over in silence. Empty lines are passed over.

Files are read once when they are opened, line by line: every line is looked at, then only where it lies is kept (16
bytes a line). A line is read again when its turn comes, so memory does not grow with the text.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.faults import StoreError
from pipeline.io.store import Ranges, Store, below
from pipeline.shards.mixture import Sample
from pipeline.shards.order import Permutation

ROLES = ("system", "user", "assistant")
BLOCK = 8 << 20  # bytes read at once
SURROGATE = re.compile("[\ud800-\udfff]")


class ChatReader:
    """A `pipeline.shards.mixture.Source`.

    Args:
        path: a .jsonl file, or a folder with such files at any depth; local, s3:// or gs://.
        shuffle: False reads the lines in their order.

    A sample is {'key': 'talk.jsonl:12' (file and line), 'messages': list of {'role', 'content'}, 'images': list of
    paths or addresses, 'video': one or None, 'meta': dict, 'skipped': []}.

    Raises StoreError where there is nothing, or a line is not as above: one sentence with file and line.
    """

    def __init__(self, path: str, seed: int = 0, shuffle: bool = True):
        self.path, self.seed, self.shuffle = path, seed, shuffle
        self.folder, self.names = _files(path)
        found = hashlib.blake2b(digest_size=16)
        starts: list[np.ndarray] = []  # of each file's lines
        lines: list[np.ndarray] = []
        sizes: list[np.ndarray] = []
        for name in self.names:
            places = array("q")
            found.update(name.encode())
            for number, offset, line in _lines(Store(self.folder), name):
                checked(line, f"{self._shown(name)} line {number}")
                found.update(line)
                places.extend((offset, number, len(line)))
            each = np.frombuffer(places, np.int64).reshape(-1, 3)
            starts.append(each[:, 0].copy())
            lines.append(each[:, 1].astype(np.int32))
            sizes.append(each[:, 2].astype(np.int32))
        self.ends = np.cumsum([len(x) for x in starts])  # of the files, in lines
        self.starts, self.lines, self.sizes = (np.concatenate(x) for x in (starts, lines, sizes))
        if not len(self.starts):
            raise StoreError(f"{path} holds no conversation: its files are empty")
        self._identity = found.hexdigest()
        self._ranges: tuple[int, Ranges] | None = None

    @property
    def samples(self) -> int:
        return len(self.starts)

    def identity(self) -> str:
        """A hash of the lines and the names of their files."""
        return self._identity

    def nth(self, number: int) -> Sample:
        """The sample of that number of the endless list. Raises StoreError where it can no longer be read."""
        epoch, place = divmod(number, self.samples)
        if self.shuffle:
            place = int(Permutation(self.samples, self.seed, epoch)(np.array([place]))[0])
        return self.read(place)

    def read(self, row: int) -> Sample:
        """The row-th conversation of all files."""
        file = int(np.searchsorted(self.ends, row, "right"))
        name, line = self.names[file], int(self.lines[row])
        text = self._open().read(name, int(self.starts[row]), int(self.sizes[row]))
        told = checked(text, f"{self._shown(name)} line {line}")
        folder = below(self.folder, name.rpartition("/")[0]) if "/" in name else self.folder
        video = told.pop("video", None)
        return {
            "key": f"{name}:{line}",
            "messages": told.pop("messages"),
            "images": [_address(folder, image) for image in told.pop("images", None) or []],
            "video": video and _address(folder, video),
            "meta": told,
            "skipped": [],
        }

    def _shown(self, name: str) -> str:
        return below(self.folder, name)

    def _open(self) -> Ranges:
        """Open files of this process; a worker opens its own after the fork."""
        if self._ranges is None or self._ranges[0] != os.getpid():
            self._ranges = (os.getpid(), Ranges(Store(self.folder)))
        return self._ranges[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ranges": None}


def _files(path: str) -> tuple[str, list[str]]:
    """(folder, names of the files in it). Raises StoreError where there is none."""
    address, mark, options = path.partition("?")
    if address.endswith(".jsonl"):
        folder, _, name = address.rpartition("/")
        folder = f"{folder or '.'}{mark}{options}"
        names = [name] if Store(folder).exists(name) else []
    else:
        folder, names = path, Store(path).list(suffix=".jsonl")
    if not names:
        raise StoreError(f"{path}: there is no .jsonl file; name one, or a folder that has some")
    return folder, names


def _lines(store: Store, name: str) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, offset, bytes) of each line of a file that is not empty."""
    with store.open(name) as f:
        number, offset, rest = 0, 0, b""
        while block := f.read(BLOCK):
            *whole, rest = (rest + block).split(b"\n")
            for line in whole:
                number += 1
                if line.strip():
                    yield number, offset, line
                offset += len(line) + 1
        if rest.strip():
            yield number + 1, offset, rest


def checked(line: bytes, where: str) -> dict[str, Any]:
    """The fields of a line. Raises StoreError: '<where>: what is wrong'."""
    try:
        told = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise StoreError(f"{where}: it is no JSON ({e}); mend or delete it") from e
    if wrong := _wrong(told):
        raise StoreError(f"{where}: {wrong}; mend or delete it")
    found: dict[str, Any] = told
    return found


def _wrong(told: Any) -> str:
    """What is wrong with a line's fields; '' where nothing is."""
    messages = told.get("messages") if isinstance(told, dict) else None
    if not isinstance(messages, list) or not messages:
        return 'it has no "messages", a list of {"role": …, "content": …}'
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            return f"message {i + 1} has the role {role!r}, which is none of {', '.join(ROLES)}"
        if role == "system" and i:
            return f"message {i + 1} is the system's, which comes first or not at all"
        if not isinstance(content := message.get("content"), str):
            return f"message {i + 1} has no content, a text"
        if SURROGATE.search(content):
            return f"message {i + 1} has half of a character, a lone surrogate"
    for name, instead in (("image", '"images", a list'), ("videos", '"video", one a conversation')):
        if told.get(name):
            return f'it has "{name}", which nothing looks at: give {instead}'
    if all(message["role"] != "assistant" for message in messages):
        return "no message is the assistant's, so there is nothing to learn"
    images, video = told.get("images"), told.get("video")
    if (images or video) and all(message["role"] != "user" for message in messages):
        return "no message is the user's, so there is none to show its pictures in"
    if images is not None and not (
        isinstance(images, list) and all(x and isinstance(x, str) for x in images)
    ):
        return '"images" is no list of paths'
    return "" if video is None or (video and isinstance(video, str)) else '"video" is no path'


def _address(folder: str, name: str) -> str:
    return name if "://" in name or name.startswith("/") else below(folder, name)
