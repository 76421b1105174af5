"""Evaluations as programs, to plan them apart from updates."""

from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr

from mmrl_jax.distributed import partition
from mmrl_jax.evaluation import evaluate
from mmrl_jax.evaluation.chunks import chunk_size
from mmrl_jax.models import lora
from mmrl_jax.planning import placement
from mmrl_jax.planning.program import Value, simplified
from mmrl_jax.planning.usage import Analyzer, Usage
from mmrl_jax.problems import Problem, dataset_shapes
from mmrl_jax.rollouts.generate import Sampling
from mmrl_jax.tasks.prompts import Prompt


class Evaluation(NamedTuple):
    """An evaluation during training.

    Attributes:
      program: Program of a chunk of episodes or prompts.
      variables: Shapes of its first argument, the variables of the policy.
      chunks: Number of times that it runs.
    """

    program: ClosedJaxpr
    variables: Any
    chunks: int


def trace(problem: Problem, variables: Any) -> Evaluation:
    """Traces an evaluation of a problem of one device, for its training split.

    Args:
      problem: Problem, made for described devices.
      variables: Shapes of the variables of the policy.
    """
    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    env = getattr(problem, "env", None)
    count = next(iter(problem.splits.values()))
    limit = getattr(problem, "eval_batch_size", lambda: count)()
    size = chunk_size(count, limit, devices=1)
    chunks = -(-count // size)
    if env is not None:

        def episodes(variables: Any, key: jax.Array) -> Any:
            state = evaluate.start(env, key, episodes=size)
            return evaluate.evaluate(env, state, problem.policy(variables), key)

        return Evaluation(simplified(jax.make_jaxpr(episodes)(variables, key)), variables, chunks)
    model: Any = getattr(problem, "model")  # noqa: B009

    def complete(variables: Any, prompts: Prompt, key: jax.Array) -> Any:
        return model.policy.generate(
            *lora.split(variables, ".*"),
            prompts,
            key,
            num_completions=1,
            sampling=Sampling(temperature=0.0),
        )

    prompts = dataset_shapes.prompts(model.texts.prompt_tokens.shape[1], model.size, size)
    # Tasks are evaluated a second time with shuffled images.
    times = 2 if hasattr(problem, "task") else 1
    program = simplified(jax.make_jaxpr(complete)(variables, prompts, key))
    return Evaluation(program, variables, times * chunks)


def usage(evaluation: Evaluation, analyzer: Analyzer) -> Usage:
    """Returns the usage of a whole evaluation on one device."""
    ins = [Value(v.aval) for v in evaluation.program.jaxpr.invars]
    mesh = placement.abstract_mesh(analyzer.mesh)
    placed = partition.shardings(evaluation.variables, mesh)
    for x, sharding in zip(ins, jax.tree.leaves(placed), strict=False):
        x.split = placement.split_of(x, sharding)
    once = analyzer.program(evaluation.program, ins, 0).whole
    total = Usage(peak=once.peak, arrays=once.arrays)
    total.add(once, evaluation.chunks)
    return total
