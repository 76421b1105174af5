"""Builds a run of a control policy from its config; what every key means is in `SCHEMA`.

The factories, and the modules of their models and stages, alone read a ConfigDict; everything below
them takes explicit arguments.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import optax

from mmrl_jax import envs
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.envs import language_reach
from mmrl_jax.envs.brax_api import Env, State
from mmrl_jax.evaluation.evaluate import Evaluator, describe
from mmrl_jax.learners import bc, ppo
from mmrl_jax.learners.learner import LearnerState, epoch_indices, policy_function
from mmrl_jax.pretrained import control_encoders, weights
from mmrl_jax.rl import losses, normalization
from mmrl_jax.rollouts.unroll import ActorOutput, PolicyFunction, deterministic_output, unroll
from mmrl_jax.training import config as config_lib
from mmrl_jax.training import control_models
from mmrl_jax.training.config import Field, anything, between, non_negative, one_of, positive
from mmrl_jax.training.settings import check_settings
from mmrl_jax.training.stage import Carry, Stage, Start
from mmrl_jax.types import Metrics, Observation, Params, Transition

SCHEMA: config_lib.Schema = {
    # A larger one would begin the same draws as what is left of it in 32 bits.
    "seed": between(int, 0, 2**32 - 1, "of every random draw of the run"),
    "algorithm": one_of(("bc", "ppo"), "'ppo' clones first if warm_start.updates is above 0"),
    "devices": non_negative(int, "of the mesh; 0 for all there are"),
    "env": {
        "name": anything(str, "of an environment, see mmrl_jax.envs.NAMES, or 'brax:<name>'"),
        "split": anything(str, "that is trained on"),
        "height": non_negative(int, "of the pixels; 0 for an environment without pixels"),
        "width": non_negative(int, "of the pixels"),
        "history": positive(int, "frames that the policy sees"),
        "options": anything(dict, "further arguments of the environment"),
    },
    "model": control_models.MODEL,
    "warm_start": {
        "updates": non_negative(int, "optimizer steps of cloning; 0 for none"),
        "episodes": positive(int, "demonstrated episodes, a fixed set"),
        "expert": {
            "gain": positive(float, "action per rad of error"),
            "undershoot": between(float, 0, 1, "fraction of the way that it stops short"),
            "noise": non_negative(float, "standard deviation of its actions' noise"),
        },
        "batch_size": positive(int, "samples an optimizer step"),
        "learning_rate": positive(float, "of Adam"),
        "max_grad_norm": positive(float, "global norm that gradients are clipped to"),
        "value_weight": non_negative(float, "of the value loss"),
        "auxiliary_weight": non_negative(float, "of the squared errors of privileged targets"),
        "pointing_weight": non_negative(float, "of the cross-entropy of pointing"),
        "updates_per_dispatch": positive(int, "updates in one compiled call"),
        "eval_interval": positive(int, "updates between evaluations"),
        "checkpoint_interval": positive(int, "updates between checkpoints"),
    },
    "ppo": {
        "num_envs": positive(int, "environments side by side; the mesh must divide them"),
        "unroll": positive(int, "steps of each environment an update"),
        "learning_rate": positive(float, "of Adam, at the start"),
        "schedule": one_of(("constant", "linear"), "of the learning rate; linear falls to 0"),
        "max_grad_norm": positive(float, "global norm that gradients are clipped to"),
        "discount": between(float, 0, 1, "per step"),
        "gae_lambda": between(float, 0, 1, "of the advantage estimate"),
        "advantage": one_of(ppo.ADVANTAGES, "'return' is Brax's, see rl/advantages.py"),
        "clip": positive(float, "half width of the trust interval of the ratio"),
        "value_clip": positive((float, type(None)), "of the value loss"),
        "value_weight": non_negative(float, "of the value loss"),
        "entropy_weight": non_negative(float, "of the entropy bonus"),
        "auxiliary_weight": non_negative(float, "of the squared errors of privileged targets"),
        "pointing_weight": non_negative(float, "of the cross-entropy of pointing"),
        "epochs": positive(int, "passes over a batch"),
        "minibatches": positive(int, "optimizer steps a pass"),
        "target_kl": positive((float, type(None)), "stops an update early"),
        "initial_std": positive(float, "of the unsquashed Gaussian, when PPO begins"),
    },
    "run": {
        "updates": positive(int, "where PPO ends"),
        "updates_per_dispatch": positive(int, "updates in one compiled call"),
        "eval_interval": positive(int, "updates between evaluations"),
        "eval_episodes": positive(int, "episodes of an evaluation during training"),
        "checkpoint_interval": positive(int, "updates between checkpoints"),
        "keep": Field(
            int,
            lambda x: x >= 2,
            "at least 2, so that a damaged one has one before it",
            "newest checkpoints kept",
        ),
    },
}


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses a config that cannot run, before anything is compiled.

    Raises:
      ValueError: names the field, its value and the remedy.
    """
    config_lib.check_config(config, {**SCHEMA, "model": control_models.schema(config)})
    env, model, warm = config.env, config.model, config.warm_start
    envs.splits(env.name)  # There is such an environment.
    if model.kind == "mlp" and env.height:
        raise ValueError(
            f"env.height={env.height}, but model.kind='mlp' sees no pixels; set env.height and "
            f"env.width to 0, or begin with {control_models.CONFIGS['multimodal']}."
        )
    if model.kind != "mlp" and (not env.height or not env.width):
        raise ValueError(
            f"env.height={env.height}, env.width={env.width}: model.kind={model.kind!r} needs "
            f"pixels; give both a size, or begin with {control_models.CONFIGS['mlp']}."
        )
    _check_sizes(config)
    if config.algorithm == "bc" and not warm.updates:
        raise ValueError("warm_start.updates=0, but algorithm='bc' is nothing else; raise it.")
    if warm.updates and env.name != "language_reach":
        raise ValueError(
            f"warm_start.updates={warm.updates}, but env.name={env.name!r} has no scripted expert; "
            f"set warm_start.updates to 0."
        )
    state = check_env(config)
    if model.kind == "vlm":
        control_models.check_vlm(config)
    if model.kind == "multimodal":
        control_models.check_multimodal(config)
    if model.kind != "mlp":
        _check_observation(config, state)
    control_models.check_network(config, make_env(config))


def _check_sizes(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for batches that do not divide into minibatches, or among the devices."""
    warm, p = config.warm_start, config.ppo
    devices = config.devices or jax.device_count()
    if devices > jax.device_count():
        raise ValueError(f"devices={devices}, but there are {jax.device_count()}; give 0 for all.")
    if (p.num_envs * p.unroll) % p.minibatches:
        raise ValueError(
            f"ppo.minibatches={p.minibatches} does not divide ppo.num_envs * ppo.unroll = "
            f"{p.num_envs * p.unroll}."
        )
    if warm.updates * warm.batch_size >= 2**32:
        raise ValueError(
            f"warm_start.updates={warm.updates} * warm_start.batch_size={warm.batch_size} are "
            "2**32 samples or more, beyond which epochs cannot be counted; lower one of them."
        )
    for name, size in (
        ("ppo.num_envs", p.num_envs),
        (
            "the minibatch ppo.num_envs * ppo.unroll / ppo.minibatches",
            p.num_envs * p.unroll // p.minibatches,
        ),
        ("warm_start.batch_size", warm.batch_size if warm.updates else 0),
    ):
        if size % devices:
            raise ValueError(
                f"devices={devices} do not divide {name} = {size}; change one of them."
            )


def _check_observation(config: ml_collections.ConfigDict, state: State) -> None:
    """Raises ValueError unless the environment has what the model reads and predicts.

    Args:
      config: of a model that sees.
      state: shapes of the environment's, of one episode.
    """
    model = config.model
    for entry in model.auxiliary:
        pair = isinstance(entry, (tuple, list)) and len(entry) == 2
        if not pair or not isinstance(entry[0], str) or type(entry[1]) is not int:
            raise ValueError(f"model.auxiliary holds {entry!r}, but must hold (name, size).")
    names = [name for name, _ in model.auxiliary]
    if model.pointing is not None:
        names.append(model.pointing)
    if len(set(names)) < len(names):
        raise ValueError(
            f"model.auxiliary={tuple(model.auxiliary)} and model.pointing={model.pointing!r} name "
            "a target twice; name each once."
        )
    wanted: dict[str, tuple[int, ...]] = {name: (size,) for name, size in model.auxiliary}
    if model.pointing is not None:
        wanted[model.pointing] = (2,)
    if "instruction" not in state.obs:
        raise ValueError(
            f"env.name={config.env.name!r} with env.options={config.env.options.to_dict()} gives "
            f"no instruction, which model.kind={model.kind!r} needs; give one in env.options."
        )
    there = {name: x.shape for name, x in state.info["privileged"].items()}
    for name, shape in wanted.items():
        if there.get(name) != shape:
            raise ValueError(
                f"model.auxiliary or model.pointing names {name!r} of shape {shape}, but "
                f"{config.env.name!r} has the privileged targets {there}."
            )


def make_mesh(config: ml_collections.ConfigDict) -> Mesh:
    """The mesh that the run uses."""
    return mesh_lib.make_mesh(config.devices or None)


def make_env(config: ml_collections.ConfigDict, *, split: str | None = None) -> Env:
    """The batched environment of the config, on `split` (by default the one trained on)."""
    env = config.env
    return envs.create(
        env.name,
        split=split or env.split,
        height=env.height,
        width=env.width,
        history=env.history,
        **env.options.to_dict(),
    )


def schedule(name: str, rate: float, steps: int) -> optax.Schedule:
    """The learning rate of each step: 'constant', or 'linear', which falls to 0 at `steps`."""
    if name == "linear":
        return optax.linear_schedule(rate, 0.0, steps)
    return optax.constant_schedule(rate)


def fixed_on_resume(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Keys of config.run that a run with checkpoints must keep, and why: schedules read them."""
    group = "rl" if "rl" in config else "ppo"
    if config.algorithm in ("bc", "sft") or config[group].schedule == "constant":
        return {}
    return {
        "run.updates": (
            f"{group}.schedule={config[group].schedule!r} ends at run.updates, so that another "
            f"number would make the learning rate jump. Keep it; a longer run starts in a fresh "
            f"workdir, and with {group}.schedule='constant' may be extended at any time"
        )
    }


def adam(
    learning_rate: float | optax.Schedule, max_grad_norm: float, frozen: str | None = None
) -> Any:
    """Adam behind a clip of the global gradient norm; none for parameters that are frozen."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(max_grad_norm), optax.adam(learning_rate, eps=1e-5)
    )
    if frozen is None:
        return optimizer

    def labels(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if control_models.is_fitting(path, frozen) else "trained",
            params,
        )

    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def expert(config: ml_collections.ConfigDict) -> PolicyFunction:
    """The imperfect scripted expert, as a policy function that reads privileged state."""
    options = config.warm_start.expert.to_dict()

    def policy(state: State, rng: jax.Array) -> ActorOutput:
        return deterministic_output(language_reach.expert_action(state, rng, **options))

    return policy


def record_demonstrations(config: ml_collections.ConfigDict) -> tuple[bc.Demonstrations, float]:
    """Records the fixed set of whole episodes; the same seed gives the same set.

    Returns:
      The samples, and the fraction of episodes in which the expert succeeded.
    """
    env = make_env(config)
    episodes = config.warm_start.episodes

    @jax.jit
    def record(rng: jax.Array) -> tuple[bc.Demonstrations, jax.Array]:
        reset_key, rng = jax.random.split(rng)
        state = env.reset(jax.random.split(reset_key, episodes))
        last, batch = unroll(env, state, expert(config), rng, env.episode_length)
        ended = batch.terminated + batch.truncated
        success = losses.masked_mean(batch.metrics["success"], ended)
        data = bc.demonstrations(batch, batch.action, last.obs, discount=config.ppo.discount)
        return data, success

    data, success = record(jax.random.fold_in(jax.random.PRNGKey(config.seed), 1))
    return data, float(success)


def cloning_stage(
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    data: bc.Demonstrations,
    *,
    name: str = "warm_start",
    updates: int | None = None,
    start: LearnerState | None = None,
) -> Stage:
    """Behaviour cloning of `data`, from scratch or from the learner `start`.

    Args:
      config: of the run.
      mesh: to run on.
      data: recorded demonstrations.
      name: of the stage.
      updates: where it ends; by default the config's warm_start.updates.
      start: learner to go on from, with its optimizer.
    """
    warm, env = config.warm_start, make_env(config)
    optimizer = adam(warm.learning_rate, warm.max_grad_norm, config.model.frozen)
    step = functools.partial(
        bc.update,
        apply=control_models.make_apply(config, env),
        optimizer=optimizer,
        shard=functools.partial(mesh_lib.constrain_batch, mesh=mesh),
        hyperparameters=bc.Hyperparameters(
            value_weight=warm.value_weight,
            auxiliary_weight=warm.auxiliary_weight,
            pointing_weight=warm.pointing_weight,
        ),
    )

    begin, stream = Start(start), 2 if start is None else 3

    def init() -> Carry:
        learner = begin()
        if learner is None:
            learner = control_models.fresh_learner(config, env, optimizer)
            proprio = data.observation["proprio"][: len(data.action)]
            counted = jnp.ones(proprio.shape[:-1])
            seen = normalization.update(learner.normalizer, proprio, counted)
            learner = learner.replace(normalizer=seen)
        rng = jax.random.fold_in(jax.random.PRNGKey(config.seed), stream)
        return Carry(learner, None, rng, jnp.zeros((), jnp.int32))

    def update(carry: Carry, data: bc.Demonstrations) -> tuple[Carry, Metrics]:
        indices = epoch_indices(
            carry.rng, carry.updates, batch_size=warm.batch_size, size=len(data.action)
        )
        learner, metrics = step(carry.learner, data, indices)
        return carry.replace(learner=learner, updates=carry.updates + 1), metrics

    return Stage(
        name=name,
        init=init,
        release=begin.release,
        update=update,
        constants=jax.device_put(data, mesh_lib.replicated(mesh)),
        updates=updates or warm.updates,
        updates_per_dispatch=warm.updates_per_dispatch,
        env_steps_per_update=0,
        samples_per_update=warm.batch_size,
        evaluate=_periodic_evaluation(config),
        eval_interval=warm.eval_interval,
        checkpoint_interval=warm.checkpoint_interval,
        keep=config.run.keep,
        best_metric=best_metric(config),
        console=("loss/bc", "loss/pointing", best_metric(config), "time/samples_per_s"),
        shardings=functools.partial(shard_env_state, mesh=mesh),
    )


class PPOParts(NamedTuple):
    """The two halves of an update of PPO, and the optimizer that they go with.

    Attributes:
      act: (learner, env_state, key) -> (env_state, transitions [T, B, ...]).
      learn: (learner, transitions, last observation, key) -> (learner, metrics).
      optimizer: whose state the learner holds.
    """

    act: Callable[[LearnerState, State, jax.Array], tuple[State, Transition]]
    learn: Callable[
        [LearnerState, Transition, Observation, jax.Array], tuple[LearnerState, Metrics]
    ]
    optimizer: optax.GradientTransformation


def ppo_parts(config: ml_collections.ConfigDict, mesh: Mesh) -> PPOParts:
    """Rollout and learning of PPO."""
    p, env = config.ppo, make_env(config)
    apply = control_models.make_apply(config, env)
    steps = config.run.updates * p.epochs * p.minibatches
    rate = schedule(p.schedule, p.learning_rate, steps)
    optimizer = adam(rate, p.max_grad_norm, config.model.frozen)
    hyperparameters = ppo.Hyperparameters(
        discount=p.discount,
        gae_lambda=p.gae_lambda,
        advantage=p.advantage,
        clip=p.clip,
        value_clip=p.value_clip,
        value_weight=p.value_weight,
        entropy_weight=p.entropy_weight,
        auxiliary_weight=p.auxiliary_weight,
        pointing_weight=p.pointing_weight,
        epochs=p.epochs,
        minibatches=p.minibatches,
        target_kl=p.target_kl,
        recompute=config.model.get("dtype", "float32") != "float32",  # An MLP has no other.
    )

    def act(learner: LearnerState, env_state: State, key: jax.Array) -> tuple[State, Transition]:
        policy = policy_function(apply, learner, deterministic=False)
        return unroll(env, env_state, policy, key, p.unroll)

    def learn(
        learner: LearnerState, batch: Transition, last: Observation, key: jax.Array
    ) -> tuple[LearnerState, Metrics]:
        learner, metrics = ppo.update(
            learner,
            batch,
            last,
            key,
            apply=apply,
            optimizer=optimizer,
            hyperparameters=hyperparameters,
            shard=functools.partial(mesh_lib.constrain_batch, mesh=mesh),
        )
        return learner, metrics | {"lr": jnp.asarray(rate(learner.steps), jnp.float32)}

    return PPOParts(act, learn, optimizer)


def ppo_stage(
    config: ml_collections.ConfigDict, mesh: Mesh, *, start: LearnerState | None = None
) -> Stage:
    """PPO, from scratch or from the parameters and statistics of a cloned learner."""
    p, env = config.ppo, make_env(config)
    act, learn, optimizer = ppo_parts(config, mesh)
    begin = Start(start)

    def init() -> Carry:
        learner, cloned = control_models.fresh_learner(config, env, optimizer), begin()
        if cloned is not None:
            learner = learner.replace(
                params=cloned.params,
                opt_state=optimizer.init(cloned.params),
                normalizer=cloned.normalizer,
            )
        learner = learner.replace(params=control_models.with_std(learner.params, p.initial_std))
        rng = jax.random.fold_in(jax.random.PRNGKey(config.seed), 4)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.fold_in(rng, 0), jnp.arange(p.num_envs)
        )
        # Not sharded: by batches of another size, other roundings would start the environments.
        env_state = jax.jit(env.reset)(keys)
        return Carry(learner, env_state, jax.random.fold_in(rng, 1), jnp.zeros((), jnp.int32))

    def update(carry: Carry, _: None) -> tuple[Carry, Metrics]:
        act_key, learn_key = jax.random.split(jax.random.fold_in(carry.rng, carry.updates))
        env_state, batch = act(carry.learner, carry.env_state, act_key)
        learner, metrics = learn(carry.learner, batch, env_state.obs, learn_key)
        carry = carry.replace(learner=learner, env_state=env_state, updates=carry.updates + 1)
        return carry, metrics | rollout_metrics(batch)

    return Stage(
        name="ppo",
        init=init,
        release=begin.release,
        update=update,
        constants=None,
        env_steps_per_update=p.num_envs * p.unroll,
        samples_per_update=p.num_envs * p.unroll,
        evaluate=_periodic_evaluation(config),
        **run_fields(config.run),
        best_metric=best_metric(config),
        console=("episode/return", "episode/success", best_metric(config), "time/samples_per_s"),
        shardings=functools.partial(shard_env_state, mesh=mesh),
    )


def stored_learner(config: ml_collections.ConfigDict) -> LearnerState:
    """Shapes and dtypes of what a learner of this config acts with: it has no optimizer's state.

    They are those of every stage, whatever it learned with and on however many devices.
    """
    env = make_env(config)
    return jax.eval_shape(lambda: control_models.fresh_learner(config, env, optax.identity()))


def rollout_metrics(batch: Transition) -> Metrics:
    """What to log of an unroll; NaN where no episode ended in it."""
    ended = batch.terminated + batch.truncated

    def at_end(x: jax.Array) -> jax.Array:
        return jnp.where(jnp.any(ended > 0), losses.masked_mean(x, ended), jnp.nan)

    metrics = {
        "episode/return": at_end(batch.metrics["episode_return"]),
        "episode/length": at_end(batch.metrics["episode_length"]),
        "rollout/reward": losses.masked_mean(batch.reward, batch.valid),
        "rollout/valid_fraction": jnp.mean(batch.valid),
        "rollout/nonfinite_envs": jnp.sum(batch.metrics["broken"]),
    }
    if "success" in batch.metrics:
        metrics["episode/success"] = at_end(batch.metrics["success"])
    return metrics


def make_evaluator(
    config: ml_collections.ConfigDict, rng: jax.Array, *, episodes: int
) -> Evaluator:
    """Evaluates the deterministic policies of learners of this config."""
    apply = control_models.make_apply(config, make_env(config))

    def policy(learner: LearnerState) -> PolicyFunction:
        return policy_function(apply, learner, deterministic=True)

    return Evaluator(
        lambda split: make_env(config, split=split),
        policy,
        rng,
        episodes=episodes,
        mesh=make_mesh(config),
    )


def dependencies(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Fingerprints of what a run depends on beside its config, see `fingerprints`.

    Other pretrained parts than a text encoder are parameters, and lie in the checkpoints.
    """
    encoder = getattr(config.model, "text_encoder", None)
    if encoder is None:
        return {}
    return {"text_encoder": weights.fingerprint(control_encoders.directory_of(encoder))}


def splits(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The splits of the config's environment."""
    return envs.splits(config.env.name)


def make_measure(
    config: ml_collections.ConfigDict, *, episodes: int
) -> Callable[[LearnerState, str], dict[str, float]]:
    """The reported evaluation: (what a learner acts with, split) -> see `evaluate.describe`."""
    evaluator = make_evaluator(config, evaluation_key(config), episodes=episodes)
    return lambda learner, split: describe(evaluator(learner, split))


def run_fields(run: ml_collections.ConfigDict) -> dict[str, Any]:
    """The fields of a Stage that config.run gives."""
    names = ("updates", "updates_per_dispatch", "eval_interval", "checkpoint_interval", "keep")
    return {name: run[name] for name in names}


def evaluation_key(config: ml_collections.ConfigDict) -> jax.Array:
    """The key of every evaluation of a run: the same episodes for whatever is compared."""
    return jax.random.fold_in(jax.random.PRNGKey(config.seed), 5)


def _periodic_evaluation(
    config: ml_collections.ConfigDict,
) -> Callable[[LearnerState], dict[str, float]]:
    split = config.env.split
    # Other episodes than those of the reported evaluations: the best checkpoint is chosen by it.
    key = jax.random.fold_in(evaluation_key(config), 1)
    evaluator = make_evaluator(config, key, episodes=config.run.eval_episodes)

    def evaluation(learner: LearnerState) -> dict[str, float]:
        described = describe(evaluator(learner.without_optimizer(), split))
        return {f"eval/{split}/{name}": value for name, value in described.items()}

    return evaluation


def best_metric(config: ml_collections.ConfigDict) -> str:
    """By which the best checkpoint is chosen."""
    return f"eval/{config.env.split}/return"


def check_env(config: ml_collections.ConfigDict) -> State:
    """Checks the environment, and returns the shapes of its state after `reset`, of one episode.

    Raises:
      ValueError: there is no such environment, split or option, an argument is impossible, or see
        `check_settings` and `envs.check_env`.
    """
    check_settings()
    env, known = config.env, envs.splits(config.env.name)
    if env.split not in known:
        raise ValueError(f"env.split={env.split!r} is unknown; choose one of {known}.")
    options = env.options.to_dict()
    for name in sorted(set(options) & set(env.keys())):
        raise ValueError(
            f"env.options.{name}={options[name]!r}: set env.{name}, which is {env[name]!r}, and "
            "leave the option out."
        )
    return envs.check_env(envs.unwrapped(make_env(config)), pixels=env.height > 0)


def shard_env_state(carry: Carry, *, mesh: Mesh) -> Carry:
    """Environments over the mesh's data axis, the rest replicated."""
    replicated = jax.tree.map(lambda _: mesh_lib.replicated(mesh), carry)
    # XLA replicates arrays without elements, whatever is asked for.
    by_env = jax.tree.map(
        lambda x: mesh_lib.batch_sharding(mesh, 0) if x.size else mesh_lib.replicated(mesh),
        carry.env_state,
    )
    return replicated.replace(env_state=by_env)
