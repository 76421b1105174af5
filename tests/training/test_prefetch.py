"""Tests of prefetching: order of batches, errors and threads."""

import collections
import threading

import pytest

from mmrl_jax.training.prefetch import Prefetch


class Reader:
    """Reads 10 u for update u, records the reads, and can fail at one update."""

    def __init__(self, fails=None):
        self.numbers, self.fails = [], fails
        self.begun = collections.defaultdict(threading.Event)

    def __call__(self, update):
        self.numbers.append(update)
        self.begun[update].set()
        if update == self.fails:
            raise ValueError(f"record of update {update}")
        return 10 * update


def wait_for_threads():
    for thread in threading.enumerate():
        if thread.name.startswith("prefetch"):
            thread.join()


def test_the_next_batch_is_read_before_it_is_asked_for_and_no_other():
    read = Reader()
    batches = Prefetch(read, updates=5)
    assert batches(2) == 20  # As a resumed run begins.
    assert read.begun[3].wait(timeout=60)
    wait_for_threads()
    assert read.numbers == [2, 3]
    assert batches(3) == 30 and batches(4) == 40
    wait_for_threads()
    assert read.numbers == [2, 3, 4]  # Each once, and none behind the end.
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_an_error_comes_where_its_batch_is_asked_for():
    read = Reader(fails=1)
    batches = Prefetch(read, updates=5)
    assert batches(0) == 0
    wait_for_threads()
    assert read.numbers == [0, 1]
    with pytest.raises(ValueError, match="record of update 1"):
        batches(1)
    # Another try reads again, and what was read ahead for one update is given to no other.
    read.fails = None
    assert batches(1) == 10 and batches(0) == 0 and batches(1) == 10
