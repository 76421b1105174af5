"""Writes the parts of the documentation that are derived from the code and from recorded results.

  python -m experiments.write_docs

Writes, in the checkout that it lies in:
  docs/metrics.md         every metric, from mmrl_jax/monitoring/metric_definitions.py
  docs/configuration.md   every key of a config, from the dataclasses that define them
  docs/results.md, README.md   the tables between `<!-- table: <name> -->` and `<!-- /table -->`,
                          from the rows in experiments/results/studies
"""

import ast
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import pathlib
import re
from typing import Any

from absl import app
import numpy as np

from experiments import study as study_lib
from mmrl_jax import problems
from mmrl_jax.commands.common import refuse_arguments
from mmrl_jax.config import loading, schema
from mmrl_jax.config.options import Option, options_of
from mmrl_jax.evaluation.statistics import Interval
from mmrl_jax.learners import registry
from mmrl_jax.monitoring import metric_definitions
from mmrl_jax.problems import control_models, token_models
from mmrl_jax.problems.task import UserTaskOptions

ROOT = pathlib.Path(__file__).parent.parent
STUDIES = ROOT / "experiments" / "results" / "studies"
# What is written beside the README.
WRITTEN = ("docs/metrics.md", "docs/configuration.md", "docs/results.md")
NOTE = "<!-- Written by `python -m experiments.write_docs`; do not edit. -->\n\n"

METRICS = """# Metrics

Every metric that a run logs has a row here; a name that has none cannot be logged. A part in angle
brackets, as in `eval/<split>/success`, stands for one part of a name. `metrics.jsonl` and
TensorBoard use these names, and `learning_curves.png` draws the most important ones.

"""

RENAMED = """
## Renamed metrics

Logs of earlier versions hold some metrics under other names. They are read under today's.

"""

CONFIGURATION = """# Configuration

A config is a Python file with a function `get_config()` that returns what differs from the
defaults; `mmrl_jax.problems.complete` adds the rest. The command line changes single keys:

```
python -m experiments.train --config=reach_ppo --workdir=runs/reach --config.ppo.clip=0.1
python -m experiments.train --config=reach_ppo --help
```

The second command prints the keys of one config with their values. An unknown key, a wrong type or
an impossible value is an error that names the key, the value and the remedy. Which keys a config
has depends on three of its keys: `problem`, `stages` and `model.kind`. A group of keys belongs to
each stage and has its name. In the tables, `required` marks a key that has no default.

"""


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


# -- Tables of studies -----------------------------------------------------------------------------


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


def with_tables(text: str) -> str:
    """Returns a document with its tables written anew.

    Raises:
      ValueError: It names an unknown table, or does not end one.
    """
    begins = len(re.findall(r"<!-- table: ", text))
    pattern = r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)"

    def written(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"There is no table {name!r}; there are {', '.join(TABLES)}.")
        return f"{begin}{TABLES[name]()}{end}"

    text, count = re.subn(pattern, written, text, flags=re.DOTALL)
    if count != begins:
        raise ValueError(f"{begins} tables begin, but {count} end by '<!-- /table -->'.")
    return text


# -- Metrics ---------------------------------------------------------------------------------------


def metrics() -> str:
    """Returns docs/metrics.md."""
    renamed = [(f"`{old}`", f"`{new}`") for old, new in metric_definitions.RENAMED.items()]
    return (
        f"{NOTE}{METRICS}{metric_definitions.glossary_markdown()}"
        f"{RENAMED}{markdown(('earlier name', 'name'), renamed)}"
    )


# -- Configuration ---------------------------------------------------------------------------------

Rows = dict[str, tuple[str, str, str, str]]  # Key -> type, default, valid values, help.


def rows_of(group: Mapping[str, Any], prefix: str = "") -> Rows:
    """Returns the keys of a group, as cells of a table."""
    return {
        f"{prefix}{name}": _cells(option) for name, option in schema.flatten_group(group).items()
    }


def _cells(option: Option) -> tuple[str, str, str, str]:
    missing = option.default is dataclasses.MISSING
    default = "required" if missing else f"`{option.default!r}`"
    valid = "" if option.valid is None else option.valid.requirement
    # The types and the values of a Literal annotation say the same.
    return schema.kind_name(option), default, valid.replace("'", "`"), option.help


def table(rows: Rows) -> str:
    """Returns keys as a table."""
    header = ("key", "type", "default", "valid values", "meaning")
    cells = [
        tuple(cell.replace("|", r"\|") for cell in (f"`{key}`", *row)) for key, row in rows.items()
    ]
    return markdown(header, cells)


def shared(tables: Sequence[Rows]) -> Rows:
    """Returns the rows that all of several tables have."""
    first, *others = tables
    return {key: row for key, row in first.items() if all(t.get(key) == row for t in others)}


def without(rows: Rows, *others: Rows) -> Rows:
    """Returns the rows that none of the other tables has."""
    return {key: row for key, row in rows.items() if all(t.get(key) != row for t in others)}


@dataclasses.dataclass(frozen=True)
class Policies:
    """The problems of one kind of policy.

    Attributes:
      title: Of the section.
      problems: Names of the problems.
      algorithms: Names of the algorithms that may be stages.
      models: Name of a kind of model -> its dataclass.
    """

    title: str
    problems: tuple[str, ...]
    algorithms: tuple[str, ...]
    models: Mapping[str, type]

    def options(self, problem: str, stage: str, model: str | None = None) -> dict[str, Any] | None:
        """Returns the keys of a config with one stage; None if the problem has no such stage."""
        config: dict[str, Any] = {"problem": problem, "stages": (stage,)}
        if model is not None:
            config["model"] = {"kind": model}
        try:
            return dict(problems.options(config))
        except ValueError:
            return None


POLICIES = (
    Policies("Control policies", ("control",), tuple(registry.CONTROL), control_models.MODELS),
    Policies(
        "Token policies",
        tuple(name for name in problems.KINDS if name != "control"),
        tuple(registry.TOKEN),
        token_models.MODELS,
    ),
)


def problem_rows(policies: Policies, problem: str) -> Rows:
    """Returns the keys of a problem that belong neither to its model nor to a stage."""
    for stage in policies.algorithms:
        if (options := policies.options(problem, stage)) is not None:
            return rows_of({key: x for key, x in options.items() if key not in ("model", stage)})
    raise ValueError(f"The problem {problem!r} has no stage.")


def stage_rows(policies: Policies) -> dict[str, dict[str, Rows]]:
    """Returns stage -> problem -> the keys of its group."""
    tables: dict[str, dict[str, Rows]] = {}
    for stage in policies.algorithms:
        for problem in policies.problems:
            if (options := policies.options(problem, stage)) is not None:
                tables.setdefault(stage, {})[problem] = rows_of(options[stage])
    return tables


def default_kind(policies: Policies) -> str:
    """Returns the kind of model of a config that names none."""
    for stage in policies.algorithms:
        if (options := policies.options(policies.problems[0], stage)) is not None:
            return options["model"]["kind"].default
    raise ValueError(f"The problem {policies.problems[0]!r} has no stage.")


def summaries() -> str:
    """Returns the public configs with the first sentence of each."""
    rows = []
    for path in sorted(loading.PUBLIC.glob("[a-z]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        link = f"[{path.stem}](../{path.resolve().relative_to(ROOT.resolve())})"
        rows.append((link, docstring.partition("\n")[0]))
    return markdown(("config", "what it does"), rows)


def configuration() -> str:
    """Returns docs/configuration.md."""
    own = {name: problem_rows(p, name) for p in POLICIES for name in p.problems}
    of_all = shared(list(own.values()))
    stages = {p.title: stage_rows(p) for p in POLICIES}
    every = [
        rows for by_stage in stages.values() for each in by_stage.values() for rows in each.values()
    ]
    of_stages = shared(every)
    parts = [NOTE, CONFIGURATION, "## Public configs\n\n"]
    parts += ["The docstring of each says its command, hardware, time and result.\n\n", summaries()]
    parts += ["\n## Keys of every config\n\n", table(of_all)]
    parts += ["\n## Keys of every stage\n\nThe group of a stage has the name of its algorithm.\n\n"]
    parts.append(table({f"<stage>.{key}": row for key, row in of_stages.items()}))
    for policies in POLICIES:
        parts.append(f"\n## {policies.title}\n")
        for name in policies.problems:
            rows = without(own[name], of_all)
            parts.append(f"\n### Problem `{name}`\n\n{table(rows)}")
            if name == "task":
                mine = rows_of(options_of(UserTaskOptions), "task.")
                parts.append(f"\nFor a task of your own, the group `task` has:\n\n{table(mine)}")
        for kind, options in policies.models.items():
            first = (options.__doc__ or "").partition("\n")[0]
            rows = rows_of(options_of(options), "model.")
            del rows["model.kind"]  # The title says it.
            title = f"`model.kind='{kind}'`" + (
                ", the default" if kind == default_kind(policies) else ""
            )
            parts.append(f"\n### {title}\n\n{first}\n\n{table(rows)}")
        for stage, by_problem in stages[policies.title].items():
            common = shared(list(by_problem.values()))
            names = ", ".join(f"`{name}`" for name in by_problem)
            parts.append(f"\n### Stage `{stage}`\n\nOf the problems: {names}.\n\n")
            rows = without(common, of_stages)
            parts.append(table({f"{stage}.{key}": row for key, row in rows.items()}))
            for problem, rows in by_problem.items():
                more = without(rows, common)
                if more:
                    parts.append(f"\nWith `problem='{problem}'` also:\n\n")
                    parts.append(table({f"{stage}.{key}": row for key, row in more.items()}))
    return "".join(parts)


def documents(root: pathlib.Path = ROOT) -> dict[str, str]:
    """Returns the documents that are written, by their paths in the checkout."""
    texts = {
        name: (root / name).read_text(encoding="utf-8") for name in ("docs/results.md", "README.md")
    }
    tables = {name: with_tables(text) for name, text in texts.items()}
    return {"docs/metrics.md": metrics(), "docs/configuration.md": configuration()} | tables


def main(argv: list[str]) -> None:
    """Runs the command line."""
    refuse_arguments(argv)
    for name, text in documents().items():
        (ROOT / name).write_text(text, encoding="utf-8")
        print(f"Written: {name}")


if __name__ == "__main__":
    app.run(main)
