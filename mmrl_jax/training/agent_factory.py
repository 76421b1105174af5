"""Builds a run of an agent that writes its actions as text; what every key means is in `SCHEMA`."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np

from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.envs.brax_api import Env, State
from mmrl_jax.evaluation.evaluate import Evaluator, describe
from mmrl_jax.learners import token_learner, token_ppo
from mmrl_jax.learners.token_learner import TokenState, agent_policy
from mmrl_jax.rl import losses
from mmrl_jax.rollouts.generate import Sampling
from mmrl_jax.rollouts.text_actions import TextActions, text_actions
from mmrl_jax.rollouts.unroll import ActorOutput, PolicyFunction, deterministic_output, unroll
from mmrl_jax.tasks.question import Prompt
from mmrl_jax.training import config as config_lib
from mmrl_jax.training import factory, token_models, token_stages
from mmrl_jax.training.config import one_of, positive
from mmrl_jax.training.factory import SCHEMA as CONTROL
from mmrl_jax.training.stage import Carry, Stage, Start
from mmrl_jax.training.token_models import TokenModel
from mmrl_jax.types import Metrics, Params

ALGORITHMS = ("sft", "token_ppo")

SCHEMA: config_lib.Schema = {
    "seed": CONTROL["seed"],
    "algorithm": one_of(
        ALGORITHMS, "'token_ppo' clones the expert first if sft.updates is above 0"
    ),
    "devices": CONTROL["devices"],
    "env": CONTROL["env"],
    "model": token_models.MODEL,
    "sft": {"episodes": positive(int, "demonstrated by the environment's expert, a fixed set")}
    | dict(token_stages.SFT),
    "rl": {
        "num_envs": positive(int, "environments side by side; the mesh must divide them"),
        "unroll": positive(int, "turns of each environment an update"),
    }
    | dict(token_stages.RL),
    "ppo": token_stages.PPO,
    "run": CONTROL["run"],
}


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses a config that cannot run, before anything is compiled.

    Raises:
      ValueError: names the field, its value and the remedy.
    """
    config_lib.check_config(config, SCHEMA)
    env, r = config.env, config.rl
    factory.check_env(config)
    if not env.height or not env.width:
        raise ValueError(
            f"env.height={env.height}, env.width={env.width}: an agent that reads and writes sees "
            "pixels; give both a size."
        )
    if env.history != 1:
        raise ValueError(f"env.history={env.history}, but an agent sees one frame; set it to 1.")
    if not hasattr(factory.make_env(config), "actions_as_text"):
        raise ValueError(
            f"env.name={env.name!r} has no actions as text; choose 'language_grid' or "
            "'language_reach'."
        )
    token_models.check_model(config, env.height, env.width, "env")
    token_stages.check_reference(config)
    turns = r.num_envs * r.unroll
    if turns % (r.minibatches * r.accumulate):
        raise ValueError(
            f"rl.minibatches={r.minibatches} * rl.accumulate={r.accumulate} does not divide "
            f"rl.num_envs * rl.unroll = {turns}."
        )
    token_models.check_sizes(
        config,
        {
            "sft.batch_size": config.sft.batch_size,
            "rl.num_envs": r.num_envs,
            "rl.num_envs * rl.unroll / rl.minibatches / rl.accumulate": turns
            // r.minibatches
            // r.accumulate,
        },
    )
    if config.algorithm == "sft" and not config.sft.updates:
        raise ValueError("sft.updates=0, but algorithm='sft' is nothing else; raise it.")
    token_models.check_trainable(config, make_parts(config).model)


class Parts(NamedTuple):
    """What the stages of a run share.

    Attributes:
      env: batched, on the split that is trained on.
      interface: its instructions and actions as text.
      model: the agent.
    """

    env: Env
    interface: TextActions
    model: TokenModel


def make_parts(config: ml_collections.ConfigDict) -> Parts:
    """The environment and the model of a config.

    Raises:
      ValueError: see `token_models.pretrained` and `token_models.make_model`.
    """
    env, size = factory.make_env(config), (config.env.height, config.env.width)
    source = token_models.pretrained(config.model, size)
    interface = text_actions(
        env,
        source and source.chat,
        image_tokens=token_models.image_tokens(config.model, source, size),
    )
    model = token_models.make_model(config.model, source, interface.texts, size)
    return Parts(env, interface, model)


def dependencies(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Fingerprints of what a run depends on beside its config, see `fingerprints`."""
    tokenizer = make_parts(config).model.texts.tokenizer
    return token_models.dependencies(config.model, tokenizer)


def record_demonstrations(
    config: ml_collections.ConfigDict,
) -> tuple[Prompt, jax.Array, jax.Array]:
    """The turns of whole episodes of the environment's expert; the same seed gives the same.

    Returns:
      Questions [N], the tokens int32 [N, T] of what the expert wrote, and which are there.
    """
    env, interface, _ = make_parts(config)

    def expert(state: State, rng: jax.Array) -> ActorOutput:
        written = interface.write(env.expert(state, rng))
        action, _ = interface.read(*written)
        return deterministic_output(action)._replace(action=written)

    @jax.jit
    def record(rng: jax.Array) -> tuple[Any, jax.Array]:
        reset_key, rng = jax.random.split(rng)
        state = env.reset(jax.random.split(reset_key, config.sft.episodes))
        _, batch = unroll(env, state, expert, rng, env.episode_length)
        turns = (jax.vmap(interface.ask)(batch.observation), *batch.action)
        return turns, batch.valid

    turns, valid = record(jax.random.fold_in(jax.random.PRNGKey(config.seed), 1))
    there = np.asarray(valid) > 0
    question, tokens, present = jax.tree.map(lambda x: x[there], turns)
    return question, tokens, present


def sft_stage(config: ml_collections.ConfigDict, mesh: Mesh) -> Stage:
    """Supervised fine-tuning on what the expert wrote."""
    return token_stages.sft_stage(
        config,
        mesh,
        make_parts(config).model,
        record_demonstrations(config),
        evaluation=functools.partial(_periodic_evaluation, config),
        best_metric=factory.best_metric(config),
    )


def rl_stage(
    config: ml_collections.ConfigDict, mesh: Mesh, *, start: Params | None = None
) -> Stage:
    """PPO over the tokens of the agent's turns, from scratch or from what was cloned."""
    r, (env, interface, model) = config.rl, make_parts(config)
    variables = token_models.make_variables(config, model, start=start)
    trained, frozen = token_models.partition_trainable(variables, config, "rl")
    frozen = jax.device_put(frozen, mesh_lib.replicated(mesh))
    optimization = token_stages.make_optimization(config)
    hyperparameters = token_stages.ppo_hyperparameters(config)
    begin = Start(trained)

    def init() -> Carry:
        learner = token_stages.rl_learner(config, begin(), optimization.optimizer)
        carry = token_stages.fresh_carry(config, learner, 4)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.fold_in(carry.rng, 0), jnp.arange(r.num_envs)
        )
        return carry.replace(
            env_state=jax.jit(env.reset)(keys), rng=jax.random.fold_in(carry.rng, 1)
        )

    def update(carry: Carry, frozen: Any) -> tuple[Carry, Metrics]:
        act_key, learn_key = jax.random.split(jax.random.fold_in(carry.rng, carry.updates))
        policy = agent_policy(
            model.policy,
            (carry.learner.params, frozen),
            interface,
            Sampling(temperature=r.temperature),
        )
        env_state, batch = unroll(env, carry.env_state, policy, act_key, r.unroll)
        metrics = factory.rollout_metrics(batch)
        answers: Any = batch.action
        malformed = interface.read(answers.tokens, answers.present)[1].astype(jnp.float32)
        learner, learned = token_ppo.update(
            carry.learner,
            frozen,
            token_ppo.one_completion(
                batch.replace(
                    observation=jax.vmap(interface.ask)(batch.observation),
                    reward=batch.reward - r.penalty * malformed,
                )
            ),
            interface.ask(env_state.obs),
            learn_key,
            policy=model.policy,
            optimizer=optimization.optimizer,
            hyperparameters=hyperparameters,
            shard=functools.partial(mesh_lib.constrain_batch, mesh=mesh),
        )
        learner = token_learner.move_reference(learner, r.reference_decay)
        metrics |= learned | {
            "completion/invalid_fraction": losses.masked_mean(malformed, batch.valid),
            "completion/truncated_fraction": losses.masked_mean(
                1.0 - answers.finished, batch.valid
            ),
            "lr": jnp.asarray(optimization.rate(learner.steps), jnp.float32),
        }
        return carry.replace(
            learner=learner, env_state=env_state, updates=carry.updates + 1
        ), metrics

    best = factory.best_metric(config)
    return Stage(
        name=config.algorithm,
        init=init,
        release=begin.release,
        update=update,
        constants=frozen,
        env_steps_per_update=r.num_envs * r.unroll,
        samples_per_update=r.num_envs * r.unroll,
        evaluate=_periodic_evaluation(config, frozen),
        **factory.run_fields(config.run),
        best_metric=best,
        console=("episode/success", "completion/invalid_fraction", best, "time/samples_per_s"),
        shardings=functools.partial(factory.shard_env_state, mesh=mesh),
    )


def make_evaluator(
    config: ml_collections.ConfigDict, rng: jax.Array, *, episodes: int
) -> Evaluator:
    """Evaluates the most likely texts of models of this config, made of trained and frozen half."""
    _, interface, model = make_parts(config)

    def policy(variables: tuple[Params, Any]) -> PolicyFunction:
        return agent_policy(model.policy, variables, interface, Sampling(temperature=0.0))

    return Evaluator(
        lambda split: factory.make_env(config, split=split),
        policy,
        rng,
        episodes=episodes,
        mesh=factory.make_mesh(config),
        together=config.rl.num_envs,
    )


splits = factory.splits  # Those of the environment.


def make_measure(
    config: ml_collections.ConfigDict, *, episodes: int
) -> Callable[[tuple[Params, Any], str], dict[str, float]]:
    """The reported evaluation: (trained and frozen half, split) -> see `evaluate.describe`."""
    return _measure(make_evaluator(config, factory.evaluation_key(config), episodes=episodes))


def _measure(
    evaluator: Evaluator,
) -> Callable[[tuple[Params, Any], str], dict[str, float]]:
    return lambda variables, split: describe(evaluator(variables, split))


def _periodic_evaluation(
    config: ml_collections.ConfigDict, frozen: Any
) -> Callable[[TokenState], dict[str, float]]:
    # Other episodes than those of the reported evaluations: the best checkpoint is chosen by it.
    key = jax.random.fold_in(factory.evaluation_key(config), 1)
    measure = _measure(make_evaluator(config, key, episodes=config.run.eval_episodes))
    return token_stages.evaluation(measure, frozen, config.env.split)
