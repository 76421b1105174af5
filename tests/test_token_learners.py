"""Learners of token policies on a tiny vision-language model."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmrl_jax.distributed import mesh as meshes
from mmrl_jax.learners import dpo, grpo, sft, token_learner, token_ppo
from mmrl_jax.learners.learner import map_in_chunks
from mmrl_jax.models.encoders import VisionEncoder
from mmrl_jax.models.language import LanguageModel, Rope
from mmrl_jax.models.lora import split
from mmrl_jax.models.transformer import BlockSpec
from mmrl_jax.models.vlm import PatchVision, VisionLanguageModel
from mmrl_jax.rl import advantages, group_advantages, losses
from mmrl_jax.rl.token_log_probs import TokenLogProbs
from mmrl_jax.rl.token_losses import PRESETS, TokenLoss
from mmrl_jax.rollouts.generate import Completions, Sampling
from mmrl_jax.tasks import shapes
from mmrl_jax.tasks.question import WordTokenizer
from mmrl_jax.training import config as config_lib
from mmrl_jax.training import token_stages
from mmrl_jax.types import Transition

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TASK = shapes.make(
    kinds=("count",),
    rows=2,
    height=16,
    width=16,
    counts=(0, 2),
    seen=(0, 2),
    distractors=1,
    levels=("medium",),
    image_tokens=4,
)
VOCABULARY = WordTokenizer([*TASK.texts.prompts, *TASK.texts.answers]).size
MODEL = VisionLanguageModel(
    vision=PatchVision(VisionEncoder(16, 8, 0, 16, layers=0, heads=1)),
    language=LanguageModel(
        VOCABULARY, 16, 1, BlockSpec(heads=2, hidden=24, norm="rms"), (Rope(100.0, 8),)
    ),
    image_token=WordTokenizer.image,
)
POLICY = token_learner.TokenPolicy(
    MODEL, length=TASK.texts.length, stop=WordTokenizer.stops, pad=WordTokenizer.pad, tile=16
)
OPTIMIZER = optax.sgd(0.1)
PLAIN = grpo.Hyperparameters(
    advantage=group_advantages.centered,
    loss=TokenLoss(clip=None),
    entropy_weight=0.0,
    temperature=1.0,
    epochs=1,
    minibatches=1,
    grad_accum_steps=1,
)


@functools.cache
def questions(count=4):
    return TASK.sample(jax.random.key(0), count, "train")


@functools.cache
def learner(trained=".*", reference=False):
    asked = questions()
    variables = MODEL.init(jax.random.key(1), asked.tokens, asked.present, asked.images)
    params, frozen = split(variables, trained)
    state = token_learner.init(params, optimizer=OPTIMIZER, with_reference=reference)
    return state, frozen


@functools.cache
def experience():
    state, frozen = learner()
    answers = jit(functools.partial(POLICY.answer, group=3, sampling=Sampling()))(
        state.params, frozen, questions(), jax.random.key(2)
    )
    reward = jax.random.normal(jax.random.key(3), (4, 3))
    return grpo.ScoredCompletions(questions(), answers, reward, jnp.ones((4, 3)))


def update(hyperparameters, state=None, frozen=None, given=None):
    if state is None:
        state, frozen = learner(reference=hyperparameters.loss.kl_weight > 0)
    step = functools.partial(
        grpo.update, policy=POLICY, optimizer=OPTIMIZER, hyperparameters=hyperparameters
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
    assert float(metrics["policy/approx_kl"]) < 1e-8
    assert (float(metrics["update/steps"]), float(metrics["optimizer/skipped_steps"])) == (1, 0)
    described = grpo.describe(given)
    assert float(described["completion/length"]) == pytest.approx(float(mask.sum() / 12))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("token", "constant")]


@pytest.mark.parametrize("reduction", ["sequence", *SLOW])
def test_accumulated_gradients_are_those_of_the_whole(reduction):
    loss = TokenLoss(reduction=reduction, kl_weight=0.1, max_correction=2.0)
    whole = dataclasses.replace(PLAIN, loss=loss)
    one, _ = update(whole)
    parts, _ = update(dataclasses.replace(whole, grad_accum_steps=4))
    assert largest_difference(one.params, learner()[0].params) > 1e-3
    assert largest_difference(one.params, parts.params) < 1e-6


def test_what_is_worked_out_in_parts_comes_back_in_order():
    x = {"a": jnp.arange(12), "b": jnp.arange(24).reshape(12, 2)}
    found = map_in_chunks(lambda part: jax.tree.map(lambda x: 2 * x, part), x, 3)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), found, x)


def test_two_devices_learn_what_one_does_and_no_answer_moves():
    state, frozen = learner()
    asked = TASK.sample(jax.random.key(0), 8, "train")
    answers = jit(functools.partial(POLICY.answer, group=3, sampling=Sampling()))(
        state.params, frozen, asked, jax.random.key(2)
    )
    given = grpo.ScoredCompletions(
        asked, answers, jax.random.normal(jax.random.key(3), (8, 3)), jnp.ones((8, 3))
    )
    hyperparameters = dataclasses.replace(PLAIN, epochs=2, minibatches=2, grad_accum_steps=2)

    def updated(devices):
        mesh = meshes.make_mesh(devices)
        step = functools.partial(
            grpo.update,
            policy=dataclasses.replace(POLICY, pack_rows=2),
            optimizer=OPTIMIZER,
            hyperparameters=hyperparameters,
            shard=functools.partial(meshes.constrain_batch, mesh=mesh),
        )
        arguments = (
            *jax.device_put((state, frozen), meshes.replicated(mesh)),
            jax.device_put(given, meshes.batch_sharding(mesh, 0)),
            jax.device_put(jax.random.key(4), meshes.replicated(mesh)),
        )
        compiled = jit(step).lower(*arguments).compile()
        moved = re.findall(r" (all-gather|all-to-all|collective-permute)\(", compiled.as_text())
        return jax.device_get(compiled(*arguments)[0].params), moved

    (one, _), (two, moved) = updated(1), updated(2)
    assert largest_difference(one, state.params) > 1e-3
    assert largest_difference(one, two) < 1e-6
    assert not moved


def test_a_model_without_vision_learns_from_text():
    asked = questions()._replace(images=None)
    variables = MODEL.language.init(jax.random.key(1), asked.tokens, asked.present)
    policy = dataclasses.replace(POLICY, model=MODEL.language)
    state = token_learner.init(variables, optimizer=OPTIMIZER, with_reference=False)
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
    step = functools.partial(grpo.update, policy=policy, optimizer=OPTIMIZER, hyperparameters=PLAIN)
    given = grpo.ScoredCompletions(asked, answers, reward, jnp.ones((4, 3)))
    new, metrics = jit(step)(state, frozen, given, jax.random.key(4))
    assert largest_difference(new.params, state.params) > 1e-3
    assert float(metrics["policy/approx_kl"]) < 1e-8


def test_later_epochs_see_their_ratio():
    _, first = update(PLAIN)
    _, more = update(dataclasses.replace(PLAIN, epochs=3, minibatches=2))
    assert float(more["update/steps"]) == 6
    assert float(more["policy/approx_kl"]) > 1e-7 > float(first["policy/approx_kl"])


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


def test_the_entropy_bonus_raises_the_entropy():
    # Without a difference of rewards there is nothing else to learn.
    given = experience()._replace(reward=jnp.ones((4, 3)))
    _, metrics = update(dataclasses.replace(PLAIN, entropy_weight=1.0, epochs=8), *learner(), given)
    _, before = update(PLAIN)
    assert float(metrics["policy/entropy"]) > float(before["policy/entropy"]) + 1e-4


def test_an_answer_without_a_score_has_no_influence():
    # Neither by its reward nor by what the KL and the entropy make of its tokens.
    h = dataclasses.replace(PLAIN, loss=TokenLoss(kl_weight=0.3), entropy_weight=0.1, epochs=2)
    given = experience()
    scored = given.scored.at[0, 1].set(0.0).at[2, 0].set(0.0)

    def without(token, reward):
        answers, unscored = given.answers, scored[..., None] == 0
        tokens = jnp.where(unscored, token, answers.tokens)
        return given._replace(
            answers=answers._replace(tokens=tokens),
            reward=jnp.where(scored > 0, given.reward, reward),
            scored=scored,
        )

    one, other = (update(h, given=without(*x))[0] for x in ((5, 0.0), (6, 9.0)))
    assert largest_difference(one.params, learner()[0].params) > 1e-3
    assert largest_difference(one.params, other.params) < 1e-7


@dataclasses.dataclass(frozen=True)
class TablePolicy:
    """A policy with a parameter w for each token of each completion: log p = -softplus(w)."""

    dtype: jnp.dtype

    def log_probs(self, params, frozen, question, tokens, present, *, temperature):
        log_prob = -jax.nn.softplus(params[question.answer].astype(self.dtype))
        return TokenLogProbs(log_prob.astype(jnp.float32), jnp.zeros(tokens.shape))


def table_update(dtype, hyperparameters, scored):
    """An update of a `TablePolicy` by plain gradient steps, on what a float32 sampler drew."""
    table = jax.random.normal(jax.random.key(0), (4, 3, 5))
    length = jnp.array([[5, 2, 1], [3, 3, 4], [1, 5, 2], [4, 4, 1]])
    present = jnp.arange(5) < length[..., None]
    drawn = Completions(
        jnp.zeros((4, 3, 5), jnp.int32), -jax.nn.softplus(table), present, length < 5
    )
    reward = jax.random.normal(jax.random.key(1), (4, 3))
    asked = jax.tree.map(lambda x: x[:4], questions())._replace(answer=jnp.arange(4))
    state = token_learner.init(table, optimizer=optax.sgd(1.0), with_reference=False)
    step = functools.partial(
        grpo.update,
        policy=TablePolicy(dtype),
        optimizer=optax.sgd(1.0),
        hyperparameters=hyperparameters,
    )
    given = grpo.ScoredCompletions(asked, drawn, reward, scored)
    new, metrics = jit(step)(state, None, given, jax.random.key(2))
    return table, new.params, hyperparameters.advantage(reward, scored), length, metrics


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_policy_that_has_not_moved_is_not_clipped_in_bfloat16(minibatches):
    # Each completion has parameters of its own, and one step: its ratio is 1, whatever the sampler
    # rounded to. GSPO's interval is the narrowest, [1 - 3e-4, 1 + 4e-4].
    h = dataclasses.replace(PLAIN, loss=PRESETS["gspo"][1], minibatches=minibatches)
    before, after, advantage, length, metrics = table_update(jnp.bfloat16, h, jnp.ones((4, 3)))
    for clipped in ("clip_ratio_low", "clip_ratio_high", "approx_kl"):
        assert float(metrics[f"policy/{clipped}"]) == 0
    rises = jnp.sign(after - before) == -jnp.sign(advantage)[..., None]
    assert (jnp.abs(advantage) > 1e-3).all()
    np.testing.assert_array_equal(rises, jnp.arange(5) < length[..., None])
    assert float(metrics["policy/sampler_gap"]) > 1e-4


@pytest.mark.parametrize("reduction", ["sequence", "constant"])
@pytest.mark.parametrize(("minibatches", "grad_accum_steps"), [(1, 2), (2, 2)])
def test_a_completion_without_a_reward_is_in_no_divisor(reduction, minibatches, grad_accum_steps):
    # Of each question two of three completions are scored, so that a minibatch has 8 or 4; one
    # step moves w by A * d log p / dw over the divisor, and d log p / dw = -sigmoid(w).
    loss = TokenLoss(clip=None, reduction=reduction)
    h = dataclasses.replace(
        PLAIN, loss=loss, minibatches=minibatches, grad_accum_steps=grad_accum_steps
    )
    scored = jnp.array([[1.0, 1, 0], [1, 1, 0], [1, 0, 1], [1, 1, 0]])
    before, after, advantage, length, _ = table_update(jnp.float32, h, scored)
    loss_denominator = 8 / minibatches * (length[..., None] if reduction == "sequence" else 5)
    expected = -advantage[..., None] * jax.nn.sigmoid(before) / loss_denominator
    expected = jnp.where(jnp.arange(5) < length[..., None], expected, 0.0)
    np.testing.assert_allclose(after - before, expected, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_truncated_completions_are_left_out_of_the_loss_alone(masked):
    # Three of twelve completions have all 5 tokens, and are truncated. The advantages are those of
    # all rewards: by d log p / dw = -sigmoid(w), a token moves by A * -sigmoid(w) over how many
    # tokens are learned from.
    h = dataclasses.replace(PLAIN, mask_truncated_completions=masked)
    before, after, advantage, length, _ = table_update(jnp.float32, h, jnp.ones((4, 3)))
    learned = jnp.arange(5) < length[..., None]
    if masked:
        learned &= (length < 5)[..., None]
    expected = -advantage[..., None] * jax.nn.sigmoid(before) / jnp.sum(learned)
    np.testing.assert_allclose(after - before, jnp.where(learned, expected, 0.0), atol=1e-6)


def test_dpo_and_ppo_prefer_and_learn_from_no_truncated_completion():
    given = experience()._replace(reward=jnp.array([[0.0, 1, 2]] * 4))
    finished = jnp.array([[True, True, False]] * 4)
    given = given._replace(answers=given.answers._replace(finished=finished))
    taken = {}

    def spy(name):
        return lambda *args, **_: taken.setdefault(name, args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo, "update", spy("dpo"))
        patch.setattr(token_ppo, "update", spy("token_ppo"))
        for algorithm in ("dpo", "token_ppo"):
            config = config_lib.load_config("configs/count_grpo.py")
            config.algorithm, config.rl.mask_truncated_completions = algorithm, True
            optimization = token_stages.make_optimization(config)
            learn = token_stages.make_learn(config, meshes.make_mesh(1), POLICY, optimization)
            learn(None, None, given, jax.random.key(0))
    chosen = taken["dpo"][2].tokens
    np.testing.assert_array_equal(chosen, given.answers.tokens[:, [1, 0]])
    batch = taken["token_ppo"][2]
    np.testing.assert_array_equal(batch.valid, finished[None])
    np.testing.assert_array_equal(batch.action.finished, finished[None])


def test_overlong_completions_lose_reward_where_it_is_known():
    given = experience()
    present = jnp.arange(5) < jnp.array([[3, 4, 5]] * 4)[..., None]
    given = given._replace(
        answers=given.answers._replace(present=present),
        reward=jnp.ones((4, 3)).at[0].set(0.0),
        scored=jnp.ones((4, 3)).at[0].set(0.0),
    )
    config = config_lib.load_config("configs/count_grpo.py")
    assert token_stages.shape_rewards(config, given) is given
    config.rl.overlong_buffer = 2
    # Of the last two of five tokens each costs a half.
    shaped = token_stages.shape_rewards(config, given)
    np.testing.assert_array_equal(shaped.reward[1:], [[1, 0.5, 0]] * 3)
    np.testing.assert_array_equal(shaped.reward[0], 0.0)
    token_stages.check_overlong(config, 2)
    with pytest.raises(ValueError, match="rl.overlong_buffer=2 is more than the 1 tokens"):
        token_stages.check_overlong(config, 1)


def test_equal_rewards_teach_nothing():
    given = experience()._replace(reward=jnp.ones((4, 3)))
    new, _ = update(PLAIN, *learner(), given)
    assert largest_difference(new.params, learner()[0].params) == 0
    assert float(grpo.describe(given)["reward/zero_std_groups"]) == 1


def test_questions_with_different_rewards_come_first():
    given = experience()._replace(reward=jnp.array([[1.0, 1, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]]))
    kept = grpo.dynamic_sampling(given, 3)
    np.testing.assert_array_equal(kept.reward, given.reward[jnp.array([1, 3, 0])])
    np.testing.assert_array_equal(kept.question.images, given.question.images[jnp.array([1, 3, 0])])


def test_the_reference_follows_the_policy():
    state, _ = learner(reference=True)
    moved = state.replace(params=jax.tree.map(lambda x: x + 1, state.params))
    same, near = (token_learner.move_reference(moved, decay) for decay in (1.0, 0.75))
    assert largest_difference(same.reference, state.params) == 0
    expected = jax.tree.map(lambda x: x + 0.25, state.params)
    assert largest_difference(near.reference, expected) < 1e-6


def test_the_frozen_half_has_no_gradient_and_no_optimizer():
    state, frozen = learner("params/vision/.*")
    new, _ = update(PLAIN, state, frozen)
    assert largest_difference(new.params, state.params) > 0
    moments = optax.adam(1.0).init(state.params)[0].mu
    assert {path[1].key for path, _ in jax.tree_util.tree_leaves_with_path(moments)} == {"vision"}


def test_pictures_that_were_dropped_stop_the_update():
    given = experience()
    asked = given.question
    dropped = asked._replace(tokens=jnp.where(asked.tokens == WordTokenizer.image, 5, asked.tokens))
    new, metrics = update(PLAIN, *learner(), given._replace(question=dropped))
    assert (float(metrics["update/steps"]), float(metrics["optimizer/skipped_steps"])) == (0, 1)
    assert largest_difference(new.params, learner()[0].params) == 0


def test_supervised_fine_tuning_is_cross_entropy():
    state, frozen = learner()
    tokens, present = TASK.texts.labels(questions().answer)
    step = functools.partial(sft.update, policy=POLICY, optimizer=OPTIMIZER)
    new, metrics = jit(step)(state, frozen, questions(), tokens, present)
    rows = jnp.concatenate([questions().tokens, tokens], axis=1)
    there = jnp.concatenate([questions().present, present], axis=1)

    def loss(params):
        logits = MODEL.apply(params, rows, there, questions().images)[:, -tokens.shape[1] - 1 : -1]
        log_probs = jax.nn.log_softmax(logits)
        taken = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(present, taken, 0)) / present.sum()

    value, gradient = jit(jax.value_and_grad(loss))(state.params)
    assert metrics["loss/sft"] == pytest.approx(float(value), rel=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)
    assert largest_difference(new.params, expected) < 1e-6


def preferences(weight=(1.0, 1.0, 0.0, 1.0)):
    answers = experience().answers
    return dpo.Preferences(
        questions(), answers.tokens[:, :2], answers.present[:, :2], jnp.asarray(weight)
    )


def prefer(given, **hyperparameters):
    state, frozen = learner(reference=True)
    h = dict(beta=0.5, label_smoothing=0.0, epochs=1, minibatches=1, grad_accum_steps=1)
    step = functools.partial(
        dpo.update,
        policy=POLICY,
        optimizer=OPTIMIZER,
        hyperparameters=dpo.Hyperparameters(**h | hyperparameters),
    )
    return jit(step)(state, frozen, given, jax.random.key(4))


def test_one_step_of_dpo_is_written_out():
    # At the reference the margin is 0, and the gradient -beta / 2 * grad(chosen - rejected).
    given = preferences()
    new, metrics = prefer(given)
    state, frozen = learner(reference=True)

    def margin(params):
        found = POLICY.log_probs(
            params, frozen, given.question, given.tokens, given.present, temperature=1.0
        )
        whole = jnp.sum(jnp.where(given.present, found.log_prob, 0.0), axis=-1)
        return jnp.sum(given.weight * (whole[:, 0] - whole[:, 1])) / 3

    gradient = jit(jax.grad(margin))(state.params)
    expected = jax.tree.map(lambda p, g: p + 0.1 * 0.25 * g, state.params, gradient)
    assert largest_difference(state.params, expected) > 1e-3
    assert largest_difference(new.params, expected) < 1e-6
    assert float(metrics["loss/policy"]) == pytest.approx(np.log(2), rel=1e-5)
    assert float(metrics["completion/preferences"]) == 0.75
    parts, _ = prefer(given, grad_accum_steps=4)
    assert largest_difference(new.params, parts.params) < 1e-6


def test_no_preference_teaches_nothing_and_more_steps_widen_the_margin():
    same, _ = prefer(preferences(weight=(0.0,) * 4))
    assert largest_difference(same.params, learner()[0].params) == 0
    _, metrics = prefer(preferences(), epochs=8)
    assert float(metrics["dpo/reward_margin"]) > 0.01
    assert float(metrics["loss/policy"]) < np.log(2)


def test_best_and_worst_answers_are_preferred():
    answers = experience().answers
    reward = jnp.array([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0], [9.0, 0.2, 0.1], [2.0, -9.0, -9.0]])
    scored = jnp.array([[1.0, 1, 1], [1, 1, 1], [0, 1, 1], [1, 0, 0]])
    found = dpo.best_and_worst(questions(), answers.tokens, answers.present, reward, scored)
    np.testing.assert_array_equal(found.weight, [1, 0, 1, 0])
    for row, which in ((0, [1, 0]), (2, [1, 2])):
        np.testing.assert_array_equal(found.tokens[row], answers.tokens[row, jnp.array(which)])
        np.testing.assert_array_equal(found.present[row], answers.present[row, jnp.array(which)])


@functools.cache
def turns():
    """Two turns of two episodes, whose answers are the first ones of `experience`."""
    zeros = jnp.zeros((2, 2))
    answers = jax.tree.map(lambda x: x[:, 0].reshape(2, 2, -1), experience().answers)
    batch = Transition(
        observation=jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), questions()),
        action=answers,
        log_prob=zeros,
        value=zeros,
        reward=jnp.array([[0.0, 1.0], [jnp.nan, 2.0]]),
        terminated=zeros.at[0, 1].set(1.0),
        truncated=zeros,
        valid=jnp.array([[1.0, 1.0], [0.0, 1.0]]),
        privileged={},
        metrics={},
    )
    return token_ppo.one_completion(batch), jax.tree.map(lambda x: x[:2], questions())


def with_value(reference=False):
    state, _ = learner()
    params = token_learner.with_value_head(jax.random.key(5), state.params, 16)
    state = token_learner.init(params, optimizer=OPTIMIZER, with_reference=reference)
    return state, jax.tree.map(lambda _: None, params)


def ppo_update(state=None, batch=None, **hyperparameters):
    h = dict(
        discount=0.9, gae_lambda=0.8, loss=TokenLoss(), value_clip=None, value_weight=0.5,
        entropy_weight=0.01, temperature=1.0, epochs=1, minibatches=1, grad_accum_steps=1,
    )  # fmt: skip
    start, frozen = with_value()
    step = functools.partial(
        token_ppo.update,
        policy=POLICY,
        optimizer=OPTIMIZER,
        hyperparameters=token_ppo.Hyperparameters(**h | hyperparameters),
    )
    given, last = (batch, None) if batch else turns()
    return jit(step)(state or start, frozen, given, last, jax.random.key(4))


def test_one_step_of_token_ppo_is_written_out():
    new, metrics = ppo_update()
    (state, frozen), (batch, last) = with_value(), turns()
    mask = (batch.action.present & (batch.valid > 0)[..., None]).astype(jnp.float32)

    def read(params):
        flat = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), (batch.observation, batch.action)
        )
        found, value = POLICY.log_probs_and_values(
            params, frozen, flat[0], flat[1].tokens, flat[1].present, temperature=1.0
        )
        return [x.reshape(mask.shape) for x in (found.log_prob, found.entropy, value)]

    first = jnp.zeros((2, 1, 1), jnp.int32)

    @jit
    def values(params):
        _, behind = POLICY.log_probs_and_values(
            params, frozen, last, first, first == 0, temperature=1.0
        )
        return read(params)[2], behind

    value, behind = values(state.params)
    advantage, target = advantages.token_advantages(
        reward=batch.reward[..., 0].at[1, 0].set(0.0),
        value=value[:, :, 0],
        last_value=behind[:, 0, 0],
        present=batch.action.present[:, :, 0],
        terminated=batch.terminated[..., 0],
        truncated=jnp.array([[1.0, 0.0], [0.0, 0.0]]),  # The first episode broke after one turn.
        discount=0.9,
        lambda_=0.8,
    )
    advantage, target = (x[:, :, None] for x in (advantage, target))
    advantage = losses.whiten(advantage, mask)

    def loss(params):
        log_prob, entropy, value = read(params)
        terms = -log_prob * advantage + 0.25 * (value - target) ** 2 - 0.01 * entropy
        return jnp.sum(jnp.where(mask > 0, terms, 0.0)) / mask.sum()

    gradient = jit(jax.grad(loss))(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)
    for part in ("params", "value"):
        assert largest_difference(state.params[part], expected[part]) > 1e-3
    assert largest_difference(new.params, expected) < 2e-6
    assert float(metrics["completion/length"]) == pytest.approx(float(mask.sum() / 3))
    parts, _ = ppo_update(grad_accum_steps=4)
    assert largest_difference(new.params, parts.params) < 2e-6


def test_token_ppo_keeps_near_to_its_reference():
    state, _ = with_value(reference=True)
    _, metrics = ppo_update(state, loss=TokenLoss(kl_weight=0.1), epochs=2)
    assert float(metrics["policy/reference_kl"]) > 0
    with pytest.raises(ValueError, match="reduction"):
        ppo_update(loss=TokenLoss(reduction="sequence"))


def test_token_ppo_learns_from_a_group_what_it_learns_from_its_answers_apart():
    given = experience()
    together = token_stages.single_turns(given)
    # Each answer with a copy of its prompt; what follows has no influence, for nothing does.
    asked = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), given.question)
    apart = together.replace(
        observation=jax.tree.map(lambda x: x[None], asked),
        **{
            name: jax.tree.map(lambda x: x.reshape(1, 12, 1, *x.shape[3:]), getattr(together, name))
            for name in ("action", "reward", "terminated", "truncated", "valid")
        },
    )
    (one, _), (other, _) = ppo_update(batch=together, grad_accum_steps=2), ppo_update(batch=apart)
    assert largest_difference(one.params, with_value()[0].params) > 1e-3
    assert largest_difference(one.params, other.params) < 2e-6


class Recorded(token_learner.TokenPolicy):
    """Notes the questions and answers of every pass that is traced."""

    def log_probs_and_values(self, params, frozen, question, tokens, present, **kwargs):
        passes.append((len(question.images), *tokens.shape[:2]))
        return super().log_probs_and_values(params, frozen, question, tokens, present, **kwargs)


passes = []


@pytest.mark.parametrize(
    ("batch", "expected"),
    # 4 questions with 3 answers each; 2 turns of 2 episodes, and the question after them.
    [("single", (1, 1, 3)), ("turns", (1, 1, 1))],
)
def test_no_pass_of_token_ppo_is_over_more_than_a_part(batch, expected):
    given, last = turns() if batch == "turns" else (token_stages.single_turns(experience()), None)
    hyperparameters = token_ppo.Hyperparameters(
        discount=0.9, gae_lambda=0.8, loss=TokenLoss(kl_weight=0.1), value_clip=None,
        value_weight=0.5, entropy_weight=0.01, temperature=1.0,
        epochs=1, minibatches=2, grad_accum_steps=2,
    )  # fmt: skip
    policy = Recorded(**{f.name: getattr(POLICY, f.name) for f in dataclasses.fields(POLICY)})
    step = functools.partial(
        token_ppo.update, policy=policy, optimizer=OPTIMIZER, hyperparameters=hyperparameters
    )
    passes.clear()
    jax.eval_shape(step, *with_value(reference=True), given, last, jax.random.key(4))
    assert len(passes) > 2 and set(passes) == {expected}
