"""Losses per sample and masked means, float32."""

import jax
import jax.numpy as jnp


def masked_mean(x: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    """Returns sum(x * mask) / sum(mask), or 0 where the mask is all 0.

    Args:
      x: Values of any shape; they may be NaN where the mask is 0.
      mask: Weights of the same shape.
      axis: Axis that is averaged over; None for all axes.

    Returns:
      The mean, []; with an axis the means along it, whose length becomes 1.
    """
    keep = axis is not None
    total = jnp.sum(jnp.where(mask > 0, x * mask, 0.0), axis, keepdims=keep)
    return total / jnp.maximum(jnp.sum(mask, axis, keepdims=keep), 1.0)


def whiten(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns (x - mean) / (std + 1e-8), with the mean and std of the entries where `mask` is 1."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) / (jnp.sqrt(variance) + 1e-8)


def clipped_policy_loss(
    log_ratio: jax.Array, advantage: jax.Array, low: float, high: float
) -> jax.Array:
    """PPO's clipped surrogate (Schulman et al., 2017, arXiv 1707.06347, eq. 7), negated.

      -min(rho * A, clamp(rho, 1 - low, 1 + high) * A),  rho = exp(log_ratio)

    Args:
      log_ratio: Log of the probability ratio, log pi_new(a) - log pi_old(a), float32 [...].
      advantage: Advantages A, float32 [...].
      low: Width of the clipping interval below 1, > 0.
      high: Width of the clipping interval above 1, > 0; equal to `low` in PPO.

    Returns:
      The loss of each sample, float32 [...].
    """
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    return -jnp.minimum(ratio * advantage, clipped * advantage)


def value_loss(
    value: jax.Array, target: jax.Array, old_value: jax.Array, clip: float | None
) -> jax.Array:
    """Returns 0.5 * (v - target)^2, float32 [...]; with `clip`, PPO's clipped form.

    0.5 * max((v - target)^2, (v_old + clamp(v - v_old, -clip, clip) - target)^2)
    """
    loss = (value - target) ** 2
    if clip is not None:
        near = old_value + jnp.clip(value - old_value, -clip, clip)
        loss = jnp.maximum(loss, (near - target) ** 2)
    return 0.5 * loss


def expectile_loss(error: jax.Array, expectile: float) -> jax.Array:
    """Returns |expectile - 1(error < 0)| * error^2, float32 [...].

    (Kostrikov et al., 2021, arXiv 2110.06169, eq. 4.) With the expectile 0.5 it is half of the
    squared error.

    Args:
      error: Targets minus values, float32 [...].
      expectile: Weight of values that are too small, in (0, 1).
    """
    return jnp.where(error < 0, 1 - expectile, expectile) * error**2


def explained_variance(value: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns 1 - mean((target - value)^2) / Var(target), [], over samples where `mask` is 1."""
    variance = masked_mean((target - masked_mean(target, mask)) ** 2, mask)
    residual = masked_mean((target - value) ** 2, mask)
    return 1 - residual / jnp.maximum(variance, 1e-8)


def advantage_weights(scaled_advantage: jax.Array, max_weight: float) -> jax.Array:
    """Returns min(exp(x), max_weight), the weights of advantage-weighted regression, float32 [...].

    The weights have no gradient (Peng et al., 2019, arXiv 1910.00177).

    Args:
      scaled_advantage: Advantages divided by the temperature, float32 [...].
      max_weight: Maximum weight, > 0.
    """
    weight = jnp.minimum(jnp.exp(scaled_advantage), max_weight)
    return jax.lax.stop_gradient(weight)


def approximate_kl(log_ratio: jax.Array) -> jax.Array:
    """Estimates KL(old || new) per sample by k3, (rho - 1) - log rho >= 0, float32 [...], in nats.

    The samples come from the old policy (Schulman, 2020, http://joschu.net/blog/kl-approx.html).
    """
    return jnp.expm1(log_ratio) - log_ratio


def pointing_loss(logits: jax.Array, position: jax.Array) -> jax.Array:
    """Returns the cross-entropy of the patch that contains a position in the image, float32 [N].

    Args:
      logits: Logits of the patches, float32 [N, rows, columns].
      position: Fractions of the width from the left and of the height from the top, float32 [N, 2];
        a position outside the image counts for the nearest patch.
    """
    rows, columns = logits.shape[1:]
    cells = jnp.array([columns, rows])
    column, row = jnp.moveaxis(jnp.clip(position * cells, 0, cells - 1).astype(jnp.int32), -1, 0)
    log_probs = jax.nn.log_softmax(logits.reshape(-1, rows * columns))
    return -jnp.take_along_axis(log_probs, (row * columns + column)[:, None], axis=1)[:, 0]
