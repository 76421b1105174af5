"""What every benchmark shares: alternating measurements, and rows of results."""

from collections.abc import Callable
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from experiments.provenance import hardware

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
    """Alternates `runs` measurements of ours and of the peer's, which goes first every other time.

    Both are run once before, so that nothing is compiled or cold while it is measured.
    """
    measures = [ours] if peer is None else [ours, peer]
    for measure in measures:
        measure()
    values: list[list[float]] = [[] for _ in measures]
    for i in range(runs):
        order = range(len(measures))
        for k in order if i % 2 == 0 else reversed(order):
            values[k].append(measures[k]())
    medians = [float(np.median(v)) for v in values]
    theirs = medians[1] if peer is not None else None
    ratio = None if theirs is None else medians[0] / theirs
    return Row(name, medians[0], theirs, ratio, unit, runs, hardware())


def rate(amount: float, call: Callable[..., Any], *arguments: Any) -> Measure:
    """A measure of `amount` a second, by the wall clock of one call until its results are there."""
    return lambda: amount / seconds(call, *arguments)


def seconds(call: Callable[..., Any], *arguments: Any) -> float:
    """Wall time of one call until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    return time.perf_counter() - start
