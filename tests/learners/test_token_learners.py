"""Learners of token policies on a tiny vision-language model."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mmrl_jax
from mmrl_jax.distributed import mesh as meshes
from mmrl_jax.learners import dpo, entropy_bonus, grpo, sft, token_learner, token_ppo
from mmrl_jax.learners.learner import map_in_chunks
from mmrl_jax.learners.token_learner import ScoredCompletions
from mmrl_jax.models.encoders import VisionEncoder
from mmrl_jax.models.language import LanguageModel, Rope
from mmrl_jax.models.lora import split
from mmrl_jax.models.transformer import BlockSpec
from mmrl_jax.models.vlm import PatchVision, VisionLanguageModel
from mmrl_jax.problems import token_problem
from mmrl_jax.rl import advantages, group_advantages, losses
from mmrl_jax.rl.token_log_probs import TokenLogProbs
from mmrl_jax.rl.token_losses import PRESETS, TokenLoss
from mmrl_jax.rollouts.generate import Completions, Sampling
from mmrl_jax.tasks import shapes
from mmrl_jax.tasks.prompts import WordTokenizer
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
    MODEL,
    max_new_tokens=TASK.texts.max_answer_length,
    stop=WordTokenizer.stops,
    pad=WordTokenizer.pad,
    tile=16,
)
OPTIMIZER = optax.sgd(0.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Centered(grpo.GRPO):
    """GRPO with centered advantages and any loss, for combinations without a preset."""

    token_loss: TokenLoss = TokenLoss(clip=None)

    @property
    def advantage(self):
        return group_advantages.centered

    @property
    def loss(self):
        options = ("kl_coef", "importance_weight_cap")
        return dataclasses.replace(self.token_loss, **{k: getattr(self, k) for k in options})


PLAIN = Centered()


@functools.cache
def prompt_batch(count=4):
    return TASK.sample(jax.random.key(0), count, "train")


@functools.cache
def learner(trained=".*", reference=False):
    asked = prompt_batch()
    variables = MODEL.init(jax.random.key(1), asked.tokens, asked.mask, asked.images)
    params, frozen = split(variables, trained)
    state = token_learner.init(params, optimizer=OPTIMIZER, with_reference=reference)
    return state, frozen


@functools.cache
def experience():
    """Returns three completions for each of four prompts, in one turn, with random rewards."""
    state, frozen = learner()
    completions = jit(functools.partial(POLICY.generate, num_completions=3, sampling=Sampling()))(
        state.params, frozen, prompt_batch(), jax.random.key(2)
    )
    reward = jax.random.normal(jax.random.key(3), (4, 3))
    return ScoredCompletions.single_turn(prompt_batch(), completions, reward, jnp.ones((4, 3)))


def update(options, state=None, frozen=None, given=None):
    if state is None:
        state, frozen = learner(reference=options.kl_coef > 0)
    step = functools.partial(grpo.update, policy=POLICY, optimizer=OPTIMIZER, options=options)
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
    advantage = given.reward[0] - given.reward[0].mean(axis=1, keepdims=True)
    tokens, mask = given.completions.tokens[0], given.completions.mask[0]

    def loss(params):
        policy = POLICY.log_probs(params, frozen, prompt_batch(), tokens, mask, temperature=1.0)
        return -jnp.sum(mask * policy.log_prob * advantage[..., None]) / mask.sum()

    gradient = jit(jax.grad(loss))(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)
    assert largest_difference(state.params, expected) > 1e-3
    assert largest_difference(new.params, expected) < 1e-6
    assert float(metrics["policy/approx_kl"]) < 1e-8
    assert (float(metrics["optimizer/steps"]), float(metrics["optimizer/skipped_steps"])) == (1, 0)
    described = grpo.describe(given)
    assert float(described["completion/length"]) == pytest.approx(float(mask.sum() / 12))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("token", "constant")]


@pytest.mark.parametrize("reduction", ["sequence", *SLOW])
def test_accumulated_gradients_are_those_of_the_whole(reduction):
    whole = Centered(
        token_loss=TokenLoss(reduction=reduction), kl_coef=0.1, importance_weight_cap=2.0
    )
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
    completions = jit(functools.partial(POLICY.generate, num_completions=3, sampling=Sampling()))(
        state.params, frozen, asked, jax.random.key(2)
    )
    given = ScoredCompletions.single_turn(
        asked, completions, jax.random.normal(jax.random.key(3), (8, 3)), jnp.ones((8, 3))
    )
    options = dataclasses.replace(PLAIN, num_epochs=2, num_minibatches=2, grad_accum_steps=2)

    def updated(devices):
        mesh = meshes.make_mesh(devices)
        step = functools.partial(
            grpo.update,
            policy=dataclasses.replace(POLICY, pack_rows=2),
            optimizer=OPTIMIZER,
            options=options,
            shard=functools.partial(meshes.constrain_batch, mesh=mesh),
        )
        arguments = (
            *jax.device_put((state, frozen), meshes.replicated(mesh)),
            jax.device_put(given, meshes.batch_sharding(mesh, 1)),
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
    asked = prompt_batch()._replace(images=None)
    variables = MODEL.language.init(jax.random.key(1), asked.tokens, asked.mask)
    policy = dataclasses.replace(POLICY, model=MODEL.language)
    state = token_learner.init(variables, optimizer=OPTIMIZER, with_reference=False)
    frozen = jax.tree.map(lambda _: None, variables)
    completions = jit(functools.partial(policy.generate, num_completions=3, sampling=Sampling()))(
        state.params, frozen, asked, jax.random.key(2)
    )
    rows = jnp.repeat(asked.tokens, 3, axis=0)
    row_mask = jnp.repeat(asked.mask, 3, axis=0)
    rows = jnp.concatenate([rows, completions.tokens.reshape(12, -1)], axis=1)
    row_mask = jnp.concatenate([row_mask, completions.mask.reshape(12, -1)], axis=1)
    logits = MODEL.language.apply(variables, rows, row_mask)[:, -POLICY.max_new_tokens - 1 : -1]
    expected = jnp.take_along_axis(
        jax.nn.log_softmax(logits), rows[:, -POLICY.max_new_tokens :, None], axis=-1
    ).reshape(completions.log_probs.shape)
    expected = jnp.where(completions.mask, expected, 0.0)
    np.testing.assert_allclose(completions.log_probs, expected, atol=1e-5)
    reward = jax.random.normal(jax.random.key(3), (4, 3))
    step = functools.partial(grpo.update, policy=policy, optimizer=OPTIMIZER, options=PLAIN)
    given = ScoredCompletions.single_turn(asked, completions, reward, jnp.ones((4, 3)))
    new, metrics = jit(step)(state, frozen, given, jax.random.key(4))
    assert largest_difference(new.params, state.params) > 1e-3
    assert float(metrics["policy/approx_kl"]) < 1e-8


def test_later_epochs_see_their_ratio():
    _, first = update(PLAIN)
    _, more = update(dataclasses.replace(PLAIN, num_epochs=3, num_minibatches=2))
    assert float(more["optimizer/steps"]) == 6
    assert float(more["policy/approx_kl"]) > 1e-7 > float(first["policy/approx_kl"])


def test_the_kl_to_the_reference_holds_the_policy_back():
    far, _ = update(dataclasses.replace(PLAIN, num_epochs=4))
    near, metrics = update(dataclasses.replace(PLAIN, num_epochs=4, kl_coef=3.0))
    start = learner()[0].params
    assert float(metrics["policy/reference_kl"]) > 0
    distance = [
        sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
        for pair in ((near.params, start), (far.params, start))
    ]
    assert distance[0] < distance[1]


def test_the_entropy_bonus_raises_the_entropy():
    # Without a difference of rewards there is nothing else to learn.
    given = experience()._replace(reward=jnp.ones((1, 4, 3)))
    options = dataclasses.replace(PLAIN, entropy_coef=1.0, num_epochs=8)
    _, metrics = update(options, *learner(), given)
    _, before = update(PLAIN)
    assert float(metrics["policy/entropy"]) > float(before["policy/entropy"]) + 1e-4


def test_the_entropy_bonus_follows_its_target():
    given = experience()._replace(reward=jnp.ones((1, 4, 3)))
    h = dataclasses.replace(PLAIN, entropy_coef=0.1, entropy_target=99.0, entropy_coef_step=0.3)
    state, frozen = learner()
    state = state.replace(extras=entropy_bonus.extras(h))
    first, metrics = update(h, state, frozen, given)
    # Nothing is applied before the entropy is known: without rewards nothing is learned.
    assert largest_difference(first.params, state.params) == 0
    assert float(metrics["exploration/entropy_coef"]) == pytest.approx(0.4)
    second, _ = update(h, first, frozen, given)
    fixed = dataclasses.replace(PLAIN, entropy_coef=0.4)
    expected, _ = update(fixed, first.replace(extras={}), frozen, given)
    assert largest_difference(expected.params, first.params) > 1e-6
    assert largest_difference(second.params, expected.params) < 1e-7
    # Above the target, nothing is applied.
    above, metrics = update(dataclasses.replace(h, entropy_target=0.0), first, frozen, given)
    assert float(metrics["exploration/entropy_coef"]) == 0
    # An update that learns from nothing has no entropy.
    empty, _ = update(h, state, frozen, given._replace(valid=jnp.zeros_like(given.valid)))
    assert float(empty.extras["entropy_bonus"].coef) == pytest.approx(0.1)


def test_an_answer_without_a_score_has_no_influence():
    # Neither by its reward nor by what the KL and the entropy make of its tokens.
    h = Centered(token_loss=TokenLoss(), kl_coef=0.3, entropy_coef=0.1, num_epochs=2)
    given = experience()
    valid = given.valid.at[0, 0, 1].set(0.0).at[0, 2, 0].set(0.0)

    def without(token, reward):
        completions = given.completions
        tokens = jnp.where(valid[..., None] == 0, token, completions.tokens)
        return given._replace(
            completions=completions._replace(tokens=tokens),
            reward=jnp.where(valid > 0, given.reward, reward),
            valid=valid,
        )

    one, other = (update(h, given=without(*x))[0] for x in ((5, 0.0), (6, 9.0)))
    assert largest_difference(one.params, learner()[0].params) > 1e-3
    assert largest_difference(one.params, other.params) < 1e-7


@dataclasses.dataclass(frozen=True)
class TablePolicy:
    """A policy with a parameter w for each token of each completion: log p = -softplus(w)."""

    dtype: jnp.dtype

    def log_probs(self, params, frozen, prompts, tokens, mask, *, temperature):
        log_prob = -jax.nn.softplus(params[prompts.answer].astype(self.dtype))
        return TokenLogProbs(log_prob.astype(jnp.float32), jnp.zeros(tokens.shape))


class EntropyTable(TablePolicy):
    """Parameters [B, G, T] are the entropies of the tokens, on which no log-prob depends."""

    def log_probs(self, params, frozen, prompts, tokens, mask, *, temperature):
        rows = params[prompts.answer]
        return TokenLogProbs(0.0 * rows, rows)


def table_update(dtype, options, valid, kind=TablePolicy):
    """Updates a `TablePolicy` with SGD on completions of a float32 sampler."""
    table = jax.random.normal(jax.random.key(0), (4, 3, 5))
    length = jnp.array([[5, 2, 1], [3, 3, 4], [1, 5, 2], [4, 4, 1]])
    mask = jnp.arange(5) < length[..., None]
    drawn = Completions(jnp.zeros((4, 3, 5), jnp.int32), -jax.nn.softplus(table), mask, length < 5)
    reward = jax.random.normal(jax.random.key(1), (4, 3))
    asked = jax.tree.map(lambda x: x[:4], prompt_batch())._replace(answer=jnp.arange(4))
    state = token_learner.init(table, optimizer=optax.sgd(1.0), with_reference=False)
    step = functools.partial(
        grpo.update,
        policy=kind(dtype),
        optimizer=optax.sgd(1.0),
        options=options,
    )
    given = ScoredCompletions.single_turn(asked, drawn, reward, valid)
    new, metrics = jit(step)(state, None, given, jax.random.key(2))
    return table, new.params, options.advantage(reward, valid), length, metrics


class ParameterIsEntropy(TablePolicy):
    """A `TablePolicy` whose parameters are the entropies of the tokens too."""

    def log_probs(self, params, frozen, prompts, tokens, mask, *, temperature):
        log_prob = (
            super().log_probs(params, frozen, prompts, tokens, mask, temperature=1.0).log_prob
        )
        return TokenLogProbs(log_prob, jax.lax.stop_gradient(params[prompts.answer]))


@pytest.mark.parametrize("num_minibatches", [1, 2])
def test_the_policy_gradient_uses_the_tokens_with_the_largest_entropies(num_minibatches):
    h = Centered(num_minibatches=num_minibatches)
    few = dataclasses.replace(h, top_entropy_fraction=0.4)
    ones = jnp.ones((4, 3))
    before, of_all, _, length, _ = table_update(jnp.float32, h, ones, ParameterIsEntropy)
    _, of_few, *_ = table_update(jnp.float32, few, ones, ParameterIsEntropy)
    mask = jnp.arange(5) < length[..., None]
    # 40 % of the 35 tokens.
    chosen = mask & (before >= np.quantile(before[mask], 0.6))
    assert int(chosen.sum()) == 14
    assert (jnp.abs(of_all - before)[mask] > 0).all()
    expected = jnp.where(chosen, of_all, before)
    np.testing.assert_allclose(of_few, expected, atol=1e-6)


def test_kl_cov_holds_the_tokens_that_covary_most():
    # Every token has a parameter of its own, so that the penalty moves no other token.
    h = Centered(num_epochs=2)
    held = dataclasses.replace(h, kl_cov_fraction=0.2, kl_cov_coef=0.1)
    before, free, advantage, length, _ = table_update(jnp.float32, h, jnp.ones((4, 3)))
    _, after, *_ = table_update(jnp.float32, held, jnp.ones((4, 3)))
    mask = np.arange(5) < length[..., None]
    log_prob = -jax.nn.softplus(before)
    advantage = np.broadcast_to(advantage[..., None], mask.shape)
    covariance = (log_prob - log_prob[mask].mean()) * (advantage - advantage[mask].mean())
    chosen = mask & (covariance >= np.quantile(covariance[mask], 0.8))
    assert int(chosen.sum()) == 7
    np.testing.assert_array_equal(after[~chosen], free[~chosen])
    moved = np.abs(jax.nn.softplus(after) + log_prob)[chosen]
    assert (moved < np.abs(jax.nn.softplus(free) + log_prob)[chosen]).all()


@pytest.mark.parametrize("num_minibatches", [1, 2])
def test_a_policy_that_has_not_moved_is_not_clipped_in_bfloat16(num_minibatches):
    # Each completion has parameters of its own, and one step: its ratio is 1, whatever the sampler
    # rounded to. GSPO's interval is the narrowest, [1 - 3e-4, 1 + 4e-4].
    h = Centered(token_loss=PRESETS["gspo"][1], num_minibatches=num_minibatches)
    before, after, advantage, length, metrics = table_update(jnp.bfloat16, h, jnp.ones((4, 3)))
    for clipped in ("clip_ratio_low", "clip_ratio_high", "approx_kl"):
        assert float(metrics[f"policy/{clipped}"]) == 0
    rises = jnp.sign(after - before) == -jnp.sign(advantage)[..., None]
    assert (jnp.abs(advantage) > 1e-3).all()
    np.testing.assert_array_equal(rises, jnp.arange(5) < length[..., None])
    assert float(metrics["policy/sampler_gap"]) > 1e-4


@pytest.mark.parametrize("reduction", ["sequence", "constant"])
@pytest.mark.parametrize(("num_minibatches", "grad_accum_steps"), [(1, 2), (2, 2)])
def test_a_completion_without_a_reward_is_in_no_divisor(
    reduction, num_minibatches, grad_accum_steps
):
    # Of each question two of three completions are scored, so that a minibatch has 8 or 4; one
    # step moves w by A * d log p / dw over the divisor, and d log p / dw = -sigmoid(w).
    h = Centered(
        token_loss=TokenLoss(clip=None, reduction=reduction),
        num_minibatches=num_minibatches,
        grad_accum_steps=grad_accum_steps,
    )
    scored = jnp.array([[1.0, 1, 0], [1, 1, 0], [1, 0, 1], [1, 1, 0]])
    before, after, advantage, length, _ = table_update(jnp.float32, h, scored)
    loss_denominator = 8 / num_minibatches * (length[..., None] if reduction == "sequence" else 5)
    expected = -advantage[..., None] * jax.nn.sigmoid(before) / loss_denominator
    expected = jnp.where(jnp.arange(5) < length[..., None], expected, 0.0)
    np.testing.assert_allclose(after - before, expected, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_the_entropy_bonus_is_reduced_as_the_loss(reduction):
    # One step of SGD moves the entropy of a token by 0.1 over the divisor of the loss: the number
    # of completions and of the tokens of each, or the number of all tokens.
    h = Centered(token_loss=TokenLoss(clip=None, reduction=reduction), entropy_coef=0.1)
    before, after, _, length, _ = table_update(jnp.float32, h, jnp.ones((4, 3)), EntropyTable)
    divisor = 12 * length[..., None] if reduction == "sequence" else jnp.sum(length)
    expected = jnp.where(jnp.arange(5) < length[..., None], 0.1 / divisor, 0.0)
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
    # The last completion to each prompt has the highest reward, and is truncated.
    given = experience()._replace(reward=jnp.array([[[0.0, 1, 2]] * 4]))
    finished = jnp.array([[[True, True, False]] * 4])
    given = given._replace(completions=given.completions._replace(finished=finished))
    without = given._replace(valid=given.valid * finished)
    for learn in (prefer, lambda batch, **options: ppo_update(batch=batch, **options)):
        masked, _ = learn(given, mask_truncated_completions=True)
        expected, _ = learn(without)
        unmasked, _ = learn(given)
        assert largest_difference(masked.params, expected.params) < 1e-7
        assert largest_difference(masked.params, unmasked.params) > 1e-4


def test_overlong_completions_lose_reward_where_it_is_known():
    given = experience()
    mask = jnp.arange(5) < jnp.array([[3, 4, 5]] * 4)[..., None]
    given = given._replace(
        completions=given.completions._replace(mask=mask[None]),
        reward=jnp.ones((1, 4, 3)).at[0, 0].set(0.0),
        valid=jnp.ones((1, 4, 3)).at[0, 0].set(0.0),
    )
    assert token_problem.shape_rewards(given, None) is given
    # Of the last two of five tokens each costs a half.
    shaped = token_problem.shape_rewards(given, 2)
    np.testing.assert_array_equal(shaped.reward[0, 1:], [[1, 0.5, 0]] * 3)
    np.testing.assert_array_equal(shaped.reward[0, 0], 0.0)
    config = mmrl_jax.get_config("count_grpo", {"grpo": {"overlong_buffer": 2}})
    token_problem.check_groups(config, "grpo", 2)
    with pytest.raises(ValueError, match="grpo.overlong_buffer=2 is more than the 1 tokens"):
        token_problem.check_groups(config, "grpo", 1)


def test_equal_rewards_teach_nothing():
    given = experience()._replace(reward=jnp.ones((1, 4, 3)))
    new, _ = update(PLAIN, *learner(), given)
    assert largest_difference(new.params, learner()[0].params) == 0
    assert float(grpo.describe(given)["reward/zero_std_groups"]) == 1


def test_questions_with_different_rewards_come_first():
    reward = jnp.array([[[1.0, 1, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]]])
    given, first = experience()._replace(reward=reward), jnp.array([1, 3, 0])
    chosen = grpo.dynamic_sampling(given, 3)
    np.testing.assert_array_equal(chosen.reward, given.reward[:, first])
    np.testing.assert_array_equal(chosen.prompt.images, given.prompt.images[:, first])


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
    asked = given.prompt
    dropped = asked._replace(tokens=jnp.where(asked.tokens == WordTokenizer.image, 5, asked.tokens))
    new, metrics = update(PLAIN, *learner(), given._replace(prompt=dropped))
    assert (float(metrics["optimizer/steps"]), float(metrics["optimizer/skipped_steps"])) == (0, 1)
    assert largest_difference(new.params, learner()[0].params) == 0


def test_supervised_fine_tuning_is_cross_entropy():
    state, frozen = learner()
    tokens, mask = TASK.texts.labels(prompt_batch().answer)
    step = functools.partial(sft.update, policy=POLICY, optimizer=OPTIMIZER, options=sft.SFT())
    labels = ScoredCompletions.from_labels(prompt_batch(), tokens, mask)
    new, metrics = jit(step)(state, frozen, labels, jax.random.key(0))
    rows = jnp.concatenate([prompt_batch().tokens, tokens], axis=1)
    row_mask = jnp.concatenate([prompt_batch().mask, mask], axis=1)

    def loss(params):
        logits = MODEL.apply(params, rows, row_mask, prompt_batch().images)[
            :, -tokens.shape[1] - 1 : -1
        ]
        log_probs = jax.nn.log_softmax(logits)
        taken = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(mask, taken, 0)) / mask.sum()

    value, gradient = jit(jax.value_and_grad(loss))(state.params)
    assert metrics["loss/sft"] == pytest.approx(float(value), rel=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)
    assert largest_difference(new.params, expected) < 1e-6


def preferences(weight=(1.0, 1.0, 0.0, 1.0)):
    """Returns pairs of completions, whose first is preferred if the weight is 1."""
    completions = jax.tree.map(lambda x: x[0, :, :2], experience().completions)
    reward = jnp.asarray(weight)[:, None] * jnp.array([1.0, 0.0])
    return ScoredCompletions.single_turn(prompt_batch(), completions, reward, jnp.ones((4, 2)))


def prefer(given, **options):
    state, frozen = learner(reference=True)
    step = functools.partial(
        dpo.update, policy=POLICY, optimizer=OPTIMIZER, options=dpo.DPO(beta=0.5, **options)
    )
    return jit(step)(state, frozen, given, jax.random.key(4))


def test_one_step_of_dpo_is_written_out():
    # At the reference the margin is 0, and the gradient -beta / 2 * grad(chosen - rejected).
    given = preferences()
    new, metrics = prefer(given)
    state, frozen = learner(reference=True)

    def margin(params):
        tokens, mask = given.completions.tokens[0], given.completions.mask[0]
        policy = POLICY.log_probs(params, frozen, prompt_batch(), tokens, mask, temperature=1.0)
        whole = jnp.sum(jnp.where(mask, policy.log_prob, 0.0), axis=-1)
        return jnp.sum(jnp.array([1, 1, 0, 1]) * (whole[:, 0] - whole[:, 1])) / 3

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
    _, metrics = prefer(preferences(), num_epochs=8)
    assert float(metrics["dpo/reward_margin"]) > 0.01
    assert float(metrics["loss/policy"]) < np.log(2)


def test_best_and_worst_answers_are_preferred():
    completions = jax.tree.map(lambda x: x[0], experience().completions)
    reward = jnp.array([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0], [9.0, 0.2, 0.1], [2.0, -9.0, -9.0]])
    valid = jnp.array([[1.0, 1, 1], [1, 1, 1], [0, 1, 1], [1, 0, 0]])
    found = dpo.best_and_worst(prompt_batch(), completions.tokens, completions.mask, reward, valid)
    np.testing.assert_array_equal(found.weight, [1, 0, 1, 0])
    for row, which in ((0, [1, 0]), (2, [1, 2])):
        np.testing.assert_array_equal(found.tokens[row], completions.tokens[row, jnp.array(which)])
        np.testing.assert_array_equal(found.mask[row], completions.mask[row, jnp.array(which)])


@functools.cache
def turns():
    """Returns two turns of two episodes, with the first completions of `experience`."""
    zeros = jnp.zeros((2, 2))
    completions = jax.tree.map(
        lambda x: x[0, :, 0].reshape(2, 2, *x.shape[3:]), experience().completions
    )
    batch = Transition(
        observation=jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), prompt_batch()),
        action=completions,
        log_prob=zeros,
        value=zeros,
        reward=jnp.array([[0.0, 1.0], [jnp.nan, 2.0]]),
        terminated=zeros.at[0, 1].set(1.0),
        truncated=zeros,
        valid=jnp.array([[1.0, 1.0], [0.0, 1.0]]),
        privileged={},
        metrics={},
    )
    return ScoredCompletions.turns(batch, jax.tree.map(lambda x: x[:2], prompt_batch()))


def with_value(reference=False):
    state, _ = learner()
    params = token_learner.with_value_head(jax.random.key(5), state.params, 16)
    state = token_learner.init(params, optimizer=OPTIMIZER, with_reference=reference)
    return state, jax.tree.map(lambda _: None, params)


def ppo_options(**options):
    return token_ppo.PPO(discount=0.9, gae_lambda=0.8, entropy_coef=0.01, **options)


def ppo_update(state=None, batch=None, **options):
    start, frozen = with_value()
    step = functools.partial(
        token_ppo.update, policy=POLICY, optimizer=OPTIMIZER, options=ppo_options(**options)
    )
    return jit(step)(state or start, frozen, batch or turns(), jax.random.key(4))


def test_one_step_of_token_ppo_is_written_out():
    new, metrics = ppo_update()
    (state, frozen), batch = with_value(), turns()
    mask = (batch.completions.mask & (batch.valid > 0)[..., None]).astype(jnp.float32)

    def read(params):
        flat = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), (batch.prompt, batch.completions)
        )
        found, value = POLICY.log_probs_and_values(
            params, frozen, flat[0], flat[1].tokens, flat[1].mask, temperature=1.0
        )
        return [x.reshape(mask.shape) for x in (found.log_prob, found.entropy, value)]

    first = jnp.zeros((2, 1, 1), jnp.int32)

    @jit
    def values(params):
        _, behind = POLICY.log_probs_and_values(
            params, frozen, batch.next_prompt, first, first == 0, temperature=1.0
        )
        return read(params)[2], behind

    value, behind = values(state.params)
    advantage, target = advantages.token_advantages(
        reward=batch.reward[..., 0].at[1, 0].set(0.0),
        value=value[:, :, 0],
        last_value=behind[:, 0, 0],
        mask=batch.completions.mask[:, :, 0],
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
    _, metrics = ppo_update(state, kl_coef=0.1, num_epochs=2)
    assert float(metrics["policy/reference_kl"]) > 0


def test_token_ppo_learns_from_a_group_what_it_learns_from_its_answers_apart():
    together = experience()
    # Each answer with a copy of its prompt; what follows has no influence, for nothing does.
    apart = jax.tree.map(
        lambda x: x.reshape(1, 12, 1, *x.shape[3:]), together._replace(prompt=None)
    )
    apart = apart._replace(prompt=jax.tree.map(lambda x: jnp.repeat(x, 3, axis=1), together.prompt))
    (one, _), (other, _) = ppo_update(batch=together, grad_accum_steps=2), ppo_update(batch=apart)
    assert largest_difference(one.params, with_value()[0].params) > 1e-3
    assert largest_difference(one.params, other.params) < 2e-6


class Recorded(token_learner.TokenPolicy):
    """Records the prompts and completions of every traced pass."""

    def log_probs_and_values(self, params, frozen, prompts, tokens, mask, **kwargs):
        passes.append((len(prompts.images), *tokens.shape[:2]))
        return super().log_probs_and_values(params, frozen, prompts, tokens, mask, **kwargs)


passes = []


@pytest.mark.parametrize(
    ("batch", "expected"),
    # 4 questions with 3 answers each; 2 turns of 2 episodes, and the question after them.
    [("single", (1, 1, 3)), ("turns", (1, 1, 1))],
)
def test_no_pass_of_token_ppo_is_over_more_than_a_part(batch, expected):
    given = turns() if batch == "turns" else experience()
    options = ppo_options(kl_coef=0.1, num_minibatches=2, grad_accum_steps=2)
    policy = Recorded(**{f.name: getattr(POLICY, f.name) for f in dataclasses.fields(POLICY)})
    step = functools.partial(token_ppo.update, policy=policy, optimizer=OPTIMIZER, options=options)
    passes.clear()
    jax.eval_shape(step, *with_value(reference=True), given, jax.random.key(4))
    assert len(passes) > 2 and set(passes) == {expected}
