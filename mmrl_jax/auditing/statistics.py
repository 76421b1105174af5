"""Small models that are fitted by numpy and applied out of fold."""

from collections import Counter
from collections.abc import Callable, Sequence
import itertools
import re

import numpy as np

from mmrl_jax.auditing.images import in_chunks

FOLDS = 5
CHUNK = 4096  # Number of samples whose features are in memory at a time.
# Of the penalties, the one with the lowest out-of-fold loss is used.
PENALTIES = (1e-4, 1e-3, 1e-2)
RIDGE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
ITERATIONS = 200  # Number of steps of accelerated gradient descent.
MAX_WORDS = 300  # Maximum number of words in a bag of words.
EPSILON = 1e-6

Activation = Callable[[np.ndarray], np.ndarray]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns probabilities of K classes that exclude each other, [N, K]."""
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Returns probabilities of K independent events, [N, K]."""
    return 1 / (1 + np.exp(-np.clip(logits, -30, 30)))


def folds(groups: Sequence | np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns the fold of each sample, int64 [N] in [0, FOLDS).

    Args:
      groups: Group of each of N samples. All samples of a group are in one fold.
      seed: Seed of the assignment.
    """
    _, numbers = np.unique(np.asarray(groups), return_inverse=True)
    order = np.random.default_rng(seed).permutation(int(numbers.max()) + 1)
    return order[numbers] % FOLDS


def standardize(x: np.ndarray) -> np.ndarray:
    """Returns columns [N, D] with mean 0 and standard deviation 1; constant columns become 0."""
    x = np.asarray(x, np.float64)
    std = x.std(axis=0)
    return (x - x.mean(axis=0)) / np.where(std > EPSILON, std, np.inf)


def principal_components(x: np.ndarray, count: int) -> np.ndarray:
    """Returns the first principal components of features [N, D], see `projection`."""
    return projection(x, count)(x)


def projection(x: np.ndarray, count: int) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from features [n, D] to the first principal components, [n, <= count].

    The components are those of standardized columns. They are scaled so that the first one has
    variance 1, and those with less than a millionth of its variance are left out.

    Args:
      x: Features to which the components are fitted, [N, D].
      count: Maximum number of components.
    """
    mean, std = np.mean(x, axis=0, dtype=np.float64), np.std(x, axis=0, dtype=np.float64)
    std = np.where(std > EPSILON, std, np.inf)
    standard = (x - mean) / std
    values, vectors = np.linalg.eigh(standard.T @ standard / len(x))
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    kept = values > EPSILON * max(values[0], EPSILON)
    matrix = vectors[:, kept] / np.sqrt(max(values[0], EPSILON))
    return lambda x: (x - mean) / std @ matrix


def fit_linear(
    x: np.ndarray, targets: np.ndarray, activation: Activation, penalty: float
) -> np.ndarray:
    """Returns the weights of a logistic regression, float64 [D + 1, K], the last row the bias.

    The mean cross-entropy plus `penalty / 2` times the squared weights is minimized by Nesterov's
    accelerated gradient descent with the step 1 / L, where L bounds the curvature.

    Args:
      x: Features, [N, D].
      targets: Probabilities of K events, [N, K].
      activation: `softmax` or `sigmoid`.
      penalty: Coefficient of the squared weights; the bias has none.
    """
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    decay = np.append(np.full(x.shape[1] - 1, penalty), 0)[:, None]
    # The Hessian of softmax is at most 1/2 times that of the squared loss, and of sigmoid 1/4.
    step = 1 / (0.5 * np.linalg.eigvalsh(x.T @ x / len(x))[-1] + penalty)
    weights = ahead = np.zeros((x.shape[1], targets.shape[1]))
    for i in range(ITERATIONS):
        gradient = x.T @ (activation(x @ ahead) - targets) / len(x) + decay * ahead
        new = ahead - step * gradient
        ahead = new + i / (i + 3) * (new - weights)
        weights = new
    return weights


def out_of_fold(
    features: Sequence[np.ndarray], targets: np.ndarray, fold: np.ndarray, activation: Activation
) -> np.ndarray:
    """Returns probabilities of logistic regressions that have not seen the sample, [N, K].

    Args:
      features: Kinds of features, [N, D] each. Of these and of the penalties, those with the lowest
        out-of-fold loss are used, with `sigmoid` for each event by itself.
      targets: 1 for events that occurred, else 0, [N, K].
      fold: Fold of each sample, see `folds`.
      activation: `softmax` or `sigmoid`.
    """
    best, lowest = np.zeros(targets.shape), np.full(targets.shape[1], np.inf)
    for x, penalty in itertools.product(features, PENALTIES):
        p = np.empty(targets.shape)
        for k in np.unique(fold):
            out = fold == k
            weights = fit_linear(x[~out], targets[~out], activation, penalty)
            p[out] = activation(x[out] @ weights[:-1] + weights[-1])
        p = np.clip(p, EPSILON, 1 - EPSILON)
        loss = cross_entropy(targets, p)
        loss = loss if activation is sigmoid else np.full_like(loss, loss.sum())
        best, lowest = np.where(loss < lowest, p, best), np.minimum(loss, lowest)
    return best


def cross_entropy(targets: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Returns the mean cross-entropy of probabilities [N, K] of each of K events, in nats, [K]."""
    return -np.mean(targets * np.log(p) + (1 - targets) * np.log(1 - p), axis=0)


def fourier_features(x: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Returns x, random Fourier features of it, and 1, [N, D + count + 1].

    A linear model of them approximates one with a Gaussian kernel whose width is the square root of
    the number of features (Rahimi and Recht, 2007, "Random Features for Large-Scale Kernel
    Machines").

    Args:
      x: Features with standard deviation 1, [N, D].
      count: Number of random features.
      seed: Seed of the features.
    """
    rng = np.random.default_rng(seed)
    frequencies = rng.normal(size=(x.shape[1], count)) / np.sqrt(max(x.shape[1], 1))
    waves = np.cos(x @ frequencies + rng.uniform(0, 2 * np.pi, count))
    return np.concatenate([x, waves, np.ones((len(x), 1))], axis=1)


def ridge_out_of_fold(
    features: Callable[[np.ndarray], np.ndarray],
    targets: np.ndarray,
    fold: np.ndarray,
    *,
    max_fit: int,
) -> np.ndarray:
    """Returns predictions of ridge regressions that have not seen the sample, [N, K].

    Of the penalties, the one with the lowest out-of-fold error is used; if it is not below that of
    predicting 0, the predictions are 0.

    Args:
      features: Function from the indices of samples, int64 [n], to their features, [n, D], which
        are in memory for CHUNK samples at a time.
      targets: Targets with mean 0, [N, K].
      fold: Fold of each sample, see `folds`.
      max_fit: Number of samples, evenly spaced, to which a model is fitted at most.
    """
    predictions = np.zeros((1 + len(RIDGE_PENALTIES), *targets.shape))
    for k in np.unique(fold):
        rows, out = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        rows = rows[:: -(-len(rows) // max_fit)]
        moments = products = np.zeros(())
        for part in in_chunks(len(rows), CHUNK):
            x = features(rows[part])
            moments, products = moments + x.T @ x, products + x.T @ targets[rows[part]]
        ridge = len(rows) * np.eye(len(moments))
        weights = [np.linalg.solve(moments + c * ridge, products) for c in RIDGE_PENALTIES]
        for part in in_chunks(len(out), CHUNK):
            predictions[1:, out[part]] = features(out[part]) @ np.array(weights)
    errors = [np.square(x - targets).sum() for x in predictions]
    return predictions[np.argmin(errors)]


def confident_margin(p: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns how much more probable another label is than the given one.

    A class counts as confident for a sample if its probability is at least the mean probability of
    the class over the samples that have it as their label (Northcutt et al., 2021, "Confident
    Learning: Estimating Uncertainty in Dataset Labels", section 3.1).

    Args:
      p: Out-of-fold probabilities of K classes, [N, K].
      labels: Given label of each sample, int [N] in [0, K).

    Returns:
      The probability of the most probable confident class that is not the label, minus the
      probability of the label, in [-1, 1]; -1 if no other class is confident. And that class, int64
      [N], or the label.
    """
    rows = np.arange(len(p))
    given = p[rows, labels]
    classes = np.arange(p.shape[1])
    members = classes == labels[:, None]
    thresholds = np.where(members, p, 0).sum(axis=0) / np.maximum(members.sum(axis=0), 1)
    # A class that no sample has would be confident everywhere.
    thresholds[~members.any(axis=0)] = np.inf
    others = np.where((p >= thresholds) & ~members, p, -1)
    best = others.argmax(axis=1)
    confident = others[rows, best] >= 0
    margin = np.where(confident, others[rows, best] - given, -1)
    return margin, np.where(confident, best, labels)


def bag_of_words(texts: Sequence[str], *, min_count: int, pairs: bool = False) -> np.ndarray:
    """Returns which words each text has, float64 [N, V]; V may be 0.

    Words that fewer than `min_count` texts have, or fewer than `min_count` do not have, are left
    out, and of the others the most frequent MAX_WORDS are used.

    Args:
      texts: N texts.
      min_count: Minimum number of texts with a word, and without it.
      pairs: Whether pairs of words that follow each other count as words too.
    """
    bags = {text: _words(text, pairs) for text in set(texts)}
    counts = Counter(word for text in texts for word in bags[text])
    frequent = [(n, word) for word, n in counts.items() if min_count <= n <= len(texts) - min_count]
    words = [word for _, word in sorted(frequent, reverse=True)[:MAX_WORDS]]
    return np.array([[word in bags[text] for word in words] for text in texts], np.float64).reshape(
        len(texts), len(words)
    )


def _words(text: str, pairs: bool) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    following = [f"{a} {b}" for a, b in itertools.pairwise(words)] if pairs else []
    return {*words, *following}
