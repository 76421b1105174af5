"""Tests of mmrl_jax.distributed.mesh: eight simulated devices compute what one computes."""

import functools
import re

from brax.envs.base import Env, State
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmrl_jax.distributed import mesh as meshes
from mmrl_jax.envs.wrappers import AutoReset
from mmrl_jax.learners import learner, ppo
from mmrl_jax.models.policy import MultimodalPolicy
from mmrl_jax.rl.distributions import TanhNormal
from mmrl_jax.rollouts.unroll import ActorOutput, unroll
from mmrl_jax.types import Transition

# Compiled quickly: nothing here runs for long.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

STEPS, ENVS, WORDS, PROPRIO, ACTIONS = 5, 16, 3, 4, 2
OPTIMIZER_STEPS = 10


@pytest.fixture(scope="module", autouse=True)
def eight_devices():
    assert jax.device_count() >= 8, "tests/conftest.py simulates eight devices"


def test_make_mesh_takes_the_first_devices():
    mesh = meshes.make_mesh(3)
    assert mesh.axis_names == ("data",)
    assert mesh.devices.tolist() == jax.devices()[:3]
    assert meshes.make_mesh(None).size == jax.device_count()


@pytest.mark.parametrize("devices", [0, -1, 9999])
def test_a_number_of_devices_that_cannot_be_is_refused(devices):
    with pytest.raises(ValueError, match=f"devices={devices}.*choose 1 to {jax.device_count()}"):
        meshes.make_mesh(devices)


@pytest.mark.parametrize("axis", [0, 1])
def test_each_device_holds_its_part(axis):
    mesh = meshes.make_mesh(8)
    x = np.arange(16 * 16 * 2).reshape(16, 16, 2)
    placed = jax.device_put(x, meshes.batch_sharding(mesh, axis))
    np.testing.assert_array_equal(placed, x)
    assert len(placed.addressable_shards) == 8
    for i, shard in enumerate(placed.addressable_shards):
        assert shard.device == jax.devices()[i]
        np.testing.assert_array_equal(shard.data, x.take([2 * i, 2 * i + 1], axis=axis))
    copied = jax.device_put(x, meshes.replicated(mesh))
    assert all(shard.data.shape == x.shape for shard in copied.addressable_shards)


class Drift(Env):
    """A point with a random start that moves by its action; episodes have three steps."""

    observation_size, action_size, backend = 1, 1, "none"

    def reset(self, rng):
        place = jax.random.normal(rng, (1,))
        info = {"step": jnp.zeros(()), "truncation": jnp.zeros(()), "privileged": {}}
        return State(None, {"proprio": place}, jnp.zeros(()), jnp.zeros(()), {}, info)

    def step(self, state, action):
        step = state.info["step"] + 1
        done = (step >= 3).astype(jnp.float32)
        info = state.info | {"step": step, "truncation": done}
        place = state.obs["proprio"] + action
        return state.replace(obs={"proprio": place}, reward=-(place[0] ** 2), done=done, info=info)


def test_environments_draw_the_same_wherever_they_lie():
    env = AutoReset(Drift())

    def policy(state, rng):
        distribution = TanhNormal(jnp.zeros((ENVS, 1)), jnp.zeros((ENVS, 1)))
        u = distribution.sample(rng)
        return ActorOutput(jnp.tanh(u), u, distribution.log_prob(u), jnp.zeros(ENVS))

    def experience(devices):
        mesh = meshes.make_mesh(devices)
        keys = jax.device_put(
            jax.random.split(jax.random.key(0), ENVS), meshes.batch_sharding(mesh, 0)
        )
        start = jit(env.reset)(keys)
        assert start.obs["proprio"].sharding.is_equivalent_to(meshes.batch_sharding(mesh, 0), 2)
        rng = jax.device_put(jax.random.key(1), meshes.replicated(mesh))
        end, transitions = jit(functools.partial(unroll, env, policy=policy, length=8))(
            start, rng=rng
        )
        assert len(end.obs["proprio"].sharding.device_set) == devices
        return start.obs, transitions

    one = experience(1)
    for devices in (2, 4, 8):
        jax.tree.map(np.testing.assert_array_equal, one, experience(devices))
    start, transitions = one
    assert len(np.unique(start["proprio"])) == ENVS  # And differ from each other.
    assert len(np.unique(transitions.action)) == 8 * ENVS
    assert float(transitions.valid.min()) == 0  # Resets within the unroll are among them.


def gradient_recorder():
    """An optimizer stage that keeps the gradients of all steps in its state."""

    def init(params):
        zeros = jax.tree.map(lambda x: jnp.zeros((OPTIMIZER_STEPS, *x.shape)), params)
        return jnp.zeros((), jnp.int32), zeros

    def update(gradients, state, params=None):
        del params
        count, record = state
        record = jax.tree.map(lambda r, g: r.at[count].set(g), record, gradients)
        return gradients, (count + 1, record)

    return optax.GradientTransformation(init, update)


def record(state, model):
    """Returns a batch of random observations with actions of the state's policy."""
    rng = np.random.default_rng(0)

    def observation(*shape):
        return {
            "pixels": jnp.asarray(rng.integers(0, 256, (*shape, 8, 8, 3)), jnp.uint8),
            "instruction": {
                "tokens": jnp.asarray(rng.integers(0, 5, (*shape, WORDS)), jnp.int32),
                "mask": jnp.asarray(rng.random((*shape, WORDS)) < 0.7),
            },
            "proprio": jnp.asarray(rng.normal(size=(*shape, PROPRIO)), jnp.float32),
        }

    seen = observation(STEPS * ENVS)
    output = jit(functools.partial(learner.run_network, model.apply))(state, seen)
    action = output.distribution.sample(jax.random.key(0))
    log_prob = output.distribution.log_prob(action)

    def split(x):
        return x.reshape(STEPS, ENVS, *x.shape[1:])

    shape = (STEPS, ENVS)
    ends = rng.random((2, *shape)) < 0.1
    batch = Transition(
        observation=jax.tree.map(split, seen),
        action=split(action),
        log_prob=split(log_prob),
        value=split(output.value),
        reward=jnp.asarray(rng.normal(size=shape), jnp.float32),
        terminated=jnp.asarray(ends[0] & ~ends[1], jnp.float32),
        truncated=jnp.asarray(ends[1], jnp.float32),
        valid=jnp.asarray(rng.random(shape) < 0.9, jnp.float32),
        privileged={
            "place": jnp.asarray(rng.normal(size=(*shape, 2)), jnp.float32),
            "target": jnp.asarray(rng.random((*shape, 2)), jnp.float32),
        },
        metrics={},
    )
    return batch, observation(ENVS)


@pytest.mark.slow
def test_ten_optimizer_steps_on_several_devices_are_those_on_one():
    model = MultimodalPolicy(
        kind="continuous", actions=ACTIONS, vocabulary=5, width=8, layers=1, heads=2, mlp_ratio=2,
        patch=4, patch_hidden=8, vision_layers=0, text_layers=0, film=True,
        auxiliary=(("place", 2),), pointing="target", dtype=jnp.float32, remat=False,
    )  # fmt: skip
    # Some gradients are 0 but for rounding (a bias of attention keys moves no softmax), and Adam
    # would divide one rounding by another: its epsilon has to be larger than they are.
    optimizer = optax.chain(
        gradient_recorder(), optax.clip_by_global_norm(1.0), optax.adam(1e-3, eps=1e-4)
    )
    options = ppo.PPO(
        discount=0.95, gae_lambda=0.9, advantage="gae", clip=0.2, value_clip=0.2, value_coef=0.5,
        entropy_coef=0.01, auxiliary_coef=0.5, pointing_coef=0.5,
        num_epochs=2, num_minibatches=5, target_kl=None, recompute=True,
    )  # fmt: skip
    observation = {
        "pixels": jnp.zeros((1, 8, 8, 3), jnp.uint8),
        "instruction": {
            "tokens": jnp.zeros((1, WORDS), jnp.int32),
            "mask": jnp.ones((1, WORDS), bool),
        },
        "proprio": jnp.zeros((1, PROPRIO)),
    }
    params = jit(model.init)(jax.random.key(0), observation)
    state = learner.init(params, optimizer=optimizer, proprio_size=PROPRIO)
    batch, last = record(state, model)

    def updated(devices):
        mesh = meshes.make_mesh(devices)
        update = functools.partial(
            ppo.update,
            apply=model.apply,
            optimizer=optimizer,
            options=options,
            shard=functools.partial(meshes.constrain_batch, mesh=mesh),
        )
        state_there, rng = jax.device_put((state, jax.random.key(7)), meshes.replicated(mesh))
        arguments = (
            state_there,
            learner.Rollout(
                jax.device_put(batch, meshes.batch_sharding(mesh, 1)),
                jax.device_put(last, meshes.batch_sharding(mesh, 0)),
            ),
            rng,
        )
        compiled = jit(update).lower(*arguments).compile()
        after, metrics = compiled(*arguments)
        assert len(jax.tree.leaves(after.params)[0].sharding.device_set) == devices
        moved = re.findall(r" (all-gather|all-to-all|collective-permute)\(", compiled.as_text())
        assert not moved  # Samples stay where they are.
        return after, metrics, compiled.cost_analysis()["flops"]

    one, one_metrics, one_work = updated(1)
    assert int(one.steps) == OPTIMIZER_STEPS
    count, gradients = one.opt_state[0]
    assert int(count) == OPTIMIZER_STEPS
    norms = [np.abs(g).reshape(OPTIMIZER_STEPS, -1).max(1) for g in jax.tree.leaves(gradients)]
    assert np.max(norms, axis=0).min() > 1e-2  # Every step had one.
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one.params, params)
    assert max(jax.tree.leaves(moved)) > 1e-3  # Ten times the rate is 1e-2.

    def compare(path, a, b):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=2e-6, err_msg=jax.tree_util.keystr(path))

    for devices in (2, 4, 8):
        several, metrics, work = updated(devices)
        # A device does its part of each minibatch, and not all of it; what every device has to do
        # (the optimizer, the shuffles, padding) keeps it above that part.
        assert work < one_work * min(2 / devices, 0.75)
        for name, value in one_metrics.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
        for a, b in (
            (gradients, several.opt_state[0][1]),
            (one.params, several.params),
            (one.normalizer, several.normalizer),
        ):
            jax.tree_util.tree_map_with_path(compare, a, b)
