"""Learners of token policies on a tiny vision-language model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmrl_jax.learners import grpo, sft, token_learner
from mmrl_jax.models.encoders import VisionEncoder
from mmrl_jax.models.language import LanguageModel, Rope
from mmrl_jax.models.lora import split
from mmrl_jax.models.transformer import BlockSpec
from mmrl_jax.models.vlm import PatchVision, VisionLanguageModel
from mmrl_jax.rl.token_losses import TokenLoss
from mmrl_jax.rollouts.generate import Sampling
from mmrl_jax.tasks import shapes
from mmrl_jax.tasks.question import Words

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TASK = shapes.make(
    kinds=("count",),
    rows=2,
    height=16,
    width=16,
    counts=(0, 2),
    seen=(0, 2),
    distractors=1,
    image_tokens=4,
)
VOCABULARY = Words([*TASK.texts.prompts, *TASK.texts.answers]).size
MODEL = VisionLanguageModel(
    vision=PatchVision(VisionEncoder(16, 8, 0, 16, layers=0, heads=1)),
    language=LanguageModel(
        VOCABULARY, 16, 1, BlockSpec(heads=2, hidden=24, norm="rms"), (Rope(100.0, 8),)
    ),
    image_token=Words.IMAGE,
)
POLICY = token_learner.TokenPolicy(
    MODEL, length=TASK.texts.length, stop=Words.STOP, pad=Words.PAD, tile=16
)
OPTIMISER = optax.sgd(0.1)
PLAIN = grpo.Hyperparameters(
    advantage="centred",
    loss=TokenLoss(clip=None),
    temperature=1.0,
    epochs=1,
    minibatches=1,
    accumulate=1,
)


@functools.cache
def questions(count=4):
    return TASK.sample(jax.random.key(0), count, "train")


@functools.cache
def learner(trained=".*", reference=False):
    asked = questions()
    variables = MODEL.init(jax.random.key(1), asked.tokens, asked.present, asked.images)
    params, frozen = split(variables, trained)
    state = token_learner.init(params, optimiser=OPTIMISER, with_reference=reference)
    return state, frozen


@functools.cache
def experience():
    state, frozen = learner()
    answers = jit(functools.partial(POLICY.answer, group=3, sampling=Sampling()))(
        state.params, frozen, questions(), jax.random.key(2)
    )
    reward = jax.random.normal(jax.random.key(3), (4, 3))
    return grpo.Experience(questions(), answers, reward, jnp.ones((4, 3)))


def update(hyperparameters, state=None, frozen=None, given=None):
    if state is None:
        state, frozen = learner(reference=hyperparameters.loss.kl_weight > 0)
    step = functools.partial(
        grpo.update, policy=POLICY, optimiser=OPTIMISER, hyperparameters=hyperparameters
    )
    return jit(step)(state, frozen, given or experience(), jax.random.key(4))


def largest_difference(a, b):
    return max(
        float(np.abs(x - y).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_one_step_is_reinforce_written_out():
    state, frozen = learner()
    given = experience()
    new, metrics = update(PLAIN)
    advantage = given.reward - given.reward.mean(axis=1, keepdims=True)
    mask = given.answers.present

    def loss(params):
        found = POLICY.log_probs(
            params, frozen, given.question, given.answers.tokens, mask, temperature=1.0
        )
        return -jnp.sum(mask * found.log_prob * advantage[..., None]) / mask.sum()

    gradient = jit(jax.grad(loss))(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)
    assert largest_difference(state.params, expected) > 1e-3
    assert largest_difference(new.params, expected) < 1e-6
    assert float(metrics["policy/kl"]) < 1e-8
    assert (float(metrics["update/steps"]), float(metrics["update/skipped"])) == (1, 0)
    assert float(metrics["answer/length"]) == pytest.approx(float(mask.sum() / 12))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("token", "constant")]


@pytest.mark.parametrize("reduction", ["sequence", *SLOW])
def test_accumulated_gradients_are_those_of_the_whole(reduction):
    loss = TokenLoss(reduction=reduction, kl_weight=0.1, max_correction=2.0)
    whole = dataclasses.replace(PLAIN, loss=loss)
    one, _ = update(whole)
    parts, _ = update(dataclasses.replace(whole, accumulate=4))
    assert largest_difference(one.params, learner()[0].params) > 1e-3
    assert largest_difference(one.params, parts.params) < 1e-6


def test_a_model_without_vision_learns_from_text():
    asked = questions()._replace(images=None)
    variables = MODEL.language.init(jax.random.key(1), asked.tokens, asked.present)
    policy = dataclasses.replace(POLICY, model=MODEL.language)
    state = token_learner.init(variables, optimiser=OPTIMISER, with_reference=False)
    frozen = jax.tree.map(lambda _: None, variables)
    answers = jit(functools.partial(policy.answer, group=3, sampling=Sampling()))(
        state.params, frozen, asked, jax.random.key(2)
    )
    rows = jnp.repeat(asked.tokens, 3, axis=0)
    there = jnp.repeat(asked.present, 3, axis=0)
    rows = jnp.concatenate([rows, answers.tokens.reshape(12, -1)], axis=1)
    there = jnp.concatenate([there, answers.present.reshape(12, -1)], axis=1)
    logits = MODEL.language.apply(variables, rows, there)[:, -POLICY.length - 1 : -1]
    expected = jnp.take_along_axis(
        jax.nn.log_softmax(logits), rows[:, -POLICY.length :, None], axis=-1
    ).reshape(answers.log_probs.shape)
    expected = jnp.where(answers.present, expected, 0.0)
    np.testing.assert_allclose(answers.log_probs, expected, atol=1e-5)
    reward = jax.random.normal(jax.random.key(3), (4, 3))
    step = functools.partial(grpo.update, policy=policy, optimiser=OPTIMISER, hyperparameters=PLAIN)
    given = grpo.Experience(asked, answers, reward, jnp.ones((4, 3)))
    new, metrics = jit(step)(state, frozen, given, jax.random.key(4))
    assert largest_difference(new.params, state.params) > 1e-3
    assert float(metrics["policy/kl"]) < 1e-8


def test_later_epochs_see_their_ratio():
    _, first = update(PLAIN)
    _, more = update(dataclasses.replace(PLAIN, epochs=3, minibatches=2))
    assert float(more["update/steps"]) == 6
    assert float(more["policy/kl"]) > 1e-7 > float(first["policy/kl"])


def test_the_kl_to_the_reference_holds_the_policy_back():
    far, _ = update(dataclasses.replace(PLAIN, epochs=4))
    near, metrics = update(
        dataclasses.replace(PLAIN, epochs=4, loss=TokenLoss(clip=None, kl_weight=3.0))
    )
    start = learner()[0].params
    assert float(metrics["policy/reference_kl"]) > 0
    distance = [
        sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
        for pair in ((near.params, start), (far.params, start))
    ]
    assert distance[0] < distance[1]


def test_equal_rewards_teach_nothing():
    given = experience()._replace(reward=jnp.ones((4, 3)))
    new, metrics = update(PLAIN, *learner(), given)
    assert largest_difference(new.params, learner()[0].params) == 0
    assert float(metrics["answer/degenerate_groups"]) == 1


def test_the_frozen_half_has_no_gradient_and_no_optimiser():
    state, frozen = learner("params/vision/.*")
    new, _ = update(PLAIN, state, frozen)
    assert largest_difference(new.params, state.params) > 0
    moments = optax.adam(1.0).init(state.params)[0].mu
    assert {path[1].key for path, _ in jax.tree_util.tree_leaves_with_path(moments)} == {"vision"}


def test_pictures_that_were_dropped_stop_the_update():
    given = experience()
    asked = given.question
    dropped = asked._replace(tokens=jnp.where(asked.tokens == Words.IMAGE, 5, asked.tokens))
    new, metrics = update(PLAIN, *learner(), given._replace(question=dropped))
    assert (float(metrics["update/steps"]), float(metrics["update/skipped"])) == (0, 1)
    assert largest_difference(new.params, learner()[0].params) == 0


def test_supervised_fine_tuning_is_cross_entropy():
    state, frozen = learner()
    tokens, present = TASK.texts.labels(questions())
    step = functools.partial(sft.update, policy=POLICY, optimiser=OPTIMISER)
    new, metrics = jit(step)(state, frozen, questions(), tokens, present)
    rows = jnp.concatenate([questions().tokens, tokens], axis=1)
    there = jnp.concatenate([questions().present, present], axis=1)

    def loss(params):
        logits = MODEL.apply(params, rows, there, questions().images)[:, -tokens.shape[1] - 1 : -1]
        log_probs = jax.nn.log_softmax(logits)
        taken = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(present, taken, 0)) / present.sum()

    value, gradient = jit(jax.value_and_grad(loss))(state.params)
    assert metrics["loss/answer"] == pytest.approx(float(value), rel=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)
    assert largest_difference(new.params, expected) < 1e-6
