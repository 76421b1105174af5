"""A vision-language model as a control policy, with readouts for policy and value."""

from collections.abc import Callable
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrl_jax.models.encoders import ProprioEncoder
from mmrl_jax.models.heads import ActionKind, PolicyHead, PolicyOutput, ValueHead
from mmrl_jax.models.transformer import Dense, layer_norm
from mmrl_jax.models.vlm import VisionLanguageModel
from mmrl_jax.types import Observation

READOUTS = 2  # One for the policy (and auxiliary predictions), one for the value.


class VLMPolicy(nn.Module):
    """A policy that reads a prompt with the frame inside, proprioception and two learned readouts.

      [... f_1 .. f_F ... words of the instruction ... padding | j | r_policy r_value]
       prompt from the model's own processor                    proprio, readouts

    Attention is causal, as in the model's pretraining (except for bidirectional prompts, see
    `VisionLanguageModel`): `j` reads the prompt, the readouts read the prompt and `j`, and only a
    readout itself reads it. Both readouts have the same position, after `j`.

    Attributes:
      kind: Kind of actions, 'continuous' or 'discrete', see `PolicyHead`.
      actions: Number of action dimensions, or number of discrete actions.
      vlm: Vision-language model, whose output layer is not used.
      preprocess_images: Function from pixels uint8 [B, 1, H, W, 3] to the images that the vision
        model takes.
      prompts: Function from tokens int32 [B, L] and mask bool [B, L] of the environment's
        instruction to tokens int32 [B, S] and mask bool [B, S] of the model, with one image token
        per feature.
      auxiliary: (name, size) of each privileged target that the policy's readout predicts.
      pointing: Name of a privileged position in the image: the policy's readout is the query, and
        each image feature gives one logit (Vinyals et al., 2015). The features must form a square
        grid over the whole image, optionally followed by a newline. None for no such target.
    """

    kind: ActionKind
    actions: int
    vlm: VisionLanguageModel
    preprocess_images: Callable[[jax.Array], Any]
    prompts: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    auxiliary: tuple[tuple[str, int], ...] = ()
    pointing: str | None = None

    @nn.compact
    def __call__(self, observation: Observation) -> PolicyOutput:
        """Maps a batch of observations without a history to a PolicyOutput of batch [B].

        The output is NaN where image tokens and features disagree, see `vlm.scatter_features`.

        Raises:
          ValueError: `pointing` is set, and the image features form no square grid.
        """
        instruction, language = observation["instruction"], self.vlm.language
        tokens, present = self.prompts(instruction["tokens"], instruction["mask"])
        features = self.vlm.encode(self.preprocess_images(observation["pixels"][:, None]))
        x, added = self.vlm.embed(tokens, features)
        joints = ProprioEncoder(language.width, language.dtype, name="proprio")(
            observation["proprio"]
        )
        readouts = self.param(
            "readout", nn.initializers.normal(0.02), (READOUTS, language.width)
        ).astype(x.dtype)
        readouts = jnp.broadcast_to(readouts, (len(x), *readouts.shape))
        x = jnp.concatenate([x, joints.astype(x.dtype), readouts], axis=1)

        padding = ((0, 0), (0, 1 + READOUTS))
        tokens, prompt = jnp.pad(tokens, padding), jnp.pad(present, padding)
        present = jnp.pad(present, padding, constant_values=True)
        mask = self.vlm.mask(tokens, present, prompt).replace(readouts=READOUTS)
        positions = jnp.maximum(jnp.cumsum(present, axis=1) - 1, 0).at[:, -1].add(-1)
        added = tuple(jnp.pad(deep, (*padding, (0, 0))) for deep in added)
        hidden = language.hidden_states(x, mask, positions, added)[:, -READOUTS:]
        # A pretrained final norm has an arbitrary scale; the heads are initialized for unit scale.
        policy, value = jnp.moveaxis(layer_norm(hidden.astype(jnp.float32)), 1, 0)

        auxiliary = {
            name: Dense(size, name=f"auxiliary_{name}")(policy) for name, size in self.auxiliary
        }
        if self.pointing is not None:
            query = Dense(language.width, name="pointing")(policy)
            count = features.tokens.shape[1]
            edge = math.isqrt(count)
            if count - edge**2 > 1:
                raise ValueError(f"{count} image features form no square grid to point into.")
            keys = layer_norm(features.tokens[:, : edge**2].astype(jnp.float32))
            logits = jnp.einsum("bd,bfd->bf", query, keys) / math.sqrt(language.width)
            auxiliary[self.pointing] = logits.reshape(-1, edge, edge)
        return PolicyOutput(
            distribution=PolicyHead(self.kind, self.actions, name="policy_head")(policy),
            value=ValueHead(name="value_head")(value),
            auxiliary=auxiliary,
            features=jnp.concatenate([policy, value], axis=-1),
        )
