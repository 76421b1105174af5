"""What all learners of control policies share: their state and how they run the network."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple, TypeVar

import chex
from flax import struct
import jax
import jax.numpy as jnp
import optax

from mmrl_jax.envs.brax_api import State
from mmrl_jax.models.heads import PolicyOutput
from mmrl_jax.rl import losses, normalization
from mmrl_jax.rollouts.unroll import ActorOutput, PolicyFunction
from mmrl_jax.types import Metrics, Observation, Params, Transition

Apply = Callable[[Params, Observation], PolicyOutput]
# A learner's state with `params`, `opt_state` and `steps`.
AnyState = TypeVar("AnyState", bound=Any)
# Places a minibatch [N, ...] on the mesh; the identity on one device.
Shard = Callable[[Any], Any]


class LearnerState(struct.PyTreeNode):
    """Everything a learner carries from update to update.

    Attributes:
      params: float32 pytree of the network.
      opt_state: state of the optax optimizer.
      normalizer: running statistics of proprioception; acting and learning normalize with them.
      steps: int32 [], optimizer steps taken.
    """

    params: Params
    opt_state: optax.OptState
    normalizer: normalization.RunningStatistics
    steps: jax.Array

    def without_optimizer(self) -> "LearnerState":
        """What the learner acts with: of one structure, whatever it was trained with."""
        return self.replace(opt_state=())


class Rollout(NamedTuple):
    """Experience of environments that the policy has just acted in.

    Attributes:
      transitions: Of B environments, [T, B, ...].
      last_observation: After the last transition, [B, ...].
    """

    transitions: Transition
    last_observation: Observation


def init(
    params: Params, *, proprio_size: int, optimizer: optax.GradientTransformation | None = None
) -> LearnerState:
    """Returns a fresh learner around initialized parameters.

    Args:
      params: Of the network.
      proprio_size: Numbers in an observation of proprioception.
      optimizer: Whose state the learner holds; None for a learner that only acts.
    """
    return LearnerState(
        params=params,
        opt_state=() if optimizer is None else optimizer.init(params),
        normalizer=normalization.init(proprio_size),
        steps=jnp.zeros((), jnp.int32),
    )


def run_network(apply: Apply, state: LearnerState, observation: Observation) -> PolicyOutput:
    """Runs the network on observations [B, ...] with proprioception normalized."""
    proprio = normalization.normalize(state.normalizer, observation["proprio"])
    return apply(state.params, observation | {"proprio": proprio})


def policy_function(apply: Apply, state: LearnerState, *, deterministic: bool) -> PolicyFunction:
    """The learner's policy for `rollouts.unroll`; it reads observations and nothing else."""

    def policy(env_state: State, rng: jax.Array) -> ActorOutput:
        output = run_network(apply, state, env_state.obs)
        distribution = output.distribution
        action = distribution.mode() if deterministic else distribution.sample(rng)
        return ActorOutput(
            environment_action=distribution.action(action),
            action=action,
            log_prob=distribution.log_prob(action),
            value=output.value,
        )

    return policy


def auxiliary_losses(
    output: PolicyOutput, privileged: dict[str, jax.Array], valid: jax.Array
) -> Metrics:
    """Masked mean errors [] of the predicted privileged targets.

    'loss/auxiliary' sums the squared errors of vectors, 'loss/pointing' the cross-entropies of
    places in the picture. Targets are compared with, and are never an input.
    """
    parts = {"loss/auxiliary": jnp.zeros(()), "loss/pointing": jnp.zeros(())}
    for name, prediction in output.auxiliary.items():
        if prediction.ndim == 3:
            error = losses.pointing_loss(prediction, privileged[name])
            parts["loss/pointing"] += losses.masked_mean(error, valid)
        else:
            chex.assert_equal_shape([prediction, privileged[name]])  # They would broadcast.
            error = jnp.sum((prediction - privileged[name]) ** 2, axis=-1)
            parts["loss/auxiliary"] += losses.masked_mean(error, valid)
    return parts


def apply_gradients(
    state: AnyState,
    loss: jax.Array,
    gradients: Params,
    optimizer: optax.GradientTransformation,
) -> tuple[AnyState, Metrics]:
    """One optimizer step, skipped where the loss [] or its gradient is not finite.

    Returns:
      The new state, and 'loss/total', 'grad/norm', 'optimizer/steps' and 'optimizer/skipped_steps'
      (one of the last two is 1).
    """
    norm = optax.tree.norm(gradients)  # Not finite as soon as one number of the gradient is not.
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = state.replace(params=params, opt_state=opt_state, steps=state.steps + 1)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    taken = finite.astype(jnp.float32)
    return new, {
        "loss/total": loss,
        "grad/norm": norm,
        "optimizer/steps": taken,
        "optimizer/skipped_steps": 1 - taken,
    }


ROUNDS = 6  # Of the shuffle in `epoch_indices`, an even number.


def _mixed(x: jax.Array) -> jax.Array:
    """Other bits for each uint32: the finalizer of MurmurHash3 (Appleby, 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def epoch_indices(rng: jax.Array, update: jax.Array, *, batch_size: int, size: int) -> jax.Array:
    """The samples of an update on a fixed set, int32 [batch_size]: each once in every epoch.

    An epoch goes through all samples in an order of its own, and the next one begins within a
    batch where the batch size does not divide the set. The indices are a function of the key and
    the number of the update alone, so that a resumed run goes on with the same ones. No order is
    held in memory: a position is shuffled by a Feistel network over rows and columns, walked until
    it is in the set (Black and Rogaway, 2002, "Ciphers with arbitrary finite domains").

    Args:
      rng: key of the orders.
      update: int32 [], at most 2^32 / batch_size.
      batch_size: samples of an update; may be more than there are.
      size: number of samples in the set.
    """
    first = update.astype(jnp.uint32) * jnp.uint32(batch_size)
    position = first + jnp.arange(batch_size, dtype=jnp.uint32)
    epoch, index = position // size, position % size
    # Not keys folded for each sample: of some generators a batch of keys gives other numbers.
    words = jax.random.bits(rng, (ROUNDS,), jnp.uint32)
    keys = [_mixed(word + _mixed(epoch + 1)) for word in words]
    columns = math.isqrt(size - 1) + 1
    rows = -(-size // columns)

    def shuffled(index: jax.Array) -> jax.Array:
        row, column = index // columns, index % columns
        for i in range(0, ROUNDS, 2):
            row = (row + _mixed(column ^ keys[i]) % rows) % rows
            column = (column + _mixed(row ^ keys[i + 1]) % columns) % columns
        return row * columns + column

    return jax.lax.while_loop(
        lambda x: jnp.any(x >= size),
        lambda x: jnp.where(x >= size, shuffled(x), x),
        shuffled(index),
    ).astype(jnp.int32)


def minibatch_order(keys: jax.Array, size: int, minibatches: int) -> jax.Array:
    """The samples of every optimizer step, int32 [E * M, size / M], for `gather`.

    Every minibatch has one sample of each run of M samples that follow each other, so that none has
    to move to another device, however many there are, and the order does not depend on how many.

    Args:
      keys: of the shuffles, one for each of E epochs.
      size: number of samples.
      minibatches: M, optimizer steps an epoch; must divide `size`.
    """
    runs = jnp.broadcast_to(jnp.arange(minibatches), (size // minibatches, minibatches))

    def shuffled(key: jax.Array) -> jax.Array:
        return jax.random.permutation(key, runs, axis=1, independent=True).T

    return jax.vmap(shuffled)(keys).reshape(-1, len(runs))


def gather(tree: Any, indices: jax.Array) -> Any:
    """Of a batch [N, ...], the samples [n, ...] that indices int32 [n] name, each in its run."""

    def gathered(x: jax.Array) -> jax.Array:
        runs = x.reshape(len(indices), -1, *x.shape[1:])
        return jax.vmap(lambda run, i: run[i])(runs, indices)

    return jax.tree.map(gathered, tree)


def flatten(tree: Any) -> Any:
    """[T, B, ...] to [B * T, ...]: each device's environments stay together."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def unflatten(tree: Any, length: int) -> Any:
    """What `flatten` made, [T, B, ...] again, of T = `length`."""
    return jax.tree.map(lambda x: x.reshape(-1, length, *x.shape[1:]).swapaxes(0, 1), tree)


def split_microbatches(tree: Any, parts: int) -> Any:
    """[N, ...] to [parts, N / parts, ...]: every `parts`-th sample, so some of each device's."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def map_in_chunks(function: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """What a function maps a batch [N, ...] to, worked out for one of equal parts at a time."""
    results = jax.lax.map(function, split_microbatches(batch, parts))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), results)


def accumulate(function: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """The sum of what a function gives for `parts` equal parts of a batch [N, ...], one at a time.

    Of gradients it is gradient accumulation: no more activations are held than a part's.
    """
    batch = split_microbatches(batch, parts)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None), zeros, batch
    )[0]


def mean_over_steps(metrics: Metrics) -> Metrics:
    """Of metrics [steps], the means [] over the steps taken, and the sums of what counts steps."""
    taken = metrics["optimizer/steps"]

    def reduce(name: str, x: jax.Array) -> jax.Array:
        if name in ("optimizer/steps", "optimizer/skipped_steps"):
            return jnp.sum(x)
        return jnp.sum(jnp.where(taken > 0, x, 0.0)) / jnp.sum(taken)

    return {name: reduce(name, x) for name, x in metrics.items()}
