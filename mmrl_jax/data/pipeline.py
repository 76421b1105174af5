"""Batches of demonstrated steps, whose position is the number of the update.

Batch u has the samples u * B to (u + 1) * B - 1 of the sequence of all epochs. Every epoch has each
step with an action once, or as often as the weight of its episode says, in an order that depends on
the seed and the epoch alone. Which samples of a batch a process reads is given by their places in
the batch, so that a run continues exactly where it stopped, also on another number of processes.
"""

from collections.abc import Mapping
import functools
from typing import Any, NamedTuple

import numpy as np

from mmrl_jax.data import weights as weights_lib
from mmrl_jax.data.packed import Packed
from mmrl_jax.data.records import InvalidData

# Statistics between which actions are scaled to [-1, 1], by the method.
SCALINGS = {"none": None, "min_max": ("minimum", "maximum"), "quantiles": ("low", "high")}
TOLERANCE = 1e-3  # By which actions may exceed [-1, 1] without scaling; they are then clipped.


class Batch(NamedTuple):
    """A batch of n demonstrated steps.

    The value target of a step is value_return + bootstrap_weight * v(next_observation).

    Attributes:
      rows: Rows of the steps in the packed arrays, int64 [n], which identify them.
      observation: Observations before the actions, [n, ...]; the instruction as tokens and mask.
      action: Actions, float32 [n, A] in [-1, 1] or int32 [n].
      value_return: Discounted sums of the rewards until the episode ended, float32 [n].
      bootstrap_weight: Discounts of the values of `next_observation`, float32 [n]; 0 where the
        episode terminated.
      next_observation: Observations after the ends of the episodes, [n, ...].
      privileged: Further targets by name, [n, ...] each.
    """

    rows: np.ndarray
    observation: dict[str, Any]
    action: np.ndarray
    value_return: np.ndarray
    bootstrap_weight: np.ndarray
    next_observation: dict[str, Any]
    privileged: dict[str, np.ndarray]


class Pipeline:
    """Batches of the steps of packed episodes, see the module.

    Args:
      packed: Packed episodes.
      tokens: Tokens of each of `packed.texts`, int32 [K, L]; None for a policy without
        instructions.
      batch_size: Number of samples B in a batch.
      seed: Seed of the order of each epoch.
      history: Number of frames of an observation; with more than 1, 'pixels' and 'proprio' have an
        axis of frames, oldest first, and the first frame of an episode fills those before it.
      discount: Discount factor per step of the returns.
      one_step: Whether value targets have one reward and the value of the next observation.
      scaling: Name of the method in SCALINGS by which actions are scaled.
      key: Name of the option that has `scaling`, for messages.
      weights: Weight of each episode, float64 [E], see `weights.epoch_order`; None for no weights.

    Raises:
      InvalidData: If actions are outside of [-1, 1] and not scaled.
    """

    def __init__(
        self,
        packed: Packed,
        *,
        tokens: np.ndarray | None,
        batch_size: int,
        seed: int,
        history: int,
        discount: float,
        one_step: bool,
        scaling: str,
        key: str,
        weights: np.ndarray | None = None,
    ):
        self.packed, self.batch_size = packed, batch_size
        self._tokens, self._seed, self._history = tokens, seed, history
        self._rows = np.flatnonzero(packed.arrays["has_action"])
        self._weights: np.ndarray | None = None
        if weights is not None:
            of_rows = np.repeat(weights, np.diff(packed.starts))[self._rows]
            self._rows, self._weights = self._rows[of_rows > 0], of_rows[of_rows > 0]
        self._targets = value_targets(packed, discount, one_step=one_step)
        self._scale = _scale(packed, scaling, key)
        # A batch may have samples of two epochs, or of more if it is larger than the set.
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        """Returns the number of samples of an epoch."""
        return len(self._rows)

    @property
    def sampled(self) -> np.ndarray:
        """Rows of the steps that epochs have, each once, int64 [n]."""
        return self._rows

    def rows(self, update: int, places: np.ndarray) -> np.ndarray:
        """Returns the rows of some samples of a batch, int64 [n].

        Args:
          update: Number of the update, at least 0.
          places: Places of the samples in the batch, int64 [n] in [0, B).
        """
        positions = update * self.batch_size + places
        epochs, offsets = positions // len(self), positions % len(self)
        rows = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            rows[mask] = self._rows[self._order(int(epoch))[offsets[mask]]]
        return rows

    def batch(self, update: int, places: np.ndarray | None = None) -> Batch:
        """Returns some samples of the batch of an update.

        Args:
          update: Number of the update, at least 0.
          places: Places of the samples in the batch, int64 [n] in [0, B); None for all.
        """
        rows = self.rows(update, np.arange(self.batch_size) if places is None else places)
        arrays, (returns, weight, bootstrap) = self.packed.arrays, self._targets
        return Batch(
            rows=rows,
            observation=self._observation(rows),
            action=self._scaled(arrays["action"][rows]),
            value_return=returns[rows],
            bootstrap_weight=weight[rows],
            next_observation=self._observation(bootstrap[rows]),
            privileged={
                name.removeprefix("privileged/"): x[rows]
                for name, x in arrays.items()
                if name.startswith("privileged/")
            },
        )

    def _observation(self, rows: np.ndarray) -> dict[str, Any]:
        observation: dict[str, Any] = {}
        if self._tokens is not None:
            tokens = self._tokens[self.packed.arrays["text"][rows]]
            observation["instruction"] = {"tokens": tokens, "mask": tokens != 0}
        frames = rows
        if self._history > 1:
            starts = self.packed.starts
            first = starts[np.searchsorted(starts, rows, side="right") - 1]
            back = np.arange(self._history - 1, -1, -1)
            frames = np.maximum(rows[:, None] - back, first[:, None])
        for name in ("pixels", "proprio"):
            if name in self.packed.arrays:
                observation[name] = self.packed.arrays[name][frames]
        return observation

    def _scaled(self, action: np.ndarray) -> np.ndarray:
        if self._scale is None:
            return action
        middle, half = self._scale
        return np.clip((action - middle) / half, -1, 1).astype(np.float32)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return weights_lib.epoch_order(len(self), self._weights, seed=self._seed, epoch=epoch)


def places_of_process(batch_size: int, process: int, processes: int) -> np.ndarray:
    """Returns the places in a batch that one of several processes reads, if each reads a slice.

    Args:
      batch_size: Number of samples B in a batch, a multiple of `processes`.
      process: Index of the process.
      processes: Number of processes.

    Raises:
      ValueError: If the batch cannot be divided.
    """
    if batch_size % processes:
        raise ValueError(f"batch_size={batch_size} is no multiple of {processes} processes.")
    size = batch_size // processes
    return np.arange(process * size, (process + 1) * size)


def value_targets(
    packed: Packed, discount: float, *, one_step: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the parts of the value target of every row, see `Batch`.

    As in `rl.advantages.bootstrapped_returns`, a truncated episode is bootstrapped from the
    observation after its last action. An episode without a final observation is bootstrapped from
    its last one instead.

    Args:
      packed: Packed episodes.
      discount: Discount factor per step, in [0, 1].
      one_step: Whether the targets have one reward and the value of the next observation.

    Returns:
      The discounted sums of rewards float32 [R], the weights float32 [R], and the rows of the
      observations that are bootstrapped from, int64 [R].
    """
    starts, reward = packed.starts, np.asarray(packed.arrays["reward"])
    has_action = np.asarray(packed.arrays["has_action"])
    last = starts[1:] - 1
    lengths = np.diff(starts)
    actions = lengths - ~has_action[last]
    terminal = np.logical_or.reduceat(np.asarray(packed.arrays["is_terminal"]), starts[:-1])
    gamma = np.float32(discount)
    if one_step:
        weights = np.full_like(reward, gamma)
        weights[(starts[:-1] + actions - 1)[terminal]] = 0
        return reward, weights, np.minimum(np.arange(len(reward)) + 1, np.repeat(last, lengths))
    returns, weights = np.zeros_like(reward), np.zeros_like(reward)
    total, weight = np.zeros(len(lengths), np.float32), np.where(terminal, 0, 1).astype(np.float32)
    # All episodes are summed at once, from their last actions backward.
    for back in range(int(actions.max())):
        mask = back < actions
        rows = (starts[:-1] + actions - 1 - back)[mask]
        total[mask] = reward[rows] + gamma * total[mask]
        weight[mask] = gamma * weight[mask]
        returns[rows], weights[rows] = total[mask], weight[mask]
    return returns, weights, np.repeat(last, lengths)


def _scale(packed: Packed, scaling: str, key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the middle and half of the range of each dimension of the actions; None for none."""
    if packed.arrays["action"].dtype.kind != "f":
        return None
    names = SCALINGS[scaling]
    if names is None:
        extremes: Mapping[str, np.ndarray] = packed.statistics
        low, high = extremes["minimum"], extremes["maximum"]
        if min(low.min() + 1, 1 - high.max()) < -TOLERANCE:
            raise InvalidData(
                f"The actions are in [{low.min():g}, {high.max():g}], but a policy acts in "
                f"[-1, 1]; set {key} to 'min_max' or 'quantiles'. By dimension, their least values "
                f"are {low.tolist()} and their largest {high.tolist()}."
            )
        return np.zeros(1, np.float32), np.ones(1, np.float32)
    low, high = (packed.statistics[name] for name in names)
    half = (high - low) / 2
    # A dimension that never changes becomes 0.
    return (low + high) / 2, np.where(half > 0, half, 1)
