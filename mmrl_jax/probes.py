"""Probes: what is measured now and then during training, on any problem.

    run.probes = ("ablations", "my_module:my_probe")

A probe is a function of a `Moment`, and returns metrics, or an empty dictionary where it writes
files. A metric of your own needs a definition, which your module adds to
`monitoring.metric_definitions.METRIC_DEFINITIONS`.
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
from typing import Any, NamedTuple

from etils import epath

from mmrl_jax import workdir as workdir_lib
from mmrl_jax.config.loading import import_object
from mmrl_jax.config.schema import nearest
from mmrl_jax.problems import Problem
from mmrl_jax.reporting import report
from mmrl_jax.training.stage import Stage, StageProbe

SAMPLES = 8  # Completions of a page.


class Moment(NamedTuple):
    """What a probe is given.

    Attributes:
      problem: The problem that is trained on.
      variables: What the policy acts with, see `problems.Problem.variables`.
      update: Number of the update.
      directory: Directory of the stage, for files.
    """

    problem: Problem
    variables: Any
    update: int
    directory: epath.Path


Probe = Callable[[Moment], Mapping[str, float]]


def ablations(moment: Moment) -> dict[str, float]:
    """Evaluates the training split, or the validation split, with each modality shuffled."""
    split = moment.problem.best_metric.split("/")[1]
    metrics = moment.problem.measure(ablations=True)(moment.variables, split)
    return {f"eval/{split}/{name}": x for name, x in metrics.items() if "shuffled_" in name}


def samples(moment: Moment) -> dict[str, float]:
    """Writes the newest completions to samples.html, and all of them to samples.jsonl."""
    rows, _ = moment.problem.samples(moment.variables, SAMPLES)
    if rows:
        title = f"{moment.directory.name}: samples after update {moment.update}"
        report.sample_table(moment.directory / "samples.html", rows, title)
        lines = [
            json.dumps(
                {
                    "update": moment.update,
                    "prompt": row.prompt,
                    "completion": row.completion,
                    "reward": row.reward,
                }
            )
            for row in rows
        ]
        path = moment.directory / "samples.jsonl"
        before = path.read_text() if path.exists() else ""
        workdir_lib.write_text(path, before + "".join(f"{line}\n" for line in lines))
    return {}


PROBES: dict[str, Probe] = {"ablations": ablations, "samples": samples}


def find(name: str) -> Probe:
    """Returns a probe by its name in PROBES, or by 'module:function'.

    Raises:
      ValueError: There is no such probe.
    """
    if ":" in name:
        return import_object(name, "run.probes")
    if name not in PROBES:
        raise ValueError(
            f"run.probes has {name!r}, but there are {tuple(PROBES)}: did you mean "
            f"{nearest(name, PROBES)!r}? One of yours is named 'module:function'."
        )
    return PROBES[name]


def attach(problem: Problem, stage: Stage, directory: epath.Path) -> Stage:
    """Returns a stage with the probes and loggers of its run.

    Args:
      problem: The problem that is trained on.
      stage: Without probes.
      directory: Of the stage.

    Raises:
      ValueError: See `find`.
    """
    run = problem.config.run

    def bound(probe: Probe) -> Callable[[Any, int], dict[str, float]]:
        def measure(learner: Any, update: int) -> dict[str, float]:
            variables = problem.variables(stage, learner)
            return dict(probe(Moment(problem, variables, update, directory)))

        return measure

    attached = tuple(StageProbe(name, run.probe_interval, bound(find(name))) for name in run.probes)
    return dataclasses.replace(stage, probes=attached, loggers=tuple(run.loggers))
