"""Micro-batches of whole samples side by side, filled up to the longest: what packing is in place of.

Micro-batch m holds samples m · size … of the source, so it depends neither on ranks nor on workers, and the state is
one number. Each broken sample is left out of its micro-batch, unless all are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jobs.training.data.numbered import Numbered
from jobs.training.data.sequences import Item, Processor, check_fits, processed, table_of
from jobs.training.task import Batch
from pipeline.faults import StoreError
from pipeline.shards.mixture import Source
from pipeline.shards.reader import PATIENCE, BrokenSample


class RowLoader(Numbered):
    """A `jobs.training.task.Loader`.

    Args:
        size: samples of a micro-batch. tokens: of a sample, at most.
        collate: items, tokens of the longest → batch.
        rank, world, workers, pin: as of `jobs.training.data.loader.Loader`.

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
        super().__init__(rank, world, workers, pin)
        self.source, self.process, self.collate = source, process, collate
        self.size, self.tokens = size, tokens
        self.note = ""  # what else the table says

    def batch(self, number: int) -> Batch:
        """Raises StoreError where none of its samples is sound, ValueError for a too long one."""
        items: list[Item] = []
        skipped: list[str] = []
        why: BaseException | None = None  # the last one is broken
        for at in range(number * self.size, (number + 1) * self.size):
            try:
                items.append(self._item(at, skipped))
            except BrokenSample as e:
                skipped.append(str(e))
                why = e.__cause__
        after = (number + 1) * self.size
        while not items and len(skipped) < PATIENCE:
            try:
                items.append(self._item(after, skipped))
            except BrokenSample as e:
                skipped.append(str(e))
                after, why = after + 1, e.__cause__
        if not items:
            raise StoreError(f"{PATIENCE} samples in a row are broken, the last: {skipped[-1]} ({why})")
        lengths = [[i["length"]] for i in items]
        made = self.collate(items, max(n for (n,) in lengths))
        told = {
            "key": [i["key"] for i in items],
            "lengths": lengths,
            "skipped": skipped + made.pop("skipped", []),
        }
        return made | told

    def _item(self, number: int, skipped: list[str]) -> Item:
        item, before = processed(self.source, self.process, number)
        check_fits(item, self.tokens)
        skipped += before
        return item

    def examples(self) -> Iterator[Batch]:
        yield self.batch(0)

    def table(self) -> str:
        return "\n".join(filter(None, (table_of(self.source), self.note)))

    def made_of(self) -> dict[str, Any]:
        return {"source": self.source.identity(), "tokens": self.tokens, "size": self.size}
