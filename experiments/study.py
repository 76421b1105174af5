"""Evidence: variants of a config over several seeds, with confidence intervals.

  python -m experiments.study --study=experiments/studies/reach.py [--variants=baseline,no_film]
  python -m experiments.study --study=experiments/studies/vs_brax.py:reacher

A study is a config file that takes a variant's name, with VARIANTS, SEEDS and MAIN, the metric that
the variants are compared by; RUNNERS may name what makes a variant's runs instead of `run_one`, as
a peer's trainer does. What follows a colon goes to its `get_config` too, and into the name of its
folder. Its runs go one after another, seed by seed, so that whatever has been
done so far can be compared; on CPU, seeds side by side in one program are no faster, for XLA's
batched matmuls are slow there. The same command goes on where it was stopped, days later too.

Writes to runs/studies/<study>, anew after every run:
  table.csv     variant, metric, iqm, lo, hi, seeds: interquartile means with 95 % intervals
  table.md      the main metric, the ratio of a variant's to the first's, how likely the variant is
                better, and what produced it
  study.png     means with intervals, and the performance profiles
  <variant>/<seed>/result.json    the metrics of a run, its commit, hardware and times
"""

from collections.abc import Mapping, Sequence
import csv
import functools
import json
import pathlib
import sys
import types
from typing import Any

from absl import app, flags, logging
import numpy as np

from mmrl_jax import config as config_lib
from mmrl_jax import problems, runs
from mmrl_jax.commands.common import FAILURES, clean_exit, refuse_arguments
from mmrl_jax.evaluation import statistics
from mmrl_jax.reporting import report
from mmrl_jax.training.provenance import commit, hardware

FLAGS = flags.FLAGS
RESULT = "result.json"
# Of a result, what is no metric.
PROVENANCE = ("commit", "hardware")
# Of an evaluation, what goes into a result.
REPORTED = ("success", "return", "accuracy", "shuffled_image/accuracy", "invalid_fraction")

# Variant -> seed -> what its result.json holds.
Results = dict[str, dict[int, dict[str, Any]]]


def load_study(spec: str) -> types.ModuleType:
    """The module of a study, 'file' or 'file:argument'; its `get_config` takes a variant alone.

    Raises:
      ValueError: no such file, or it is no study.
    """
    path, _, argument = spec.partition(":")
    module = config_lib.load_module(pathlib.Path(path))
    for name in ("VARIANTS", "SEEDS", "MAIN"):
        if not hasattr(module, name):
            raise ValueError(f"{path} has no {name}: a study needs VARIANTS, SEEDS and MAIN.")
    if argument:
        module.get_config = functools.partial(module.get_config, argument)
    return module


def run(
    study: types.ModuleType, workdir: pathlib.Path, variants: Sequence[str], seeds: Sequence[int]
) -> bool:
    """Does the runs that are missing, and writes the tables after each; False if interrupted."""
    missing = [
        (seed, variant)
        for seed in seeds
        for variant in variants
        if not (workdir / variant / str(seed) / RESULT).is_file()
    ]
    for seed, variant in missing:
        print(f"{variant}, seed {seed}", flush=True)
        place = workdir / variant / str(seed)
        runner = getattr(study, "RUNNERS", {}).get(variant, run_one)
        result = runner(study.get_config(variant), seed, place)
        if result is None:
            return False
        runs.write_json(place / RESULT, result)
        write_tables(load_results(workdir), study, workdir)
    if not missing:  # The tables of another version of the study may lie there.
        write_tables(load_results(workdir), study, workdir)
    return True


def run_one(config: Any, seed: int, workdir: pathlib.Path) -> dict[str, Any] | None:
    """Trains and evaluates on every split; None if a signal came first."""
    config.seed = seed
    trained = runs.train(config, workdir)
    if trained.interrupted:
        return None
    measure = trained.problem.measure()
    result: dict[str, Any] = {}
    for split in trained.problem.splits:
        described = measure(trained.variables, split)
        for name in REPORTED:
            if name in described:
                result[f"final/{split}/{name}"] = described[name]
    times = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    result |= {name: times[name] for name in ("wall_s", "compile_s", "env_steps")}
    return result | {"commit": commit(), "hardware": hardware()}


def load_results(workdir: pathlib.Path) -> Results:
    """All results there are."""
    results: Results = {}
    for path in sorted(workdir.glob(f"*/*/{RESULT}")):
        variant, seed = path.parent.parent.name, int(path.parent.name)
        results.setdefault(variant, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
    return results


def write_tables(results: Results, study: types.ModuleType, workdir: pathlib.Path) -> None:
    """Writes table.csv, table.md and study.png of the results."""
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
    lacking = [
        f"{variant}/{seed}"
        for variant in variants
        for seed, run in results[variant].items()
        if run.get(study.MAIN) is None
    ]
    if lacking:
        raise ValueError(
            f"The runs {', '.join(lacking)} of {workdir} have no number for {study.MAIN}: see why "
            f"in their output, mend it, and delete their {RESULT} so that they are run again."
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
    """Metric -> one value a seed; without metrics that a seed has no number for (null)."""
    first = next(iter(runs.values()))
    names = [
        name
        for name in first
        if name not in PROVENANCE and all(run.get(name) is not None for run in runs.values())
    ]
    return {name: [float(run[name]) for run in runs.values()] for name in names}


def interval(values: Sequence[float]) -> statistics.Interval:
    """IQM over the seeds with its 95 % interval."""
    scores = np.asarray(values)[:, None]
    return statistics.stratified_bootstrap_interval(
        scores, confidence=0.95, resamples=10_000, seed=0
    )


def markdown(
    main: Mapping[str, Sequence[float]], results: Results, metric: str, *, command: str
) -> str:
    """The table of the main metric, and what produced it."""
    first = next(iter(main))
    lines = [
        f"| variant | {metric}, IQM [95 %] | ratio to {first} | better than {first} | seeds | "
        "minutes a run |",
        "|---|---|---|---|---|---|",
    ]
    for variant, values in main.items():
        against = ["-", "-"]
        if variant != first:
            against = [
                "{:.2f} [{:.2f}, {:.2f}]".format(
                    *compare(values, main[first], confidence=0.95, resamples=10_000, seed=0)
                )
                for compare in (statistics.ratio_of_iqms, statistics.probability_of_improvement)
            ]
        minutes = np.median([run["wall_s"] for run in results[variant].values()]) / 60
        lines.append(
            "| {} | {:.4g} [{:.4g}, {:.4g}] | {} | {} | {} | {:.1f} |".format(
                variant, *interval(values), *against, len(values), minutes
            )
        )
    every = [run for runs in results.values() for run in runs.values()]
    made = {name: ", ".join(sorted({run[name] for run in every})) for name in PROVENANCE}
    hours = sum(run["wall_s"] for run in every) / 3600
    lines.append(
        f"\n`{command}`; commit {made['commit']}; {made['hardware']}; {hours:.1f} hours of runs."
    )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """Runs the command line."""
    refuse_arguments(argv)
    file, _, argument = FLAGS.study.partition(":")
    name = "_".join(filter(None, (pathlib.Path(file).stem, argument)))
    workdir = pathlib.Path(FLAGS.directory) / name
    with clean_exit(ValueError):
        study = load_study(FLAGS.study)
        variants = FLAGS.variants or list(study.VARIANTS)
        for variant in variants:
            if variant not in study.VARIANTS:
                raise ValueError(
                    f"--variants has {variant!r}, but {FLAGS.study} has {list(study.VARIANTS)}."
                )
            problems.make(study.get_config(variant))
    with clean_exit(ValueError, *FAILURES):
        finished = run(study, workdir, variants, range(study.SEEDS))
    if not finished:
        print("Interrupted; the same command resumes from the last checkpoint.")
        return
    print((workdir / "table.md").read_text(encoding="utf-8"))
    print(f"Written: {workdir}/table.csv, table.md, study.png")


if __name__ == "__main__":
    flags.DEFINE_string("study", None, "File of the study[:argument].", required=True)
    flags.DEFINE_list("variants", None, "Variants to run; by default all.")
    flags.DEFINE_string("directory", "runs/studies", "Directory that gets a folder a study.")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
