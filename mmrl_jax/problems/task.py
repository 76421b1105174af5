"""Verifiable questions: prompts that are drawn on the device, with rewards that are computed there.

prompts -> completions -> rewards -> learning, all of it one compiled program
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from mmrl_jax.config.loading import import_object
from mmrl_jax.config.options import (
    NON_NEGATIVE,
    POSITIVE,
    TEXTS,
    Group,
    between,
    option,
    options_of,
)
from mmrl_jax.config.schema import is_group
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.evaluation.questions import (
    QuestionEvaluator,
    Sample,
    describe,
    describe_levels,
)
from mmrl_jax.learners import grpo, registry
from mmrl_jax.learners.token_learner import ScoredCompletions, TokenState
from mmrl_jax.models import lora
from mmrl_jax.problems import problem, token_models, token_problem
from mmrl_jax.problems.problem import stream
from mmrl_jax.problems.sources import Collected, Constants, Source, update_keys
from mmrl_jax.problems.token_problem import CompletionOptions, LabelOptions, TokenProblem
from mmrl_jax.rollouts.generate import Sampling
from mmrl_jax.tasks import shapes
from mmrl_jax.tasks.question import Prompt, Task
from mmrl_jax.training.stage import Carry
from mmrl_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserTaskOptions:
    """The group `task` of a task of the user's."""

    name: str = option(
        "shapes", "Task: 'shapes', or 'module:Class' of one of yours, see docs/extending.md."
    )
    height: int = option(32, "Height of the images in pixels.", POSITIVE)
    width: int = option(32, "Width of the images in pixels.", POSITIVE)
    options: dict = option({}, "Further arguments of the task.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """The group `task`: questions about rendered shapes on a grid."""

    name: str = option("shapes", "Task: 'shapes', or 'module:Class' of one of yours.")
    kinds: tuple[str, ...] = option(
        ("count",), "Kinds of questions, see mmrl_jax.tasks.shapes.KINDS.", TEXTS
    )
    rows: int = option(4, "Rows of the grid of positions, which has as many columns.", POSITIVE)
    height: int = option(32, "Height of the images in pixels.", POSITIVE)
    width: int = option(32, "Width of the images in pixels.", POSITIVE)
    counts: tuple[int, ...] = option((0, 6), "The least and the most that is counted.")
    distractors: int = option(
        4, "The most objects in an image that its question is not about.", NON_NEGATIVE
    )
    levels: tuple[str, ...] = option(
        ("medium",),
        "Levels of difficulty, drawn evenly for each question, see mmrl_jax.tasks.shapes.LEVELS.",
        TEXTS,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledOptions(LabelOptions):
    """The labelled questions of supervised fine-tuning, of any task."""

    examples: int = option(32768, "Labelled questions, a fixed set.", POSITIVE)
    label_noise: float = option(
        0.0, "Fraction of the labels that are those of another question of the kind.", between(0, 1)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledShapesOptions(LabelledOptions):
    """The labelled questions about shapes."""

    counts: tuple[int, ...] = option(
        (0, 6), "The least and the most that is counted in the labelled questions."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledTaskOptions(CompletionOptions):
    """The questions of reinforcement learning."""

    oversample: int = option(
        1,
        "Prompts that are completed for each that is learned from; those whose completions differ "
        "in reward are learned from first (dynamic sampling of DAPO).",
        POSITIVE,
    )
    shuffle_images: bool = option(
        False, "Give every prompt another prompt's image: what can be learned without looking."
    )
    format_penalty: float = option(
        0.5, "Reward that a completion loses that is none of the task's answers.", NON_NEGATIVE
    )


def options(config: Any) -> Group:
    """Returns the keys that a config of this problem has, by its stages and its kind of model."""
    labels = LabelledOptions if _of_user(config) else LabelledShapesOptions
    kinds = {"labels": (labels,), "completions": (SampledTaskOptions,)}
    return problem.options_of_problem(
        task=options_of(UserTaskOptions if _of_user(config) else TaskOptions),
        model=token_models.options(config),
        **token_problem.stage_options(config, kinds),
    )


def _of_user(config: Any) -> bool:
    """Whether the task of a config is named 'module:Class'."""
    task = config.get("task", {})
    return is_group(task) and ":" in str(task.get("name", ""))


def _check_counts(name: str, pair: tuple[int, ...]) -> None:
    if len(pair) != 2 or not all(isinstance(x, int) for x in pair):
        raise ValueError(f"{name}={tuple(pair)} must be two whole numbers, (least, most).")


def _make(
    config: ml_collections.ConfigDict,
) -> tuple[Task, token_models.TokenModel]:
    """The task (of shapes one that asks over all counts) and the model of a config."""
    t, size = config.task, (config.task.height, config.task.width)
    spec = token_models.read_spec(config.model, size)
    arguments: dict[str, Any] = {
        "height": t.height,
        "width": t.width,
        "image_tokens": token_models.image_tokens(config.model, spec, size),
        "tokenizer": spec and spec.chat,
    }
    if _of_user(config):
        made = import_object(t.name, "task.name")(**arguments, **t.options.to_dict())
    elif t.name == "shapes":
        made = shapes.make(
            kinds=tuple(t.kinds),
            rows=t.rows,
            counts=tuple(t.counts),
            seen=tuple(t.counts),
            distractors=t.distractors,
            levels=tuple(t.levels),
            **arguments,
        )
    else:
        raise ValueError(f"task.name={t.name!r} is unknown: choose 'shapes', or 'module:Class'.")
    return made, token_models.make_model(config.model, spec, made.texts, size)


def _restricted(config: ml_collections.ConfigDict, name: str, task: Task) -> Task:
    """The task that the labelled questions of a stage are drawn from.

    Raises:
      ValueError: The stage's counts are no part of task.counts, or too few.
    """
    if not isinstance(task, shapes.Shapes):
        return task
    counts = tuple(config[name].counts)
    try:
        return task.with_train_counts(counts)
    except ValueError as error:
        raise ValueError(f"{name}.counts={counts} cannot be: {error}") from error


def _splits(config: ml_collections.ConfigDict, task: Task) -> tuple[str, ...]:
    """The splits of a task, the one that is trained on first."""
    if not isinstance(task, shapes.Shapes):
        return tuple(getattr(task, "splits", ("train",)))
    absent = {"heldout_count"}  # RL sees all counts.
    if not set(config.task.kinds) & set(shapes.NAMING):
        absent.add("heldout_pair")
    return tuple(split for split in shapes.SPLITS if split not in absent)


class TaskProblem(TokenProblem):
    """The problem of verifiable questions, see `problem.Problem`.

    Attributes:
      task: Draws the prompts and scores the completions.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        labelled = [name for name in config.stages if registry.TOKEN[name].experience == "labels"]
        if not _of_user(config):
            _check_counts("task.counts", config.task.counts)
            for name in labelled:
                _check_counts(f"{name}.counts", config[name].counts)
        token_models.check_model(config, config.task.height, config.task.width, "task")
        self.task, model = _make(config)
        super().__init__(config, model, "eval/train/accuracy")
        self.check_sizes(
            *(
                token_problem.check_groups(config, name, model.policy.length)
                for name in config.stages
                if name not in labelled
            )
        )
        for name in labelled:
            few = _restricted(config, name, self.task)
            # Images that do not divide into cells are refused when they are drawn.
            jax.eval_shape(lambda key, few=few: few.sample(key, 1, "train"), jax.random.key(0))
        self.splits = dict.fromkeys(_splits(config, self.task), config.run.eval_episodes)

    def source(self, name: str) -> Source:
        """See `TokenProblem`."""
        if registry.TOKEN[name].experience == "labels":
            labels = self._labels(name)
            return token_problem.fixed_labels(self.config[name].batch_size, labels)
        return self._completions(name)

    def _labels(self, name: str) -> ScoredCompletions:
        """The labelled questions of a stage, a fixed set."""
        s, few = self.config[name], _restricted(self.config, name, self.task)

        @jax.jit
        def label(rng: jax.Array) -> ScoredCompletions:
            prompts = few.sample(rng, s.examples, "train")
            other_key, noise_key = jax.random.split(jax.random.fold_in(rng, 1))
            other = self.task.sample(other_key, s.examples, "train")
            wrong = jax.random.bernoulli(noise_key, s.label_noise, (s.examples,)) & (
                other.kind == prompts.kind
            )
            labels = few.texts.labels(jnp.where(wrong, other.answer, prompts.answer))
            return ScoredCompletions.labelled(prompts, *labels)

        return label(stream(self.config, problem.DATA))

    def _completions(self, name: str) -> Source:
        r, texts, policy = self.config[name], self.task.texts, self.model.policy
        temperature = getattr(self.options(name), "temperature", 1.0)

        def collect(carry: Carry, constants: Constants) -> Collected:
            prompt_key, sample_key, learn_key = update_keys(carry, 3)
            prompts = self.task.sample(prompt_key, r.prompts_per_update * r.oversample, "train")
            if r.shuffle_images:
                prompts = prompts._replace(images=jnp.roll(prompts.images, 1, axis=0))
            # Each device completes its part.
            prompts = mesh_lib.constrain_batch(prompts, mesh=self.mesh)
            completions = policy.answer(
                carry.learner.params,
                constants.frozen,
                prompts,
                sample_key,
                group=r.num_completions,
                sampling=Sampling(temperature=temperature),
            )
            score = texts.score(
                prompts, completions.tokens, completions.present, penalty=r.format_penalty
            )
            scored = token_problem.shape_rewards(
                ScoredCompletions.single_turn(
                    prompts, completions, score.reward, jnp.ones_like(score.reward)
                ),
                r.overlong_buffer,
            )
            batch = grpo.dynamic_sampling(scored, r.prompts_per_update)
            metrics = grpo.describe(scored) | {
                "completion/correct": jnp.mean(score.correct),
                "completion/invalid_fraction": jnp.mean(score.malformed),
            }
            return Collected(None, batch, learn_key, metrics)

        return Source(
            stream=problem.COMPLETIONS,
            samples_per_update=r.prompts_per_update * r.oversample * r.num_completions,
            collect=collect,
            console=("completion/correct", "completion/invalid_fraction"),
        )

    def evaluator(self, rng: jax.Array, *, prompts: int) -> QuestionEvaluator:
        """Returns an evaluator of the greedy completions of variables of the whole model."""

        def complete(
            variables: Params, prompt: Prompt, rng: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            completions = self.model.policy.answer(
                *lora.split(variables, ".*"),
                prompt,
                rng,
                group=1,
                sampling=Sampling(temperature=0.0),
            )
            return completions.tokens, completions.present

        return QuestionEvaluator(
            self.task,
            complete,
            rng,
            questions=prompts,
            mesh=self.mesh,
            max_batch=self.eval_batch_size(),
        )

    def measure(
        self, *, episodes: int | None = None, ablations: bool = False
    ) -> Callable[[Params, str], dict[str, float]]:
        """See `problem.Problem`.

        The metrics are those of `questions.describe`, the same with shuffled images as
        'shuffled_image/accuracy', and with several levels those of `questions.describe_levels`.
        """
        count = episodes or self.config.run.eval_episodes
        return self._measure(self.evaluator(stream(self.config, problem.EVALUATION), prompts=count))

    def _measure(self, evaluator: QuestionEvaluator) -> Callable[[Params, str], dict[str, float]]:
        levels = tuple(self.config.task.get("levels", ()))

        def measure(variables: Params, split: str) -> dict[str, float]:
            shuffled = describe(evaluator(variables, split, shuffle_images=True).score)
            answered = evaluator(variables, split)
            described = describe(answered.score)
            described |= {"shuffled_image/accuracy": shuffled["accuracy"]}
            return described | (describe_levels(answered, levels) if len(levels) > 1 else {})

        return measure

    def periodic_evaluation(self, frozen: Any) -> Callable[[TokenState], dict[str, float]]:
        """See `TokenProblem`."""
        # Other prompts than those that are reported: the best checkpoint is chosen by these.
        rng = jax.random.fold_in(stream(self.config, problem.EVALUATION), 1)
        evaluator = self.evaluator(rng, prompts=self.config.run.eval_episodes)
        return self.periodic(self._measure(evaluator), frozen, "train")

    def samples(self, variables: Params, count: int) -> tuple[list[Sample], dict[str, float]]:
        """See `problem.Problem`: questions of the training split."""
        evaluator = self.evaluator(stream(self.config, problem.EVALUATION), prompts=count)
        return evaluator.samples(variables, "train", count), {}
