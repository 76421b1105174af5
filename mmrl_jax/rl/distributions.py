"""Action distributions as pytrees: parameters in, float32 log-probabilities out."""

from flax import struct
import jax
import jax.numpy as jnp


@struct.dataclass
class TanhNormal:
    """A diagonal Gaussian squashed by tanh to (-1, 1), as in Brax and SAC (Haarnoja et al., 2018).

    Samples are kept unsquashed (`u`): log-probabilities near +-1 stay exact. `action(u)` squashes.

    Attributes:
      mean: float32 [..., A], of the Gaussian.
      log_std: float32 [..., A], of the Gaussian.
    """

    mean: jax.Array
    log_std: jax.Array

    def sample(self, rng: jax.Array) -> jax.Array:
        """Draws u [..., A]."""
        return self.mean + jnp.exp(self.log_std) * jax.random.normal(rng, self.mean.shape)

    def mode(self) -> jax.Array:
        """The u [..., A] whose action is the deterministic policy's."""
        return self.mean

    @staticmethod
    def action(u: jax.Array) -> jax.Array:
        """The environment's action, tanh(u), [..., A] in (-1, 1)."""
        return jnp.tanh(u)

    def log_prob(self, u: jax.Array) -> jax.Array:
        """log p(tanh(u)) = sum_a [log N(u; mean, std) - log(1 - tanh(u)^2)], [...]."""
        z = (u - self.mean) * jnp.exp(-self.log_std)
        normal = -0.5 * z**2 - self.log_std - 0.5 * jnp.log(2 * jnp.pi)
        return jnp.sum(normal - _log_det(u), axis=-1)

    def entropy(self, rng: jax.Array) -> jax.Array:
        """Entropy [...]: the Gaussian's, plus a one-sample estimate of E[log(1 - tanh(u)^2)]."""
        normal = 0.5 + 0.5 * jnp.log(2 * jnp.pi) + self.log_std
        return jnp.sum(normal + _log_det(self.sample(rng)), axis=-1)

    def cloning_loss(self, action: jax.Array) -> jax.Array:
        """Squared error [...] of the deterministic action to `action` [..., A] in [-1, 1]."""
        return jnp.sum((jnp.tanh(self.mean) - action) ** 2, axis=-1)


@struct.dataclass
class Categorical:
    """Discrete actions.

    Attributes:
      logits: float32 [..., A], unnormalized log-probabilities.
    """

    logits: jax.Array

    def sample(self, rng: jax.Array) -> jax.Array:
        """Draws int32 [...]."""
        return jax.random.categorical(rng, self.logits)

    def mode(self) -> jax.Array:
        """The most probable action, int32 [...]."""
        return jnp.argmax(self.logits, axis=-1)

    @staticmethod
    def action(u: jax.Array) -> jax.Array:
        """The environment's action: the sample itself."""
        return u

    def log_prob(self, u: jax.Array) -> jax.Array:
        """Log-probability [...] of int [...] actions."""
        log_probs = jax.nn.log_softmax(self.logits)
        return jnp.take_along_axis(log_probs, u[..., None], axis=-1)[..., 0]

    def entropy(self, rng: jax.Array) -> jax.Array:
        """Exact entropy [...], in nats; `rng` is not used."""
        del rng
        log_probs = jax.nn.log_softmax(self.logits)
        return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)

    def cloning_loss(self, action: jax.Array) -> jax.Array:
        """Cross-entropy [...] of int [...] actions."""
        return -self.log_prob(action)


Distribution = TanhNormal | Categorical


def _log_det(u: jax.Array) -> jax.Array:
    """log(1 - tanh(u)^2), stable for large |u|."""
    return 2.0 * (jnp.log(2.0) - u - jax.nn.softplus(-2.0 * u))
