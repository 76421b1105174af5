"""Tests of losses over tokens by hand, with TRL's code, and of their invariances."""

import collections
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl import GRPOTrainer

from mmrl_jax.rl import token_losses as tl
from mmrl_jax.rl.token_losses import TokenLoss

N, T = 6, 5


def batch(seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.array([5, 3, 1, 5, 2, 4])
    old = rng.normal(-1.5, 0.5, (N, T))
    arrays = {
        "log_prob": old + rng.normal(0, 0.3, (N, T)),
        "old_log_prob": old,
        "advantage": rng.normal(size=N),
        "mask": np.arange(T) < lengths[:, None],
        "reference_log_prob": old + rng.normal(0, 0.3, (N, T)),
        "rollout_log_prob": old + rng.normal(0, 0.3, (N, T)),
    }
    return {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}


def loss(arrays, options):
    sums = tl.token_loss_sums(
        arrays["log_prob"],
        arrays["old_log_prob"],
        arrays["advantage"],
        arrays["mask"],
        options,
        reference_log_prob=arrays["reference_log_prob"],
        rollout_log_prob=arrays["rollout_log_prob"],
    )
    return sums.loss / tl.loss_denominator(arrays["mask"], options.reduction)


def value_and_gradient(arrays, options):
    def of(log_prob):
        return loss(arrays | {"log_prob": log_prob}, options)

    return jax.value_and_grad(of)(arrays["log_prob"])


def trl(arrays, options, loss_type, entropy=None, fraction=1.0):
    """Returns loss and gradient of TRL's `_compute_loss` for given log-probs and entropies."""
    entropy = torch.zeros(N, T) if entropy is None else torch.tensor(entropy)
    tensors = {name: torch.tensor(np.asarray(x)) for name, x in arrays.items()}
    log_prob = tensors["log_prob"].requires_grad_()
    mask = tensors["mask"]
    with_weights = options.importance_weight_cap is not None
    stub = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (log_prob, entropy, None),
        top_entropy_quantile=fraction,
        off_policy_mask_threshold=None,
        importance_sampling_level=options.ratio,
        beta=options.kl_coef,
        loss_type=loss_type,
        epsilon_low=options.low,
        epsilon_high=1 + options.high if loss_type == "cispo" else options.high,
        args=types.SimpleNamespace(
            delta=None,
            use_bias_correction_kl=False,
            steps_per_generation=1,
            sapo_temperature_pos=options.positive_temperature,
            sapo_temperature_neg=options.negative_temperature,
        ),
        use_vllm=with_weights,
        vllm_importance_sampling_correction=with_weights,
        model=types.SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=T,
        accelerator=types.SimpleNamespace(
            num_processes=1,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            pad_across_processes=lambda x, **_: x,
        ),
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    )
    stub.get_high_entropy_mask = functools.partial(GRPOTrainer.get_high_entropy_mask, stub)
    correction = torch.exp(tensors["old_log_prob"] - tensors["rollout_log_prob"])
    inputs = {
        "prompt_ids": torch.zeros(N, 1),
        "prompt_mask": torch.zeros(N, 1),
        "completion_ids": torch.zeros(N, T),
        "completion_mask": mask,
        "advantages": tensors["advantage"],
        "old_per_token_logps": tensors["old_log_prob"],
        "ref_per_token_logps": tensors["reference_log_prob"],
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": torch.clamp(
            correction, max=options.importance_weight_cap or 1.0
        ),
    }
    value = GRPOTrainer._compute_loss(stub, None, inputs)
    value.backward()
    return value.item(), log_prob.grad.numpy(), stub._metrics["train"]


CASES = {
    "grpo": ("grpo", TokenLoss(reduction="sequence")),
    "grpo, KL": ("grpo", TokenLoss(reduction="sequence", kl_coef=0.1)),
    "dr_grpo": ("dr_grpo", TokenLoss(reduction="constant")),
    "dapo": ("dapo", TokenLoss(high=0.28)),
    "dapo, KL": ("dapo", TokenLoss(high=0.28, kl_coef=0.2)),
    "bnpo": ("bnpo", TokenLoss()),
    "gspo": ("grpo", TokenLoss(ratio="sequence", low=0.05, high=0.1, reduction="sequence")),
    "gspo over tokens": ("dapo", TokenLoss(ratio="sequence", low=0.05, high=0.1)),
    "cispo": ("cispo", TokenLoss(clip="cispo", high=0.1)),
    "sapo": ("sapo", TokenLoss(clip="sapo", reduction="sequence")),
    "sapo, KL": (
        "sapo",
        TokenLoss(
            clip="sapo",
            positive_temperature=3.0,
            negative_temperature=8.0,
            reduction="sequence",
            kl_coef=0.1,
        ),
    ),
    "corrected": ("dapo", TokenLoss(importance_weight_cap=1.1, kl_coef=0.1)),
}


@pytest.mark.parametrize(("loss_type", "options"), CASES.values(), ids=CASES)
def test_value_and_gradient_are_trls(loss_type, options):
    arrays = batch()
    value, gradient = value_and_gradient(arrays, options)
    expected, expected_gradient, metrics = trl(arrays, options, loss_type)
    assert value == pytest.approx(expected, rel=1e-5)
    assert np.abs(gradient).max() > 1e-3
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6, rtol=1e-5)
    if options.ratio == "token" and options.clip == "ppo":
        sums = tl.token_loss_sums(
            *(arrays[k] for k in ("log_prob", "old_log_prob", "advantage", "mask")),
            dataclasses.replace(options, kl_coef=0.0, importance_weight_cap=None),
        )
        for ours, theirs in (("low", "clip_ratio/low_mean"), ("high", "clip_ratio/high_mean")):
            share = sums.metrics[f"policy/clip_ratio_{ours}"] / sums.tokens
            assert share == pytest.approx(metrics[theirs][0], abs=1e-6)


def test_by_hand():
    # Two answers: 2 tokens of ratio e^0 and e^1, advantage 1; 1 token of ratio e^-1, advantage -1.
    arrays = {
        "log_prob": jnp.array([[-1.0, -1.0], [-2.0, 9.0]]),
        "old_log_prob": jnp.array([[-1.0, -2.0], [-1.0, 0.0]]),
        "advantage": jnp.array([1.0, -1.0]),
        "mask": jnp.array([[1.0, 1.0], [1.0, 0.0]]),
        "reference_log_prob": None,
        "rollout_log_prob": None,
    }
    # Clipped to [0.8, 1.2]: -1, -1.2; and for the other -min(-1/e, -0.8) = 0.8.
    assert loss(arrays, TokenLoss()) == pytest.approx((-1 - 1.2 + 0.8) / 3)
    assert loss(arrays, TokenLoss(reduction="sequence")) == pytest.approx((-2.2 / 2 + 0.8) / 2)
    assert loss(arrays, TokenLoss(reduction="constant")) == pytest.approx(-1.4 / 4)
    # Not clipped: -1, -e, 1/e.
    e = np.e
    assert loss(arrays, TokenLoss(clip=None)) == pytest.approx((-1 - e + 1 / e) / 3)
    # The ratio of an answer is e^(1/2), clipped to 1.2; e^-1, which counts as 0.8.
    assert loss(arrays, TokenLoss(ratio="sequence")) == pytest.approx((-2.4 + 0.8) / 3)
    # CISPO: the weights are min(ratio, 1.2) = 1, 1.2, 1/e, times -A log pi.
    expected = (1 * 1 + 1.2 * 1 - (1 / e) * 2) / 3
    assert loss(arrays, TokenLoss(clip="cispo")) == pytest.approx(expected)


@pytest.mark.parametrize("preset", tl.PRESETS)
def test_no_preset_clips_a_policy_that_has_not_moved_whatever_the_sampler_rounded_to(preset):
    arrays = batch()
    near = arrays["log_prob"].astype(jnp.bfloat16).astype(jnp.float32)
    arrays |= {"rollout_log_prob": near, "old_log_prob": None}
    options = tl.PRESETS[preset][1]

    def of(log_prob):
        names = ("old_log_prob", "advantage", "mask")
        sums = tl.token_loss_sums(
            log_prob, *(arrays[k] for k in names), options, rollout_log_prob=near
        )
        return sums.loss, sums.metrics

    gradient, metrics = jax.grad(of, has_aux=True)(arrays["log_prob"])
    for name in ("approx_kl", "clip_ratio_low", "clip_ratio_high"):
        assert float(metrics[f"policy/{name}"]) == 0
    gap = jnp.where(arrays["mask"] > 0, jnp.abs(arrays["log_prob"] - near), 0.0)
    assert float(metrics["policy/sampler_gap"]) == pytest.approx(float(gap.sum()))
    np.testing.assert_array_equal(
        jnp.sign(gradient), -jnp.sign(arrays["advantage"])[:, None] * arrays["mask"]
    )


def test_completions_that_are_masked_count_in_no_divisor():
    # Of four completions of up to 3 places two are learned from, with 3 tokens between them.
    mask = jnp.array([[1.0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]])
    for reduction, expected in (("sequence", 2), ("token", 3), ("constant", 6)):
        assert float(tl.loss_denominator(mask, reduction)) == expected


def test_on_policy_every_ratio_is_1_and_the_gradient_is_that_of_reinforce():
    arrays = batch()
    arrays["log_prob"] = arrays["old_log_prob"]
    expected = -arrays["advantage"][:, None] * arrays["mask"] / arrays["mask"].sum()
    for clip in (*tl.CLIPS, None):
        options = TokenLoss(clip=clip)
        _, gradient = value_and_gradient(arrays, options)
        np.testing.assert_allclose(gradient, expected, atol=1e-7)


@pytest.mark.parametrize("preset", tl.PRESETS)
def test_parts_add_up_and_padding_counts_for_nothing(preset):
    options = dataclasses.replace(tl.PRESETS[preset][1], kl_coef=0.1, importance_weight_cap=1.5)
    arrays = batch()
    value, gradient = value_and_gradient(arrays, options)
    parts = [{k: x[i : i + 2] for k, x in arrays.items()} for i in range(0, N, 2)]
    sums = [
        float(loss(part, options) * tl.loss_denominator(part["mask"], options.reduction))
        for part in parts
    ]
    whole = sum(float(tl.loss_denominator(part["mask"], options.reduction)) for part in parts)
    assert sum(sums) / whole == pytest.approx(float(value), rel=1e-5)
    there = arrays["mask"] > 0
    names = ("log_prob", "old_log_prob", "reference_log_prob", "rollout_log_prob")
    spoilt = arrays | {k: jnp.where(there, arrays[k], jnp.nan) for k in names}
    other, other_gradient = value_and_gradient(spoilt, options)
    assert other == value
    np.testing.assert_array_equal(gradient, other_gradient)


def test_an_empty_answer_and_an_empty_batch_have_finite_gradients():
    arrays = batch()
    arrays["mask"] = arrays["mask"].at[2].set(0)
    for options in (TokenLoss(ratio="sequence", reduction="sequence"), TokenLoss()):
        _, gradient = value_and_gradient(arrays, options)
        assert np.isfinite(gradient).all() and not np.any(gradient[2])


def test_a_ratio_that_overflows_has_no_gradient_in_the_gate_of_sapo():
    arrays = batch()
    arrays["log_prob"] = arrays["old_log_prob"] + 200.0
    value, gradient = value_and_gradient(arrays, TokenLoss(clip="sapo"))
    assert np.isfinite(value) and not np.any(gradient)


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_the_tokens_with_the_largest_entropies_are_trls(fraction):
    arrays, options = batch(), TokenLoss(high=0.28, kl_coef=0.1)
    entropy = np.random.default_rng(1).uniform(0, 3, (N, T)).astype(np.float32)
    # Padding has the largest entropies, which must not count.
    entropy = np.where(arrays["mask"] > 0, entropy, 9.0)
    chosen = tl.top_entropy_tokens(jnp.asarray(entropy), arrays["mask"], fraction=fraction)
    tokens = int(arrays["mask"].sum())
    assert int(chosen.sum()) == round(fraction * tokens)
    advantage = jnp.where(chosen, arrays["advantage"][:, None], 0.0)
    value, gradient = value_and_gradient(arrays | {"advantage": advantage}, options)
    expected, expected_gradient, _ = trl(arrays, options, "dapo", entropy, fraction)
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6, rtol=1e-5)


def test_the_tokens_that_covary_most_by_hand():
    log_prob = jnp.array([[-1.0, -2.0, 7.0], [-3.0, -2.0, -2.0]])
    advantage = jnp.array([[1.0, 1.0, 9.0], [-1.0, -1.0, 0.0]])
    mask = jnp.array([[1.0, 1, 0], [1, 1, 1]])
    # Means over five tokens: -2 and 0, so that the covariances are 1, 0, 1, 0 and 0.
    chosen = tl.high_covariance_tokens(log_prob, advantage, mask, fraction=0.4)
    np.testing.assert_array_equal(chosen, [[True, False, False], [True, False, False]])
    # The smallest fraction selects the largest one, and here the one that equals it.
    chosen = tl.high_covariance_tokens(log_prob, advantage, mask, fraction=1e-3)
    assert int(chosen.sum()) == 2


@pytest.mark.parametrize("ratio", tl.RATIOS)
def test_the_penalty_of_kl_cov_by_hand(ratio):
    # One token of log-ratio 0.1 with coefficient 2, one of -0.2 with 0, and padding.
    log_prob = jnp.array([[-1.0, -2.0, 3.0]])
    old, mask = jnp.array([[-1.1, -1.8, jnp.inf]]), jnp.array([[1.0, 1.0, 0.0]])
    anchor = jnp.array([[2.0, 0.0, jnp.inf]])

    def of(log_prob, anchor_coef):
        return tl.token_loss_sums(
            log_prob, old, jnp.zeros(1), mask, TokenLoss(ratio=ratio), anchor_coef=anchor_coef
        ).loss

    value, gradient = jax.value_and_grad(of)(log_prob, anchor)
    assert value == pytest.approx(2 * 0.1, rel=1e-5)
    np.testing.assert_allclose(gradient, [[2.0, 0.0, 0.0]], atol=1e-6)
    assert of(log_prob, None) == 0


@pytest.mark.parametrize("kind", tl.KLS)
def test_the_estimates_of_kl_have_its_value_as_mean(kind):
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.45, 0.35, 0.2])
    estimates = tl.kl_estimate(jnp.log(q) - jnp.log(p), kind)
    exact = np.sum(p * np.log(p / q))
    # 'k2' is right to second order.
    assert np.sum(p * estimates) == pytest.approx(exact, rel=0.05 if kind == "k2" else 1e-4)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="clip='pp0' must be one of"):
        TokenLoss(clip="pp0")
    arrays = batch() | {"reference_log_prob": None, "rollout_log_prob": None}
    with pytest.raises(ValueError, match=r"kl_coef=0.1, but reference_log_prob is None"):
        loss(arrays, TokenLoss(kl_coef=0.1))
    with pytest.raises(
        ValueError, match=r"importance_weight_cap=2.0, but rollout_log_prob is None"
    ):
        loss(arrays, TokenLoss(importance_weight_cap=2.0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_by_hand_and_in_torch(smoothing):
    chosen, rejected = np.array([0.5, -1.0]), np.array([-0.5, 1.0])
    ours = tl.dpo_loss(
        jnp.asarray(chosen), jnp.asarray(rejected), beta=0.3, label_smoothing=smoothing
    )
    margin = torch.tensor(0.3 * (chosen - rejected))
    log_sigmoid = torch.nn.functional.logsigmoid
    theirs = -log_sigmoid(margin) * (1 - smoothing) - log_sigmoid(-margin) * smoothing
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)
    if not smoothing:
        # Margins 0.3 and -0.6: log(1 + e^-0.3) and log(1 + e^0.6).
        np.testing.assert_allclose(ours, [0.554355, 1.037488], rtol=1e-5)


def test_presets_are_what_their_papers_say():
    # name: advantage, ratio, clip, low, high, reduction; where a paper gives no number, TRL's.
    expected = {
        "grpo": ("standardized", "token", "ppo", 0.2, 0.2, "sequence"),
        "dr_grpo": ("centered", "token", "ppo", 0.2, 0.2, "constant"),
        "dapo": ("standardized", "token", "ppo", 0.2, 0.28, "token"),
        "gspo": ("standardized", "sequence", "ppo", 3e-4, 4e-4, "sequence"),
        "cispo": ("standardized", "token", "cispo", 0.2, 4.0, "token"),
        "sapo": ("standardized", "token", "sapo", 0.2, 0.2, "sequence"),
        "rloo": ("leave_one_out", "token", None, 0.2, 0.2, "constant"),
        "reinforce++": ("batch_standardized", "token", "ppo", 0.2, 0.2, "token"),
    }
    found = {
        name: (advantage, o.ratio, o.clip, o.low, o.high, o.reduction)
        for name, (advantage, o) in tl.PRESETS.items()
    }
    assert found == expected
    assert {o.kl_coef for _, o in tl.PRESETS.values()} == {0.0}  # Configs add it.
