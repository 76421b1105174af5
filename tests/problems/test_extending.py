"""Tests that a user's algorithm, environment, task and probe need no edit of the package."""

import dataclasses
import json

from brax.envs.base import Env as BraxEnv
from brax.envs.base import State
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmrl_jax
from mmrl_jax import problems
from mmrl_jax.config.options import POSITIVE, option
from mmrl_jax.learners import ppo, registry, token_ppo
from mmrl_jax.learners.learner import apply_gradients, flatten, run_network
from mmrl_jax.monitoring import metric_definitions, metrics
from mmrl_jax.monitoring.metric_definitions import Metric
from mmrl_jax.tasks.prompts import Prompt, tokenize
from tests import tiny

HERE = __name__  # What a config names the things of this file by: 'module:name'.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reinforce:
    """Options of REINFORCE with a constant baseline."""

    baseline: float = option(0.5, "Reward of an average step.", POSITIVE)


def reinforce(state, batch, rng, *, apply, optimizer, options, shard):
    transitions = shard(flatten(batch.transitions))

    def loss(params):
        output = run_network(apply, state.replace(params=params), transitions.observation)
        log_prob = output.distribution.log_prob(transitions.action)
        value = -jnp.mean(log_prob * (transitions.reward - options.baseline) * transitions.valid)
        return value, {"loss/policy": value}

    (value, logged), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    state, stepped = apply_gradients(state, value, gradients, optimizer)
    return state, logged | stepped


class Line(BraxEnv):
    """A point that is pushed along a line towards 1."""

    action_kind, action_size, episode_length, backend = "continuous", 1, 5, None
    observation_size = {"proprio": 1}

    def __init__(self, goal: float = 1.0):
        self._goal = goal

    def reset(self, rng):
        x = jax.random.uniform(rng, (1,))
        zero = jnp.zeros(())
        info = {"truncation": zero, "privileged": {}, "steps": zero}
        return State(None, {"proprio": x}, zero, zero, {}, info)

    def step(self, state, action):
        x = state.obs["proprio"] + 0.1 * action
        steps = state.info["steps"] + 1
        done = (steps >= self.episode_length).astype(jnp.float32)
        info = state.info | {"steps": steps, "truncation": done}
        reward = -jnp.abs(x[0] - self._goal)
        return state.replace(obs={"proprio": x}, reward=reward, done=done, info=info)


class Bright:
    """A task of prompts that ask whether an image is bright."""

    splits = ("train", "heldout")

    def __init__(self, *, height, width, image_tokens, tokenizer, threshold: int = 128):
        self._size, self._threshold = (height, width), threshold
        self.texts = tokenize(["bright ?"], ["yes", "no"], tokenizer, image_tokens=image_tokens)

    def sample(self, rng: jax.Array, count: int, split: str) -> Prompt:
        rng = jax.random.fold_in(rng, self.splits.index(split))
        shade = jax.random.randint(rng, (count, 1, 1, 1), 0, 256)
        images = jnp.broadcast_to(shade, (count, *self._size, 3)).astype(jnp.uint8)
        answer = jnp.where(shade[:, 0, 0, 0] >= self._threshold, 0, 1)
        zeros = jnp.zeros(count, jnp.int32)
        return self.texts.make_prompts(images, zeros, answer, zeros, zeros)


def count_calls(context):
    (context.directory / "probe.txt").write_text(f"{context.update}")
    return {"probe/calls": context.update}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Registers what a user's module registers when it is imported, and undoes it after a test."""
    row = registry.Algorithm(Reinforce, "rollout", reinforce, ("loss/policy",))
    monkeypatch.setitem(registry.CONTROL, "reinforce", row)
    monkeypatch.setitem(
        metric_definitions.METRIC_DEFINITIONS,
        "probe/calls",
        Metric("updates", "Update of the call", "-"),
    )
    mine = registry.TOKEN["ppo"]._replace(options=token_ppo.PPO)
    monkeypatch.setitem(registry.TOKEN, "my_ppo", mine)


def test_an_algorithm_an_environment_and_a_probe(tmp_path):
    config = problems.complete(
        {
            "problem": "control",
            "stages": ("reinforce",),
            "imports": (HERE,),
            "env": {"name": f"{HERE}:Line", "height": 0, "width": 0, "options": {"goal": 0.9}},
            "model": {"kind": "mlp"},
            "run": {"eval_episodes": 4, "probes": (f"{HERE}:count_calls",), "probe_interval": 1},
            "reinforce": {"num_updates": 2, "num_envs": 8, "unroll_length": 6, "baseline": 0.25},
            "mesh": {"data": 1},
        }
    )
    trained = mmrl_jax.train(config, tmp_path)
    assert trained.results["reinforce"].updates == 2
    start, *rows = metrics.read_jsonl(tmp_path / metrics.JSONL_NAME)
    assert "eval/train/return" in start and "probe/calls" not in start
    assert [row["probe/calls"] for row in rows] == [1, 2]
    assert (tmp_path / "probe.txt").read_text() == "2"
    assert json.loads((tmp_path / "config.json").read_text())["reinforce"]["baseline"] == 0.25
    # Evaluating imports what the run names, if it is trusted.
    with pytest.raises(ValueError, match=HERE):
        mmrl_jax.load(tmp_path)
    loaded = mmrl_jax.load(tmp_path, trust_modules=True)
    assert np.isfinite(loaded.evaluate("train")["return"])


def test_a_task_and_an_algorithm_of_tokens(tmp_path):
    base = tiny.token_config(stages=("sft", "ppo"))
    config = problems.complete(
        {name: x for name, x in base.to_dict().items() if name not in ("task", "sft", "ppo")},
        {
            "stages": ("my_ppo",),
            "task": {"name": f"{HERE}:Bright", "height": 16, "width": 16},
            "my_ppo": {
                "num_updates": 2,
                "prompts_per_update": 4,
                "num_completions": 2,
                "format_penalty": 0.0,
            },
        },
    )
    trained = mmrl_jax.train(config, tmp_path)
    assert trained.results["my_ppo"].updates == 2
    assert set(trained.problem.splits) == {"train", "heldout"}
    assert 0 <= mmrl_jax.load(tmp_path, trust_modules=True).evaluate("heldout")["accuracy"] <= 1


@pytest.mark.parametrize(
    ("task", "sft", "message"),
    [
        ({"options": {"shade": 1}}, {}, "task.options={'shade': 1} .*'shade'.* are 'threshold', a"),
        (
            {"options": {"height": 3}},
            {},
            "task.options={'height': 3} .* multiple values .*'height'",
        ),
        # A class that names no other training splits has one, whatever the names of the others.
        (
            {},
            {"split": "test"},
            "sft.split='test' must be one of the training splits .* has 'train'",
        ),
    ],
)
def test_what_does_not_fit_a_task_is_named(task, sft, message, monkeypatch):
    monkeypatch.setattr(Bright, "splits", ("train", "test"))
    base = {
        "problem": "task",
        "stages": ("sft",),
        "task": {"name": f"{HERE}:Bright", "height": 16, "width": 16},
        "mesh": {"data": 1},
    }
    with pytest.raises(ValueError, match=message):
        problems.make(problems.complete(base, {"task": task, "sft": sft}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"env": {"name": f"{HERE}:Lin"}},
            f"env.name has .*Did you mean '{HERE}:Line",
        ),
        ({"env": {"name": "no_such_module:Line"}}, "env.name has 'no_such_module'"),
        ({"imports": ("no_such_module",)}, "imports has 'no_such_module'"),
        ({"stages": ("ppoo",)}, "'stages' is"),
    ],
)
def test_what_is_not_there_is_named(changes, message):
    base = {
        "problem": "control",
        "stages": ("ppo",),
        "env": {"name": f"{HERE}:Line", "height": 0, "width": 0},
        "model": {"kind": "mlp"},
    }
    with pytest.raises(ValueError, match=message):
        problems.make(problems.complete(base, changes))


def test_a_metric_that_nobody_has_defined_is_refused_before_compiling(tmp_path, monkeypatch):
    def update(*arguments, **options):
        state, logged = ppo.update(*arguments, **options)
        return state, logged | {"loss/unheard_of": jnp.zeros(())}

    row = registry.CONTROL["ppo"]._replace(update=update)
    monkeypatch.setitem(registry.CONTROL, "ppo", row)
    with pytest.raises(ValueError, match="'loss/unheard_of' is not defined"):
        mmrl_jax.train(tiny.config("mlp_ppo", **tiny.FAST), tmp_path)
