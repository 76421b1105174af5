"""Vision-language models: image features take the places of image tokens in a language model.

    tokens    <bos> <image> <image> <image> <image> How many red balls ? <answer> ...
    stack       e       f0      f1      f2      f3   e   e   e   e   e      e

`e` is the embedding of a token, `f` a feature of the vision model: those of a sample's images, one
image after the other, each row by row. Both are counted, and must agree.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.models.encoders import VisionEncoder, VisionProjection
from mmrl_jax.models.language import LanguageModel, causal_mask


class VisionFeatures(NamedTuple):
    """What the vision model makes of the images of each of B samples.

    Attributes:
      tokens: float [B, F, D], of the width of the language model.
      present: bool [B, F], False for padding, which stands for no image token.
      deep: float [B, F, D] each, added to the same places after the first blocks (deepstack).
    """

    tokens: jax.Array
    present: jax.Array
    deep: tuple[jax.Array, ...] = ()


def check_counts(is_image: np.ndarray, present: np.ndarray) -> None:
    """Checks that image tokens, bool [B, S], and features that are present, bool [B, F], agree.

    Raises:
      ValueError: names the first sample where they do not, and both counts.
    """
    wanted, available = np.sum(is_image, axis=1), np.sum(present, axis=1)
    wrong = np.flatnonzero(wanted != available)
    if wrong.size:
        i = wrong[0]
        raise ValueError(
            f"Sample {i} has {wanted[i]} image tokens, but its images have {available[i]} features "
            f"({wrong.size} of {wanted.size} samples disagree). Make prompts and images with the "
            "processor of the model, and do not cut prompts inside an image."
        )


def scatter_features(
    x: jax.Array, is_image: jax.Array, features: jax.Array, present: jax.Array
) -> jax.Array:
    """Puts the features that are present in the places of the image tokens, in order.

    Args:
      x: float [B, S, D].
      is_image: bool [B, S].
      features: float [B, F, D].
      present: bool [B, F].

    Returns:
      [B, S, D]; a sample whose counts disagree is NaN throughout, for inside `jit` nothing can be
      raised, and no model should learn from it.
    """
    order = jnp.argsort(~present, axis=1, stable=True)
    which = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, present.shape[1] - 1)
    taken = jnp.take_along_axis(order, which, axis=1)
    placed = jnp.take_along_axis(features.astype(x.dtype), taken[..., None], axis=1)
    agree = jnp.sum(is_image, axis=1) == jnp.sum(present, axis=1)
    x = jnp.where(is_image[..., None], placed, x)
    return jnp.where(agree[:, None, None], x, jnp.nan)


class VisionLanguageModel(nn.Module):
    """Images and token ids to logits.

    Attributes:
      vision: a module that maps the family's images to `VisionFeatures`.
      language: reads them.
      image_token: the id whose places the features take.
      sees_ahead: image tokens and prompt read each other in both directions (PaliGemma).
    """

    vision: nn.Module
    language: LanguageModel
    image_token: int
    sees_ahead: bool = False

    def __call__(
        self,
        tokens: jax.Array,
        present: jax.Array,
        images: Any,
        positions: jax.Array | None = None,
        prompt: jax.Array | None = None,
    ) -> jax.Array:
        """Logits, float32 [B, S, V].

        Args:
          tokens: int32 [B, S], an image token for every image feature.
          present: bool [B, S], False for padding, on either side.
          images: pytree, as `vision` takes it; leaves [B, ...].
          positions: int32 [B, S], or [B, A, S] for a rotary embedding of A axes, which must be
            given; by default counted over the tokens that are present.
          prompt: bool [B, S], the tokens that see ahead, where `sees_ahead`; by default those up to
            the last image token's.

        Raises:
          ValueError: the rotary embedding has several axes, and there are no positions.
        """
        if positions is None:
            if any(rope.sections for rope in self.language.ropes):
                raise ValueError("positions=None, but this model's have axes: see its processor.")
            positions = jnp.maximum(jnp.cumsum(present, axis=1) - 1, 0)
        x, added = self.embed(tokens, self.encode(images))
        mask, ahead = self.mask(tokens, present, prompt), self.ahead(tokens, present, prompt)
        hidden = self.language.hidden_states(x, mask, positions, added, ahead)
        return self.language.logits(hidden)

    def encode(self, images: Any) -> VisionFeatures:
        """The features of images."""
        return self.vision(images)

    def embed(
        self, tokens: jax.Array, features: VisionFeatures
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Embeddings [B, S, D] with the features in place, and what is added after first blocks."""
        is_image = tokens == self.image_token
        # The image token's own id may lie outside the table.
        x = self.language.embed(jnp.where(is_image, 0, tokens))
        x = scatter_features(x, is_image, features.tokens, features.present)
        zeros = jnp.zeros_like(x)
        added = tuple(
            scatter_features(zeros, is_image, deep, features.present) for deep in features.deep
        )
        return x, added

    def mask(
        self, tokens: jax.Array, present: jax.Array, prompt: jax.Array | None = None
    ) -> jax.Array:
        """Who may read whom, bool [B, S, S]."""
        mask, ahead = causal_mask(present), self.ahead(tokens, present, prompt)
        return mask if ahead is None else mask | ahead

    def ahead(
        self, tokens: jax.Array, present: jax.Array, prompt: jax.Array | None = None
    ) -> jax.Array | None:
        """Who read each other in both directions, whatever the windows, bool [B, S, S], or None."""
        if not self.sees_ahead:
            return None
        if prompt is None:
            is_image = tokens == self.image_token
            prompt = jnp.cumsum(is_image[:, ::-1], axis=1)[:, ::-1] > 0
        return prompt[:, :, None] & (prompt & present)[:, None, :]


class PatchVision(nn.Module):
    """The vision model of small models: pictures of one size, a feature for every patch.

    Attributes:
      encoder: our own encoder of patches.
      projector: to the width of the language model; None where the encoder has that.
    """

    encoder: VisionEncoder
    projector: VisionProjection | None = None

    def __call__(self, pixels: jax.Array) -> VisionFeatures:
        """Encodes uint8 [B, H, W, 3]."""
        tokens = self.encoder(pixels, None)
        if self.projector is not None:
            tokens = self.projector(tokens, None)
        return VisionFeatures(tokens, jnp.ones(tokens.shape[:2], bool))
