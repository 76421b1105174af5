"""Action distributions as pytrees, with float32 log-probabilities."""

from flax import struct
import jax
import jax.numpy as jnp


@struct.dataclass
class TanhNormal:
    """A diagonal Gaussian squashed by tanh to (-1, 1), as in Brax and SAC (Haarnoja et al., 2018).

    Samples u are not squashed, so that log-probabilities of actions near -1 and 1 stay exact;
    `action(u)` squashes them.

    Attributes:
      mean: Mean of the Gaussian, float32 [..., A].
      log_std: Logarithm of the Gaussian's standard deviation, float32 [..., A].
    """

    mean: jax.Array
    log_std: jax.Array

    def sample(self, rng: jax.Array) -> jax.Array:
        """Samples u, float32 [..., A]."""
        return self.mean + jnp.exp(self.log_std) * jax.random.normal(rng, self.mean.shape)

    def mode(self) -> jax.Array:
        """Returns the u of the deterministic action, float32 [..., A]."""
        return self.mean

    @staticmethod
    def action(u: jax.Array) -> jax.Array:
        """Returns the environment's action, tanh(u), float32 [..., A] in (-1, 1)."""
        return jnp.tanh(u)

    def log_prob(self, u: jax.Array) -> jax.Array:
        """Returns the log-probability density of tanh(u), float32 [...], in nats.

        log p(tanh(u)) = sum_a [log N(u_a; mean_a, std_a) - log(1 - tanh(u_a)^2)]
        """
        z = (u - self.mean) * jnp.exp(-self.log_std)
        normal = -0.5 * z**2 - self.log_std - 0.5 * jnp.log(2 * jnp.pi)
        return jnp.sum(normal - _log_det(u), axis=-1)

    def entropy(self, rng: jax.Array) -> jax.Array:
        """Estimates the entropy [...] in nats, with one sample for E[log(1 - tanh(u)^2)]."""
        normal = 0.5 + 0.5 * jnp.log(2 * jnp.pi) + self.log_std
        return jnp.sum(normal + _log_det(self.sample(rng)), axis=-1)

    def cloning_loss(self, action: jax.Array) -> jax.Array:
        """Returns the squared error [...] of the deterministic action to `action` [..., A]."""
        return jnp.sum((jnp.tanh(self.mean) - action) ** 2, axis=-1)


@struct.dataclass
class Categorical:
    """A distribution over A discrete actions.

    Attributes:
      logits: Unnormalized log-probabilities, float32 [..., A].
    """

    logits: jax.Array

    def sample(self, rng: jax.Array) -> jax.Array:
        """Samples actions, int32 [...]."""
        return jax.random.categorical(rng, self.logits)

    def mode(self) -> jax.Array:
        """Returns the most probable action, int32 [...]."""
        return jnp.argmax(self.logits, axis=-1)

    @staticmethod
    def action(u: jax.Array) -> jax.Array:
        """Returns the environment's action, which is the sample itself."""
        return u

    def log_prob(self, u: jax.Array) -> jax.Array:
        """Returns the log-probabilities of actions int [...], float32 [...], in nats."""
        log_probs = jax.nn.log_softmax(self.logits)
        return jnp.take_along_axis(log_probs, u[..., None], axis=-1)[..., 0]

    def entropy(self, rng: jax.Array) -> jax.Array:
        """Returns the exact entropy, float32 [...], in nats; `rng` is not used."""
        del rng
        log_probs = jax.nn.log_softmax(self.logits)
        return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)

    def cloning_loss(self, action: jax.Array) -> jax.Array:
        """Returns the cross-entropy of actions int [...], float32 [...], in nats."""
        return -self.log_prob(action)


Distribution = TanhNormal | Categorical


def _log_det(u: jax.Array) -> jax.Array:
    """Returns log(1 - tanh(u)^2) in a form that is stable for large |u|."""
    return 2.0 * (jnp.log(2.0) - u - jax.nn.softplus(-2.0 * u))
