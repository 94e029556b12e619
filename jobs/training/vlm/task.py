"""Vision–language models (`models/language/seeing.py`) as a task of the loop: clips and conversations → answers.

A batch is a packed sequence, or rows (`jobs.training.vlm.conversations.Collate`): 'tokens'; 'frames', uint8, of all
pictures, 'counts_of_frames', how they are divided (`Visuals.tensors`); 'positions', where a model has three; 'at',
'targets', 'weights', what is to be predicted; 'documents', how many of them have something to learn. The loss of a
document is the mean over its learnt tokens, that of a step the mean over its documents, however they are packed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from jobs.training.data.held_out import held_out, trained_on
from jobs.training.data.loader import sources_of
from jobs.training.data.sequences import SequenceLoader
from jobs.training.data.talks import talks_of
from jobs.training.distributed import World
from jobs.training.recipe_core import TrainRecipe
from jobs.training.task import Batch, Draws, Evaluation, Loader, Losses, Phase, Start, Summed, Task, Told
from jobs.training.vlm.conversations import Captions, Collate, Documents, kept_of, texts_of, written_of
from jobs.training.vlm.kinds import kind
from jobs.training.vlm.model import begin_with, set_trained, trained_at, visuals_of
from jobs.training.vlm.recipe import VLMRecipe
from jobs.training.vlm.rows import RowLoader
from jobs.training.vlm.speaker import Speaker
from jobs.training.vlm.visuals import budget_table
from models.hub import MissingModel
from models.language.loss import Goal
from models.language.seeing import Seeing
from models.measures.captions.cider import cider_d
from pipeline.faults import StoreError
from pipeline.io.store import Store, below
from pipeline.shards.chat import ChatReader
from pipeline.shards.index import read_index
from pipeline.shards.mixture import Mixed, Mixture, Source
from pipeline.shards.reader import BrokenSample, ShardReader

TEXTS = 100_000  # captions that a tokenizer is trained on, at most
SHOWN = 8  # captions on the page


def build(recipe: TrainRecipe, start: Start) -> tuple[Talking, Loader]:
    """Raises ValueError or StoreError, in one sentence, where recipe and data do not fit."""
    assert isinstance(recipe, VLMRecipe)
    kind(recipe.model.kind)
    runs = Runs(recipe, start.data)
    kept = files_of(recipe, runs, start)
    try:
        task = Talking(recipe, start, kept)
    except MissingModel as e:
        raise ValueError(str(e)) from e
    task.shown = runs.held_out
    loader = loader_of(recipe, runs.source(), task, start.world)
    loader.note = budget_table(task.model, task.visuals, recipe.data.tokens)
    return task, loader


# ---------------------------------------------------------------- data


class Runs:
    """What is trained on: runs with shards and conversations, in their shares.

    Raises StoreError, ValueError.
    """

    def __init__(self, recipe: VLMRecipe, data: str):
        self.recipe = recipe
        self.folders = [folder for _, folder in sources_of(recipe, data)]
        self.talks = [i > 0 and is_talk(folder) for i, folder in enumerate(self.folders)]
        runs = [below(f, "shards") for f, talk in zip(self.folders, self.talks, strict=True) if not talk]
        without = iter(trained_on(runs, recipe.held_out) if recipe.held_out else [None] * len(runs))
        self.sources: list[Source] = []
        self.where: list[tuple[str, Any]] = []  # shards, which of their clips
        for folder, talk in zip(self.folders, self.talks, strict=True):
            try:
                if talk:
                    self.sources.append(talks_of(folder, recipe.seed))
                else:
                    self.where.append((below(folder, "shards"), next(without)))
                    self.sources.append(self._captions(self._reader(*self.where[-1])))
            except StoreError as e:
                raise StoreError(f"data.mixture {folder}: {e}") if self.sources else e from None
        self.held_out: ShardReader | None = None
        if recipe.held_out:
            self.held_out = self._reader(runs[0], held_out(runs[0], recipe.held_out), shuffle=False)

    def _reader(self, shards: str, where: Any, shuffle: bool = True) -> ShardReader:
        data = self.recipe.data
        return ShardReader(
            shards,
            captions=data.captions if shuffle else "chosen",
            seed=self.recipe.seed,
            where=where,
            decode=False,
            shuffle=shuffle,
            sequential=data.sequential() if shuffle else None,
        )

    def _captions(self, reader: ShardReader) -> Captions:
        return Captions(reader, self.recipe.prompts, self.recipe.seed, self.recipe.written)

    def source(self) -> Source:
        if len(self.sources) == 1:
            return self.sources[0]
        data = self.recipe.data
        sequential = data.sequential()
        streams = sequential.streams if sequential else 1
        # each lane has all sources in turn: one of long documents alone would close more sequences for as many samples
        together = math.lcm(streams, data.lanes) if data.packing else streams
        return Mixed(self.sources, Mixture(data.shares(), self.folders, together))

    def texts(self) -> list[str]:
        """Captions and what is said in conversations, some of them where they are many."""
        found = [*self.recipe.prompts, "user\n", "assistant\n"]
        for shards, where in self.where:
            index = read_index(shards, ["caption", "source_sha256", "source", "clip_id"])
            if "caption" not in index.column_names:
                raise ValueError(f"{shards} has no index with captions: shard the run with clipmill shard")
            rows = index if where is None else index.filter(where)
            step = max(1, -(-len(rows) // TEXTS))
            found += [caption or "" for caption in rows["caption"].to_pylist()[::step]]
        for talk in self.sources:
            if isinstance(talk, ChatReader):
                step = max(1, -(-talk.samples // TEXTS))
                rows_of = range(0, talk.samples, step)
                found += [m["content"] for row in rows_of for m in talk.read(row)["messages"]]
        return found


def is_talk(folder: str) -> bool:
    """Whether it holds conversations, and no shards."""
    return folder.partition("?")[0].endswith(".jsonl") or not Store(folder).list("shards")


def files_of(recipe: VLMRecipe, runs: Runs, start: Start) -> dict[str, str]:
    """Of its tokenizer or processor: the saved ones, those of the earlier stage, or as its kind has them."""
    if start.saved is not None:
        kept: dict[str, str] = start.saved["tokenizer"]
        return kept
    if recipe.start:
        return dict(trained_at(recipe.start).state["tokenizer"])
    try:
        return kind(recipe.model.kind).files(recipe, runs.texts)
    except MissingModel as e:
        raise ValueError(str(e)) from e


def loader_of(recipe: VLMRecipe, source: Source, task: Talking, world: World) -> SequenceLoader | RowLoader:
    """Raises ValueError."""
    data = recipe.data
    process = Documents(task.chat, task.visuals, recipe.frames.anywhere)
    collate = Collate(task.visuals, task.chat.tokenizer.pad_token_id, data.packing)
    common: dict[str, Any] = {
        "tokens": data.tokens,
        "collate": collate,
        "rank": world.data_rank,
        "world": world.data_size,
        "workers": data.workers,
        "pin": world.device.type == "cuda",
    }
    if data.packing:
        return SequenceLoader(source, process, pool=data.pool, lanes=data.lanes, **common)
    return RowLoader(source, process, size=data.batch or 8, **common)


# ---------------------------------------------------------------- the task


class Talking(Task):
    """Args: kept: files of the tokenizer or processor."""

    weights: ClassVar = {"documents": 1.0}

    def __init__(self, recipe: VLMRecipe, start: Start, kept: dict[str, str]):
        self.recipe, self.world, self.device = recipe, start.world, start.world.device
        self.kept, of = kept, kind(recipe.model.kind)
        self.chat = of.chat(kept)
        self.model: Seeing = of.network(recipe, kept, start.device)
        if recipe.start and start.saved is None:
            begin_with(self.model, recipe.start, kept)
        self.visuals = visuals_of(self.model, recipe)
        set_trained(self.model, recipe)
        self.shown: ShardReader | None = None
        phase = Phase.of("vlm", self.model, recipe.optimizer)
        phase.published = () if recipe.start else of.published(recipe, self.model)
        self.phases = [phase]

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"documents": batch["documents"]}

    def loss(self, phase: str, model: nn.Module, batch: Batch, draws: Draws) -> Losses:
        tokens = batch["tokens"]
        visuals = self.visuals.tensors(batch["frames"], batch["counts_of_frames"])
        goal = Goal(batch["at"], batch["targets"], batch["weights"])
        total = model(
            tokens,
            visuals,
            batch["lengths"],
            batch.get("positions"),
            goal=goal,
            kept=kept_of(batch),
            texts=texts_of(batch),
        )
        used = torch.tensor(float(self.tokens(batch)), device=self.device)
        return Losses({"documents": total}, {"filled": Summed(used, tokens.numel())})

    def blocks(self, module: nn.Module) -> Iterator[nn.Module]:
        assert isinstance(module, Seeing)
        yield from module.blocks()

    def tokens(self, batch: Batch) -> int:
        return sum(sum(row) if isinstance(row, list) else row for row in batch["lengths"])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, step: int) -> Evaluation:
        """Of held-out clips: captions beside the chosen ones, CIDEr-D with those, the share that is the same."""
        if self.shown is None:
            return Evaluation()
        sharded = self.world.size > 1 and self.recipe.compute.parallel == "fsdp"
        speaker = Speaker(
            model, self.chat, self.visuals, self.recipe.prompts, self.recipe.answer, sharded, self.device
        )
        rows = range(0, len(self.shown.keys), -(-len(self.shown.keys) // self.recipe.measured))
        looked_at = range(0, len(rows), max(1, len(rows) // SHOWN))[:SHOWN]
        mine: dict[int, Told] = {}
        for number in self.world.share(len(rows)):
            sample = self.shown.sound(rows[number])
            try:
                clip = self.visuals.clip(sample["video"])
                if self.recipe.written:
                    clip = replace(clip, text=written_of(sample["meta"], self.recipe.written))
            except BrokenSample:
                clip = self.visuals.decoded(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), (0.0,))
            seen = clip.frames.permute(0, 2, 3, 1) if number in looked_at else None
            mine[number] = Told(sample["caption"] or "", speaker.caption([clip])[0], seen)
        every = {n: found for share in self.world.gather(mine) for n, found in share.items()}
        pairs = [(told.wanted, told.said) for _, told in sorted(every.items())]
        return Evaluation(scores(pairs), texts=[every[n] for n in looked_at])

    def state(self) -> dict[str, Any]:
        return {"tokenizer": self.kept}


def scores(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Of (chosen caption, what the model says): 'cider', and 'exact', the share that is the same but for case."""
    wanted, said = zip(*pairs, strict=True)
    each = cider_d(said, [[text] for text in wanted])
    same = [a.strip().lower() == b.strip().lower() for a, b in pairs]
    return {"cider": sum(each) / len(each), "exact": sum(same) / len(same)}
