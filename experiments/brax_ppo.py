"""Brax's own PPO, the peer of ours, with the hyperparameters of our configs."""

from collections.abc import Callable
import functools
import pathlib
import time
from typing import Any

from brax import envs as brax_envs
from brax.training.agents.ppo import train as brax_ppo
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments import study
from mmrl_jax.envs.brax_api import State
from mmrl_jax.evaluation.evaluate import Evaluator
from mmrl_jax.problems import control, problem
from mmrl_jax.rollouts.unroll import ActorOutput, PolicyFunction, deterministic_output
from mmrl_jax.training.provenance import commit, hardware

GAIN = "gain"


def trainer(config: ml_collections.ConfigDict) -> Callable[..., Any]:
    """Brax's `train` for a config of `configs/mlp_ppo.py`, on one device; takes further arguments.

    The hidden layers are those of our MLP by default. What stays different: Brax leaves truncated
    steps out of the loss where we bootstrap them, estimates advantages anew at every step of the
    optimizer, shuffles pieces of episodes and not single steps, squashes the standard deviation by
    softplus and not exp, and has an epsilon of 1e-8 in Adam, not 1e-5.

    Raises:
      ValueError: Brax has no such setting.
    """
    p, options = config.ppo, config.env.options.to_dict()
    for name, value, only in (
        ("ppo.optimizer.schedule", p.optimizer.schedule, "constant"),
        ("ppo.target_kl", p.target_kl, None),
    ):
        if value != only:
            raise ValueError(f"{name}={value!r}, but Brax's PPO knows {only!r} alone.")
    # Gone from jax, but all that Brax's trainer wants of it on one device is a new axis.
    jax.device_put_replicated = lambda tree, devices: jax.tree.map(
        lambda x: jnp.stack([x] * len(devices)), tree
    )
    episode_length = options.pop("episode_length")
    return functools.partial(
        brax_ppo.train,
        environment=brax_envs.get_environment(config.env.name.removeprefix("brax:"), **options),
        max_devices_per_host=1,
        num_envs=p.num_envs,
        episode_length=episode_length,
        unroll_length=p.unroll_length,
        batch_size=p.num_envs // p.num_minibatches,
        num_minibatches=p.num_minibatches,
        num_updates_per_batch=p.num_epochs,
        learning_rate=p.optimizer.learning_rate,
        max_grad_norm=p.optimizer.max_grad_norm,
        discounting=p.discount,
        gae_lambda=p.gae_lambda,
        clipping_epsilon=p.clip,
        clipping_epsilon_value=p.value_clip,
        vf_loss_coefficient=p.value_coef,
        entropy_cost=p.entropy_coef,
        normalize_observations=True,
        run_evals=False,
        seed=config.seed,
    )


def run_ours(
    config: ml_collections.ConfigDict, seed: int, workdir: pathlib.Path
) -> dict[str, Any] | None:
    """A run of a study, with the 'gain' in return over random actions; None if interrupted."""
    result = study.run_one(config, seed, workdir)
    return result and result | {GAIN: result["final/train/return"] - random_return(config)}


def run_brax(config: ml_collections.ConfigDict, seed: int, workdir: pathlib.Path) -> dict[str, Any]:
    """The same of Brax's PPO, evaluated as ours is; it cannot be resumed within a run."""
    workdir.mkdir(parents=True, exist_ok=True)
    config.seed = seed
    steps = config.ppo.num_updates * config.ppo.num_envs * config.ppo.unroll_length
    begin = time.perf_counter()
    make_policy, params, _ = trainer(config)(num_timesteps=steps)
    wall_s = time.perf_counter() - begin

    def policy(params: Any) -> PolicyFunction:
        act = make_policy(params, deterministic=True)
        return lambda state, rng: deterministic_output(act(state.obs["proprio"], rng)[0])

    mean = _mean_return(config, policy, params)
    return {
        "final/train/return": mean,
        GAIN: mean - random_return(config),
        "wall_s": wall_s,
        "env_steps": steps,
        "commit": commit(),
        "hardware": hardware(),
    }


def random_return(config: ml_collections.ConfigDict) -> float:
    """Mean return of uniformly random actions."""
    size = control.make_env(config).action_size

    def policy(state: State, rng: jax.Array) -> ActorOutput:
        return deterministic_output(jax.random.uniform(rng, (*state.done.shape, size), minval=-1.0))

    return _mean_return(config, lambda _: policy, None)


def _mean_return(
    config: ml_collections.ConfigDict, policy: Callable[[Any], PolicyFunction], variables: Any
) -> float:
    evaluator = Evaluator(
        lambda split: control.make_env(config, split=split),
        policy,
        problem.stream(config, problem.EVALUATION),
        episodes=config.run.eval_episodes,
    )
    return float(np.mean(evaluator(variables, "train").episode_return))
