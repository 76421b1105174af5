"""Policy losses over the tokens of answers, as compositions of few options: [N, T] in, sums out.

    answers [N, T]    ratio         clip          sum over tokens     divisor
    log pi, log old -> per token -> 'ppo'      -> of each answer   -> its own tokens  ('sequence')
                       per answer   'cispo'                           all tokens      ('token')
                                    None                              N * T           ('constant')

N counts the completions whose mask is not empty: one that was not scored has no part in a loss.

The parts of a batch give sums and divisors that add up, so that accumulated gradients and meshes
come to the loss of the whole batch; `PRESETS` names the published combinations.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from mmrl_jax.rl import losses

Ratio = Literal["token", "sequence"]
Clip = Literal["ppo", "cispo"]
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
      ratio: 'token', pi / pi_old of each token; 'sequence', its geometric mean over an answer
        (GSPO, arXiv 2507.18071, eq. 7).
      clip: 'ppo', the smaller of the plain and the clipped surrogate; 'cispo', the gradient of
        log pi, weighted by the clipped ratio (arXiv 2506.13585, eq. 4); None: no clipping.
      low, high: the ratio is clipped to [1 - low, 1 + high]; 'cispo' clips above only. Clip-higher
        is high > low (DAPO, arXiv 2503.14476, eq. 10).
      reduction: what the sum over tokens is divided by, see the module.
      kl: estimator of KL(pi || reference) per token, see `kl_estimate`.
      kl_coef: of it; 0 for none.
      importance_weight_cap: C of the weights min(pi_old / pi_rollout, C), which correct for
        completions that were sampled in another precision than they are learned from; None: no
        weights.
    """

    ratio: Ratio = "token"
    clip: Clip | None = "ppo"
    low: float = 0.2
    high: float = 0.2
    reduction: Reduction = "token"
    kl: KL = "k3"
    kl_coef: float = 0.0
    importance_weight_cap: float | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("ratio", RATIOS), ("clip", (*CLIPS, None)), ("reduction", REDUCTIONS), ("kl", KLS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {known}.")


# Name -> (estimator of group_advantages, loss).
PRESETS: dict[str, tuple[str, TokenLoss]] = {
    # Shao et al., 2024, arXiv 2402.03300.
    "grpo": ("standardised", TokenLoss(reduction="sequence")),
    # Liu et al., 2025, arXiv 2503.20783.
    "dr_grpo": ("centred", TokenLoss(reduction="constant")),
    # Yu et al., 2025, arXiv 2503.14476.
    "dapo": ("standardised", TokenLoss(high=0.28)),
    # Zheng et al., 2025, arXiv 2507.18071.
    "gspo": (
        "standardised",
        TokenLoss(ratio="sequence", low=3e-4, high=4e-4, reduction="sequence"),
    ),
    # MiniMax, 2025, arXiv 2506.13585.
    "cispo": ("standardised", TokenLoss(clip="cispo", high=4.0)),
    # Ahmadian et al., 2024, arXiv 2402.14740.
    "rloo": ("leave_one_out", TokenLoss(clip=None, reduction="constant")),
    # Hu et al., 2025, arXiv 2501.03262.
    "reinforce++": ("batch_standardised", TokenLoss()),
}


class Sums(NamedTuple):
    """Of a part of a batch; added up over the parts.

    Attributes:
      loss: sum over tokens, each over what `loss_denominator` leaves: its answer's tokens for
        'sequence'.
      metrics: name -> sum over tokens that are present.
      tokens: tokens that are present.
    """

    loss: jax.Array
    metrics: dict[str, jax.Array]
    tokens: jax.Array


def kl_estimate(log_ratio: jax.Array, kind: KL) -> jax.Array:
    """KL(pi || reference) per token, of tokens drawn from pi (http://joschu.net/blog/kl-approx.html).

    Args:
      log_ratio: float32 [...], log pi_reference - log pi.
      kind: 'k1', -x; 'k2', x^2 / 2; 'k3', exp(x) - 1 - x, never negative.
    """
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return 0.5 * log_ratio**2
    return losses.approximate_kl(log_ratio)


def loss_denominator(mask: jax.Array, reduction: Reduction) -> jax.Array:
    """What the sums of a whole batch are divided by, []; those of its parts add up.

    Args:
      mask: float32 [N, T], 1 for tokens that are learned from.
      reduction: 'token', the number of these tokens; 'sequence', the number of completions that
        have any; 'constant', T times that number, so that no completion gains by its length.
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
) -> Sums:
    """The sums of a policy loss over the tokens of N answers.

    Args:
      log_prob: float32 [N, T], of the tokens under the policy.
      old_log_prob: float32 [N, T], under the policy before the update, computed by the same program
        as `log_prob`: the sampler's differ by rounding, which a narrow interval clips. None where
        the policy has not moved yet: `log_prob` without its gradient, so that every ratio is 1.
      advantage: float32 [N], or [N, T].
      mask: float32 [N, T], 1 for tokens that are present.
      options: see there.
      reference_log_prob: float32 [N, T], where options.kl_coef is not 0.
      rollout_log_prob: float32 [N, T], of the sampler, where options.importance_weight_cap is
        given; with it 'policy/sampler_gap' is among the metrics.

    Returns:
      Sums; the loss of a batch is sum(loss) / sum(divisor).

    Raises:
      ValueError: log-probs are missing that the options want.
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
    # Not even an overflow of padding may count.
    log_prob = jnp.where(is_token, log_prob, 0.0)
    if old_log_prob is None:
        old_log_prob = jax.lax.stop_gradient(log_prob)
    log_ratio = jnp.where(is_token, log_prob - old_log_prob, 0.0)
    length = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)
    if o.ratio == "sequence":
        log_ratio = jnp.broadcast_to(
            jnp.sum(log_ratio, axis=1, keepdims=True) / length, log_prob.shape
        )
    ratio = jnp.exp(log_ratio)
    loss = _surrogate(log_ratio, log_prob, advantage, o)
    metrics = {}
    if rollout_log_prob is not None:
        gap = jnp.where(is_token, old_log_prob - rollout_log_prob, 0.0)
        metrics["policy/sampler_gap"] = jnp.abs(gap)
        if o.importance_weight_cap is not None:
            loss = loss * jnp.minimum(jnp.exp(gap), o.importance_weight_cap)
    metrics |= {
        "policy/approx_kl": losses.approximate_kl(log_ratio),
        "policy/clip_ratio_low": ((ratio < 1 - o.low) & (advantage < 0)).astype(jnp.float32),
        "policy/clip_ratio_high": ((ratio > 1 + o.high) & (advantage > 0)).astype(jnp.float32),
    }
    if o.kl_coef and reference_log_prob is not None:
        kl = kl_estimate(jnp.where(is_token, reference_log_prob - log_prob, 0.0), o.kl)
        loss, metrics["policy/reference_kl"] = loss + o.kl_coef * kl, kl
    if o.reduction == "sequence":
        loss = loss / length

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(is_token, x, 0.0))

    return Sums(
        loss=total(loss),
        metrics={name: total(jax.lax.stop_gradient(x)) for name, x in metrics.items()},
        tokens=jnp.sum(mask),
    )


def _surrogate(
    log_ratio: jax.Array, log_prob: jax.Array, advantage: jax.Array, options: TokenLoss
) -> jax.Array:
    """The policy loss of each token, [N, T], without importance weights and KL."""
    ratio = jnp.exp(log_ratio)
    if options.clip == "cispo":
        weight = jax.lax.stop_gradient(jnp.minimum(ratio, 1 + options.high))
        return -weight * advantage * log_prob
    if options.clip == "ppo":
        return losses.clipped_policy_loss(log_ratio, advantage, options.low, options.high)
    return -ratio * advantage


def dpo_loss(
    chosen: jax.Array, rejected: jax.Array, *, beta: float, label_smoothing: float = 0.0
) -> jax.Array:
    """Direct preference optimization, float32 [N] (Rafailov et al., 2023, arXiv 2305.18290, eq. 7).

      -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m),  m = chosen - rejected

    Args:
      chosen: float32 [N], log pi - log pi_reference of the preferred answers, summed over tokens.
      rejected: float32 [N], of the others.
      beta: weight of the KL to the reference, > 0.
      label_smoothing: e, the share of preferences taken to be the wrong way round (arXiv
        2312.02013), in [0, 0.5).
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(
        margin
    ) - label_smoothing * jax.nn.log_sigmoid(-margin)
