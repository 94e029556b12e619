"""Micro-batches of packed sequences: source → processor → packer → batch, resumable to the sample.

    source     samples by number, endless: clips, conversations, a mixture of both (`pipeline.shards.mixture`)
    processor  a picklable callable, sample → {'length': tokens it takes, …}: tokenises, crops; run in workers
    packer     samples → sequences of at most `tokens` (`jobs.training.data.packing.Packer`)
    batch      one sequence: its samples' arrays one after the other, and their lengths, for the mask

How long a sample is, is known when it has been processed, so what is in which sequence cannot be told from numbers
alone, and one packer for all would have every rank process every sample. So there are `lanes`: lane l packs samples l,
l + lanes, l + 2 · lanes … of the source for itself, and micro-batch m is the next sequence of lane m mod lanes. A lane
is always one worker's of one rank's, whole. Thus micro-batches depend neither on ranks (which must divide lanes) nor on
workers, and each sample is in one sequence.

The state of a lane is how many samples it has taken, and the numbers of those in sequences that are still open; these
it processes again when it is resumed. A rank knows the states of its own lanes only: `joined` makes one of all ranks'.

A processor raises `BrokenSample` for a sample that is to be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from jobs.training.data.numbered import Numbered
from jobs.training.data.packing import Packer
from jobs.training.data.workers import prepared
from jobs.training.task import Batch
from pipeline.faults import StoreError
from pipeline.shards.mixture import Mixed, Sample, Source
from pipeline.shards.reader import PATIENCE, BrokenSample

Item = dict[str, Any]
Processor = Callable[[Sample], Item]


class SequenceLoader(Numbered):
    """A `jobs.training.task.Loader`.

    Args:
        tokens: of a sequence, at most. pool: sequences that a lane keeps open.
        collate: the items of a sequence → batch.
        rank, world, workers, pin: as of `jobs.training.data.loader.Loader`; of the workers as many are used as the
            rank's lanes can be shared by evenly.

    A batch is what `collate` makes, with 'key': list[str], 'lengths': tokens of each sample in their order, and
    'skipped': keys of the broken samples met on the way.

    Raises ValueError where ranks do not divide lanes.
    """

    def __init__(
        self,
        source: Source,
        process: Processor,
        *,
        tokens: int,
        pool: int = 32,
        lanes: int = 16,
        collate: Callable[[Sequence[Item], int], Batch] | None = None,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin: bool = False,
    ):
        if lanes % world:
            raise ValueError(
                f"{world} processes do not divide the {lanes} lanes of the data: make them a multiple"
            )
        used = max((w for w in range(1, workers + 1) if lanes // world % w == 0), default=0)
        super().__init__(rank, world, used, pin)
        self.source, self.process, self.collate = source, process, collate or joined_arrays
        self.tokens, self.pool, self.lanes = tokens, pool, lanes
        self.states: dict[int, dict[str, Any]] = {}  # of the lanes that have given a sequence
        self.note = ""  # what else the table says

    def __iter__(self) -> Iterator[Batch]:
        for lane, state, batch in prepared(self._prepare, self.workers, self.pin):
            self.states[lane] = state
            self.step += 1
            self.skipped += len(batch["skipped"])
            yield batch

    def _prepare(self, worker: int, workers: int) -> Iterator[tuple[int, dict[str, Any], Batch]]:
        lanes: dict[int, _Lane] = {}
        for number in self._numbers(worker, workers):
            lane = number % self.lanes
            if lane not in lanes:
                lanes[lane] = _Lane(self, lane, self.states.get(lane))
            batch = lanes[lane].next()
            yield lane, lanes[lane].state(), batch

    def examples(self) -> Iterator[Batch]:
        """The first sequence; all have one shape, where `collate` fills them up."""
        yield _Lane(self, 0, None).next()

    @property
    def waste(self) -> float:
        """Share of this rank's sequences so far that is empty."""
        packed = [state["packer"] for state in self.states.values()]
        places = sum(p["closed"] for p in packed) * self.tokens
        return 1 - sum(p["tokens"] for p in packed) / places if places else 0.0

    def table(self) -> str:
        """What is in the mixture, for a person."""
        return "\n".join(filter(None, (table_of(self.source), self.note)))

    def state_dict(self) -> dict[str, Any]:
        """How many micro-batches all ranks have taken, and where this rank's lanes are; plain numbers."""
        lanes = {str(lane): state for lane, state in sorted(self.states.items())}
        return super().state_dict() | {"lanes": lanes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        mine = (self.first + self.rank) % self.world  # of others it would tell what is no longer so
        self.states = {
            int(n): dict(told) for n, told in state["lanes"].items() if int(n) % self.world == mine
        }

    def joined(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Each rank knows its own lanes."""
        taken = max(states, key=lambda state: int(state["batches"]))
        return taken | {"lanes": {lane: told for state in states for lane, told in state["lanes"].items()}}

    def made_of(self) -> dict[str, Any]:
        sizes = {"tokens": self.tokens, "pool": self.pool, "of": self.lanes}
        return {"source": self.source.identity()} | sizes


def table_of(source: Source) -> str:
    """What is in a source or mixture, for a person."""
    if not isinstance(source, Mixed):
        return f"source       {source.samples:,} samples an epoch"
    each = zip(source.sources, source.mixture.shares, source.mixture.names, strict=True)
    return "\n".join(
        f"source       {share:.1%} of the samples: {name}, {s.samples:,} an epoch" for s, share, name in each
    )


def processed(source: Source, process: Processor, number: int) -> tuple[Item, list[str]]:
    """A sample as the processor makes it, and the keys of broken ones that it stands for.

    Raises BrokenSample with its key alone, from the one that says why.
    """
    sample = source.nth(number)
    try:
        return {"key": sample["key"], **process(sample)}, sample["skipped"]
    except BrokenSample as e:
        raise BrokenSample(sample["key"]) from e


def check_fits(item: Item, tokens: int) -> None:
    """Raises ValueError where it has more tokens than that."""
    if item["length"] > tokens:
        raise ValueError(
            f"{item['key']} has {item['length']} tokens, more than the {tokens} of a sequence: raise data.tokens, or "
            "cut it off"
        )


class _Lane:
    """Every lanes-th sample of the source, packed; from a state on, or from the beginning."""

    def __init__(self, loader: SequenceLoader, number: int, state: dict[str, Any] | None):
        self.loader, self.number, self.taken = loader, number, 0
        self.packer = Packer(loader.tokens, loader.pool)
        self.items: dict[int, Item] = {}  # in sequences that are open
        if state:
            self.taken = state["taken"]
            self.packer.load_state_dict(state["packer"])
            for sequence in self.packer.open:
                for sample, length in sequence:
                    item = self._again(sample)
                    if item["length"] != length:
                        raise StoreError(
                            f"{item['key']} has {item['length']} tokens now, and had {length} when the state was "
                            "saved: the data or its processing has changed"
                        )
                    self.items[sample] = item

    def next(self) -> Batch:
        """The next sequence. Raises StoreError after PATIENCE broken samples, ValueError for a too long one."""
        skipped: list[str] = []
        broken = 0
        why: BaseException | None = None  # the last one is broken
        while broken < PATIENCE:
            sample, self.taken = self.number + self.taken * self.loader.lanes, self.taken + 1
            try:
                item, before = processed(self.loader.source, self.loader.process, sample)
            except BrokenSample as e:
                skipped.append(str(e))
                broken, why = broken + 1, e.__cause__
                continue
            broken = 0
            skipped += before
            check_fits(item, self.loader.tokens)
            self.items[sample] = item
            if closed := self.packer.add(sample, item["length"]):
                return self._batch([self.items.pop(n) for n in closed], skipped)
        raise StoreError(f"{PATIENCE} samples in a row are broken, the last: {skipped[-1]} ({why})")

    def _again(self, number: int) -> Item:
        """A sample that a saved state has in an open sequence."""
        try:
            return processed(self.loader.source, self.loader.process, number)[0]
        except BrokenSample as e:
            raise StoreError(
                f"{e} can no longer be read, and could when the state was saved: bring it back"
            ) from e

    def _batch(self, items: list[Item], skipped: list[str]) -> Batch:
        made = self.loader.collate(items, self.loader.tokens)
        skipped += made.pop("skipped", [])  # what broke when it was put together
        return made | {
            "key": [i["key"] for i in items],
            "lengths": [i["length"] for i in items],
            "skipped": skipped,
        }

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken, "packer": self.packer.state_dict()}


def joined_arrays(items: Sequence[Item], tokens: int) -> Batch:
    """Of the arrays [length, …] of items one tensor [tokens, …], 0 behind the last; of everything else a list."""
    batch: Batch = {}
    for name, first in items[0].items():
        values = [item[name] for item in items]
        if isinstance(first, np.ndarray):
            whole = np.zeros((tokens, *first.shape[1:]), first.dtype)
            np.concatenate(values, out=whole[: sum(map(len, values))])
            batch[name] = torch.from_numpy(whole)
        else:
            batch[name] = values
    return batch
