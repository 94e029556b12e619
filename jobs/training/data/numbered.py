"""What loaders share whose micro-batches are known by their numbers in an endless list."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from jobs.training.data.workers import prepared
from jobs.training.task import Batch


class Numbered:
    """A `jobs.training.task.Loader`; a subclass has `batch` (or its own `_prepare`), `made_of`, `examples` and `table`.

    The m-th micro-batch of rank r is number first + m · world + r, whichever worker prepares it.

    first, step: the list's number before this rank's first; micro-batches handed out since. skipped: broken samples
    met by this rank.
    """

    def __init__(self, rank: int = 0, world: int = 1, workers: int = 0, pin: bool = False):
        self.rank, self.world, self.workers, self.pin = rank, world, workers, pin
        self.first = self.step = self.skipped = 0

    def batch(self, number: int) -> Batch:
        """The micro-batch of that number of the endless list."""
        raise NotImplementedError

    def made_of(self) -> dict[str, Any]:
        """What the list depends on; plain values. A state of others is refused."""
        raise NotImplementedError

    def changed(self, name: str, there: Any, mine: Any) -> str:
        """What is said where a saved state was made of something else."""
        return f"the saved state has {name} {there}, this loader {mine}; use the same"

    def __iter__(self) -> Iterator[Batch]:
        for batch in prepared(self._prepare, self.workers, self.pin):
            self.step += 1
            self.skipped += len(batch["skipped"])
            yield batch

    def _prepare(self, worker: int, workers: int) -> Iterator[Any]:
        """What a worker runs: every W-th of its rank's micro-batches, from the w-th on."""
        for number in self._numbers(worker, workers):
            yield self.batch(number)

    def _numbers(self, worker: int, workers: int) -> Iterator[int]:
        for step in itertools.count(self.step + worker, workers):
            yield self.first + step * self.world + self.rank

    def state_dict(self) -> dict[str, Any]:
        """How many micro-batches all ranks have taken, and what the list is made of; plain numbers."""
        return {"batches": self.first + self.step * self.world} | self.made_of()

    def joined(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The same on all ranks."""
        return states[0]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after a `joined` state, with any number of ranks and workers.

        Raises ValueError where the state is of other data or settings.
        """
        for name, mine in self.made_of().items():
            if state.get(name) != mine:
                raise ValueError(self.changed(name, state.get(name), mine))
        self.first, self.step = state["batches"], 0
