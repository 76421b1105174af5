"""Writes the parts of the documentation that are derived from the code and from recorded results.

  python -m experiments.write_docs

The command writes in its own checkout:
  docs/metrics.md         every metric, from mmrl_jax/monitoring/metric_definitions.py
  docs/configuration.md   every key of a config, from the dataclasses that define them
  docs/results.md, docs/benchmarks.md, docs/scaling.md, README.md
                          the tables between `<!-- table: <name> -->` and `<!-- /table -->`, from
                          the rows in experiments/results
"""

import ast
from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import re
from typing import Any

from experiments.study_tables import TABLES, markdown
from mmrl_jax import envs, problems
from mmrl_jax.auditing import checks
from mmrl_jax.commands.common import refuse_arguments, run_command
from mmrl_jax.config import loading, schema
from mmrl_jax.config.options import Option, options_of
from mmrl_jax.learners import registry
from mmrl_jax.monitoring import metric_definitions
from mmrl_jax.problems import control_models, token_options
from mmrl_jax.problems.task import UserTaskOptions

ROOT = pathlib.Path(__file__).parent.parent
# Documents that are written in addition to the README.
TABLED = ("docs/results.md", "docs/benchmarks.md", "docs/scaling.md", "docs/audit.md")
WRITTEN = ("docs/metrics.md", "docs/configuration.md", *TABLED)
NOTE = "<!-- Written by `python -m experiments.write_docs`; do not edit. -->\n\n"

METRICS = """# Metrics

Every metric that a run logs has a row here; other names cannot be logged. A part in angle brackets,
as in `eval/<split>/success`, matches any single part of a name. `metrics.jsonl` and TensorBoard use
these names, and `learning_curves.png` plots the most important ones.

"""

RENAMED = """
## Renamed metrics

Logs of earlier versions have some metrics under other names, which are converted when a log is
read.

"""

CONFIGURATION = """# Configuration

A config is a Python file with a function `get_config()` that returns the values that differ from
the defaults, completed by `mmrl_jax.problems.complete`. The command line overrides single keys:

```
python -m experiments.train --config=reach_ppo --workdir=runs/reach_clip --config.ppo.clip=0.1
python -m experiments.train --config=reach_ppo --help
```

A workdir belongs to one config: a run with another value of `ppo.clip` needs another workdir. The
second command prints the keys of one config with their values. An unknown key, a wrong type or an
invalid value raises an error with the key, the value and the remedy. The keys of a config depend on
three of its keys: `problem`, `stages` and `model.kind`. Each stage has a group of keys with its
name. In the tables, `required` marks a key without a default.

"""


ENVIRONMENTS = """
The class of an environment in [mmrl_jax/envs/](../mmrl_jax/envs) describes its options. `--help`
with a config prints those of its environment. Any of them can be set on the command line, for
example `--config.env.options.rows=6`. All environments `brax:<name>` have the options of
`brax:reacher`, with an instruction of their own.

"""


def with_tables(text: str) -> str:
    """Returns a document with its tables updated.

    Raises:
      ValueError: If the document has an unknown table, or a table without an end.
    """
    tables = TABLES | {"records_checks": records_checks, "demonstrations_checks": demos_checks}
    begins = len(re.findall(r"<!-- table: ", text))
    pattern = r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)"

    def replacement(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in tables:
            raise ValueError(f"There is no table {name!r}; valid names are {', '.join(tables)}.")
        return f"{begin}{tables[name]()}{end}"

    text, count = re.subn(pattern, replacement, text, flags=re.DOTALL)
    if count != begins:
        raise ValueError(f"{begins} tables begin, but {count} end by '<!-- /table -->'.")
    return text


# -- Audit -----------------------------------------------------------------------------------------


def records_checks() -> str:
    """Returns the table of the checks of image-text records."""
    return _checks(checks.IMAGE_TEXT)


def demos_checks() -> str:
    """Returns the table of the checks of demonstrations."""
    return _checks(checks.DEMONSTRATIONS)


def _checks(rows: Mapping[str, checks.Check]) -> str:
    lines = ["| check | a flagged sample | threshold | limit | weight |", "|---|---|---|---|---|"]
    lines += [
        f"| `{name}` | {x.meaning} | {x.threshold:g} | {x.limit:.0%} | {x.weight:g} |"
        for name, x in rows.items()
    ]
    return "\n".join(lines) + "\n"


# -- Metrics ---------------------------------------------------------------------------------------


def metrics() -> str:
    """Returns docs/metrics.md."""
    renamed = [(f"`{old}`", f"`{new}`") for old, new in metric_definitions.RENAMED.items()]
    return (
        f"{NOTE}{METRICS}{metric_definitions.definitions_markdown()}"
        f"{RENAMED}{markdown(('earlier name', 'name'), renamed)}"
    )


# -- Configuration ---------------------------------------------------------------------------------

Rows = dict[str, tuple[str, str, str, str]]  # Type, default, valid values and help by key.


def rows_of(group: Mapping[str, Any], prefix: str = "") -> Rows:
    """Returns the keys of a group as cells of a table."""
    return {
        f"{prefix}{name}": _cells(option) for name, option in schema.flatten_group(group).items()
    }


def _cells(option: Option) -> tuple[str, str, str, str]:
    missing = option.default is dataclasses.MISSING
    default = "required" if missing else f"`{option.default!r}`"
    valid = "" if option.valid is None else option.valid.requirement
    # Choices of a Literal annotation are formatted as code, like the default.
    return schema.kind_name(option), default, valid.replace("'", "`"), option.help


def table(rows: Rows) -> str:
    """Returns a table of keys in Markdown."""
    header = ("key", "type", "default", "valid values", "meaning")
    cells = [
        tuple(cell.replace("|", r"\|") for cell in (f"`{key}`", *row)) for key, row in rows.items()
    ]
    return markdown(header, cells)


def shared(tables: Sequence[Rows]) -> Rows:
    """Returns the rows that all tables have."""
    first, *others = tables
    return {key: row for key, row in first.items() if all(t.get(key) == row for t in others)}


def without(rows: Rows, *others: Rows) -> Rows:
    """Returns the rows that are in none of the other tables."""
    return {key: row for key, row in rows.items() if all(t.get(key) != row for t in others)}


@dataclasses.dataclass(frozen=True)
class Policies:
    """The problems of one kind of policy.

    Attributes:
      title: Title of their section.
      problems: Names of the problems.
      algorithms: Names of the algorithms that may be stages.
      models: Dataclass of each kind of model by its name.
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
        token_options.MODELS,
    ),
)


def problem_rows(policies: Policies, problem: str) -> Rows:
    """Returns the keys of a problem outside of the groups of its model and its stages."""
    for stage in policies.algorithms:
        if (options := policies.options(problem, stage)) is not None:
            return rows_of({key: x for key, x in options.items() if key not in ("model", stage)})
    raise ValueError(f"The problem {problem!r} has no stage.")


def stage_rows(policies: Policies) -> dict[str, dict[str, Rows]]:
    """Returns the keys of the group of a stage, by stage and problem."""
    tables: dict[str, dict[str, Rows]] = {}
    for stage in policies.algorithms:
        for problem in policies.problems:
            if (options := policies.options(problem, stage)) is not None:
                tables.setdefault(stage, {})[problem] = rows_of(options[stage])
    return tables


def default_kind(policies: Policies) -> str:
    """Returns the default kind of model of the problems of a kind of policy."""
    for stage in policies.algorithms:
        if (options := policies.options(policies.problems[0], stage)) is not None:
            return options["model"]["kind"].default
    raise ValueError(f"The problem {policies.problems[0]!r} has no stage.")


def environments() -> str:
    """Returns a table of the environments with the defaults of their options."""
    named = {name: envs.default_options(name) for name in (*envs.NAMES, "brax:reacher")}
    rows = [
        (f"`{name}`", ", ".join(f"`{key}={x!r}`" for key, x in defaults.items()) or "none")
        for name, defaults in named.items()
    ]
    return markdown(("`env.name`", "`env.options` with their defaults"), rows)


def summaries() -> str:
    """Returns a table of the public configs with the first line of their docstrings."""
    rows = []
    for path in sorted(loading.PUBLIC.glob("[a-z]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        link = f"[{path.stem}](../{path.resolve().relative_to(ROOT.resolve())})"
        rows.append((link, docstring.partition("\n")[0]))
    return markdown(("config", "what it does"), rows)


def configuration() -> str:
    """Returns docs/configuration.md."""
    by_problem_name = {name: problem_rows(p, name) for p in POLICIES for name in p.problems}
    common_keys = shared(list(by_problem_name.values()))
    stages = {p.title: stage_rows(p) for p in POLICIES}
    groups = [
        rows
        for by_stage in stages.values()
        for by_problem in by_stage.values()
        for rows in by_problem.values()
    ]
    common_stage_keys = shared(groups)
    parts = [NOTE, CONFIGURATION, "## Public configs\n\n"]
    parts += ["The docstring of each has its command, hardware, time and result.\n\n", summaries()]
    parts += ["\n## Keys of every config\n\n", table(common_keys)]
    parts += ["\n## Keys of every stage\n\nThe group of a stage has the name of its algorithm.\n\n"]
    parts.append(table({f"<stage>.{key}": row for key, row in common_stage_keys.items()}))
    for policies in POLICIES:
        parts.append(f"\n## {policies.title}\n")
        for name in policies.problems:
            rows = without(by_problem_name[name], common_keys)
            parts.append(f"\n### Problem `{name}`\n\n{table(rows)}")
            if name == "control":
                parts.append(ENVIRONMENTS + environments())
            if name == "task":
                user_task = table(rows_of(options_of(UserTaskOptions), "task."))
                parts.append(
                    f"\nFor the task 'digits' and your own, the group `task` has:\n\n{user_task}"
                )
        for kind, options in policies.models.items():
            first = (options.__doc__ or "").partition("\n")[0]
            rows = rows_of(options_of(options), "model.")
            del rows["model.kind"]  # The title has its value.
            title = f"`model.kind='{kind}'`" + (
                ", the default" if kind == default_kind(policies) else ""
            )
            parts.append(f"\n### {title}\n\n{first}\n\n{table(rows)}")
        for stage, by_problem in stages[policies.title].items():
            common = shared(list(by_problem.values()))
            names = ", ".join(f"`{name}`" for name in by_problem)
            parts.append(f"\n### Stage `{stage}`\n\nFor the problems: {names}.\n\n")
            rows = without(common, common_stage_keys)
            parts.append(table({f"{stage}.{key}": row for key, row in rows.items()}))
            for problem, rows in by_problem.items():
                specific = without(rows, common)
                if specific:
                    parts.append(f"\nWith `problem='{problem}'` also:\n\n")
                    parts.append(table({f"{stage}.{key}": row for key, row in specific.items()}))
    return "".join(parts)


def documents(root: pathlib.Path = ROOT) -> dict[str, str]:
    """Returns the texts of the documents by their paths in the checkout."""
    texts = {name: (root / name).read_text(encoding="utf-8") for name in (*TABLED, "README.md")}
    tables = {name: with_tables(text) for name, text in texts.items()}
    return {"docs/metrics.md": metrics(), "docs/configuration.md": configuration()} | tables


def main(argv: list[str]) -> None:
    """Runs the command line."""
    refuse_arguments(argv)
    for name, text in documents().items():
        (ROOT / name).write_text(text, encoding="utf-8")
        print(f"Wrote {name}")


if __name__ == "__main__":
    run_command(main)
