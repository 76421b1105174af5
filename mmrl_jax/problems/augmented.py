"""Augmentation of the images that a control policy learns from."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import ml_collections

from mmrl_jax.config.options import build, group
from mmrl_jax.data import augmentation
from mmrl_jax.data.augmentation import AugmentationOptions
from mmrl_jax.envs.brax_api import Env
from mmrl_jax.learners import registry
from mmrl_jax.learners.bc import Batch, Demonstrations
from mmrl_jax.learners.dapg import DemonstratedRollout
from mmrl_jax.learners.learner import Rollout, flatten, unflatten
from mmrl_jax.learners.rnd import RND
from mmrl_jax.types import Observation

# Words of instructions whose meaning a change of the hue changes.
_COLORS = frozenset(
    "red green blue yellow purple orange cyan magenta pink brown violet turquoise gold".split()
)

# Function of a batch and of the PRNG key of the update that returns the batch with other images.
Augment = Callable[[Any, jax.Array], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentedOptions:
    """Options of the images that a stage learns from."""

    augmentation: AugmentationOptions = group(AugmentationOptions)


def make(config: ml_collections.ConfigDict, name: str, env: Env) -> Augment | None:
    """Returns the augmentation of a stage, or None if all of its changes are switched off.

    The networks of a probability ratio see the same images, because the old log-probs are computed
    anew on them. In a batch of demonstrations, so do those of a value and of its target.

    Args:
      config: Config of the run.
      name: Name of the stage.
      env: Batched environment.

    Raises:
      ValueError: If there are no images, a change is larger than they are, it would change what an
        instruction means, or the algorithm does not allow it.
    """
    options = build(AugmentationOptions, config[name].augmentation)
    if not options.changes:
        return None
    height, width, algorithm = config.env.height, config.env.width, registry.CONTROL[name]
    _check(options, f"{name}.augmentation", height, width, env)
    if issubclass(algorithm.options, RND):
        raise ValueError(
            f"{name}.augmentation is set, but {name!r} would take every change of an image for "
            "something new; remove it."
        )
    samples = algorithm.experience in ("demonstrations", "one_step")
    if not samples and not hasattr(algorithm.options, "recompute"):
        raise ValueError(
            f"{name}.augmentation is set, but the options of {name!r} have no field 'recompute', "
            "so that its old log-probs would be those of other images; remove it."
        )
    position = config.model.get("pointing")

    def changed(
        observation: Observation, privileged: dict[str, jax.Array], draw: augmentation.Draw
    ) -> tuple[Observation, dict[str, jax.Array]]:
        pixels = augmentation.apply(observation["pixels"], draw, options)
        if position in privileged:
            moved = augmentation.shifted_position(privileged[position], draw, height, width)
            privileged = privileged | {position: moved}
        return observation | {"pixels": pixels}, privileged

    def of_rollout(rollout: Rollout, rng: jax.Array) -> Rollout:
        steps = rollout.transitions
        # The steps of an environment stay on its device.
        observation, privileged = flatten((steps.observation, steps.privileged))
        draw = augmentation.draw(rng, steps.reward.size, options)
        observation, privileged = unflatten(
            changed(observation, privileged, draw), len(steps.reward)
        )
        return rollout._replace(
            transitions=steps.replace(observation=observation, privileged=privileged)
        )

    def of_samples(samples: Demonstrations, draw: augmentation.Draw) -> Demonstrations:
        observation, privileged = changed(samples.observation, samples.privileged, draw)
        return dataclasses.replace(samples, observation=observation, privileged=privileged)

    def augment(batch: Any, rng: jax.Array) -> Any:
        if isinstance(batch, Rollout):
            return of_rollout(batch, rng)
        if isinstance(batch, DemonstratedRollout):
            rng, key = jax.random.split(rng)
            draw = augmentation.draw(key, len(batch.demonstrations.action), options)
            return batch._replace(
                rollout=of_rollout(batch.rollout, rng),
                demonstrations=of_samples(batch.demonstrations, draw),
            )
        draw = augmentation.draw(rng, len(batch.samples.action), options)
        following, _ = changed(batch.next_observation, {}, draw)
        return Batch(of_samples(batch.samples, draw), following)

    return augment


def _check(options: AugmentationOptions, key: str, height: int, width: int, env: Env) -> None:
    """Raises ValueError for options that do not fit images of a size, see `make`."""
    if not height:
        raise ValueError(
            f"{key} is set, but env.height=0 gives no images; remove it, or set env.height and "
            "env.width."
        )
    for field in ("shift", "cutout"):
        size = getattr(options, field)
        if size >= min(height, width):
            raise ValueError(
                f"{key}.{field}={size} must be smaller than the images, which have {height} x "
                f"{width} pixels."
            )
    named = sorted(_COLORS & set(getattr(getattr(env, "vocabulary", None), "words", ())))
    if options.hue and named:
        raise ValueError(
            f"{key}.hue={options.hue} changes the colors that instructions name "
            f"({', '.join(named)}); set it to 0."
        )
