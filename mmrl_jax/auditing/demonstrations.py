"""Checks of demonstrations: functions from `Episodes` to scores, which are high if bad."""

from collections import Counter

import numpy as np

from mmrl_jax.auditing import images as images_lib
from mmrl_jax.auditing import statistics, windows
from mmrl_jax.auditing.samples import Episodes, Finding, scored

NOISE, CONSTANT = 0.6, 0.5  # Scores of single images above which they are broken.
MIN_ACTIONS = 8  # Number of actions of the shortest episode whose actions are scored.
MIN_EPISODES, MIN_WORD = 50, 8  # Least number of episodes with instructions, and with a word.
MAX_FIT = 50_000  # Maximum number of steps to which the model of the actions is fitted.
MAX_IMAGES = 10_000  # Maximum number of images to which principal components are fitted.
WAVES = 200  # Number of random Fourier features of that model.
COMPONENTS = 32  # Principal components of the images of a step, and of the last images.
CHANGED = 24  # Levels by which a pixel of the first and of the last image differ if it changed.
MIN_MOVES = 4  # Number of visible moves of an episode whose images are compared.
MOVED = 0.2  # Standard deviations by which a reading changes if the robot moves visibly.
# Minimum fraction of episodes whose instruction fits best; below it, the scores are not used.
MIN_AGREEMENT = 0.6
SKILL = 0.1  # Fraction by which a model reduces the loss of a word that can be predicted.
QUIET = 2 / 3  # Mean square of standardized actions below which they count as small.
BINS = 10  # Number of bins in which each dimension of the actions is counted.


def mean_over_steps(data: Episodes, x: np.ndarray) -> np.ndarray:
    """Returns the mean of values of steps [R] over each episode, float64 [N]."""
    totals = np.bincount(data.episode, x, minlength=len(data))
    return totals / np.diff(data.starts)


def broken_images(data: Episodes) -> Finding:
    """Scores the fraction of images that are noise or have no structure."""
    if data.frames is None:
        return scored(data.missing())
    noise = data.frames.roughness > NOISE
    constant = 1 / (1 + data.frames.deviation) > CONSTANT
    scores = mean_over_steps(data, noise | constant)
    return scored(scores)


def frozen_images(data: Episodes) -> Finding:
    """Scores the fraction of steps whose image is the one before, though the readings changed."""
    if data.frames is None:
        return scored(data.missing())
    moved = np.zeros(len(data.proprio), bool)
    change = np.abs(np.diff(statistics.standardize(data.proprio), axis=0)).max(axis=1)
    moved[1:] = change > MOVED
    moved[data.starts[:-1]] = False
    count = np.bincount(data.episode, moved, minlength=len(data))
    frozen = np.bincount(data.episode, moved & data.frames.repeated, minlength=len(data))
    return scored(np.where(count >= MIN_MOVES, frozen / np.maximum(count, 1), np.nan))


def random_actions(data: Episodes) -> Finding:
    """Scores how little the actions follow from each other and from the observations.

    The score is the smaller one of two ratios, each near 1 for random actions and lower for those
    of a policy: half the mean squared difference of consecutive actions over their variance in the
    episode (von Neumann, 1941), and the squared error of a model of the action over that of the
    mean action. The model is a ridge regression with random Fourier features of the readings, the
    words of the instruction and the image, fitted to other episodes. Either alone would flag
    experts that switch between extremes, or that act on what the model does not see.
    """
    if len(data) < statistics.FOLDS:
        return scored(data.missing())
    rows = np.flatnonzero(data.has_action)
    episode, action = data.episode[rows], statistics.standardize(data.action[rows])
    count = np.bincount(episode, minlength=len(data))

    def total(squares: np.ndarray, of: np.ndarray) -> np.ndarray:
        return np.bincount(of, squares.sum(axis=1), minlength=len(data))

    means = np.stack(
        [np.bincount(episode, a, minlength=len(data)) / np.maximum(count, 1) for a in action.T], 1
    )
    within = total(np.square(action - means[episode]), episode)
    follows = np.flatnonzero(episode[1:] == episode[:-1])
    changes = total(np.square(action[follows + 1] - action[follows]), episode[follows])
    error = total(np.square(action - _predicted(data, rows, action)), episode)
    # Constant actions vary by rounding alone.
    varies = within > 1e-3 * count
    roughness = changes / 2 / np.where(varies, within, np.inf)
    # Noise around a pose that is held is no random action.
    energy = np.maximum(total(np.square(action), episode), QUIET * count * action.shape[1])
    unexplained = error / np.maximum(energy, 1e-9)
    scores = np.minimum(roughness, unexplained)
    return scored(np.where(count >= MIN_ACTIONS, scores, np.nan))


def _predicted(data: Episodes, rows: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Returns out-of-fold predictions of the actions of some steps, [n, A]."""
    readings = statistics.standardize(data.proprio)
    words = statistics.standardize(statistics.bag_of_words(data.instructions, min_count=MIN_WORD))
    if data.frames is not None:
        means = data.frames.means.reshape(len(data.frames.means), -1)
        project = statistics.projection(means[:: -(-len(means) // MAX_IMAGES)], COMPONENTS)

    def features(i: np.ndarray) -> np.ndarray:
        steps = rows[i]
        parts = [readings[steps], words[data.episode[steps]]]
        if data.frames is not None:
            parts.append(project(means[steps]))
        return statistics.fourier_features(np.concatenate(parts, axis=1), WAVES)

    fold = statistics.folds(data.episode[rows])
    return statistics.ridge_out_of_fold(features, action, fold, max_fit=MAX_FIT)


def near_duplicate(data: Episodes) -> Finding:
    """Scores the fraction of windows that an earlier episode of the same split has too."""
    split = data.split

    def allowed(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return (j < i) & (split[i] == split[j])

    return Finding(*windows.repeated(data, allowed), {})


def split_leak(data: Episodes) -> Finding:
    """Scores the fraction of windows that an episode of another split has too."""
    if len(data.splits) == 1:
        return scored(data.missing())
    split = data.split
    return Finding(*windows.repeated(data, lambda i, j: split[i] != split[j]), {})


def instruction_imbalance(data: Episodes) -> Finding:
    """Scores the fraction of all episodes that have the instruction, if there are several."""
    counts = Counter(data.instructions)
    if len(counts) == 1:
        return scored(data.missing())
    return scored(np.array([counts[x] for x in data.instructions]) / len(data))


def action_imbalance(data: Episodes) -> Finding:
    """Scores the fraction of the episode's actions that are the most frequent one of the data.

    Each dimension is counted in BINS bins between its quantiles 0.01 and 0.99.
    """
    rows = np.flatnonzero(data.has_action)
    action = data.action[rows]
    low, high = np.quantile(action, [0.01, 0.99], axis=0)
    bins = np.clip((action - low) / np.maximum(high - low, 1e-9) * BINS, 0, BINS - 1).astype(int)
    _, kind, counts = np.unique(bins, axis=0, return_inverse=True, return_counts=True)
    usual = kind.ravel() == counts.argmax()
    episode = data.episode[rows]
    total = np.bincount(episode, minlength=len(data))
    fraction = np.bincount(episode, usual, minlength=len(data)) / np.maximum(total, 1)
    return scored(np.where(total >= MIN_ACTIONS, fraction, np.nan))


def mismatched_instruction(data: Episodes) -> Finding:
    """Scores how much better another instruction fits what the episode did.

    A logistic regression of the outcome predicts each word of the instruction: of the readings at
    the first, middle and last step, the colors of the pixels that changed from the first to the
    last image, before and after, or the features of the last image. An instruction has the log odds
    of its words and of those that it lacks over their frequencies. Words that nothing predicts, as
    those of a paraphrase, and words that few episodes have, or lack, do not count. The score is the
    log odds of the best other instruction of the data minus those of the given one, divided by the
    usual difference where the given one is the best: at 1, the model is as sure of another
    instruction as it usually is of the given one. If the given one is the best in less than
    MIN_AGREEMENT of the episodes, the model is too weak, and nothing has a score.
    """
    words = statistics.bag_of_words(data.instructions, min_count=MIN_WORD)
    if len(data) < MIN_EPISODES or not words.shape[1]:
        return scored(data.missing())
    fold = statistics.folds(np.arange(len(data)))
    p = statistics.out_of_fold(_outcome(data), words, fold, statistics.sigmoid)
    q = words.mean(axis=0)
    loss, least = (statistics.cross_entropy(words, x) for x in (p, np.broadcast_to(q, p.shape)))
    predicted = loss < (1 - SKILL) * least
    if not predicted.any():
        return scored(data.missing())
    p, q, words = np.clip(p[:, predicted], 0.01, 0.99), q[predicted], words[:, predicted]
    has, lacks = np.log(p / q), np.log((1 - p) / (1 - q))
    kinds, first, kind = np.unique(words, axis=0, return_index=True, return_inverse=True)
    kind = kind.ravel()
    fits = has @ kinds.T + lacks @ (1 - kinds).T
    rows = np.arange(len(data))
    given = fits[rows, kind]
    if len(kinds) == 1:
        return scored(data.missing())
    fits[rows, kind] = -np.inf
    best = fits.argmax(axis=1)
    margin = fits[rows, best] - given
    agrees = margin < 0
    if agrees.mean() < MIN_AGREEMENT:
        return scored(data.missing())
    scores = margin / np.median(-margin[agrees])
    other = [data.instructions[first[k]] for k in best]
    notes = {int(i): f"{other[i]!r} fits better." for i in np.flatnonzero(scores > 0)}
    return scored(scores)._replace(notes=notes)


def _outcome(data: Episodes) -> list[np.ndarray]:
    """Returns kinds of features of what each episode did, float64 [N, D] each."""
    starts, ends = data.starts[:-1], data.starts[1:] - 1
    readings = statistics.standardize(data.proprio)
    first, middle, last = (readings[rows] for rows in (starts, (starts + ends) // 2, ends))
    kinds = [np.concatenate([first, middle, last, last - first], axis=1)]
    if data.frames is not None:
        colors = []
        for part in images_lib.in_chunks(len(data)):
            images = data.frames.first[part], data.frames.last[part]
            changed = np.abs(np.subtract(*images, dtype=np.int16)).max(axis=-1) > CHANGED
            histograms = [np.sqrt(images_lib.histogram(x, changed)) for x in images]
            colors.append(np.concatenate(histograms, axis=1))
        kinds.append(np.concatenate(colors))
        kinds.append(np.concatenate([*images_lib.features(data.frames.last).values()], axis=1))
    kinds = [statistics.principal_components(x, COMPONENTS) for x in kinds]
    return [*kinds, np.concatenate(kinds, axis=1)]
