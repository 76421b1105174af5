"""Policy losses over the tokens of completions, as combinations of a few options.

    completions [N, T]   ratio            clip       sum over tokens   denominator
    log pi, log old  ->  per token     -> 'ppo'   -> of a completion -> its tokens ('sequence')
                         per completion   'cispo'    of the batch       all tokens ('token')
                                          'sapo'                        N * T      ('constant')
                                          None

N counts the completions whose mask is not empty; a completion without a reward is not counted.
With 'sequence' the means over tokens are then averaged over the N completions.

Losses of the parts of a batch are returned as sums, whose denominators add up too. Accumulated
gradients and meshes of several devices therefore give the loss of the whole batch. `PRESETS` names
the published combinations.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from mmrl_jax.rl import losses

Ratio = Literal["token", "sequence"]
Clip = Literal["ppo", "cispo", "sapo"]
Reduction = Literal["sequence", "token", "constant"]
KL = Literal["k1", "k2", "k3"]
RATIOS: tuple[str, ...] = get_args(Ratio)
CLIPS: tuple[str, ...] = get_args(Clip)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
KLS: tuple[str, ...] = get_args(KL)


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """The options of a policy loss over tokens.

    Attributes:
      ratio: Probability ratio, 'token' for pi / pi_old of each token, or 'sequence' for its
        geometric mean over a completion (GSPO, arXiv 2507.18071, eq. 7).
      clip: Surrogate, 'ppo' for the smaller of the plain and the clipped one, 'cispo' for log pi
        weighted by the clipped ratio (arXiv 2506.13585, eq. 4), 'sapo' for a smooth gate instead
        of an interval (arXiv 2511.20347, eq. 6), or None for no clipping.
      low: Width of the clipping interval below 1, of 'ppo' alone.
      high: Width of the clipping interval above 1, of 'ppo' and 'cispo'; larger than `low` for
        clip-higher (DAPO, arXiv 2503.14476, eq. 10).
      positive_temperature: Temperature of the gate of 'sapo' for tokens with a positive advantage.
        The higher it is, the faster the gradient vanishes away from the ratio 1.
      negative_temperature: The same for the other tokens.
      reduction: Denominator of the sum over tokens, see `loss_denominator`.
      kl: Estimator of KL(pi || reference) per token, see `kl_estimate`.
      kl_coef: Coefficient of the KL to the reference; 0 for no KL.
      importance_weight_cap: Bound C of the importance weights min(pi_old / pi_rollout, C), which
        correct for completions that were sampled in another precision than they are learned from,
        or with earlier parameters; None for no weights.
    """

    ratio: Ratio = "token"
    clip: Clip | None = "ppo"
    low: float = 0.2
    high: float = 0.2
    positive_temperature: float = 1.0
    negative_temperature: float = 1.05
    reduction: Reduction = "token"
    kl: KL = "k3"
    kl_coef: float = 0.0
    importance_weight_cap: float | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("ratio", RATIOS), ("clip", (*CLIPS, None)), ("reduction", REDUCTIONS), ("kl", KLS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {known}.")


# Name -> (estimator of group_advantages, loss).
PRESETS: dict[str, tuple[str, TokenLoss]] = {
    # Shao et al., 2024, arXiv 2402.03300.
    "grpo": ("standardized", TokenLoss(reduction="sequence")),
    # Liu et al., 2025, arXiv 2503.20783.
    "dr_grpo": ("centered", TokenLoss(reduction="constant")),
    # Yu et al., 2025, arXiv 2503.14476.
    "dapo": ("standardized", TokenLoss(high=0.28)),
    # Zheng et al., 2025, arXiv 2507.18071.
    "gspo": (
        "standardized",
        TokenLoss(ratio="sequence", low=3e-4, high=4e-4, reduction="sequence"),
    ),
    # MiniMax, 2025, arXiv 2506.13585.
    "cispo": ("standardized", TokenLoss(clip="cispo", high=4.0)),
    # Gao et al., 2025, arXiv 2511.20347.
    "sapo": ("standardized", TokenLoss(clip="sapo", reduction="sequence")),
    # Ahmadian et al., 2024, arXiv 2402.14740.
    "rloo": ("leave_one_out", TokenLoss(clip=None, reduction="constant")),
    # Hu et al., 2025, arXiv 2501.03262.
    "reinforce++": ("batch_standardized", TokenLoss()),
}


class Sums(NamedTuple):
    """Sums over a part of a batch, which add up over the parts.

    Attributes:
      loss: Sum of the token losses, []; with the reduction 'sequence' each is divided by the length
        of its completion.
      metrics: Sums of metrics over the tokens, [] each.
      tokens: Number of tokens, [].
    """

    loss: jax.Array
    metrics: dict[str, jax.Array]
    tokens: jax.Array


def kl_estimate(log_ratio: jax.Array, kind: KL) -> jax.Array:
    """Estimates KL(pi || reference) per token, in nats, from tokens that were sampled from pi.

    See Schulman (2020), http://joschu.net/blog/kl-approx.html.

    Args:
      log_ratio: Log-ratio x = log pi_reference - log pi, float32 [...].
      kind: Estimator, 'k1' for -x, 'k2' for x^2 / 2, or 'k3' for exp(x) - 1 - x, which is never
        negative.
    """
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return 0.5 * log_ratio**2
    return losses.approximate_kl(log_ratio)


def loss_denominator(mask: jax.Array, reduction: Reduction) -> jax.Array:
    """Returns the denominator of the loss of a batch, []; those of its parts add up.

    Args:
      mask: 1 for tokens that are learned from, float32 [N, T].
      reduction: 'token' for the number of these tokens, 'sequence' for the number of completions
        that have any, or 'constant' for T times that number, which gives every token of every
        completion the same weight.
    """
    if reduction == "token":
        return jnp.sum(mask)
    completions = jnp.sum(jnp.any(mask > 0, axis=1).astype(jnp.float32))
    return completions if reduction == "sequence" else completions * mask.shape[1]


def token_loss_sums(
    log_prob: jax.Array,
    old_log_prob: jax.Array | None,
    advantage: jax.Array,
    mask: jax.Array,
    options: TokenLoss,
    *,
    reference_log_prob: jax.Array | None = None,
    rollout_log_prob: jax.Array | None = None,
    anchor_coef: jax.Array | None = None,
) -> Sums:
    """Returns the sums of a policy loss over the tokens of N completions.

    The loss of a batch is the sum of the losses of its parts, divided by `loss_denominator` of the
    batch.

    Args:
      log_prob: Log-probs of the tokens under the policy, float32 [N, T].
      old_log_prob: Log-probs under the policy before the update, float32 [N, T]. They must come
        from the same program as `log_prob`, because those of the sampler differ by rounding, which
        a narrow interval would clip. None if no step was taken yet, so that every ratio is 1.
      advantage: Advantages of the completions, float32 [N], or of the tokens, [N, T].
      mask: 1 for tokens that are learned from, float32 [N, T].
      options: Options of the loss.
      reference_log_prob: Log-probs under the reference, float32 [N, T]; needed if options.kl_coef
        is not 0.
      rollout_log_prob: Log-probs under the sampler, float32 [N, T]; needed if
        options.importance_weight_cap is given, and the source of the metric 'policy/sampler_gap'.
      anchor_coef: Coefficients of |log pi - log pi_old| of the tokens, which hold the policy where
        it was before the update, float32 [N, T], see `high_covariance_tokens`; None for none.

    Raises:
      ValueError: The options need log-probs that are None.
    """
    o, is_token = options, mask > 0
    if o.kl_coef and reference_log_prob is None:
        raise ValueError(f"kl_coef={o.kl_coef}, but reference_log_prob is None.")
    if o.importance_weight_cap is not None and rollout_log_prob is None:
        raise ValueError(
            f"importance_weight_cap={o.importance_weight_cap}, but rollout_log_prob is None."
        )
    if advantage.ndim == 1:
        advantage = advantage[:, None]
    advantage = jnp.where(is_token, advantage, 0.0)
    # Padding is masked before the exponential too: the gradient of a masked overflow is NaN.
    log_prob = jnp.where(is_token, log_prob, 0.0)
    if old_log_prob is None:
        old_log_prob = jax.lax.stop_gradient(log_prob)
    log_ratio = jnp.where(is_token, log_prob - old_log_prob, 0.0)
    length = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)
    drift = jnp.abs(log_ratio)  # Of each token, whatever the ratio is of.
    if o.ratio == "sequence":
        log_ratio = jnp.broadcast_to(
            jnp.sum(log_ratio, axis=1, keepdims=True) / length, log_prob.shape
        )
    loss = _surrogate(log_ratio, log_prob, advantage, o)
    metrics = {}
    if rollout_log_prob is not None:
        gap = jnp.where(is_token, old_log_prob - rollout_log_prob, 0.0)
        metrics["policy/sampler_gap"] = jnp.abs(gap)
        if o.importance_weight_cap is not None:
            loss = loss * jnp.minimum(jnp.exp(gap), o.importance_weight_cap)
    metrics |= _ratio_metrics(log_ratio, advantage, o)
    if o.kl_coef and reference_log_prob is not None:
        kl = kl_estimate(jnp.where(is_token, reference_log_prob - log_prob, 0.0), o.kl)
        loss, metrics["policy/reference_kl"] = loss + o.kl_coef * kl, kl
    if anchor_coef is not None:
        loss = loss + anchor_coef * drift
    if o.reduction == "sequence":
        loss = loss / length

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(is_token, x, 0.0))

    return Sums(
        loss=total(loss),
        metrics={name: total(jax.lax.stop_gradient(x)) for name, x in metrics.items()},
        tokens=jnp.sum(mask),
    )


def _ratio_metrics(
    log_ratio: jax.Array, advantage: jax.Array, options: TokenLoss
) -> dict[str, jax.Array]:
    """Returns metrics of the probability ratio of each token, [N, T] each."""
    o, ratio = options, jnp.exp(log_ratio)
    return {
        "policy/approx_kl": losses.approximate_kl(log_ratio),
        "policy/clip_ratio_low": _share((ratio < 1 - o.low) & (advantage < 0), o.clip == "ppo"),
        "policy/clip_ratio_high": _share(
            (ratio > 1 + o.high) & (advantage > 0), o.clip in ("ppo", "cispo")
        ),
    }


def _share(clipped: jax.Array, is_used: bool) -> jax.Array:
    """Returns 1 for tokens at a bound, or 0 for all if the surrogate does not use the bound."""
    return (clipped & is_used).astype(jnp.float32)


def _surrogate(
    log_ratio: jax.Array, log_prob: jax.Array, advantage: jax.Array, options: TokenLoss
) -> jax.Array:
    """Returns the policy loss of each token, [N, T], without importance weights and KL."""
    ratio = jnp.exp(log_ratio)
    if options.clip == "cispo":
        weight = jax.lax.stop_gradient(jnp.minimum(ratio, 1 + options.high))
        return -weight * advantage * log_prob
    if options.clip == "ppo":
        return losses.clipped_policy_loss(log_ratio, advantage, options.low, options.high)
    if options.clip == "sapo":
        temperature = jnp.where(
            advantage > 0, options.positive_temperature, options.negative_temperature
        )
        # The gate is 4 / temperature long before this bound. The gradient of an infinite ratio
        # would be NaN.
        bounded = jnp.exp(jnp.minimum(log_ratio, 20.0))
        return -4 / temperature * jax.nn.sigmoid(temperature * (bounded - 1)) * advantage
    return -ratio * advantage


def top_entropy_tokens(entropy: jax.Array, mask: jax.Array, *, fraction: float) -> jax.Array:
    """Selects the tokens with the largest entropies (Wang et al., 2025, arXiv 2506.01939, eq. 5).

    Args:
      entropy: Entropies of the distributions that the tokens were sampled from, float32 [...].
      mask: 1 for tokens that are learned from, float32 [...].
      fraction: Fraction of these tokens to select, in (0, 1].

    Returns:
      True for the tokens whose entropy is at least the (1 - fraction)-quantile, bool [...].
    """
    known = jnp.where(mask > 0, entropy, jnp.nan)
    return (mask > 0) & (entropy >= jnp.nanquantile(known, 1 - fraction))


def high_covariance_tokens(
    log_prob: jax.Array, advantage: jax.Array, mask: jax.Array, *, fraction: float
) -> jax.Array:
    """Selects the tokens whose log-prob and advantage covary most (arXiv 2505.22617, eq. 10).

    The covariance of a token is (log pi - mean log pi) * (A - mean A), with means over the tokens
    that are learned from. An update on the tokens where it is large lowers the entropy most. KL-Cov
    holds the policy on them by a penalty, see `token_loss_sums`.

    Args:
      log_prob: Log-probs of the tokens before the update, float32 [...].
      advantage: Advantages of the tokens, float32 [...].
      mask: 1 for tokens that are learned from, float32 [...].
      fraction: Fraction of these tokens to select, in (0, 1].

    Returns:
      True for the selected tokens, bool [...].
    """
    covariance = (log_prob - losses.masked_mean(log_prob, mask)) * (
        advantage - losses.masked_mean(advantage, mask)
    )
    known = jnp.where(mask > 0, covariance, jnp.nan)
    return (mask > 0) & (covariance >= jnp.nanquantile(known, 1 - fraction))


def dpo_loss(
    chosen: jax.Array, rejected: jax.Array, *, beta: float, label_smoothing: float = 0.0
) -> jax.Array:
    """Direct preference optimization (Rafailov et al., 2023, arXiv 2305.18290, eq. 7).

      -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m),  m = chosen - rejected

    Args:
      chosen: log pi - log pi_reference of the chosen completions, summed over tokens, float32 [N].
      rejected: The same of the rejected completions, float32 [N].
      beta: Coefficient of the implicit KL to the reference, > 0.
      label_smoothing: Probability e that a preference is flipped (arXiv 2312.02013), in [0, 0.5).

    Returns:
      The loss of each pair, float32 [N].
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(
        margin
    ) - label_smoothing * jax.nn.log_sigmoid(-margin)
