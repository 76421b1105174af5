"""Where the time of one update of the main job goes: each part alone, against the whole."""

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
    """Measures physics, rendering, policy and learning; then what the whole takes beside them."""
    problem = problems.make(reach_ppo.get_config())
    assert isinstance(problem, control.Control)
    config, env, apply = problem.config, problem.env, problem.network.apply
    blind, steps = env.env, config.ppo.unroll_length  # Without `Pixels`.
    stage, options = problem.stage("ppo"), build(ppo.PPO, config.ppo)
    carry, shardings = loop.start(stage)
    start, learner = jax.tree.map(jnp.copy, (carry.env_state, carry.learner))
    key = jax.random.PRNGKey(0)
    unseen = start.replace(obs={k: v for k, v in start.obs.items() if k != "pixels"})
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
    # The scenes that rendering draws, and the observations that the policy reads, step by step.
    _, states = jax.jit(lambda s, a: repeat(blind.step, s, a, keep=True))(unseen, actions)

    def draw(_: Any, state: State) -> tuple[Any, jax.Array]:
        return _, render(*env.scene(state), height=config.env.height, width=config.env.width)

    act = policy_function(apply, learner, deterministic=False)

    def decide(_: Any, observation: Any) -> tuple[Any, Any]:
        return _, act(start.replace(obs=observation), key)

    dispatch = loop.make_dispatch(stage.update, 1, shardings)

    def whole() -> jax.Array:
        nonlocal carry
        carry, _ = dispatch(carry, stage.constants)
        return carry.updates

    programs: dict[str, tuple[Callable[..., Any], tuple]] = {
        "physics": (jax.jit(lambda s, a: repeat(blind.step, s, a)), (unseen, actions)),
        "rendering": (jax.jit(lambda x: jax.lax.scan(draw, 0, x)[1]), (states,)),
        "policy": (jax.jit(lambda x: jax.lax.scan(decide, 0, x)[1]), (batch.observation,)),
        "learning": (jax.jit(learn), (learner, Rollout(batch, after.obs), key)),
    }
    outside = []
    for name, (program, arguments) in programs.items():
        row = compare(
            f"{name} / whole update",
            lambda program=program, arguments=arguments: seconds(program, *arguments),
            lambda: seconds(whole),
            unit="s",
            runs=runs,
        )
        outside.append(row)
        yield row
    total = sum(row.peer for row in outside if row.peer is not None) / len(outside)
    rest = total - sum(row.ours for row in outside)
    yield Row("all else / whole update", rest, total, rest / total, "s", runs, hardware())


def repeat(
    step: Callable[[State, jax.Array], State], state: State, actions: jax.Array, keep: bool = False
) -> tuple[State, State | None]:
    """Steps the environments with actions [T, B, A]; keeps all states, or only the last."""

    def body(state: State, action: jax.Array) -> tuple[State, State | None]:
        state = step(state, action)
        return state, state if keep else None

    return jax.lax.scan(body, state, actions)
