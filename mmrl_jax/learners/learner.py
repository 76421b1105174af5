"""The parts that all learners of control policies share, and minibatches of all learners."""

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
from mmrl_jax.stability import spikes
from mmrl_jax.types import Metrics, Observation, Params, Transition

Apply = Callable[[Params, Observation], PolicyOutput]
# The state of a learner, with `params`, `opt_state` and `steps`.
AnyState = TypeVar("AnyState", bound=Any)
# Function that places a minibatch [N, ...] on the mesh; the identity on one device.
Shard = Callable[[Any], Any]


class LearnerState(struct.PyTreeNode):
    """State of a learner of a control policy.

    Attributes:
      params: Parameters of the network, a float32 pytree.
      opt_state: State of the optax optimizer.
      normalizer: Running statistics by which acting and learning normalize proprioception.
      steps: Number of optimizer steps taken, int32 [].
      extras: What an algorithm has beside the policy, by name, see `registry.Algorithm.extras`.
    """

    params: Params
    opt_state: optax.OptState
    normalizer: normalization.RunningStatistics
    steps: jax.Array
    extras: dict[str, Any] = struct.field(default_factory=dict)

    def without_optimizer(self) -> "LearnerState":
        """Returns the state of the policy alone, which has the same structure in all stages."""
        return self.replace(opt_state=(), extras={})


class Rollout(NamedTuple):
    """Transitions of B environments under the current policy.

    Attributes:
      transitions: Transitions, [T, B, ...].
      last_observation: Observations after the last transitions, [B, ...].
    """

    transitions: Transition
    last_observation: Observation


def init(
    params: Params, *, proprio_size: int, optimizer: optax.GradientTransformation | None = None
) -> LearnerState:
    """Returns the initial state of a learner.

    Args:
      params: Parameters of the network.
      proprio_size: Number P of proprioceptive readings.
      optimizer: Optimizer whose state is initialized; None for a learner that only acts.
    """
    return LearnerState(
        params=params,
        opt_state=() if optimizer is None else optimizer.init(params),
        normalizer=normalization.init(proprio_size),
        steps=jnp.zeros((), jnp.int32),
    )


def run_network(apply: Apply, state: LearnerState, observation: Observation) -> PolicyOutput:
    """Runs the network on observations [B, ...] with normalized proprioception."""
    proprio = normalization.normalize(state.normalizer, observation["proprio"])
    return apply(state.params, observation | {"proprio": proprio})


def policy_function(apply: Apply, state: LearnerState, *, deterministic: bool) -> PolicyFunction:
    """Returns the policy function of a learner, for `rollouts.unroll`."""

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
    """Returns the losses [] of the predictions of privileged targets.

    Args:
      output: Output of the network for N observations.
      privileged: Targets by name, [N, ...] each.
      valid: Mask of the samples, float32 [N].

    Returns:
      'loss/auxiliary', the sum of the squared errors of vectors, and 'loss/pointing', the sum of
      the cross-entropies of positions in the image, each a masked mean over samples.
    """
    parts = {"loss/auxiliary": jnp.zeros(()), "loss/pointing": jnp.zeros(())}
    for name, prediction in output.auxiliary.items():
        if prediction.ndim == 3:
            error = losses.pointing_loss(prediction, privileged[name])
            parts["loss/pointing"] += losses.masked_mean(error, valid)
        else:
            chex.assert_equal_shape([prediction, privileged[name]])  # Other shapes would broadcast.
            error = jnp.sum((prediction - privileged[name]) ** 2, axis=-1)
            parts["loss/auxiliary"] += losses.masked_mean(error, valid)
    return parts


@jax.named_scope("optimizer")
def apply_gradients(
    state: AnyState,
    loss: jax.Array,
    gradients: Params,
    optimizer: optax.GradientTransformation,
    **extra: jax.Array,
) -> tuple[AnyState, Metrics]:
    """Takes one optimizer step, or skips it if the loss or the gradient is not finite.

    An optimizer that is wrapped in `spikes.skip_spikes` also skips a step that is a spike.

    Args:
      state: State of the learner.
      loss: Loss, [].
      gradients: Gradient of the loss with respect to `state.params`.
      optimizer: Optimizer whose state is `state.opt_state`.
      **extra: Further arguments of the optimizer, such as `kl` of `learning_rate.scale_by_kl`. An
        optimizer that does not need them ignores them.

    Returns:
      The new state, and the metrics 'loss/total', 'grad/norm', 'optimizer/steps' and
      'optimizer/skipped_steps', and 'optimizer/skipped_spikes' of an optimizer that skips spikes.
      One of the last two or three is 1, and the others are 0.
    """
    norm = optax.tree.norm(gradients)  # It is finite only if every entry of the gradient is.
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
        gradients, state.opt_state, state.params, loss=loss, grad_norm=norm, **extra
    )
    params = optax.apply_updates(state.params, updates)
    spike = spikes.was_skipped(opt_state)
    steps = state.steps + (1 if spike is None else 1 - spike)
    new = state.replace(params=params, opt_state=opt_state, steps=steps)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    taken = finite.astype(jnp.float32)
    metrics = {
        "loss/total": loss,
        "grad/norm": norm,
        "optimizer/steps": taken,
        "optimizer/skipped_steps": 1 - taken,
    }
    if spike is None:
        return new, metrics
    skipped = taken * spike
    return new, metrics | {
        "optimizer/steps": taken - skipped,
        "optimizer/skipped_spikes": skipped,
    }


ROUNDS = 6  # Rounds of the Feistel network in `epoch_indices`, an even number.


def _mixed(x: jax.Array) -> jax.Array:
    """Mixes the bits of each uint32 by the finalizer of MurmurHash3 (Appleby, 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def epoch_indices(rng: jax.Array, update: jax.Array, *, batch_size: int, size: int) -> jax.Array:
    """Returns the indices of the samples of an update on a fixed set, int32 [batch_size].

    Every epoch contains each sample once, in a different order. If the batch size does not divide
    the size of the set, a batch can contain the end of an epoch and the start of the next one. The
    indices depend only on the key and on the number of the update, so that a resumed run uses the
    same ones. No permutation is stored: a position is permuted by a Feistel network over rows and
    columns, which is repeated until the result is in the set (Black and Rogaway, 2002, "Ciphers
    with arbitrary finite domains").

    Args:
      rng: PRNG key of the permutations.
      update: Number of the update, int32 [], at most 2^32 / batch_size.
      batch_size: Number of samples of an update; it may exceed `size`.
      size: Number of samples in the set.
    """
    first = update.astype(jnp.uint32) * jnp.uint32(batch_size)
    position = first + jnp.arange(batch_size, dtype=jnp.uint32)
    epoch, index = position // size, position % size
    # One call for all keys: for some PRNG implementations, vmapped keys give other numbers.
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
    """Returns the indices of the samples of every optimizer step, int32 [E * M, size / M].

    The samples are divided into runs of M consecutive ones, and every minibatch has one sample of
    each run. No sample then moves to another device, and the order does not depend on the number of
    devices. Indices count within a run, see `gather`.

    Args:
      keys: PRNG keys of the shuffles, one for each of E epochs.
      size: Number of samples.
      minibatches: Number M of optimizer steps in an epoch; it must divide `size`.
    """
    runs = jnp.broadcast_to(jnp.arange(minibatches), (size // minibatches, minibatches))

    def shuffled(key: jax.Array) -> jax.Array:
        return jax.random.permutation(key, runs, axis=1, independent=True).T

    return jax.vmap(shuffled)(keys).reshape(-1, len(runs))


def gather(tree: Any, indices: jax.Array) -> Any:
    """Selects one sample of each of n runs of a batch [N, ...], by its index int32 [n]."""

    def gathered(x: jax.Array) -> jax.Array:
        runs = x.reshape(len(indices), -1, *x.shape[1:])
        return jax.vmap(lambda run, i: run[i])(runs, indices)

    return jax.tree.map(gathered, tree)


def flatten(tree: Any) -> Any:
    """Reshapes [T, B, ...] to [B * T, ...], where the steps of an environment are consecutive."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def unflatten(tree: Any, length: int) -> Any:
    """Reshapes [B * T, ...] to [T, B, ...] with T = `length`, the inverse of `flatten`."""
    return jax.tree.map(lambda x: x.reshape(-1, length, *x.shape[1:]).swapaxes(0, 1), tree)


def split_microbatches(tree: Any, parts: int) -> Any:
    """Reshapes [N, ...] to [parts, N / parts, ...]; each part has samples of every device."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def map_in_chunks(function: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """Applies a function of samples [n, ...] to equal parts of a batch [N, ...], one at a time."""
    results = jax.lax.map(function, split_microbatches(batch, parts))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), results)


def accumulate(function: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """Returns the sum of a function's results over equal parts of a batch [N, ...].

    The parts are processed one at a time. With a function that returns gradients this is gradient
    accumulation: only the activations of one part are in memory.
    """
    batch = split_microbatches(batch, parts)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None), zeros, batch
    )[0]


def mean_over_steps(metrics: Metrics) -> Metrics:
    """Reduces metrics [steps] to means [] over the steps taken; numbers of steps are added up."""
    taken = metrics["optimizer/steps"]

    def reduce(name: str, x: jax.Array) -> jax.Array:
        if name in ("optimizer/steps", "optimizer/skipped_steps", "optimizer/skipped_spikes"):
            return jnp.sum(x)
        return jnp.sum(jnp.where(taken > 0, x, 0.0)) / jnp.sum(taken)

    return {name: reduce(name, x) for name, x in metrics.items()}
