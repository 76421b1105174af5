"""Statistics, hashes and features of small images."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

CHUNK = 256  # Number of images that are in memory as floats at a time.
PAIRS = 4096  # Number of pairs of images that are compared at a time.
HASH_BITS = 10  # Maximum number of different bits, of 63, of two images that are compared.
BLOCKS = 16  # Blocks of an image in each direction whose means are compared.
PATCH, STRIDE, PATCHES = 6, 2, 128  # Edge and distance of patches in pixels, and their number.
BINS = 4  # Number of bins of the color histogram, for each channel.
MIN_DEVIATION = 2.0  # Levels of a standard deviation below which an image has no structure.

# Two arrays of indices of samples, which are broadcast -> whether a pair is compared, bool.
Allowed = Callable[[np.ndarray, np.ndarray], np.ndarray]


def in_chunks(count: int, size: int = CHUNK) -> Iterator[slice]:
    """Yields slices of at most `size` of `count` samples."""
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def gray(images: np.ndarray) -> np.ndarray:
    """Returns the mean of the channels of images [N, H, W, 3], float32 [N, H, W] in [0, 255]."""
    return np.asarray(images, np.float32).mean(axis=-1)


def deviation(images: np.ndarray) -> np.ndarray:
    """Returns the standard deviation of the values of each channel, in 8-bit levels, float32 [N].

    Of the three channels, it is that of the one with the largest.
    """
    return np.asarray(images, np.float32).std(axis=(1, 2)).max(axis=-1)


def roughness(images: np.ndarray) -> np.ndarray:
    """Returns 1 minus the correlation of neighboring pixels, float32 [N]: near 1 for noise.

    It is half the mean squared difference of neighbors over the variance, in photographs about 0.1.
    Images without structure have 0.
    """
    x = gray(images)
    variance = x.var(axis=(1, 2))
    squares = [np.square(np.diff(x, axis=axis)).mean(axis=(1, 2)) for axis in (1, 2)]
    structured = variance > MIN_DEVIATION**2
    return np.where(structured, sum(squares) / 4 / np.where(structured, variance, 1), 0)


def shrink(images: np.ndarray, edge: int) -> np.ndarray:
    """Returns the means of blocks of images [N, H, W, 3], float32 [N, edge, edge, 3].

    Args:
      images: Images, uint8 [N, H, W, 3].
      edge: Number of blocks in each direction; an image with fewer pixels is repeated.
    """
    _, height, width, _ = images.shape
    rows, columns = (_averages(size, edge) for size in (height, width))
    x = np.asarray(images, np.float32)
    return np.einsum("ih,nhwc,jw->nijc", rows, x, columns, optimize=True)


def _averages(size: int, edge: int) -> np.ndarray:
    """Returns the matrix [edge, size] of the means of `edge` equal parts of an axis."""
    borders = np.linspace(0, size, edge + 1)
    low, high = borders[:-1, None], borders[1:, None]
    cell = np.arange(size)
    overlap = np.clip(np.minimum(high, cell + 1) - np.maximum(low, cell), 0, None)
    return (overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32)


def perceptual_hash(images: np.ndarray) -> np.ndarray:
    """Returns a hash of the low frequencies of each image, uint64 [N], 63 bits of which are used.

    The bits are the signs of the first 8 x 8 coefficients of the discrete cosine transform,
    compared with their median and without the mean brightness, as in pHash (Zauner, 2010,
    "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1).
    """
    size = 32
    k, i = np.arange(8)[:, None], np.arange(size)
    basis = np.cos(np.pi * k * (2 * i + 1) / (2 * size)).astype(np.float32)
    hashes = [np.zeros(0, np.uint64)]
    for part in in_chunks(len(images)):
        x = shrink(images[part], size).mean(axis=-1)
        waves = np.einsum("ah,nhw,bw->nab", basis, x, basis, optimize=True)
        waves = waves.reshape(len(x), -1)[:, 1:]
        bits = waves > np.median(waves, axis=1, keepdims=True)
        hashes.append((bits * (np.uint64(1) << np.arange(63, dtype=np.uint64))).sum(axis=1))
    return np.concatenate(hashes).astype(np.uint64)


class Descriptors(NamedTuple):
    """What N images are compared by.

    Attributes:
      hashes: Hashes, uint64 [N], see `perceptual_hash`.
      blocks: Means of blocks without that of the image, float32 [N, BLOCKS, BLOCKS, 3].
      structured: Whether an image has structure, bool [N]. Those without it are all alike, and are
        found by their deviation.
    """

    hashes: np.ndarray
    blocks: np.ndarray
    structured: np.ndarray


def descriptors(images: np.ndarray) -> Descriptors:
    """Returns what images, uint8 [N, H, W, 3], are compared by."""
    blocks = [shrink(images[part], BLOCKS) for part in in_chunks(len(images))]
    deviations = [deviation(images[part]) for part in in_chunks(len(images))]
    return Descriptors(
        perceptual_hash(images),
        np.concatenate([x - x.mean(axis=(1, 2, 3), keepdims=True) for x in blocks]),
        np.concatenate(deviations) > MIN_DEVIATION,
    )


def most_similar(images: Descriptors, allowed: Allowed) -> tuple[np.ndarray, np.ndarray]:
    """Returns the similarity of each image to the most similar one that it may be compared with.

    Images whose hashes differ in at most HASH_BITS bits are compared: the similarity is 1 minus the
    largest difference of the means of BLOCKS x BLOCKS blocks, after that of the brightness of the
    images, over 255. Other images have the similarity 0. The time grows with the square of N.

    Args:
      images: Descriptors of N images.
      allowed: Function of indices [n] and [n] that returns which pairs are compared.

    Returns:
      The similarities, float32 [N] in [0, 1], and the indices of the similar images, int64 [N], -1
      where there is none.
    """
    hashes, blocks, structured = images
    similarity = np.zeros(len(hashes), np.float32)
    partner = np.full(len(hashes), -1)
    for part in in_chunks(len(hashes)):
        close = np.bitwise_count(hashes[part, None] ^ hashes[None]) <= HASH_BITS
        rows, columns = np.nonzero(close & structured & structured[part, None])
        rows += part.start
        kept = allowed(rows, columns)
        rows, columns = rows[kept], columns[kept]
        for pairs in in_chunks(len(rows), PAIRS):
            a, b = rows[pairs], columns[pairs]
            alike = 1 - np.abs(blocks[a] - blocks[b]).max(axis=(1, 2, 3)) / 255
            # Of the pairs of an image, the best one is written last.
            order = np.argsort(alike, kind="stable")
            better = order[alike[order] > similarity[a[order]]]
            similarity[a[better]], partner[a[better]] = alike[better], b[better]
    return similarity, partner


def histogram(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the fraction of masked pixels that have each color, float32 [N, BINS^3].

    Args:
      images: Images, uint8 [N, H, W, 3].
      mask: Weights of the pixels, [N, H, W]; all fractions are 0 if they are 0.
    """
    bins = np.asarray(images, np.int64) * BINS // 256
    color = (bins[..., 0] * BINS + bins[..., 1]) * BINS + bins[..., 2]
    color = (color + np.arange(len(images))[:, None, None] * BINS**3).ravel()
    counts = np.bincount(color, np.ravel(mask), minlength=len(images) * BINS**3)
    total = np.asarray(mask, np.float32).sum(axis=(1, 2))[:, None]
    return (counts.reshape(len(images), -1) / np.maximum(total, 1)).astype(np.float32)


def features(images: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns features of images for linear models, by their kind, float32 [N, D] each.

    'colors' are the square roots of a color histogram, 'layout' the means of 8 x 8 blocks, and
    'textures' the responses to random patches of the images, rectified, their maximum over the
    image and their means over its quadrants, which tell shapes apart without training (Coates and
    Ng, 2011, "The Importance of Encoding Versus Training with Sparse Coding and Vector
    Quantization").

    Args:
      images: Square images, uint8 [N, S, S, 3], with S at least 2 * PATCH.
      seed: Seed of the choice of patches.
    """
    filters = _filters(images, seed)
    kinds: dict[str, list[np.ndarray]] = {"colors": [], "layout": [], "textures": []}
    for part in in_chunks(len(images)):
        x = images[part]
        responses = np.maximum(_patches(x) @ filters.T, 0)
        edge = round(responses.shape[1] ** 0.5)
        grid = responses.reshape(len(x), edge, edge, -1)
        halves = slice(edge // 2), slice(edge // 2, None)
        quadrants = [grid[:, a, b].mean(axis=(1, 2)) for a in halves for b in halves]
        kinds["textures"].append(np.concatenate([responses.max(axis=1), *quadrants], axis=1))
        kinds["colors"].append(np.sqrt(histogram(x, np.ones(x.shape[:3]))))
        kinds["layout"].append(shrink(x, 8).reshape(len(x), -1))
    return {name: np.concatenate(parts) for name, parts in kinds.items()}


def _filters(images: np.ndarray, seed: int) -> np.ndarray:
    """Returns random patches of some images with norm 1, float32 [PATCHES, PATCH^2 * 3]."""
    rng = np.random.default_rng(seed)
    found = []
    for i in rng.integers(0, len(images), 2 * PATCHES):
        patches = _patches(images[i : i + 1])[0]
        found.append(patches[rng.integers(0, len(patches), 8)])
    filters = np.concatenate(found)
    norms = np.linalg.norm(filters, axis=1)
    # Most patches of drawings are flat, and say nothing.
    filters = filters[rng.permutation(np.argsort(-norms)[: 8 * PATCHES])[:PATCHES]]
    return filters / np.maximum(np.linalg.norm(filters, axis=1, keepdims=True), 1e-3)


def _patches(images: np.ndarray) -> np.ndarray:
    """Returns the patches of square images without their mean, float32 [N, places, PATCH^2 * 3]."""
    x = np.asarray(images, np.float32) / 255
    windows = np.lib.stride_tricks.sliding_window_view(x, (PATCH, PATCH), axis=(1, 2))
    windows = windows[:, ::STRIDE, ::STRIDE]
    patches = windows.reshape(len(x), windows.shape[1] * windows.shape[2], -1)
    return patches - patches.mean(axis=-1, keepdims=True)
