"""Builds a run of a policy that answers questions; what every key means is in `SCHEMA`."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections

from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.evaluation.questions import (
    QuestionEvaluator,
    Sample,
    describe,
    describe_levels,
)
from mmrl_jax.learners import grpo
from mmrl_jax.learners.grpo import ScoredCompletions
from mmrl_jax.learners.token_learner import TokenPolicy, TokenState
from mmrl_jax.rl.token_losses import PRESETS
from mmrl_jax.rollouts.generate import Sampling
from mmrl_jax.tasks import shapes
from mmrl_jax.tasks.question import Prompt
from mmrl_jax.training import config as config_lib
from mmrl_jax.training import token_models, token_stages
from mmrl_jax.training.config import anything, between, non_negative, one_of, positive, texts
from mmrl_jax.training.factory import SCHEMA as CONTROL
from mmrl_jax.training.factory import make_mesh
from mmrl_jax.training.stage import Carry, Stage
from mmrl_jax.training.token_models import TokenModel
from mmrl_jax.types import Metrics, Params

ALGORITHMS = ("sft", "grpo", "dpo", "token_ppo")
BEST = "eval/train/accuracy"

PACK_ROWS = positive(
    (int, type(None)),
    "rows of an answer's most tokens that the answers to a question share where they are learned "
    "from; for those that do not fit there is a second pass; None: each has its own",
)

SCHEMA: config_lib.Schema = {
    "seed": CONTROL["seed"],
    "algorithm": one_of(
        ALGORITHMS,
        "'grpo' is its whole family, 'dpo' prefers the best of its answers to the worst; all "
        "fine-tune first if sft.updates is above 0",
    ),
    "devices": CONTROL["devices"],
    "task": {
        "kinds": texts("of questions, see mmrl_jax.tasks.shapes.KINDS"),
        "rows": positive(int, "of the grid of places, which has as many columns"),
        "height": positive(int, "of the pictures, pixels"),
        "width": positive(int, "of the pictures, pixels"),
        "counts": anything(tuple, "(least, most) that is counted"),
        "distractors": non_negative(int, "the most objects that a question is not about"),
        "levels": texts(
            "of difficulty, drawn evenly for each question, see mmrl_jax.tasks.shapes.LEVELS"
        ),
    },
    "model": token_models.MODEL,
    "sft": {
        "examples": positive(int, "labeled questions, a fixed set"),
        "counts": anything(tuple, "(least, most) that is counted in the labeled questions"),
        "noise": between(float, 0, 1, "share of labels that are a random question's of its kind"),
    }
    | dict(token_stages.SFT),
    "rl": {
        "questions": positive(int, "learned from in an update"),
        "group": positive(int, "answers to each question"),
        "pack_rows": PACK_ROWS,
        "oversample": positive(
            int,
            "questions asked for each that is learned from; those whose answers differ in "
            "reward are learned from first (DAPO's dynamic sampling)",
        ),
        "swapped": anything(bool, "ask about another question's picture: what a blind one learns"),
    }
    | dict(token_stages.RL)
    | dict(token_stages.TRUNCATION),
    "grpo": {
        "preset": one_of(tuple(PRESETS), "advantage and loss, see mmrl_jax/rl/token_losses.py"),
        "pass_at_k": positive(
            (int, type(None)),
            "k of the advantage that wants one of k answers to be right; None: the preset's own",
        ),
    },
    "dpo": {
        "beta": positive(float, "weight of the KL to the reference"),
        "label_smoothing": between(float, 0, 0.5, "share of preferences taken to be wrong"),
    },
    "ppo": token_stages.PPO,
    "run": CONTROL["run"],
}


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses a config that cannot run, before anything is compiled.

    Raises:
      ValueError: names the field, its value and the remedy.
    """
    config_lib.check_config(config, SCHEMA)
    task = config.task
    for name, pair in (("task.counts", task.counts), ("sft.counts", config.sft.counts)):
        if len(pair) != 2 or not all(isinstance(x, int) for x in pair):
            raise ValueError(f"{name}={tuple(pair)} must be two whole numbers, (least, most).")
    token_models.check_model(config, task.height, task.width, "task")
    check_groups(config)
    token_stages.check_reference(config)
    token_models.check_sizes(
        config,
        {
            "sft.batch_size": config.sft.batch_size,
            "rl.questions": config.rl.questions,
            **learned_together(config),
        },
    )
    if config.algorithm == "sft" and not config.sft.updates:
        raise ValueError("sft.updates=0, but algorithm='sft' is nothing else; raise it.")
    parts = make_parts(config)
    few = labeled(config, parts.task)
    # Pictures that do not divide into cells are refused when they are drawn.
    jax.eval_shape(lambda key: few.sample(key, 1, "train"), jax.random.key(0))
    token_models.check_trainable(config, parts.model)
    token_stages.check_overlong(config, parts.policy.length)


def learned_together(config: ml_collections.ConfigDict) -> dict[str, int]:
    """The questions whose gradient is taken at once, by the fields that say how many."""
    r = config.rl
    return {
        "rl.questions / rl.minibatches / rl.accumulate": r.questions
        // r.minibatches
        // r.accumulate
    }


def check_groups(config: ml_collections.ConfigDict) -> None:
    """Checks the numbers of questions and answers that an update learns from.

    Raises:
      ValueError: names the field, its value and the remedy.
    """
    r = config.rl
    if r.questions % (r.minibatches * r.accumulate):
        raise ValueError(
            f"rl.minibatches={r.minibatches} * rl.accumulate={r.accumulate} does not divide "
            f"rl.questions={r.questions}."
        )
    if config.algorithm in ("grpo", "dpo") and r.group < 2:
        raise ValueError(
            f"rl.group={r.group}, but algorithm={config.algorithm!r} compares the answers to a "
            "question; raise it to 2 or more."
        )
    if config.grpo.pass_at_k is not None and config.grpo.pass_at_k > r.group:
        raise ValueError(f"grpo.pass_at_k={config.grpo.pass_at_k} is above rl.group={r.group}.")
    together = 2 if config.algorithm == "dpo" else r.group
    if r.pack_rows is not None and r.pack_rows >= together:
        raise ValueError(
            f"rl.pack_rows={r.pack_rows}, but algorithm={config.algorithm!r} learns from "
            f"{together} answers to a question together; give less, or None."
        )


class Parts(NamedTuple):
    """What the stages of a run share.

    Attributes:
      task: asks over the full range of counts.
      model: answers.
    """

    task: shapes.Shapes
    model: TokenModel

    @property
    def policy(self) -> TokenPolicy:
        """Of the model."""
        return self.model.policy


def make_parts(config: ml_collections.ConfigDict) -> Parts:
    """The task and the model of a config.

    Raises:
      ValueError: see `shapes.make`, `token_models.pretrained` and `token_models.make_model`.
    """
    t, size = config.task, (config.task.height, config.task.width)
    source = token_models.pretrained(config.model, size)
    task = shapes.make(
        kinds=tuple(t.kinds),
        rows=t.rows,
        height=t.height,
        width=t.width,
        counts=tuple(t.counts),
        seen=tuple(t.counts),
        distractors=t.distractors,
        levels=tuple(t.levels),
        image_tokens=token_models.image_tokens(config.model, source, size),
        tokenizer=source and source.chat,
    )
    return Parts(task, token_models.make_model(config.model, source, task.texts, size))


def labeled(config: ml_collections.ConfigDict, task: shapes.Shapes) -> shapes.Shapes:
    """The task that labeled questions are drawn from.

    Raises:
      ValueError: sft.counts is no part of task.counts, or too small a one.
    """
    counts = tuple(config.sft.counts)
    try:
        return task.restricted(counts)
    except ValueError as error:
        raise ValueError(f"sft.counts={counts} cannot be: {error}") from error


def sft_stage(config: ml_collections.ConfigDict, mesh: Mesh) -> Stage:
    """Supervised fine-tuning on the labeled questions."""
    s, parts = config.sft, make_parts(config)
    few = labeled(config, parts.task)

    @jax.jit
    def label(rng: jax.Array) -> tuple[Prompt, jax.Array, jax.Array]:
        asked = few.sample(rng, s.examples, "train")
        other_key, noise_key = jax.random.split(jax.random.fold_in(rng, 1))
        other = parts.task.sample(other_key, s.examples, "train")
        wrong = jax.random.bernoulli(noise_key, s.noise, (s.examples,)) & (other.kind == asked.kind)
        return (asked, *few.texts.labels(jnp.where(wrong, other.answer, asked.answer)))

    labels = label(jax.random.fold_in(jax.random.PRNGKey(config.seed), 1))
    return token_stages.sft_stage(
        config,
        mesh,
        parts.model,
        labels,
        evaluation=functools.partial(_periodic_evaluation, config),
        best_metric=BEST,
    )


def rl_stage(
    config: ml_collections.ConfigDict, mesh: Mesh, *, start: Params | None = None
) -> Stage:
    """RL on rewards alone, from scratch or from what was fine-tuned."""
    r, parts = config.rl, make_parts(config)
    learning = token_stages.make_learning(config, mesh, parts.model, start)

    def update(carry: Carry, frozen: Any) -> tuple[Carry, Metrics]:
        rng = jax.random.fold_in(carry.rng, carry.updates)
        ask_key, answer_key, learn_key = jax.random.split(rng, 3)
        asked = parts.task.sample(ask_key, r.questions * r.oversample, "train")
        if r.swapped:
            asked = asked._replace(images=jnp.roll(asked.images, 1, axis=0))
        asked = mesh_lib.constrain_batch(asked, mesh=mesh)  # Each device answers its part.
        answers = parts.policy.answer(
            carry.learner.params,
            frozen,
            asked,
            answer_key,
            group=r.group,
            sampling=Sampling(temperature=r.temperature),
        )
        score = parts.task.texts.score(asked, answers.tokens, answers.present, penalty=r.penalty)
        experience = token_stages.shape_rewards(
            config, ScoredCompletions(asked, answers, score.reward, jnp.ones_like(score.reward))
        )
        chosen = grpo.dynamic_sampling(experience, r.questions)
        carry, metrics = learning.step(carry, frozen, chosen, learn_key)
        return carry, metrics | grpo.describe(experience) | {
            "completion/correct": jnp.mean(score.correct),
            "completion/invalid_fraction": jnp.mean(score.malformed),
        }

    return token_stages.make_stage(
        config,
        mesh,
        learning,
        update=update,
        samples_per_update=r.questions * r.oversample * r.group,
        evaluate=_periodic_evaluation(config, learning.frozen),
        best_metric=BEST,
        console=("completion/correct", "completion/invalid_fraction", BEST, "time/samples_per_s"),
    )


def make_evaluator(
    config: ml_collections.ConfigDict, rng: jax.Array, *, questions: int
) -> QuestionEvaluator:
    """Evaluates the greedy answers of models of this config, made of trained and frozen half."""
    parts = make_parts(config)

    def answer(
        variables: tuple[Params, Any], question: Prompt, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        answers = parts.policy.answer(
            *variables, question, rng, group=1, sampling=Sampling(temperature=0.0)
        )
        return answers.tokens, answers.present

    return QuestionEvaluator(
        parts.task,
        answer,
        rng,
        questions=questions,
        mesh=make_mesh(config),
        together=token_stages.evaluated_together(config),
    )


def answered_samples(
    config: ml_collections.ConfigDict, variables: tuple[Params, Any], count: int
) -> list[Sample]:
    """Questions of the training split, with the greedy answers of a policy.

    Args:
      config: of the run.
      variables: trained and frozen half.
      count: of them.
    """
    evaluator = make_evaluator(config, evaluation_key(config), questions=count)
    return evaluator.samples(variables, "train", count)


def dependencies(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Fingerprints of what a run depends on beside its config, see `fingerprints`."""
    tokenizer = make_parts(config).model.texts.tokenizer
    return token_models.dependencies(config.model, tokenizer)


def splits(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The splits of the config's task; none of counts, of which RL sees all."""
    without = {"heldout_count"}
    if not set(config.task.kinds) & set(shapes.NAMING):
        without.add("heldout_pair")
    return tuple(split for split in shapes.SPLITS if split not in without)


def make_measure(
    config: ml_collections.ConfigDict, *, episodes: int
) -> Callable[[tuple[Params, Any], str], dict[str, float]]:
    """The reported evaluation: (trained and frozen half, split) -> metrics of the answers.

    They are those of `questions.describe`, 'blind_accuracy', that with swapped pictures, and where
    there are several levels those of `questions.describe_levels`.
    """
    return _measure(config, make_evaluator(config, evaluation_key(config), questions=episodes))


def _measure(
    config: ml_collections.ConfigDict, evaluator: QuestionEvaluator
) -> Callable[[tuple[Params, Any], str], dict[str, float]]:
    levels = tuple(config.task.levels)

    def measure(variables: tuple[Params, Any], split: str) -> dict[str, float]:
        blind = describe(evaluator(variables, split, swapped=True).score)["accuracy"]
        found = evaluator(variables, split)
        described = describe(found.score) | {"blind_accuracy": blind}
        return described | (describe_levels(found, levels) if len(levels) > 1 else {})

    return measure


def evaluation_key(config: ml_collections.ConfigDict) -> jax.Array:
    """The key of every evaluation of a run: the same questions for whatever is compared."""
    return jax.random.fold_in(jax.random.PRNGKey(config.seed), 5)


def _periodic_evaluation(
    config: ml_collections.ConfigDict, frozen: Any
) -> Callable[[TokenState], dict[str, float]]:
    # Other questions than those of the reported evaluations: the best checkpoint is chosen by it.
    key = jax.random.fold_in(evaluation_key(config), 1)
    measure = _measure(config, make_evaluator(config, key, questions=config.run.eval_episodes))
    return token_stages.evaluation(measure, frozen, "train")
