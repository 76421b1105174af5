"""Inputs of a multimodal policy as floating-point features, and the units that are explained.

A unit is a patch of a frame, a word, or a proprioceptive reading. Gradients exist with respect to
features only: pixels are made float32, and a word is its embedding before fusion and FiLM. Features
are read and replaced at the encoders of `models.policy.MultimodalPolicy` by intercepting the calls
of its submodules, so that no second model is needed.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.interpretability.targets import Predict
from mmrl_jax.models.heads import PolicyOutput
from mmrl_jax.types import Observation

# Submodules of the policy whose first input or whose output is a feature.
_INPUTS = {"vision": "pixels", "vision_projection": "pixels", "proprio": "proprio"}
_OUTPUTS = {"text": "words", "text_projection": "words"}


class Features(NamedTuple):
    """Features of B observations with K frames.

    Attributes:
      pixels: Pixels in [0, 255], float32 [B, K, H, W, 3]; for a pretrained vision encoder its
        features, float32 [B, K, P, E].
      words: Embeddings of the words, float32 [B, L, D].
      proprio: Normalized proprioceptive readings, float32 [B, K, R].
    """

    pixels: jax.Array
    words: jax.Array
    proprio: jax.Array


@contextlib.contextmanager
def _intercepted(handle: Callable[[str, jax.Array], jax.Array]) -> Iterator[None]:
    """Context in which `handle` may replace each feature, given its name and its value."""

    def interceptor(
        method: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any
    ) -> Any:
        name = context.module.path[0] if len(context.module.path) == 1 else ""
        if context.method_name != "__call__":
            return method(*args, **kwargs)
        if name in _INPUTS:
            return method(handle(_INPUTS[name], args[0]), *args[1:], **kwargs)
        output = method(*args, **kwargs)
        return handle(_OUTPUTS[name], output) if name in _OUTPUTS else output

    with nn.intercept_methods(interceptor):
        yield


def features(predict: Predict, observation: Observation) -> Features:
    """Returns the features of observations [B, ...].

    Args:
      predict: Function of observations that runs a `MultimodalPolicy`.
      observation: Observations, see `types.Observation`.

    Raises:
      ValueError: If the policy is of another class and has no such encoders.
    """
    found: dict[str, jax.Array] = {}

    def record(name: str, x: jax.Array) -> jax.Array:
        found[name] = x
        return x

    with _intercepted(record):
        predict(observation)
    if set(found) != set(Features._fields):
        raise ValueError(
            f"The policy has the features {sorted(found)}, but attribution needs "
            f"{Features._fields}: only policies with model.kind='multimodal' can be explained."
        )
    batch = found["words"].shape[0]

    def by_frame(x: jax.Array) -> jax.Array:
        return x.reshape(batch, -1, *x.shape[1:]).astype(jnp.float32)

    return Features(
        pixels=by_frame(found["pixels"]),
        words=found["words"].astype(jnp.float32),
        proprio=by_frame(found["proprio"]),
    )


def predict_from(predict: Predict, observation: Observation, given: Features) -> PolicyOutput:
    """Returns the output of a policy on given features.

    Args:
      predict: Function of observations that runs a `MultimodalPolicy`.
      observation: Observations [B, ...], of which only shapes and the mask of the words are used.
      given: Features that replace those of the observations.
    """

    def replace(name: str, x: jax.Array) -> jax.Array:
        new = getattr(given, name).reshape(x.shape)
        # Pixels stay float32: as uint8 they would have no gradient.
        return new.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else new

    with _intercepted(replace):
        return predict(observation)


@dataclasses.dataclass(frozen=True)
class Units:
    """The units of an observation, numbered from 0 to U - 1: patches, words, readings.

    Attributes:
      frames: Number K of frames.
      rows: Number of rows of patches in a frame.
      columns: Number of columns of patches in a frame.
      words: Number L of words, padding included.
      readings: Number R of proprioceptive readings in a frame.
      patch: Edge of a patch in pixels; None if features of patches replace pixels.
    """

    frames: int
    rows: int
    columns: int
    words: int
    readings: int
    patch: int | None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of patches, words and readings."""
        return (
            self.frames * self.rows * self.columns,
            self.words,
            self.frames * self.readings,
        )

    @property
    def count(self) -> int:
        """Number U of units."""
        return sum(self.sizes)

    @property
    def modality(self) -> np.ndarray:
        """Index of the modality of each unit in `Features`, int [U]."""
        return np.repeat(np.arange(3), self.sizes)

    def present(self, word_mask: jax.Array) -> jax.Array:
        """Returns which units are not padding, bool [B, U], from the mask of the words [B, L]."""
        batch, (patches, _, readings) = word_mask.shape[0], self.sizes
        ones = [jnp.ones((batch, n), bool) for n in (patches, readings)]
        return jnp.concatenate([ones[0], word_mask, ones[1]], axis=1)

    def split(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Splits [B, U] into patches [B, K, rows, columns], words [B, L], readings [B, K, R]."""
        patches, words, readings = jnp.split(x, np.cumsum(self.sizes)[:2], axis=1)
        batch = x.shape[0]
        return (
            patches.reshape(batch, self.frames, self.rows, self.columns),
            words,
            readings.reshape(batch, self.frames, self.readings),
        )

    def aggregate(self, attribution: Features) -> jax.Array:
        """Returns the sum of the attributions of the features of each unit, float32 [B, U]."""
        batch = attribution.words.shape[0]
        pixels = attribution.pixels
        if self.patch is not None:
            shape = (batch, self.frames, self.rows, self.patch, self.columns, self.patch, -1)
            pixels = pixels.reshape(shape).sum((3, 5))
        parts = [pixels.sum(-1), attribution.words.sum(-1), attribution.proprio]
        return jnp.concatenate([x.reshape(batch, -1).astype(jnp.float32) for x in parts], axis=1)

    def mix(self, inputs: Features, background: Features, keep: jax.Array) -> Features:
        """Returns features whose units that are not kept come from a background.

        Args:
          inputs: Features [B, ...].
          background: Features [B, ...] of other episodes.
          keep: Whether each unit is kept, bool [B, U].
        """
        patches, words, readings = self.split(keep)
        if self.patch is None:
            pixels = patches.reshape(*patches.shape[:2], -1)[..., None]
        else:
            pixels = jnp.repeat(jnp.repeat(patches, self.patch, 2), self.patch, 3)[..., None]
        masks = Features(pixels, words[..., None], readings)
        return jax.tree.map(jnp.where, masks, inputs, background)


def units(inputs: Features, patch: int) -> Units:
    """Returns the units of features.

    Args:
      inputs: Features [B, ...].
      patch: Edge of a patch in pixels, which must divide height and width.
    """
    shape, frames = inputs.pixels.shape, inputs.pixels.shape[1]
    words, readings = inputs.words.shape[1], inputs.proprio.shape[2]
    if len(shape) == 5:
        return Units(frames, shape[2] // patch, shape[3] // patch, words, readings, patch)
    rows = math.isqrt(shape[2])  # Patches of a pretrained encoder may not form a square.
    rows = rows if rows**2 == shape[2] else 1
    return Units(frames, rows, shape[2] // rows, words, readings, None)
