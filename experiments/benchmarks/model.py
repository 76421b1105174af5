"""Gradients of the policy network, compared with its matmuls alone and with naive Flax."""

from collections import Counter
from collections.abc import Iterator
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.harness import Measure, Row, compare, rate
from mmrl_jax.configs import reach_ppo
from mmrl_jax.models.policy import MultimodalPolicy
from mmrl_jax.problems import control, control_models
from mmrl_jax.types import Observation, Params

BATCH = 1024  # Batch size of the quickstart's network.
# Width, layers, heads and batch size of vision transformers (Dosovitskiy et al., 2021).
SIZES = {"ViT-S/16": (384, 12, 6, 8), "ViT-B/16": (768, 12, 12, 4)}


def rows(runs: int) -> Iterator[Row]:
    """Measures the quickstart's network, and networks of ViT sizes with 224x224 images."""
    config = reach_ppo.get_config()
    env = control.make_env(config)
    network = control_models.make_network(config, env)
    shapes = jax.eval_shape(env.reset, jnp.zeros((1, 2), jnp.uint32)).obs
    observation = fill(shapes, BATCH, env.vocabulary.size)
    parameters = jax.jit(network.init)(jax.random.PRNGKey(0), observation)
    ours = rate(BATCH, gradient(network), parameters, observation)
    alone = matmuls(gradient(network), parameters, observation, samples=BATCH)
    name = f"quickstart's network, batch {BATCH:,}"
    yield compare(f"{name} / its matmuls alone", ours, alone, unit="samples/s", runs=runs)
    naive = Naive(vocabulary=env.vocabulary.size, width=config.model.width)
    naive_parameters = jax.jit(naive.init)(jax.random.PRNGKey(0), observation)
    peer = rate(BATCH, gradient(naive), naive_parameters, observation)
    yield compare(f"{name} / naive Flax", ours, peer, unit="samples/s", runs=runs)
    for size, (width, layers, heads, batch) in SIZES.items():
        big = MultimodalPolicy(
            kind="continuous",
            actions=env.action_size,
            vocabulary=env.vocabulary.size,
            width=width,
            layers=layers,
            heads=heads,
            patch=16,
            patch_hidden=width,
        )
        large = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)
        observation = fill(shapes | {"pixels": large}, batch, env.vocabulary.size)
        parameters = jax.jit(big.init)(jax.random.PRNGKey(0), observation)
        ours = rate(batch, gradient(big), parameters, observation)
        alone = matmuls(gradient(big), parameters, observation, samples=batch)
        name = f"{size}, 224x224, batch {batch} / its matmuls alone"
        yield compare(name, ours, alone, unit="samples/s", runs=runs)


def fill(shapes: Any, batch: int, vocabulary: int) -> Observation:
    """Returns a random batch of observations.

    Args:
      shapes: Shapes and dtypes of one observation, [1, ...].
      batch: Batch size.
      vocabulary: Number of token ids.
    """
    rng = np.random.default_rng(0)

    def sample(x: jax.ShapeDtypeStruct) -> jax.Array:
        shape = (batch, *x.shape[1:])
        if x.dtype == bool:
            return jnp.ones(shape, bool)
        if jnp.issubdtype(x.dtype, jnp.integer):
            top = 256 if x.dtype == jnp.uint8 else vocabulary
            return jnp.asarray(rng.integers(0, top, shape), x.dtype)
        return jnp.asarray(rng.normal(size=shape), x.dtype)

    return jax.tree.map(sample, shapes)


def gradient(network: nn.Module) -> jax.stages.Wrapped:
    """Returns a function (parameters, observation) -> gradient of a loss of all outputs."""

    def loss(parameters: Params, observation: Observation) -> jax.Array:
        floats = jax.tree.leaves(network.apply(parameters, observation))
        return sum((jnp.mean(x**2) for x in floats), jnp.zeros(()))

    return jax.jit(jax.grad(loss))


def matmuls(program: jax.stages.Wrapped, *arguments: Any, samples: int) -> Measure:
    """Returns a measurement of the samples per second of the matmuls of a program alone.

    Args:
      program: Jitted function.
      *arguments: Arguments of the function.
      samples: Number of samples in a call.
    """
    counts = Counter(dots(jax.make_jaxpr(program)(*arguments).jaxpr))
    calls = []
    for (left, right, dimensions), count in counts.items():
        call = jax.jit(functools.partial(jax.lax.dot_general, dimension_numbers=dimensions))
        calls.append((call, jnp.ones(left), jnp.ones(right), count))

    def run() -> list[jax.Array]:
        return [call(a, b) for call, a, b, count in calls for _ in range(count)]

    return rate(samples, run)


def dots(jaxpr: jax.extend.core.Jaxpr) -> Iterator[tuple]:
    """Yields shapes and dimension numbers of all matmuls in a jaxpr and its inner jaxprs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left, right = (v.aval.shape for v in equation.invars)
            yield left, right, equation.params["dimension_numbers"]
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from dots(inner)


class Naive(nn.Module):
    """A straightforward implementation of the quickstart's network with Flax's layers."""

    vocabulary: int
    width: int

    @nn.compact
    def __call__(self, observation: Observation) -> tuple[jax.Array, ...]:
        words = nn.Embed(self.vocabulary, self.width)(observation["instruction"]["tokens"])
        mask = observation["instruction"]["mask"]
        pixels = observation["pixels"].astype(jnp.float32) / 127.5 - 1
        patches = nn.Conv(128, (12, 12), strides=(8, 8))(pixels)
        patches = patches.reshape(patches.shape[0], -1, 128)
        scale, shift = jnp.split(nn.Dense(256)(words.mean(1))[:, None], 2, axis=-1)
        patches = nn.Dense(self.width)(nn.gelu(patches * (1 + scale) + shift))
        joints = nn.Dense(self.width)(nn.gelu(nn.Dense(self.width)(observation["proprio"])))
        readouts = self.param("readouts", nn.initializers.normal(1.0), (2, self.width))
        readouts = jnp.broadcast_to(readouts, (words.shape[0], 2, self.width))
        x = jnp.concatenate([words, patches, joints[:, None], readouts], axis=1)
        x = x + self.param("place", nn.initializers.normal(0.1), x.shape[1:])
        present = jnp.ones((x.shape[0], x.shape[1] - words.shape[1]), bool)
        keys = jnp.concatenate([mask, present], axis=1)[:, None, None, :]
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(num_heads=1)(nn.LayerNorm()(x), mask=keys)
            hidden = nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(hidden)
        x = nn.LayerNorm()(x)
        pointing = nn.Dense(1)(patches)
        return nn.Dense(2)(x[:, -2]), nn.Dense(2)(x[:, -2]), nn.Dense(1)(x[:, -1]), pointing
