"""What the quickstarts share: their command line, the time of an update, and a longer stage."""

from collections.abc import Callable, Mapping
import sys
import time
from typing import Any

from absl import flags
from etils import epath
import jax

from mmrl_jax import runs
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.commands.common import EXIT_INTERRUPTED, FAILURES, clean_exit, refuse_arguments
from mmrl_jax.training import loop
from mmrl_jax.training.stage import Stage

LONG_MINUTES = 15  # Above it, the small preset is named.
Summary = dict[str, float]


def define_flags(workdirs: Mapping[str, str]) -> None:
    """Defines the flags of a quickstart.

    Args:
      workdirs: Default working directory of each preset.
    """
    script = {"module_name": sys.argv[0]}  # --help shows the flags of the executed script alone.
    text = f"Directory of all outputs; by default {' or '.join(workdirs.values())}."
    flags.DEFINE_string("workdir", None, text, **script)
    flags.DEFINE_enum("preset", "full", list(workdirs), "Size of the run.", **script)
    flags.DEFINE_integer("seed", 0, "Seed of all random numbers of the run.", **script)


def run(
    argv: list[str],
    *,
    workdirs: Mapping[str, str],
    make_problem: Callable[[int, str], Any],
    forecast: Callable[[Any, str], str],
    quickstart: Callable[[Any, epath.Path], Summary | None],
    conclusion: Callable[[Summary, str], str],
) -> int:
    """Runs the command line of a quickstart, and returns its exit code.

    Args:
      argv: Name of the command, and positional arguments, which are refused.
      workdirs: Default working directory of each preset.
      make_problem: Makes the problem of a seed and a preset.
      forecast: Returns a text about how long a problem of a preset takes; it is called unless the
        run is resumed.
      quickstart: Trains, evaluates and reports; returns None if a signal interrupted the run.
      conclusion: Returns a text with the results in a summary, for a working directory.
    """
    refuse_arguments(argv)
    f = flags.FLAGS
    directory = f.workdir or workdirs[f.preset]
    with clean_exit(ValueError):
        workdir = workdir_lib.as_path(directory)
        problem = make_problem(f.seed, f.preset)
        lock = runs.claim(problem, workdir)
    first = workdir_lib.stage_directory(problem.config, problem.config.stages[0], workdir)
    with lock, clean_exit(*FAILURES):
        if not workdir_lib.saved_steps(first):  # A resumed run shows the time left.
            print(forecast(problem, f.preset), flush=True)
        summary = quickstart(problem, workdir)
    if summary is None:
        print("Interrupted; the same command resumes from the last checkpoint.")
        return EXIT_INTERRUPTED
    print(conclusion(summary, directory))
    return 0


def record(
    summary: Summary, prefix: str, metrics: Mapping[str, float], metric: str = "success"
) -> None:
    """Adds a rate and its interval to a summary, and prints them.

    Args:
      summary: Summary to which they are added, as '<prefix>/<metric>' with '_lo' and '_hi'.
      prefix: What was measured, for example 'final/train'.
      metrics: Metrics that have the rate and its interval.
      metric: Name of the rate.
    """
    names = (metric, f"{metric}_lo", f"{metric}_hi")
    summary |= {f"{prefix}/{name}": metrics[name] for name in names}
    mean, low, high = (metrics[name] for name in names)
    print(f"  {prefix:36} {mean:6.3f}  [{low:.3f}, {high:.3f}]", flush=True)


def rate(summary: Mapping[str, float], name: str) -> tuple[float, float, float]:
    """Returns a rate in a summary and the two ends of its interval."""
    return summary[name], summary[f"{name}_lo"], summary[f"{name}_hi"]


def run_longer(stage: Stage, workdir: epath.Path, *, config: Any, seconds: float) -> loop.Result:
    """Runs a stage that continues an earlier one, for the time that another stage took.

    Args:
      stage: Stage, with more updates than it makes in this time.
      workdir: Working directory of the stage.
      config: Config of the run.
      seconds: Time of its updates in seconds.
    """
    result = loop.run(stage, workdir=workdir, config=config, max_seconds=seconds)
    runs.draw_curves(workdir, x="progress/updates")
    return result


def update_seconds(stage: Stage) -> float:
    """Times updates of a stage, and returns the time of the fastest one in seconds.

    The run compiles the same program again, which is then in JAX's compilation cache.
    """
    carry, shardings = loop.start(stage)
    dispatch = loop.make_dispatch(stage.update, stage.updates_per_dispatch, shardings)
    program = dispatch.lower(carry, stage.constants).compile()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        carry, _ = program(carry, stage.constants)
        jax.block_until_ready(carry)
        seconds.append(time.perf_counter() - started)
    return min(seconds) / stage.updates_per_dispatch


def smaller(minutes: float, small_minutes: float, target: str) -> str:
    """Returns a sentence that names the small preset if a run is long, or else an empty text.

    Args:
      minutes: Time of the run.
      small_minutes: Time of the run with the small preset.
      target: Target of the Makefile.
    """
    if minutes <= LONG_MINUTES:
        return ""
    return (
        f" The same comparison in about {small_minutes:.0f} minutes: make {target} PRESET=small, "
        "or --preset=small."
    )
