"""Tests of a pretrained vision-language model as a control policy."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmrl_jax
from mmrl_jax import problems
from mmrl_jax.distributed import mesh as meshes
from mmrl_jax.models.transformer import Transformer
from mmrl_jax.models.vlm_policy import VLMPolicy
from mmrl_jax.pretrained import control_encoders, hub
from mmrl_jax.problems import control, control_models
from mmrl_jax.training import loop
from tests import processors

ADAPTED = {"pattern": r"vlm/language/.*/(query|value)", "rank": 2}
OURS = {"proprio", "readout", "policy_head", "value_head", "auxiliary_target_place", "pointing"}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    @functools.cache
    def written(family):
        return processors.save_model(family, tmp_path_factory.mktemp(family))

    return written


# Everything but the pretrained model itself.
NOT_VLM = r"lora/.*|params/(?!vlm/).*"


def small(directory, *, trainable=".*", **changes):
    model = {
        "checkpoint": directory,
        "prompt": "{image}{instruction}",
        "dtype": "float32",
        "remat": False,
        "lora": {"pattern": None},
    }
    stage = {
        "num_envs": 4,
        "unroll_length": 17,
        "num_minibatches": 2,
        "num_updates": 2,
        "checkpoint_interval": 1,
        "trainable": trainable,
    }
    return mmrl_jax.get_config(
        "reach_vlm",
        {
            "stages": ("ppo",),
            "mesh": {"data": 1},
            "env": {"height": 16, "width": 16},
            "model": model | changes,
            "ppo": stage,
        },
    )


def parts(config):
    """Returns an environment, parameters, the compiled policy and an observation."""
    problem = problems.make(config)
    env, network = problem.env, problem.network
    params = control_models.init_params(network, env, config.model, jax.random.key(0))
    obs = jax.jit(env.reset)(jax.random.split(jax.random.PRNGKey(0), 2)).obs
    apply = jax.jit(control_models.make_apply(network, meshes.make_mesh(1)))
    return env, params, obs, lambda obs: apply(params, obs)


def say(env, obs, *texts):
    tokens = jnp.asarray(np.stack([env.vocabulary.encode(text) for text in texts]))
    return obs | {"instruction": {"tokens": tokens, "mask": tokens != 0}}


@pytest.mark.parametrize("family", ["smolvlm", "llava", "paligemma", "llava_onevision"])
def test_picture_instruction_and_joints_change_what_it_does(family, directories):
    config = small(directories(family))
    env, params, obs, policy = parts(config)
    assert set(params["params"]) == OURS | {"vlm"}
    obs = say(env, obs, "touch the red ball", "touch the red ball")
    other = say(env, obs, "touch the blue can", "touch the red ball")
    first = policy(obs)
    # The whole frame is a square of features: 4x4 patches, of which SmolVLM joins 2x2.
    edge = 2 if family == "smolvlm" else 4
    assert first.auxiliary["target_pixel"].shape == (2, edge, edge)
    assert first.auxiliary["target_place"].shape == (2, 2)

    def moved(obs):
        output = policy(obs)
        means = np.asarray(output.distribution.mean - first.distribution.mean)
        assert np.isfinite(means).all() and np.isfinite(output.value).all()
        assert (np.abs(output.value - first.value) > 1e-6).tolist() == [
            bool(x) for x in np.abs(means).max(axis=1) > 1e-6
        ]
        return (np.abs(means).max(axis=1) > 1e-6).tolist()

    assert moved(obs | {"pixels": obs["pixels"].at[0].set(255)}) == [True, False]
    assert moved(obs | {"proprio": obs["proprio"].at[1].add(1.0)}) == [False, True]
    assert moved(other) == [True, False]


def test_the_model_reads_the_prompt_of_its_processor(directories):
    # The readouts come after the prompt and change nothing before them: what the stack makes of
    # the prompt's tokens is what the pretrained model makes of them.
    directory = directories("smolvlm")
    config = small(directory, prompt="Now {instruction}: {image}.")
    env, params, obs, _ = parts(config)
    obs = say(env, obs, "touch the red ball", "move to the cube that is green")
    network = control_models.make_network(config, env)

    def stack(module, name):
        return isinstance(module, Transformer) and module.name == "stack"

    capture = {"capture_intermediates": stack, "mutable": ["intermediates"]}
    _, state = jax.jit(functools.partial(network.apply, **capture))(params, obs)
    found = state["intermediates"]["vlm"]["language"]["stack"]["__call__"][0]

    model, variables, _ = hub.load_vision_language_model(directory)
    processor = control_encoders.processing.load_processor(directory)
    # A frame is one tile of 32 pixels.
    processor = dataclasses.replace(
        processor, image={**processor.image, "size": {"longest_edge": 32}}
    )
    texts = [f"Now {env.vocabulary.decode(t)}: <image>." for t in obs["instruction"]["tokens"]]
    there = np.ones((2, 1), bool)
    tokens, present = processor.prompts(texts, there, (16, 16), length=None, side="right")
    assert tokens.shape[1] == max(present.sum(axis=1)) and present.sum(axis=1).min() > 20
    images = processor.pixels(obs["pixels"][:, None])
    assert images.pixels.shape[1:3] == (1, 32)
    apply = jax.jit(functools.partial(model.apply, **capture))
    _, state = apply(variables, tokens, present, images)
    expected = state["intermediates"]["language"]["stack"]["__call__"][0]
    np.testing.assert_allclose(
        found[:, : tokens.shape[1]][present], expected[present], rtol=2e-4, atol=2e-4
    )


def test_a_readout_is_read_by_nobody_else_and_reads_everything(directories):
    env, params, obs, _ = parts(small(directories("smolvlm")))
    network = control_models.make_network(small(directories("smolvlm")), env)

    def outputs(readout):
        output = network.apply({"params": params["params"] | {"readout": readout}}, obs)
        return output.distribution.mean, output.value

    jacobian = jax.jit(jax.jacrev(outputs))(params["params"]["readout"])
    mean, value = (np.abs(x).reshape(-1, *x.shape[-2:]).max(axis=(0, 2)) for x in jacobian)
    assert mean[0] > 0 and mean[1] == 0
    assert value[0] == 0 and value[1] > 0


def policy_of(directory):
    """Returns a network with the model's tokens, random parameters, and an observation."""
    said, known, size = ("touch the ball",), ("touch", "the", "ball"), (32, 32)
    read = control_encoders.vision_language_model(
        directory, "{image}{instruction}", said, known, size, jnp.float32, remat=False
    )
    language = read.model.language.clone(layers=2)  # What a token reads is read in turn.
    network = VLMPolicy(
        kind="continuous",
        actions=2,
        vlm=read.model.clone(language=language),
        preprocess_images=read.preprocess_images,
        prompts=lambda tokens, mask: (tokens, mask),
        auxiliary=(("place", 2),),
        pointing="pixel",
    )
    tokens, mask = read.prompts(jnp.array([[1, 2, 3]]), jnp.ones((1, 3), bool))
    rng = np.random.default_rng(0)
    observation = {
        "instruction": {"tokens": tokens, "mask": mask},
        "pixels": rng.integers(0, 256, (1, *size, 3), np.uint8),
        "proprio": rng.normal(size=(1, 4)),
    }
    shapes = jax.eval_shape(network.init, jax.random.key(0), observation)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)
    return network, params, observation


@pytest.mark.parametrize("family", ["llava", "paligemma"])  # Causal, and reading ahead.
def test_padding_around_the_prompt_changes_nothing(family, directories):
    network, params, observation = policy_of(directories(family))
    padded = jax.tree.map(lambda x: np.repeat(x, 3, axis=0), observation)
    paddings = [((0, 0), sides) for sides in ((0, 9), (9, 0), (3, 6))]  # Before and behind.
    tokens, mask = observation["instruction"].values()
    padded["instruction"] = {
        "tokens": np.concatenate([np.pad(tokens, sides, constant_values=7) for sides in paddings]),
        "mask": np.concatenate([np.pad(mask, sides) for sides in paddings]),
    }
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(network.apply)
        one, three = apply(params, observation), apply(params, padded)

    def same(x, y):
        assert np.abs(x).max() > 1e-2
        np.testing.assert_allclose(y, np.repeat(x, 3, axis=0), rtol=1e-5, atol=1e-5)

    same(one.distribution.mean, three.distribution.mean)
    same(one.value, three.value)
    jax.tree.map(same, one.auxiliary, three.auxiliary)


def test_a_newline_is_no_place_to_point_at(directories):
    network, params, observation = policy_of(directories("llava_onevision"))
    params = params["params"]
    # The question is the same, whatever the readout has read.
    params["pointing"]["kernel"] *= 0
    vision = params["vlm"]["vision"]
    other = params["vlm"] | {"vision": vision | {"newline": 0 * vision["newline"]}}
    apply = jax.jit(network.apply)
    one, two = (
        apply({"params": params}, observation),
        apply({"params": params | {"vlm": other}}, observation),
    )
    np.testing.assert_array_equal(one.auxiliary["pixel"], two.auxiliary["pixel"])
    assert one.auxiliary["pixel"].shape == (1, 4, 4) and np.abs(one.value - two.value) > 1e-3


def test_an_unknown_instruction_is_nan_and_none_at_all_is_not(directories):
    env, _, obs, policy = parts(small(directories("smolvlm")))
    obs = say(env, obs, "ball touch the", "touch the red ball")
    assert np.isnan(policy(obs).value).tolist() == [True, False]
    nothing = jax.tree.map(jnp.zeros_like, obs)
    assert np.isfinite(policy(nothing).value).all()


@pytest.fixture(scope="module")
def trained(directories, tmp_path_factory):
    """Runs a stage of two updates with a frozen base and adapters; returns it and its workdir."""
    config = small(directories("smolvlm"), trainable=NOT_VLM, lora=ADAPTED)
    stage = problems.make(config).stage("ppo")
    stage = dataclasses.replace(stage, evaluate=None, best_metric=None)
    start = jax.device_get(loop.start(stage)[0])
    workdir = tmp_path_factory.mktemp("whole")
    return stage, config, start, loop.run(stage, workdir=workdir, config=config), workdir


def test_two_updates_train_adapters_and_heads_alone(trained):
    stage, config, start, result, workdir = trained
    carry = jax.device_get(result.carry)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    # Every environment was reset once in 17 steps, and its steps that only reset do not count.
    assert [row["optimizer/skipped_steps"] for row in rows] == [0, 0] and result.updates == 2
    assert rows[0]["rollout/valid_fraction"] < 1
    before, after = start.learner.params, carry.learner.params
    jax.tree.map(np.testing.assert_array_equal, before["params"]["vlm"], after["params"]["vlm"])
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    stack = moved["lora"]["vlm"]["language"]["stack"]["block_0"]["attention"]
    assert set(stack) == {"query", "value"}
    assert all(x > 0 for x in jax.tree.leaves(moved["lora"]))
    ours = {name: tree for name, tree in moved["params"].items() if name != "vlm"}
    assert set(ours) == OURS and all(x > 0 for x in jax.tree.leaves(ours))
    # Adam has two moments and a count for what is trained, and the schedule another count.
    trainable = [after["lora"], {name: after["params"][name] for name in ours}]
    count = sum(x.size for x in jax.tree.leaves(trainable))
    assert sum(x.size for x in jax.tree.leaves(carry.learner.opt_state)) == 2 * count + 2


@pytest.mark.slow
def test_an_interrupted_run_goes_on_bitwise(trained, tmp_path):
    stage, config, _, whole, _ = trained
    first = dataclasses.replace(stage, num_updates=1)
    assert loop.run(first, workdir=tmp_path, config=config).updates == 1
    resumed = loop.run(stage, workdir=tmp_path, config=config)
    assert resumed.updates == 2
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(whole.carry),
        jax.device_get(resumed.carry),
    )


def test_what_acts_can_be_stored_and_restored_without_the_optimizer(trained):
    _, config, _, result, _ = trained
    like = problems.make(config).checkpoint_parts("ppo")
    learner = {name: getattr(result.carry.learner, name) for name in like}
    assert set(learner) == {"params", "normalizer"}
    assert jax.tree.structure(learner) == jax.tree.structure(like)
    described = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (learner, like)]
    assert described[0] == described[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.model.update(checkpoint=None), "model.checkpoint=None, but model.kind='vlm'"),
        (lambda c: c.env.update(history=2), "env.history=2, but model.kind='vlm' has one frame"),
        (lambda c: c.model.update(text_encoder="minilm"), "not use model.text_encoder='minilm'"),
        (lambda c: c.env.update(height=0), "env.height=0, env.width=16: model.kind='vlm' needs"),
        (lambda c: c.model.update(prompt="{image}"), "'model.prompt' is '{image}', but must be a"),
        (lambda c: c.model.update(kind="multimodal"), "model.kind='multimodal' does not use mod"),
        (lambda c: c.model.lora.update(rank=0), "'model.lora.rank' is 0, but must be greater"),
    ],
)
def test_configs_that_cannot_be_are_refused(change, message, directories):
    config = small(directories("smolvlm"))
    change(config)
    with pytest.raises(ValueError) as caught:
        problems.make(config)
    assert message in str(caught.value)


def changed(directory, target, name, change):
    """Returns a copy of a directory with one of its JSON files changed."""
    target.mkdir()
    for path in pathlib.Path(directory).iterdir():
        (target / path.name).symlink_to(path)
    content = json.loads((target / name).read_text())
    change(content)
    (target / name).unlink()
    (target / name).write_text(json.dumps(content))
    return str(target)


def test_prompts_that_do_not_fit_the_model_are_refused_when_it_is_built(directories, tmp_path):
    directory = changed(
        directories("smolvlm"),
        tmp_path / "wrong",
        "processor_config.json",
        lambda config: config.update(image_seq_len=5),
    )
    config = small(directory)
    with pytest.raises(ValueError, match="Sample 0 has 5 image tokens, but its images have 4 feat"):
        control_models.make_network(config, control.make_env(config))


def test_a_family_of_dynamic_resolution_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    config = small(str(tmp_path))
    with pytest.raises(ValueError, match="model_type='qwen3_vl' is not supported"):
        control_models.make_network(config, control.make_env(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"pattern": "vlm/nothing"}}, "model.lora.pattern: 'vlm/nothing' matches no Dens"),
        ({"trainable": "language/.*"}, "ppo.trainable='language/.*': .* matches no leaf"),
    ],
)
def test_patterns_that_match_nothing_are_refused(changes, message, directories):
    config = small(directories("smolvlm"), **changes)
    with pytest.raises(ValueError, match=message):
        problems.make(config)


@pytest.mark.parametrize(
    "family",
    ["llava", "llava_onevision"],  # One's processor cuts the middle out, the other's pads.
)
def test_pointing_wants_the_whole_frame_and_nothing_else(family, directories):
    config = small(directories(family))
    config.env.width = 32
    with pytest.raises(ValueError, match="model.pointing='target_pixel', but the features of"):
        control_models.make_network(config, control.make_env(config))
    config.model.pointing = None
    network = control_models.make_network(config, control.make_env(config))
    tiles = network.preprocess_images(jnp.zeros((2, 1, 16, 32, 3), jnp.uint8))
    assert tiles.pixels.shape[-4:] == (1, 32, 32, 3)  # One.
