"""Explanations of a control policy: which modality, patch and word its actions depend on.

All backgrounds are observations of other episodes at the same time step: a blank image, or the
start of an episode in place of its end, is an input that the policy never sees.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from mmrl_jax.envs.brax_api import Env, State
from mmrl_jax.interpretability import attribution, faithfulness, relevance, shapley
from mmrl_jax.interpretability import units as units_lib
from mmrl_jax.interpretability.targets import TARGETS, Choice, Predict, Value
from mmrl_jax.models.heads import PolicyOutput
from mmrl_jax.models.policy import MultimodalPolicy
from mmrl_jax.rollouts.unroll import PolicyFunction, unroll
from mmrl_jax.types import Observation, Transition

MODALITIES = ("pixels", "instruction", "proprio")
PATH_STEPS = 16  # Points on the path of integrated gradients.
CURVE_STEPS = 8  # Steps of an insertion or deletion curve.
RANDOM_ORDERS = 4  # Random rankings that a ranking is compared with.


class Played(NamedTuple):
    """T steps of N episodes.

    Attributes:
      observation: Observations, [T, N, ...].
      action: Actions before tanh, float32 [T, N, A] or int32 [T, N].
      running: 1 until the episode has ended, float32 [T, N].
    """

    observation: Observation
    action: jax.Array
    running: jax.Array


class Contributions(NamedTuple):
    """Shapley values of n players for a target.

    Attributes:
      phi: Shapley value of each player, float32 [n, T, N].
      interaction: Shapley interaction index of each pair, float32 [n, n, T, N].
      difference: Value of the observation minus that of the backgrounds, float32 [T, N].
      share: Share of each player, see `shapley.shares`, float32 [n].
    """

    phi: jax.Array
    interaction: jax.Array
    difference: jax.Array
    share: jax.Array


class Swap(NamedTuple):
    """Most likely actions in T steps of N episodes with the instruction of another episode.

    Attributes:
      played: The steps with the other instructions, and the most likely actions there.
      action: Most likely action of the environment with the own instruction, float32 [T, N, A] or
        int32 [T, N].
      swapped_action: The same with the other instruction.
      differs: Whether the other instruction is another one, bool [N].
      change: Distance between the two actions, float32 [T, N]: Euclidean for continuous actions,
        and 0 or 1 for discrete ones.
      spread: The same distance between the actions of the two episodes, each with its own images
        and its own instruction, float32 [T, N].
    """

    played: Played
    action: jax.Array
    swapped_action: jax.Array
    differs: jax.Array
    change: jax.Array
    spread: jax.Array


class UnitScores(NamedTuple):
    """Scores of U units in B samples by several methods.

    Attributes:
      scores: Scores by method, float32 [B, U] each.
      ranked: Units that are not padding, bool [B, U].
      difference: Value of the inputs minus that of the backgrounds, float32 [B].
      completeness_error: Error of integrated gradients, float32 [B].
    """

    scores: dict[str, jax.Array]
    ranked: jax.Array
    difference: jax.Array
    completeness_error: jax.Array


def play(env: Env, state: State, policy: PolicyFunction, rng: jax.Array) -> Played:
    """Plays one episode in each of N environments, see `rollouts.unroll`."""
    return played(unroll(env, state, policy, rng, env.episode_length)[1])


def played(batch: Transition) -> Played:
    """Returns the first episode of each of N environments from the transitions [T, N, ...]."""
    done = batch.terminated + batch.truncated
    before = jnp.cumsum(done, axis=0) - done + jnp.cumsum(1 - batch.valid, axis=0)
    return Played(batch.observation, batch.action, (before == 0).astype(jnp.float32))


def subsample(played: Played, count: int) -> Played:
    """Returns about `count` evenly spaced steps of the episodes, at least the first one."""
    every = stride(played.running.shape[0], count)
    return jax.tree.map(lambda x: x[::every], played)


def stride(length: int, count: int) -> int:
    """Returns the distance between about `count` evenly spaced steps of `length`, at least 1."""
    return max(1, length // count)


def modalities(observation: Observation) -> shapley.Players:
    """Returns the modalities of an observation as players."""
    return shapley.modality_players([name for name in MODALITIES if name in observation])


def contributions(
    predict: Predict,
    played: Played,
    players: shapley.Players,
    *,
    target: str,
    backgrounds: int,
) -> Contributions:
    """Returns the exact Shapley values of players, for example of modalities.

    Args:
      predict: Function of observations that runs the policy.
      played: Steps of at least backgrounds + 1 episodes. Steps after the end of an episode count
        as 0, and may be backgrounds.
      players: Players of the observations.
      target: Name of the target in `targets.TARGETS`.
      backgrounds: Number of other episodes over which the values of a coalition are averaged.

    Raises:
      ValueError: If there are too few episodes, or too many players.
    """
    count = len(players.names)
    shapley.check_backgrounds(played.running.shape[1], backgrounds)

    def with_background(shift: jax.Array) -> jax.Array:
        own = played.observation, played.action
        other = shapley.other_episodes(own, shift)
        (observation, action), (background, other_action) = _flat((own, other))

        def value(inputs: tuple[Observation, Choice]) -> jax.Array:
            observation, choice = inputs
            return TARGETS[target](predict(observation), choice)

        def mix(keep: jax.Array) -> tuple[Observation, Choice]:
            return players.mix(observation, background, keep), Choice(action, other_action)

        return shapley.coalition_values(value, mix, count, played.running.size)

    values = jnp.mean(jax.lax.map(with_background, 1 + jnp.arange(backgrounds)), axis=0)
    values = values.reshape(-1, *played.running.shape) * played.running
    phi = shapley.shapley_values(values)
    return Contributions(
        phi=phi,
        interaction=shapley.interactions(values),
        difference=values[-1] - values[0],
        share=shapley.shares(phi.reshape(count, -1)),
    )


def modality_shares(predict: Predict, played: Played, *, target: str) -> dict[str, jax.Array]:
    """Returns the share of each modality of an observation, float32 [] each.

    One background serves each sample, so that this is one batch of 2^n * T * N observations.

    Args:
      predict: Function of observations that runs the policy.
      played: Steps of at least two episodes.
      target: Name of the target in `targets.TARGETS`.
    """
    players = modalities(played.observation)
    found = contributions(predict, played, players, target=target, backgrounds=1)
    return {name: found.share[i] for i, name in enumerate(players.names)}


def swap_instructions(predict: Predict, played: Played) -> Swap:
    """Returns what the policy does on the images of each episode with another instruction.

    The instruction of episode n comes from episode (n + 1) mod N, at the same time step.

    Args:
      predict: Function of observations that runs the policy.
      played: Steps of at least two episodes.
    """
    shapley.check_backgrounds(played.running.shape[1], 1)
    own = played.observation
    other = shapley.other_episodes(own, 1)

    def act(observation: Observation) -> tuple[jax.Array, jax.Array]:
        distribution = predict(_flat(observation)).distribution
        mode = distribution.mode()
        mode = mode.reshape(*played.running.shape, *mode.shape[1:])
        return mode, distribution.action(mode)

    def distance(a: jax.Array, b: jax.Array) -> jax.Array:
        if jnp.issubdtype(a.dtype, jnp.integer):
            return (a != b).astype(jnp.float32)
        return jnp.linalg.norm(a - b, axis=-1)

    observation = own | {"instruction": other["instruction"]}
    mode, swapped = act(observation)
    actions = act(own)[1]
    tokens = own["instruction"]["tokens"]
    return Swap(
        played=Played(observation, mode, played.running),
        action=actions,
        swapped_action=swapped,
        differs=jnp.any(tokens != other["instruction"]["tokens"], axis=(0, 2)),
        change=distance(actions, swapped),
        spread=distance(actions, shapley.other_episodes(actions, 1)),
    )


class _Setting(NamedTuple):
    """What is explained: a value of features, the inputs, their backgrounds and their units."""

    value: Value
    target: Callable[[PolicyOutput], jax.Array]
    observation: Observation
    inputs: units_lib.Features
    backgrounds: units_lib.Features
    units: units_lib.Units
    ranked: jax.Array


def _setting(
    network: MultimodalPolicy, variables: Any, played: Played, target: str, backgrounds: int
) -> _Setting:
    """Returns the setting of `unit_scores` and `unit_gains`, whose arguments it has."""
    predict = _predict(network, variables)
    observation = _flat(played.observation)
    inputs = units_lib.features(predict, observation)
    units = units_lib.units(inputs, network.patch)
    shapley.check_backgrounds(played.running.shape[1], backgrounds)
    choice = Choice(_flat(played.action), _flat(shapley.other_episodes(played.action, 1)))

    def of_others(shift: jax.Array) -> units_lib.Features:
        other = _flat(shapley.other_episodes(played.observation, shift))
        return units_lib.features(predict, other)

    background = jax.lax.map(of_others, 1 + jnp.arange(backgrounds))

    def of_output(output: PolicyOutput) -> jax.Array:
        return TARGETS[target](output, choice)

    def value(given: units_lib.Features) -> jax.Array:
        return of_output(units_lib.predict_from(predict, observation, given))

    ranked = units.present(_word_mask(observation, inputs))
    return _Setting(value, of_output, observation, inputs, background, units, ranked)


def unit_layout(network: MultimodalPolicy, variables: Any, played: Played) -> units_lib.Units:
    """Returns the units of observations, whose arguments are those of `unit_scores`."""
    shapes = jax.eval_shape(
        lambda variables, observation: units_lib.features(
            _predict(network, variables), observation
        ),
        variables,
        _flat(played.observation),
    )
    return units_lib.units(shapes, network.patch)


def unit_scores(
    network: MultimodalPolicy, variables: Any, played: Played, *, target: str, backgrounds: int
) -> UnitScores:
    """Scores patches, words and readings by all methods that the policy allows.

    The samples are all steps of all episodes, B = T * N, the episodes of a step being consecutive.

    Args:
      network: Policy network.
      variables: Variables of the network, {'params': ...}.
      played: Steps of at least backgrounds + 1 episodes, with normalized proprioception.
      target: Name of the target in `targets.TARGETS`.
      backgrounds: Number of other episodes that give backgrounds.
    """
    s = _setting(network, variables, played, target, backgrounds)
    scores, complete = score_units(s.value, s.inputs, s.backgrounds, s.units)
    difference, error = attribution.completeness(s.value, s.inputs, s.backgrounds, complete)
    if network.fusion == "joint":
        scores |= relevance.token_scores(network, variables, s.observation, s.units, s.target)
    return UnitScores(scores, s.ranked, difference, error)


def unit_gains(
    network: MultimodalPolicy,
    variables: Any,
    played: Played,
    scores: dict[str, jax.Array],
    rng: jax.Array,
    *,
    target: str,
    backgrounds: int,
) -> dict[str, dict[str, jax.Array]]:
    """Returns the gain of each method over random rankings of the same units, see `gains`.

    Args:
      network: Policy network.
      variables: Variables of the network, {'params': ...}.
      played: Steps of episodes, as for `unit_scores`.
      scores: Scores by method, float32 [B, U] each.
      rng: PRNG key of the random rankings.
      target: Name of the target in `targets.TARGETS`.
      backgrounds: Number of other episodes that give backgrounds.
    """
    s = _setting(network, variables, played, target, backgrounds)
    return gains(s.value, s.inputs, s.backgrounds, s.units, scores, s.ranked, rng)


def score_units(
    value: Value,
    inputs: units_lib.Features,
    backgrounds: units_lib.Features,
    units: units_lib.Units,
) -> tuple[dict[str, jax.Array], units_lib.Features]:
    """Returns the scores [B, U] by each method of `attribution`, and the integrated gradients.

    Args:
      value: Function that is explained.
      inputs: Features [B, ...].
      backgrounds: Features of K backgrounds, [K, B, ...].
      units: Units of the features.
    """
    complete = attribution.integrated_gradients(value, inputs, backgrounds, steps=PATH_STEPS)
    local = attribution.gradient_times_input(value, inputs, backgrounds)
    scores = {
        "occlusion": attribution.occlusion(value, inputs, backgrounds, units),
        "integrated_gradients": units.aggregate(complete),
        "gradient_times_input": units.aggregate(local),
    }
    return scores, complete


def gains(
    value: Value,
    inputs: units_lib.Features,
    backgrounds: units_lib.Features,
    units: units_lib.Units,
    scores: dict[str, jax.Array],
    ranked: jax.Array,
    rng: jax.Array,
) -> dict[str, dict[str, jax.Array]]:
    """Returns the gain of each method over random rankings of the same units.

    Args:
      value: Function that is explained.
      inputs: Features [B, ...].
      backgrounds: Features of K backgrounds, [K, B, ...].
      units: Units of the features.
      scores: Scores by method, float32 [B, U] each.
      ranked: Units that are not padding, bool [B, U].
      rng: PRNG key of the random rankings.

    Returns:
      Gains in units of the value, float32 [B] each, by the method and by the units that are ranked:
      'all', 'pixels' or 'words'. See `faithfulness.Curves.gain`.
    """

    def of_kept(keep: jax.Array) -> jax.Array:
        mixed = jax.lax.map(lambda b: value(units.mix(inputs, b, keep)), backgrounds)
        return jnp.mean(mixed, axis=0)

    modality = jnp.asarray(units.modality)
    masks = {"all": ranked, "pixels": ranked & (modality == 0), "words": ranked & (modality == 1)}
    shape = (RANDOM_ORDERS, *ranked.shape)
    # Loops over rankings and parts keep one copy of the network in the compiled program.
    orders = jnp.concatenate([jnp.stack([*scores.values()]), jax.random.uniform(rng, shape)])

    def of_part(mask: jax.Array) -> jax.Array:
        def of_order(order: jax.Array) -> jax.Array:
            return faithfulness.curves(of_kept, order, mask, steps=CURVE_STEPS).gain()

        return jax.lax.map(of_order, orders)

    found = jax.lax.map(of_part, jnp.stack([*masks.values()]))  # [parts, orders, B]
    gain = found[:, : len(scores)] - jnp.mean(found[:, len(scores) :], axis=1, keepdims=True)
    return {
        name: {part: gain[i, j] for i, part in enumerate(masks)} for j, name in enumerate(scores)
    }


def _predict(network: MultimodalPolicy, variables: Any) -> Predict:
    return lambda observation: cast(PolicyOutput, network.apply(variables, observation))


def _word_mask(observation: Observation, inputs: units_lib.Features) -> jax.Array:
    """Returns the mask of the words [B, L]; a pretrained text encoder may have another length."""
    mask = observation["instruction"]["mask"]
    if mask.shape[1] == inputs.words.shape[1]:
        return mask
    return jnp.ones(inputs.words.shape[:2], bool)


def _flat(tree: Any) -> Any:
    """Reshapes [T, N, ...] to [T * N, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
