"""Summary of a run: its final evaluation, and its total times and steps."""

from collections.abc import Collection, Mapping
import json
import math
import sys
import time

from etils import epath

from mmrl_jax import workdir as workdir_lib
from mmrl_jax.monitoring import metric_definitions, metrics
from mmrl_jax.training.loop import Result


def final_evaluation(workdir: epath.Path, test_metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the final evaluation: that of a test split, or else the last logged one.

    If the last row of metrics has no evaluation, because it failed or metrics.jsonl was deleted, a
    message is printed and the result is empty.

    Args:
      workdir: Working directory of the last stage.
      test_metrics: Metrics of a test split by their logged names; empty if there is none.

    Returns:
      'final/<split>/success' and its bounds '_lo' and '_hi'. Without a success metric they are of
      'accuracy' or 'return'. If rewards can fail, 'final/<split>/failed_fraction' is included.
    """
    rows = metrics.read_jsonl(workdir / metrics.JSONL_NAME)
    # Evaluations in earlier rows are not of the final parameters.
    row = test_metrics or (rows[-1] if rows and any(map(_is_evaluation, rows[-1])) else None)
    if row is None:
        print(
            f"summary.json has no final evaluation, because the last row of "
            f"{workdir / metrics.JSONL_NAME} has none. Run: "
            f"python -m experiments.evaluate --workdir={workdir}",
            file=sys.stderr,
            flush=True,
        )
        return {}
    for score in ("success", "accuracy", "return"):
        names = [name for name in row if metric_definitions.matches(f"eval/<split>/{score}", name)]
        if names:
            break
    name = names[0].removeprefix("eval/")
    final = {f"final/{name}{end}": row[f"eval/{name}{end}"] for end in ("", "_lo", "_hi")}
    failed = f"{name.rpartition('/')[0]}/failed_fraction"
    return final | ({f"final/{failed}": row[f"eval/{failed}"]} if f"eval/{failed}" in row else {})


def _is_evaluation(name: str) -> bool:
    return name.startswith("eval/") and name != "eval/failed"


def totals(results: Collection[Result], started: float) -> dict[str, float]:
    """Returns the total times and steps of a run with several stages.

    Args:
      results: Results of the stages.
      started: Value of time.perf_counter() when this process started the run.

    Returns:
      wall_s: Time of this process in seconds, plus that of earlier processes up to the checkpoints
        from which this process resumed.
      compile_s: Time of initializing and compiling the stages in seconds, of all processes.
      env_steps: Number of environment steps, without steps that only reset an environment.
      env_steps_per_s: Environment steps per second of the updates of stages with environments; 0
        without such stages.
      rollbacks: Number of rollbacks after divergences, if there were any, see docs/runs.md.
    """
    rollbacks = sum(result.rollbacks for result in results)
    stepping = [result for result in results if result.counters.env_steps]
    steps = sum(result.counters.env_steps for result in stepping)
    return {
        "wall_s": time.perf_counter() - started + sum(result.earlier_s for result in results),
        "compile_s": sum(result.counters.compile_s for result in results),
        "env_steps": steps,
        "env_steps_per_s": steps / sum(result.wall_s for result in stepping) if stepping else 0.0,
    } | ({"rollbacks": rollbacks} if rollbacks else {})


def write_json(path: epath.Path, values: Mapping[str, float]) -> None:
    """Writes a flat dictionary as JSON atomically; values that are not finite become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    workdir_lib.write_text(path, json.dumps(finite, indent=2, allow_nan=False) + "\n")
