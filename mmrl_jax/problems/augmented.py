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
from mmrl_jax.learners.bc import Batch, Demonstrations
from mmrl_jax.learners.dapg import DemonstratedRollout
from mmrl_jax.learners.learner import Rollout
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

    All networks of an update see the same images: those of the probability ratio, whose old
    log-probs are computed anew on them, and those of a value and of its target.

    Args:
      config: Config of the run.
      name: Name of the stage.
      env: Batched environment.

    Raises:
      ValueError: If there are no images, a change is larger than they are, or it would change what
        an instruction means.
    """
    options = build(AugmentationOptions, config[name].augmentation)
    if not options.changes:
        return None
    height, width = config.env.height, config.env.width
    _check(options, f"{name}.augmentation", height, width, env)
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
        time, count = steps.reward.shape
        observation, privileged = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), (steps.observation, steps.privileged)
        )
        draw = augmentation.draw(rng, time * count, options)
        observation, privileged = jax.tree.map(
            lambda x: x.reshape(time, count, *x.shape[1:]), changed(observation, privileged, draw)
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
