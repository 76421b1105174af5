"""Runs a study: variants of a config over several seeds, compared with confidence intervals.

  python -m experiments.study --study=experiments/studies/reach.py [--variants=no_film] [--seeds=0]
  python -m experiments.study --study=experiments/studies/vs_brax.py:reacher

A study is a config file whose `get_config` takes the name of a variant. It defines VARIANTS, SEEDS
(the number of seeds) and MAIN, the metric by which variants are compared. RUNNERS may map variants
to functions that replace `run_one`, for example the trainer of a peer. The text after a colon is
passed to `get_config` too, and becomes part of the name of the directory. All variants run with one
seed before the next seed starts, so that intermediate results can be compared. Seeds are not
batched in one program, which would not be faster on CPU, because XLA's batched matmuls are slow
there; processes with different `--seeds`, each on cores of its own, can share a directory. The same
command resumes an interrupted study.

After every run, these files in runs/studies/<study> are updated:
  table.csv     variant, metric, iqm, lo, hi, seeds: interquartile means with 95 % intervals
  table.md      main metric, its ratio to that of the first variant, probability of improvement, and
                provenance
  study.png     means with intervals, and performance profiles
  <variant>/<seed>/result.json    metrics, commit, hardware and times of a run
"""

from collections.abc import Mapping, Sequence
import csv
import functools
import json
import pathlib
import sys
import types
from typing import Any

from absl import flags
import numpy as np

from mmrl_jax import config as config_lib
from mmrl_jax import problems, runs
from mmrl_jax.commands.common import (
    EXIT_INTERRUPTED,
    FAILURES,
    clean_exit,
    refuse_arguments,
    run_command,
)
from mmrl_jax.distributed import multihost
from mmrl_jax.evaluation import statistics
from mmrl_jax.reporting import report
from mmrl_jax.reporting import summary as summary_lib
from mmrl_jax.training.provenance import commit, hardware

FLAGS = flags.FLAGS
RESULT = "result.json"
# Keys of a result that are not metrics.
PROVENANCE = ("commit", "hardware")
# Metrics of an evaluation that become part of a result.
REPORTED = ("success", "return", "accuracy", "shuffled_image/accuracy", "invalid_fraction")

# Contents of result.json by variant and seed.
Results = dict[str, dict[int, dict[str, Any]]]


def load_study(spec: str) -> types.ModuleType:
    """Loads the module of a study.

    Args:
      spec: Path of the file, or 'path:argument', whose argument is bound to `get_config`.

    Raises:
      ValueError: If the file does not exist or is not a study.
    """
    path, _, argument = spec.partition(":")
    module = config_lib.load_module(pathlib.Path(path))
    for name in ("VARIANTS", "SEEDS", "MAIN"):
        if not hasattr(module, name):
            raise ValueError(f"{path} has no {name}: a study needs VARIANTS, SEEDS and MAIN.")
    if argument:
        module.get_config = functools.partial(module.get_config, argument)
    return module


def chosen_seeds(texts: Sequence[str] | None, count: int) -> Sequence[int]:
    """Returns the seeds to run.

    Args:
      texts: Seeds as text, from the command line; None or empty for all of the study.
      count: Number of seeds of the study, which are those from 0 to `count` - 1.

    Raises:
      ValueError: If a text is no seed of the study.
    """
    if not texts:
        return range(count)
    for text in texts:
        if text not in map(str, range(count)):
            raise ValueError(
                f"--seeds has {text!r}, but the seeds of the study are 0 to {count - 1}."
            )
    return [int(text) for text in texts]


def run(
    study: types.ModuleType, workdir: pathlib.Path, variants: Sequence[str], seeds: Sequence[int]
) -> bool:
    """Executes the missing runs of a study, and writes the tables after each.

    Args:
      study: Module of the study.
      workdir: Directory of the study.
      variants: Names of the variants to run.
      seeds: Seeds to run.

    Returns:
      False if a signal interrupted a run.
    """
    every = [(seed, variant) for seed in seeds for variant in variants]
    missing = [
        (seed, variant)
        for seed, variant in every
        if not (workdir / variant / str(seed) / RESULT).is_file()
    ]
    # A network file system may show the other processes an older state.
    missing = [every[i] for i in multihost.from_primary([every.index(x) for x in missing])]
    for seed, variant in missing:
        print(f"{variant}, seed {seed}", flush=True)
        directory = workdir / variant / str(seed)
        runner = getattr(study, "RUNNERS", {}).get(variant, run_one)
        result = runner(study.get_config(variant), seed, directory)
        if result is None:
            return False
        if multihost.is_primary():
            summary_lib.write_json(directory / RESULT, result)
            write_tables(load_results(workdir), study, workdir)
    # Existing tables may be from another version of the study.
    if not missing and multihost.is_primary():
        write_tables(load_results(workdir), study, workdir)
    return True


def run_one(config: Any, seed: int, workdir: pathlib.Path) -> dict[str, Any] | None:
    """Trains a policy and evaluates it on every split.

    Args:
      config: Config of the run.
      seed: Seed of the run.
      workdir: Working directory of the run.

    Returns:
      Metrics, times and provenance, the times in process 0 only; None if a signal interrupted the
      run.
    """
    config.seed = seed
    trained = runs.train(config, workdir)
    if trained.interrupted:
        return None
    measure = trained.problem.measure()
    result: dict[str, Any] = {}
    for split in trained.problem.splits:
        evaluated = measure(trained.variables, split)
        for name in REPORTED:
            if name in evaluated:
                result[f"final/{split}/{name}"] = evaluated[name]
    if multihost.is_primary():
        times = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
        result |= {name: times[name] for name in ("wall_s", "compile_s", "env_steps")}
    return result | {"commit": commit(), "hardware": hardware()}


def load_results(workdir: pathlib.Path) -> Results:
    """Returns the results of all finished runs of a study."""
    results: Results = {}
    for path in sorted(workdir.glob(f"*/*/{RESULT}")):
        variant, seed = path.parent.parent.name, int(path.parent.name)
        results.setdefault(variant, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
    return results


def write_tables(results: Results, study: types.ModuleType, workdir: pathlib.Path) -> None:
    """Writes table.csv, table.md and study.png.

    Args:
      results: Results of all finished runs.
      study: Module of the study.
      workdir: Directory of the study.

    Raises:
      ValueError: If a run has no value of the main metric.
    """
    variants = [variant for variant in study.VARIANTS if variant in results]
    rows = [
        (variant, metric, *interval(values), len(values))
        for variant in variants
        for metric, values in metrics(results[variant]).items()
    ]
    with (workdir / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("variant", "metric", "iqm", "lo", "hi", "seeds"))
        writer.writerows(rows)
    missing = [
        f"{variant}/{seed}"
        for variant in variants
        for seed, run in results[variant].items()
        if run.get(study.MAIN) is None
    ]
    if missing:
        raise ValueError(
            f"The runs {', '.join(missing)} of {workdir} have no value of {study.MAIN}: find the "
            f"reason in their output, fix it, and delete their {RESULT} so that they are run again."
        )
    main = {variant: metrics(results[variant])[study.MAIN] for variant in variants}
    command = " ".join(["python -m experiments.study", *sys.argv[1:]])
    text = markdown(main, results, study.MAIN, command=command)
    (workdir / "table.md").write_text(text, encoding="utf-8")
    report.study_figure(
        {variant: interval(values) for variant, values in main.items()},
        main,
        workdir / "study.png",
        metric=study.MAIN,
    )


def metrics(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Returns the values of each metric, one for each seed.

    Metrics for which a seed has no value (null) are left out.
    """
    first = next(iter(runs.values()))
    names = [
        name
        for name in first
        if name not in PROVENANCE and all(run.get(name) is not None for run in runs.values())
    ]
    return {name: [float(run[name]) for run in runs.values()] for name in names}


def interval(values: Sequence[float]) -> statistics.Interval:
    """Returns the IQM over the seeds with its 95 % interval."""
    scores = np.asarray(values)[:, None]
    return statistics.stratified_bootstrap_interval(
        scores, confidence=0.95, resamples=10_000, seed=0
    )


def markdown(
    main: Mapping[str, Sequence[float]], results: Results, metric: str, *, command: str
) -> str:
    """Returns the table of the main metric in Markdown, with its provenance.

    Args:
      main: Values of the main metric, one for each seed, by variant.
      results: Results of all finished runs.
      metric: Name of the main metric.
      command: Command that produced the results.
    """
    first = next(iter(main))
    lines = [
        f"| variant | {metric}, IQM [95 %] | ratio to {first} | better than {first} | seeds | "
        "minutes per run |",
        "|---|---|---|---|---|---|",
    ]
    for variant, values in main.items():
        comparisons = ["-", "-"]
        if variant != first:
            comparisons = [
                "{:.2f} [{:.2f}, {:.2f}]".format(
                    *compare(values, main[first], confidence=0.95, resamples=10_000, seed=0)
                )
                for compare in (statistics.ratio_of_iqms, statistics.probability_of_improvement)
            ]
        minutes = np.median([run["wall_s"] for run in results[variant].values()]) / 60
        lines.append(
            "| {} | {:.4g} [{:.4g}, {:.4g}] | {} | {} | {} | {:.1f} |".format(
                variant, *interval(values), *comparisons, len(values), minutes
            )
        )
    all_runs = [run for runs in results.values() for run in runs.values()]
    values_of = {name: ", ".join(sorted({run[name] for run in all_runs})) for name in PROVENANCE}
    hours = sum(run["wall_s"] for run in all_runs) / 3600
    lines.append(
        f"\n`{command}`; commit {values_of['commit']}; {values_of['hardware']}; {hours:.1f} hours "
        "of runs."
    )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Runs the command line."""
    refuse_arguments(argv)
    file, _, argument = FLAGS.study.partition(":")
    name = "_".join(filter(None, (pathlib.Path(file).stem, argument)))
    workdir = pathlib.Path(FLAGS.directory) / name
    with clean_exit(ValueError, multihost.OtherProcessFailed):
        study = load_study(FLAGS.study)
        seeds = chosen_seeds(FLAGS.seeds, study.SEEDS)
        variants = FLAGS.variants or list(study.VARIANTS)
        for variant in variants:
            if variant not in study.VARIANTS:
                raise ValueError(
                    f"--variants has {variant!r}, but {FLAGS.study} has {list(study.VARIANTS)}."
                )
            multihost.on_all(lambda variant=variant: problems.make(study.get_config(variant)))
    with clean_exit(ValueError, *FAILURES):
        finished = run(study, workdir, variants, seeds)
    if multihost.is_primary():
        if finished:
            print((workdir / "table.md").read_text(encoding="utf-8"))
            print(f"Wrote {workdir}/table.csv, table.md, study.png")
        else:
            print("Interrupted; the same command resumes from the last checkpoint.")
    return 0 if finished else EXIT_INTERRUPTED


if __name__ == "__main__":
    flags.DEFINE_string("study", None, "Path of the study, or path:argument.", required=True)
    flags.DEFINE_list("variants", None, "Variants to run; by default all.")
    flags.DEFINE_list("seeds", None, "Seeds to run, from 0 on; by default all.")
    flags.DEFINE_string("directory", "runs/studies", "Parent of the study's directory.")
    run_command(main, processes=True)
