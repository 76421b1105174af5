"""Losses per sample and masked means: arrays in, arrays out, float32."""

import jax
import jax.numpy as jnp


def masked_mean(x: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    """sum(x * mask) / sum(mask) over arrays of one shape; 0 where the mask is all 0.

    Returns:
      [], or with an axis the means along it, which stays with length 1.
    """
    keep = axis is not None
    total = jnp.sum(jnp.where(mask > 0, x * mask, 0.0), axis, keepdims=keep)
    return total / jnp.maximum(jnp.sum(mask, axis, keepdims=keep), 1.0)


def whiten(x: jax.Array, mask: jax.Array) -> jax.Array:
    """(x - mean) / (std + 1e-8) with the statistics of the masked entries, same shape as x."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) / (jnp.sqrt(variance) + 1e-8)


def clipped_policy_loss(
    log_ratio: jax.Array, advantage: jax.Array, low: float, high: float
) -> jax.Array:
    """PPO's clipped surrogate (Schulman et al., 2017, arXiv 1707.06347, eq. 7), negated.

      -min(rho * A, clamp(rho, 1 - low, 1 + high) * A),  rho = exp(log_ratio)

    Args:
      log_ratio: float32 [...], log pi_new(a) - log pi_old(a).
      advantage: float32 [...].
      low: width of the trust interval below 1, > 0.
      high: above 1, > 0; PPO's are equal.

    Returns:
      float32 [...].
    """
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    return -jnp.minimum(ratio * advantage, clipped * advantage)


def value_loss(
    value: jax.Array, target: jax.Array, old_value: jax.Array, clip: float | None
) -> jax.Array:
    """0.5 * (v - target)^2, float32 [...]; with `clip`, PPO's pessimistic clipped form.

    0.5 * max((v - target)^2, (v_old + clamp(v - v_old, -clip, clip) - target)^2)
    """
    loss = (value - target) ** 2
    if clip is not None:
        near = old_value + jnp.clip(value - old_value, -clip, clip)
        loss = jnp.maximum(loss, (near - target) ** 2)
    return 0.5 * loss


def explained_variance(value: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """1 - mean((target - value)^2) / Var(target), [], over samples where `mask` is 1."""
    variance = masked_mean((target - masked_mean(target, mask)) ** 2, mask)
    residual = masked_mean((target - value) ** 2, mask)
    return 1 - residual / jnp.maximum(variance, 1e-8)


def approximate_kl(log_ratio: jax.Array) -> jax.Array:
    """KL(old || new) per sample by the k3 estimator, (rho - 1) - log rho >= 0, float32 [...].

    John Schulman, http://joschu.net/blog/kl-approx.html (2020); samples come from the old policy.
    """
    return jnp.expm1(log_ratio) - log_ratio


def pointing_loss(logits: jax.Array, place: jax.Array) -> jax.Array:
    """Cross-entropy of the patch that holds a place in the picture, float32 [N], in nats.

    Args:
      logits: float32 [N, rows, columns], one a patch.
      place: float32 [N, 2], fractions of the width from the left and of the height from the top;
        a place out of the picture counts for the nearest patch.
    """
    rows, columns = logits.shape[1:]
    cells = jnp.array([columns, rows])
    column, row = jnp.moveaxis(jnp.clip(place * cells, 0, cells - 1).astype(jnp.int32), -1, 0)
    log_probs = jax.nn.log_softmax(logits.reshape(-1, rows * columns))
    return -jnp.take_along_axis(log_probs, (row * columns + column)[:, None], axis=1)[:, 0]
