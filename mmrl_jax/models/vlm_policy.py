"""A whole vision-language model as a control policy, with readouts for policy and value."""

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
    """The model reads a prompt with the frame inside, then joints and two learned readouts.

      [... f_1 .. f_F ... words of the instruction ... padding | j | r_policy r_value]
       prompt, made by the model's own processor                 proprio, readouts

    All is causal, as the model was trained (but for prompts that see ahead, see
    `VisionLanguageModel`): `j` reads the prompt, the readouts read the prompt and `j`, and nobody
    reads a readout but itself. Both readouts stand at the same position, behind `j`.

    Attributes:
      kind, actions: see `PolicyHead`.
      vlm: reads; its output layer is not used.
      pictures: uint8 [B, 1, H, W, 3] to what the vision model takes.
      prompts: tokens int32 [B, L], mask bool [B, L] of the environment's instruction to the model's
        own tokens int32 [B, S], present bool [B, S], with an image token for every image feature.
      auxiliary: name -> size of privileged targets predicted from the policy's readout.
      pointing: name of a privileged place in the picture: the policy's readout asks, and the image
        features answer by one logit each (Vinyals et al., 2015). They must be a square grid over
        the whole picture, behind which a newline may come.
    """

    kind: ActionKind
    actions: int
    vlm: VisionLanguageModel
    pictures: Callable[[jax.Array], Any]
    prompts: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    auxiliary: tuple[tuple[str, int], ...] = ()
    pointing: str | None = None

    @nn.compact
    def __call__(self, observation: Observation) -> PolicyOutput:
        """Maps a batch of observations without a history to a PolicyOutput of batch [B].

        Where image tokens and features disagree it is NaN, see `vlm.scatter_features`.

        Raises:
          ValueError: `pointing` is asked for, and the image features are no square grid.
        """
        instruction, language = observation["instruction"], self.vlm.language
        tokens, present = self.prompts(instruction["tokens"], instruction["mask"])
        features = self.vlm.encode(self.pictures(observation["pixels"][:, None]))
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
        mask = self.vlm.mask(tokens, present, prompt).at[:, -1, -2].set(False)
        positions = jnp.maximum(jnp.cumsum(present, axis=1) - 1, 0).at[:, -1].add(-1)
        added = tuple(jnp.pad(deep, (*padding, (0, 0))) for deep in added)
        ahead = self.vlm.ahead(tokens, present, prompt)
        hidden = language.hidden_states(x, mask, positions, added, ahead)[:, -READOUTS:]
        # The scale of a pretrained final norm is its own; the heads begin small on unit features.
        policy, value = jnp.moveaxis(layer_norm(hidden.astype(jnp.float32)), 1, 0)

        auxiliary = {
            name: Dense(size, name=f"auxiliary_{name}")(policy) for name, size in self.auxiliary
        }
        if self.pointing is not None:
            question = Dense(language.width, name="pointing")(policy)
            count = features.tokens.shape[1]
            edge = math.isqrt(count)
            if count - edge**2 > 1:
                raise ValueError(f"{count} image features are no square grid to point into.")
            answers = layer_norm(features.tokens[:, : edge**2].astype(jnp.float32))
            logits = jnp.einsum("bd,bfd->bf", question, answers) / math.sqrt(language.width)
            auxiliary[self.pointing] = logits.reshape(-1, edge, edge)
        return PolicyOutput(
            distribution=PolicyHead(self.kind, self.actions, name="policy_head")(policy),
            value=ValueHead(name="value_head")(value),
            auxiliary=auxiliary,
        )
