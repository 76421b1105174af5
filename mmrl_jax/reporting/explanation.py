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
from mmrl_jax.interpretability.units import Units
from mmrl_jax.models.policy import MultimodalPolicy
from mmrl_jax.problems import Problem
from mmrl_jax.problems.control import Control, make_env
from mmrl_jax.problems.problem import EVALUATION, stream
from mmrl_jax.reporting import explanation_page
from mmrl_jax.reporting.explanation_text import SHARED, sentences
from mmrl_jax.reporting.videos import save_file
from mmrl_jax.rl import advantages, normalization
from mmrl_jax.rollouts.unroll import unroll

STEPS = 6  # Steps of each episode that are explained.
BACKGROUNDS = 3  # Other episodes that give backgrounds.
TARGET = "contrast"  # Target of the scores of patches and words.
# Submodules in which weights are randomized, all at once.
SUBMODULES = (
    *("policy_head", "value_head", "fusion", "late_in", "late_out", "condition", "proprio"),
    *("vision", "vision_projection", "text", "text_projection"),
)
SHOWN = 3  # Episodes in the figure.


class Course(NamedTuple):
    """What happened in N episodes, in all of their steps.

    Attributes:
      episodes: Success, return and length of each episode.
      running: 1 until the episode has ended, float32 [S, N].
      value: Value estimates, float32 [S, N].
      advantage: Generalized advantage estimates of the most likely actions, float32 [S, N]; None if
        the last stage of the run has no discount and lambda for them.
    """

    episodes: evaluate.Episodes
    running: np.ndarray
    value: np.ndarray
    advantage: np.ndarray | None


class Swapped(NamedTuple):
    """The explanation of the same images with the instruction of the next episode.

    Attributes:
      patches: Scores of the patches with the other instruction, float32 [T, N, rows, columns].
      word_scores: Scores of the words of the other instruction, float32 [T, N, L].
      action: Most likely action with the own instruction, float32 [T, N, A] or int32 [T, N].
      swapped_action: The same with the other instruction.
      differs: Whether the other instruction is another one, bool [N].
    """

    patches: np.ndarray
    word_scores: np.ndarray
    action: np.ndarray
    swapped_action: np.ndarray
    differs: np.ndarray


class Explanation(NamedTuple):
    """The explanation of N episodes of a policy, which a notebook shows as a page.

    Attributes:
      numbers: Results for explanation.json, see `explain`.
      sentences: What the policy uses, and whether the explanation can be trusted.
      frames: Newest frame of each explained step, uint8 [T, N, H, W, 3].
      patches: Scores of its patches by the chosen method, float32 [T, N, rows, columns].
      words: Words of the instruction of each episode, N lists.
      word_scores: Scores of the words by the chosen method, float32 [T, N, L].
      steps: Numbers of the explained steps of an episode, int [T].
      shares: For each target, the absolute Shapley value of each of n modalities, divided by their
        sum, float32 [n, T, N].
      course: What happened in the episodes.
      swapped: The explanation with other instructions.
    """

    numbers: dict[str, Any]
    sentences: list[str]
    frames: np.ndarray
    patches: np.ndarray
    words: list[list[str]]
    word_scores: np.ndarray
    steps: np.ndarray
    shares: dict[str, np.ndarray]
    course: Course
    swapped: Swapped

    def _repr_html_(self) -> str:
        """Returns the page in a frame, so that its style does not reach the notebook."""
        return explanation_page.in_frame(explanation_page.page(self, title="Explanation"))


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
        'method', 'completeness_error' and 'randomization_correlation'; 'word_scores'; and
        'instruction_swap' if instructions differ: how far the most likely action changes with the
        instruction of another episode, divided by the mean distance between the actions of two
        episodes, as mean and bounds of the 95 % bootstrap interval over episodes.

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
    played, swap, course = _play(problem, variables, split, episodes, rng)
    shares, shares_of_steps = _shares(problem, variables, played)
    scored, random, others, gain = _scores(problem, variables, played, swap.played, rng)
    units = control.unit_layout(problem.network, variables.params, played)
    played, swap = jax.device_get((played, swap))
    running = played.running
    method, table = choose(gain, running)
    correlation = faithfulness.rank_correlation(
        scored.scores[method], random.scores[method], scored.ranked
    )
    patches, word_scores = _by_step(units, scored.scores[method], running.shape)
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
        **_swap_numbers(swap),
    }
    frames = played.observation["pixels"]
    return Explanation(
        numbers=numbers,
        sentences=sentences(numbers),
        frames=frames if frames.ndim == 5 else frames[:, :, -1],
        patches=patches,
        words=words,
        word_scores=word_scores,
        steps=np.arange(len(course.running))[:: control.stride(len(course.running), STEPS)],
        shares=shares_of_steps,
        course=course,
        swapped=Swapped(
            *_by_step(units, others.scores[method], running.shape),
            *(swap.action, swap.swapped_action, swap.differs),
        ),
    )


def _by_step(
    units: Units, scores: jax.Array, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scores of the newest frame's patches and of the words, [T, N, ...] each."""
    patches, words, _ = units.split(scores)
    newest = np.asarray(patches[:, -1])
    return newest.reshape(*shape, *newest.shape[1:]), np.asarray(words).reshape(*shape, -1)


def _play(
    problem: Control, variables: Any, split: str, episodes: int, rng: jax.Array
) -> tuple[control.Played, control.Swap, Course]:
    """Returns some steps of episodes, the same with other instructions, and what happened."""
    env = make_env(problem.config, split=split)
    options = problem.config[problem.config.stages[-1]]

    @jax.jit
    def play(variables: Any, rng: jax.Array) -> tuple[control.Played, control.Swap, tuple]:
        start = evaluate.start(env, rng, episodes=episodes)
        predict = functools.partial(problem.predict, variables)
        end, batch = unroll(env, start, problem.policy(variables), rng, env.episode_length)
        played = control.played(batch)
        advantage = None
        if "discount" in options and "gae_lambda" in options:
            advantage, _ = advantages.generalized_advantages(
                reward=batch.reward,
                value=batch.value,
                last_value=predict(end.obs).value,
                terminated=batch.terminated,
                truncated=advantages.truncation_mask(
                    batch.terminated, batch.truncated, batch.valid
                ),
                discount=options.discount,
                lambda_=options.gae_lambda,
            )
        course = evaluate.results(batch), played.running, batch.value, advantage
        some = control.subsample(played, STEPS)
        return some, control.swap_instructions(predict, some), course

    played, swap, course = play(variables, rng)
    return played, swap, Course(*jax.device_get(course))


def _shares(
    problem: Control, variables: Any, played: control.Played
) -> tuple[dict[str, dict[str, dict[str, dict[str, float]]]], dict[str, np.ndarray]]:
    """Returns 'modalities' and, for a history, 'frames' of `explain`, and shares of each step."""
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
    numbers = {
        kind: {target: describe_shares(players[kind].names, x) for target, x in found.items()}
        for kind, found in measured.items()
    }
    size = {target: np.abs(x.phi) for target, x in measured["modalities"].items()}
    return numbers, {target: x / np.maximum(x.sum(0), 1e-30) for target, x in size.items()}


def _scores(
    problem: Control,
    variables: Any,
    played: control.Played,
    swapped: control.Played,
    rng: jax.Array,
) -> tuple[
    control.UnitScores, control.UnitScores, control.UnitScores, dict[str, dict[str, np.ndarray]]
]:
    """Returns the scores of the policy, with randomized weights, and with other instructions.

    The last entry has the gains of the policy's scores over random rankings.
    """
    proprio = normalization.normalize(variables.normalizer, played.observation["proprio"])

    def normalized(played: control.Played) -> control.Played:
        return played._replace(observation=played.observation | {"proprio": proprio})

    seen = normalized(played)
    options: dict[str, Any] = {"target": TARGET, "backgrounds": BACKGROUNDS}
    network: Any = problem.network
    score = jax.jit(functools.partial(control.unit_scores, network, **options))
    test = jax.jit(functools.partial(control.unit_gains, network, **options))
    scored = score(variables.params, seen)
    random = score(faithfulness.randomize(variables.params, rng, SUBMODULES), seen)
    others = score(variables.params, normalized(swapped))
    gain = test(variables.params, seen, scored.scores, rng)
    return jax.device_get((scored, random, others, gain))


def _swap_numbers(swap: control.Swap) -> dict[str, list[float]]:
    """Returns 'instruction_swap' of `explain`; nothing if no two instructions differ."""
    running = np.asarray(swap.played.running * swap.differs)
    steps = running.sum(0)
    spread = np.sum(swap.spread * running) / max(running.sum(), 1)
    if not spread > 0:
        return {}
    change = np.sum(swap.change * running, axis=0)[steps > 0] / steps[steps > 0] / spread
    interval = statistics.bootstrap_interval(change, confidence=0.95, resamples=2000, seed=0)
    return {"instruction_swap": [float(x) for x in interval]}


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
