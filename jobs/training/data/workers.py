"""Worker processes that prepare micro-batches, in order, and end when the loop does."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

Prepare = Callable[
    [int, int], Iterator[Any]
]  # (worker w, of W) → every W-th of the micro-batches, from the w-th on


def prepared(prepare: Prepare, workers: int, pin: bool = False) -> Iterator[Any]:
    """The micro-batches of all workers in their order, without end. What is raised in a worker is raised here.

    Raises RuntimeError, 'DataLoader worker …', as torch does, where one was ended from outside.

    Args:
        workers: processes; 0 prepares in this one.
        pin: page-locked memory, from which copies to a GPU need no waiting.
    """
    loader = DataLoader(
        _Prepared(prepare), batch_size=None, num_workers=workers, pin_memory=pin, worker_init_fn=_undisturbed
    )
    others = set(multiprocessing.active_children())
    batches: Any = iter(loader)
    mine = set(multiprocessing.active_children()) - others
    try:
        while True:
            try:
                batch = next(batches, None)
            except (OSError, EOFError, multiprocessing.ProcessError) as e:
                # of memory that a worker still has to hand over; what fails in its own work comes as a batch
                raise RuntimeError(f"DataLoader worker ended while it handed over a batch ({e})") from e
            if batch is None:
                return
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        try:
            handler = _deaf()
        except RuntimeError:  # once more, of the same process
            handler = _deaf()
        try:
            if mine:
                batches._shutdown_workers()  # what its __del__ does, which a traceback may put off
        finally:
            for process in mine:  # one that it could not end would keep this process from ending
                process.kill()
            if handler is not None:
                signal.signal(signal.SIGCHLD, handler)


def _deaf() -> Any:
    """Take away torch's handler of ended processes, and give it, where this is the main thread.

    Once a worker has failed it raises wherever the main thread is, again for each other process that ends.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class _Prepared(IterableDataset):
    def __init__(self, prepare: Prepare):
        self.prepare = prepare

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        try:
            yield from self.prepare(*((info.id, info.num_workers) if info else (0, 1)))
        except Exception as e:  # as it is, not as torch quotes it
            yield e


def _undisturbed(worker: int) -> None:
    """A signal to the whole process group is for the loop to answer; a worker ends when the loop does."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
