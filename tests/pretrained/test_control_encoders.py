"""Tests of pretrained encoders in the control policy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import mmrl_jax
from mmrl_jax import problems
from mmrl_jax.models.policy import MultimodalPolicy
from mmrl_jax.pretrained import bundled_weights, control_encoders
from mmrl_jax.problems import control, control_models
from mmrl_jax.training import loop
from tests import hub


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clip")
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
    )
    model = hub.save(transformers.CLIPVisionModel(config), directory)
    how = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (directory / "preprocessor_config.json").write_text(json.dumps(how))
    return str(directory), model


# Everything but the pretrained encoder of the images.
NOT_VISION = r"params/(?!vision_encoder/).*"


def small(*, trainable=".*", **changes):
    stage = {"num_envs": 4, "unroll_length": 3, "num_minibatches": 2, "trainable": trainable}
    return mmrl_jax.get_config(
        "reach_ppo",
        {
            "stages": ("ppo",),
            "mesh": {"data": 1},
            "model": {"width": 16, "layers": 1, "patch_hidden": 16} | changes,
            "ppo": stage,
        },
    )


def initial(config):
    """Returns the problem of a config, its initial parameters, and its network as a function."""
    problem = problems.make(config)
    network, model = problem.network, config.model
    params = control_models.init_params(network, problem.env, model, jax.random.key(0))
    return problem, params, control_models.make_apply(network, problem.mesh)


def observe(config, count=2):
    env = control.make_env(config)
    keys = jax.random.split(jax.random.PRNGKey(0), count)
    return env, jax.jit(env.reset)(keys).obs


def test_every_sentence_of_the_environment_is_known():
    env = control.make_env(small())
    vocabulary = env.vocabulary
    assert len(vocabulary.sentences) == 10 * 6 * 6
    for sentence in vocabulary.sentences[::7]:
        assert vocabulary.decode(vocabulary.encode(sentence)) == sentence


def test_instructions_are_read_by_the_real_minilm():
    env, obs = observe(small(), 3)
    vocabulary = env.vocabulary
    reader = control_encoders.sentence_reader("minilm", vocabulary.sentences, vocabulary.words)
    features, present = reader(obs["instruction"]["tokens"], obs["instruction"]["mask"])
    directory = bundled_weights.minilm()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    bert = transformers.AutoModel.from_pretrained(directory).eval()
    for i in range(3):
        text = vocabulary.decode(np.asarray(obs["instruction"]["tokens"][i]))
        with torch.inference_mode():
            expected = bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy()
        assert int(present[i].sum()) == len(expected)
        np.testing.assert_allclose(features[i, : len(expected)], expected, atol=2e-4)


def test_an_unknown_instruction_gives_no_features():
    vocabulary = control.make_env(small()).vocabulary
    reader = control_encoders.sentence_reader("minilm", vocabulary.sentences, vocabulary.words)
    tokens = jnp.asarray(vocabulary.encode("ball touch the"))[None]
    assert np.isnan(reader(tokens, tokens != 0)[0]).all()


def test_steps_that_do_not_count_stop_no_update():
    config = small(text_encoder="minilm")
    config.ppo.unroll_length = config.env.options.episode_length + 1  # The last step only resets.
    stage = problems.make(config).stage("ppo")
    carry, shardings = loop.start(stage)
    _, metrics = loop.make_dispatch(stage.update, 1, shardings)(carry, stage.constants)
    assert float(metrics["rollout/valid_fraction"]) == pytest.approx(16 / 17)
    assert (float(metrics["optimizer/steps"]), float(metrics["optimizer/skipped_steps"])) == (2, 0)


def test_no_instruction_at_all_is_finite():
    # Learners put zeros in place of what is observed at a step that only resets.
    vocabulary = control.make_env(small()).vocabulary
    reader = control_encoders.sentence_reader("minilm", vocabulary.sentences, vocabulary.words)
    tokens = jnp.zeros((1, vocabulary.length), jnp.int32)
    assert np.isfinite(reader(tokens, tokens != 0)[0]).all()


def test_the_policy_reads_what_the_encoder_says():
    config = small(text_encoder="minilm")
    env, obs = observe(config)
    _, params, apply = initial(config)
    assert "text" not in params["params"]

    def mean(obs):
        return np.asarray(apply(params, obs).distribution.mean)

    said = env.vocabulary.encode("touch the red ball"), env.vocabulary.encode("touch the blue can")
    outputs = []
    for tokens in said:
        tokens = jnp.asarray(np.stack([tokens, tokens]))
        outputs.append(mean(obs | {"instruction": {"tokens": tokens, "mask": tokens != 0}}))
    assert np.isfinite(outputs).all() and np.abs(outputs[0] - outputs[1]).max() > 1e-4


def test_the_vision_tower_is_the_pretrained_one(clip):
    directory, theirs = clip
    config = small(vision_encoder=directory)
    env, obs = observe(config)
    problem, params, apply = initial(config)
    encoder = control_encoders.vision_encoder(directory, jnp.float32, False)
    tower = {"params": params["params"]["vision_encoder"]}
    with jax.default_matmul_precision("highest"):
        features = encoder.module.apply(tower, obs["pixels"])
    size = (2, 24, 24, 3)
    pixels = np.clip(jax.image.resize(obs["pixels"] / 255.0, size, "bicubic"), 0, 1)
    pixels = (pixels - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.4])
    with torch.inference_mode():
        inputs = torch.tensor(np.moveaxis(pixels, -1, 1), dtype=torch.float32)
        expected = theirs(inputs).last_hidden_state.numpy()[:, 1:]
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)
    # Who evaluates a run asks for its learner's shapes before anything else.
    control_encoders.vision_encoder.cache_clear()
    shapes = jax.tree.map(jnp.shape, problem.checkpoint_parts("ppo")["params"])
    assert shapes == jax.tree.map(jnp.shape, params)
    # Where to point is asked of its 3x3 patches.
    output = apply(params, obs)
    assert output.auxiliary["target_pixel"].shape == (2, 3, 3)


def test_frozen_parameters_stay_and_have_no_optimizer_state(clip):
    sizes = {"num_envs": 4, "unroll_length": 3, "num_epochs": 1, "num_minibatches": 2}
    config = mmrl_jax.get_config(
        "recall_ppo",
        {
            "mesh": {"data": 1},
            "model": {"width": 16, "heads": 1, "vision_encoder": clip[0]},
            "ppo": sizes | {"trainable": NOT_VISION},
        },
    )
    stage = problems.make(config).stage("ppo")
    carry, shardings = loop.start(stage)
    old = jax.device_get(carry.learner.params["params"])
    carry, metrics = loop.make_dispatch(stage.update, 1, shardings)(carry, stage.constants)
    new = jax.device_get(carry.learner.params["params"])
    assert float(metrics["optimizer/steps"]) == 2
    jax.tree.map(np.testing.assert_array_equal, old["vision_encoder"], new["vision_encoder"])
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), old, new)
    assert moved["vision_projection"]["project"]["kernel"] > 0
    sizes = [x.size for x in jax.tree.leaves(carry.learner.opt_state)]
    trained = sum(
        x.size
        for name, tree in new.items()
        if name != "vision_encoder"
        for x in jax.tree.leaves(tree)
    )
    assert sum(sizes) <= 2 * trained + 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": "vision/nothing"}, "ppo.trainable='vision/nothing': .* matches no leaf"),
        ({"vision_encoder": "/nowhere"}, "/nowhere has no config.json"),
        ({"text_encoder": "/nowhere"}, "/nowhere has no config.json"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    config = small(**changes)
    with pytest.raises(ValueError, match=message):
        problems.make(config)


def test_modules_and_functions_are_encoders_alike(clip):
    encoder = control_encoders.vision_encoder(clip[0], jnp.float32, False)
    _, obs = observe(small())
    common = dict(kind="continuous", actions=2, vocabulary=30, width=16, heads=1, layers=1)

    def frozen(pixels):
        return encoder.module.apply({"params": encoder.params}, pixels)

    policy = MultimodalPolicy(**common, vision_encoder=frozen)
    params = policy.init(jax.random.key(0), obs)
    assert "vision_encoder" not in params["params"]
    trained = MultimodalPolicy(**common, vision_encoder=encoder.module)
    both = {"params": params["params"] | {"vision_encoder": encoder.params}}
    np.testing.assert_array_equal(policy.apply(params, obs).value, trained.apply(both, obs).value)
