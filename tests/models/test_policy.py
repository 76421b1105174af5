"""Tests of mmrl_jax.models: the multimodal policy, its tokens and mask, and the plain MLP."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.models import policy as policies
from mmrl_jax.models.encoders import patchify, sincos_2d
from mmrl_jax.models.masks import Mask
from mmrl_jax.models.mlp import MLPPolicy
from mmrl_jax.models.policy import MODALITIES, MultimodalPolicy, token_layout
from mmrl_jax.models.transformer import BlockSpec, Context, Transformer
from mmrl_jax.rl.distributions import Categorical, TanhNormal

# Compiled quickly: nothing here runs for long.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

BATCH, WORDS, VOCABULARY, EDGE, PROPRIO, ACTIONS = 3, 4, 7, 8, 5, 2
PADDING = 6  # A token id that only stands in padding here.


def network(**changes):
    arguments = {
        "kind": "continuous",
        "actions": ACTIONS,
        "vocabulary": VOCABULARY,
        "width": 8,
        "layers": 1,
        "heads": 2,
        "mlp_ratio": 2,
        "patch": 4,
        "patch_hidden": 8,
        "vision_layers": 0,
        "text_layers": 1,
        "film": True,
        "auxiliary": (("place", 3),),
        "pointing": "target",
        "dtype": jnp.float32,
        "remat": False,
    } | changes
    return MultimodalPolicy(**arguments)


def observe(seed=0, frames=None, height=EDGE, width=EDGE):
    keys = jax.random.split(jax.random.key(seed), 3)
    history = () if frames is None else (frames,)
    pixels = jax.random.randint(keys[0], (BATCH, *history, height, width, 3), 0, 256)
    tokens = jax.random.randint(keys[1], (BATCH, WORDS), 0, PADDING)
    lengths = jnp.array([WORDS, 2, 1])
    mask = jnp.arange(WORDS) < lengths[:, None]
    return {
        "pixels": pixels.astype(jnp.uint8),
        "instruction": {"tokens": jnp.where(mask, tokens, PADDING), "mask": mask},
        "proprio": jax.random.normal(keys[2], (BATCH, *history, PROPRIO)),
    }


def filled(shapes, seed=0):
    """Returns random parameters, also for the heads, without compiling an initializer."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        x = rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[0])
        return jnp.asarray(x + (path[-1].key == "scale"), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@functools.cache
def initialized(frames=None, **changes):
    """Returns the compiled network and its parameters."""
    model = network(**changes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), observe(frames=frames))
    return jit(model.apply), filled(shapes)


@functools.cache
def compiled_gradient(**changes):
    """Returns the compiled gradient of the sum of all action means and values."""

    def total(params, observation):
        output = network(**changes).apply(params, observation)
        return output.distribution.mean.sum() + output.value.sum()

    return jit(jax.grad(total))


def mean_and_value(apply, params, observation):
    output = apply(params, observation)
    return np.concatenate([output.distribution.mean, output.value[:, None]], axis=1)


def test_patchify_by_hand():
    # Image of 4 x 4 with pixel values 0..47, patches of 2: the first patch holds rows 0 and 1,
    # columns 0 and 1: values 0-5 and 12-17; the second one columns 2 and 3: 6-11 and 18-23.
    pixels = jnp.arange(48, dtype=jnp.uint8).reshape(1, 4, 4, 3)
    patches = patchify(pixels, 2, 0)
    assert patches.shape == (1, 4, 12)
    first = np.array([*range(0, 6), *range(12, 18)])
    np.testing.assert_allclose(patches[0, 0], first / 127.5 - 1, rtol=1e-6)
    np.testing.assert_allclose(patches[0, 1], (first + 6) / 127.5 - 1, rtol=1e-6)
    np.testing.assert_allclose(patches[0, 2], (first + 24) / 127.5 - 1, rtol=1e-6)
    assert float(patchify(jnp.full((1, 2, 2, 3), 255, jnp.uint8), 2, 0).max()) == 1.0


def test_a_margin_shows_the_surroundings_and_repeats_the_edge_of_the_image():
    # Image of 4 x 4, one number a pixel, 0..15; patches of 2 with a margin of 1 are windows of 4.
    pixels = jnp.repeat(jnp.arange(16, dtype=jnp.uint8).reshape(1, 4, 4, 1), 3, axis=-1)
    windows = patchify(pixels, 2, 1).reshape(4, 4, 4, 3)[..., 0]
    first = [[0, 0, 1, 2], [0, 0, 1, 2], [4, 4, 5, 6], [8, 8, 9, 10]]
    last = [[5, 6, 7, 7], [9, 10, 11, 11], [13, 14, 15, 15], [13, 14, 15, 15]]
    np.testing.assert_allclose(windows[0], np.array(first) / 127.5 - 1, rtol=1e-6)
    np.testing.assert_allclose(windows[3], np.array(last) / 127.5 - 1, rtol=1e-6)


@pytest.mark.parametrize("height,width", [(8, 10), (10, 8)])
def test_an_image_that_patches_do_not_divide_is_refused(height, width):
    with pytest.raises(ValueError, match=f"{height}x{width} is not divisible into patches of 4"):
        jax.eval_shape(network().init, jax.random.key(0), observe(height=height, width=width))


def test_places_of_a_grid_are_all_different():
    places = sincos_2d(3, 5, 16)
    assert places.shape == (15, 16)
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1)
    assert distance[~np.eye(15, dtype=bool)].min() > 0.1


def test_token_layout_by_hand():
    # w w | p p p j | p p p j | readout readout
    layout = token_layout(words=2, frames=2, patches=3)
    names = [MODALITIES[m] for m in layout.modality]
    frame = ["pixels"] * 3 + ["proprio"]
    assert names == ["instruction"] * 2 + frame + frame + ["readout"] * 2
    assert layout.frame.tolist() == [-1, -1, 0, 0, 0, 0, 1, 1, 1, 1, -1, -1]
    assert layout.place.tolist() == [0, 1, 0, 1, 2, 0, 0, 1, 2, 0, 0, 1]


def test_attention_mask_by_hand():
    # Tokens: word, padding | p j | p j | r_policy r_value, as drawn in the docstring.
    layout = token_layout(words=2, frames=2, patches=1)
    mask = policies.attention_mask(jnp.array([[True, False]]), layout)
    word, first, second = (
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 1, 1, 0, 0, 0, 0],
        [1, 0, 1, 1, 1, 1, 0, 0],
    )
    expected = [word, word, first, first, second, second]
    expected += [[1, 0, 1, 1, 1, 1, 1, 0], [1, 0, 1, 1, 1, 1, 0, 1]]
    np.testing.assert_array_equal(mask[0], np.array(expected, bool))


def test_gradients_flow_along_the_attention_mask_and_nowhere_else():
    layout = token_layout(words=3, frames=3, patches=2)
    length = len(layout.modality)
    mask = policies.attention_mask(jnp.array([[True, True, False]]), layout)
    context = Context(Mask(explicit=mask))
    model = Transformer(layers=3, block=BlockSpec(heads=2, hidden=16))
    x = jax.random.normal(jax.random.key(0), (1, length, 8))
    params = filled(jax.eval_shape(model.init, jax.random.key(1), x, context))
    weight = jax.random.normal(jax.random.key(2), (8,))
    jacobian = jit(jax.jacrev(lambda x: model.apply(params, x, context)[0] @ weight))(x)[:, 0]
    reaches = np.abs(jacobian).max(-1) > 0
    modality, frame = layout.modality, layout.frame
    others = ~np.eye(length, dtype=bool)
    assert not reaches[:, 2][others[:, 2]].any()  # Nobody reads padding.
    for readout in (length - 2, length - 1):
        assert not reaches[:, readout][others[:, readout]].any()
        assert reaches[readout, np.isin(modality, (1, 2))].all()
        assert reaches[readout, :2].all()
    for k in range(3):
        assert not reaches[np.ix_(frame == k, frame > k)].any()
        assert reaches[np.ix_(frame == k, (frame >= 0) & (frame <= k))].all()
    assert not reaches[np.ix_(modality == 0, modality != 0)].any()


@pytest.mark.parametrize("fusion", policies.FUSIONS)
@pytest.mark.parametrize("frames", [None, 2])
def test_padding_words_have_exactly_no_influence(frames, fusion):
    apply, params = initialized(frames=frames, fusion=fusion)
    observation = observe(frames=frames)
    before = mean_and_value(apply, params, observation)
    tokens, mask = observation["instruction"]["tokens"], observation["instruction"]["mask"]
    other = observation | {"instruction": {"tokens": jnp.where(mask, tokens, 3), "mask": mask}}
    np.testing.assert_array_equal(mean_and_value(apply, params, other), before)
    # And the words themselves have some.
    other = observation | {"instruction": {"tokens": (tokens + 1) % PADDING, "mask": mask}}
    assert np.abs(mean_and_value(apply, params, other) - before).max() > 1e-3

    words = compiled_gradient(fusion=fusion)(params, observation)["params"]["text"]["words"]
    words = np.abs(words).max(axis=1)
    assert words[PADDING] == 0.0
    assert words[np.unique(tokens[mask])].min() > 0


def test_an_empty_instruction_is_finite():
    apply, params = initialized()
    observation = observe()
    nothing = jnp.zeros((BATCH, WORDS), bool)
    observation["instruction"] = observation["instruction"] | {"mask": nothing}

    assert np.isfinite(mean_and_value(apply, params, observation)).all()
    gradients = compiled_gradient()(params, observation)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize("fusion", policies.FUSIONS)
@pytest.mark.parametrize("film", [True, False])
def test_every_modality_reaches_action_and_value(film, fusion):
    apply, params = initialized(film=film, fusion=fusion, layers=2)
    observation, other = observe(0), observe(1)
    before = mean_and_value(apply, params, observation)
    assert before.shape == (BATCH, ACTIONS + 1)
    for name in ("pixels", "proprio"):
        after = mean_and_value(apply, params, observation | {name: other[name]})
        assert np.abs(after - before).min() > 1e-5, name
    # The samples of a batch do not read each other.
    mixed = jax.tree.map(lambda a, b: jnp.concatenate([a[:1], b[1:]]), observation, other)
    np.testing.assert_allclose(
        mean_and_value(apply, params, mixed)[0], before[0], rtol=1e-4, atol=1e-5
    )


def test_other_observations_are_not_read():
    apply, params = initialized()
    observation = observe()
    more = observation | {"privileged": jnp.full((BATCH, 3), 1e9), "target": jnp.ones(BATCH)}
    np.testing.assert_array_equal(
        mean_and_value(apply, params, more), mean_and_value(apply, params, observation)
    )


def test_auxiliary_predictions_are_no_input_of_action_or_value():
    apply, params = initialized()
    gradients = compiled_gradient()(params, observe())["params"]
    flat = jax.tree_util.tree_flatten_with_path(gradients)[0]
    heads = {"auxiliary_place": 0, "pointing": 0}
    for path, gradient in flat:
        if path[0].key in heads:
            heads[path[0].key] += 1
            np.testing.assert_array_equal(gradient, 0)
    assert heads == {"auxiliary_place": 2, "pointing": 2}  # A kernel and a bias each.
    assert np.abs(gradients["proprio"]["token"]["kernel"]).max() > 0

    # Without them, the actions are the same.
    plain = network(auxiliary=(), pointing=None)
    rest = {k: v for k, v in params["params"].items() if k not in heads}
    np.testing.assert_allclose(
        mean_and_value(jit(plain.apply), {"params": rest}, observe()),
        mean_and_value(apply, params, observe()),
        rtol=1e-5,
        atol=1e-6,
    )


def test_shapes_of_the_output():
    apply, params = initialized()
    output = apply(params, observe())
    assert isinstance(output.distribution, TanhNormal)
    assert output.distribution.mean.shape == output.distribution.log_std.shape == (BATCH, ACTIONS)
    assert output.value.shape == (BATCH,)
    assert {name: x.shape for name, x in output.auxiliary.items()} == {
        "place": (BATCH, 3),
        "target": (BATCH, 2, 2),
    }
    assert {x.dtype for x in jax.tree.leaves(output)} == {jnp.dtype("float32")}


def test_pointing_logits_lie_as_the_patches_do():
    # 8 x 12 pixels with patches of 4: 2 rows of 3. Without self-attention in the vision encoder
    # a patch's logit depends on its own pixels only.
    model = network(vision_layers=0, film=False)
    observation = observe(height=8, width=12)
    params = filled(jax.eval_shape(model.init, jax.random.key(0), observation))
    point = jit(lambda o: model.apply(params, o).auxiliary["target"])
    before = point(observation)
    assert before.shape == (BATCH, 2, 3)
    pixels = observation["pixels"].at[:, 4:, 8:].set(0)  # The patch in row 1, column 2.
    changed = np.abs(point(observation | {"pixels": pixels}) - before).max(axis=0) > 0
    np.testing.assert_array_equal(changed, [[False, False, False], [False, False, True]])


def test_discrete_actions():
    model = network(kind="discrete", actions=5)
    params = jit(model.init)(jax.random.key(0), observe())
    output = jit(model.apply)(params, observe())
    assert isinstance(output.distribution, Categorical)
    assert output.distribution.logits.shape == (BATCH, 5)
    # It starts near uniform: entropy near log 5.
    entropy = output.distribution.entropy(jax.random.key(0))
    np.testing.assert_allclose(entropy, np.log(5), atol=0.05)
    assert "log_std" not in params["params"]["policy_head"]


def test_the_policy_starts_in_the_center_of_the_action_range():
    model = network()
    params = jit(model.init)(jax.random.key(0), observe())
    distribution = jit(model.apply)(params, observe()).distribution
    assert np.abs(distribution.mean).max() < 0.3
    np.testing.assert_array_equal(distribution.log_std, 0)


def test_a_history_is_read_and_its_order_matters():
    apply, params = initialized(frames=3)
    observation = observe(frames=3)
    before = mean_and_value(apply, params, observation)
    for name in ("pixels", "proprio"):
        for k in range(3):
            changed = observation[name].at[:, k].set(observe(1, frames=3)[name][:, k])
            after = mean_and_value(apply, params, observation | {name: changed})
            assert np.abs(after - before).max() > 1e-4, (name, k)
    backwards = {name: observation[name][:, ::-1] for name in ("pixels", "proprio")}
    assert np.abs(mean_and_value(apply, params, observation | backwards) - before).max() > 1e-4
    # The picture that is pointed at is the newest.
    older = observation | {"pixels": observation["pixels"].at[:, :2].set(0)}
    np.testing.assert_array_equal(
        apply(params, older).auxiliary["target"], apply(params, observation).auxiliary["target"]
    )


def test_a_history_of_one_frame_is_the_policy_without_a_history():
    apply, params = initialized()
    observation = observe()
    one = {name: observation[name][:, None] for name in ("pixels", "proprio")}
    np.testing.assert_array_equal(
        mean_and_value(apply, params, observation | one),
        mean_and_value(apply, params, observation),
    )


def test_bfloat16_keeps_float32_parameters_heads_and_meaning():
    apply, params = initialized()
    model = network(dtype=jnp.bfloat16)
    fresh = jax.eval_shape(model.init, jax.random.key(0), observe(frames=2))
    assert {x.dtype for x in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    output = jit(model.apply)(params, observe())
    assert {x.dtype for x in jax.tree.leaves(output)} == {jnp.dtype("float32")}
    # The products run in bfloat16, and in the stacks of one modality too.
    deep = network(dtype=jnp.bfloat16, vision_layers=1, text_layers=1)
    jaxpr = jax.make_jaxpr(deep.init)(jax.random.key(0), observe(frames=2))
    products = [line for line in str(jaxpr).splitlines() if "dot_general" in line]
    low = [line for line in products if ":bf16" in line]
    # Those in float32 are the four heads (action, value, auxiliary, pointing) and the attention
    # scores of three blocks.
    assert len(products) - len(low) == 4 + 3 < len(low)
    # Means are of size 1, and bfloat16 keeps 8 bits of what they are computed from.
    np.testing.assert_allclose(
        output.distribution.mean, apply(params, observe()).distribution.mean, atol=0.3
    )


def count(jaxpr, *names):
    """Number of primitives of these names, also in what is traced once and called several times."""
    inner = [sub for eqn in jaxpr.eqns for sub in jax.extend.core.jaxprs_in_params(eqn.params)]
    own = sum(eqn.primitive.name in names for eqn in jaxpr.eqns)
    return own + sum(count(sub, *names) for sub in inner)


def test_remat_covers_every_block_of_every_stack_and_changes_no_output():
    def remats(**changes):
        deep = network(layers=2, vision_layers=3, text_layers=1, **changes)
        params = jax.eval_shape(deep.init, jax.random.key(0), observe())
        jaxpr = jax.make_jaxpr(deep.apply)(params, observe()).jaxpr
        return count(jaxpr, "checkpoint", "remat2")

    assert remats(remat=True) == 2 + 3 + 1 and remats() == 0
    apply, params = initialized()
    np.testing.assert_allclose(
        mean_and_value(jit(network(remat=True).apply), params, observe()),
        mean_and_value(apply, params, observe()),
        rtol=1e-5,
        atol=1e-5,
    )


def test_dots_recomputes_all_but_the_products_with_parameters():
    def products(remat):
        stack = Transformer(2, BlockSpec(heads=2, hidden=16), remat=remat)
        x, mask = jnp.ones((2, 3, 8)), Mask(causal=True)
        params = jax.eval_shape(stack.init, jax.random.key(0), x, Context(mask))
        loss = lambda params: stack.apply(params, x, Context(mask)).sum()  # noqa: E731
        return count(jax.make_jaxpr(jax.grad(loss))(params).jaxpr, "dot_general")

    # A block has 6 products with parameters: query, key, value, output, 2 of the MLP; 2 have none.
    assert products(remat="dots") == products(remat=False) + 2 * 2
    assert products(remat=True) >= products(remat="dots") + 2 * 5


def test_a_policy_of_the_size_of_vit_large_has_its_parameters():
    # 24 blocks of 12 * 1024^2 = 302M matrix elements (4 in attention, 8 in the MLP), and encoders.
    model = network(
        width=1024, layers=24, heads=16, mlp_ratio=4, patch=16, patch_hidden=1024,
        vision_layers=0, text_layers=0, auxiliary=(), pointing=None,
        dtype=jnp.bfloat16, remat=True,
    )  # fmt: skip
    observation = jax.eval_shape(lambda: observe(height=224, width=224))
    shapes = jax.eval_shape(model.init, jax.random.key(0), observation)
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert 302e6 < count < 315e6


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_the_mlp_reads_proprioception_alone(kind):
    model = MLPPolicy(kind=kind, actions=ACTIONS, policy_layers=(8,), value_layers=(8, 8))
    params = filled(jax.eval_shape(model.init, jax.random.key(0), observe()))
    run = jit(model.apply)
    output, other = run(params, observe()), observe(1)
    assert output.value.shape == (BATCH,)
    assert output.distribution.mode().shape[0] == BATCH
    same_joints = run(params, other | {"proprio": observe()["proprio"]})
    jax.tree.map(np.testing.assert_array_equal, same_joints, output)
    assert not np.allclose(output.value, run(params, other).value)
    # Policy and value share no layer.
    gradient = jit(jax.grad(lambda p: model.apply(p, observe()).value.sum()))(params)["params"]
    for name, part in gradient.items():
        if name.startswith("policy"):
            assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(part)), name
