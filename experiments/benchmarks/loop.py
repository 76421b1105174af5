"""The time of each part of an update of reach_ppo, compared with the whole update."""

from collections.abc import Callable, Iterator
import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.harness import Row, compare, hardware, seconds
from mmrl_jax import problems
from mmrl_jax.config.options import build
from mmrl_jax.configs import reach_ppo
from mmrl_jax.envs.brax_api import State
from mmrl_jax.learners import ppo
from mmrl_jax.learners.learner import LearnerState, Rollout, policy_function
from mmrl_jax.problems import control, sources
from mmrl_jax.rendering import render
from mmrl_jax.rollouts.unroll import unroll
from mmrl_jax.training import loop
from mmrl_jax.types import Transition


def rows(runs: int) -> Iterator[Row]:
    """Measures physics, rendering, policy and learning, and the remaining time of an update."""
    problem = problems.make(reach_ppo.get_config())
    assert isinstance(problem, control.Control)
    config, env, apply = problem.config, problem.env, problem.network.apply
    physics_env, steps = env.env, config.ppo.unroll_length  # The environment without `Pixels`.
    stage, options = problem.stage("ppo"), build(ppo.PPO, config.ppo)
    carry, shardings = loop.start(stage)
    start, learner = jax.tree.map(jnp.copy, (carry.env_state, carry.learner))
    key = jax.random.PRNGKey(0)
    physics_start = start.replace(obs={k: v for k, v in start.obs.items() if k != "pixels"})
    actions = jax.random.uniform(key, (steps, config.ppo.num_envs, 2), minval=-1.0)

    @jax.jit
    def collect(learner: LearnerState, state: State, key: jax.Array) -> tuple[State, Transition]:
        policy = policy_function(apply, learner, deterministic=False)
        return unroll(env, state, policy, key, steps)

    learn = functools.partial(
        ppo.update,
        apply=apply,
        optimizer=sources.make_optimizer(config, "ppo", options).transformation,
        options=options,
    )
    after, batch = collect(learner, start, key)
    # States of all steps, whose scenes are rendered.
    _, states = jax.jit(lambda s, a: repeat(physics_env.step, s, a, keep=True))(
        physics_start, actions
    )

    def render_step(_: Any, state: State) -> tuple[Any, jax.Array]:
        return _, render(*env.scene(state), height=config.env.height, width=config.env.width)

    act = policy_function(apply, learner, deterministic=False)

    def act_step(_: Any, observation: Any) -> tuple[Any, Any]:
        return _, act(start.replace(obs=observation), key)

    dispatch = loop.make_dispatch(stage.update, 1, shardings)

    def whole_update() -> jax.Array:
        nonlocal carry
        carry, _ = dispatch(carry, stage.constants)
        return carry.updates

    programs: dict[str, tuple[Callable[..., Any], tuple]] = {
        "physics": (
            jax.jit(lambda s, a: repeat(physics_env.step, s, a)),
            (physics_start, actions),
        ),
        "rendering": (jax.jit(lambda x: jax.lax.scan(render_step, 0, x)[1]), (states,)),
        "policy": (jax.jit(lambda x: jax.lax.scan(act_step, 0, x)[1]), (batch.observation,)),
        "learning": (jax.jit(learn), (learner, Rollout(batch, after.obs), key)),
    }
    parts = []
    for name, (program, arguments) in programs.items():
        row = compare(
            f"{name} / whole update",
            lambda program=program, arguments=arguments: seconds(program, *arguments),
            lambda: seconds(whole_update),
            unit="s",
            runs=runs,
        )
        parts.append(row)
        yield row
    total = sum(row.peer for row in parts if row.peer is not None) / len(parts)
    rest = total - sum(row.ours for row in parts)
    yield Row("all else / whole update", rest, total, rest / total, "s", runs, hardware())


def repeat(
    step: Callable[[State, jax.Array], State], state: State, actions: jax.Array, keep: bool = False
) -> tuple[State, State | None]:
    """Steps the environments with actions [T, B, A].

    Args:
      step: Step function of the environments.
      state: Initial state of the environments.
      actions: Actions, float32 [T, B, A].
      keep: Whether to return the states of all steps in addition to the last one.
    """

    def body(state: State, action: jax.Array) -> tuple[State, State | None]:
        state = step(state, action)
        return state, state if keep else None

    return jax.lax.scan(body, state, actions)
