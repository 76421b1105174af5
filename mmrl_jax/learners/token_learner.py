"""What all learners of token policies share: their state, the policy, and scoring its answers."""

import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from mmrl_jax.models.language import LanguageModel
from mmrl_jax.models.lora import join
from mmrl_jax.models.vlm import VisionLanguageModel
from mmrl_jax.rl.token_log_probs import TokenLogProbs
from mmrl_jax.rollouts import generate as gen
from mmrl_jax.rollouts.answers import answer_features, answer_log_probs
from mmrl_jax.tasks.question import Question
from mmrl_jax.types import Params


class TokenState(struct.PyTreeNode):
    """Everything a learner of tokens carries from update to update.

    Attributes:
      params: the trained half of the model's variables, see `models.lora.split`.
      opt_state: state of the optax optimiser.
      reference: parameters that the policy is kept near to, as `params`; () where to none.
      steps: int32 [], optimiser steps taken.
    """

    params: Params
    opt_state: optax.OptState
    reference: Params
    steps: jax.Array

    def without_optimiser(self) -> "TokenState":
        """What the learner acts with."""
        return self.replace(opt_state=(), reference=())


def init(
    params: Params, *, optimiser: optax.GradientTransformation, with_reference: bool
) -> TokenState:
    """A fresh learner around a trained half; the reference is where it starts."""
    return TokenState(
        params=params,
        opt_state=optimiser.init(params),
        reference=params if with_reference else (),
        steps=jnp.zeros((), jnp.int32),
    )


@dataclasses.dataclass(frozen=True)
class TokenPolicy:
    """A language model, or one with vision, that answers questions.

    `frozen` is the other half of its variables, shared by the policy and its reference.

    Attributes:
      model: the model; one without vision reads the questions' tokens alone.
      length: most tokens of an answer.
      stop: token that ends an answer.
      pad: token that stands behind it.
      tile: rows of the output layer at a time, see `token_log_probs`.
    """

    model: VisionLanguageModel | LanguageModel
    length: int
    stop: int
    pad: int
    tile: int = 4096

    def answer(
        self,
        params: Params,
        frozen: Any,
        question: Question,
        rng: jax.Array,
        *,
        group: int,
        sampling: gen.Sampling,
    ) -> gen.Generated:
        """Draws `group` answers to each of B questions, [B, G, T]."""
        variables = join(params, frozen)
        language, within = gen.language(self.model, variables)
        return gen.generate(
            language,
            within,
            self._prompt(variables, question),
            rng,
            group=group,
            length=self.length,
            sampling=sampling,
            stop=(self.stop,),
            pad=self.pad,
        )

    def log_probs(
        self,
        params: Params,
        frozen: Any,
        question: Question,
        tokens: jax.Array,
        present: jax.Array,
        *,
        temperature: float,
    ) -> TokenLogProbs:
        """Log-probs and entropies of answers int32 [B, G, T], float32 [B, G, T] each."""
        variables = join(params, frozen)
        language, within = gen.language(self.model, variables)
        features = answer_features(
            language, within, self._prompt(variables, question), tokens, present
        )
        return answer_log_probs(
            language, within, features, tokens, temperature=temperature, tile=self.tile
        )

    def _prompt(self, variables: Any, question: Question) -> gen.Prompt:
        if isinstance(self.model, LanguageModel):
            return gen.text_prompt(self.model, variables, question.tokens, question.present)
        return gen.image_prompt(
            self.model, variables, question.tokens, question.present, question.images
        )
