"""Linear probes of DINOv2-small, compared with the same network with random weights.

The label of an image is the color, the shape or the cell (of a 3x3 grid) of its object. In images
of five objects, it is that of the only circle. The probe reads the mean of the features of the
patches. Each measurement draws other images and other random weights.
"""

from collections.abc import Callable, Iterator
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.harness import Row, row
from mmrl_jax.pretrained import vision_encoders
from mmrl_jax.tasks import scenes
from mmrl_jax.types import Params

EDGE, CELLS = 126, 3  # Of an image in pixels, a multiple of DINOv2's patch, and of the grid.
TRAIN, TEST, BATCH = 400, 200, 20
PENALTIES = tuple(10.0 ** np.arange(-1, 5))


def rows(runs: int) -> Iterator[Row]:
    """Measures the accuracy of each label on new images; chance is at most 0.25."""
    encoder = vision_encoders.read_encoder(
        vision_encoders.DINOV2, EDGE, dtype=jnp.float32, remat=False
    )
    pretrained = {"params": vision_encoders.read_params(vision_encoders.DINOV2)}
    init, apply = jax.jit(encoder.init), jax.jit(encoder.apply)
    for objects, names in ((1, ("color", "shape", "cell")), (5, ("color", "cell"))):
        ours: list[dict[str, float]] = []
        peer: list[dict[str, float]] = []
        for i in range(runs):
            images, labels = draw(jax.random.key(i), TRAIN + TEST, objects=objects)
            untrained = init(jax.random.key(i), images[:1])
            for variables, found in ((pretrained, ours), (untrained, peer)):
                x = mean_features(apply, variables, images)
                found.append({name: accuracy(x, labels[name]) for name in names})
        which = "one object" if objects == 1 else f"the circle among {objects} objects"
        for name in names:
            accuracies = ([run[name] for run in side] for side in (ours, peer))
            yield row(f"{name} of {which} / random weights", *accuracies, unit="accuracy")


@functools.partial(jax.jit, static_argnums=1, static_argnames="objects")
def draw(key: jax.Array, count: int, *, objects: int) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Draws images uint8 [count, EDGE, EDGE, 3], and the labels int32 [count] of an object each."""
    cells = CELLS**2

    def one(key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        place_key, color_key, shape_key, render_key = jax.random.split(key, 4)
        order = jax.random.permutation(place_key, cells)
        color = jax.random.randint(color_key, (cells,), 0, len(scenes.COLORS))
        shape = jax.random.randint(shape_key, (cells,), 0, len(scenes.SHAPES))
        target = order[0]
        if objects > 1:
            shape = jnp.maximum(shape, 1).at[target].set(0)
        occupied = jnp.zeros(cells, bool).at[order[:objects]].set(True)
        image = scenes.render(
            render_key,
            scenes.Objects(shape, color, occupied),
            rows=CELLS,
            height=EDGE,
            width=EDGE,
            radius=0.3,
            spread=0.12,
        )
        return image, {"color": color[target], "shape": shape[target], "cell": target}

    return jax.vmap(one)(jax.random.split(key, count))


def mean_features(
    apply: Callable[[Params, jax.Array], jax.Array], variables: Params, images: jax.Array
) -> np.ndarray:
    """Returns the mean of the features of the patches of each image, float32 [N, E]."""
    batches = np.split(np.asarray(images), range(BATCH, len(images), BATCH))
    return np.concatenate([np.mean(apply(variables, batch), axis=1) for batch in batches])


def accuracy(features: np.ndarray, labels: jax.Array) -> float:
    """Returns the accuracy of ridge regression on the images after the first TRAIN.

    The penalty is the one with the highest accuracy on the last quarter of the first TRAIN images.

    Args:
      features: Features of all images, float32 [N, E].
      labels: Class of each image, int32 [N].
    """
    train = features[:TRAIN]
    x = (features - train.mean(axis=0)) / (train.std(axis=0) + 1e-6)
    y = np.asarray(labels)
    targets = np.eye(y.max() + 1)[y]

    def score(penalty: float, fitted: slice, tested: slice) -> float:
        a, mean = x[fitted], targets[fitted].mean(axis=0)
        dual = np.linalg.solve(a @ a.T + penalty * np.eye(len(a)), targets[fitted] - mean)
        predicted = np.argmax(x[tested] @ (a.T @ dual) + mean, axis=1)
        return float(np.mean(predicted == y[tested]))

    cut = TRAIN * 3 // 4
    best = max(PENALTIES, key=lambda p: score(p, slice(cut), slice(cut, TRAIN)))
    return score(best, slice(TRAIN), slice(TRAIN, None))
