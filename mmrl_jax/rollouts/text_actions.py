"""Environments for agents that read their instructions and write their actions as text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.envs.brax_api import Env
from mmrl_jax.tasks.prompts import ABSENT, Prompt, Texts, Tokenizer, tokenize
from mmrl_jax.types import Observation


@dataclasses.dataclass(frozen=True)
class TextActions:
    """What the instructions and the actions of an environment are as text, see `text_actions`.

    Attributes:
      texts: a prompt for each instruction, an answer for each action.
      sentences: int32 [Q, L], the environment's own tokens of each instruction.
      actions: [A, ...], what the environment is given for each answer; the first one also stands
        for what is no answer.
    """

    texts: Texts
    sentences: np.ndarray
    actions: np.ndarray

    def make_prompts(self, observation: Observation) -> Prompt:
        """The questions [B] that observations [B, ...] with pixels and an instruction are.

        What is right is not known: `answer` is ABSENT.
        """
        instruction = observation["instruction"]["tokens"]
        text = jnp.argmax(jnp.all(instruction[:, None] == self.sentences, axis=-1), axis=-1)
        unknown, zeros = jnp.full(text.shape, ABSENT), jnp.zeros(text.shape, jnp.int32)
        return self.texts.make_prompts(observation["pixels"], text, unknown, zeros, zeros)

    def decode_actions(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the answers int32 [..., T], of which bool [..., T] tells what is there, do.

        Returns:
          Actions [..., A], and bool [...], which answers are none of the actions.
        """
        parsed = self.texts.parse(tokens, mask)
        return jnp.asarray(self.actions)[jnp.maximum(parsed, 0)], parsed == ABSENT

    def encode_actions(self, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The texts of the actions nearest to [B, ...]: int32 [B, T], and what is there of it."""
        apart = (action[:, None] - jnp.asarray(self.actions)).astype(jnp.float32) ** 2
        nearest = jnp.argmin(apart.reshape(*apart.shape[:2], -1).sum(axis=-1), axis=1)
        return self.texts.labels(nearest)


def text_actions(env: Env, tokenizer: Tokenizer | None = None, *, image_tokens: int) -> TextActions:
    """Makes them of an environment with `vocabulary` and `actions_as_text`; see `tokenize`."""
    sentences, actions = env.vocabulary.sentences, env.actions_as_text
    texts = tokenize(sentences, tuple(actions), tokenizer, image_tokens=image_tokens)
    own = np.stack([env.vocabulary.encode(sentence) for sentence in sentences])
    return TextActions(texts, own, np.stack(list(actions.values())))
