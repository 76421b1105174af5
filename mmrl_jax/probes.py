"""Probes: measurements at intervals during training, for any problem.

    run.probes = ("ablations", "my_module:my_probe")

A probe is a function that takes a `ProbeContext` and returns metrics, or an empty dictionary if it
only writes files. In a run of several processes all of them call it, because they compute together;
files are written where `multihost.is_primary()`. Your module must define its own metrics in
`monitoring.metric_definitions.METRIC_DEFINITIONS`.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import itertools
import json
import math
from typing import Any, NamedTuple

from etils import epath
import jax

from mmrl_jax import workdir as workdir_lib
from mmrl_jax.config.loading import import_object
from mmrl_jax.config.options import build
from mmrl_jax.config.schema import nearest
from mmrl_jax.distributed import multihost
from mmrl_jax.evaluation import evaluate
from mmrl_jax.interpretability import control as explained
from mmrl_jax.learners import ppo, registry
from mmrl_jax.monitoring import metrics
from mmrl_jax.problems import Problem
from mmrl_jax.problems.control import Control
from mmrl_jax.problems.problem import EVALUATION, stream
from mmrl_jax.reporting import report
from mmrl_jax.training.stage import Stage, StageProbe

SAMPLES = 8  # Number of completions on a page.
EPISODES, STEPS = 16, 8  # Numbers of episodes, and of steps of each, for `modality_shares`.


class ProbeContext(NamedTuple):
    """Argument of a probe.

    Attributes:
      problem: Problem of the run.
      variables: Variables of the policy, see `problems.Problem.variables`.
      update: Number of completed updates.
      directory: Working directory of the stage, for files.
      stage: Name of the stage.
    """

    problem: Problem
    variables: Any
    update: int
    directory: epath.Path
    stage: str


Probe = Callable[[ProbeContext], Mapping[str, float]]


@functools.lru_cache(maxsize=1)
def _ablated(problem: Any) -> Callable[[Any, str], dict[str, float]]:
    """Returns the evaluation of `ablations`, which a run compiles only once."""
    return problem.measure(ablations=True)


def ablations(context: ProbeContext) -> dict[str, float]:
    """Evaluates the training or validation split with each modality shuffled."""
    problem: Any = context.problem
    split = problem.best_metric.split("/")[1]
    measured = _ablated(problem)(context.variables, split)
    return {f"eval/{split}/{name}": x for name, x in measured.items() if "shuffled_" in name}


def samples(context: ProbeContext) -> dict[str, float]:
    """Writes sample completions to samples.html, and appends them to samples.jsonl."""
    rows = context.problem.samples(context.variables, SAMPLES)
    if rows and multihost.is_primary():
        title = f"{context.directory.name}: samples after update {context.update}"
        report.sample_table(context.directory / "samples.html", rows, title)
        lines = [
            json.dumps(
                {
                    "update": context.update,
                    "prompt": row.prompt,
                    "completion": row.completion,
                    "reward": row.reward,
                }
            )
            for row in rows
        ]
        path = context.directory / metrics.SAMPLES_NAME
        before = path.read_text() if path.exists() else ""
        workdir_lib.write_text(path, before + "".join(f"{line}\n" for line in lines))
    return {}


@functools.lru_cache(maxsize=1)
def _shares(problem: Any) -> Callable[[Any, jax.Array], dict[str, dict[str, jax.Array]]]:
    """Returns the compiled measurement of `modality_shares`, which a run compiles only once."""

    @jax.jit
    def measure(variables: Any, rng: jax.Array) -> dict[str, dict[str, jax.Array]]:
        state = evaluate.start(problem.env, rng, episodes=EPISODES)
        played = explained.play(problem.env, state, problem.policy(variables), rng)
        predict = functools.partial(problem.predict, variables)
        return {
            target: explained.modality_shares(
                predict, explained.subsample(played, STEPS), target=target
            )
            for target in ("behavior", "prediction")
        }

    return measure


def modality_shares(context: ProbeContext) -> dict[str, float]:
    """Measures what fraction of the policy and of the value each modality determines.

    Raises:
      ValueError: If the problem has no control policy.
    """
    problem = context.problem
    if not isinstance(problem, Control):
        raise ValueError(
            f"run.probes has 'modality_shares', which explains control policies, but problem="
            f"{problem.config.problem!r}; remove the probe."
        )
    rng = stream(problem.config, EVALUATION)
    measured = jax.device_get(_shares(problem)(context.variables, rng))
    return {
        f"modality_share/{target}/{name}": float(share)
        for target, by_name in measured.items()
        for name, share in by_name.items()
    }


@functools.lru_cache(maxsize=1)
def _conflicts(problem: Any, stage: str) -> Callable[[Any, jax.Array], Any]:
    """Returns the compiled measurement of `gradient_conflict`, which a run compiles only once."""
    return jax.jit(lambda variables, rng: problem.gradient_conflict(variables, stage, rng))


def gradient_conflict(context: ProbeContext) -> dict[str, float]:
    """Measures angles and relative lengths of the gradients of the parts of PPO's loss.

    In a stage of another algorithm, which does not learn by this loss, it measures nothing.

    Raises:
      ValueError: If the run has no stage of PPO with a control policy.
    """
    problem: Any = context.problem
    stages = [
        name
        for name in problem.config.stages
        if isinstance(problem, Control) and issubclass(registry.CONTROL[name].options, ppo.PPO)
    ]
    if not stages:
        raise ValueError(
            "run.probes has 'gradient_conflict', which measures the loss of PPO of a control "
            f"policy, but problem={problem.config.problem!r} and "
            f"stages={tuple(problem.config.stages)}; remove the probe."
        )
    name = context.stage
    if name not in stages:
        return {}
    options = build(registry.CONTROL[name].options, problem.config[name])
    rng = stream(problem.config, EVALUATION)
    cosines, norms = jax.device_get(_conflicts(problem, name)(context.variables, rng))
    found = {}
    parts = enumerate(ppo.rollout_parts(options))
    for (i, first), (j, second) in itertools.combinations(parts, 2):
        # A gradient of 0 has no angle.
        cosine = cosines[i, j] if norms[i] > 0 and norms[j] > 0 else math.nan
        ratio = norms[i] / norms[j] if norms[j] > 0 else math.nan
        found[f"gradient_conflict/cosine/{first}_{second}"] = float(cosine)
        found[f"gradient_conflict/norm_ratio/{first}_{second}"] = float(ratio)
    return found


PROBES: dict[str, Probe] = {
    "ablations": ablations,
    "gradient_conflict": gradient_conflict,
    "modality_shares": modality_shares,
    "samples": samples,
}


def find(name: str) -> Probe:
    """Returns a probe by its name in PROBES, or by 'module:function'.

    Raises:
      ValueError: If the probe does not exist.
    """
    if ":" in name:
        return import_object(name, "run.probes")
    if name not in PROBES:
        raise ValueError(
            f"run.probes has {name!r}, but valid names are {tuple(PROBES)}: did you mean "
            f"{nearest(name, PROBES)!r}? Your own probe is written as 'module:function'."
        )
    return PROBES[name]


def attach(problem: Problem, stage: Stage, directory: epath.Path) -> Stage:
    """Returns a stage with the probes and loggers of its run.

    Args:
      problem: Problem of the run.
      stage: Stage without probes.
      directory: Working directory of the stage.

    Raises:
      ValueError: If a probe does not exist.
    """
    run = problem.config.run

    def bound(probe: Probe) -> Callable[[Any, int], dict[str, float]]:
        def measure(learner: Any, update: int) -> dict[str, float]:
            variables = problem.variables(stage, learner)
            return dict(probe(ProbeContext(problem, variables, update, directory, stage.name)))

        return measure

    attached = tuple(StageProbe(name, run.probe_interval, bound(find(name))) for name in run.probes)
    return dataclasses.replace(stage, probes=attached, loggers=tuple(run.loggers))
