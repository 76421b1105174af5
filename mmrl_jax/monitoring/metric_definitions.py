"""Every metric that is logged: its unit, what it means, and which values are healthy.

A name that is not in `GLOSSARY` cannot be logged, so that docs/metrics.md is complete. A part in
angle brackets, as in `eval/<split>/success`, stands for any single part of a name.
"""

from collections.abc import Iterable
import re
from typing import NamedTuple

from mmrl_jax import config as config_lib


class Metric(NamedTuple):
    """What a logged name means."""

    unit: str
    meaning: str
    healthy: str


GLOSSARY: dict[str, Metric] = {
    "loss/total": Metric("1", "Sum of the weighted losses that the optimizer descends", "finite"),
    "loss/policy": Metric(
        "1",
        "Clipped surrogate of PPO, mean over valid steps, no sign of progress",
        "-0.1 to 0.1",
    ),
    "loss/value": Metric(
        "return^2", "Half the squared error of the value, before its weight", "falls"
    ),
    "loss/entropy": Metric("nats", "Negative entropy, before its weight", "rises slowly"),
    "loss/auxiliary": Metric(
        "1", "Error of predicting privileged targets, before its weight", "falls"
    ),
    "loss/pointing": Metric(
        "nats", "Cross-entropy of the patch that holds the named object", "falls from log(patches)"
    ),
    "loss/bc": Metric(
        "1", "Squared error (discrete: cross-entropy) of the demonstrated actions", "falls"
    ),
    "loss/sft": Metric("nats", "Cross-entropy of the tokens of the labeled answers", "falls"),
    "policy/approx_kl": Metric(
        "nats",
        "KL from the policy that acted to the updated one, per step",
        "0.001 to 0.05; up to 0.2 where auxiliary losses move the features",
    ),
    "policy/clip_fraction": Metric(
        "fraction",
        "Steps whose probability ratio lies outside the clip range",
        "0.02 to 0.3; more where auxiliary losses move the features",
    ),
    "policy/clip_ratio_low": Metric(
        "fraction",
        "Tokens of negative advantage whose ratio is below the clip range",
        "0 to 0.2",
    ),
    "policy/clip_ratio_high": Metric(
        "fraction",
        "Tokens of positive advantage whose ratio is above the clip range",
        "0 to 0.2",
    ),
    "policy/sampler_gap": Metric(
        "nats",
        "Mean absolute difference of a token's log-prob between the learner and the sampler",
        "below 1e-4 in float32, 0.001 to 0.05 in bfloat16",
    ),
    "policy/reference_kl": Metric(
        "nats", "KL to the reference per token, by the estimator of the loss", "stays below 1"
    ),
    "policy/entropy": Metric("nats", "Entropy of the action distribution", "falls slowly"),
    "value/explained_variance": Metric(
        "1",
        "1 - mean((target - value)^2) / Var(target) on the data just gathered, before the update",
        "0.3 to 1; below 0 is worse than a constant",
    ),
    "grad/norm": Metric("1", "Global norm of the gradient before clipping", "stable"),
    "lr": Metric("1", "Learning rate after the update", "as the schedule says"),
    "episode/return": Metric("reward", "Mean return of the episodes that ended", "rises"),
    "episode/success": Metric("fraction", "Episodes that ended in success", "rises to 1"),
    "episode/length": Metric("steps", "Mean length of the episodes that ended", "up to the limit"),
    "rollout/reward": Metric("reward", "Mean reward of a valid step", "rises"),
    "completion/reward": Metric(
        "reward", "Mean reward of the completions, less the penalty of overlong_buffer", "rises"
    ),
    "completion/correct": Metric("fraction", "Answers drawn that are right", "rises"),
    "completion/invalid_fraction": Metric(
        "fraction", "Answers drawn that are none of the task's answers", "falls to 0"
    ),
    "completion/unscored": Metric(
        "fraction", "Answers drawn whose reward functions failed: they are left out", "0"
    ),
    "reward/failed": Metric(
        "fraction",
        "Calls of reward functions that raised, took too long or returned no finite number",
        "0; of functions that declare `on_failure`, falls to 0",
    ),
    "completion/length": Metric(
        "tokens", "Mean length of the answers drawn", "stable; no collapse"
    ),
    "completion/truncated_fraction": Metric(
        "fraction",
        "Answers drawn that were truncated at their most tokens, without a stop token",
        "0 to 0.1",
    ),
    "completion/rows": Metric(
        "rows",
        "Most rows of the answers' length that all answers to a question can be packed into",
        "of GRPO, at most `pack_rows` where it is given",
    ),
    "reward/zero_std_groups": Metric(
        "fraction",
        "Groups whose rewards are all equal: they teach nothing",
        "below 0.9; at 1 nothing is learned",
    ),
    "completion/preferences": Metric(
        "fraction", "Questions with a best and a worst answer, which DPO learns from", "above 0.1"
    ),
    "dpo/reward_margin": Metric(
        "nats", "Of DPO: beta times what the preferred answer gained on the other one", "rises"
    ),
    "dpo/reward_accuracy": Metric(
        "fraction",
        "Of DPO: pairs in which the preferred answer gained on the other one",
        "above 0.5",
    ),
    "alarm/<name>": Metric(
        "1", "1 where this alarm is raised, see monitoring/health_checks.py", "absent"
    ),
    "time/samples_per_s": Metric(
        "1/s",
        "Steps of the unroll, resets among them, or demonstrated steps, a second of time/wall_s",
        "constant",
    ),
    "time/wall_s": Metric(
        "s",
        "Time of the stage's updates so far; initialization, compilation and evaluations left out",
        "grows",
    ),
    "time/update_s": Metric("s", "Time of one update, as time/wall_s", "constant"),
    "time/compile_s": Metric(
        "s",
        "Time of initializing and compiling the stage so far, on every line",
        "constant; grows where a run is resumed",
    ),
    "time/eval_s": Metric(
        "s", "Time of one evaluation; the first compiles", "small beside the updates"
    ),
    "progress/env_steps": Metric(
        "steps", "Environment steps since the start; a step that only resets is none", "grows"
    ),
    "progress/updates": Metric("updates", "Updates since the start", "grows"),
    "rollout/valid_fraction": Metric(
        "fraction",
        "Steps of the rollout that the update may use; one that only resets is none",
        "L / (L + 1) for episodes of length L",
    ),
    "rollout/nonfinite_envs": Metric(
        "steps",
        "Steps after which numbers of an environment were not finite: it was reset",
        "0",
    ),
    "optimizer/steps": Metric(
        "steps",
        "Optimizer steps of an update, before the KL stop if there is one",
        "epochs * minibatches; fewer often: lower the learning rate",
    ),
    "optimizer/skipped_steps": Metric(
        "steps",
        "Optimizer steps of an update, skipped because the loss or its gradient is not finite",
        "0; half of all steps stop the run",
    ),
    "optimizer/retries": Metric(
        "1",
        "Failures of the host's half of an update, rewards for example, that another try mended",
        "absent",
    ),
    "eval/failed": Metric(
        "1", "Evaluations of this process that failed; the run goes on without", "absent"
    ),
    "eval/<split>/success": Metric("fraction", "Success over the evaluation episodes", "rises"),
    "eval/<split>/success_lo": Metric("fraction", "Lower end of its 95 % interval", "-"),
    "eval/<split>/success_hi": Metric("fraction", "Upper end of its 95 % interval", "-"),
    "eval/<split>/return": Metric("reward", "Mean return over the evaluation episodes", "rises"),
    "eval/<split>/return_lo": Metric("reward", "Lower end of its 95 % interval", "-"),
    "eval/<split>/return_hi": Metric("reward", "Upper end of its 95 % interval", "-"),
    "eval/<split>/failed_fraction": Metric(
        "fraction",
        "Evaluated answers without a reward: the return is a mean over the others, and NaN above "
        "rewards.max_failed",
        "0",
    ),
    "eval/<split>/reward/<function>": Metric(
        "reward", "Mean result of one reward function, before its weight", "-"
    ),
    "eval/<split>/accuracy": Metric("fraction", "Questions answered rightly, greedily", "rises"),
    "eval/<split>/accuracy_lo": Metric("fraction", "Lower end of its 95 % interval", "-"),
    "eval/<split>/accuracy_hi": Metric("fraction", "Upper end of its 95 % interval", "-"),
    "eval/<split>/shuffled_<modality>/accuracy": Metric(
        "fraction",
        "Accuracy where every prompt has another prompt's image",
        "at chance; equal to the accuracy: the images are not used",
    ),
    "eval/<split>/shuffled_<modality>/success": Metric(
        "fraction",
        "Success where a modality is that of another episode, by the probe 'ablations'",
        "far below the success; equal to it: the modality is not used",
    ),
    "eval/<split>/shuffled_<modality>/return": Metric(
        "reward", "Return where a modality is that of another episode", "below the return"
    ),
    "eval/<split>/shuffled_<modality>/<measure>": Metric(
        "-", "Interval or length of the same evaluation", "-"
    ),
    "eval/<split>/invalid_fraction": Metric(
        "fraction", "Evaluated answers that are none of the task's answers", "0"
    ),
    "eval/<split>/<level>/accuracy": Metric(
        "fraction", "Accuracy on the questions of one level, see tasks/shapes.py", "rises"
    ),
    "eval/<split>/<level>/accuracy_lo": Metric("fraction", "Lower end of its 95 % interval", "-"),
    "eval/<split>/<level>/accuracy_hi": Metric("fraction", "Upper end of its 95 % interval", "-"),
    "eval/<split>/<level>/invalid_fraction": Metric(
        "fraction", "Answers to these that are none of the task's answers", "0"
    ),
    "eval/<split>/length": Metric("steps", "Mean length of the evaluation episodes", "-"),
}


# Names in logs of earlier versions -> names today.
RENAMED = {
    "answer/correct": "completion/correct",
    "answer/degenerate_groups": "reward/zero_std_groups",
    "answer/length": "completion/length",
    "answer/malformed": "completion/invalid_fraction",
    "answer/preferences": "completion/preferences",
    "answer/reward": "completion/reward",
    "answer/rows": "completion/rows",
    "answer/unscored": "completion/unscored",
    "loss/answer": "loss/sft",
    "loss/cloning": "loss/bc",
    "policy/clipped_high": "policy/clip_ratio_high",
    "policy/clipped_low": "policy/clip_ratio_low",
    "policy/kl": "policy/approx_kl",
    "policy/margin": "dpo/reward_margin",
    "policy/preferred": "dpo/reward_accuracy",
    "rollout/broken": "rollout/nonfinite_envs",
    "update/retries": "optimizer/retries",
    "update/skipped": "optimizer/skipped_steps",
    "update/steps": "optimizer/steps",
}


def lookup(name: str) -> Metric:
    """Returns the glossary's entry for a logged name.

    Raises:
        ValueError: The name is not in the glossary; names the nearest one.
    """
    if name in GLOSSARY:
        return GLOSSARY[name]
    for pattern, metric in GLOSSARY.items():
        if matches(pattern, name):
            return metric
    guess = config_lib.nearest(name, GLOSSARY)
    raise ValueError(
        f"Metric '{name}' is not in the glossary; the nearest name there is '{guess}'. Use that, "
        "or add yours to GLOSSARY in mmrl_jax/monitoring/metric_definitions.py."
    )


def current_name(name: str) -> str:
    """The name today of a metric that a log of an earlier version may hold under another."""
    if name.startswith("eval/") and name.endswith("/malformed"):
        return name.removesuffix("malformed") + "invalid_fraction"
    return RENAMED.get(name, name)


def matches(pattern: str, name: str) -> bool:
    """Says whether a name fits a glossary name, whose `<parts>` stand for one part each."""
    fixed = re.split(r"<[^>]*>", pattern)
    return re.fullmatch("[^/]+".join(re.escape(part) for part in fixed), name) is not None


def glossary_markdown(names: Iterable[str] | None = None) -> str:
    """Returns the glossary, or the rows of some names in it, as a Markdown table."""
    chosen = GLOSSARY if names is None else {name: lookup(name) for name in names}
    rows = [
        f"| `{name}` | {metric.unit} | {metric.meaning} | {metric.healthy} |"
        for name, metric in chosen.items()
    ]
    return "\n".join(["| name | unit | meaning | healthy |", "|---|---|---|---|", *rows]) + "\n"
