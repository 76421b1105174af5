"""The multimodal transformer policy over images, an instruction and proprioception."""

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
from mmrl_jax.models.masks import Mask
from mmrl_jax.models.transformer import BlockSpec, Context, Dense, Remat, Transformer, layer_norm
from mmrl_jax.types import Observation

MODALITIES = ("instruction", "pixels", "proprio", "readout")
Fusion = Literal["joint", "cross", "late"]
FUSIONS: tuple[str, ...] = get_args(Fusion)
READOUTS = 2  # One for the policy (and auxiliary predictions), one for the value.


class TokenLayout(NamedTuple):
    """The origin of each token of the sequence.

    Attributes:
      modality: Index into MODALITIES, int32 [S].
      frame: Frame of the history, 0 for the oldest, int32 [S]; -1 for tokens without a frame.
      place: Index of the word, patch (row-major) or readout within its frame, int32 [S].
    """

    modality: np.ndarray
    frame: np.ndarray
    place: np.ndarray


def token_layout(*, words: int, frames: int, patches: int) -> TokenLayout:
    """Returns the layout of the sequence that `MultimodalPolicy` builds.

    Args:
      words: Number of tokens of the instruction, padding included.
      frames: Number of frames in the history, at least 1.
      patches: Number of patches per frame.
    """
    rows = [(0, -1, i) for i in range(words)]
    for k in range(frames):
        rows += [(1, k, i) for i in range(patches)] + [(2, k, 0)]
    rows += [(3, -1, i) for i in range(READOUTS)]
    return TokenLayout(*np.array(rows, np.int32).T)


def attention_mask(words: jax.Array, layout: TokenLayout) -> jax.Array:
    """Returns the attention mask, bool [B, S, S], of words bool [B, L] and the layout.

    No token reads padding words or another token's readout. A readout reads everything and itself;
    a frame reads the instruction, itself and older frames; a word reads words only, so that the
    tokens of the instruction are the same in every frame.
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

    Every token has a learned embedding of its modality, and tokens of frames have one of their age;
    patches and words have a position embedding. `token_layout` returns this layout as arrays.

    Attributes:
      kind: Kind of actions, 'continuous' or 'discrete', see `PolicyHead`.
      actions: Number of action dimensions, or number of discrete actions.
      vocabulary: Number of token ids of the instruction.
      width: Width D of the fusion stack and of all tokens.
      layers: Number of blocks of the fusion stack.
      heads: Number of attention heads of every stack.
      mlp_ratio: Hidden width of the MLPs of every stack, divided by `width`.
      patch: Edge of an image patch in pixels; it must divide the image's height and width.
      patch_margin: Number of pixels around a patch that its token also sees.
      patch_hidden: Number of hidden units of the per-patch perceptron.
      vision_layers: Number of self-attention blocks over the patches before fusion.
      text_layers: Number of self-attention blocks over the words before fusion.
      film: Whether to modulate patches with the instruction (FiLM) before fusion.
      fusion: 'joint' for self-attention among all tokens; 'cross' for attention from the readouts
        only, which leaves the other tokens as their encoders output them; 'late' for a perceptron
        over the concatenated tokens (and the mean of the words), without attention.
      auxiliary: (name, size) of each privileged target that the policy's readout predicts.
      pointing: Name of a privileged position in the newest image, which the patch tokens predict
        with one logit each; None for no such target.
      text_encoder: Function or module that encodes the instruction in place of the built-in
        encoder: tokens int32 [B, L] and mask bool [B, L] to features [B, L', E] and mask
        bool [B, L']. A projection follows. The parameters of a module become part of this one's.
      vision_encoder: Function or module that encodes images in place of the built-in encoder: uint8
        [B, H, W, 3] to features [B, patches, E]. A projection with FiLM follows. The parameters of
        a module become part of this one's.
      dtype: Compute dtype; parameters, heads and softmax statistics are float32.
      remat: What of each block is recomputed in the backward pass, see `Remat`.
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
    remat: Remat = False

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
        images = pixels.reshape(-1, *pixels.shape[2:])
        if self.vision_encoder is None:
            patches = VisionEncoder(
                self.width,
                self.patch,
                self.patch_margin,
                self.patch_hidden,
                layers=self.vision_layers,
                **stack,
                name="vision",
            )(images, condition)
        else:
            patches = VisionProjection(self.width, self.dtype, name="vision_projection")(
                self.vision_encoder(images), condition
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
                Context(Mask(explicit=attention_mask(word_mask, layout))),
                readouts=READOUTS,
                only_readouts=self.fusion == "cross",
            )
        policy, value = x[:, 0], x[:, 1]
        newest = patches.reshape(batch, frames, -1, self.width)[:, -1]
        return PolicyOutput(
            distribution=PolicyHead(self.kind, self.actions, name="policy_head")(policy),
            value=ValueHead(name="value_head")(value),
            auxiliary=self._auxiliary(policy, newest, height=pixels.shape[2]),
            features=jnp.concatenate([policy, value], axis=-1).astype(jnp.float32),
        )

    @nn.nowrap
    def _auxiliary(
        self, policy: jax.Array, patches: jax.Array, *, height: int
    ) -> dict[str, jax.Array]:
        """Predicts the privileged targets from the policy's readout and the patches."""
        auxiliary = {
            name: Dense(size, name=f"auxiliary_{name}")(policy) for name, size in self.auxiliary
        }
        if self.pointing is not None:
            logits = Dense(1, name="pointing")(patches.astype(jnp.float32))
            # Patches of a pretrained encoder are assumed to form a square.
            rows = math.isqrt(logits.shape[1])
            if self.vision_encoder is None:
                rows = height // self.patch
            auxiliary[self.pointing] = logits.reshape(len(patches), rows, -1)
        return auxiliary
