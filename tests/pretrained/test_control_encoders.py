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
from mmrl_jax.pretrained import bundled_weights, control_encoders, vision_encoders
from mmrl_jax.problems import control, control_models
from mmrl_jax.training import loop
from tests import hub, processors


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


def read(encoder, size=None):
    """Returns the module of a vision encoder and its variables."""
    module = vision_encoders.read_encoder(encoder, size, dtype=jnp.float32, remat=False)
    return module, {"params": vision_encoders.read_params(encoder)}


def expected_features(theirs, pixels, edge, mean, std):
    """Returns the tokens of torch's tower for whole images that are resized to a square."""
    pixels = jax.image.resize(pixels / 255.0, (len(pixels), edge, edge, 3), "bicubic")
    pixels = (np.clip(pixels, 0, 1) - np.array(mean)) / np.array(std)
    with torch.inference_mode():
        inputs = torch.tensor(np.moveaxis(pixels, -1, 1), dtype=torch.float32)
        return theirs(inputs).last_hidden_state.numpy()


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
    module, _ = read(directory)
    tower = {"params": params["params"]["vision_encoder"]}
    with jax.default_matmul_precision("highest"):
        features = module.apply(tower, obs["pixels"])
    expected = expected_features(theirs, obs["pixels"], 24, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])[:, 1:]
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)
    # Who evaluates a run asks for its learner's shapes before anything else.
    vision_encoders.read_encoder.cache_clear()
    shapes = jax.tree.map(jnp.shape, problem.checkpoint_parts("ppo")["params"])
    assert shapes == jax.tree.map(jnp.shape, params)
    # Where to point is asked of its 3x3 patches.
    output = apply(params, obs)
    assert output.auxiliary["target_pixel"].shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("kind", "leading", "size", "edge"),
    [("Dinov2", 1, None, 32), ("Dinov2WithRegisters", 5, 40, 40)],
)
def test_dinov2_sees_whole_images_at_the_size_that_is_set(kind, leading, size, edge, tmp_path):
    theirs = processors.save_dinov2(tmp_path, kind, image_mean=[0.5, 0.4, 0.3])
    config = small(vision_encoder=str(tmp_path), vision_size=size)
    _, obs = observe(config)
    _, params, apply = initial(config)
    output = apply(params, obs)  # The policy points at one of the patches.
    assert output.auxiliary["target_pixel"].shape == (2, edge // 8, edge // 8)
    module, _ = read(str(tmp_path), size)
    with jax.default_matmul_precision("highest"):
        features = module.apply({"params": params["params"]["vision_encoder"]}, obs["pixels"])
    std = [0.26862954, 0.26130258, 0.27577711]  # transformers' default of this processor.
    expected = expected_features(theirs, obs["pixels"], edge, [0.5, 0.4, 0.3], std)[:, leading:]
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("images", "size", "message"),
    [
        ({}, 20, "20x20 pixels are not divisible into patches of 8.*multiple of 8"),
        ({"crop_size": {"height": 30, "width": 30}}, None, "30x30 pixels are not divisible"),
        ({"crop_size": {"height": 24, "width": 32}}, None, r"\[24, 32\] pixels are not square"),
        ({"do_center_crop": False}, None, "36x36 pixels are not divisible"),
    ],
)
def test_a_size_that_dinov2_cannot_have_is_refused(images, size, message, tmp_path):
    processors.save_dinov2(tmp_path, **images)
    with pytest.raises(ValueError, match=rf"model.vision_encoder=.*{message}"):
        problems.make(small(vision_encoder=str(tmp_path), vision_size=size))


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
        ({"vision_size": 112}, "model.vision_size=112, but model.vision_encoder=None"),
        ({"vision_encoder": "dinov2"}, "model.vision_encoder='dinov2': no weights"),
        ({"text_encoder": "/nowhere"}, "/nowhere has no config.json"),
    ],
)
def test_what_cannot_be_is_refused(changes, message, monkeypatch):
    def absent():
        raise ImportError("no weights")

    monkeypatch.setattr(bundled_weights, "dinov2", absent)
    config = small(**changes)
    with pytest.raises(ValueError, match=message):
        problems.make(config)


def test_clip_has_one_size(clip):
    with pytest.raises(ValueError, match="vision_size=32, but .* takes images of 24x24 pixels"):
        problems.make(small(vision_encoder=clip[0], vision_size=32))


def test_modules_and_functions_are_encoders_alike(clip):
    module, variables = read(clip[0])
    _, obs = observe(small())
    common = dict(kind="continuous", actions=2, vocabulary=30, width=16, heads=1, layers=1)

    def frozen(pixels):
        return module.apply(variables, pixels)

    policy = MultimodalPolicy(**common, vision_encoder=frozen)
    params = policy.init(jax.random.key(0), obs)
    assert "vision_encoder" not in params["params"]
    trained = MultimodalPolicy(**common, vision_encoder=module)
    both = {"params": params["params"] | {"vision_encoder": variables["params"]}}
    np.testing.assert_array_equal(policy.apply(params, obs).value, trained.apply(both, obs).value)
