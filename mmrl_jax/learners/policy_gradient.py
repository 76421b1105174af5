"""The options of policy gradient algorithms over tokens, and the tokens that they learn from."""

import dataclasses

import jax
import jax.numpy as jnp

from mmrl_jax.config.options import NON_NEGATIVE, POSITIVE, POSITIVE_FRACTION, between, option
from mmrl_jax.learners.entropy_bonus import EntropyOptions
from mmrl_jax.learners.token_learner import StepOptions
from mmrl_jax.rl.token_log_probs import TokenLogProbs
from mmrl_jax.rl.token_losses import KL, high_covariance_tokens, top_entropy_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradientOptions(StepOptions, EntropyOptions):
    """The options that all policy gradient algorithms over tokens share."""

    kl_estimator: KL = option(
        "k3", "Estimator of the KL divergence from the reference, see mmrl_jax/rl/token_losses.py."
    )
    kl_coef: float = option(
        0.0,
        "Coefficient of the KL divergence from the reference; 0 for no reference.",
        NON_NEGATIVE,
    )
    top_entropy_fraction: float = option(
        1.0,
        "Fraction of the tokens that the policy gradient uses, those with the largest entropy "
        "before the update; 1 for all tokens.",
        POSITIVE_FRACTION,
    )
    kl_cov_fraction: float = option(
        0.0,
        "Fraction of the tokens that KL-Cov holds near the policy before the update, those whose "
        "log-prob and advantage covary most; 0 for none.",
        between(0, 1),
    )
    kl_cov_coef: float = option(1.0, "Coefficient of the penalty of KL-Cov.", NON_NEGATIVE)
    importance_weight_cap: float | None = option(
        None,
        "Largest importance weight that corrects for completions which were sampled in another "
        "precision than they are learned from, or by the policy before the last update "
        "(one_step_off_policy of a dataset); None for no importance weights.",
        POSITIVE,
    )

    @property
    def selects_tokens(self) -> bool:
        """Whether the policy loss treats some tokens differently, see `select_tokens`."""
        return self.top_entropy_fraction < 1 or self.kl_cov_fraction > 0


def select_tokens(
    options: PolicyGradientOptions, before: TokenLogProbs, advantage: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Returns what the policy loss uses of each token, float32 [..., T].

    Args:
      options: Options of the algorithm.
      before: Log-probs and entropies of the tokens before the update, float32 [..., T].
      advantage: Advantages of the tokens, or of the completions as [..., 1], float32.
      mask: 1 for tokens that are learned from, float32 [..., T].

    Returns:
      The advantages, which are 0 for tokens that are not among those with the largest entropies,
      and the coefficients of the penalty of KL-Cov; None without this penalty.
    """
    advantage, anchor_coef = jnp.broadcast_to(advantage, mask.shape), None
    if options.kl_cov_fraction > 0:
        held = high_covariance_tokens(
            before.log_prob, advantage, mask, fraction=options.kl_cov_fraction
        )
        anchor_coef = options.kl_cov_coef * held.astype(jnp.float32)
    if options.top_entropy_fraction < 1:
        uncertain = top_entropy_tokens(before.entropy, mask, fraction=options.top_entropy_fraction)
        advantage = jnp.where(uncertain, advantage, 0.0)
    return advantage, anchor_coef


def reference_needs(options: PolicyGradientOptions) -> frozenset[str]:
    """Returns {'reference'} if the options have a KL divergence from the reference, else {}."""
    return frozenset({"reference"} if options.kl_coef > 0 else ())
