"""Definitions of all metrics that are logged: unit, meaning and range of healthy values.

A metric without an entry in `METRIC_DEFINITIONS` cannot be logged, so that docs/metrics.md is
complete. A part in angle brackets, as in `eval/<split>/success`, matches any single part of a name.
"""

from collections.abc import Iterable
import re
from typing import NamedTuple

from mmrl_jax import config as config_lib


class Metric(NamedTuple):
    """Definition of a metric.

    Attributes:
      unit: Unit of the values, '1' if they have none.
      meaning: Description of the metric.
      healthy: Values or trend that are expected in a healthy run.
    """

    unit: str
    meaning: str
    healthy: str


METRIC_DEFINITIONS: dict[str, Metric] = {
    "loss/total": Metric("1", "Sum of the weighted losses that the optimizer descends", "finite"),
    "loss/policy": Metric(
        "1",
        "Clipped surrogate loss of PPO, mean over valid steps; it does not measure progress",
        "-0.1 to 0.1",
    ),
    "loss/value": Metric(
        "return^2",
        "Half of the squared error of the value, before its weight; in `iql` the expectile loss",
        "falls",
    ),
    "loss/critic": Metric(
        "return^2", "Half of the squared errors of the critics of actions, their sum", "falls"
    ),
    "loss/entropy": Metric("nats", "Negative entropy, before its weight", "rises slowly"),
    "loss/auxiliary": Metric(
        "1", "Error of the predicted privileged targets, before its weight", "falls"
    ),
    "loss/pointing": Metric(
        "nats",
        "Cross-entropy of the image patch that contains the named object",
        "falls from log(patches)",
    ),
    "loss/bc": Metric(
        "1", "Squared error (discrete: cross-entropy) of the demonstrated actions", "falls"
    ),
    "loss/awr": Metric(
        "1",
        "Cloning loss of the demonstrated actions, weighted by exponentials of their advantages",
        "falls",
    ),
    "loss/predictor": Metric(
        "1", "Squared error of the predictor of random network distillation", "falls slowly"
    ),
    "loss/intrinsic_value": Metric("1", "Half the squared error of the intrinsic critic", "falls"),
    "exploration/novelty": Metric(
        "1",
        "Squared error with which random network distillation predicts the features of the next "
        "observation",
        "falls; rises when something new is found",
    ),
    "exploration/intrinsic_reward": Metric(
        "1", "The novelty over the standard deviation of its returns", "0.01 to 1"
    ),
    "exploration/intrinsic_value": Metric(
        "1", "Mean estimate of the intrinsic return", "below 1 / (1 - intrinsic_discount)"
    ),
    "exploration/entropy_coef": Metric(
        "1",
        "Coefficient of the entropy bonus in the next update, with an entropy_target",
        "0 while the entropy is above its target",
    ),
    "loss/sft": Metric("nats", "Cross-entropy of the tokens of the labeled completions", "falls"),
    "policy/approx_kl": Metric(
        "nats",
        "KL divergence from the policy that acted to the updated policy, per step",
        "0.001 to 0.05; up to 0.2 with auxiliary losses, which change the features",
    ),
    "policy/clip_fraction": Metric(
        "fraction",
        "Steps whose probability ratio is outside the clip range",
        "0.02 to 0.3; more with auxiliary losses, which change the features",
    ),
    "policy/clip_ratio_low": Metric(
        "fraction",
        "Tokens with a negative advantage whose ratio is below the clip range",
        "0 to 0.2",
    ),
    "policy/clip_ratio_high": Metric(
        "fraction",
        "Tokens with a positive advantage whose ratio is above the clip range",
        "0 to 0.2",
    ),
    "policy/sampler_gap": Metric(
        "nats",
        "Mean absolute difference between a token's log-probs in the learner and in the sampler",
        "below 1e-4 in float32, 0.001 to 0.05 in bfloat16; above that with one_step_off_policy",
    ),
    "policy/reference_kl": Metric(
        "nats",
        "KL divergence from the reference policy per token, by the estimator of the loss",
        "stays below 1",
    ),
    "policy/weight_mean": Metric(
        "1",
        "Mean weight of the demonstrated steps, see `awr.beta` and `iql.inverse_temperature`",
        "0.5 to 3",
    ),
    "policy/weight_max": Metric(
        "1", "Largest weight of a demonstrated step", "not always the maximum weight"
    ),
    "policy/effective_sample_size": Metric(
        "fraction",
        "(sum w)^2 / (n * sum w^2) of the weights w of n demonstrated steps",
        "0.1 to 0.9; at 1 all steps are cloned alike",
    ),
    "policy/entropy": Metric("nats", "Entropy of the action distribution", "falls slowly"),
    "value/explained_variance": Metric(
        "1",
        "1 - mean((target - value)^2) / Var(target) on the data of the update, before it",
        "0.3 to 1; below 0 the value is worse than a constant",
    ),
    "value/target_mean": Metric("return", "Moving mean of the value targets, with popart", "-"),
    "value/target_std": Metric(
        "return",
        "Moving standard deviation of the value targets, at least 0.01, in which the value is "
        "learned with popart",
        "moves slowly",
    ),
    "value/return_range": Metric(
        "return",
        "Moving range of the returns from the 5th to the 95th percentile, with "
        "advantage_scaling='percentile'",
        "above 1, below which advantages are not scaled",
    ),
    "grad/min_cosine": Metric(
        "1",
        "Smallest cosine between the gradients of two parts of the loss on shared parameters, "
        "before gradient_surgery; 1 if they share none",
        "above 0; below, the parts conflict",
    ),
    "gradient_conflict/cosine/<part>_<part>": Metric(
        "1",
        "Cosine between the gradients of two parts of the loss on the parameters that they share, "
        "by the probe 'gradient_conflict'; NaN if one of them is 0, as where they share none",
        "above -0.1; below, the parts conflict",
    ),
    "gradient_conflict/norm_ratio/<part>_<part>": Metric(
        "1",
        "Norm of the weighted gradient of the first part over that of the second one, on the "
        "parameters that two parts share; NaN if the second one is 0",
        "0.01 to 100; beyond, one part alone moves the parameters",
    ),
    "grad/norm": Metric("1", "Global norm of the gradient before clipping", "stable"),
    "lr": Metric(
        "1",
        "Learning rate after the update",
        "follows the schedule; with desired_kl it settles away from its limits",
    ),
    "episode/return": Metric("reward", "Mean return of the finished episodes", "rises"),
    "episode/success": Metric(
        "fraction", "Fraction of the finished episodes with success", "rises to 1"
    ),
    "episode/length": Metric("steps", "Mean length of the finished episodes", "up to the limit"),
    "rollout/reward": Metric("reward", "Mean reward of a valid step", "rises"),
    "completion/reward": Metric(
        "reward",
        "Mean reward of the completions, minus the penalty of `overlong_buffer`",
        "rises",
    ),
    "completion/correct": Metric("fraction", "Sampled completions that are correct", "rises"),
    "completion/invalid_fraction": Metric(
        "fraction", "Sampled completions that are not a valid answer of the task", "falls to 0"
    ),
    "completion/unscored": Metric(
        "fraction",
        "Sampled completions without a reward, because a reward function failed or none applies; "
        "the loss leaves them out",
        "0",
    ),
    "reward/failed": Metric(
        "fraction",
        "Calls of reward functions that raised, timed out or did not return a finite number",
        "0; falls to 0 for functions that declare `on_failure`",
    ),
    "completion/length": Metric(
        "tokens", "Mean length of the sampled completions", "stable; no collapse"
    ),
    "completion/truncated_fraction": Metric(
        "fraction",
        "Sampled completions that reached the maximum length without a stop token",
        "0 to 0.1",
    ),
    "completion/rows": Metric(
        "rows",
        "Rows of the maximum completion length into which the completions of a prompt are packed, "
        "maximum over prompts",
        "at most `pack_rows` of GRPO if it is set",
    ),
    "reward/zero_std_groups": Metric(
        "fraction",
        "Groups whose rewards are all equal, so that their advantages are zero",
        "below 0.9; at 1 nothing is learned",
    ),
    "completion/preferences": Metric(
        "fraction",
        "Prompts whose best and worst completion have different rewards, from which DPO learns",
        "above 0.1",
    ),
    "dpo/reward_margin": Metric(
        "nats",
        "Implicit reward of DPO: beta times the log-ratio to the reference, of the chosen minus "
        "the rejected completion",
        "rises",
    ),
    "dpo/reward_accuracy": Metric(
        "fraction",
        "Pairs whose chosen completion has the higher implicit reward of DPO",
        "above 0.5",
    ),
    "modality_share/behavior/<modality>": Metric(
        "fraction",
        "Mean absolute Shapley value of a modality for the log-prob of the action, divided by "
        "the sum over modalities, by the probe 'modality_shares'",
        "above 0.01 for every modality that the task needs",
    ),
    "modality_share/prediction/<modality>": Metric(
        "fraction",
        "The same for the value estimate",
        "above 0.01 for every modality that the task needs",
    ),
    "alarm/<name>": Metric(
        "1", "1 while this alarm is raised, see monitoring/health_checks.py", "absent"
    ),
    "time/samples_per_s": Metric(
        "1/s",
        "Samples per second of time/wall_s: steps of the unroll, including resets, or steps of "
        "demonstrations",
        "constant",
    ),
    "time/wall_s": Metric(
        "s",
        "Total time of the stage's updates, without initialization, compilation and evaluations",
        "grows",
    ),
    "time/update_s": Metric("s", "Time of one update, measured as time/wall_s", "constant"),
    "time/compile_s": Metric(
        "s",
        "Total time of initializing and compiling the stage, on every line",
        "constant; grows when a run is resumed",
    ),
    "time/eval_s": Metric(
        "s",
        "Time of one evaluation; the first one includes compilation",
        "small compared with the updates",
    ),
    "progress/env_steps": Metric(
        "steps",
        "Environment steps since the start, without steps that only reset an environment",
        "grows",
    ),
    "progress/updates": Metric("updates", "Updates since the start", "grows"),
    "rollout/valid_fraction": Metric(
        "fraction",
        "Steps of the rollout that the update learns from; steps that only reset an environment "
        "are left out",
        "L / (L + 1) for episodes of length L",
    ),
    "rollout/nonfinite_envs": Metric(
        "steps",
        "Steps after which the state of an environment was not finite, so that it was reset",
        "0",
    ),
    "optimizer/steps": Metric(
        "steps",
        "Optimizer steps of an update, up to the early stop by KL divergence if it is enabled",
        "epochs * minibatches; if often fewer, lower the learning rate",
    ),
    "optimizer/skipped_steps": Metric(
        "steps",
        "Optimizer steps of an update that were skipped because the loss or its gradient is not "
        "finite",
        "0; the run stops at half of all steps",
    ),
    "optimizer/skipped_spikes": Metric(
        "steps",
        "Optimizer steps of an update that were skipped because their loss or gradient norm is a "
        "spike, see optimizer.skip_spikes; they are in no other metric of optimizer steps",
        "0, rarely 1",
    ),
    "optimizer/rollbacks": Metric(
        "1", "Rollbacks of the stage so far, see incidents.jsonl and docs/runs.md", "absent"
    ),
    "optimizer/retries": Metric(
        "1",
        "Retries of the host's part of an update, for example of reward functions, after a failure",
        "absent",
    ),
    "eval/failed": Metric(
        "1", "Failed evaluations of this process; the run continues without them", "absent"
    ),
    "eval/<split>/success": Metric(
        "fraction", "Success rate over the evaluation episodes", "rises"
    ),
    "eval/<split>/success_lo": Metric("fraction", "Lower bound of its 95 % interval", "-"),
    "eval/<split>/success_hi": Metric("fraction", "Upper bound of its 95 % interval", "-"),
    "eval/<split>/return": Metric("reward", "Mean return over the evaluation episodes", "rises"),
    "eval/<split>/return_lo": Metric("reward", "Lower bound of its 95 % interval", "-"),
    "eval/<split>/return_hi": Metric("reward", "Upper bound of its 95 % interval", "-"),
    "eval/<split>/failed_fraction": Metric(
        "fraction",
        "Evaluated completions whose reward failed, of those to which a reward function applies: "
        "the return is the mean over the others, and NaN if this exceeds rewards.max_failed",
        "0",
    ),
    "eval/<split>/reward/<function>": Metric(
        "reward", "Mean result of one reward function, before its weight", "-"
    ),
    "eval/<split>/accuracy": Metric(
        "fraction", "Prompts whose greedy completion is correct", "rises"
    ),
    "eval/<split>/accuracy_lo": Metric("fraction", "Lower bound of its 95 % interval", "-"),
    "eval/<split>/accuracy_hi": Metric("fraction", "Upper bound of its 95 % interval", "-"),
    "eval/<split>/shuffled_<modality>/accuracy": Metric(
        "fraction",
        "Accuracy if every prompt has the image of another prompt",
        "at chance; if equal to the accuracy, the images are not used",
    ),
    "eval/<split>/shuffled_<modality>/success": Metric(
        "fraction",
        "Success rate with one modality taken from another episode, by the probe 'ablations'",
        "far below the success; if equal to it, the modality is not used",
    ),
    "eval/<split>/shuffled_<modality>/return": Metric(
        "reward",
        "Return with one modality taken from another episode or record",
        "below the return; if equal to it, the modality is not used",
    ),
    "eval/<split>/shuffled_<modality>/<measure>": Metric(
        "-", "Bound of an interval, length, or failed fraction of the same evaluation", "-"
    ),
    "eval/<split>/invalid_fraction": Metric(
        "fraction", "Evaluated completions that are not a valid answer of the task", "0"
    ),
    "eval/<split>/<level>/accuracy": Metric(
        "fraction", "Accuracy on the prompts of one level, see tasks/shapes.py", "rises"
    ),
    "eval/<split>/<level>/accuracy_lo": Metric("fraction", "Lower bound of its 95 % interval", "-"),
    "eval/<split>/<level>/accuracy_hi": Metric("fraction", "Upper bound of its 95 % interval", "-"),
    "eval/<split>/<level>/invalid_fraction": Metric(
        "fraction", "Completions of these prompts that are not a valid answer of the task", "0"
    ),
    "eval/<split>/length": Metric("steps", "Mean length of the evaluation episodes", "-"),
}


# Current names of metrics by their names in logs of earlier versions.
RENAMED = {
    "alarm/answers_short": "alarm/completions_short",
    "alarm/groups_degenerate": "alarm/zero_std_groups",
    "alarm/pictures_unused": "alarm/images_unused",
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
    """Returns the definition of the metric `name`.

    Raises:
        ValueError: If the metric is not defined; the message gives the nearest name.
    """
    if name in METRIC_DEFINITIONS:
        return METRIC_DEFINITIONS[name]
    for pattern, metric in METRIC_DEFINITIONS.items():
        if matches(pattern, name):
            return metric
    guess = config_lib.nearest(name, METRIC_DEFINITIONS)
    raise ValueError(
        f"Metric '{name}' is not defined; the nearest defined name is '{guess}'. Use that, or add "
        "yours to METRIC_DEFINITIONS in mmrl_jax/monitoring/metric_definitions.py."
    )


def current_name(name: str) -> str:
    """Returns the current name of a metric, which logs of earlier versions may name differently."""
    if name.startswith("eval/") and name.endswith("/malformed"):
        return name.removesuffix("malformed") + "invalid_fraction"
    return RENAMED.get(name, name)


def matches(pattern: str, name: str) -> bool:
    """Returns whether a name matches a pattern, in which each `<part>` matches one part."""
    fixed = re.split(r"<[^>]*>", pattern)
    return re.fullmatch("[^/]+".join(re.escape(part) for part in fixed), name) is not None


def definitions_markdown(names: Iterable[str] | None = None) -> str:
    """Returns the definitions of all metrics, or of those in `names`, as a Markdown table."""
    chosen = METRIC_DEFINITIONS if names is None else {name: lookup(name) for name in names}
    rows = [
        f"| `{name}` | {metric.unit} | {metric.meaning} | {metric.healthy} |"
        for name, metric in chosen.items()
    ]
    return "\n".join(["| name | unit | meaning | healthy |", "|---|---|---|---|", *rows]) + "\n"
