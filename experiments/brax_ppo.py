"""Brax's PPO with the hyperparameters of our configs, as a peer in studies and benchmarks."""

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
    """Returns Brax's `train` for a config of `configs/mlp_ppo.py` on one device.

    Brax's default hidden layers are those of our MLP. Remaining differences: Brax excludes
    truncated steps from the loss where we bootstrap their values, recomputes advantages at every
    optimizer step, shuffles segments of episodes instead of single steps, computes the standard
    deviation with softplus instead of exp, and uses an Adam epsilon of 1e-8 instead of 1e-5.

    Args:
      config: Config of the run.

    Returns:
      Brax's `train` with its arguments bound, which takes further keyword arguments.

    Raises:
      ValueError: If Brax's PPO does not support a setting of the config.
    """
    p, options = config.ppo, config.env.options.to_dict()
    for name, value, only in (
        ("ppo.optimizer.schedule", p.optimizer.schedule, "constant"),
        ("ppo.target_kl", p.target_kl, None),
        ("ppo.desired_kl", p.desired_kl, None),
        ("ppo.gradient_surgery", p.gradient_surgery, "none"),
        ("ppo.popart", p.popart, False),
        ("ppo.advantage_scaling", p.advantage_scaling, "whiten"),
    ):
        if value != only:
            raise ValueError(f"{name}={value!r}, but Brax's PPO is run with {only!r} only.")
    # JAX has removed this function. On one device, Brax's trainer only needs it to add an axis.
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
    """Runs our PPO for a study.

    Args:
      config: Config of the run.
      seed: Seed of the run.
      workdir: Working directory of the run.

    Returns:
      The result of `study.run_one` with the 'gain', the mean return minus that of random actions;
      None if a signal interrupted the run.
    """
    result = study.run_one(config, seed, workdir)
    return result and result | {GAIN: result["final/train/return"] - random_return(config)}


def run_brax(config: ml_collections.ConfigDict, seed: int, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs Brax's PPO for a study, and evaluates it like ours. The run cannot be resumed.

    Args:
      config: Config of the run.
      seed: Seed of the run.
      workdir: Directory of the run.

    Returns:
      The mean return, the 'gain' over random actions, times and provenance.
    """
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
    """Returns the mean return of uniformly random actions."""
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
