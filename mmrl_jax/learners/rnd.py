"""PPO with random network distillation (Burda et al., 2018, arXiv 1810.12894).

    observations [T + 1, B] -> novelty of the next observation -> intrinsic rewards [T, B]
                                                              -> advantages A_int [T, B]
    PPO on A + intrinsic_coef * A_int

The novelty of an observation is the error with which a trained network predicts the features that a
fixed random network gives it. Intrinsic returns have a critic of their own and do not end with an
episode: what is found after a reset is as novel as before it.
"""

import dataclasses
from typing import Any, cast

from flax import struct
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mmrl_jax.config.options import NON_NEGATIVE, POSITIVE, POSITIVE_FRACTION, between, option
from mmrl_jax.exploration import intrinsic
from mmrl_jax.learners import ppo
from mmrl_jax.learners.learner import (
    Apply,
    LearnerState,
    Rollout,
    Shard,
    apply_gradients,
    flatten,
    gather,
    mean_over_steps,
    minibatch_order,
    unflatten,
)
from mmrl_jax.models.transformer import Dense
from mmrl_jax.rl import advantages, losses, normalization
from mmrl_jax.stability import learning_rate
from mmrl_jax.types import Metrics, Observation, Params

# What novelty is measured on. An instruction is constant over an episode.
_OBSERVED = ("proprio", "pixels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RND(ppo.PPO):
    """The options of PPO with random network distillation."""

    intrinsic_coef: float = option(
        0.5,
        "Coefficient of the advantages of novelty, which are added to those of the reward.",
        NON_NEGATIVE,
    )
    intrinsic_discount: float = option(
        0.99, "Discount factor per control step of the rewards for novelty.", between(0, 1)
    )
    intrinsic_learning_rate: float = option(
        1e-4,
        "Learning rate of Adam for the networks that predict features and the return of novelty.",
        POSITIVE,
    )
    predictor_fraction: float = option(
        0.25,
        "Fraction of the samples that train the predictor; a smaller one keeps observations novel "
        "for longer.",
        POSITIVE_FRACTION,
    )


class Novelty(struct.PyTreeNode):
    """What random network distillation learns beside the policy.

    Attributes:
      params: Parameters of the networks 'predictor' and 'critic'.
      opt_state: State of their optimizer.
      steps: Number of their optimizer steps taken, int32 [].
      target: Parameters of the fixed random network.
      observations: Statistics that observations are normalized with.
      returns: Statistics of the running returns of the novelty, of rows of size 1.
      level: Mean running return at the end of the last update, float32 [].
    """

    params: Params
    opt_state: optax.OptState
    steps: jax.Array
    target: Params
    observations: normalization.RunningStatistics
    returns: normalization.RunningStatistics
    level: jax.Array


class _Perceptron(nn.Module):
    """A perceptron with ReLU whose initial features have the scale of its inputs.

    Attributes:
      layers: Widths of the hidden layers.
      outputs: Number of outputs.
    """

    layers: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.orthogonal(jnp.sqrt(2.0))
        for i, width in enumerate(self.layers):
            x = nn.relu(Dense(width, kernel_init=init, name=f"hidden_{i}")(x))
        return Dense(self.outputs, kernel_init=init, name="out")(x)


# The predictor has a layer more than the target, as in the paper, so that it can fit it.
_TARGET = _Perceptron((128,), 64)
_PREDICTOR = _Perceptron((128, 128), 64)
_CRITIC = _Perceptron((128, 128), 1)


def _optimizer(options: RND) -> optax.GradientTransformation:
    # A rollback lowers this learning rate too.
    return optax.chain(optax.adam(options.intrinsic_learning_rate), learning_rate.scale_by_state())


def extras(options: RND, observation: Observation, output: Any, rng: jax.Array) -> dict[str, Any]:
    """Returns a `Novelty` before the first update as 'novelty', and the extras of PPO.

    Args:
      options: Options of the algorithm.
      observation: Observations [B, ...] of any values.
      output: Not used.
      rng: PRNG key of the parameters.
    """
    x = _vector(observation, axes=1)
    keys = jax.random.split(rng, 3)
    target, predictor, critic = (
        network.init(key, x[:1])["params"]
        for network, key in zip((_TARGET, _PREDICTOR, _CRITIC), keys, strict=True)
    )
    params = {"predictor": predictor, "critic": critic}
    novelty = Novelty(
        params=params,
        opt_state=_optimizer(options).init(params),
        steps=jnp.zeros((), jnp.int32),
        target=target,
        observations=normalization.init(x.shape[-1]),
        returns=normalization.init(1),
        level=jnp.zeros(()),
    )
    return {"novelty": novelty} | ppo.extras(options)


def update(
    state: LearnerState,
    rollout: Rollout,
    rng: jax.Array,
    *,
    apply: Apply,
    optimizer: optax.GradientTransformation,
    options: RND,
    shard: Shard = lambda batch: batch,
) -> tuple[LearnerState, Metrics]:
    """Takes epochs of minibatch steps of PPO, then of the predictor and of the intrinsic critic.

    Args:
      state: State of the learner, with the `extras` of this algorithm.
      rollout: Transitions of B environments under the learner's policy.
      rng: PRNG key of the shuffles.
      apply: Function of parameters and observations that returns a PolicyOutput.
      optimizer: Optimizer whose state is `state.opt_state`.
      options: Options of the algorithm.
      shard: Function that places a minibatch on the mesh.

    Returns:
      The new state, and the metrics of `ppo.update` with those of the novelty.
    """
    h, novelty = options, state.extras["novelty"]
    valid = rollout.transitions.valid
    x = jnp.concatenate(
        [
            _vector(rollout.transitions.observation, axes=2),
            _vector(rollout.last_observation, axes=1)[None],
        ]
    )
    # What a broken environment shows is masked out of PPO. Here it would spread backwards in time.
    x = jnp.where(jnp.isfinite(x), x, 0.0)
    novelty = novelty.replace(
        observations=normalization.update(novelty.observations, x[:-1], valid)
    )
    x = intrinsic.whiten(novelty.observations, x)
    error = intrinsic.prediction_error(
        _apply(_PREDICTOR, novelty.params["predictor"], x[1:]),
        _apply(_TARGET, novelty.target, x[1:]),
    )
    # The step that only resets an environment leads to no new observation.
    error = jnp.where(valid > 0, error, 0.0)
    returns = intrinsic.running_returns(error, novelty.level, h.intrinsic_discount)
    novelty = novelty.replace(
        returns=normalization.update(novelty.returns, returns[..., None], valid),
        level=jnp.mean(returns[-1]),
    )
    reward = intrinsic.scale(error, novelty.returns)
    value = _apply(_CRITIC, novelty.params["critic"], x)[..., 0]
    never = jnp.zeros_like(reward)
    advantage, target = advantages.generalized_advantages(
        reward=reward,
        value=value[:-1],
        last_value=value[-1],
        terminated=never,
        truncated=never,
        discount=h.intrinsic_discount,
        lambda_=h.gae_lambda,
    )
    ppo_rng, novelty_rng = jax.random.split(rng)
    new, metrics = ppo.update(
        state,
        rollout,
        ppo_rng,
        apply=apply,
        optimizer=optimizer,
        options=h,
        shard=shard,
        further_advantage=h.intrinsic_coef * advantage,
    )
    novelty, learned = _learn(novelty, (x[1:], x[:-1], target, valid), novelty_rng, h, shard)
    new = new.replace(extras=new.extras | {"novelty": novelty})
    metrics["optimizer/skipped_steps"] += learned.pop("optimizer/skipped_steps")
    return new, metrics | learned | {
        "exploration/novelty": losses.masked_mean(error, valid),
        "exploration/intrinsic_reward": losses.masked_mean(reward, valid),
        "exploration/intrinsic_value": losses.masked_mean(value[:-1], valid),
    }


def _learn(
    novelty: Novelty, samples: tuple[jax.Array, ...], rng: jax.Array, options: RND, shard: Shard
) -> tuple[Novelty, Metrics]:
    """Trains predictor and critic on next observations, observations, targets and mask [T, B]."""
    h, size = options, samples[-1].size
    samples = flatten(samples)

    def loss(params: Params, batch: tuple[jax.Array, ...], key: jax.Array) -> Any:
        following, current, target, valid = batch
        error = intrinsic.prediction_error(
            _apply(_PREDICTOR, params["predictor"], following),
            _apply(_TARGET, novelty.target, following),
        )
        chosen = valid * jax.random.bernoulli(key, h.predictor_fraction, valid.shape)
        value = _apply(_CRITIC, params["critic"], current)[..., 0]
        parts = {
            "loss/predictor": losses.masked_mean(error, chosen),
            "loss/intrinsic_value": losses.masked_mean(0.5 * (value - target) ** 2, valid),
        }
        return sum(parts.values()), parts

    def take_step(novelty: Novelty, step: tuple[jax.Array, jax.Array]) -> tuple[Novelty, Metrics]:
        indices, key = step
        batch = shard(gather(samples, indices))
        (value, parts), gradients = jax.value_and_grad(loss, has_aux=True)(
            novelty.params, batch, key
        )
        novelty, taken = apply_gradients(novelty, value, gradients, _optimizer(h))
        return novelty, parts | {
            name: taken[name] for name in taken if name.startswith("optimizer/")
        }

    keys = jax.random.split(rng, h.num_epochs + 1)
    order = minibatch_order(keys[1:], size, h.num_minibatches)
    novelty, metrics = jax.lax.scan(
        take_step, novelty, (order, jax.random.split(keys[0], len(order)))
    )
    # The number of optimizer steps is that of the policy, but what is skipped here counts too.
    return novelty, {
        name: x for name, x in mean_over_steps(metrics).items() if name != "optimizer/steps"
    }


def _apply(network: nn.Module, params: Params, x: jax.Array) -> jax.Array:
    """Returns the outputs of a network for vectors [N, F] or [T, B, F]."""

    def run(x: jax.Array) -> jax.Array:
        return cast(jax.Array, network.apply({"params": params}, x))

    # The steps of an environment stay on its device.
    return run(x) if x.ndim == 2 else unflatten(run(flatten(x)), len(x))


def _vector(observation: Observation, *, axes: int) -> jax.Array:
    """Returns what novelty is measured on as vectors, float32 [..., F], after `axes` batch axes."""
    parts = []
    for name in _OBSERVED:
        if name in observation:
            x = observation[name]
            x = x.astype(jnp.float32) / (255.0 if x.dtype == jnp.uint8 else 1.0)
            parts.append(x.reshape(*x.shape[:axes], -1))
    return jnp.concatenate(parts, axis=-1)
