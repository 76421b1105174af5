"""Problem of a control policy, which maps pixels, instruction and proprioception to actions."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections

from mmrl_jax import envs
from mmrl_jax.config.options import (
    NON_NEGATIVE,
    POSITIVE,
    Group,
    build,
    option,
    options_of,
)
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.envs.brax_api import Env, State
from mmrl_jax.evaluation.evaluate import Evaluator, describe, describe_ablations
from mmrl_jax.evaluation.prompts import Sample
from mmrl_jax.learners import bc, ppo, registry
from mmrl_jax.learners import learner as learner_lib
from mmrl_jax.learners.learner import LearnerState, policy_function
from mmrl_jax.models.heads import PolicyOutput
from mmrl_jax.pretrained import control_encoders, weights
from mmrl_jax.problems import (
    augmented,
    control_checks,
    control_models,
    control_sources,
    demonstration_data,
    demonstrations,
    problem,
    sources,
)
from mmrl_jax.problems.problem import StageOptions, stream
from mmrl_jax.problems.sources import Constants, Source
from mmrl_jax.rollouts.unroll import PolicyFunction, unroll
from mmrl_jax.stability import gradient_surgery
from mmrl_jax.training.settings import check_settings
from mmrl_jax.training.stage import Carry, Stage, Start
from mmrl_jax.types import Metrics, Observation


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnvOptions:
    """Options of the group `env`."""

    name: str = option(
        dataclasses.MISSING,
        "Environment: one of mmrl_jax.envs.NAMES, 'brax:<name>', or 'module:Class'.",
    )
    split: str = option("train", "Split of the environment on which the policy is trained.")
    height: int = option(
        32, "Height of the images in pixels; 0 for an environment without images.", NON_NEGATIVE
    )
    width: int = option(32, "Width of the images in pixels.", NON_NEGATIVE)
    history: int = option(1, "Number of frames in an observation.", POSITIVE)
    options: dict = option({}, "Further arguments of the environment.")


def _source_options(name: str) -> type:
    """Returns the options of the experience of a stage."""
    return control_sources.SOURCES[registry.CONTROL[name].experience]


def options(config: Any) -> Group:
    """Returns the keys of a config of this problem, by its stages and its kind of model."""
    stages = {
        name: options_of(
            StageOptions,
            registry.CONTROL[name].options,
            _source_options(name),
            augmented.AugmentedOptions,
        )
        for name in problem.stage_names(config, registry.CONTROL)
    }
    return problem.options_of_problem(
        env=options_of(EnvOptions), model=control_models.options(config), **stages
    )


def check_env(config: ml_collections.ConfigDict) -> State:
    """Checks the environment of a config.

    Returns:
      Shapes and dtypes of the state of one unbatched environment after `reset`.

    Raises:
      ValueError: If the environment, split or an option is unknown, an argument is invalid, the
        environment violates the contract of `envs.check_env`, or a setting of JAX is not supported.
    """
    check_settings()
    env, known = config.env, envs.splits(config.env.name)
    if env.split not in known:
        raise ValueError(f"env.split={env.split!r} is unknown; choose one of {known}.")
    arguments = env.options.to_dict()
    for name in sorted(set(arguments) & set(env.keys())):
        raise ValueError(
            f"env.options.{name}={arguments[name]!r}: set env.{name}, which is {env[name]!r}, "
            "instead, and remove the option."
        )
    return envs.check_env(envs.unwrapped(make_env(config)), pixels=env.height > 0)


def _check_sizes(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Raises ValueError for batches that minibatches or devices do not divide."""
    sizes: dict[str, int] = {}
    for name in config.stages:
        g, demonstrated = config[name], demonstration_data.demonstrated(config, name)
        if demonstrated is not None:
            key, batch_size = demonstrated.key, demonstrated.options.batch_size
            sizes[f"{key}.batch_size"] = batch_size
            if g.num_updates * batch_size >= 2**32:
                raise ValueError(
                    f"{name}.num_updates={g.num_updates} * {key}.batch_size={batch_size} is "
                    "2**32 samples or more, for which epochs cannot be counted; lower one of them."
                )
            if config.env.name != "language_reach" and demonstrated.options.data.directory is None:
                raise ValueError(
                    f"stages={tuple(config.stages)} has {name!r}, which learns from "
                    f"demonstrations, but env.name={config.env.name!r} has no scripted expert; "
                    f"set {key}.data.directory, or remove the stage."
                )
        if issubclass(_source_options(name), control_sources.RolloutOptions):
            samples = g.num_envs * g.unroll_length
            minibatches = g.get("num_minibatches", 1)
            if samples % minibatches:
                raise ValueError(
                    f"{name}.num_minibatches={minibatches} does not divide {name}.num_envs * "
                    f"{name}.unroll_length = {samples}."
                )
            sizes[f"{name}.num_envs"] = g.num_envs
            sizes[
                f"the minibatch {name}.num_envs * {name}.unroll_length / {name}.num_minibatches"
            ] = samples // minibatches
    problem.check_divisible(sizes, mesh)
    discounts = {f"{name}.discount": config[name].get("discount") for name in config.stages}
    if len({x for x in discounts.values() if x is not None}) > 1:
        raise ValueError(
            ", ".join(f"{name}={x}" for name, x in discounts.items())
            + ": all stages of a run share the value function; give them the same discount."
        )


def _check_observation(config: ml_collections.ConfigDict, state: State) -> None:
    """Checks that the environment has the inputs and the privileged targets of the model.

    Args:
      config: Config of a model with images.
      state: Shapes and dtypes of the state of one unbatched environment.

    Raises:
      ValueError: If an input or a target is missing or has another shape.
    """
    model = config.model
    for entry in model.auxiliary:
        pair = isinstance(entry, (tuple, list)) and len(entry) == 2
        if not pair or not isinstance(entry[0], str) or type(entry[1]) is not int:
            raise ValueError(f"model.auxiliary has {entry!r}, but must have pairs (name, size).")
    names = [name for name, _ in model.auxiliary]
    if model.pointing is not None:
        names.append(model.pointing)
    if len(set(names)) < len(names):
        raise ValueError(
            f"model.auxiliary={tuple(model.auxiliary)} and model.pointing={model.pointing!r} name "
            "a target twice; name each target once."
        )
    targets: dict[str, tuple[int, ...]] = {name: (size,) for name, size in model.auxiliary}
    if model.pointing is not None:
        targets[model.pointing] = (2,)
    if "instruction" not in state.obs:
        raise ValueError(
            f"env.name={config.env.name!r} with env.options={config.env.options.to_dict()} gives "
            f"no instruction, which model.kind={model.kind!r} needs; give one in env.options."
        )
    privileged = {name: x.shape for name, x in state.info["privileged"].items()}
    for name, shape in targets.items():
        if privileged.get(name) != shape:
            raise ValueError(
                f"model.auxiliary or model.pointing names {name!r} of shape {shape}, but "
                f"{config.env.name!r} has the privileged targets {privileged}."
            )


def make_env(config: ml_collections.ConfigDict, *, split: str | None = None) -> Env:
    """Returns the batched environment of a config, on `split` (by default the training split)."""
    env = config.env
    return envs.create(
        env.name,
        split=split or env.split,
        height=env.height,
        width=env.width,
        history=env.history,
        **env.options.to_dict(),
    )


class Control:
    """Problem of a control policy, see `problem.Problem` for the interface.

    Args:
      config: Config of the run, with the keys of `options`.

    Attributes:
      env: Batched environment on the training split.
      network: Policy network.

    Raises:
      ValueError: If the config is invalid; the message gives the field, its value and the remedy.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        control_models.check(config)
        state = check_env(config)
        self.config = config
        self.mesh = problem.make_mesh(config)
        _check_sizes(config, self.mesh)
        if config.model.kind != "mlp":
            _check_observation(config, state)
        self.env = make_env(config)
        self.network = control_models.make_network(config, self.env)
        shapes = control_models.shapes(self.network, self.env, config.model)
        for name in config.stages:
            control_models.check_trainable(shapes, config[name].trainable, f"{name}.trainable")
            augmented.make(config, name, self.env)  # Raises for options that do not fit.
            problem.check_algorithm(config, name, registry.CONTROL[name])
            control_checks.check_effects(config, name, shapes)
        self.splits = dict.fromkeys(envs.splits(config.env.name), config.run.eval_episodes)
        self.best_metric = f"eval/{config.env.split}/return"
        self.test_split: str | None = None
        self._demonstrations: dict[str, bc.Demonstrations] = {}

    def open_data(self) -> None:
        """Does nothing: a stage opens its demonstrations when it is made."""

    def dependencies(self, *, of_policy: bool = False) -> dict[str, str]:
        """Returns the fingerprints of text encoder and demonstrations, see `problem.Problem`.

        Other pretrained weights are part of the parameters, which checkpoints contain.
        """
        found = {} if of_policy else demonstration_data.fingerprint(self.config)
        encoder = self.config.model.get("text_encoder")
        if encoder is None:
            return found
        return found | {"text_encoder": weights.fingerprint(control_encoders.directory_of(encoder))}

    # -- Experience --------------------------------------------------------------------------------

    def expert(self, name: str) -> PolicyFunction:
        """Returns the scripted expert of a stage, which uses privileged state and is imperfect."""
        return demonstrations.expert(**self._demonstrated(name).options.expert.to_dict())

    def demonstrations(self, name: str) -> bc.Demonstrations:
        """Returns the demonstrations of a stage as numpy arrays, which are recorded only once."""
        if name not in self._demonstrations:
            demonstrated, rng = self._demonstrated(name), stream(self.config, problem.DATA)
            episodes = demonstrated.options.episodes
            self._demonstrations[name], success = demonstrations.record(
                self.env,
                self.expert(name),
                rng,
                episodes=episodes,
                discount=demonstrated.discount,
                one_step=demonstrated.one_step,
            )
            if not mesh_lib.only_described():
                text = f"Recorded {episodes} episodes of an expert that succeeds in"
                print(f"{text} {success:.0%} of them.", flush=True)
        return self._demonstrations[name]

    def _demonstrated(self, name: str) -> demonstration_data.Demonstrated:
        demonstrated = demonstration_data.demonstrated(self.config, name)
        if demonstrated is None:
            raise ValueError(f"The stage {name!r} has no demonstrations.")
        return demonstrated

    def _source(self, name: str, apply: learner_lib.Apply) -> Source:
        """Returns the source of a stage's experience.

        Raises:
          InvalidData: If the demonstrations in a directory cannot be used.
        """
        g, demonstrated = self.config[name], demonstration_data.demonstrated(self.config, name)
        rollout = None
        if issubclass(_source_options(name), control_sources.RolloutOptions):
            rollout = control_sources.rollout(
                self.env, apply, num_envs=g.num_envs, unroll_length=g.unroll_length
            )
        if demonstrated is None:
            assert rollout is not None
            return rollout
        if demonstrated.options.data.directory is None:
            batch_size = demonstrated.options.batch_size
            source = demonstrations.source(self.demonstrations(name), batch_size=batch_size)
        else:
            source = demonstration_data.stage_source(self.config, name, self.env, self.mesh)
        return source if rollout is None else control_sources.beside(source, rollout)

    # -- Stages ------------------------------------------------------------------------------------

    def stage(self, name: str, /, *, start: LearnerState | None = None, **changes: Any) -> Stage:
        """Builds a stage of the run, see `problem.Problem`.

        Args:
          name: Name of the stage, one of config.stages.
          start: Learner from whose parameters and normalizer, and optimizer state if it has one,
            the stage starts; None to start from the initial parameters.
          **changes: Fields of `Stage` to replace, and `stream`, the stream of random numbers of the
            stage.
        """
        config, algorithm = self.config, registry.CONTROL[name]
        # An MLP has no option `dtype` and always computes in float32.
        reduced = config.model.get("dtype", "float32") != "float32"
        augment = augmented.make(config, name, self.env)
        derived = {}
        if hasattr(algorithm.options, "recompute"):
            # The log-probs of the rollout are of another program, or of other images.
            derived = {"recompute": reduced or augment is not None}
        algorithm_options = build(algorithm.options, config[name], **derived)
        trainable = config[name].trainable
        is_trained = functools.partial(control_models.is_trainable, trainable=trainable)
        optimizer = sources.make_optimizer(
            config, name, algorithm_options, None if trainable == ".*" else is_trained
        )
        apply = self._apply(trainable)
        source = self._source(name, apply)
        if start is None and mesh_lib.only_described():
            start = self.from_checkpoint({name: self.checkpoint_parts(name)})
        initial = Start(start)

        def init() -> Carry:
            learner = initial()
            if learner is None:
                learner = source.prepare(self._fresh_learner())
            params = algorithm.prepare(learner.params, algorithm_options)
            if learner.opt_state == ():
                observation = control_models.zeros(self.env)
                learner = learner.replace(
                    params=params,
                    opt_state=optimizer.transformation.init(params),
                    steps=jnp.zeros((), jnp.int32),
                    extras=algorithm.extras(
                        algorithm_options,
                        observation,
                        jax.eval_shape(apply, params, observation),
                        jax.random.fold_in(stream(config, problem.PARAMETERS), 1),
                    ),
                )
            rng = stream(config, changes.get("stream", source.stream))
            return sources.fresh_carry(learner, source, rng)

        def update(
            learner: LearnerState, constants: Constants, batch: Any, key: jax.Array
        ) -> tuple[LearnerState, Metrics]:
            if augment is not None:
                batch = augment(batch, jax.random.fold_in(key, 1))
            return algorithm.update(
                learner,
                batch,
                key,
                apply=apply,
                optimizer=optimizer.transformation,
                options=algorithm_options,
                shard=functools.partial(mesh_lib.constrain_batch, mesh=self.mesh),
            )

        learn = sources.make_learn(update, optimizer)
        fields = sources.stage_fields(config, name, algorithm, source, self.best_metric)
        constants = mesh_lib.put(Constants((), source.data), mesh_lib.replicated(self.mesh))
        return Stage(
            **fields | {name: x for name, x in changes.items() if name != "stream"},
            init=init,
            release=initial.release,
            update=None if source.collect is None else sources.make_update(source, learn),
            on_host=None if source.on_host is None else source.on_host(learn),
            constants=constants,
            evaluate=self._periodic_evaluation(),
            shardings=functools.partial(problem.shard_carry, mesh=self.mesh),
        )

    def _fresh_learner(self) -> LearnerState:
        """Returns a new learner without optimizer state; pretrained weights are read."""
        key = stream(self.config, problem.PARAMETERS)
        params = control_models.init_params(self.network, self.env, self.config.model, key)
        size = control_models.zeros(self.env)["proprio"].shape[-1]
        return learner_lib.init(params, proprio_size=size)

    # -- Variables and evaluation ------------------------------------------------------------------

    def variables(self, stage: Stage, learner: LearnerState) -> LearnerState:
        """Returns the learner without its optimizer state, see `problem.Problem`."""
        return learner.without_optimizer()

    def checkpoint_parts(self, name: str) -> dict[str, Any]:
        """Returns the shapes of parameters and normalizer, which are the same for every stage."""
        shapes = control_models.shapes(self.network, self.env, self.config.model)
        size = control_models.zeros(self.env)["proprio"].shape[-1]
        like = jax.eval_shape(functools.partial(learner_lib.init, proprio_size=size), shapes)
        return {"params": like.params, "normalizer": like.normalizer}

    def checkpoint_stages(self, name: str) -> tuple[str, ...]:
        """Returns the stage itself, because each checkpoint has all variables of the policy."""
        return (name,)

    def from_checkpoint(self, parts: dict[str, dict[str, Any]]) -> LearnerState:
        """Returns a learner without optimizer state, see `problem.Problem`."""
        (stage_parts,) = parts.values()
        return LearnerState(**stage_parts, opt_state=(), steps=jnp.zeros((), jnp.int32))

    def samples(self, variables: LearnerState, count: int) -> list[Sample]:
        """Returns no samples: the behavior of a control policy is shown by a video instead."""
        return []

    def policy(self, learner: LearnerState, *, deterministic: bool = True) -> PolicyFunction:
        """Returns the policy function of a learner for `rollouts.unroll`."""
        return policy_function(self._apply(), learner, deterministic=deterministic)

    def predict(self, learner: LearnerState, observation: Observation) -> PolicyOutput:
        """Returns the output of a learner's network for observations [B, ...]."""
        return learner_lib.run_network(self._apply(), learner, observation)

    def gradient_conflict(
        self, learner: LearnerState, name: str, rng: jax.Array
    ) -> gradient_surgery.Conflict:
        """Returns how much the gradients of the parts of PPO's loss conflict, on shared parameters.

        The batch is a rollout from the start of new episodes, of the size of a minibatch.

        Args:
          learner: Learner of the policy.
          name: Name of a stage of PPO, whose `ppo.rollout_parts` are compared.
          rng: PRNG key of the rollout.
        """
        g = self.config[name]
        options = build(registry.CONTROL[name].options, g)
        apply, keys = self._apply(g.trainable), jax.random.split(rng, 3)
        count = max(1, g.num_envs // options.num_minibatches)
        env_state, batch = unroll(
            self.env,
            self.env.reset(jax.random.split(keys[2], count)),
            policy_function(apply, learner, deterministic=False),
            keys[0],
            g.unroll_length,
        )
        rollout = learner_lib.Rollout(batch, env_state.obs)
        gradients = ppo.part_gradients(learner, rollout, keys[1], apply=apply, options=options)
        return gradient_surgery.shared_conflict(gradients)

    def _apply(self, trainable: str = ".*") -> learner_lib.Apply:
        # An MLP has no option `attention`.
        attention = self.config.model.get("attention", "auto")
        return control_models.make_apply(self.network, self.mesh, trainable, attention)

    def evaluator(self, rng: jax.Array, *, episodes: int) -> Evaluator:
        """Returns an evaluator of the deterministic policy of a learner.

        Args:
          rng: PRNG key of the episodes.
          episodes: Number of episodes in each split.
        """
        return Evaluator(
            lambda split: make_env(self.config, split=split),
            self.policy,
            rng,
            episodes=episodes,
            mesh=self.mesh,
        )

    def measure(
        self, *, episodes: int | None = None, ablations: bool = False
    ) -> Callable[[LearnerState, str], dict[str, float]]:
        """Returns the reported evaluation, see `problem.Problem` and `describe_ablations`."""
        evaluator = self.evaluator(
            stream(self.config, problem.EVALUATION),
            episodes=self.config.run.eval_episodes if episodes is None else episodes,
        )
        modalities = self.env.observation_size if ablations else ()
        return lambda learner, split: describe_ablations(evaluator, learner, split, modalities)

    def _periodic_evaluation(self) -> Callable[[LearnerState], dict[str, float]]:
        split = self.config.env.split
        # These are not the reported episodes, because they select the best checkpoint.
        rng = jax.random.fold_in(stream(self.config, problem.EVALUATION), 1)
        evaluator = self.evaluator(rng, episodes=self.config.run.eval_episodes)

        def evaluate(learner: LearnerState) -> dict[str, float]:
            metrics = describe(evaluator(learner.without_optimizer(), split))
            return {f"eval/{split}/{name}": value for name, value in metrics.items()}

        return evaluate
