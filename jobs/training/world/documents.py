"""Documents of a world model from clips and conversations: which come when, how they are laid out, and packed.

    source      the kinds of documents in their shares, each from every run in its own (`pipeline.shards.mixture`)
    processor   a clip with its caption → tokens with places for its codes, and the pixels that these are made of
    batch       one packed sequence; the codes are made on the device, where the model is

A document has as many tokens before its codes are known as after, so it is packed without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.training.data.loader import readers_of
from jobs.training.data.sequences import Item
from jobs.training.data.talks import talks_of
from jobs.training.task import Batch
from jobs.training.world.conversations import Looks, laid_out, together
from jobs.training.world.recipe import KINDS, Documents, Words, WorldRecipe
from models.language import needle
from models.language import tokenizer as tokenizers
from models.language.layout import CLOSING, OPENING, Laid, Layout, Part
from models.language.loss import documents, shifted, token_weights
from models.ring_attention import Placement, split
from pipeline.faults import StoreError
from pipeline.shards.mixture import Mixed, Mixture, Sample, Source

PLACEMENT: Placement = "zigzag"
LANES = 16  # that pack for themselves, see `jobs.training.data.sequences`


# ---------------------------------------------------------------- which documents


@dataclass(frozen=True)
class Of:
    """A source whose samples say of which kind of document they are, and their number."""

    source: Source
    kind: str

    @property
    def samples(self) -> int:
        return self.source.samples

    def nth(self, number: int) -> Sample:
        return self.source.nth(number) | {"kind": self.kind, "number": number}

    def identity(self) -> str:
        return f"{self.kind}:{self.source.identity()}"


@dataclass(frozen=True)
class Numbers:
    """A source of samples that have nothing but a number."""

    samples: int = 10_000

    def nth(self, number: int) -> Sample:
        return {"key": f"number {number}", "skipped": []}

    def identity(self) -> str:
        return "numbers"


def sources_of(recipe: WorldRecipe, data: str) -> Mixed:
    """All kinds of documents in their shares. Raises StoreError, ValueError."""
    found: list[Of] = []
    shares: list[float] = []
    for kind, share in recipe.documents.shares().items():
        own = recipe.model_copy(update={"seed": recipe.seed + KINDS.index(kind)})  # orders of their own
        alone: Source | None = None
        if kind == "needle":
            alone = Numbers()
        elif kind == "text" and recipe.documents.chat:
            try:
                alone = talks_of(recipe.documents.chat, own.seed)
            except StoreError as e:
                raise StoreError(f"documents.chat: {e}") from e
        if alone:
            found.append(Of(alone, kind))
            shares.append(share)
            continue
        for reader, part in zip(readers_of(own, data, recipe.held_out), recipe.data.shares(), strict=True):
            reader.decode = kind != "text"
            found.append(Of(reader, kind))
            shares.append(share * part)
    return Mixed(found, Mixture(shares, [of.kind for of in found], LANES))  # each lane has all kinds, in turn


# ---------------------------------------------------------------- how they are laid out


@dataclass
class LaidOut:
    """Sample → item: `tokens`, `vision`, `learnt` [length], and `pixels`, uint8 [F, 3, H, W] or None, of `clips`.

    Where codes will be there is 0; `clips` are the frames of each picture and video. It is handed to processes that
    read.

    Args:
        tokenizer: its files; None: bytes.
        room: tokens of a document at most; straw: sentences that needles are hidden in.
        stride: frames that a frame of codes stands for, after the first.
        codes, frame: see `Layout`.
        looks: at the pictures of conversations; None: without codes there are none.
    """

    wanted: Documents
    tokenizer: Mapping[str, str] | None
    codes: int
    frame: int
    stride: int
    room: int
    seed: int
    looks: Looks | None = None
    straw: Sequence[str] = ()
    _held: dict[str, Layout] = field(default_factory=dict, repr=False)

    @property
    def layout(self) -> Layout:
        if "layout" not in self._held:
            self._held["layout"] = layout_of(self.tokenizer, self.codes, self.frame)
        return self._held["layout"]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": {}}  # its functions are made anew

    def __call__(self, sample: Sample) -> Item:
        kind = sample["kind"]
        rng = np.random.default_rng([self.seed, KINDS.index(kind), sample["number"]])
        pixels: list[np.ndarray] = []
        if kind == "needle":
            parts = self._needle(rng)
        elif kind == "text" and "messages" in sample:
            parts, pixels = laid_out(sample, self.looks, self.frame, self.stride)
        elif kind == "text":
            parts = [Part(sample["caption"])]
        else:
            frames = sample["video"].transpose(1, 0, 2, 3)  # T 3 H W
            if kind in ("text_to_image", "image_to_text"):
                frames = frames[(at := int(rng.integers(len(frames)))) : at + 1]
            parts, pixels = self._seen(sample["caption"], frames, kind, rng), [frames]
        laid = self.layout.lay_out(parts)
        if laid.length > self.room:
            raise ValueError(
                f"{sample['key']} makes a document of {laid.length} tokens, more than the {self.room} of the context: "
                "raise data.tokens (and context), or give it fewer frames"
            )
        return {
            "length": laid.length,
            **together(pixels),
            **{k: x.numpy() for k, x in laid._asdict().items()},
        }

    def _seen(self, caption: str, pixels: np.ndarray, kind: str, rng: np.random.Generator) -> list[Part]:
        codes = torch.zeros(1 + (len(pixels) - 1) // self.stride, self.frame, dtype=torch.long)
        if kind.endswith("to_text"):
            return [Part(codes, "vision" in self.wanted.prompts), Part(caption)]
        before = [Part(caption, "text" in self.wanted.prompts)] if rng.random() >= self.wanted.dropped else []
        return [*before, Part(codes)]

    def _needle(self, rng: np.random.Generator) -> list[Part]:
        def sentence() -> str:
            return self.straw[int(rng.integers(len(self.straw)))]

        room = self.room // (4 * len(self.layout.encode(needle.EXAMPLE)))  # half of a document is straw
        count = int(rng.integers(1, max(1, min(self.wanted.numbers, room)) + 1))
        made = needle.hidden(sentence, self.layout.encode, self.room - 2, rng, count=count)
        learnt = "text" in self.wanted.prompts
        return [part._replace(learnt=part.learnt or learnt) for part in made.parts()]


def layout_of(tokenizer: Mapping[str, str] | None, codes: int, frame: int) -> Layout:
    """Of the files of a tokenizer, None for bytes. Raises ValueError where it has no <s> or </s>."""
    if tokenizer is None:
        return Layout.of_bytes(codes, frame)
    return Layout.of(tokenizers.of_files(tokenizer), codes, frame)


def tokenizer_of(words: Words, captions: Callable[[], list[str]]) -> dict[str, str] | None:
    """Files of the tokenizer that a recipe names; None: bytes. Raises models.hub.MissingModel, ValueError."""
    if words.tokenizer == "bytes":
        return None
    if words.tokenizer != "bpe":
        return tokenizers.files(tokenizers.published(words.tokenizer))
    texts = captions()
    made = tokenizers.trained([*texts, *[OPENING, CLOSING] * len(texts)], words.size)
    made.bos_token = tokenizers.BEGIN
    return tokenizers.files(made)


# ---------------------------------------------------------------- how they are packed


@dataclass(frozen=True)
class Collate:
    """Items → a sequence of `tokens` places, and what of it is to be learnt.

    Args:
        codes: see `Layout`. rank, ranks: this one's place among those that share a sequence.

    A batch has `tokens` int64 [L], `vision` bool [L]; `pixels` uint8 [F, 3, H, W], of clips of `clips` frames each, and
    `slots` int64 [n], where their codes belong; for each kind (text, vision) `<kind>_at` int64 [m], places that predict
    one that is learnt, `<kind>_weights` float32 [m], `<kind>_documents`, how many have something to be learnt. Where
    ranks share it `<kind>_mine` says which of the m lie in this one's part, `<kind>_part` where in it.
    """

    codes: int
    rank: int = 0
    ranks: int = 1

    def __call__(self, items: Sequence[Item], tokens: int) -> Batch:
        lengths = [item["length"] for item in items]
        laid = Laid(*(joined([item[name] for item in items], tokens) for name in Laid._fields))
        batch: Batch = {"tokens": laid.tokens, "vision": laid.vision}
        batch["slots"] = (laid.vision & (laid.tokens < self.codes)).nonzero()[:, 0]
        seen = [torch.from_numpy(item["pixels"]) for item in items if item["pixels"] is not None]
        batch["clips"] = [n for item in items for n in item["clips"]]
        if seen:
            batch["pixels"] = torch.cat(seen)
        for kind, here in (("text", ~laid.vision), ("vision", laid.vision)):
            learnt = shifted(laid.learnt & here, lengths)
            weights = token_weights(lengths, learnt)
            at = weights.nonzero()[:, 0]
            batch |= {f"{kind}_at": at, f"{kind}_weights": weights[at]}
            batch[f"{kind}_documents"] = documents(lengths, learnt)
            if self.ranks > 1:
                own = split(torch.arange(tokens), self.rank, self.ranks, PLACEMENT)
                part = torch.full((tokens,), -1).index_copy(0, own, torch.arange(len(own)))[at]
                batch[f"{kind}_mine"] = mine = (part >= 0).nonzero()[:, 0]
                batch[f"{kind}_part"] = part[mine]
        return batch


def joined(arrays: Sequence[np.ndarray], tokens: int) -> Tensor:
    """One after the other, [tokens], 0 behind the last."""
    whole = np.zeros(tokens, arrays[0].dtype)
    np.concatenate(arrays, out=whole[: sum(map(len, arrays))])
    return torch.from_numpy(whole)
