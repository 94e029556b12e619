"""Clips with captions, and conversations, as documents of tokens in micro-batches.

    source      a run's clips, each with a prompt drawn for it; conversations of .jsonl files; a mixture of both
    processor   sample → tokens, which of them are learnt, which frames are to be looked at (not yet decoded)
    collate     documents → one sequence, or rows; their frames; what is to be predicted where (`models.language.loss`)

Frames are decoded where a micro-batch is put together, so that sequences that are still open hold no pixels. A clip
that turns out broken only then is there as a black one, from which nothing is learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.training.data.media import Visual, here
from jobs.training.data.sequences import Item
from jobs.training.task import Batch
from jobs.training.vlm.recipe import Written
from jobs.training.vlm.visuals import Counts, Planned, Visuals
from models.language.chat import MARKS, Chat
from models.language.exported import VIDEO
from models.language.loss import Goal, documents, shifted, token_weights
from pipeline.shards.captions import json_of
from pipeline.shards.mixture import Sample
from pipeline.shards.reader import BrokenSample, ShardReader


class Captions:
    """A run's clips as conversations: a prompt, drawn by the seed and the sample's number, and the caption.

    Args:
        reader: with decode=False. prompts: of which one is drawn.
        written: what of that which is written about a clip is told beside it.
    """

    def __init__(
        self, reader: ShardReader, prompts: Sequence[str], seed: int = 0, written: Written | None = None
    ):
        self.reader, self.prompts, self.seed, self.written = reader, list(prompts), seed, written

    @property
    def samples(self) -> int:
        return self.reader.samples

    def identity(self) -> str:
        words = "\n".join([str(self.seed), *self.prompts, *([repr(self.written)] if self.written else [])])
        return f"{self.reader.identity()} {blake2b(words.encode(), digest_size=8).hexdigest()}"

    def nth(self, number: int) -> Sample:
        return self.asked(self.reader.nth(number), number)

    def asked(self, sample: Sample, number: int) -> Sample:
        rng = np.random.default_rng([self.seed, number])
        drawn = rng.integers(len(self.prompts))
        caption = sample["caption"] or ""
        return {
            "key": sample["key"],
            "messages": [
                {"role": "user", "content": self.prompts[drawn]},
                {"role": "assistant", "content": caption},
            ],
            "video": sample["video"],
            "images": [],
            "chance": [self.seed, number],
            "text": written_of(sample["meta"], self.written, rng) if self.written else "",
            "skipped": sample["skipped"],
        }


def written_of(meta: Mapping[str, Any], written: Written, rng: np.random.Generator | None = None) -> str:
    """What is written about a clip, of its key.json, a line a column; a generator leaves parts of it out."""
    columns = {name: str(value) for name, value in json_of(meta.get("meta") or {}).items() if value}
    kept = [rng is None or rng.random() >= written.dropout for _ in range(2)]  # subtitles, all else
    found = [name for name in written.columns if name in columns and kept[name != "subtitles"]]
    return "\n".join(f"{name.capitalize()}: {' '.join(columns[name].split())}" for name in found)


class Documents:
    """A processor, see `jobs.training.data.sequences`. anywhere: a run's frames lie anywhere in their parts."""

    def __init__(self, chat: Chat, visuals: Visuals, anywhere: bool = False):
        self.chat, self.visuals, self.anywhere = chat, visuals, anywhere

    def __call__(self, sample: Sample) -> Item:
        """{'length', 'tokens': int64 [length], 'learnt': bool [length], 'visuals', 'kept'}. Raises BrokenSample."""
        if not any(m["content"].strip() for m in sample["messages"] if m["role"] == "assistant"):
            raise BrokenSample(f"{sample['key']}: it has no caption")
        looked: list[Planned | Visual] = [self.visuals.measured(x) for x in self._shown(sample)]
        kept: list[Tensor | None] = [None] * len(looked)
        if self.visuals.static is not None:  # how many tokens there are depends on the pixels
            looked = [self.visuals.loaded(x) if isinstance(x, Planned) else x for x in looked]
            kept = [self.visuals.kept(x) for x in looked if isinstance(x, Visual)]
        seen = [self.visuals.seen(x, there) for x, there in zip(looked, kept, strict=True)]
        texts = [np.array(self.chat.plain(x.text, self.visuals.written), np.int64) for x in looked]
        try:
            document = self.chat.document(self.visuals.timed(sample["messages"], looked), seen)
        except ValueError as e:
            raise ValueError(f"{sample['key']}: {e}") from e
        return {
            "length": len(document.tokens),
            "tokens": document.tokens,
            "learnt": document.learnt,
            "visuals": looked,
            "kept": kept,
            "texts": texts if self.visuals.written else [],
        }

    def _shown(self, sample: Sample) -> list[Planned]:
        """Its pictures and its clip, in the order of their marks: those of the images, and one of the video."""
        looked = [Planned(here(image)) for image in sample["images"]]
        if not sample["video"]:
            return looked
        rng = np.random.default_rng([*sample["chance"], 1]) if self.anywhere and "chance" in sample else None
        clip = replace(self.visuals.planned(sample["video"], rng), text=sample.get("text", ""))
        asked = (m["content"] for m in sample["messages"] if m["role"] == "user")
        marks = [mark for text in asked for mark in MARKS.findall(text)]
        last = len(looked)
        at = marks.index(VIDEO) if marks.count(VIDEO) == 1 and len(marks) == last + 1 else last
        return [*looked[:at], clip, *looked[at:]]


@dataclass
class Collate:
    """Documents → batch, see `Batch` of `jobs.training.vlm.task`.

    packed: one sequence [L] of them all; otherwise a row [L] each, [B, L].
    """

    visuals: Visuals
    pad: int
    packed: bool

    def __call__(self, items: Sequence[Item], tokens: int) -> Batch:
        skipped: list[str] = []
        frames: list[Tensor] = []
        counts: list[Counts] = []
        learnt = [item["learnt"] for item in items]
        for i, item in enumerate(items):
            for what in item["visuals"]:
                try:
                    frames.append(
                        self.visuals.loaded(what).frames if isinstance(what, Planned) else what.frames
                    )
                except BrokenSample:
                    skipped.append(item["key"])
                    frames.append(self.visuals.blank(what))
                    learnt[i] = np.zeros_like(learnt[i])
                counts += self.visuals.counts(what)
        lengths: Any
        if self.packed:
            x = _filled(np.concatenate([item["tokens"] for item in items]), tokens, self.pad)
            mark = _filled(np.concatenate(learnt), tokens, False)
            lengths = [len(item["tokens"]) for item in items]
            positions = self.visuals.positions(x, lengths, [v for item in items for v in item["visuals"]])
        else:
            x = np.stack([_filled(item["tokens"], tokens, self.pad) for item in items])
            mark = np.stack([_filled(each, tokens, False) for each in learnt])
            lengths = [[len(item["tokens"])] for item in items]
            each = [
                self.visuals.positions(row, n, item["visuals"])
                for row, n, item in zip(x, lengths, items, strict=True)
            ]
            told = [row for row in each if row is not None]
            positions = torch.stack(told, 1) if told else None
        ids = torch.from_numpy(x)
        supervised = shifted(torch.from_numpy(mark), lengths)
        goal = Goal.of(shifted(ids, lengths), token_weights(lengths, supervised))
        kept = [there for item in items for there in item["kept"]]
        more: Batch = {} if positions is None else {"positions": positions}
        if any(there is not None for there in kept):
            more |= {
                "kept": torch.cat([x.flatten() for x in kept if x is not None]),
                "kept_of": [None if x is None else tuple(x.shape) for x in kept],
            }
        if texts := [text for item in items for text in item["texts"]]:
            more |= {"texts": torch.from_numpy(np.concatenate(texts)), "texts_of": [len(x) for x in texts]}
        return more | {
            "tokens": ids,
            "frames": self.visuals.joined(frames),
            "counts_of_frames": counts,
            "documents": documents(lengths, supervised),
            "skipped": skipped,
            **goal._asdict(),
        }


def kept_of(batch: Batch) -> list[Tensor | None] | None:
    """Which tokens of each picture are there, as `Seeing.forward` takes it."""
    if "kept" not in batch:
        return None
    shapes = batch["kept_of"]
    parts = iter(batch["kept"].split([int(np.prod(s)) for s in shapes if s is not None]))
    return [None if s is None else next(parts).view(s) for s in shapes]


def texts_of(batch: Batch) -> list[Tensor] | None:
    """What is written about each picture, as `Seeing.forward` takes it."""
    return list(batch["texts"].split(batch["texts_of"])) if "texts" in batch else None


def _filled(x: np.ndarray, length: int, value: Any) -> np.ndarray:
    whole = np.full(length, value, x.dtype)
    whole[: len(x)] = x
    return whole
