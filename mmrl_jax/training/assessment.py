"""Success of a learner per split, and with modalities hidden, with confidence intervals."""

import functools

import jax
import numpy as np

from mmrl_jax.evaluation import statistics
from mmrl_jax.evaluation.evaluate import Episodes, Modality, hide
from mmrl_jax.learners.learner import LearnerState
from mmrl_jax.training import factory
from mmrl_jax.training.config import ConfigDict


def interval(success: np.ndarray) -> tuple[float, float, float]:
    """Mean success and its 95 % bootstrap interval."""
    return statistics.bootstrap_interval(success, confidence=0.95, resamples=10_000, seed=0)


def assess(
    config: ConfigDict,
    learner: LearnerState,
    split: str,
    *,
    episodes: int,
    hidden: tuple[Modality, ...],
) -> dict[str, Episodes]:
    """Evaluates on `split` as it is ('') and with each of the `hidden` modalities ('no_<name>')."""
    key = factory.evaluation_key(config)
    result = {"": factory.make_evaluator(config, split=split, episodes=episodes)(learner, key)}
    for modality in hidden:
        evaluator = factory.make_evaluator(
            config, split=split, episodes=episodes, wrap=functools.partial(hide, modality=modality)
        )
        result[f"no_{modality}"] = evaluator(learner, key)
    return jax.device_get(result)
