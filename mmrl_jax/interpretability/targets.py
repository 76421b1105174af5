"""Targets: the numbers of a policy's output that an explanation is about.

The names are those of SVERL (Beechey et al., 2023): 'behavior' is what the policy does, and
'prediction' is the return that it expects. A target maps a PolicyOutput of batch [B] and a `Choice`
to float32 [B].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mmrl_jax.models.heads import PolicyOutput
from mmrl_jax.types import Observation


class Choice(NamedTuple):
    """The actions that an explanation of behavior compares.

    Attributes:
      action: Action whose choice is explained, before tanh as in `types.Transition`, float32
        [B, A] or int32 [B].
      other: Action of the same policy in another episode at the same time step, like `action`.
    """

    action: jax.Array
    other: jax.Array


Target = Callable[[PolicyOutput, Choice], jax.Array]
Predict = Callable[[Observation], PolicyOutput]
# A function of inputs [B, ...], a pytree, to float32 [B].
Value = Callable[[Any], jax.Array]


def behavior(output: PolicyOutput, choice: Choice) -> jax.Array:
    """Returns log p(action | observation) in nats, float32 [B].

    Its gradient with respect to the mean of a Gaussian vanishes at the most likely action. Methods
    that use a single gradient should therefore explain `contrast`.
    """
    return output.distribution.log_prob(choice.action)


def contrast(output: PolicyOutput, choice: Choice) -> jax.Array:
    """Returns log p(action | observation) - log p(other | observation) in nats, float32 [B].

    It answers why the policy chose this action and not the one of another episode. For a Gaussian
    it is linear in the mean.
    """
    log_prob = output.distribution.log_prob
    return log_prob(choice.action) - log_prob(choice.other)


def prediction(output: PolicyOutput, choice: Choice) -> jax.Array:
    """Returns the value estimate of the policy in units of return, float32 [B]."""
    del choice
    return output.value


TARGETS: dict[str, Target] = {
    "behavior": behavior,
    "contrast": contrast,
    "prediction": prediction,
}
