"""Vision-language models: image features replace the embeddings of image tokens.

    tokens    <bos> <image> <image> <image> <image> How many red balls ? <answer> ...
    stack       e       f0      f1      f2      f3   e   e   e   e   e      e

`e` is the embedding of a token and `f` a feature of the vision model. Features are ordered by image
and row-major within an image. Their number must equal the number of image tokens in the sample.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.models.encoders import VisionEncoder, VisionProjection
from mmrl_jax.models.language import LanguageModel
from mmrl_jax.models.masks import Mask, causal_mask


class VisionFeatures(NamedTuple):
    """Output of the vision model for the images of B samples.

    Attributes:
      tokens: Features of the width of the language model, float [B, F, D].
      present: Which features are not padding, bool [B, F]; padding replaces no image token.
      deep: Features to add at the same positions after each of the first blocks (deepstack), float
        [B, F, D] each.
    """

    tokens: jax.Array
    present: jax.Array
    deep: tuple[jax.Array, ...] = ()


def check_counts(is_image: np.ndarray, present: np.ndarray) -> None:
    """Checks that each sample has as many image tokens as features.

    Args:
      is_image: Which tokens are image tokens, bool [B, S].
      present: Which features are not padding, bool [B, F].

    Raises:
      ValueError: The counts differ; the message has the first such sample and its counts.
    """
    num_tokens, num_features = np.sum(is_image, axis=1), np.sum(present, axis=1)
    wrong = np.flatnonzero(num_tokens != num_features)
    if wrong.size:
        i = wrong[0]
        raise ValueError(
            f"Sample {i} has {num_tokens[i]} image tokens, but its images have {num_features[i]} "
            f"features ({wrong.size} of {num_tokens.size} samples disagree). Make prompts and "
            "images with the model's processor, and do not truncate prompts inside an image."
        )


def scatter_features(
    x: jax.Array, is_image: jax.Array, features: jax.Array, present: jax.Array
) -> jax.Array:
    """Replaces the embeddings of image tokens with the features that are not padding, in order.

    Args:
      x: Embeddings, float [B, S, D].
      is_image: Which tokens are image tokens, bool [B, S].
      features: Image features, float [B, F, D].
      present: Which features are not padding, bool [B, F].

    Returns:
      Embeddings [B, S, D]. All of a sample is NaN if its counts of image tokens and features
      differ: no error can be raised inside `jit`, and no model should learn from such a sample.
    """
    order = jnp.argsort(~present, axis=1, stable=True)
    rank = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, present.shape[1] - 1)
    feature_index = jnp.take_along_axis(order, rank, axis=1)
    scattered = jnp.take_along_axis(features.astype(x.dtype), feature_index[..., None], axis=1)
    agree = jnp.sum(is_image, axis=1) == jnp.sum(present, axis=1)
    x = jnp.where(is_image[..., None], scattered, x)
    return jnp.where(agree[:, None, None], x, jnp.nan)


class VisionLanguageModel(nn.Module):
    """A vision-language model, from images and token ids to logits.

    Attributes:
      vision: Module that maps the model family's images to `VisionFeatures`.
      language: Language model.
      image_token: Token id whose embeddings the features replace.
      prefix_lm: Whether image tokens and the prompt attend to each other in both directions
        (PaliGemma).
      vision_encoder: Pretrained module that maps images to the inputs of `vision`; None if `vision`
        takes images.
    """

    vision: nn.Module
    language: LanguageModel
    image_token: int
    prefix_lm: bool = False
    vision_encoder: nn.Module | None = None

    def __call__(
        self,
        tokens: jax.Array,
        present: jax.Array,
        images: Any,
        positions: jax.Array | None = None,
        prompt: jax.Array | None = None,
    ) -> jax.Array:
        """Computes logits, float32 [B, S, V].

        Args:
          tokens: Token ids, int32 [B, S], with one image token per image feature.
          present: Which tokens are not padding, bool [B, S]; padding may be on either side.
          images: Images as `encode` takes them, a pytree with leaves [B, ...].
          positions: Token positions, int32 [B, S], or [B, A, S] for a rotary embedding of A axes,
            where they are required. By default, tokens that are not padding are numbered from 0.
          prompt: Which tokens attend in both directions if `prefix_lm`, bool [B, S]; by default
            those up to the last image token.

        Raises:
          ValueError: The rotary embedding has several axes, and `positions` is None.
        """
        mask = self.mask(tokens, present, prompt, contiguous=positions is None)
        if positions is None:
            if any(rope.sections for rope in self.language.ropes):
                raise ValueError(
                    "positions=None, but this model's positions have several axes; pass those of "
                    "its processor."
                )
            positions = jnp.maximum(jnp.cumsum(present, axis=1) - 1, 0)
        x, added = self.embed(tokens, self.encode(images))
        hidden = self.language.hidden_states(x, mask, positions, added)
        return self.language.logits(hidden)

    def encode(self, images: Any) -> VisionFeatures:
        """Encodes images as `vision`, or the pretrained encoder before it, takes them."""
        if self.vision_encoder is not None:
            images = self.vision_encoder(images)
        return self.vision(images)

    def embed(
        self, tokens: jax.Array, features: VisionFeatures
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns embeddings [B, S, D] of tokens and images, and the features that blocks add."""
        is_image = tokens == self.image_token
        # The image token's own id may lie outside the table.
        x = self.language.embed(jnp.where(is_image, 0, tokens))
        x = scatter_features(x, is_image, features.tokens, features.present)
        zeros = jnp.zeros_like(x)
        added = tuple(
            scatter_features(zeros, is_image, deep, features.present) for deep in features.deep
        )
        return x, added

    @nn.nowrap
    def mask(
        self,
        tokens: jax.Array,
        present: jax.Array,
        prompt: jax.Array | None = None,
        *,
        contiguous: bool = False,
    ) -> Mask:
        """Returns the attention mask.

        Args:
          tokens: Token ids, int32 [B, S].
          present: Which tokens are not padding, bool [B, S].
          prompt: Which tokens attend in both directions if `prefix_lm`, see `__call__`.
          contiguous: Whether no padding is between valid tokens, see `Mask`.
        """
        mask = causal_mask(present, contiguous=contiguous)
        if not self.prefix_lm:
            return mask
        if prompt is None:
            is_image = tokens == self.image_token
            prompt = jnp.cumsum(is_image[:, ::-1], axis=1)[:, ::-1] > 0
        return mask.replace(prefix=prompt)


class PatchVision(nn.Module):
    """The vision model around our own or a separate encoder: one feature per patch of an image.

    Attributes:
      encoder: Patch encoder; None to take the features of another encoder instead of images.
      projector: Projection to the width of the language model; None if the encoder has that width.
    """

    encoder: VisionEncoder | None = None
    projector: VisionProjection | None = None

    def __call__(self, images: jax.Array) -> VisionFeatures:
        """Encodes images, uint8 [B, H, W, 3], or features, float [B, patches, E]."""
        tokens = images if self.encoder is None else self.encoder(images, None)
        if self.projector is not None:
            tokens = self.projector(tokens, None)
        return VisionFeatures(tokens, jnp.ones(tokens.shape[:2], bool))
