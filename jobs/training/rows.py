"""Micro-batches of whole samples side by side, filled up to the longest: what packing is in place of.

Micro-batch m holds samples m · size … of the source, so it depends neither on ranks nor on workers, and the state is
one number. Each broken sample is left out of its micro-batch, unless all are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jobs.training.sequences import Item, Processor, table_of
from jobs.training.task import Batch
from jobs.training.workers import prepared
from pipeline.faults import StoreError
from pipeline.shards.mixture import Source
from pipeline.shards.reader import PATIENCE, BrokenSample


class RowLoader:
    """A `jobs.training.task.Loader`.

    Args:
        size: samples of a micro-batch. tokens: of a sample, at most.
        collate: items, tokens of the longest → batch.
        rank, world, workers, pin: as of `jobs.training.data.Loader`.

    A batch is what `collate` makes, with 'key', 'skipped': lists, and 'lengths': of each row a list with that of its
    sample.
    """

    def __init__(
        self,
        source: Source,
        process: Processor,
        *,
        size: int,
        tokens: int,
        collate: Callable[[Sequence[Item], int], Batch],
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin: bool = False,
    ):
        self.source, self.process, self.collate = source, process, collate
        self.size, self.tokens = size, tokens
        self.rank, self.world, self.workers, self.pin = rank, world, workers, pin
        self.first = self.step = self.skipped = 0
        self.note = ""  # what else the table says

    def __iter__(self) -> Iterator[Batch]:
        for batch in prepared(self._prepare, self.workers, self.pin):
            self.step += 1
            self.skipped += len(batch["skipped"])
            yield batch

    def _prepare(self, worker: int, workers: int) -> Iterator[Batch]:
        for step in itertools.count(self.step + worker, workers):
            yield self.batch(self.first + step * self.world + self.rank)

    def batch(self, number: int) -> Batch:
        """Raises StoreError where none of its samples is sound, ValueError for a too long one."""
        items: list[Item] = []
        skipped: list[str] = []
        for at in range(number * self.size, (number + 1) * self.size):
            try:
                items.append(self._item(at, skipped))
            except BrokenSample as e:
                skipped.append(str(e))
        after = (number + 1) * self.size
        while not items and len(skipped) < PATIENCE:
            try:
                items.append(self._item(after, skipped))
            except BrokenSample as e:
                skipped.append(str(e))
                after += 1
        if not items:
            raise StoreError(f"{PATIENCE} samples in a row are broken, the last: {skipped[-1]}")
        lengths = [[i["length"]] for i in items]
        made = self.collate(items, max(n for (n,) in lengths))
        told = {
            "key": [i["key"] for i in items],
            "lengths": lengths,
            "skipped": skipped + made.pop("skipped", []),
        }
        return made | told

    def _item(self, number: int, skipped: list[str]) -> Item:
        sample = self.source.nth(number)
        try:
            item = {"key": sample["key"], **self.process(sample)}
        except BrokenSample as e:
            raise BrokenSample(sample["key"]) from e
        if item["length"] > self.tokens:
            raise ValueError(
                f"{item['key']} has {item['length']} tokens, more than the {self.tokens} of a sequence: raise "
                "data.tokens, or cut it off"
            )
        skipped += sample["skipped"]
        return item

    def examples(self) -> Iterator[Batch]:
        yield self.batch(0)

    def table(self) -> str:
        return "\n".join(filter(None, (table_of(self.source), self.note)))

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.first + self.step * self.world} | self._made_of()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after a state of any rank. Raises ValueError where it is of other data or settings."""
        for name, mine in self._made_of().items():
            if state.get(name) != mine:
                raise ValueError(
                    f"the saved state has {name} {state.get(name)}, this loader {mine}; use the same"
                )
        self.first, self.step = state["batches"], 0

    def _made_of(self) -> dict[str, Any]:
        return {"source": self.source.identity(), "tokens": self.tokens, "size": self.size}

    @staticmethod
    def joined(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """That of any rank: all are the same."""
        return states[0]
