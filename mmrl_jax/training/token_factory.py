"""Builds a run of a token policy from its config; what every key means is in `SCHEMA`.

With `factory.py` the only module that reads a ConfigDict.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple, cast

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
from mmrl_jax.models import lora
from mmrl_jax.models.encoders import VisionEncoder, VisionProjection
from mmrl_jax.models.language import LanguageModel, Rope
from mmrl_jax.models.transformer import BlockSpec
from mmrl_jax.models.vlm import PatchVision, VisionLanguageModel, check_counts
from mmrl_jax.pretrained import chat, hub
from mmrl_jax.rl.token_losses import KLS, PRESETS
from mmrl_jax.rollouts.generate import Sampling
from mmrl_jax.tasks import shapes
from mmrl_jax.tasks.question import Question, Words
from mmrl_jax.training import config as config_lib
from mmrl_jax.training.config import Field, anything, non_negative, one_of, positive
from mmrl_jax.training.factory import DTYPES, LORA, adam, with_adapters
from mmrl_jax.training.factory import SCHEMA as CONTROL
from mmrl_jax.training.loop import Carry, Stage
from mmrl_jax.types import Metrics, Params

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
        "language": anything(
            (str, type(None)),
            "'smollm2', or a directory of a decoder that was trained to chat, whose tokens and "
            "chat template the texts have; None for one from scratch, of 'width' and 'layers'",
        ),
        "width": positive(int, "of the tokens; beside a pretrained decoder, of the patches'"),
        "layers": positive(int, "blocks of the language model"),
        "heads": positive(int, "attention heads; must divide the width"),
        "mlp_ratio": positive(int, "hidden width of a block's MLP over the width"),
        "patch": positive(int, "edge of an image patch, pixels; must divide height and width"),
        "patch_margin": non_negative(int, "pixels around a patch that its token sees too"),
        "patch_hidden": positive(int, "hidden units of the per-patch perceptron"),
        "vision_layers": non_negative(int, "blocks among the patches"),
        "lora": LORA,
        "dtype": one_of(tuple(DTYPES), "of the computation; parameters are float32"),
        "remat": anything(bool, "recompute activations in the backward pass"),
    },
    "sft": {
        "updates": non_negative(int, "optimiser steps of supervised fine-tuning; 0 for none"),
        "examples": positive(int, "labelled questions, a fixed set"),
        "counts": anything(tuple, "(least, most) that is counted in the labelled questions"),
        "batch_size": positive(int, "questions an optimiser step"),
        "trained": anything(
            str, "pattern of the paths of variables, params/... or lora/...; others are frozen"
        ),
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
        "trained": anything(str, "as sft.trained; the KL's reference has the frozen ones too"),
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
    labelled(config, make_parts(config).task)
    # Cells that are too small are refused when they are drawn.
    drawn = jax.eval_shape(functools.partial(draw_variables, config), jax.random.key(0))
    for stage in ("sft", "grpo"):
        halves(drawn, config, stage)


def make_parts(config: ml_collections.ConfigDict) -> Parts:
    """The task and the model of a config.

    Raises:
      ValueError: see `shapes.make`, `vlm.check_counts`, and of a pretrained language model
        `hub.read_blueprint` and `chat.read_chat`.
    """
    t, m = config.task, config.model
    patches, dtype = (t.height // m.patch) * (t.width // m.patch), DTYPES[m.dtype]
    ask = functools.partial(
        shapes.make,
        kinds=tuple(t.kinds),
        rows=t.rows,
        height=t.height,
        width=t.width,
        counts=tuple(t.counts),
        seen=tuple(t.counts),
        distractors=t.distractors,
    )
    if m.language is None:
        task, projector = ask(image_tokens=patches), None
        image, stop = Words.IMAGE, Words.STOP
        language = _small_decoder(config, Words([*task.texts.prompts, *task.texts.answers]).size)
    else:
        language, said = _pretrained(config)
        image, stop = said.image, said.stop
        projector = VisionProjection(language.width, dtype)
        task = ask(
            encode_prompt=functools.partial(said.prompt, images=patches),
            encode_answer=said.answer,
            pad=stop,
        )
    encoder = VisionEncoder(
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
    model = VisionLanguageModel(PatchVision(encoder, projector), language, image)
    present = np.ones((len(task.texts.prompts), patches), bool)
    check_counts(task.texts.prompt_tokens == image, present)
    return Parts(task, TokenPolicy(model, task.texts.length, stop, task.texts.pad))


def _small_decoder(config: ml_collections.ConfigDict, vocabulary: int) -> LanguageModel:
    """A language model to be trained from scratch."""
    m = config.model
    block = BlockSpec(
        heads=m.heads,
        hidden=m.mlp_ratio * m.width,
        norm="rms",
        activation="silu",
        gated=True,
        biases=(),
    )
    return LanguageModel(
        vocabulary=vocabulary,
        width=m.width,
        layers=m.layers,
        block=block,
        ropes=(Rope(100.0, m.width // m.heads),),
        dtype=DTYPES[m.dtype],
        remat=m.remat,
    )


def _pretrained(config: ml_collections.ConfigDict) -> tuple[LanguageModel, chat.Chat]:
    """The language model of model.language, and its texts; for errors see `make_parts`."""
    m = config.model
    try:
        directory = chat.directory_of(m.language)
        plan = hub.read_blueprint("language_model", directory, dtype=DTYPES[m.dtype], remat=m.remat)
        language = cast(LanguageModel, plan.model)
        # No text has the id that is the vocabulary's size.
        return language, chat.read_chat(directory, language.vocabulary)
    except ValueError as error:
        raise ValueError(f"model.language={m.language!r}: {error}") from error


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


def draw_variables(config: ml_collections.ConfigDict, key: jax.Array) -> Params:
    """The model's variables, all of them newly drawn; float32.

    Raises:
      ValueError: model.lora.pattern matches no layer.
    """
    task, policy = make_parts(config)
    asked = task.sample(key, 1, "train")
    params = policy.model.init(key, asked.tokens, asked.present, asked.images)["params"]
    return with_adapters(params, config.model.lora, jax.random.fold_in(key, 1))


def make_variables(config: ml_collections.ConfigDict, *, start: TokenState | None = None) -> Params:
    """The model's variables as a run begins with them: a pretrained decoder's are read.

    Args:
      config: of the run.
      start: learner of supervised fine-tuning, whose half is taken from it.

    Returns:
      {'params': ...}, and with adapters 'lora'; float32.
    """
    loaded = {}
    if config.model.language is not None:
        directory = chat.directory_of(config.model.language)
        loaded["language"] = hub.load_language_model(directory).params["params"]

    @jax.jit
    def draw(key: jax.Array) -> Params:
        # What is loaded is not returned, and so not drawn either.
        drawn = draw_variables(config, key)
        kept = {name: x for name, x in drawn["params"].items() if name not in loaded}
        return drawn | {"params": kept}

    variables = draw(jax.random.fold_in(jax.random.PRNGKey(config.seed), 0))
    variables = variables | {"params": variables["params"] | loaded}
    if start is None:
        return variables
    _, frozen = halves(variables, config, "sft")
    return lora.join(start.params, frozen)


def halves(variables: Params, config: ml_collections.ConfigDict, stage: str) -> tuple[Params, Any]:
    """What a stage, 'sft' or 'grpo', trains of the variables and what it does not.

    Raises:
      ValueError: it trains nothing.
    """
    try:
        return lora.split(variables, config[stage].trained)
    except ValueError as error:
        raise ValueError(f"{stage}.trained: {error}") from error


def sft_stage(config: ml_collections.ConfigDict, mesh: Mesh) -> Stage:
    """Supervised fine-tuning on the labelled questions."""
    s, (task, policy) = config.sft, make_parts(config)
    few = labelled(config, task)
    optimiser = adam(s.learning_rate, s.max_grad_norm)
    labels_key = jax.random.fold_in(jax.random.PRNGKey(config.seed), 1)
    trained, frozen = halves(make_variables(config), config, "sft")
    frozen = jax.device_put(frozen, mesh_lib.replicated(mesh))

    @jax.jit
    def label(rng: jax.Array) -> tuple[Question, jax.Array, jax.Array]:
        asked = few.sample(rng, s.examples, "train")
        return (asked, *few.texts.labels(asked))

    def init() -> Carry:
        learner = token_learner.init(trained, optimiser=optimiser, with_reference=False)
        rng = jax.random.fold_in(jax.random.PRNGKey(config.seed), 2)
        return Carry(learner, None, rng, jnp.zeros((), jnp.int32))

    def update(carry: Carry, data: Any) -> tuple[Carry, Metrics]:
        frozen, labels = data
        rng = jax.random.fold_in(carry.rng, carry.updates)
        chosen = jax.random.randint(rng, (s.batch_size,), 0, s.examples)
        learner, metrics = sft.update(
            carry.learner,
            frozen,
            *jax.tree.map(lambda x: x[chosen], labels),
            policy=policy,
            optimiser=optimiser,
            shard=functools.partial(mesh_lib.constrain_batch, mesh=mesh),
        )
        return carry.replace(learner=learner, updates=carry.updates + 1), metrics

    return Stage(
        name="sft",
        init=init,
        update=update,
        data=(frozen, jax.device_put(label(labels_key), mesh_lib.replicated(mesh))),
        updates=s.updates,
        updates_per_dispatch=s.updates_per_dispatch,
        env_steps_per_update=0,
        samples_per_update=s.batch_size,
        evaluate=_periodic_evaluation(config, frozen),
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
    """The GRPO family on rewards alone, from scratch or from what was fine-tuned."""
    g, (task, policy) = config.grpo, make_parts(config)
    trained, frozen = halves(make_variables(config, start=start), config, "grpo")
    frozen = jax.device_put(frozen, mesh_lib.replicated(mesh))
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
        learner = token_learner.init(trained, optimiser=optimiser, with_reference=g.kl_weight > 0)
        rng = jax.random.fold_in(jax.random.PRNGKey(config.seed), 3)
        return Carry(learner, None, rng, jnp.zeros((), jnp.int32))

    def update(carry: Carry, frozen: Any) -> tuple[Carry, Metrics]:
        rng = jax.random.fold_in(carry.rng, carry.updates)
        ask_key, answer_key, learn_key = jax.random.split(rng, 3)
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
        data=frozen,
        updates=config.run.updates,
        updates_per_dispatch=config.run.updates_per_dispatch,
        env_steps_per_update=0,
        samples_per_update=g.questions * g.group,
        evaluate=_periodic_evaluation(config, frozen),
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
    """Evaluates the greedy answers of models of this config, made of trained and frozen half."""
    task, policy = make_parts(config)

    def answer(
        made_of: tuple[Params, Any], question: Question, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        answers = policy.answer(
            *made_of, question, rng, group=1, sampling=Sampling(temperature=0.0)
        )
        return answers.tokens, answers.present

    return QuestionEvaluator(task, answer, rng, questions=questions)


def evaluation_key(config: ml_collections.ConfigDict) -> jax.Array:
    """The key of every evaluation of a run: the same questions for whatever is compared."""
    return jax.random.fold_in(jax.random.PRNGKey(config.seed), 5)


def _periodic_evaluation(
    config: ml_collections.ConfigDict, frozen: Any
) -> Callable[[TokenState], dict[str, float]]:
    # Other questions than those of the reported evaluations: the best checkpoint is chosen by it.
    key = jax.random.fold_in(evaluation_key(config), 1)
    evaluator = make_evaluator(config, key, questions=config.run.eval_episodes)

    def evaluation(learner: TokenState) -> dict[str, float]:
        made_of = (learner.params, frozen)
        described = describe(evaluator(made_of, "train"))
        blind = describe(evaluator(made_of, "train", swapped=True))["accuracy"]
        return {f"eval/train/{name}": value for name, value in described.items()} | {
            "eval/train/blind_accuracy": blind
        }

    return evaluation


def _everywhere(carry: Carry, *, mesh: Mesh) -> Carry:
    """A copy of the carry on every device; minibatches are split as they are learned from."""
    return jax.tree.map(lambda _: mesh_lib.replicated(mesh), carry)
