"""The explanation of a control policy: what it depends on, and whether that can be trusted.

matplotlib is imported inside the function that draws, so that training itself does not need it.
"""

from collections.abc import Mapping, Sequence
import functools
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np

from mmrl_jax.evaluation import evaluate, statistics
from mmrl_jax.interpretability import control, faithfulness, shapley
from mmrl_jax.models.policy import MultimodalPolicy
from mmrl_jax.monitoring.health_checks import UNUSED_SHARE
from mmrl_jax.problems import Problem
from mmrl_jax.problems.control import Control, make_env
from mmrl_jax.problems.problem import EVALUATION, stream
from mmrl_jax.reporting.videos import save_file
from mmrl_jax.rl import normalization

STEPS = 6  # Steps of each episode that are explained.
BACKGROUNDS = 3  # Other episodes that give backgrounds.
TARGET = "contrast"  # Target of the scores of patches and words.
SHARED = {"behavior": "actions", "prediction": "value estimates"}  # Targets with shares, in words.
PARTS = ("all", "pixels", "words")
# Submodules in which weights are randomized, all at once.
SUBMODULES = (
    *("policy_head", "value_head", "fusion", "late_in", "late_out", "condition", "proprio"),
    *("vision", "vision_projection", "text", "text_projection"),
)
SHOWN = 3  # Episodes in the figure.


class Explanation(NamedTuple):
    """The explanation of N episodes of a policy.

    Attributes:
      numbers: Results for explanation.json, see `explain`.
      sentences: What the policy uses, and whether the explanation can be trusted.
      frames: Newest frame of each explained step, uint8 [T, N, H, W, 3].
      patches: Scores of its patches by the chosen method, float32 [T, N, rows, columns].
      words: Words of the instruction of each episode, N lists.
      word_scores: Scores of the words by the chosen method, float32 [T, N, L].
    """

    numbers: dict[str, Any]
    sentences: list[str]
    frames: np.ndarray
    patches: np.ndarray
    words: list[list[str]]
    word_scores: np.ndarray


def explain(problem: Problem, variables: Any, split: str, *, episodes: int) -> Explanation:
    """Plays episodes and explains the actions and values of a control policy.

    Args:
      problem: Problem of a control policy with pixels and an instruction.
      variables: Variables of the policy.
      split: Name of the split of the episodes.
      episodes: Number N of episodes, at least 2 * (BACKGROUNDS + 1).

    Returns:
      The explanation, whose numbers have
        'modalities': for each target, 'share' of each modality and 'interaction' of each pair,
        divided by the sum of the mean absolute Shapley values; 'frames' for a history likewise;
        'faithfulness': for each method and part, the gain over random rankings with its 95 %
        interval over the half of the episodes that did not choose the method;
        'method', 'completeness_error' and 'randomization_correlation'; and 'word_scores'.

    Raises:
      ValueError: If the policy has another kind, or there are too few episodes.
    """
    if not isinstance(problem, Control) or not isinstance(problem.network, MultimodalPolicy):
        raise ValueError(
            f"problem={problem.config.problem!r} with model.kind={problem.config.model.kind!r} "
            "cannot be explained: only control policies with model.kind='multimodal' can."
        )
    if episodes < 2 * (BACKGROUNDS + 1):
        raise ValueError(f"episodes={episodes}: use at least {2 * (BACKGROUNDS + 1)}.")
    rng = stream(problem.config, EVALUATION)
    played = _play(problem, variables, split, episodes, rng)
    shares = _shares(problem, variables, played)
    scored, random, gain = _scores(problem, variables, played, rng)
    units = control.unit_layout(problem.network, variables.params, played)
    played = jax.device_get(played)
    running = played.running
    method, table = choose(gain, running)
    correlation = faithfulness.rank_correlation(
        scored.scores[method], random.scores[method], scored.ranked
    )
    patches, word_scores, _ = units.split(scored.scores[method])
    word_scores = word_scores.reshape(*running.shape, -1)
    words = _words(problem, played.observation["instruction"]["tokens"][0], units.words)

    def mean(x: Any) -> float:
        return float((np.asarray(x).reshape(running.shape) * running).sum() / running.sum())

    numbers = {
        "split": split,
        "episodes": episodes,
        **shares,
        "method": method,
        "faithfulness": table,
        "completeness_error": mean(np.abs(scored.completeness_error))
        / max(mean(np.abs(scored.difference)), 1e-30),
        "randomization_correlation": mean(correlation),
        "word_scores": _mean_word_scores(words, word_scores, running),
    }
    frames = played.observation["pixels"]
    return Explanation(
        numbers=numbers,
        sentences=sentences(numbers),
        frames=frames if frames.ndim == 5 else frames[:, :, -1],
        patches=patches[:, -1].reshape(*running.shape, units.rows, units.columns),
        words=words,
        word_scores=word_scores,
    )


def _play(
    problem: Control, variables: Any, split: str, episodes: int, rng: jax.Array
) -> control.Played:
    """Returns some steps of episodes."""
    env = make_env(problem.config, split=split)

    @jax.jit
    def play(variables: Any, rng: jax.Array) -> control.Played:
        start = evaluate.start(env, rng, episodes=episodes)
        return control.subsample(control.play(env, start, problem.policy(variables), rng), STEPS)

    return play(variables, rng)


def _shares(
    problem: Control, variables: Any, played: control.Played
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Returns 'modalities' and, for a history, 'frames' of `explain`."""
    pixels = played.observation["pixels"]
    frames = pixels.shape[2] if pixels.ndim == 6 else 1
    players = {"modalities": control.modalities(played.observation)}
    if 1 < frames <= shapley.MAX_PLAYERS:
        players["frames"] = shapley.frame_players(frames)

    @jax.jit
    def measure(variables: Any, played: control.Played) -> dict[str, Any]:
        predict = functools.partial(problem.predict, variables)
        return {
            kind: {
                target: control.contributions(
                    predict, played, some, target=target, backgrounds=BACKGROUNDS
                )
                for target in SHARED
            }
            for kind, some in players.items()
        }

    measured = jax.device_get(measure(variables, played))
    return {
        kind: {target: describe_shares(players[kind].names, x) for target, x in found.items()}
        for kind, found in measured.items()
    }


def _scores(
    problem: Control, variables: Any, played: control.Played, rng: jax.Array
) -> tuple[control.UnitScores, control.UnitScores, dict[str, dict[str, np.ndarray]]]:
    """Returns the scores of the policy, those of randomized weights, and the policy's gains."""
    proprio = normalization.normalize(variables.normalizer, played.observation["proprio"])
    seen = played._replace(observation=played.observation | {"proprio": proprio})
    options: dict[str, Any] = {"target": TARGET, "backgrounds": BACKGROUNDS}
    network: Any = problem.network
    score = jax.jit(functools.partial(control.unit_scores, network, **options))
    test = jax.jit(functools.partial(control.unit_gains, network, **options))
    scored = score(variables.params, seen)
    random = score(faithfulness.randomize(variables.params, rng, SUBMODULES), seen)
    return jax.device_get((scored, random, test(variables.params, seen, scored.scores, rng)))


def describe_shares(
    names: Sequence[str], contributions: control.Contributions
) -> dict[str, dict[str, float]]:
    """Returns the shares of players, and the relative interaction of each pair."""
    phi = np.abs(contributions.phi).reshape(len(names), -1).mean(1)
    pair = contributions.interaction.reshape(len(names), len(names), -1).mean(2)
    total = max(float(phi.sum()), 1e-30)
    return {
        "share": {name: float(x) for name, x in zip(names, contributions.share, strict=True)},
        "interaction": {
            f"{names[i]} * {names[j]}": float(pair[i, j] / total)
            for i in range(len(names))
            for j in range(i + 1, len(names))
        },
    }


def choose(
    gain: Mapping[str, Mapping[str, np.ndarray]], running: np.ndarray
) -> tuple[str, dict[str, dict[str, list[float]]]]:
    """Chooses the method with the highest gain on even episodes, and tests all on odd ones.

    A method that is tested on the episodes that chose it would look better than it is.

    Args:
      gain: Gains over random rankings by method and part, float32 [T * N] each.
      running: 1 until an episode has ended, float32 [T, N].

    Returns:
      The name of the method, and the gain of each method and part on the odd episodes, as mean and
      bounds of the 95 % bootstrap interval over episodes.
    """
    steps = np.maximum(running.sum(0), 1)

    def by_episode(x: np.ndarray) -> np.ndarray:
        return (np.asarray(x).reshape(running.shape) * running).sum(0) / steps

    means = {name: by_episode(parts["all"])[::2].mean() for name, parts in gain.items()}
    table = {
        name: {
            part: [
                float(x)
                for x in statistics.bootstrap_interval(
                    by_episode(values)[1::2], confidence=0.95, resamples=2000, seed=0
                )
            ]
            for part, values in parts.items()
        }
        for name, parts in gain.items()
    }
    return max(means, key=lambda name: means[name]), table


def sentences(numbers: Mapping[str, Any]) -> list[str]:
    """Returns what the policy uses and whether the explanation can be trusted, in words."""
    lines = []
    for target, what in SHARED.items():
        share = numbers["modalities"][target]["share"]
        lines.append(f"Shares of the modalities in the {what}: {_listed(share)}.")
        unused = [name for name, x in share.items() if x < UNUSED_SHARE]
        if unused:
            lines.append(f"The {what} do not depend on {' or '.join(unused)}.")
    if "frames" in numbers:
        share = numbers["frames"]["behavior"]["share"]
        lines.append(f"Shares of the frames in the actions, oldest first: {_listed(share)}.")
    method, gains = numbers["method"], numbers["faithfulness"][numbers["method"]]
    faithful = [part for part in PARTS if gains[part][1] > 0]
    label = method.replace("_", " ")
    for part, what in (("all", "inputs"), ("pixels", "patches"), ("words", "words")):
        mean, low, high = gains[part]
        verdict = "better than" if part in faithful else "no better than"
        lines.append(
            f"The ranking of the {what} by {label} is {verdict} random ones: gain {mean:.3g} nats "
            f"[{low:.3g}, {high:.3g}]."
        )
    correlation = numbers["randomization_correlation"]
    depends = correlation < 0.5
    lines.append(
        f"With randomized weights the ranking {'changes' if depends else 'stays similar'} "
        f"(rank correlation {correlation:.2f})."
    )
    if not depends or "all" not in faithful:
        lines.append("Do not trust the heat maps and the colors of the words.")
    elif len(faithful) == len(PARTS):
        lines.append("The heat maps and the colors of the words can be trusted.")
    else:
        shown = {"pixels": "heat maps", "words": "colors of the words"}
        doubtful = [name for part, name in shown.items() if part not in faithful]
        lines.append(f"Do not trust the {' and the '.join(doubtful)}.")
    return lines


def draw(path: epath.Path, explanation: Explanation) -> Any:
    """Writes a figure of frames with the scores of their patches, and of colored words.

    Orange means for the action that the policy took, and purple against it. Colors are scaled by
    the largest absolute score of an episode.

    Args:
      path: PNG file to write.
      explanation: Explanation to draw, of which the first SHOWN episodes are shown.
    """
    # The figure is made without pyplot, which has global state and looks for a display.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, episodes = explanation.frames.shape[:2]
    episodes = min(episodes, SHOWN)
    colors = colormaps["PuOr_r"]
    figure = Figure(figsize=(1.7 * steps, 2.3 * episodes))
    FigureCanvasAgg(figure)
    axes = figure.subplots(episodes, steps, squeeze=False)
    for n in range(episodes):
        bound = max(float(np.abs(explanation.patches[:, n]).max()), 1e-30)
        for t in range(steps):
            axis, frame = axes[n, t], explanation.frames[t, n]
            height, width = frame.shape[:2]
            extent = (0, width, height, 0)
            axis.imshow(frame, extent=extent)
            heat = explanation.patches[t, n]
            axis.imshow(heat, cmap=colors, vmin=-bound, vmax=bound, alpha=0.5, extent=extent)
            axis.set_axis_off()
        words = explanation.words[n]
        scores = explanation.word_scores[:, n, : len(words)].mean(0)
        bound = max(float(np.abs(scores).max()), 1e-30)
        x = 0.0
        for word, score in zip(words, scores, strict=True):
            box = {"facecolor": colors(0.5 + 0.5 * score / bound), "edgecolor": "none", "pad": 2}
            axes[n, 0].text(
                x, 1.08, word, transform=axes[n, 0].transAxes, family="monospace",
                fontsize=9, bbox=box, color="white" if abs(score) > 0.7 * bound else "black",
            )  # fmt: skip
            x += 0.085 * (len(word) + 1.2)
    return save_file(path, lambda local: figure.savefig(local, dpi=110, bbox_inches="tight"))


def _listed(share: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {x:.0%}" for name, x in share.items())


def _words(problem: Control, tokens: np.ndarray, count: int) -> list[list[str]]:
    """Returns the words of instructions, tokens int [N, L].

    A pretrained text encoder has its own tokens, `count` of them, which are only numbered.
    """
    if problem.network.text_encoder is not None:
        return [[f"token {i}" for i in range(count)]] * len(tokens)
    return [problem.env.vocabulary.decode(row).split() for row in tokens]


def _mean_word_scores(
    words: Sequence[Sequence[str]], scores: np.ndarray, running: np.ndarray
) -> dict[str, float]:
    """Returns the mean score of each word over all of its occurrences, the highest first.

    Args:
      words: Words of the instruction of each of N episodes.
      scores: Scores of the words, float32 [T, N, L].
      running: 1 until an episode has ended, float32 [T, N].
    """
    by_episode = np.einsum("tnl,tn->nl", scores, running / np.maximum(running.sum(0), 1))
    values: dict[str, list[float]] = {}
    for sentence, row in zip(words, by_episode, strict=True):
        for word, score in zip(sentence, row, strict=False):
            values.setdefault(word, []).append(float(score))
    means = {word: float(np.mean(x)) for word, x in values.items()}
    return dict(sorted(means.items(), key=lambda item: -item[1]))
