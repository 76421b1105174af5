"""Problem of an agent that sees an environment and writes its actions as text."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mmrl_jax import envs
from mmrl_jax.config.options import NON_NEGATIVE, POSITIVE, Group, option, options_of
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.envs.brax_api import Env, State
from mmrl_jax.evaluation.evaluate import Evaluator, describe, describe_ablations
from mmrl_jax.evaluation.prompts import Sample
from mmrl_jax.learners import registry
from mmrl_jax.learners.token_learner import ScoredCompletions, TokenState, agent_policy
from mmrl_jax.models import lora
from mmrl_jax.problems import control, problem, token_models, token_options, token_problem
from mmrl_jax.problems.control import EnvOptions
from mmrl_jax.problems.control_sources import RolloutOptions, rollout_metrics
from mmrl_jax.problems.problem import stream
from mmrl_jax.problems.sources import Collected, Constants, Source, update_keys
from mmrl_jax.problems.token_problem import LabelOptions, TokenProblem
from mmrl_jax.rl import losses
from mmrl_jax.rollouts.generate import Sampling
from mmrl_jax.rollouts.text_actions import TextActions, text_actions
from mmrl_jax.rollouts.unroll import (
    ActorOutput,
    PolicyFunction,
    deterministic_output,
    unroll,
)
from mmrl_jax.training.stage import Carry
from mmrl_jax.types import Params

# Number of episodes of a user's environment whose instructions are checked beforehand.
SAMPLED_RESETS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemonstratedTurnOptions(LabelOptions):
    """Options of the turns of demonstrated episodes."""

    episodes: int = option(
        4096,
        "Number of episodes of the environment's expert that are recorded before training.",
        POSITIVE,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentRolloutOptions(RolloutOptions):
    """Options of the turns of an update."""

    format_penalty: float = option(
        0.1, "Penalty on the reward of a turn whose text is not a valid action.", NON_NEGATIVE
    )


def options(config: Any) -> Group:
    """Returns the keys of a config of this problem, by its stages and its kind of model."""
    kinds = {"labels": (DemonstratedTurnOptions,), "completions": (AgentRolloutOptions,)}
    return problem.options_of_problem(
        env=options_of(EnvOptions),
        model=token_options.options(config),
        **token_problem.stage_options(config, kinds, comparing=False),
    )


def _check_env(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for an environment without images or without actions as text."""
    env = config.env
    control.check_env(config)
    if not env.height or not env.width:
        raise ValueError(
            f"env.height={env.height}, env.width={env.width}: a text agent needs images; set both "
            "above 0."
        )
    if env.history != 1:
        raise ValueError(
            f"env.history={env.history}, but a text agent observes one frame; set it to 1."
        )
    if not hasattr(control.make_env(config), "actions_as_text"):
        raise ValueError(
            f"env.name={env.name!r} does not define actions as text; choose 'language_grid' or "
            "'language_reach'."
        )


def _check_experience(config: ml_collections.ConfigDict, env: Env, interface: TextActions) -> None:
    """Checks what the stages of a run ask of a user's environment.

    Raises:
      ValueError: If there is no expert to learn from, or the environment gives an instruction that
        is not among its sentences.
    """
    name = config.env.name
    labeled = [stage for stage in config.stages if registry.TOKEN[stage].experience == "labels"]
    if labeled and not hasattr(env, "expert"):
        raise ValueError(
            f"stages={tuple(config.stages)}, but env.name={name!r} has no 'expert' whose turns "
            f"{labeled[0]!r} could learn; remove the stage, or give the environment an expert."
        )
    if ":" not in name:
        return
    state = jax.jit(env.reset)(jax.random.split(stream(config, problem.EVALUATION), SAMPLED_RESETS))
    tokens = np.asarray(state.obs["instruction"]["tokens"])
    known = np.any(np.all(tokens[:, None] == interface.sentences, axis=-1), axis=-1)
    if not known.all():
        raise ValueError(
            f"env.name={name!r} resets to an instruction that is not among its "
            f"vocabulary.sentences, with the tokens {tokens[~known][0].tolist()}; add the sentence."
        )


def _check_turns(config: ml_collections.ConfigDict, name: str) -> dict[str, int]:
    """Returns the sizes of a stage that must be divisible by mesh.data * mesh.fsdp, by their names.

    Raises:
      ValueError: If the turns of an update do not divide into minibatches.
    """
    g = config[name]
    turns = g.num_envs * g.unroll_length
    parts = g.get("num_minibatches", 1) * g.get("grad_accum_steps", 1)
    if turns % parts:
        raise ValueError(
            f"{name}.num_minibatches={g.get('num_minibatches', 1)} * {name}.grad_accum_steps="
            f"{g.get('grad_accum_steps', 1)} does not divide {name}.num_envs * "
            f"{name}.unroll_length = {turns}."
        )
    return {
        f"{name}.num_envs": g.num_envs,
        f"{name}.num_envs * {name}.unroll_length / {name}.num_minibatches / "
        f"{name}.grad_accum_steps": turns // parts,
    }


def _make(
    config: ml_collections.ConfigDict,
) -> tuple[Env, TextActions, token_models.TokenModel]:
    """Makes the environment, its text interface, and the model of a config."""
    env, size = control.make_env(config), (config.env.height, config.env.width)
    spec = token_models.read_spec(config.model, size)
    interface = text_actions(
        env,
        spec and spec.chat,
        image_tokens=token_models.image_tokens(config.model, spec, size),
    )
    return env, interface, token_models.make_model(config.model, spec, interface.texts, size)


class TextAgent(TokenProblem):
    """Problem of an agent that writes its actions, see `problem.Problem` for the interface.

    Args:
      config: Config of the run, with the keys of `options`.

    Attributes:
      env: Batched environment on the training split.
      interface: Conversion of instructions to prompts, and of completions to actions.

    Raises:
      ValueError: If the config is invalid; the message gives the field, its value and the remedy.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        _check_env(config)
        token_options.check_model(config, config.env.height, config.env.width, "env")
        self.env, self.interface, model = _make(config)
        _check_experience(config, self.env, self.interface)
        super().__init__(config, model, f"eval/{config.env.split}/return")
        self.check_sizes(
            *(
                _check_turns(config, name)
                for name in config.stages
                if registry.TOKEN[name].experience != "labels"
            )
        )
        self.splits = dict.fromkeys(envs.splits(config.env.name), config.run.eval_episodes)

    def source(self, name: str) -> Source:
        """Returns the source of the experience of a stage, see `TokenProblem`."""
        if registry.TOKEN[name].experience == "labels":
            labels = self._demonstrations(name)
            return token_problem.fixed_labels(self.config[name].batch_size, labels)
        return self._turn_source(name)

    def _demonstrations(self, name: str) -> ScoredCompletions:
        """Records the turns of complete episodes of the expert, which depend on the seed alone."""
        env, interface, episodes = self.env, self.interface, self.config[name].episodes

        def expert(state: State, rng: jax.Array) -> ActorOutput:
            completion = interface.encode_actions(env.expert(state, rng))
            action, _ = interface.decode_actions(*completion)
            return deterministic_output(action)._replace(action=completion)

        def record(rng: jax.Array) -> tuple[Any, jax.Array]:
            reset_key, rng = jax.random.split(rng)
            state = env.reset(jax.random.split(reset_key, episodes))
            _, batch = unroll(env, state, expert, rng, env.episode_length)
            turns = (jax.vmap(interface.make_prompts)(batch.observation), *batch.action)
            return turns, batch.valid

        turns, valid = mesh_lib.computed(record, stream(self.config, problem.DATA))
        if mesh_lib.only_described():  # How many turns are valid is not known: at most all.
            flat = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((x.shape[0] * x.shape[1], *x.shape[2:]), x.dtype),
                turns,
            )
            return jax.eval_shape(ScoredCompletions.from_labels, *flat)
        mask = np.asarray(valid) > 0
        return ScoredCompletions.from_labels(*jax.tree.map(lambda x: x[mask], turns))

    def _turn_source(self, name: str) -> Source:
        """Returns a source of turns of episodes of the agent."""
        r, env, interface = self.config[name], self.env, self.interface
        temperature = getattr(self.options(name), "temperature", 1.0)

        def reset(key: jax.Array) -> State:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(r.num_envs))
            return env.reset(keys)

        def collect(carry: Carry, constants: Constants) -> Collected:
            act_key, learn_key = update_keys(carry, 2)
            policy = agent_policy(
                self.model.policy,
                (carry.learner.params, constants.frozen),
                interface,
                Sampling(temperature=temperature),
            )
            env_state, batch = unroll(env, carry.env_state, policy, act_key, r.unroll_length)
            completions: Any = batch.action
            invalid = interface.decode_actions(completions.tokens, completions.mask)[1].astype(
                jnp.float32
            )
            experience = ScoredCompletions.turns(
                batch.replace(
                    observation=jax.vmap(interface.make_prompts)(batch.observation),
                    reward=batch.reward - r.format_penalty * invalid,
                ),
                interface.make_prompts(env_state.obs),
            )
            metrics = rollout_metrics(batch) | {
                "completion/invalid_fraction": losses.masked_mean(invalid, batch.valid),
                "completion/truncated_fraction": losses.masked_mean(
                    1.0 - completions.finished, batch.valid
                ),
            }
            return Collected(env_state, experience, learn_key, metrics)

        turns = r.num_envs * r.unroll_length
        return Source(
            stream=problem.ROLLOUT,
            samples_per_update=turns,
            env_steps_per_update=turns,
            reset=reset,
            collect=collect,
            console=("episode/success", "completion/invalid_fraction"),
        )

    def policy(self, variables: Params, *, deterministic: bool = True) -> PolicyFunction:
        """Returns the policy function for `rollouts.unroll`, for variables of the whole model."""
        sampling = Sampling(temperature=0.0 if deterministic else 1.0)
        partition = lora.split(variables, ".*")
        return agent_policy(self.model.policy, partition, self.interface, sampling)

    def evaluator(self, rng: jax.Array, *, episodes: int) -> Evaluator:
        """Returns an evaluator of greedy completions, for the variables of the whole model.

        Args:
          rng: PRNG key of the episodes.
          episodes: Number of episodes in each split.
        """
        return Evaluator(
            lambda split: control.make_env(self.config, split=split),
            self.policy,
            rng,
            episodes=episodes,
            mesh=self.mesh,
            max_batch=self.eval_batch_size(),
        )

    def measure(
        self, *, episodes: int | None = None, ablations: bool = False
    ) -> Callable[[Params, str], dict[str, float]]:
        """Returns the reported evaluation, see `problem.Problem` and `describe_ablations`."""
        evaluator = self.evaluator(
            stream(self.config, problem.EVALUATION),
            episodes=self.config.run.eval_episodes if episodes is None else episodes,
        )
        # A text agent does not observe proprioception.
        modalities = ("pixels", "instruction") if ablations else ()
        return lambda variables, split: describe_ablations(evaluator, variables, split, modalities)

    def periodic_evaluation(
        self, name: str, frozen: Any
    ) -> Callable[[TokenState], dict[str, float]]:
        """Returns the evaluation on the training split, see `TokenProblem`."""
        # These are not the reported episodes, because they select the best checkpoint.
        rng = jax.random.fold_in(stream(self.config, problem.EVALUATION), 1)
        evaluator = self.evaluator(rng, episodes=self.config.run.eval_episodes)
        return self.periodic(
            lambda variables, split: describe(evaluator(variables, split)),
            frozen,
            self.config.env.split,
        )

    def samples(self, variables: Params, count: int) -> list[Sample]:
        """Returns no samples: the behavior of an agent is shown by a video instead."""
        return []
