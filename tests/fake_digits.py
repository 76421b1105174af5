"""Images in place of those of scikit-learn."""

import numpy as np


def load() -> tuple[np.ndarray, np.ndarray]:
    """Returns 40 images of noise, four of each digit, as `mmrl_jax.tasks.digits.load`."""
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8)).astype(np.uint8)
    return images, np.arange(40) % 10
