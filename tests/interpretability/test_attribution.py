"""Attributions: exact cases, planted evidence, and the tests of faithfulness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.interpretability import attribution, control, faithfulness, relevance, units
from mmrl_jax.models.policy import MultimodalPolicy

SAMPLES, BACKGROUNDS, PATCH, PLANTED = 40, 3, 4, 2  # The planted patch is at row 1, column 0.
UNITS = units.Units(frames=1, rows=2, columns=2, words=3, readings=2, patch=PATCH)


def make_features(seed, *lead):
    rng = np.random.default_rng(seed)
    return units.Features(
        jnp.asarray(rng.uniform(0, 255, (*lead, 1, 8, 8, 3)), jnp.float32),
        jnp.asarray(rng.normal(size=(*lead, 3, 5)), jnp.float32),
        jnp.asarray(rng.normal(size=(*lead, 1, 2)), jnp.float32),
    )


INPUTS, BACKGROUND = make_features(0, SAMPLES), make_features(1, BACKGROUNDS, SAMPLES)
# What was planted: the bottom left patch is bright in the inputs, and dark in all backgrounds.
INPUTS = INPUTS._replace(pixels=INPUTS.pixels.at[:, :, 4:, :4].set(250))
BACKGROUND = BACKGROUND._replace(pixels=BACKGROUND.pixels.at[:, :, :, 4:, :4].set(5))


def planted(x):
    """A value that depends on the planted patch, and a little on everything else."""
    bright = x.pixels[:, 0, 4:, :4].mean((1, 2, 3)) / 255
    rest = x.pixels.mean((1, 2, 3, 4)) / 255 + x.words.mean((1, 2)) + x.proprio.mean((1, 2))
    return jnp.tanh(3 * bright) + 0.02 * rest


def net(x):
    flat = [y.reshape(y.shape[0], -1) for y in x]
    flat[0] = flat[0] / 255
    x = jnp.concatenate(flat, axis=1)
    weights = jax.random.normal(jax.random.PRNGKey(0), (x.shape[1], 8)) / 10
    return jnp.sum(jnp.tanh(x @ weights) ** 2, axis=1)


def test_linear_functions_are_attributed_exactly():
    weights = make_features(3, 1)

    def linear(x):
        return sum(
            jnp.sum((w * y).reshape(SAMPLES, -1), 1) for w, y in zip(weights, x, strict=True)
        )

    expected = jax.tree.map(lambda w, x, b: w * (x - b.mean(0)), weights, INPUTS, BACKGROUND)
    for found in (
        attribution.integrated_gradients(linear, INPUTS, BACKGROUND, steps=3),
        attribution.gradient_times_input(linear, INPUTS, BACKGROUND),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=0.1), found, expected
        )
    # A unit of a linear function is worth the sum of its features.
    occluded = attribution.occlusion(linear, INPUTS, BACKGROUND, UNITS)
    scale = float(jnp.abs(linear(INPUTS)).max())
    np.testing.assert_allclose(occluded / scale, UNITS.aggregate(expected) / scale, atol=1e-4)


def test_integrated_gradients_are_complete_and_a_single_gradient_is_not():
    path = attribution.integrated_gradients(net, INPUTS, BACKGROUND, steps=32)
    difference, error = attribution.completeness(net, INPUTS, BACKGROUND, path)
    expected = net(INPUTS) - jnp.stack(
        [net(jax.tree.map(lambda x, k=k: x[k], BACKGROUND)) for k in range(BACKGROUNDS)]
    ).mean(0)
    np.testing.assert_allclose(difference, expected, atol=1e-5)
    scale = float(jnp.abs(difference).mean())
    assert float(jnp.abs(error).mean()) < 0.01 * scale
    local = attribution.gradient_times_input(net, INPUTS, BACKGROUND)
    _, missed = attribution.completeness(net, INPUTS, BACKGROUND, local)
    assert float(jnp.abs(missed).mean()) > 0.1 * scale
    np.testing.assert_allclose(UNITS.aggregate(path).sum(1), difference + error, atol=1e-4)


def test_planted_evidence_ranks_first_and_is_faithful():
    scores, _ = control.score_units(planted, INPUTS, BACKGROUND, UNITS)
    for x in scores.values():
        assert (jnp.argmax(x, axis=1) == PLANTED).mean() >= 0.95
    ranked = jnp.ones((SAMPLES, UNITS.count), bool)
    scores["random"] = jax.random.uniform(jax.random.PRNGKey(1), ranked.shape)
    gain = control.gains(planted, INPUTS, BACKGROUND, UNITS, scores, ranked, jax.random.PRNGKey(2))
    for name in ("occlusion", "integrated_gradients"):
        for part in ("all", "pixels"):
            assert (gain[name][part] > 0).mean() > 0.8
    # A random ranking gains nothing over random rankings, within three standard errors.
    noise = gain["random"]["all"]
    assert abs(noise.mean()) < 3 * noise.std() / SAMPLES**0.5


def test_curves_by_hand():
    # The value is 4 for unit 0 and 2 for unit 1; unit 2 is not ranked, and is always kept.
    def value(keep):
        return keep @ jnp.array([4.0, 2.0, 1.0])

    ranked = jnp.array([[True, True, False]])
    found = faithfulness.curves(value, jnp.array([[9.0, 5.0, 7.0]]), ranked, steps=2)
    np.testing.assert_array_equal(found.deletion[:, 0], [7, 3, 1])
    np.testing.assert_array_equal(found.insertion[:, 0], [1, 5, 7])
    # Areas: insertion (3 + 6) / 2, deletion (5 + 2) / 2.
    np.testing.assert_allclose(found.gain(), [1.0])


def test_rank_correlation():
    ranked = jnp.array([[True, True, True, False]])
    a = jnp.array([[3.0, 2.0, 1.0, 9.0]])
    np.testing.assert_allclose(faithfulness.rank_correlation(a, a, ranked), [1.0])
    np.testing.assert_allclose(faithfulness.rank_correlation(a, -a, ranked), [-1.0])


def test_randomize_permutes_the_named_submodules_only():
    params = {"a": {"kernel": jnp.arange(50.0)}, "b": {"kernel": jnp.arange(50.0)}}
    changed = faithfulness.randomize({"params": params}, jax.random.PRNGKey(0), ["a"])["params"]
    assert (changed["b"]["kernel"] == params["b"]["kernel"]).all()
    assert (changed["a"]["kernel"] != params["a"]["kernel"]).any()
    np.testing.assert_array_equal(jnp.sort(changed["a"]["kernel"]), params["a"]["kernel"])


def network(**changes):
    options = {
        "kind": "continuous", "actions": 2, "vocabulary": 9, "width": 16, "layers": 2, "heads": 2,
        "patch": PATCH, "patch_margin": 1, "patch_hidden": 8,
    }  # fmt: skip
    return MultimodalPolicy(**options | changes)


def make_observation(frames=1):
    rng = np.random.default_rng(0)
    lead = (4, frames) if frames > 1 else (4,)
    mask = np.arange(5) < np.array([[5], [3], [4], [5]])
    return {
        "pixels": jnp.asarray(rng.integers(0, 256, (*lead, 8, 8, 3)), jnp.uint8),
        "instruction": {"tokens": jnp.asarray(rng.integers(1, 9, (4, 5)) * mask), "mask": mask},
        "proprio": jnp.asarray(rng.normal(size=(*lead, 3)), jnp.float32),
    }


@pytest.mark.parametrize("frames", [1, 2])
def test_features_reproduce_the_output_of_the_policy(frames):
    model, observation = network(), make_observation(frames)
    params = jax.jit(model.init)(jax.random.PRNGKey(0), observation)
    inputs = units.features(lambda x: model.apply(params, x), observation)
    layout = units.units(inputs, PATCH)
    assert layout == units.Units(frames, 2, 2, 5, 3, PATCH)

    def value(x):
        return units.predict_from(lambda x: model.apply(params, x), observation, x).value

    np.testing.assert_allclose(value(inputs), model.apply(params, observation).value, atol=1e-6)
    # Units that are all taken from the background give the background.
    background = jax.tree.map(lambda x: x + 1, inputs)
    none = jnp.zeros((4, layout.count), bool)
    mixed = layout.mix(inputs, background, none)
    assert all((a == b).all() for a, b in zip(mixed, background, strict=True))


def test_attention_can_be_read_and_differentiated():
    model, observation = network(), make_observation()
    params = jax.jit(model.init)(jax.random.PRNGKey(0), observation)
    plain = model.apply(params, observation)
    output, _ = model.apply(params, observation, mutable=["attention"])
    np.testing.assert_allclose(output.value, plain.value, atol=1e-5)
    weights, gradients = relevance.attention_with_gradients(
        model, params, observation, lambda output: output.value
    )
    tokens = 5 + 4 + 1 + 2
    assert [x.shape for x in weights] == [(4, 2, tokens, tokens), (4, 2, 2, tokens)]
    assert [x.shape for x in gradients] == [x.shape for x in weights]
    np.testing.assert_allclose(weights[1].sum(-1), 1.0, atol=1e-5)
    # In the last block the value depends on the readout of the value, not on that of the policy.
    assert (gradients[1][:, :, 0] == 0).all() and (gradients[1][:, :, 1] != 0).any()
    # No token reads the padding of the second sample, whose instruction has three words.
    scores = relevance.token_scores(
        model, params, observation, units.Units(1, 2, 2, 5, 3, PATCH), lambda x: x.value
    )
    for x in scores.values():
        assert x.shape == (4, 4 + 5 + 3)
        assert (x[1, 4 + 3 : 4 + 5] == 0).all() and (x[0, 4:9] != 0).any()


def test_propagation_by_hand():
    # In the first block token 1 reads 0.5 of token 0; in the second one, which computes the last
    # token only, token 2 reads 0.4 of token 1, and thereby 0.4 * 0.5 of token 0.
    first = jnp.zeros((1, 3, 3)).at[0, 1, 0].set(0.5)
    second = jnp.array([[[0.0, 0.4, 0.0]]])
    found = relevance.propagate([first, second])
    np.testing.assert_allclose(found, [[[1, 0, 0], [0.5, 1, 0], [0.2, 0.4, 1]]], atol=1e-6)
