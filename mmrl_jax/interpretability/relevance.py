"""Relevance of tokens by the attention weights of the fusion stack of a `MultimodalPolicy`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mmrl_jax.interpretability.units import Units
from mmrl_jax.models.heads import PolicyOutput
from mmrl_jax.models.policy import READOUTS, MultimodalPolicy
from mmrl_jax.types import Observation

WEIGHTS, OFFSETS = "attention", "attention_offset"  # Collections of `models.transformer.Attention`.


def attention_with_gradients(
    network: MultimodalPolicy,
    variables: Any,
    observation: Observation,
    target: Callable[[PolicyOutput], jax.Array],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns the attention weights of the fusion stack, and the gradient of a target by them.

    Args:
      network: Policy network with fusion='joint'.
      variables: Variables of the network, {'params': ...}.
      observation: Observations [B, ...].
      target: Function of the output of the network to float32 [B].

    Returns:
      Weights and gradients of each block, float32 [B, heads, Q, S] each. Q is S, but the number of
      readouts in the last block.
    """

    def run(offsets: Any, mutable: list[str]) -> tuple[PolicyOutput, Any]:
        return network.apply({**variables, **offsets}, observation, mutable=mutable)

    shapes = jax.eval_shape(lambda: run({}, [WEIGHTS, OFFSETS])[1][OFFSETS])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def value(offsets: Any) -> tuple[jax.Array, Any]:
        output, state = run({OFFSETS: offsets}, [WEIGHTS])
        return jnp.sum(target(output)), state[WEIGHTS]

    gradients, weights = jax.grad(value, has_aux=True)(zeros)
    names = [f"block_{i}" for i in range(network.layers)]
    return (
        [weights["fusion"][name]["attention"]["weights"][0] for name in names],
        [gradients["fusion"][name]["attention"]["weights"] for name in names],
    )


def propagate(maps: list[jax.Array]) -> jax.Array:
    """Returns the product of (I + map) over blocks, float32 [B, S, S], rows read columns.

    R <- R + A R for each block in order, with R = I at first (Chefer et al., 2021, equation 6).

    Args:
      maps: Relevance of a block's inputs for its outputs, float32 [B, Q, S] with Q at most S. The
        outputs are the last Q tokens; the others are taken as unchanged.
    """
    batch, _, length = maps[0].shape
    relevance = jnp.broadcast_to(jnp.eye(length), (batch, length, length))
    for x in maps:
        padded = jnp.pad(x, ((0, 0), (length - x.shape[1], 0), (0, 0)))
        relevance = relevance + padded @ relevance
    return relevance


def gradient_weighted(weights: list[jax.Array], gradients: list[jax.Array]) -> jax.Array:
    """Returns the relevance of Chefer et al. (2021) of all tokens, float32 [B, S, S].

    A = mean over heads of the positive part of gradient * weights, then `propagate`.
    """
    pairs = zip(weights, gradients, strict=True)
    return propagate([jnp.mean(jnp.maximum(w * g, 0.0), axis=1) for w, g in pairs])


def rollout(weights: list[jax.Array]) -> jax.Array:
    """Returns attention rollout (Abnar and Zuidema, 2020) of all tokens, float32 [B, S, S].

    The product over blocks of (I + mean over heads of the weights) / 2. It knows no target, and is
    a weak baseline.
    """
    product = propagate([jnp.mean(w, axis=1) for w in weights])
    return product / jnp.sum(product, axis=-1, keepdims=True)


def token_scores(
    network: MultimodalPolicy,
    variables: Any,
    observation: Observation,
    units: Units,
    target: Callable[[PolicyOutput], jax.Array],
) -> dict[str, jax.Array]:
    """Returns the scores of the units by 'relevance' and 'rollout', float32 [B, U] each.

    The score of a token is that of its patch or word. The score of the token of proprioception is
    divided evenly among its readings. The scores are the sums over both readouts.
    """
    weights, gradients = attention_with_gradients(network, variables, observation, target)
    return {
        "relevance": _to_units(gradient_weighted(weights, gradients), units),
        "rollout": _to_units(rollout(weights), units),
    }


def _to_units(relevance: jax.Array, units: Units) -> jax.Array:
    read = jnp.sum(relevance[:, -READOUTS:, :-READOUTS], axis=1)
    batch, (patches, words, _) = read.shape[0], units.sizes
    frames = read[:, words:].reshape(batch, units.frames, -1)
    readings = jnp.repeat(frames[..., -1:] / units.readings, units.readings, axis=-1)
    parts = [frames[..., :-1].reshape(batch, patches), read[:, :words], readings]
    return jnp.concatenate([x.reshape(batch, -1) for x in parts], axis=1)
