"""Alternating measurements and rows of results, which all benchmarks use."""

from collections.abc import Callable, Sequence
import dataclasses
import time
from typing import Any, TypeVar

import jax
import numpy as np

from mmrl_jax.training.provenance import hardware

T = TypeVar("T")

# Measures a rate or a time once, after everything is compiled.
Measure = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table of a suite.

    Attributes:
      name: Name of the measurement and of the peer.
      ours: Median of our measurements.
      peer: Median of the peer's measurements; None without a peer.
      ratio: Ratio ours / peer; None without a peer, or if the peer's median is 0.
      unit: Unit of ours and peer.
      runs: Number of measurements of each side.
      hardware: Description of the machine, see `provenance.hardware`.
    """

    name: str
    ours: float
    peer: float | None
    ratio: float | None
    unit: str
    runs: int
    hardware: str


def compare(name: str, ours: Measure, peer: Measure | None, *, unit: str, runs: int) -> Row:
    """Returns the row of `runs` alternating measurements of ours and the peer, see `alternate`."""
    return row(name, *alternate([ours] if peer is None else [ours, peer], runs), unit=unit)


def alternate(measures: Sequence[Callable[[], T]], runs: int) -> list[list[T]]:
    """Alternates `runs` measurements of each function, in an order that is reversed every time.

    All functions are called once before, so that measurements exclude compilation and cold caches.

    Returns:
      The results of each function.
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
    """Returns the row of measurements, with as many of the peer as of ours."""
    our_median = float(np.median(ours))
    peer_median = None if peer is None else float(np.median(peer))
    ratio = our_median / peer_median if peer_median else None
    return Row(name, our_median, peer_median, ratio, unit, len(ours), hardware())


def rate(amount: float, call: Callable[..., Any], *arguments: Any) -> Measure:
    """Returns a measurement of `amount` per second of wall time of a call, see `seconds`."""
    return lambda: amount / seconds(call, *arguments)


def seconds(call: Callable[..., Any], *arguments: Any) -> float:
    """Returns the wall time of a call until its results are computed."""
    start = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    return time.perf_counter() - start
