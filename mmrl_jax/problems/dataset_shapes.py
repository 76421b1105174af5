"""Source of a dataset of which only the shapes matter, for devices that are only described.

No record is read and no reward function is called, so that an update is one traced program.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mmrl_jax.learners import registry
from mmrl_jax.learners.token_learner import ScoredCompletions
from mmrl_jax.problems import problem, token_problem
from mmrl_jax.problems.sources import Collected, Constants, Source, update_keys
from mmrl_jax.rollouts.generate import Sampling
from mmrl_jax.tasks.prompts import Prompt
from mmrl_jax.training.stage import Carry

if TYPE_CHECKING:
    from mmrl_jax.problems.token_problem import TokenProblem


def prompts(length: int, size: tuple[int, int], count: int) -> Prompt:
    """Returns the shapes of prompts.

    Args:
      length: Number of tokens of a prompt, including padding.
      size: Height and width of the images in pixels.
      count: Number of prompts.
    """

    def shape(*sizes: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((count, *sizes), dtype)

    images = shape(*size, 3, dtype=jnp.uint8)
    return Prompt(shape(length), shape(length, dtype=jnp.bool_), images, *[shape()] * 4)


def source(of: "TokenProblem", name: str) -> Source:
    """Returns the source of a stage, whose data are shapes and whose rewards are 0.

    Args:
      of: Problem of a dataset.
      name: Name of a stage.
    """
    g, model = of.config[name], of.model
    length = model.texts.prompt_tokens.shape[1]
    if registry.TOKEN[name].experience == "labels":
        answers = (g.batch_size, model.policy.max_new_tokens)
        labels = jax.eval_shape(
            ScoredCompletions.from_labels,
            prompts(length, model.size, g.batch_size),
            jax.ShapeDtypeStruct(answers, jnp.int32),
            jax.ShapeDtypeStruct(answers, jnp.bool_),
        )

        def read(carry: Carry, constants: Constants) -> Collected:
            return Collected(None, constants.data, carry.rng, {})

        return Source(
            stream=problem.FIXED_SET, samples_per_update=g.batch_size, data=labels, collect=read
        )
    sampling = Sampling(temperature=getattr(of.options(name), "temperature", 1.0))

    def collect(carry: Carry, constants: Constants) -> Collected:
        sample_key, learn_key = update_keys(carry, 2)
        completions = model.policy.generate(
            carry.learner.params,
            constants.frozen,
            constants.data,
            sample_key,
            num_completions=g.num_completions,
            sampling=sampling,
        )
        reward = jnp.zeros((g.prompts_per_update, g.num_completions), jnp.float32)
        batch: Any = ScoredCompletions.single_turn(
            constants.data, completions, reward, jnp.ones_like(reward)
        )
        batch = token_problem.shape_rewards(batch, g.overlong_buffer)
        return Collected(None, batch, learn_key, {})

    return Source(
        stream=problem.COMPLETIONS,
        samples_per_update=g.prompts_per_update * g.num_completions,
        data=prompts(length, model.size, g.prompts_per_update),
        collect=collect,
    )
