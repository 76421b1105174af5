"""Builds a run of a token policy from its config; what every key means is in `SCHEMA`.

With `factory.py` the only module that reads a ConfigDict.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np
import optax

from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.evaluation.questions import QuestionEvaluator, describe
from mmrl_jax.learners import grpo, sft, token_learner
from mmrl_jax.learners.token_learner import TokenPolicy, TokenState
from mmrl_jax.models.encoders import VisionEncoder
from mmrl_jax.models.language import LanguageModel, Rope
from mmrl_jax.models.transformer import BlockSpec
from mmrl_jax.models.vlm import PatchVision, VisionLanguageModel, check_counts
from mmrl_jax.rl.token_losses import KLS, PRESETS
from mmrl_jax.rollouts.generate import Sampling
from mmrl_jax.tasks import shapes
from mmrl_jax.tasks.question import Question, Words
from mmrl_jax.training import config as config_lib
from mmrl_jax.training.config import Field, anything, non_negative, one_of, positive
from mmrl_jax.training.factory import DTYPES, adam
from mmrl_jax.training.factory import SCHEMA as CONTROL
from mmrl_jax.training.loop import Carry, Stage
from mmrl_jax.types import Metrics

ALGORITHMS = ("sft", "grpo")
BEST = "eval/train/accuracy"

SCHEMA: config_lib.Schema = {
    "seed": CONTROL["seed"],
    "algorithm": one_of(ALGORITHMS, "'grpo' fine-tunes first if sft.updates is above 0"),
    "devices": CONTROL["devices"],
    "task": {
        "kinds": anything(tuple, "of questions, see mmrl_jax.tasks.shapes.KINDS"),
        "rows": positive(int, "of the grid of places, which has as many columns"),
        "height": positive(int, "of the pictures, pixels"),
        "width": positive(int, "of the pictures, pixels"),
        "counts": anything(tuple, "(least, most) that is counted"),
        "distractors": non_negative(int, "the most objects that a question is not about"),
    },
    "model": {
        "width": positive(int, "of the tokens"),
        "layers": positive(int, "blocks of the language model"),
        "heads": positive(int, "attention heads; must divide the width"),
        "mlp_ratio": positive(int, "hidden width of a block's MLP over the width"),
        "patch": positive(int, "edge of an image patch, pixels; must divide height and width"),
        "patch_margin": non_negative(int, "pixels around a patch that its token sees too"),
        "patch_hidden": positive(int, "hidden units of the per-patch perceptron"),
        "vision_layers": non_negative(int, "blocks among the patches"),
        "dtype": one_of(tuple(DTYPES), "of the computation; parameters are float32"),
        "remat": anything(bool, "recompute activations in the backward pass"),
    },
    "sft": {
        "updates": non_negative(int, "optimiser steps of supervised fine-tuning; 0 for none"),
        "examples": positive(int, "labelled questions, a fixed set"),
        "counts": anything(tuple, "(least, most) that is counted in the labelled questions"),
        "batch_size": positive(int, "questions an optimiser step"),
        "learning_rate": positive(float, "of Adam"),
        "max_grad_norm": positive(float, "global norm that gradients are clipped to"),
        "updates_per_dispatch": positive(int, "updates in one compiled call"),
        "eval_interval": positive(int, "updates between evaluations"),
        "checkpoint_interval": positive(int, "updates between checkpoints"),
    },
    "grpo": {
        "preset": one_of(tuple(PRESETS), "advantage and loss, see mmrl_jax/rl/token_losses.py"),
        "questions": positive(int, "an update"),
        "group": Field(int, lambda x: x >= 2, "at least 2", "answers to each question"),
        "temperature": positive(float, "of the answers"),
        "penalty": non_negative(float, "reward that an answer of no meaning loses"),
        "swapped": anything(bool, "ask about another question's picture: what a blind one learns"),
        "kl": one_of(KLS, "estimator of the KL to where GRPO began"),
        "kl_weight": non_negative(float, "of it; 0 for none"),
        "entropy_weight": non_negative(float, "of the entropy bonus"),
        "learning_rate": positive(float, "of Adam, at the start"),
        "schedule": one_of(("constant", "linear"), "of the learning rate; linear falls to 0"),
        "max_grad_norm": positive(float, "global norm that gradients are clipped to"),
        "epochs": positive(int, "passes over a batch"),
        "minibatches": positive(int, "optimiser steps a pass"),
        "accumulate": positive(int, "parts of a minibatch whose gradients are added up"),
    },
    "run": CONTROL["run"],
}


class Parts(NamedTuple):
    """What the stages of a run share.

    Attributes:
      task: asks over the full range of counts.
      policy: the model.
    """

    task: shapes.Shapes
    policy: TokenPolicy


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses a config that cannot run, before anything is compiled.

    Raises:
      ValueError: names the field, its value and the remedy.
    """
    config_lib.check_config(config, SCHEMA)
    task, model, g = config.task, config.model, config.grpo
    devices = config.devices or jax.device_count()
    if devices > jax.device_count():
        raise ValueError(f"devices={devices}, but there are {jax.device_count()}; give 0 for all.")
    for name, pair in (("task.counts", task.counts), ("sft.counts", config.sft.counts)):
        if len(pair) != 2 or not all(isinstance(x, int) for x in pair):
            raise ValueError(f"{name}={tuple(pair)} must be two whole numbers, (least, most).")
    if task.height % model.patch or task.width % model.patch:
        raise ValueError(
            f"task.height={task.height} and task.width={task.width} are not both divisible by "
            f"model.patch={model.patch}."
        )
    if model.width % (2 * model.heads) or model.width % 4:
        raise ValueError(
            f"model.width={model.width} is not divisible by 4 and by twice model.heads="
            f"{model.heads}."
        )
    if g.questions % (g.minibatches * g.accumulate):
        raise ValueError(
            f"grpo.minibatches={g.minibatches} * grpo.accumulate={g.accumulate} does not divide "
            f"grpo.questions={g.questions}."
        )
    for name, size in (
        ("sft.batch_size", config.sft.batch_size),
        ("grpo.questions / grpo.minibatches", g.questions // g.minibatches),
        ("run.eval_episodes", config.run.eval_episodes),
    ):
        if size % devices:
            raise ValueError(f"devices={devices} do not divide {name} = {size}; change one.")
    if config.algorithm == "sft" and not config.sft.updates:
        raise ValueError("sft.updates=0, but algorithm='sft' is nothing else; raise it.")
    few = labelled(config, make_parts(config).task)
    # Cells that are too small are refused when they are drawn.
    jax.eval_shape(lambda key: few.sample(key, 1, "train"), jax.random.key(0))


def make_parts(config: ml_collections.ConfigDict) -> Parts:
    """The task and the model of a config.

    Raises:
      ValueError: see `shapes.make` and `vlm.check_counts`.
    """
    t, m = config.task, config.model
    patches = (t.height // m.patch) * (t.width // m.patch)
    task = shapes.make(
        kinds=tuple(t.kinds),
        rows=t.rows,
        height=t.height,
        width=t.width,
        counts=tuple(t.counts),
        seen=tuple(t.counts),
        distractors=t.distractors,
        image_tokens=patches,
    )
    words = Words([*task.texts.prompts, *task.texts.answers])
    dtype = DTYPES[m.dtype]
    block = BlockSpec(
        heads=m.heads,
        hidden=m.mlp_ratio * m.width,
        norm="rms",
        activation="silu",
        gated=True,
        biases=(),
    )
    model = VisionLanguageModel(
        vision=PatchVision(
            VisionEncoder(
                m.width,
                m.patch,
                m.patch_margin,
                m.patch_hidden,
                layers=m.vision_layers,
                heads=m.heads,
                mlp_ratio=m.mlp_ratio,
                dtype=dtype,
                remat=m.remat,
            )
        ),
        language=LanguageModel(
            vocabulary=words.size,
            width=m.width,
            layers=m.layers,
            block=block,
            ropes=(Rope(100.0, m.width // m.heads),),
            dtype=dtype,
            remat=m.remat,
        ),
        image_token=Words.IMAGE,
    )
    present = np.ones((len(task.texts.prompts), patches), bool)
    check_counts(task.texts.prompt_tokens == Words.IMAGE, present)
    return Parts(task, TokenPolicy(model, task.texts.length, Words.STOP, Words.PAD))


def labelled(config: ml_collections.ConfigDict, task: shapes.Shapes) -> shapes.Shapes:
    """The task that labelled questions are drawn from.

    Raises:
      ValueError: sft.counts is no part of task.counts.
    """
    low, high = config.sft.counts
    if not task.counts[0] <= low <= high <= task.counts[1]:
        raise ValueError(
            f"sft.counts={(low, high)} is not within task.counts={task.counts}, (least, most)."
        )
    return task.restricted((low, high))


def fresh_learner(
    config: ml_collections.ConfigDict,
    optimiser: optax.GradientTransformation,
    *,
    start: TokenState | None = None,
    with_reference: bool = False,
) -> TokenState:
    """A learner with new parameters, all of them trained, or with those of `start`."""
    if start is not None:
        params = start.params
    else:
        task, policy = make_parts(config)
        key = jax.random.fold_in(jax.random.PRNGKey(config.seed), 0)
        asked = task.sample(key, 1, "train")
        params = jax.jit(policy.model.init)(key, asked.tokens, asked.present, asked.images)
    return token_learner.init(params, optimiser=optimiser, with_reference=with_reference)


def sft_stage(config: ml_collections.ConfigDict, mesh: Mesh) -> Stage:
    """Supervised fine-tuning on the labelled questions."""
    s, (task, policy) = config.sft, make_parts(config)
    few = labelled(config, task)
    optimiser = adam(s.learning_rate, s.max_grad_norm)
    labels_key = jax.random.fold_in(jax.random.PRNGKey(config.seed), 1)

    @jax.jit
    def label(rng: jax.Array) -> tuple[Question, jax.Array, jax.Array]:
        asked = few.sample(rng, s.examples, "train")
        return (asked, *few.texts.labels(asked))

    def init() -> Carry:
        learner = fresh_learner(config, optimiser)
        rng = jax.random.fold_in(jax.random.PRNGKey(config.seed), 2)
        return Carry(learner, None, rng, jnp.zeros((), jnp.int32))

    def update(carry: Carry, data: Any) -> tuple[Carry, Metrics]:
        rng = jax.random.fold_in(carry.rng, carry.updates)
        chosen = jax.random.randint(rng, (s.batch_size,), 0, s.examples)
        learner, metrics = sft.update(
            carry.learner,
            _nothing(carry.learner),
            *jax.tree.map(lambda x: x[chosen], data),
            policy=policy,
            optimiser=optimiser,
            shard=functools.partial(mesh_lib.constrain_batch, mesh=mesh),
        )
        return carry.replace(learner=learner, updates=carry.updates + 1), metrics

    return Stage(
        name="sft",
        init=init,
        update=update,
        data=jax.device_put(label(labels_key), mesh_lib.replicated(mesh)),
        updates=s.updates,
        updates_per_dispatch=s.updates_per_dispatch,
        env_steps_per_update=0,
        samples_per_update=s.batch_size,
        evaluate=_periodic_evaluation(config),
        eval_interval=s.eval_interval,
        checkpoint_interval=s.checkpoint_interval,
        keep=config.run.keep,
        best_metric=BEST,
        console=("loss/answer", BEST, "time/samples_per_s"),
        shardings=functools.partial(_everywhere, mesh=mesh),
    )


def grpo_stage(
    config: ml_collections.ConfigDict, mesh: Mesh, *, start: TokenState | None = None
) -> Stage:
    """The GRPO family on rewards alone, from scratch or from a learner's parameters."""
    g, (task, policy) = config.grpo, make_parts(config)
    advantage, loss = PRESETS[g.preset]
    steps = config.run.updates * g.epochs * g.minibatches
    rate = {
        "constant": optax.constant_schedule(g.learning_rate),
        "linear": optax.linear_schedule(g.learning_rate, 0.0, steps),
    }[g.schedule]
    optimiser = adam(rate, g.max_grad_norm)
    hyperparameters = grpo.Hyperparameters(
        advantage=advantage,
        loss=dataclasses.replace(loss, kl=g.kl, kl_weight=g.kl_weight),
        entropy_weight=g.entropy_weight,
        temperature=g.temperature,
        epochs=g.epochs,
        minibatches=g.minibatches,
        accumulate=g.accumulate,
    )

    def init() -> Carry:
        learner = fresh_learner(config, optimiser, start=start, with_reference=g.kl_weight > 0)
        rng = jax.random.fold_in(jax.random.PRNGKey(config.seed), 3)
        return Carry(learner, None, rng, jnp.zeros((), jnp.int32))

    def update(carry: Carry, _: None) -> tuple[Carry, Metrics]:
        rng = jax.random.fold_in(carry.rng, carry.updates)
        ask_key, answer_key, learn_key = jax.random.split(rng, 3)
        frozen = _nothing(carry.learner)
        asked = task.sample(ask_key, g.questions, "train")
        if g.swapped:
            asked = asked._replace(images=jnp.roll(asked.images, 1, axis=0))
        answers = policy.answer(
            carry.learner.params,
            frozen,
            asked,
            answer_key,
            group=g.group,
            sampling=Sampling(temperature=g.temperature),
        )
        score = task.texts.score(asked, answers.tokens, answers.present, penalty=g.penalty)
        learner, metrics = grpo.update(
            carry.learner,
            frozen,
            grpo.Experience(asked, answers, score.reward, jnp.ones_like(score.reward)),
            learn_key,
            policy=policy,
            optimiser=optimiser,
            hyperparameters=hyperparameters,
            shard=functools.partial(mesh_lib.constrain_batch, mesh=mesh),
        )
        metrics |= {
            "answer/correct": jnp.mean(score.correct),
            "answer/malformed": jnp.mean(score.malformed),
            "lr": jnp.asarray(rate(learner.steps), jnp.float32),
        }
        return carry.replace(learner=learner, updates=carry.updates + 1), metrics

    return Stage(
        name=g.preset,
        init=init,
        update=update,
        data=None,
        updates=config.run.updates,
        updates_per_dispatch=config.run.updates_per_dispatch,
        env_steps_per_update=0,
        samples_per_update=g.questions * g.group,
        evaluate=_periodic_evaluation(config),
        eval_interval=config.run.eval_interval,
        checkpoint_interval=config.run.checkpoint_interval,
        keep=config.run.keep,
        best_metric=BEST,
        console=("answer/correct", "answer/malformed", BEST, "time/samples_per_s"),
        shardings=functools.partial(_everywhere, mesh=mesh),
    )


def make_evaluator(
    config: ml_collections.ConfigDict, rng: jax.Array, *, questions: int
) -> QuestionEvaluator:
    """Evaluates the greedy answers of learners of this config."""
    task, policy = make_parts(config)

    def answer(
        learner: TokenState, question: Question, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        answers = policy.answer(
            learner.params,
            _nothing(learner),
            question,
            rng,
            group=1,
            sampling=Sampling(temperature=0.0),
        )
        return answers.tokens, answers.present

    return QuestionEvaluator(task, answer, rng, questions=questions)


def evaluation_key(config: ml_collections.ConfigDict) -> jax.Array:
    """The key of every evaluation of a run: the same questions for whatever is compared."""
    return jax.random.fold_in(jax.random.PRNGKey(config.seed), 5)


def _periodic_evaluation(
    config: ml_collections.ConfigDict,
) -> Callable[[TokenState], dict[str, float]]:
    # Other questions than those of the reported evaluations: the best checkpoint is chosen by it.
    key = jax.random.fold_in(evaluation_key(config), 1)
    evaluator = make_evaluator(config, key, questions=config.run.eval_episodes)

    def evaluation(learner: TokenState) -> dict[str, float]:
        acting = learner.without_optimiser()
        described = describe(evaluator(acting, "train"))
        blind = describe(evaluator(acting, "train", swapped=True))["accuracy"]
        return {f"eval/train/{name}": value for name, value in described.items()} | {
            "eval/train/blind_accuracy": blind
        }

    return evaluation


def _nothing(learner: TokenState) -> Any:
    """Frozen variables where everything is trained."""
    return jax.tree.map(lambda _: None, learner.params)


def _everywhere(carry: Carry, *, mesh: Mesh) -> Carry:
    """A copy of the carry on every device; minibatches are split as they are learned from."""
    return jax.tree.map(lambda _: mesh_lib.replicated(mesh), carry)
