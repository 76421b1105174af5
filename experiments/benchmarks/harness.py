"""What every benchmark shares: alternating measurements, and rows of results."""

from collections.abc import Callable, Sequence
import dataclasses
import time
from typing import Any, TypeVar

import jax
import numpy as np

from mmrl_jax.training.provenance import hardware

T = TypeVar("T")

# Measures once, after everything is compiled: a rate or a time.
Measure = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a suite's table.

    Attributes:
      name: what was measured.
      ours: median of our runs.
      peer: median of the peer's runs; None where there is none.
      ratio: ours / peer.
      unit: of ours and peer; the peer is named in `name`.
      runs: measurements of each.
      hardware: see `hardware`.
    """

    name: str
    ours: float
    peer: float | None
    ratio: float | None
    unit: str
    runs: int
    hardware: str


def compare(name: str, ours: Measure, peer: Measure | None, *, unit: str, runs: int) -> Row:
    """The row of `runs` measurements of ours and of the peer's, see `alternate`."""
    return row(name, *alternate([ours] if peer is None else [ours, peer], runs), unit=unit)


def alternate(measures: Sequence[Callable[[], T]], runs: int) -> list[list[T]]:
    """Alternates `runs` measurements of each; which goes first changes every other time.

    All are run once before, so that nothing is compiled or cold while it is measured.
    """
    for measure in measures:
        measure()
    values: list[list[T]] = [[] for _ in measures]
    for i in range(runs):
        order = range(len(measures))
        for k in order if i % 2 == 0 else reversed(order):
            values[k].append(measures[k]())
    return values


def row(name: str, ours: Sequence[float], peer: Sequence[float] | None = None, *, unit: str) -> Row:
    """The row of measurements that were made, as many of the peer's as of ours."""
    mine = float(np.median(ours))
    theirs = None if peer is None else float(np.median(peer))
    ratio = None if theirs is None else mine / theirs
    return Row(name, mine, theirs, ratio, unit, len(ours), hardware())


def rate(amount: float, call: Callable[..., Any], *arguments: Any) -> Measure:
    """A measure of `amount` a second, by the wall clock of one call until its results are there."""
    return lambda: amount / seconds(call, *arguments)


def seconds(call: Callable[..., Any], *arguments: Any) -> float:
    """Wall time of one call until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    return time.perf_counter() - start
