"""Tables of recorded studies, which `write_docs` puts into the documents."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import pathlib

import numpy as np

from experiments import study as study_lib
from mmrl_jax.evaluation.statistics import Interval

STUDIES = pathlib.Path(__file__).parent / "results" / "studies"


@dataclasses.dataclass(frozen=True)
class Study:
    """The recorded runs of a study.

    Attributes:
      results: Variant -> seed -> what its result.json holds.
    """

    results: study_lib.Results

    def interval(self, variant: str, *names: str) -> Interval | None:
        """Returns the IQM of a metric with its 95 % interval.

        Args:
          variant: Of the study; None is returned where it has not been run.
          *names: Of the metric: today's first, then those of rows of earlier versions.
        """
        metrics = study_lib.metrics(self.results[variant]) if variant in self.results else {}
        known = [name for name in names if name in metrics]
        return study_lib.interval(metrics[known[0]]) if known else None

    def shown(self, variant: str, *names: str) -> str:
        """Returns `interval` as a cell of a table."""
        interval = self.interval(variant, *names)
        return "-" if interval is None else "{:.3f} [{:.3f}, {:.3f}]".format(*interval)

    def minutes(self, variant: str, *, statistic: str = "median") -> str:
        """Returns the minutes of a run: the median over the seeds, or the interquartile mean."""
        seconds = [float(run["wall_s"]) for run in self.results[variant].values()]
        chosen = study_lib.interval(seconds)[0] if statistic == "iqm" else np.median(seconds)
        return f"{chosen / 60:.1f}"

    def variants(self, labels: Mapping[str, str]) -> Iterable[tuple[str, str]]:
        """Yields (variant, label) of what has been run: those with labels first, in their order."""
        for variant in (*labels, *sorted(set(self.results) - set(labels))):
            if variant in self.results:
                yield variant, labels.get(variant, f"`{variant}`")


@functools.cache
def load(name: str) -> Study:
    """Returns a study in experiments/results/studies."""
    return Study(study_lib.load_results(STUDIES / name))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    ruler = "|" + "---|" * len(header)
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], ruler, *lines[1:]]) + "\n"


def quickstart() -> str:
    """Success of the main job on every split."""
    runs = load("quickstart")
    splits = (
        "train",
        "heldout_colour_shape",
        "heldout_paraphrase",
        "heldout_physics",
        "heldout_camera",
    )
    rows = [
        (f"`{split}`", *(runs.shown("reach_ppo", f"{stage}/{split}/success") for stage in stages))
        for split in splits
        for stages in [("warm_start", "more_cloning", "final")]
    ]
    for modality in ("pixels", "instruction"):
        success = runs.shown(
            "reach_ppo",
            f"final/train/shuffled_{modality}/success",
            f"final/train/no_{modality}/success",
        )
        rows.append((f"`train`, {modality} of another episode", "-", "-", success))
    return markdown(("split", "warm start", "more cloning", "after PPO"), rows)


def count() -> str:
    """Accuracy of the variants of study `count`."""
    runs = load("count")
    labels = {
        "sft": "`sft`: fine-tuned on labels of one to three, one in ten wrong",
        "sft_longer": "`sft_longer`: the same for longer than RL takes",
        "grpo": "`grpo`: then GRPO on rewards of zero to six",
        "sft_full": "`sft_full`: as many labels of zero to six, all right",
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
                runs.shown(variant, f"final/{split}/accuracy")
                for split in ("train", "heldout_pair", "heldout_template")
            ),
            runs.shown(variant, *shuffled),
            str(len(runs.results[variant])),
            runs.minutes(variant, statistic="iqm"),
        )
        for variant, label in runs.variants(labels)
    ]
    return markdown(header, rows)


def grid_agent() -> str:
    """Success of the variants of study `grid_agent`."""
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
        "minutes a run",
    )
    rows = [
        (
            label,
            *(
                runs.shown(variant, f"final/{split}/success")
                for split in ("train", "heldout_pair", "heldout_layout")
            ),
            str(len(runs.results[variant])),
            runs.minutes(variant),
        )
        for variant, label in runs.variants(labels)
    ]
    return markdown(header, rows)


# Parameters of the network, and the floating-point operations of a decision, in millions.
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
    """Success and cost of the variants of study `reach`."""
    runs = load("reach")
    header = (
        "variant",
        "success, IQM [95 %]",
        "held-out pairs",
        "gap",
        "seeds",
        "parameters",
        "MFLOP",
        "minutes a run",
    )
    train, heldout = "final/train/success", "final/heldout_colour_shape/success"
    rows = []
    for variant, label in runs.variants({name: f"`{name}`" for name in REACH_COST}):
        seen, unseen = runs.interval(variant, train), runs.interval(variant, heldout)
        # Of the numbers that the table shows.
        known = seen is not None and unseen is not None
        gap = f"{round(seen[0], 3) - round(unseen[0], 3):.3f}" if known else "-"
        cost = REACH_COST.get(variant, ("-", "-"))
        successes = runs.shown(variant, train), runs.shown(variant, heldout)
        seeds = str(len(runs.results[variant]))
        rows.append((label, *successes, gap, seeds, *cost, runs.minutes(variant)))
    return markdown(header, rows)


def headline() -> str:
    """What reinforcement learning adds to what it begins with, on three problems."""
    main, counting, grid = load("quickstart"), load("count"), load("grid_agent")
    rows = [
        (
            "`language_reach`: success",
            "behavior cloning",
            main.shown("reach_ppo", "warm_start/train/success"),
            "PPO",
            main.shown("reach_ppo", "final/train/success"),
            main.shown("reach_ppo", "final/heldout_colour_shape/success"),
        ),
        (
            "counting objects: accuracy",
            "SFT on some labels",
            counting.shown("sft", "final/train/accuracy"),
            "GRPO",
            counting.shown("grpo", "final/train/accuracy"),
            counting.shown("grpo", "final/heldout_pair/accuracy"),
        ),
        (
            "`language_grid`, actions as text: success",
            "SFT on an expert",
            grid.shown("cloned", "final/train/success"),
            "PPO over tokens",
            grid.shown("ppo", "final/train/success"),
            grid.shown("ppo", "final/heldout_pair/success"),
        ),
    ]
    return markdown(("problem", "start", "before", "RL", "after", "unseen pairs, after"), rows)


TABLES = {
    "quickstart": quickstart,
    "count": count,
    "grid_agent": grid_agent,
    "reach": reach,
    "headline": headline,
}
