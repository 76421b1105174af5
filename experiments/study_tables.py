"""Tables of recorded studies and benchmarks, which `write_docs` inserts into the documentation."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import json
import pathlib

import numpy as np

from experiments import benchmark, large_models
from experiments import study as study_lib
from mmrl_jax.evaluation.statistics import Interval

RESULTS = pathlib.Path(__file__).parent / "results"
STUDIES = RESULTS / "studies"


@dataclasses.dataclass(frozen=True)
class Study:
    """Recorded runs of a study.

    Attributes:
      results: Contents of result.json by variant and seed.
    """

    results: study_lib.Results

    def interval(self, variant: str, *names: str) -> Interval | None:
        """Returns the IQM of a metric with its 95 % interval.

        Args:
          variant: Name of the variant.
          *names: Current name of the metric, then its names in rows of earlier versions.

        Returns:
          (IQM, low, high); None if the variant or the metric has no results.
        """
        metrics = study_lib.metrics(self.results[variant]) if variant in self.results else {}
        known = [name for name in names if name in metrics]
        return study_lib.interval(metrics[known[0]]) if known else None

    def cell(self, variant: str, *names: str) -> str:
        """Returns `interval` as text for a cell of a table."""
        interval = self.interval(variant, *names)
        return "-" if interval is None else "{:.3f} [{:.3f}, {:.3f}]".format(*interval)

    def difference(self, variant: str, name: str, other: str) -> str:
        """Returns the IQM over the seeds of a metric minus another one, as text for a cell."""
        runs = self.results[variant].values()
        values = [run[name] - run[other] for run in runs]
        return "{:.3f} [{:.3f}, {:.3f}]".format(*study_lib.interval(values))

    def minutes(self, variant: str, *, statistic: str = "median") -> str:
        """Returns the duration of a run in minutes: the 'median' or the 'iqm' over the seeds."""
        seconds = [float(run["wall_s"]) for run in self.results[variant].values()]
        value = study_lib.interval(seconds)[0] if statistic == "iqm" else np.median(seconds)
        return f"{value / 60:.1f}"

    def variants(self, labels: Mapping[str, str]) -> Iterable[tuple[str, str]]:
        """Yields (variant, label) of variants with results, those with labels first."""
        for variant in (*labels, *sorted(set(self.results) - set(labels))):
            if variant in self.results:
                yield variant, labels.get(variant, f"`{variant}`")


@functools.cache
def load(name: str) -> Study:
    """Returns the recorded study `name` in experiments/results/studies."""
    return Study(study_lib.load_results(STUDIES / name))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    ruler = "|" + "---|" * len(header)
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], ruler, *lines[1:]]) + "\n"


def quickstart() -> str:
    """Returns a table of the success rates of the quickstart on every split."""
    runs = load("quickstart")
    splits = (
        "train",
        "heldout_colour_shape",
        "heldout_paraphrase",
        "heldout_physics",
        "heldout_camera",
    )
    stages = ("warm_start", "more_cloning", "final")
    rows = []
    for split in splits:
        cells = [runs.cell("reach_ppo", f"{stage}/{split}/success") for stage in stages]
        gap = runs.difference("reach_ppo", "final/train/success", f"final/{split}/success")
        rows.append((f"`{split}`", *cells, "-" if split == splits[0] else gap))
    for modality in ("pixels", "instruction"):
        success = runs.cell(
            "reach_ppo",
            f"final/train/shuffled_{modality}/success",
            f"final/train/no_{modality}/success",
        )
        rows.append((f"`train`, {modality} of another episode", "-", "-", success, "-"))
    header = ("split", "warm start", "more cloning", "after PPO", "below `train`")
    return markdown(header, rows)


def quickstart_seeds() -> str:
    """Returns a table of the success rates of the quickstart with each seed."""
    runs = load("quickstart").results["reach_ppo"]
    rows = [
        (
            str(seed),
            *(
                f"{run[f'{stage}/train/success']:.3f}"
                for stage in ("expert", "warm_start", "more_cloning", "final")
            ),
            f"{run['wall_s'] / 60:.1f}",
        )
        for seed, run in sorted(runs.items())
    ]
    return markdown(("seed", "expert", "warm start", "more cloning", "after PPO", "minutes"), rows)


def count() -> str:
    """Returns a table of the accuracies of the variants of the study `count`."""
    runs = load("count")
    labels = {
        "sft": "`sft`: fine-tuned on labels of one to three, one in ten random",
        "sft_longer": "`sft_longer`: the same for longer than RL takes",
        "grpo": "`grpo`: then GRPO with counts of zero to six",
        "sft_full": "`sft_full`: as many labels of zero to six, all correct",
        "grpo_swapped": "`grpo_swapped`: GRPO with the image of another prompt",
    }
    header = (
        "variant",
        "accuracy, IQM [95 %]",
        "held-out pairs",
        "held-out phrase",
        "shuffled images",
        "seeds",
        "minutes, IQM",
    )
    shuffled = ("final/train/shuffled_image/accuracy", "final/train/blind_accuracy")
    rows = [
        (
            label,
            *(
                runs.cell(variant, f"final/{split}/accuracy")
                for split in ("train", "heldout_pair", "heldout_template")
            ),
            runs.cell(variant, *shuffled),
            str(len(runs.results[variant])),
            runs.minutes(variant, statistic="iqm"),
        )
        for variant, label in runs.variants(labels)
    ]
    return markdown(header, rows)


def grid_agent() -> str:
    """Returns a table of the success rates of the variants of the study `grid_agent`."""
    runs = load("grid_agent")
    labels = {
        "cloned": "`cloned`: before RL",
        "ppo": "`ppo`: after 150 updates of PPO over tokens",
    }
    header = (
        "variant",
        "success, IQM [95 %]",
        "held-out pairs",
        "held-out layouts",
        "seeds",
        "minutes per run",
    )
    rows = [
        (
            label,
            *(
                runs.cell(variant, f"final/{split}/success")
                for split in ("train", "heldout_pair", "heldout_layout")
            ),
            str(len(runs.results[variant])),
            runs.minutes(variant),
        )
        for variant, label in runs.variants(labels)
    ]
    return markdown(header, rows)


# Number of parameters of the network, and millions of floating-point operations per action.
REACH_COST = {
    "baseline": ("160k", "4.67"),
    "no_auxiliary": ("160k", "4.67"),
    "no_warm_start": ("160k", "4.67"),
    "no_film": ("139k", "4.63"),
    "cross_attention": ("160k", "3.29"),
    "late_concatenation": ("175k", "2.33"),
    "minilm": ("182k", "5.30"),
    "pixels_24": ("159k", "3.08"),
}


def reach() -> str:
    """Returns a table of success rates and cost of the variants of the study `reach`."""
    runs = load("reach")
    header = (
        "variant",
        "success, IQM [95 %]",
        "held-out pairs",
        "gap",
        "seeds",
        "parameters",
        "MFLOP",
        "minutes per run",
    )
    train, heldout = "final/train/success", "final/heldout_colour_shape/success"
    rows = []
    for variant, label in runs.variants({name: f"`{name}`" for name in REACH_COST}):
        seen, unseen = runs.interval(variant, train), runs.interval(variant, heldout)
        # The gap is the difference of the rounded values in the table.
        known = seen is not None and unseen is not None
        gap = f"{round(seen[0], 3) - round(unseen[0], 3):.3f}" if known else "-"
        cost = REACH_COST.get(variant, ("-", "-"))
        successes = runs.cell(variant, train), runs.cell(variant, heldout)
        seeds = str(len(runs.results[variant]))
        rows.append((label, *successes, gap, seeds, *cost, runs.minutes(variant)))
    return markdown(header, rows)


def headline() -> str:
    """Returns a table of results before and after reinforcement learning on three problems."""
    main, counting, grid = load("quickstart"), load("count"), load("grid_agent")
    rows = [
        (
            "`language_reach`: success",
            "behavior cloning",
            main.cell("reach_ppo", "warm_start/train/success"),
            "PPO",
            main.cell("reach_ppo", "final/train/success"),
            main.cell("reach_ppo", "final/heldout_colour_shape/success"),
        ),
        (
            "counting objects: accuracy",
            "SFT on some labels",
            counting.cell("sft", "final/train/accuracy"),
            "GRPO",
            counting.cell("grpo", "final/train/accuracy"),
            counting.cell("grpo", "final/heldout_pair/accuracy"),
        ),
        (
            "`language_grid`, actions as text: success",
            "SFT on an expert",
            grid.cell("cloned", "final/train/success"),
            "PPO over tokens",
            grid.cell("ppo", "final/train/success"),
            grid.cell("ppo", "final/heldout_pair/success"),
        ),
    ]
    return markdown(("problem", "start", "before", "RL", "after", "unseen pairs, after"), rows)


def compiled() -> str:
    """Returns the table of the updates of large models that were compiled, see `large_models`."""
    rows = []
    for case in large_models.CASES:
        path = large_models.RESULTS / f"{case.name.replace('/', '-')}.json"
        cells = ("", "not run", "")
        if path.is_file():
            row = json.loads(path.read_text(encoding="utf-8"))
            short = row["needed"] - large_models.CHIP_BYTES / 1e9
            fits = "yes" if short < 0 else f"no, by {short:.1f} GB"
            cells = f"{row['parameters'] / 1e9:.2f}B", f"{row['needed']:.2f} GB", fits
        rows.append((f"`{case.model}`", case.method, case.topology, *cells))
    return markdown(("model", "method", "TPU", "parameters", "memory a chip", "fits"), rows)


def benchmarks() -> str:
    """Returns the table of recorded benchmarks of the speed and the memory."""
    rows = []
    for suite in benchmark.SPEED:
        path = RESULTS / "benchmarks" / f"{suite}.json"
        recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        if not recorded:
            rows.append((f"`{suite}`", "not run", *[""] * 5))
        for row in recorded:
            columns = [row[name] for name in ("ours", "peer")]
            cells = ["-" if x is None else f"{_significant(x)} {row['unit']}" for x in columns]
            ratio = "-" if row["ratio"] is None else f"{row['ratio']:,.2f}"
            rows.append(
                (f"`{suite}`", row["name"], *cells, ratio, str(row["runs"]), row["hardware"])
            )
    header = ("suite", "measured / peer", "ours", "peer", "ratio", "runs", "hardware")
    return markdown(header, rows)


def _significant(x: float) -> str:
    """Returns a number with at least three significant digits, and without an exponent."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


TABLES = {
    "benchmarks": benchmarks,
    "quickstart": quickstart,
    "quickstart_seeds": quickstart_seeds,
    "count": count,
    "grid_agent": grid_agent,
    "reach": reach,
    "headline": headline,
    "compiled": compiled,
}
