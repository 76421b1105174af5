"""Problem of a task whose prompts are sampled, and whose rewards are computed, on the device.

Prompts, completions, rewards and learning are one compiled program.
"""

from collections.abc import Callable
import dataclasses
import functools
import inspect
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
from mmrl_jax.evaluation.prompts import (
    PromptEvaluator,
    Sample,
    describe,
    describe_levels,
)
from mmrl_jax.learners import grpo, registry
from mmrl_jax.learners.token_learner import ScoredCompletions, TokenState
from mmrl_jax.models import lora
from mmrl_jax.problems import problem, token_models, token_options, token_problem
from mmrl_jax.problems.problem import stream
from mmrl_jax.problems.sources import Collected, Constants, Source, update_keys
from mmrl_jax.problems.token_problem import CompletionOptions, LabelOptions, TokenProblem
from mmrl_jax.rollouts.generate import Sampling
from mmrl_jax.tasks import digits, shapes
from mmrl_jax.tasks.prompts import Prompt, Task
from mmrl_jax.training.stage import Carry
from mmrl_jax.types import Params

# Tasks by their names, which take the arguments of a user's task, see docs/extending.md. The task
# 'shapes' has options of its own.
TASKS: dict[str, Callable[..., Task]] = {"digits": digits.Digits}
NAMES = ", ".join(map(repr, ("shapes", *TASKS)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserTaskOptions:
    """Options of the group `task` for a task in TASKS, or of a user."""

    name: str = option(
        "shapes", f"Task: {NAMES}, or 'module:Class' for your own, see docs/extending.md."
    )
    height: int = option(32, "Height of the images in pixels.", POSITIVE)
    width: int = option(32, "Width of the images in pixels.", POSITIVE)
    options: dict = option({}, "Further arguments of the task.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options of the group `task` for questions about rendered shapes on a grid."""

    name: str = option("shapes", f"Task: {NAMES}, or 'module:Class' for your own.")
    kinds: tuple[str, ...] = option(
        ("count",), "Kinds of questions, see mmrl_jax.tasks.shapes.KINDS.", TEXTS
    )
    rows: int = option(4, "Number of rows, and of columns, of the grid of cells.", POSITIVE)
    height: int = option(32, "Height of the images in pixels.", POSITIVE)
    width: int = option(32, "Width of the images in pixels.", POSITIVE)
    counts: tuple[int, ...] = option((0, 6), "Minimum and maximum count, both inclusive.")
    distractors: int = option(
        4, "Maximum number of objects in an image that its question is not about.", NON_NEGATIVE
    )
    levels: tuple[str, ...] = option(
        ("medium",),
        "Difficulty levels, sampled uniformly for each prompt, see mmrl_jax.tasks.shapes.LEVELS.",
        TEXTS,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabeledOptions(LabelOptions):
    """Options of the labeled prompts of a supervised stage, for any task."""

    examples: int = option(32768, "Number of labeled prompts, a fixed set.", POSITIVE)
    split: str = option(
        "train",
        "Split of the task from which the prompts are sampled, one that the task trains on.",
    )
    label_noise: float = option(
        0.0,
        "Fraction of the labels that are replaced by that of another prompt of the same kind.",
        between(0, 1),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabeledShapesOptions(LabeledOptions):
    """Options of the labeled prompts about shapes."""

    counts: tuple[int, ...] = option(
        (0, 6), "Minimum and maximum count in the labeled prompts, both inclusive."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledTaskOptions(CompletionOptions):
    """Options of the prompts of a reinforcement learning stage."""

    oversample: int = option(
        1,
        "Number of prompts that are completed for each prompt in the batch; prompts whose "
        "completions differ in reward are preferred (dynamic sampling of DAPO).",
        POSITIVE,
    )
    shuffle_images: bool = option(
        False,
        "Give every prompt the image of another prompt, as an ablation of learning from images.",
    )
    format_penalty: float = option(
        0.5,
        "Penalty on the reward of a completion that is not a valid answer of the task.",
        NON_NEGATIVE,
    )


def options(config: Any) -> Group:
    """Returns the keys of a config of this problem, by its stages and its kind of model."""
    labels = LabeledOptions if _takes_options(config) else LabeledShapesOptions
    kinds = {"labels": (labels,), "completions": (SampledTaskOptions,)}
    return problem.options_of_problem(
        task=options_of(UserTaskOptions if _takes_options(config) else TaskOptions),
        model=token_options.options(config),
        **token_problem.stage_options(config, kinds),
    )


def _takes_options(config: Any) -> bool:
    """Returns whether the task of a config takes task.options: one in TASKS, or a user's task."""
    task = config.get("task", {})
    name = str(task.get("name", "")) if is_group(task) else ""
    return name in TASKS or ":" in name


def _check_counts(name: str, pair: tuple[int, ...]) -> None:
    if len(pair) != 2 or not all(isinstance(x, int) for x in pair):
        raise ValueError(f"{name}={tuple(pair)} must be two integers, (minimum, maximum).")


def _make(
    config: ml_collections.ConfigDict,
) -> tuple[Task, token_models.TokenModel]:
    """Makes the task, in which the training split has all counts, and the model of a config."""
    t, size = config.task, (config.task.height, config.task.width)
    spec = token_models.read_spec(config.model, size)
    arguments: dict[str, Any] = {
        "height": t.height,
        "width": t.width,
        "image_tokens": token_models.image_tokens(config.model, spec, size),
        "tokenizer": spec and spec.chat,
    }
    if _takes_options(config):
        make = TASKS[t.name] if t.name in TASKS else import_object(t.name, "task.name")
        task = _make_with_options(make, t, arguments)
    elif t.name == "shapes":
        task = shapes.make(
            kinds=tuple(t.kinds),
            rows=t.rows,
            counts=tuple(t.counts),
            seen=tuple(t.counts),
            distractors=t.distractors,
            levels=tuple(t.levels),
            **arguments,
        )
    else:
        raise ValueError(f"task.name={t.name!r} is unknown: choose {NAMES}, or 'module:Class'.")
    return task, token_models.make_model(config.model, spec, task.texts, size)


def _make_with_options(
    make: Callable[..., Task], t: ml_collections.ConfigDict, arguments: dict[str, Any]
) -> Task:
    """Makes a task with the arguments of every task and those in task.options.

    Raises:
      ValueError: If an option is unknown, is missing, or is an argument of every task.
    """
    further = t.options.to_dict()
    signature = inspect.signature(make)
    try:
        signature.bind(**arguments, **further)
    except TypeError as error:
        known = ", ".join(repr(x) for x in signature.parameters if x not in arguments) or "none"
        raise ValueError(
            f"task.options={further} does not fit task.name={t.name!r} ({error}): the options of "
            f"this task are {known}, and task.height and task.width are set beside task.options."
        ) from error
    return make(**arguments, **further)


def _answers_of_others(rng: jax.Array, prompts: Prompt) -> jax.Array:
    """Returns for each prompt the answer of another, random prompt of its kind, int32 [B]."""
    index = jnp.arange(len(prompts.kind))
    order = jnp.lexsort((jax.random.uniform(rng, index.shape), prompts.kind))
    kind = prompts.kind[order]
    # In this order, each prompt takes the next of its kind, and the last one the first.
    first = jnp.searchsorted(kind, kind)
    next_index = jnp.where(kind == jnp.roll(kind, -1), jnp.roll(index, -1), first)
    next_index = next_index.at[-1].set(first[-1])
    return jnp.zeros_like(prompts.answer).at[order].set(prompts.answer[order][next_index])


def _label_task(config: ml_collections.ConfigDict, name: str, task: Task) -> Task:
    """Returns the task from which the labeled prompts of a stage are sampled.

    Raises:
      ValueError: If the counts of the stage are invalid, or not within task.counts.
    """
    if not isinstance(task, shapes.Shapes):
        return task
    counts = tuple(config[name].counts)
    try:
        return task.with_train_counts(counts)
    except ValueError as error:
        raise ValueError(f"{name}.counts={counts} is invalid: {error}") from error


def _splits(config: ml_collections.ConfigDict, task: Task) -> tuple[str, ...]:
    """Returns the splits of a task, of which the first is the training split."""
    if not isinstance(task, shapes.Shapes):
        return tuple(getattr(task, "splits", ("train",)))
    absent = {"heldout_count"}  # Reinforcement learning uses all counts.
    if not set(config.task.kinds) & set(shapes.PAIR_KINDS):
        absent.add("heldout_pair")
    return tuple(split for split in shapes.SPLITS if split not in absent)


def _check_split(name: str, split: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError if a stage cannot learn from a split of its task."""
    if split not in choices:
        raise ValueError(
            f"{name}.split={split!r} must be one of the training splits of the task, of which it "
            f"has {', '.join(map(repr, choices))}; a class names them in `training_splits`."
        )


class TaskProblem(TokenProblem):
    """Problem of a task with verifiable answers, see `problem.Problem` for the interface.

    Args:
      config: Config of the run, with the keys of `options`.

    Attributes:
      task: Task that samples prompts and scores completions.
      labeled: Names of the stages that learn from labeled prompts, in order.

    Raises:
      ValueError: If the config is invalid; the message gives the field, its value and the remedy.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        self.labeled = [x for x in config.stages if registry.TOKEN[x].experience == "labels"]
        if not _takes_options(config):
            _check_counts("task.counts", config.task.counts)
            for name in self.labeled:
                _check_counts(f"{name}.counts", config[name].counts)
        token_options.check_model(config, config.task.height, config.task.width, "task")
        self.task, model = _make(config)
        super().__init__(config, model, "eval/train/accuracy")
        self.check_sizes(
            *(
                token_problem.check_groups(config, name, model.policy.max_new_tokens)
                for name in config.stages
                if name not in self.labeled
            )
        )
        splits = _splits(config, self.task)
        training_splits = tuple(getattr(self.task, "training_splits", splits[:1]))
        for name in self.labeled:
            split = self._split(name)
            _check_split(name, split, training_splits)
            task = _label_task(config, name, self.task)
            # Sampling checks that the images divide into cells.
            jax.eval_shape(lambda key, of=task, x=split: of.sample(key, 1, x), jax.random.key(0))
        self.splits = dict.fromkeys(splits, config.run.eval_episodes)

    def source(self, name: str) -> Source:
        """Returns the source of the experience of a stage, see `TokenProblem`."""
        if name in self.labeled:
            labels = self._labels(name)
            return token_problem.fixed_labels(self.config[name].batch_size, labels)
        return self._completion_source(name)

    def _labels(self, name: str) -> ScoredCompletions:
        """Samples the labeled prompts of a stage, which depend on the seed and the stage alone."""
        s, label_task = self.config[name], _label_task(self.config, name, self.task)
        number = self.labeled.index(name)
        key = stream(self.config, problem.DATA)
        if number > 0:  # Or all labeled stages would learn from the same images.
            key = jax.random.fold_in(stream(self.config, problem.LATER_LABELS), number)

        def label(rng: jax.Array) -> ScoredCompletions:
            prompts = label_task.sample(rng, s.examples, self._split(name))
            other_key, noise_key = jax.random.split(jax.random.fold_in(rng, 1))
            wrong = jax.random.bernoulli(noise_key, s.label_noise, (s.examples,))
            other = _answers_of_others(other_key, prompts)
            labels = label_task.texts.labels(jnp.where(wrong, other, prompts.answer))
            return ScoredCompletions.from_labels(prompts, *labels)

        return mesh_lib.computed(label, key)

    def _completion_source(self, name: str) -> Source:
        """Returns a source of sampled completions with the rewards of the task."""
        r, texts, policy = self.config[name], self.task.texts, self.model.policy
        temperature = getattr(self.options(name), "temperature", 1.0)

        def collect(carry: Carry, constants: Constants) -> Collected:
            prompt_key, sample_key, learn_key = update_keys(carry, 3)
            prompts = self.task.sample(prompt_key, r.prompts_per_update * r.oversample, "train")
            if r.shuffle_images:
                prompts = prompts._replace(images=jnp.roll(prompts.images, 1, axis=0))
            # Each device completes its part of the prompts.
            prompts = mesh_lib.constrain_batch(prompts, mesh=self.mesh)
            completions = policy.generate(
                carry.learner.params,
                constants.frozen,
                prompts,
                sample_key,
                num_completions=r.num_completions,
                sampling=Sampling(temperature=temperature),
                compactions=r.compactions,
            )
            with jax.named_scope("rewards"):
                score = texts.score(
                    prompts, completions.tokens, completions.mask, penalty=r.format_penalty
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
                "completion/invalid_fraction": jnp.mean(score.invalid),
            }
            return Collected(None, batch, learn_key, metrics)

        return Source(
            stream=problem.COMPLETIONS,
            samples_per_update=r.prompts_per_update * r.oversample * r.num_completions,
            collect=collect,
            console=("completion/correct", "completion/invalid_fraction"),
        )

    def evaluator(self, rng: jax.Array, *, prompts: int) -> PromptEvaluator:
        """Returns an evaluator of greedy completions, for the variables of the whole model.

        Args:
          rng: PRNG key of the prompts.
          prompts: Number of prompts in each split.
        """

        def complete(
            variables: Params, prompt: Prompt, rng: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            completions = self.model.policy.generate(
                *lora.split(variables, ".*"),
                prompt,
                rng,
                num_completions=1,
                sampling=Sampling(temperature=0.0),
            )
            return completions.tokens, completions.mask

        return PromptEvaluator(
            self.task,
            complete,
            rng,
            num_prompts=prompts,
            mesh=self.mesh,
            max_batch=self.eval_batch_size(),
        )

    def measure(
        self, *, episodes: int | None = None, ablations: bool = False
    ) -> Callable[[Params, str], dict[str, float]]:
        """Returns the reported evaluation, see `problem.Problem`.

        The metrics are those of `prompts.describe`; 'shuffled_image/accuracy', the accuracy with
        shuffled images; and, for a task with several levels, those of `prompts.describe_levels`.
        """
        count = self.config.run.eval_episodes if episodes is None else episodes
        return self._measure(self.evaluator(stream(self.config, problem.EVALUATION), prompts=count))

    def _measure(self, evaluator: PromptEvaluator) -> Callable[[Params, str], dict[str, float]]:
        levels = tuple(self.config.task.get("levels", ()))

        def measure(variables: Params, split: str) -> dict[str, float]:
            shuffled = describe(evaluator(variables, split, shuffle_images=True).score)
            evaluated = evaluator(variables, split)
            metrics = describe(evaluated.score)
            metrics |= {"shuffled_image/accuracy": shuffled["accuracy"]}
            return metrics | (describe_levels(evaluated, levels) if len(levels) > 1 else {})

        return measure

    def best_metric_of(self, name: str) -> str:
        """Returns the accuracy on the split that a stage learns from, see `TokenProblem`."""
        return f"eval/{self._split(name)}/accuracy"

    def _split(self, name: str) -> str:
        """Returns the name of the split from which the prompts of a stage are sampled."""
        return self.config[name].split if name in self.labeled else "train"

    def periodic_evaluation(
        self, name: str, frozen: Any
    ) -> Callable[[TokenState], dict[str, float]]:
        """Returns the evaluation on the training split, and on that of the stage if it is another.

        See `TokenProblem`.
        """
        # These are not the reported prompts, because they select the best checkpoint.
        rng = jax.random.fold_in(stream(self.config, problem.EVALUATION), 1)
        evaluator = self.evaluator(rng, prompts=self.config.run.eval_episodes)
        measure = self._measure(evaluator)
        splits = dict.fromkeys(("train", self._split(name)))
        evaluations = [self.periodic(measure, frozen, split) for split in splits]

        def evaluate(learner: TokenState) -> dict[str, float]:
            return {key: x for each in evaluations for key, x in each(learner).items()}

        return evaluate

    def samples(self, variables: Params, count: int) -> list[Sample]:
        """Returns sample completions of prompts of the training split, see `problem.Problem`."""
        return _sample_evaluator(self, count).samples(variables, "train", count)


@functools.lru_cache(maxsize=1)
def _sample_evaluator(of: TaskProblem, count: int) -> PromptEvaluator:
    """Returns the evaluator of sample completions, which a run compiles only once."""
    return of.evaluator(stream(of.config, problem.EVALUATION), prompts=count)
