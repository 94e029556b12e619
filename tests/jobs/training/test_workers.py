"""Processes that prepare micro-batches end when the loop does, whatever is raised meanwhile."""

import itertools
import multiprocessing
import os
import signal

import pytest
from torch.utils.data import dataloader

from jobs.training.data.workers import prepared


def numbers(worker, workers):
    return itertools.count(worker, workers)


def test_workers_give_their_micro_batches_in_turn_and_leave_none_behind():
    batches = prepared(numbers, 2)
    assert list(itertools.islice(batches, 5)) == [0, 1, 2, 3, 4]
    before = signal.getsignal(signal.SIGCHLD)
    batches.close()
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGCHLD) is before


def test_one_that_was_killed_takes_the_others_with_it():
    batches = prepared(numbers, 3)
    next(batches)
    children = multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        os.kill(children[0].pid, signal.SIGKILL)
        for _ in itertools.islice(batches, 100_000):
            pass
    batches.close()
    for process in children:
        process.join(10)
    assert not any(process.is_alive() for process in children)


def test_one_that_ends_while_it_hands_over_a_batch_is_told_like_one_that_ends_before(monkeypatch):
    def reset(*args, **options):
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter, "_try_get_data", reset)
    with pytest.raises(RuntimeError, match="DataLoader worker ended while it handed over a batch"):
        next(prepared(numbers, 2))
    assert not multiprocessing.active_children()
