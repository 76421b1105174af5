"""Fine-tunes DINOv2-small with SmolLM2-135M in three stages on sums of digits, and compares them.

  python -m experiments.quickstart_vlm
  python -m experiments.quickstart_vlm --preset=small   # too few updates to learn much

The stages of the config vlm_quickstart are alignment of the projector on captions, supervised
fine-tuning on a few labels, some of which are wrong, and GRPO on rewards alone. For comparison,
supervised fine-tuning also continues for as long as GRPO takes.

The command first says how long it takes on this machine, and how much memory. It writes to the
workdir, by default runs/quickstart_vlm, or runs/quickstart_vlm_small with the small preset:
  summary.json          all printed metrics:
                        <stage>/<split>/[shuffled_image/]accuracy with its 95 % interval _lo, _hi,
                        of the stages aligned, warm_start (fine-tuning), more_sft and final (GRPO);
                        times; memory_gb, the peak memory of this process
  accuracy.png          accuracy over time: fine-tuning, then GRPO, or more fine-tuning
  samples.html          completions after GRPO; sft/samples.html has those before
  metrics.jsonl, tensorboard/, learning_curves.png, checkpoints/   of GRPO
  align/, sft/, more_sft/                                          the same files of these stages

Ctrl-C or SIGTERM saves and stops; the same command resumes.
"""

from collections.abc import Mapping
import math
import resource
import sys
import time
from typing import Any

from etils import epath
import ml_collections

from experiments.quickstarts import (
    Summary,
    define_flags,
    rate,
    record,
    run,
    run_longer,
    smaller,
    update_seconds,
)
from mmrl_jax import problems, restoring, runs
from mmrl_jax.commands.common import run_command
from mmrl_jax.configs import vlm_quickstart
from mmrl_jax.evaluation import statistics
from mmrl_jax.evaluation.prompts import PromptEvaluator, describe
from mmrl_jax.problems import problem as problem_lib
from mmrl_jax.problems.task import TaskProblem
from mmrl_jax.reporting import report
from mmrl_jax.reporting import summary as summary_lib
from mmrl_jax.training.stage import Stage
from mmrl_jax.types import Params

# Changes of each preset to vlm_quickstart. The number of labeled prompts, which a resumed run
# cannot change, differs, so that a run of one preset is never resumed with another.
PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "small": {
        "align": {"num_updates": 20, "examples": 320, "eval_interval": 20},
        "sft": {"num_updates": 10, "examples": 160, "eval_interval": 10},
        "grpo": {"num_updates": 10, "eval_interval": 10},
        "run": {"eval_episodes": 16},
    },
}
WORKDIRS = {"full": "runs/quickstart_vlm", "small": "runs/quickstart_vlm_small"}
# Splits on which fine-tuned policies are evaluated at the end.
TESTED = ("train", "heldout_pair", "heldout_sample")
# Number of prompts in a reported accuracy, for each prompt in an evaluation during training.
EVALUATIONS = 4
# Time of the greedy completion of a prompt, as a fraction of the time of a prompt in an update of
# GRPO, which samples several completions and learns from them.
COMPLETION = 0.25
COMPILATION_S = 120


def evaluate(
    summary: Summary, evaluator: PromptEvaluator, stages: Mapping[str, Params], caption: str
) -> None:
    """Adds the accuracies of the stages to the summary.

    'aligned' is evaluated on the training split and on captions, the other stages on all splits but
    the captions. On the training split, 'final' is also evaluated with shuffled images.

    Args:
      summary: Summary to which the accuracies are added.
      evaluator: Evaluator of the task.
      stages: Variables of the policy after each stage, by the name of the stage in the summary.
      caption: Name of the split of captions.
    """
    for name, variables in stages.items():
        for split in ("train", caption) if name == "aligned" else TESTED:
            score = evaluator(variables, split).score
            record(summary, f"{name}/{split}", describe(score), "accuracy")
        if name == "final":
            score = evaluator(variables, "train", shuffle_images=True).score
            record(summary, f"{name}/train/shuffled_image", describe(score), "accuracy")


def quickstart(problem: TaskProblem, workdir: epath.Path) -> Summary | None:
    """Trains, evaluates and reports.

    Args:
      problem: Problem of the run.
      workdir: Working directory of the run, which must be claimed for the problem, see
        `runs.claim`.

    Returns:
      The summary; None if a signal interrupted the run.
    """
    config, started = problem.config, time.perf_counter()
    trained = runs.train_stages(problem, workdir)
    if trained.interrupted:
        return None
    tuned = trained.results["grpo"]
    warm = restoring.restore(problem, "sft", workdir / "sft").variables
    stage = more_fine_tuning(problem, warm)
    more = run_longer(stage, workdir / "more_sft", config=config, seconds=tuned.wall_s)
    if more.interrupted:
        return None
    stages = {
        "aligned": restoring.restore(problem, "align", workdir / "align").variables,
        "warm_start": warm,
        "more_sft": problem.variables(stage, more.carry.learner),
        "final": trained.variables,
    }
    summary: Summary = {}
    prompts = EVALUATIONS * config.run.eval_episodes
    print(f"Accuracy over {prompts} prompts, with 95 % intervals:")
    key = problem_lib.stream(config, problem_lib.EVALUATION)
    evaluate(summary, problem.evaluator(key, prompts=prompts), stages, config.align.split)
    results = {**trained.results, "more_sft": more}
    summary |= {f"{name}/wall_s": result.wall_s for name, result in results.items()}
    summary |= summary_lib.totals(results.values(), started) | {"memory_gb": peak_memory_gb()}
    summary_lib.write_json(workdir / "summary.json", summary)
    with report.tolerate_errors("Drawing accuracy.png, or writing samples.html"):
        curves = draw_curves(workdir)
        before = workdir / "sft" / "samples.html"
        report.sample_table(before, problem.samples(warm, runs.SAMPLES), "Before GRPO: samples")
        outputs = workdir / "summary.json", curves, before, workdir / "samples.html"
        print("Wrote " + ", ".join(str(path) for path in outputs))
    return summary


def more_fine_tuning(problem: TaskProblem, start: Params) -> Stage:
    """Returns a stage that fine-tunes further on the same labels, with a new optimizer state.

    It never reaches its number of updates, because it runs for the time that GRPO took.

    Args:
      problem: Problem of the run.
      start: Variables of the policy after fine-tuning.
    """
    return problem.stage(
        "sft",
        start=start,
        name="more_sft",
        num_updates=100 * problem.config.sft.num_updates,
        stream=problem_lib.COMPLETIONS,  # The batches differ from those before.
    )


def draw_curves(workdir: epath.Path) -> Any:
    """Draws the accuracies of all stages over their training time; returns the path."""
    first = [workdir / "align", workdir / "sft"]
    return report.stage_curves(
        {
            "alignment": first[:1],
            "then fine-tuning": first,
            "then GRPO": [*first, workdir],
            "then more fine-tuning": [*first, workdir / "more_sft"],
        },
        workdir / "accuracy.png",
        metric="eval/train/accuracy",
    )


def peak_memory_gb() -> float:
    """Returns the peak memory of this process so far, in units of 1e9 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def estimated_minutes(
    config: ml_collections.ConfigDict, align_s: float, label_s: float, reward_s: float
) -> float:
    """Returns about how many minutes a quickstart takes.

    Args:
      config: Config of the run.
      align_s: Time of an update of alignment in seconds.
      label_s: Time of an update of supervised fine-tuning in seconds.
      reward_s: Time of an update of GRPO in seconds.
    """

    def evaluations(updates: float, interval: int) -> int:
        """Returns the number during a stage; each is followed by one with shuffled images."""
        return 2 * (1 + math.ceil(updates / interval))

    align, sft, grpo = config.align, config.sft, config.grpo
    reward_updates_s = reward_s * grpo.num_updates
    # Alignment is evaluated on captions and on sums.
    evaluated = len({align.split, "train"}) * evaluations(align.num_updates, align.eval_interval)
    evaluated += evaluations(sft.num_updates, sft.eval_interval)
    evaluated += evaluations(grpo.num_updates, grpo.eval_interval)
    # More fine-tuning takes as long as GRPO.
    evaluated += evaluations(reward_updates_s / label_s, sft.eval_interval)
    # Each stage but the first on three splits, the first on two, and one with shuffled images.
    evaluated += EVALUATIONS * 12
    prompts = evaluated * config.run.eval_episodes
    evaluation_s = COMPLETION * reward_s * prompts / grpo.prompts_per_update
    training_s = align_s * align.num_updates + label_s * sft.num_updates + 2 * reward_updates_s
    return (training_s + evaluation_s + COMPILATION_S) / 60


def forecast(problem: TaskProblem, preset: str) -> str:
    """Returns a text that says how long a quickstart takes, and how much memory.

    Args:
      problem: Problem of the run, of which updates are made to measure both.
      preset: Name of the preset, a key of PRESETS.
    """
    stages = ("align", "sft", "grpo")
    align_s, label_s, reward_s = seconds = [update_seconds(problem.stage(x)) for x in stages]
    minutes = estimated_minutes(problem.config, *seconds)
    text = (
        f"On this machine an update takes {align_s:.1f} s in alignment, {label_s:.1f} s in "
        f"fine-tuning and {reward_s:.1f} s in GRPO, and the whole quickstart about "
        f"{max(minutes, 1):.0f} minutes. These updates have needed {peak_memory_gb():.1f} GB of "
        "memory."
    )
    if preset == "small":
        return text
    small = estimated_minutes(make_config("small"), *seconds)
    return text + smaller(minutes, small, target="quickstart-vlm")


def conclusion(summary: Summary, workdir: str) -> str:
    """Returns a text with the results of the run and the paths of its reports."""
    stages = ("final", "warm_start", "more_sft")
    final, warm, more = (rate(summary, f"{name}/train/accuracy") for name in stages)
    disjoint = statistics.disjoint(final, warm) and statistics.disjoint(final, more)
    return (
        f"The accuracy on the training split was {warm[0]:.1%} after fine-tuning, {final[0]:.1%} "
        f"after GRPO, and {more[0]:.1%} after more fine-tuning for the same time. The intervals "
        f"of GRPO and the others {'do not overlap' if disjoint else 'overlap'}. "
        f"{summary['wall_s'] / 60:.1f} minutes, {summary['memory_gb']:.1f} GB.\n"
        f"See {workdir}/samples.html, {workdir}/accuracy.png and {workdir}/learning_curves.png, or "
        f"run: python -m experiments.generate --workdir={workdir} --help"
    )


def main(argv: list[str]) -> int:
    """Runs the command line."""
    return run(
        argv,
        workdirs=WORKDIRS,
        make_problem=make_problem,
        forecast=forecast,
        quickstart=quickstart,
        conclusion=conclusion,
    )


def make_config(preset: str = "full", seed: int = 0) -> ml_collections.ConfigDict:
    """Returns the config of a preset, a key of PRESETS, with a seed."""
    return problems.complete(vlm_quickstart.CONFIG, PRESETS[preset], {"seed": seed})


def make_problem(seed: int, preset: str = "full") -> TaskProblem:
    """Makes the problem of a preset, a key of PRESETS, with a seed."""
    problem = problems.make(make_config(preset, seed))
    assert isinstance(problem, TaskProblem)
    return problem


if __name__ == "__main__":
    define_flags(WORKDIRS)
    run_command(main)
