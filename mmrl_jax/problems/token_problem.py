"""Base class of the problems of token policies, with their options, checks and stages."""

import abc
from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from mmrl_jax.config.options import NON_NEGATIVE, POSITIVE, Group, build, option, options_of
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.distributed import partition
from mmrl_jax.learners import registry, token_learner
from mmrl_jax.learners.learner import epoch_indices
from mmrl_jax.learners.token_learner import ScoredCompletions, TokenState
from mmrl_jax.models import lora, stacked
from mmrl_jax.problems import problem, sources, token_models
from mmrl_jax.problems.problem import StageOptions, stream
from mmrl_jax.problems.sources import Collected, Constants, Source
from mmrl_jax.problems.token_models import TokenModel
from mmrl_jax.rl.overlong import soft_overlong_penalty
from mmrl_jax.training.stage import Carry, Stage, Start
from mmrl_jax.types import Metrics, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """Options of the labeled completions of a stage."""

    batch_size: int = option(64, "Number of labeled completions in an optimizer step.", POSITIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    """Options of the completions of an update, for prompts of one turn."""

    prompts_per_update: int = option(64, "Number of prompts in an update.", POSITIVE)
    num_completions: int = option(16, "Number of completions sampled for each prompt.", POSITIVE)
    pack_rows: int | None = option(
        None,
        "Number of rows of the maximum completion length into which the completions of a prompt "
        "are packed for learning; completions that do not fit take a second pass. None for one row "
        "per completion.",
        POSITIVE,
    )
    compactions: int = option(
        0,
        "Number of times that sampling halves the number of completions of each prompt that it "
        "computes, when at most half of them have not ended; this saves time where lengths are "
        "uneven. The completions are equal up to rounding.",
        NON_NEGATIVE,
    )
    overlong_buffer: int | None = option(
        None,
        "Number of tokens before the maximum completion length over which a penalty on the reward "
        "grows from 0 to 1 (DAPO); None for no penalty.",
        POSITIVE,
    )


def stage_options(
    config: Any, kinds: Mapping[str, tuple[type, ...]], *, comparing: bool = True
) -> dict[str, Group]:
    """Returns the groups of the stages of a config, with the keys of each.

    Args:
      config: Config of the run, in which keys may be missing.
      kinds: Dataclasses of the options of the source of each kind of experience.
      comparing: Whether prompts have several completions, so that algorithms that compare
        completions can be used.
    """
    rows = {
        name: row
        for name, row in registry.TOKEN.items()
        if row.experience in kinds and (comparing or row.compares == "nothing")
    }
    return {
        name: options_of(StageOptions, rows[name].options, *kinds[rows[name].experience])
        for name in problem.stage_names(config, rows)
    }


def check_groups(config: ml_collections.ConfigDict, name: str, length: int) -> dict[str, int]:
    """Checks the numbers of prompts and completions in an update of a stage.

    Args:
      config: Config of the run.
      name: Name of a stage that learns from completions of prompts of one turn.
      length: Maximum number of tokens of a completion.

    Returns:
      Sizes that must be divisible by mesh.data * mesh.fsdp, by their names.

    Raises:
      ValueError: If a number is invalid; the message gives the field, its value and the remedy.
    """
    g = config[name]
    parts = g.get("num_minibatches", 1) * g.get("grad_accum_steps", 1)
    if g.prompts_per_update % parts:
        raise ValueError(
            f"{name}.num_minibatches={g.get('num_minibatches', 1)} * {name}.grad_accum_steps="
            f"{g.get('grad_accum_steps', 1)} does not divide {name}.prompts_per_update="
            f"{g.prompts_per_update}."
        )
    compares = registry.TOKEN[name].compares
    if compares != "nothing" and g.num_completions < 2:
        raise ValueError(
            f"{name}.num_completions={g.num_completions}, but the stage {name!r} compares the "
            "completions of a prompt; raise it to 2 or more."
        )
    if g.get("pass_at_k") is not None and g.pass_at_k > g.num_completions:
        raise ValueError(
            f"{name}.pass_at_k={g.pass_at_k} is above {name}.num_completions={g.num_completions}."
        )
    completions = 2 if compares == "pairs" else g.num_completions
    if g.num_completions % 2**g.compactions:
        raise ValueError(
            f"{name}.compactions={g.compactions} halves the completions of a prompt as many times, "
            f"but {name}.num_completions={g.num_completions} is not divisible by "
            f"{2**g.compactions}; lower it."
        )
    if g.pack_rows is not None and g.pack_rows >= completions:
        raise ValueError(
            f"{name}.pack_rows={g.pack_rows}, but the stage {name!r} learns from {completions} "
            "completions of each prompt; give fewer rows, or None."
        )
    if g.overlong_buffer is not None and g.overlong_buffer > length:
        raise ValueError(
            f"{name}.overlong_buffer={g.overlong_buffer} is more than the {length} tokens that a "
            "completion may have; lower it."
        )
    return {
        f"{name}.prompts_per_update": g.prompts_per_update,
        f"{name}.prompts_per_update / {name}.num_minibatches / {name}.grad_accum_steps": (
            g.prompts_per_update // parts
        ),
    }


def shape_rewards(experience: ScoredCompletions, overlong_buffer: int | None) -> ScoredCompletions:
    """Adds the penalty of overlong completions to their rewards, see `soft_overlong_penalty`.

    Args:
      experience: Completions with rewards.
      overlong_buffer: Number of tokens over which the penalty grows; None for no penalty.
    """
    if overlong_buffer is None:
        return experience
    mask = experience.completions.mask
    penalty = soft_overlong_penalty(
        jnp.sum(mask, axis=-1), max_length=mask.shape[-1], buffer=overlong_buffer
    )
    # Missing rewards are 0 and are not changed.
    reward = experience.reward + jnp.where(experience.valid > 0, penalty, 0.0)
    return experience._replace(reward=reward)


def fixed_labels(batch_size: int, labels: ScoredCompletions) -> Source:
    """Returns a source of a fixed set of labeled completions.

    Args:
      batch_size: Number of completions in an update.
      labels: Labeled completions, with leaves [1, N, 1, ...], which are replicated on every device.
    """

    def collect(carry: Carry, constants: Constants) -> Collected:
        size = constants.data.completions.tokens.shape[1]
        indices = epoch_indices(carry.rng, carry.updates, batch_size=batch_size, size=size)
        batch = jax.tree.map(lambda x: x[:, indices], constants.data)
        return Collected(None, batch, carry.rng, {})

    return Source(
        stream=problem.FIXED_SET, samples_per_update=batch_size, data=labels, collect=collect
    )


class TokenProblem(abc.ABC):
    """Base class of problems of a token policy, see `problem.Problem` for the interface.

    A subclass provides the sources and the evaluation.

    Attributes:
      config: Config of the run.
      mesh: Device mesh.
      model: Policy with its tokenizer.
      best_metric: Name of the metric by which the best checkpoint is chosen, unless
        `best_metric_of` a stage is another one.
      test_split: Name of the split that is evaluated at the end, see `problem.Problem`.
      needs_value_head: Whether a stage of the run uses a value head.
    """

    def __init__(self, config: ml_collections.ConfigDict, model: TokenModel, best_metric: str):
        self.config, self.best_metric = config, best_metric
        self.test_split: str | None = None
        self.mesh = problem.make_mesh(config)
        self.model = model._replace(policy=dataclasses.replace(model.policy, mesh=self.mesh))
        self.needs_value_head = any("value_head" in self._needs(name) for name in config.stages)
        for name in config.stages:
            self._check_stage(name)
        token_models.check_frozen(config, self.shapes())
        token_models.check_heads(self.model.policy.model, self.mesh)

    def _check_stage(self, name: str) -> None:
        """Raises ValueError for a stage without trainable variables, or a missing reference."""
        shapes = self.shapes()
        token_models.partition_trainable(
            {key: x for key, x in shapes.items() if key != "value"},
            self.config[name].trainable,
            trains_value_head=False,
            key=f"{name}.trainable",
        )
        problem.check_algorithm(self.config, name, registry.TOKEN[name])
        g = self.config[name]
        if g.get("kl_cov_fraction", 0.0) > 0 and g.num_epochs * g.num_minibatches == 1:
            raise ValueError(
                f"{name}.kl_cov_fraction={g.kl_cov_fraction}, but with a single optimizer step in "
                "an update the policy has not moved when the penalty is computed; set "
                f"{name}.num_minibatches or {name}.num_epochs above 1, or the fraction to 0."
            )
        decay = g.get("reference_ema_decay", 1.0)
        if decay < 1 and "reference" not in self._needs(name):
            raise ValueError(
                f"{name}.reference_ema_decay={decay}, but with {name}.kl_coef=0 there is no "
                "reference policy; set it to 1, or raise the coefficient."
            )

    def check_sizes(self, *sizes: Mapping[str, int]) -> None:
        """Checks that the batch sizes of the stages are divisible by mesh.data * mesh.fsdp.

        Args:
          *sizes: Further sizes to check, by their names.

        Raises:
          ValueError: If a size is not divisible.
        """
        batches = {
            f"{name}.batch_size": self.config[name].batch_size
            for name in self.config.stages
            if "batch_size" in self.config[name]
        }
        for each in (batches, *sizes):
            problem.check_divisible(each, self.mesh)

    def shapes(self) -> Params:
        """Returns shapes and dtypes of the variables of the whole model."""

        def init(key: jax.Array) -> Params:
            m, value_head = self.config.model, self.needs_value_head
            variables = token_models.init_variables(m, self.model, key, value_head=value_head)
            variables = token_models.store_frozen(m, variables, self._trained())
            return stacked.stack(variables, self.model.policy.model)

        return jax.eval_shape(init, jax.random.key(0))

    def _trained(self) -> tuple[str, ...]:
        """Returns patterns of the paths of the variables that the stages train."""
        return tuple(self.config[name].trainable for name in self.config.stages)

    def options(self, name: str) -> Any:
        """Returns the options of a stage's algorithm."""
        return build(registry.TOKEN[name].options, self.config[name])

    def _needs(self, name: str) -> frozenset[str]:
        return registry.TOKEN[name].needs(self.options(name))

    @abc.abstractmethod
    def source(self, name: str) -> Source:
        """Returns the source of the experience of a stage."""

    def best_metric_of(self, name: str) -> str:
        """Returns the name of the metric by which the best checkpoint of a stage is chosen."""
        return self.best_metric

    @abc.abstractmethod
    def periodic_evaluation(
        self, name: str, frozen: Any
    ) -> Callable[[TokenState], dict[str, float]]:
        """Returns the evaluation during a stage, a function learner -> metrics.

        Args:
          name: Name of the stage.
          frozen: Variables that the stage does not train.
        """

    def open_data(self) -> None:  # noqa: B027 (most problems have no files)
        """Opens and checks files that only training and evaluation read, see `problem.Problem`."""

    def dependencies(self, *, of_policy: bool = False) -> dict[str, str]:
        """Returns the fingerprints of the model and its tokenizer, see `problem.Problem`."""
        return token_models.dependencies(self.config.model, self.model.texts.tokenizer)

    def partition(self, variables: Params, name: str) -> tuple[Params, Any]:
        """Splits variables into those that a stage trains and the frozen ones."""
        return token_models.partition_trainable(
            variables,
            self.config[name].trainable,
            trains_value_head="value_head" in self._needs(name),
            key=f"{name}.trainable",
        )

    def initial_variables(self) -> Params:
        """Returns the initial variables of the first stage; pretrained weights are read.

        If devices are only described, nothing is read, and the variables have shapes only.
        """
        if mesh_lib.only_described():
            return self.shapes()
        return token_models.read_variables(
            self.config.model,
            self.model,
            stream(self.config, problem.PARAMETERS),
            self.mesh,
            value_head=self.needs_value_head,
            trained=self._trained(),
        )

    def stage(self, name: str, /, *, start: Params | None = None, **changes: Any) -> Stage:
        """Builds a stage of the run, see `problem.Problem`.

        Args:
          name: Name of the stage, one of config.stages.
          start: Variables of the whole model from which the stage starts, or their shapes; None for
            the initial variables.
          **changes: Fields of `Stage` to replace, and `stream`, the stream of random numbers of the
            stage.
        """
        config, algorithm, options = self.config, registry.TOKEN[name], self.options(name)
        source = self.source(name)
        variables = self.initial_variables() if start is None else start
        trained, frozen = self.partition(variables, name)
        trained = algorithm.prepare(trained, options)
        del variables, start
        optimizer = sources.make_optimizer(config, name, options)
        constants = mesh_lib.put(
            Constants(frozen, source.data),
            Constants(partition.shardings(frozen, self.mesh), mesh_lib.replicated(self.mesh)),
        )
        policy = dataclasses.replace(self.model.policy, pack_rows=config[name].get("pack_rows"))
        initial = Start(trained)
        del trained, frozen

        def init() -> Carry:
            learner = token_learner.init(
                initial(),
                optimizer=optimizer.transformation,
                with_reference="reference" in self._needs(name),
                extras=algorithm.extras(options, None, None, None),
            )
            rng = stream(config, changes.get("stream", source.stream))
            return sources.fresh_carry(learner, source, rng)

        def update(
            learner: TokenState, constants: Constants, batch: Any, key: jax.Array
        ) -> tuple[TokenState, Metrics]:
            learner, metrics = algorithm.update(
                learner,
                constants.frozen,
                batch,
                key,
                policy=policy,
                optimizer=optimizer.transformation,
                options=options,
                shard=functools.partial(mesh_lib.constrain_batch, mesh=self.mesh),
            )
            decay = getattr(options, "reference_ema_decay", 1.0)
            return token_learner.move_reference(learner, decay), metrics

        learn = sources.make_learn(update, optimizer)
        fields = sources.stage_fields(config, name, algorithm, source, self.best_metric_of(name))
        return Stage(
            **fields | {name: x for name, x in changes.items() if name != "stream"},
            init=init,
            release=initial.release,
            update=None if source.collect is None else sources.make_update(source, learn),
            on_host=None if source.on_host is None else source.on_host(learn),
            constants=constants,
            evaluate=self.periodic_evaluation(name, constants.frozen),
            shardings=functools.partial(problem.shard_carry, mesh=self.mesh),
        )

    def variables(self, stage: Stage, learner: TokenState) -> Params:
        """Returns the variables of the whole model, see `problem.Problem`."""
        return lora.join(learner.params, stage.constants.frozen)

    def checkpoint_parts(self, name: str) -> dict[str, Any]:
        """Returns the shapes of the variables that a stage trains, see `problem.Problem`."""
        return {"params": self.partition(self.shapes(), name)[0]}

    def checkpoint_stages(self, name: str) -> tuple[str, ...]:
        """Returns the stages up to `name`: a checkpoint has only the variables that are trained."""
        return tuple(self.config.stages[: self.config.stages.index(name) + 1])

    def from_checkpoint(self, parts: dict[str, dict[str, Any]]) -> Params:
        """Returns the variables of the whole model, see `problem.Problem`."""
        variables = self.initial_variables()
        for name, stage_parts in parts.items():
            variables = lora.join(stage_parts["params"], self.partition(variables, name)[1])
        return variables

    def periodic(
        self, measure: Callable[[Any, str], dict[str, float]], frozen: Any, split: str
    ) -> Callable[[TokenState], dict[str, float]]:
        """Returns the evaluation on a split during a stage, a function learner -> metrics.

        Args:
          measure: (variables, split) -> metrics.
          frozen: Variables that the stage does not train.
          split: Name of the split.
        """

        def evaluate(learner: TokenState) -> dict[str, float]:
            metrics = measure(lora.join(learner.params, frozen), split)
            return {f"eval/{split}/{name}": value for name, value in metrics.items()}

        return evaluate

    def eval_batch_size(self) -> int:
        """Returns the maximum number of prompts that an evaluation completes at once.

        It is the batch size of the last stage, so that an evaluation of any number of prompts needs
        no more memory than an update.
        """
        g = self.config[self.config.stages[-1]]
        return g.get("prompts_per_update") or g.get("num_envs") or g.batch_size
