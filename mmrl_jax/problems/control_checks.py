"""Checks of the options of a stage against the network of a control policy."""

import ml_collections

from mmrl_jax.config.options import build
from mmrl_jax.learners import loss_gradients, ppo, registry, value_scaling
from mmrl_jax.problems import control_models
from mmrl_jax.types import Params


def check_effects(config: ml_collections.ConfigDict, name: str, variables: Params) -> None:
    """Checks that the options of a stage of PPO have an effect on the network.

    Args:
      config: Config of the run.
      name: Name of the stage; one of another algorithm is not checked.
      variables: Shapes of the variables of the network.

    Raises:
      ValueError: If there are no two parts of the loss between whose gradients conflicts could be
        resolved, or PopArt finds no last layer of the value, or one that is frozen.
    """
    options = build(registry.CONTROL[name].options, config[name])
    if not isinstance(options, ppo.PPO):
        return
    loss_gradients.check(options, _sharing(config.model, options), name)
    if not options.popart:
        return
    try:
        layer = value_scaling.last_layer(variables)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error
    trainable = config[name].trainable
    frozen = [path for path in layer if not control_models.matches(path, trainable)]
    if frozen:
        raise ValueError(
            f"{name}.popart=True rescales the last layer of the value while it is learned, but "
            f"{name}.trainable={trainable!r} does not match {', '.join(frozen)}: train the layer, "
            "or set popart to False."
        )


def _sharing(model: ml_collections.ConfigDict, options: ppo.PPO) -> list[str]:
    """Returns the parts of the loss whose gradients can be on the same parameters of a model."""
    absent = set()
    if not model.get("auxiliary"):
        absent.add("auxiliary")
    if model.get("pointing") is None:
        absent.add("pointing")
    if model.kind == "mlp":  # Its critic is a network of its own.
        absent.add("value")
    return [part for part in options.loss_parts if part not in absent]
