r"""Compares planned with compiled memory for public configs at two sizes, and prints the table.

  python -m experiments.planned_memory [--cases=reach_ppo,count_grpo/wide] [--topology=cpu]
  python -m experiments.planned_memory --print

Each case compiles the updates of its stages for one device of the topology, which takes about half
a minute a stage on two cores, and writes experiments/results/planned_memory/<topology>.json with
the rows of `mmrl_jax.planning.check.rows`. --print prints the table of all rows that are written.
"""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from absl import flags

import mmrl_jax
from mmrl_jax.commands.common import clean_exit, refuse_arguments, run_command
from mmrl_jax.planning import check, chips
from mmrl_jax.planning.plan import Planner
from mmrl_jax.reporting.summary import write_json

FLAGS = flags.FLAGS
RESULTS = pathlib.Path(__file__).parent / "results" / "planned_memory"
ONE = {"mesh": {"data": 1}}
WIDE = {"model": {"width": 256, "heads": 8, "layers": 4}}
# Config and changes of each case; the first name of a case is the config, with ':' as '-'.
CASES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "mlp_ppo": ("mlp_ppo", {}),
    "mlp_ppo/small": ("mlp_ppo", {"ppo": {"num_envs": 64}}),
    "reach_ppo": ("reach_ppo", {"bc": {"episodes": 512}}),
    "reach_ppo/small": (
        "reach_ppo",
        {"bc": {"episodes": 64, "batch_size": 64}, "ppo": {"num_envs": 64}},
    ),
    "recall_ppo": ("recall_ppo", {}),
    "pixels_ppo": ("pixels_ppo", {}),
    "locomotion_ppo": ("locomotion_ppo", {}),
    "count_grpo": ("count_grpo", {}),
    "count_grpo/wide": ("count_grpo", WIDE),
    "count_grpo/wide_remat": ("count_grpo", {"model": WIDE["model"] | {"remat": True}}),
    "count_grpo/wide_bfloat16": ("count_grpo", {"model": WIDE["model"] | {"dtype": "bfloat16"}}),
    "count_grpo-dpo": ("count_grpo:dpo", {"stages": ("dpo",)}),
    "count_grpo-ppo": ("count_grpo:ppo", {"stages": ("ppo",)}),
    "grid_agent_ppo": ("grid_agent_ppo", {}),
    "grid_agent_ppo/small": (
        "grid_agent_ppo",
        {"sft": {"episodes": 64, "batch_size": 32}, "ppo": {"num_envs": 16}},
    ),
}


def measure(name: str, topology: chips.Topology) -> dict[str, dict[str, float]]:
    """Returns the rows of a case, by stage."""
    spec, changes = CASES[name]
    config = mmrl_jax.get_config(spec, {**changes, **ONE})
    plan = Planner(evaluations=False).plan(config, topology)
    return check.rows(config, topology, plan)


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Returns the rows of all cases in Markdown, in megabytes of a device."""
    lines = [
        "| config | stage | planned, MB | compiled, MB | planned / compiled |",
        "|---|---|---|---|---|",
    ]
    for case, stages in found.items():
        for stage, row in stages.items():
            planned = row["planned_arguments"] + row["planned_temporaries"]
            compiled = row["compiled_arguments"] + row["compiled_temporaries"]
            lines.append(
                f"| {case} | {stage} | {planned / 1e6:.2f} | {compiled / 1e6:.2f} | "
                f"{row['ratio']:.2f} |"
            )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Runs the command line."""
    refuse_arguments(argv)
    with clean_exit(ValueError):
        topology = chips.topology(FLAGS.topology)
        if unknown := [name for name in FLAGS.cases if name not in CASES]:
            raise ValueError(f"--cases={unknown}: the cases are {list(CASES)}.")
    path = RESULTS / f"{FLAGS.topology}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in () if FLAGS.print else FLAGS.cases or CASES:
        found[name] = measure(name, topology)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {case: found[case] for case in CASES if case in found})
        ratios = {stage: round(row["ratio"], 3) for stage, row in found[name].items()}
        print(name, ratios, flush=True)
    print(table({case: found[case] for case in CASES if case in found}))


if __name__ == "__main__":
    flags.DEFINE_list("cases", [], "Names of cases; all by default.")
    flags.DEFINE_string("topology", "cpu", f"Topology, for example {chips.EXAMPLES}.")
    flags.DEFINE_bool("print", False, "Print the table of the rows that are written.")
    run_command(main)
