"""A linear policy network for tests of learners, small enough to be written out."""

import jax.numpy as jnp

from mmrl_jax.models.heads import PolicyOutput
from mmrl_jax.rl.distributions import Categorical, TanhNormal


def apply(params, observation):
    """Applies linear heads to proprioception [B, P]; actions are discrete without a log_std."""
    x = observation["proprio"]
    mean = x @ params["policy"]
    if "log_std" in params:
        distribution = TanhNormal(mean, jnp.broadcast_to(params["log_std"], mean.shape))
    else:
        distribution = Categorical(mean)
    points = params["target"].shape[1] // 2
    auxiliary = {
        "place": x @ params["place"],
        "target": (x @ params["target"]).reshape(-1, points, 2),
    }
    return PolicyOutput(distribution, x @ params["value"], auxiliary, features=x)
