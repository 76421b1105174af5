"""Windows of demonstrations, and the search for episodes that repeat them."""

import numpy as np

from mmrl_jax.auditing import statistics
from mmrl_jax.auditing.images import Allowed
from mmrl_jax.auditing.samples import Episodes

LENGTH, STRIDE = 8, 4  # Number of steps of a window, and between the starts of two windows.
MAX_DISTANCE = 0.05  # Distance of two windows that are copies, in standard deviations of a reading.
MAX_LEVELS = 6.0  # Root mean square of the difference of their images, in 8-bit levels.
MAX_COPIES = 64  # Maximum number of windows whose images a window is compared with.
CHUNK = 512  # Number of windows that are compared with others at a time.


def windows(data: Episodes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the windows of all episodes.

    An episode that is shorter than a window has one, in which its last step is repeated.

    Returns:
      The readings and actions in units of their standard deviation, float32 [W, D]; the middle
      images, float32 [W, 192], or [W, 0] without images; and the episode of each window, int64 [W].
    """
    actions = np.where(data.has_action[:, None], data.action, 0)
    steps = np.concatenate(
        [statistics.standardize(data.proprio), statistics.standardize(actions)], axis=1
    ).astype(np.float32)
    starts, ends = data.starts[:-1], data.starts[1:]
    counts = np.maximum((ends - starts - LENGTH) // STRIDE, 0) + 1
    episode = np.repeat(np.arange(len(data)), counts)
    number = np.arange(len(episode)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = (starts[episode] + number * STRIDE)[:, None] + np.arange(LENGTH)
    rows = np.minimum(rows, ends[episode, None] - 1)
    images = np.zeros((len(rows), 0), np.float32)
    if data.frames is not None:
        middle = data.frames.means[rows[:, LENGTH // 2]]
        images = middle.reshape(len(rows), -1).astype(np.float32)
    return steps[rows].reshape(len(rows), -1), images, episode


def repeated(data: Episodes, allowed: Allowed) -> tuple[np.ndarray, np.ndarray]:
    """Returns the fraction of the windows of each episode that another episode has too.

    Two windows are the same if the root mean squares of the differences of their readings and
    actions, and of their images, are at most MAX_DISTANCE and MAX_LEVELS. Windows are sorted by
    their first principal component, in which the same ones are neighbors.

    Args:
      data: Episodes.
      allowed: Function of indices [n, 1] and [1, m] of episodes that returns which are compared.

    Returns:
      The fractions, float32 [N], and the episode that most of these windows are in, int64 [N]; -1
      if there is none.
    """
    x, images, episode = windows(data)
    # Windows at rest are the same in all episodes, and say nothing.
    moving = np.ptp(x.reshape(len(x), LENGTH, -1), axis=1).max(axis=1) > MAX_DISTANCE
    radius = MAX_DISTANCE * np.sqrt(x.shape[1])
    centered = x - x.mean(axis=0)
    _, vectors = np.linalg.eigh(centered.T @ centered)
    position = centered @ vectors[:, -1]
    order = np.flatnonzero(moving)[np.argsort(position[moving], kind="stable")]
    x, images, sorted_episode, position = (y[order] for y in (centered, images, episode, position))
    norms = np.square(x).sum(axis=1)
    copy = np.full(len(episode), -1)
    for start in range(0, len(order), CHUNK):
        part = slice(start, min(start + CHUNK, len(order)))
        low = np.searchsorted(position, position[part.start] - radius)
        high = np.searchsorted(position, position[part.stop - 1] + radius, side="right")
        near = slice(low, high)
        close = norms[part, None] + norms[None, near] - 2 * x[part] @ x[near].T <= radius**2
        close &= allowed(sorted_episode[part, None], sorted_episode[None, near])
        close &= np.cumsum(close, axis=1) <= MAX_COPIES
        rows, columns = np.nonzero(close)
        squares = np.square(images[rows + part.start] - images[columns + low]).sum(axis=1)
        same = squares <= MAX_LEVELS**2 * images.shape[1]
        copy[order[rows[same] + part.start]] = sorted_episode[columns[same] + low]
    return _by_episode(data, episode, copy, moving)


def _by_episode(
    data: Episodes, episode: np.ndarray, copy: np.ndarray, moving: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the fraction of moving windows with a copy, and the most frequent other episode."""
    count = len(data)
    total = np.bincount(episode[moving], minlength=count)
    found = moving & (copy >= 0)
    fraction = np.bincount(episode[found], minlength=count) / np.maximum(total, 1)
    partner = np.full(count, -1)
    for i in np.flatnonzero(fraction):
        partner[i] = np.bincount(copy[found & (episode == i)]).argmax()
    return fraction.astype(np.float32), partner
