"""PPO that clones demonstrations too, less and less (Rajeswaran et al., 2018, arXiv 1709.10087)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mmrl_jax.config.options import POSITIVE, between, option
from mmrl_jax.learners import bc, ppo
from mmrl_jax.learners.learner import Apply, LearnerState, Rollout, Shard, run_network
from mmrl_jax.types import Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class DAPG(ppo.PPO):
    """The options of PPO with a cloning loss of demonstrations that fades."""

    demonstration_coef: float = option(
        0.1, "Coefficient of the cloning loss of demonstrated steps in the first update.", POSITIVE
    )
    demonstration_decay: float = option(
        0.95, "Factor by which that coefficient is multiplied after each update.", between(0, 1)
    )

    @property
    def loss_parts(self) -> tuple[str, ...]:
        """Names of the parts of the loss whose coefficient is not always 0."""
        return (*super().loss_parts, "bc")


class DemonstratedRollout(NamedTuple):
    """A rollout with demonstrated steps beside it.

    Attributes:
      rollout: Transitions of B environments.
      demonstrations: Demonstrated steps [n].
      updates: Number of updates before this one, int32 [].
    """

    rollout: Rollout
    demonstrations: bc.Demonstrations
    updates: jax.Array


def update(
    state: LearnerState,
    batch: DemonstratedRollout,
    rng: jax.Array,
    *,
    apply: Apply,
    optimizer: optax.GradientTransformation,
    options: DAPG,
    shard: Shard = lambda batch: batch,
) -> tuple[LearnerState, Metrics]:
    """Takes epochs of minibatch steps of PPO, each of which also clones the demonstrated steps.

    The coefficient of the cloning loss is coef * decay^k in update k = 0, 1, ... (eq. 6, without
    its factor of the largest advantage: here the advantages are normalized).

    Args:
      state: State of the learner, with the parameters and the normalizer of the rollout.
      batch: Rollout under the learner's policy, and demonstrated steps.
      rng: PRNG key of the shuffles.
      apply: Function of parameters and observations that returns a PolicyOutput.
      optimizer: Optimizer whose state is `state.opt_state`.
      options: Options of the algorithm.
      shard: Function that places a minibatch on the mesh.

    Returns:
      The new state and the metrics of `ppo.update`, with 'loss/bc'.
    """
    h, demonstrations = options, shard(batch.demonstrations)
    coef = h.demonstration_coef * jnp.float32(h.demonstration_decay) ** batch.updates

    def cloning(state: LearnerState) -> tuple[dict[str, jax.Array], Metrics]:
        output = run_network(apply, state, demonstrations.observation)
        loss = jnp.mean(output.distribution.cloning_loss(demonstrations.action))
        return {"bc": coef * loss}, {"loss/bc": loss}

    return ppo.update(
        state,
        batch.rollout,
        rng,
        apply=apply,
        optimizer=optimizer,
        options=h,
        shard=shard,
        further_loss=cloning,
    )
