"""The update of a stage whose completions are scored by reward functions on the host.

    [completions] -> texts -> reward functions -> [learning]

The steps in brackets are compiled programs. With `one_step_off_policy`, the next completions are
sampled while the reward functions score, by the policy before the update:

    device   [completions of k + 1         ] [learning of k] [completions of k + 2         ] ...
    host     reward functions of k                           reward functions of k + 1

The completions that the next update learns from are a part of the carry, so that a run which is
resumed, or extended, is bitwise a run that was never stopped.
"""

from collections.abc import Callable
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.distributed import multihost
from mmrl_jax.distributed.rows import BatchRows
from mmrl_jax.learners import grpo
from mmrl_jax.learners.token_learner import ScoredCompletions
from mmrl_jax.problems import problem, token_problem
from mmrl_jax.problems.sources import LEARNING, Collected, Constants, Learn, update_keys
from mmrl_jax.rollouts.generate import Completions, Sampling
from mmrl_jax.tasks.folder import Batch, Records
from mmrl_jax.tasks.prompts import Prompt
from mmrl_jax.training.dispatch import TRANSIENT
from mmrl_jax.training.prefetch import Prefetch
from mmrl_jax.training.stage import Carry, HostUpdate
from mmrl_jax.types import Metrics, Params

if TYPE_CHECKING:
    from mmrl_jax.problems.dataset import Dataset


def in_flight(of: "Dataset", name: str) -> Completions | None:
    """Returns the shapes of `Carry.in_flight` of a stage.

    Args:
      of: Problem of a dataset.
      name: Name of a stage that learns from sampled completions.
    """
    g = of.config[name]
    if not g.one_step_off_policy:
        return None

    def shape(dtype: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct((g.prompts_per_update, g.num_completions, *sizes), dtype)

    length = of.model.policy.max_new_tokens
    return Completions(
        tokens=shape(jnp.int32, length),
        log_probs=shape(jnp.float32, length),
        mask=shape(jnp.bool_, length),
        finished=shape(jnp.bool_),
    )


def compile_update(
    of: "Dataset",
    name: str,
    train: Records,
    rows: BatchRows,
    learn: Learn,
    carry: Carry,
    constants: Constants,
) -> HostUpdate:
    """Compiles the two programs of an update, between which the rewards are computed.

    Each process reads and transfers the records whose prompts its devices complete, and calls the
    reward functions for its share of the completions.

    Args:
      of: Problem of a dataset.
      name: Name of a stage that learns from sampled completions.
      train: Records of the stage, in batches of an update.
      rows: Rows of a batch that this process reads and scores.
      learn: Learning part of the update.
      carry: Carry whose shapes and shardings are those of all later carries.
      constants: Constants of the stage.
    """
    g, replicated = of.config[name], mesh_lib.replicated(of.mesh)

    def read(update: int) -> tuple[Batch, Prompt]:
        batch = train.batch(update, rows.held)
        return batch, rows.put(of.prompts(batch))

    _, prompts = multihost.on_all(lambda: read(0))
    generate, step, metrics = _compile(of, name, learn, carry, constants, prompts)
    read_ahead = Prefetch(read, updates=g.num_updates + g.one_step_off_policy)
    held: dict[int, tuple[Batch, Prompt]] = {}  # The batch that is sampled from, but not scored.

    def batch_of(update: int) -> tuple[Batch, Prompt]:
        if update in held:
            return held.pop(update)
        return multihost.on_all(lambda: read_ahead(update), transient=TRANSIENT)

    def sample(carry: Carry, constants: Constants, prompts: Prompt, update: int) -> Completions:
        number = mesh_lib.put(np.int32(update), replicated)
        return generate(carry.learner.params, constants.frozen, prompts, carry.rng, number)

    def collect(carry: Carry, constants: Constants) -> tuple[tuple, jax.Array, Completions | None]:
        update = int(jax.device_get(carry.updates))
        batch, prompts = batch_of(update)
        completions, following = carry.in_flight, None
        if completions is None or update == 0:
            completions = sample(carry, constants, prompts, update)
        own, texts = batch.take(rows.share), rows.get(completions)
        if g.one_step_off_policy:
            held[update + 1] = batch_of(update + 1)
            # This returns at once, and the devices work while the reward functions do.
            following = sample(carry, constants, held[update + 1][1], update + 1)
        _, rewards, failed = of.scorer(train, own, texts, shares=rows.shares, meanwhile=following)
        # Missing rewards are set to 0, because NaN times a mask of 0 is NaN.
        reward = np.where(rewards.valid, rewards.reward, 0)
        arrays = reward, rewards.valid.astype(np.float32), np.float32(failed)
        reward, valid, failed = mesh_lib.put(arrays, replicated)
        return (prompts, completions, reward, valid), failed, following

    def learn_from(carry: Carry, constants: Constants, collected: tuple) -> tuple[Carry, Metrics]:
        scored, failed, following = collected
        # The completions are an argument, which is not donated.
        carry, metrics = step(carry.replace(in_flight=None), constants, scored, failed)
        return carry.replace(in_flight=following), metrics

    return HostUpdate(collect, learn_from, metrics)


def _compile(
    of: "Dataset",
    name: str,
    learn: Learn,
    carry: Carry,
    constants: Constants,
    prompts: Prompt,
) -> tuple[Callable[..., Completions], Callable[..., tuple[Carry, Metrics]], dict[str, Any]]:
    """Compiles the two programs of an update, for arguments see `compile_update`.

    Returns:
      Functions (params, frozen, prompts, key, number of the update) -> completions, and (carry,
      constants, (prompts, completions, rewards, valid), fraction of failed calls) -> (carry,
      metrics), in whose carries nothing is in flight; and the shapes of the metrics.
    """
    g, replicated = of.config[name], mesh_lib.replicated(of.mesh)
    replicated_shapes = functools.partial(mesh_lib.placed_shapes, shardings=replicated)
    carry = carry.replace(in_flight=None)
    shardings = problem.shard_carry(carry, mesh=of.mesh), replicated
    split = mesh_lib.batch_sharding(of.mesh, 0)
    generate = jax.jit(functools.partial(_generate, of, name), out_shardings=split)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    def step(
        carry: Carry, constants: Constants, scored: tuple, failed: jax.Array
    ) -> tuple[Carry, Metrics]:
        batch = ScoredCompletions.single_turn(*scored)
        batch = token_problem.shape_rewards(batch, g.overlong_buffer)
        key = update_keys(carry, 2)[1]
        with jax.named_scope(LEARNING):
            carry, metrics = learn(carry, constants, Collected(None, batch, key, {}))
        unscored = 1 - jnp.mean(batch.valid)
        metrics |= {"completion/unscored": unscored, "reward/failed": failed}
        return carry, metrics | grpo.describe(batch)

    lowered_generate = generate.lower(
        carry.learner.params, constants.frozen, prompts, carry.rng, carry.updates
    )
    reward = replicated_shapes(np.empty((g.prompts_per_update, g.num_completions), np.float32))
    completions = mesh_lib.placed_shapes(lowered_generate.out_info, split)
    scored = prompts, completions, reward, reward
    lowered_step = step.lower(carry, constants, scored, replicated_shapes(np.float32(0)))
    metrics = replicated_shapes(lowered_step.out_info[1])
    return lowered_generate.compile(), lowered_step.compile(), metrics


def _generate(
    of: "Dataset",
    name: str,
    params: Params,
    frozen: Any,
    prompts: Prompt,
    rng: jax.Array,
    updates: jax.Array,
) -> Completions:
    """Samples the completions of an update of a stage; traced."""
    # Each device completes its part of the prompts.
    prompts = mesh_lib.constrain_batch(prompts, mesh=of.mesh)
    return of.model.policy.generate(
        params,
        frozen,
        prompts,
        jax.random.split(jax.random.fold_in(rng, updates))[0],
        num_completions=of.config[name].num_completions,
        sampling=Sampling(temperature=getattr(of.options(name), "temperature", 1.0)),
        compactions=of.config[name].compactions,
    )
