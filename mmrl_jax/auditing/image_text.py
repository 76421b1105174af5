"""Checks of image-text records: functions from `ImageTexts` to scores, which are high if bad."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mmrl_jax.auditing import images as images_lib
from mmrl_jax.auditing import statistics
from mmrl_jax.auditing.samples import Finding, ImageTexts, scored

COMPONENTS = 128  # Maximum number of principal components of the features of images.
MIN_GROUP, MIN_CLASS = 40, 5  # Least number of records of a prompt, and of one of its answers.
# Minimum agreement of a model with the answers, on a scale on which giving always the most frequent
# answer is 0 and giving all of them is 1; below it, the scores of the model are not used.
MIN_SKILL = 0.4
MAX_ANSWERS = 50  # Number of the most frequent answers that the text-only model knows.


def over_images(data: ImageTexts, score: Callable[[np.ndarray], np.ndarray]) -> Finding:
    """Returns a finding whose scores a function of images [n, S, S, 3] computes."""
    parts = [score(data.images[part]) for part in images_lib.in_chunks(len(data))]
    return scored(np.concatenate(parts))


def constant_image(data: ImageTexts) -> Finding:
    """Scores 1 / (1 + s), where s is the standard deviation of the image in 8-bit levels."""
    return over_images(data, lambda x: 1 / (1 + images_lib.deviation(x)))


def noise_image(data: ImageTexts) -> Finding:
    """Scores the roughness of the image, see `images.roughness`."""
    return over_images(data, images_lib.roughness)


def near_duplicate(data: ImageTexts) -> Finding:
    """Scores the similarity to an earlier image of the same split with the same prompt."""
    prompt = _numbers(data.prompts)
    split = data.split

    def allowed(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return (j < i) & (prompt[i] == prompt[j]) & (split[i] == split[j])

    similarity, partner = images_lib.most_similar(data.descriptors, allowed)
    notes = {
        int(i): f"Its answer is {data.answers[i]!r}, that of the other {data.answers[j]!r}."
        for i, j in enumerate(partner)
        if j >= 0 and data.answers[i] != data.answers[j]
    }
    return Finding(similarity, partner, notes)


def split_leak(data: ImageTexts) -> Finding:
    """Scores the similarity to an image of another split."""
    if len(data.splits) == 1:
        return scored(data.missing())
    split = data.split
    similar = images_lib.most_similar(data.descriptors, lambda i, j: split[i] != split[j])
    return Finding(*similar, {})


def answer_imbalance(data: ImageTexts) -> Finding:
    """Scores the fraction of all records that have the answer of the record."""
    counts = Counter(data.answers)
    return scored(np.array([counts[x] for x in data.answers]) / len(data))


def label_noise(data: ImageTexts) -> Finding:
    """Scores how much more probable another answer of the prompt is, given the image.

    A logistic regression predicts the answer from those features of the image that predict it best,
    for each prompt by itself. The score is that of confident learning, see
    `statistics.confident_margin`. Records of prompts with few records or one answer, and of rare
    answers, have no score, nor have those of a prompt where the model agrees with not many more
    answers than a constant does, see MIN_SKILL.
    """
    scores, notes = data.missing(), {}
    for rows, labels, names in _groups(data):
        kinds = [
            statistics.principal_components(x[rows], COMPONENTS) for x in data.features.values()
        ]
        kinds.append(np.concatenate(kinds, axis=1))
        fold = statistics.folds([data.image_digests[i] for i in rows])
        p = statistics.out_of_fold(kinds, np.eye(len(names))[labels], fold, statistics.softmax)
        agreement, constant = (p.argmax(axis=1) == labels).mean(), np.bincount(labels).max()
        if agreement - constant / len(rows) < MIN_SKILL * (1 - constant / len(rows)):
            continue
        margin, best = statistics.confident_margin(p, labels)
        scores[rows] = margin
        for k in np.flatnonzero(best != labels):
            notes[int(rows[k])] = (
                f"{names[best[k]]!r} has the probability {p[k, best[k]]:.2f}, "
                f"the answer {p[k, labels[k]]:.2f}."
            )
    return scored(scores)._replace(notes=notes)


def _groups(data: ImageTexts) -> Iterator[tuple[np.ndarray, np.ndarray, Sequence[str]]]:
    """Yields the records of each prompt that can be scored, their labels, and the labels' names."""
    prompts = _numbers(data.prompts)
    for prompt in np.flatnonzero(np.bincount(prompts) >= MIN_GROUP):
        rows = np.flatnonzero(prompts == prompt)
        counts = Counter(data.answers[i] for i in rows)
        rows, labels, names = _labels(data, rows, [x for x, n in counts.items() if n >= MIN_CLASS])
        # Records of one image are in one fold, and a model needs others.
        images = {data.image_digests[i] for i in rows}
        if len(names) > 1 and len(rows) >= MIN_GROUP and len(images) >= statistics.FOLDS:
            yield rows, labels, names


def _labels(
    data: ImageTexts, rows: np.ndarray, answers: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
    """Returns those of some records that have one of some answers, their labels, and the names."""
    names = sorted(answers)
    numbers = {name: number for number, name in enumerate(names)}
    rows = np.array([i for i in rows if data.answers[i] in numbers], np.int64)
    return rows, np.array([numbers[data.answers[i]] for i in rows], np.int64), names


def _numbers(texts: Sequence[str]) -> np.ndarray:
    """Returns a number for each text, the same for equal ones, int64 [N].

    An array of the texts would have the length of the longest one in each row.
    """
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int64)


def text_only(data: ImageTexts) -> Finding:
    """Scores how well the answer is predicted from the prompt alone.

    A logistic regression of the words of the prompt and their pairs gives the probability p of the
    answer, and q is its frequency in the data: the score is (p - q) / (1 - q), at least 0. Records
    with rare answers have no score.
    """
    frequent = [x for x, n in Counter(data.answers).most_common(MAX_ANSWERS) if n >= MIN_CLASS]
    rows, labels, names = _labels(data, np.arange(len(data)), frequent)
    finding = scored(data.missing())
    prompts = [data.prompts[i] for i in rows]
    words = statistics.bag_of_words(prompts, min_count=MIN_CLASS, pairs=True)
    if len(names) < 2 or not words.shape[1]:
        return finding
    fold = statistics.folds(rows)
    p = statistics.out_of_fold([words], np.eye(len(names))[labels], fold, statistics.softmax)
    given, frequency = p[np.arange(len(rows)), labels], np.bincount(labels) / len(rows)
    q = frequency[labels]
    finding.scores[rows] = np.maximum((given - q) / (1 - q), 0)
    notes = {
        int(i): f"The prompt alone gives the answer the probability {x:.2f}."
        for i, x in zip(rows, given, strict=True)
    }
    return finding._replace(notes=notes)
