"""Compares the speed with that of peers: medians of alternating runs, without compilation.

One suite compares accuracies instead.

  python -m experiments.benchmark --suite=render [--runs=7]

Prints a table and writes runs/benchmarks/<suite>.json: a list of rows
{name, ours, peer, ratio, unit, runs, hardware}. `--suite=all` runs all suites of the speed, one
after another. Suites:

  ppo_vs_brax   PPO updates with flat observations, compared with Brax's PPO
  render        frames of the reach scene, compared with MuJoCo's software renderer
  model         gradients of the policy network, compared with its matmuls and with naive Flax
  loop          the time of each part of an update of reach_ppo
  generate      greedy tokens of SmolLM2-135M, compared with transformers' generate in torch
  logprobs      token log-probs by tiles of the vocabulary, compared with a full softmax
  grpo          GRPO updates of text-only models, compared with TRL's GRPOTrainer in torch
  packing       gradients of packed completions, compared with padded completions
  compaction    sampling that leaves out completions that have ended, compared with sampling all
  one_step_off_policy  updates that sample while reward functions score, compared with waiting
  dinov2_probe  accuracy of linear probes of DINOv2-small, compared with random weights
"""

from collections.abc import Iterator
import dataclasses
import importlib
import json
import pathlib

from absl import app, flags, logging

from experiments.benchmarks.harness import Row

FLAGS = flags.FLAGS
SPEED = (
    "ppo_vs_brax",
    "render",
    "model",
    "loop",
    "generate",
    "logprobs",
    "grpo",
    "packing",
    "compaction",
    "one_step_off_policy",
)
SUITES = (*SPEED, "dinov2_probe")


def benchmark(suite: str, directory: pathlib.Path, *, runs: int) -> list[Row]:
    """Runs a suite, and prints and writes each row as soon as it is measured.

    Args:
      suite: Name of the suite, one of SUITES.
      directory: Directory in which <suite>.json is written.
      runs: Number of measurements of each side.
    """
    module = importlib.import_module(f"experiments.benchmarks.{suite}")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{suite}.json"
    rows: list[Row] = []
    print(f"{'':44} {'ours':>12} {'peer':>12} {'ratio':>7}  unit")
    for row in _rows(suite, module.rows(runs)):
        rows.append(row)
        peer = "-" if row.peer is None else f"{row.peer:,.4g}"
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        print(f"{row.name:44} {row.ours:12,.4g} {peer:>12} {ratio:>7}  {row.unit}", flush=True)
        path.write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=2) + "\n")
    print(f"Medians of {runs} runs on {rows[0].hardware}. Wrote {path}")
    return rows


def _rows(suite: str, rows: Iterator[Row]) -> Iterator[Row]:
    """Yields the rows of a suite, which imports the libraries of its peer for the first row."""
    try:
        yield from rows
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"--suite={suite} needs {error.name}, which is not installed: run `make setup-parity`, "
            "or install mmrl_jax with its extra: pip install -e '.[parity]'."
        ) from error


def main(argv: list[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}.")
    for suite in SPEED if FLAGS.suite == "all" else (FLAGS.suite,):
        benchmark(suite, pathlib.Path(FLAGS.directory), runs=FLAGS.runs)


if __name__ == "__main__":
    flags.DEFINE_enum(
        "suite",
        None,
        ("all", *SUITES),
        "Suite to run; 'all' for every one that measures speed, one after another.",
        required=True,
    )
    flags.DEFINE_integer("runs", 7, "Number of measurements of each side.", lower_bound=1)
    flags.DEFINE_string("directory", "runs/benchmarks", "Directory of <suite>.json.")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
