"""Instructions and actions of an environment as text, for agents that are token policies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.envs.brax_api import Env
from mmrl_jax.tasks.prompts import ABSENT, Prompt, Texts, Tokenizer, tokenize
from mmrl_jax.types import Observation


@dataclasses.dataclass(frozen=True)
class TextActions:
    """Instructions and actions of an environment as text, see `text_actions`.

    Attributes:
      texts: A prompt for each instruction and an answer for each action, as tokens of the model.
      sentences: Tokens of each instruction in the environment's vocabulary, int32 [Q, L].
      actions: Action of the environment for each answer, [A, ...]; the first one is also taken
        for a completion that is no answer.
    """

    texts: Texts
    sentences: np.ndarray
    actions: np.ndarray

    def make_prompts(self, observation: Observation) -> Prompt:
        """Returns the prompts for observations [B, ...] with pixels and an instruction.

        Their `answer` is ABSENT, because no action is known to be correct.
        """
        instruction = observation["instruction"]["tokens"]
        text = jnp.argmax(jnp.all(instruction[:, None] == self.sentences, axis=-1), axis=-1)
        unknown, zeros = jnp.full(text.shape, ABSENT), jnp.zeros(text.shape, jnp.int32)
        return self.texts.make_prompts(observation["pixels"], text, unknown, zeros, zeros)

    def decode_actions(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the actions that completions describe.

        Args:
          tokens: Tokens of the completions, int32 [..., T].
          mask: False for padding, bool [..., T].

        Returns:
          The actions [..., A], and True where a completion is no action, bool [...].
        """
        parsed = self.texts.parse(tokens, mask)
        return jnp.asarray(self.actions)[jnp.maximum(parsed, 0)], parsed == ABSENT

    def encode_actions(self, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns tokens int32 [B, T] and mask of the texts of the actions nearest to [B, ...]."""
        squared_distance = (action[:, None] - jnp.asarray(self.actions)).astype(jnp.float32) ** 2
        nearest = jnp.argmin(
            squared_distance.reshape(*squared_distance.shape[:2], -1).sum(axis=-1), axis=1
        )
        return self.texts.labels(nearest)


def text_actions(env: Env, tokenizer: Tokenizer | None = None, *, image_tokens: int) -> TextActions:
    """Tokenizes the instructions and the actions of an environment.

    Args:
      env: An environment with `vocabulary` and `actions_as_text`.
      tokenizer: Tokenizer of the model; by default a `WordTokenizer` of these texts.
      image_tokens: Number of image tokens of a frame.
    """
    sentences, actions = env.vocabulary.sentences, env.actions_as_text
    texts = tokenize(sentences, tuple(actions), tokenizer, image_tokens=image_tokens)
    environment_tokens = np.stack([env.vocabulary.encode(sentence) for sentence in sentences])
    return TextActions(texts, environment_tokens, np.stack(list(actions.values())))
