"""Assessment of a learner: per split, as it is and with modalities hidden."""

from collections.abc import Callable

import jax

from mmrl_jax.evaluation.evaluate import Episodes, Modality
from mmrl_jax.learners.learner import LearnerState
from mmrl_jax.training import factory
from mmrl_jax.training.config import ConfigDict


def assessor(
    config: ConfigDict, split: str, *, episodes: int, hidden: tuple[Modality, ...]
) -> Callable[[LearnerState], dict[str, Episodes]]:
    """A function that evaluates a learner on `split`, always on the same episodes.

    It returns the episodes of the learner as it is ('') and with each of the `hidden` modalities
    hidden ('no_<name>'). All of that, for every learner it is called with, is one program.
    """
    key = factory.evaluation_key(config)
    evaluator = factory.make_evaluator(config, split=split, episodes=episodes, hideable=hidden)
    names = ("", *(f"no_{modality}" for modality in hidden))

    def assess(learner: LearnerState) -> dict[str, Episodes]:
        return {name: jax.device_get(evaluator(learner, key, i)) for i, name in enumerate(names)}

    return assess
