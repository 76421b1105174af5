"""Writes the parts of the documentation that are derived from the code and from recorded results.

  python -m experiments.write_docs

Writes, in the checkout that it lies in:
  docs/metrics.md         every metric, from mmrl_jax/monitoring/metric_definitions.py
  docs/configuration.md   every key of a config, from the dataclasses that define them
  docs/results.md, README.md   the tables between `<!-- table: <name> -->` and `<!-- /table -->`,
                          from the rows in experiments/results/studies
"""

import ast
from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import re
from typing import Any

from absl import app

from experiments.study_tables import TABLES, markdown
from mmrl_jax import problems
from mmrl_jax.commands.common import refuse_arguments
from mmrl_jax.config import loading, schema
from mmrl_jax.config.options import Option, options_of
from mmrl_jax.learners import registry
from mmrl_jax.monitoring import metric_definitions
from mmrl_jax.problems import control_models, token_models
from mmrl_jax.problems.task import UserTaskOptions

ROOT = pathlib.Path(__file__).parent.parent
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
        f"{NOTE}{METRICS}{metric_definitions.definitions_markdown()}"
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
