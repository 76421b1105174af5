"""The multimodal transformer policy: pixels, an instruction and joints to actions and a value."""

from collections.abc import Callable
import math
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.models.encoders import (
    ProprioEncoder,
    TextEncoder,
    VisionEncoder,
    VisionProjection,
)
from mmrl_jax.models.heads import ActionKind, PolicyHead, PolicyOutput, ValueHead
from mmrl_jax.models.transformer import BlockSpec, Context, Dense, Transformer, layer_norm
from mmrl_jax.types import Observation

MODALITIES = ("instruction", "pixels", "proprio", "readout")
Fusion = Literal["joint", "cross", "late"]
FUSIONS: tuple[str, ...] = get_args(Fusion)
READOUTS = 2  # One for the policy (and auxiliary predictions), one for the value.


class TokenLayout(NamedTuple):
    """Where each token of the sequence comes from.

    Attributes:
      modality: int32 [S], index into MODALITIES.
      frame: int32 [S], frame of the history, 0 the oldest; -1 where there is none.
      place: int32 [S], word, patch (row-major), or readout index within its frame.
    """

    modality: np.ndarray
    frame: np.ndarray
    place: np.ndarray


def token_layout(*, words: int, frames: int, patches: int) -> TokenLayout:
    """Returns the layout of the sequence that `MultimodalPolicy` builds."""
    rows = [(0, -1, i) for i in range(words)]
    for k in range(frames):
        rows += [(1, k, i) for i in range(patches)] + [(2, k, 0)]
    rows += [(3, -1, i) for i in range(READOUTS)]
    return TokenLayout(*np.array(rows, np.int32).T)


def attention_mask(words: jax.Array, layout: TokenLayout) -> jax.Array:
    """Who may read whom: bool [B, S, S], from words bool [B, L] and the layout.

    Nobody reads padding words or a readout; a readout reads everything and itself; a frame reads
    the instruction, its own frame and older ones; a word reads words only, so that the
    instruction's tokens are the same in every frame.
    """
    modality, frame = layout.modality, layout.frame
    is_readout = modality == 3
    allowed = frame[None, :] <= frame[:, None]
    allowed = (allowed | is_readout[:, None]) & ~is_readout[None, :]
    allowed = allowed | np.eye(len(modality), dtype=bool)
    present = jnp.concatenate(
        [words, jnp.ones((words.shape[0], len(modality) - words.shape[1]), bool)], axis=1
    )
    return jnp.asarray(allowed)[None] & present[:, None, :]


class MultimodalPolicy(nn.Module):
    """A transformer over the tokens of all modalities, with readouts for policy and value.

    The sequence for L words, K frames of P patches (K = 1 without a history):

      [w_1 .. w_L | p_1 .. p_P j | ... | p_1 .. p_P j | r_policy r_value]
       instruction   frame 0             frame K-1       readouts

    and its attention mask (rows read columns; x = yes, w = words that are not padding):

                     words  frame 0  frame 1  r_policy r_value
        words          w       .        .        .        .
        frame 0        w       x        .        .        .
        frame 1        w       x        x        .        .
        r_policy       w       x        x        x        .
        r_value        w       x        x        .        x

    Every token carries a learned embedding of its modality; frames carry one of their age, patches
    and words one of their place. `token_layout` gives the same for every position as data.

    Attributes:
      kind, actions: see `PolicyHead`.
      vocabulary: number of token ids of the instruction.
      width, layers: of the fusion stack.
      heads, mlp_ratio: of every stack.
      remat: recompute the activations of every stack in the backward pass.
      patch: edge of an image patch, pixels; must divide the image's height and width.
      patch_margin: pixels around a patch that its token sees too.
      patch_hidden: hidden units of the per-patch perceptron.
      vision_layers, text_layers: blocks of self-attention inside one modality before fusion.
      film: modulate patches by the instruction (FiLM) before fusion.
      fusion: 'joint', self-attention among all tokens; 'cross', only the readouts read, and the
        other tokens stay as their encoders made them; 'late', no attention at all: a perceptron
        over the concatenated tokens (of the words, their mean).
      auxiliary: name -> size of privileged targets predicted from the policy's readout.
      pointing: name of a privileged place in the newest picture; the patch tokens then also say, by
        one logit each, whether they are where it is.
      text_encoder: reads the instruction instead of our own encoder, and is followed by a
        projection: tokens int32 [B, L], mask bool [B, L] to features [B, L', E], present
        bool [B, L']. A function, or a module, whose parameters are then ours.
      vision_encoder: sees the pictures instead of our own encoder, and is followed by a projection
        with FiLM: uint8 [B, H, W, 3] to features [B, patches, E]. A function or a module.
      dtype: compute dtype; parameters, heads and softmax statistics stay float32.
    """

    kind: ActionKind
    actions: int
    vocabulary: int
    width: int = 64
    layers: int = 2
    heads: int = 2
    mlp_ratio: int = 4
    patch: int = 8
    patch_margin: int = 0
    patch_hidden: int = 128
    vision_layers: int = 0
    text_layers: int = 0
    film: bool = True
    fusion: Fusion = "joint"
    auxiliary: tuple[tuple[str, int], ...] = ()
    pointing: str | None = None
    text_encoder: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None
    vision_encoder: Callable[[jax.Array], jax.Array] | None = None
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, observation: Observation) -> PolicyOutput:
        """Maps a batch of observations (see `types.Observation`) to a PolicyOutput of batch [B]."""
        instruction = observation["instruction"]
        pixels, proprio = observation["pixels"], observation["proprio"]
        if pixels.ndim == 4:
            pixels, proprio = pixels[:, None], proprio[:, None]
        batch, frames = pixels.shape[:2]
        stack: dict[str, Any] = {
            "heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
            "dtype": self.dtype,
            "remat": self.remat,
        }
        tokens, word_mask = instruction["tokens"], instruction["mask"]
        if self.text_encoder is None:
            words = TextEncoder(
                self.width, self.vocabulary, layers=self.text_layers, **stack, name="text"
            )(tokens, word_mask)
        else:
            features, word_mask = self.text_encoder(tokens, word_mask)
            words = Dense(self.width, self.dtype, name="text_projection")(features)
        present = word_mask[..., None]
        summary = jnp.sum(words * present, 1) / jnp.maximum(jnp.sum(present, 1), 1)
        condition = None
        if self.film:
            condition = nn.gelu(Dense(self.width, self.dtype, name="condition")(summary))
            condition = jnp.repeat(condition, frames, axis=0)
        pictures = pixels.reshape(-1, *pixels.shape[2:])
        if self.vision_encoder is None:
            patches = VisionEncoder(
                self.width,
                self.patch,
                self.patch_margin,
                self.patch_hidden,
                layers=self.vision_layers,
                **stack,
                name="vision",
            )(pictures, condition)
        else:
            patches = VisionProjection(self.width, self.dtype, name="vision_projection")(
                self.vision_encoder(pictures), condition
            )
        joints = ProprioEncoder(self.width, self.dtype, name="proprio")(
            proprio.reshape(batch * frames, -1)
        )
        frame_tokens = jnp.concatenate([patches, joints], axis=1)
        if frames > 1:
            age = self.param("frame", nn.initializers.normal(0.1), (frames, 1, self.width))
            frame_tokens = frame_tokens.reshape(batch, frames, -1, self.width) + age.astype(
                self.dtype
            )
        frame_tokens = frame_tokens.reshape(batch, -1, self.width)
        if self.fusion == "late":
            x = jnp.concatenate([summary, frame_tokens.reshape(batch, -1)], axis=1)
            x = nn.gelu(Dense(self.width, self.dtype, name="late_in")(x))
            x = nn.gelu(Dense(READOUTS * self.width, self.dtype, name="late_out")(x))
            x = layer_norm(x.astype(jnp.float32).reshape(batch, READOUTS, -1))
        else:
            readouts = self.param("readout", nn.initializers.normal(1.0), (READOUTS, self.width))
            readouts = jnp.broadcast_to(readouts.astype(self.dtype), (batch, *readouts.shape))
            x = jnp.concatenate([words, frame_tokens, readouts], axis=1)
            layout = token_layout(words=words.shape[1], frames=frames, patches=patches.shape[1])
            modality = self.param(
                "modality", nn.initializers.normal(0.1), (len(MODALITIES), self.width)
            )
            x = x + modality[layout.modality].astype(self.dtype)
            block = BlockSpec(self.heads, self.mlp_ratio * self.width)
            x = Transformer(self.layers, block, self.dtype, self.remat, name="fusion")(
                x,
                Context(attention_mask(word_mask, layout)),
                readouts=READOUTS,
                only_readouts=self.fusion == "cross",
            )
        policy, value = x[:, 0], x[:, 1]
        newest = patches.reshape(batch, frames, -1, self.width)[:, -1]
        return PolicyOutput(
            distribution=PolicyHead(self.kind, self.actions, name="policy_head")(policy),
            value=ValueHead(name="value_head")(value),
            auxiliary=self._auxiliary(policy, newest, height=pixels.shape[2]),
        )

    @nn.nowrap
    def _auxiliary(
        self, policy: jax.Array, patches: jax.Array, *, height: int
    ) -> dict[str, jax.Array]:
        """Predictions of the privileged targets, from the policy's readout and the patches."""
        auxiliary = {
            name: Dense(size, name=f"auxiliary_{name}")(policy) for name, size in self.auxiliary
        }
        if self.pointing is not None:
            logits = Dense(1, name="pointing")(patches.astype(jnp.float32))
            # Another encoder's patches are taken for a square.
            rows = math.isqrt(logits.shape[1])
            if self.vision_encoder is None:
                rows = height // self.patch
            auxiliary[self.pointing] = logits.reshape(len(patches), rows, -1)
        return auxiliary
