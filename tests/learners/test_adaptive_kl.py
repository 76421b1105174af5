"""PPO whose learning rate follows the KL divergence, and the options that it excludes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax import problems
from mmrl_jax.learners import optimizers
from mmrl_jax.learners.optimizers import OptimizerOptions
from mmrl_jax.stability import learning_rate
from mmrl_jax.stability.learning_rate import AdaptiveKLOptions
from mmrl_jax.training import loop
from tests import tiny
from tests.learners.test_ppo import initial_params, learner_state, record, run

RATE = 0.05


def adaptive(desired_kl):
    made = optimizers.make(
        OptimizerOptions(name="sgd", learning_rate=RATE, max_grad_norm=1e6),
        steps=100,
        adaptive=AdaptiveKLOptions(
            desired_kl=desired_kl, min_learning_rate=1e-6, max_learning_rate=10.0
        ),
    )
    return made.transformation


def scales(desired_kl, **changes):
    """Returns the factors of the learning rate after updates of 1, 2, 3 and 4 epochs."""
    found = []
    for epochs in range(1, 5):
        optimizer = adaptive(desired_kl)
        state = learner_state(optimizer, initial_params())
        batch, last = record(state)
        after, metrics = run(
            state, batch, last, optimizer, desired_kl=desired_kl, num_epochs=epochs, **changes
        )
        assert metrics["optimizer/steps"] == epochs
        found.append(float(learning_rate.scale_of(after.opt_state)))
    return found


def test_the_rate_changes_in_each_step_but_the_first_of_an_update():
    # One minibatch an epoch. Before the first step the policy is the one that acted, and the
    # measured divergence a rounding error: no reason to raise the learning rate.
    np.testing.assert_allclose(scales(1e6), [1, 1.5, 1.5**2, 1.5**3], rtol=1e-6)
    np.testing.assert_allclose(scales(1e-12), [1, 1 / 1.5, 1.5**-2, 1.5**-3], rtol=1e-6)


def test_a_rounding_error_before_the_first_step_changes_no_rate():
    optimizer = adaptive(0.01)
    state = learner_state(optimizer, initial_params())
    batch, last = record(state)
    batch = batch.replace(log_prob=batch.log_prob + 1e-3)
    after, metrics = run(state, batch, last, optimizer, desired_kl=0.01, num_epochs=1)
    assert 0 < metrics["policy/approx_kl"] < 0.005
    assert float(learning_rate.scale_of(after.opt_state)) == 1


def test_the_first_step_of_the_next_update_keeps_the_rate_that_was_reached():
    optimizer = adaptive(1e6)
    state = learner_state(optimizer, initial_params())
    for expected in (1.5, 1.5**2):
        batch, last = record(state)
        state, _ = run(state, batch, last, optimizer, desired_kl=1e6, num_epochs=2)
        assert float(learning_rate.scale_of(state.opt_state)) == pytest.approx(expected)


def test_a_step_that_is_not_finite_leaves_the_rate_alone():
    optimizer = adaptive(1e-12)
    state = learner_state(optimizer, initial_params())
    batch, last = record(state)
    broken = batch.replace(log_prob=batch.log_prob.at[0, 0].set(jnp.nan))
    after, metrics = run(state, broken, last, optimizer, desired_kl=1e-12, num_epochs=3)
    assert metrics["optimizer/skipped_steps"] == 3
    assert float(learning_rate.scale_of(after.opt_state)) == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_kl": 0.02}, "but ppo.target_kl=0.02 ends an update before .* one of them to No"),
        ({"optimizer": {"schedule": "linear"}}, "ppo.optimizer.schedule='linear' .* 'constant'"),
        ({"optimizer": {"warmup": 0.1}}, "ppo.optimizer.warmup=0.1: set them to 'constant' and 0"),
        ({"rollback": {"max_retries": 1}}, "but ppo.rollback.max_retries=1: set it to 0, or"),
        ({"num_minibatches": 1}, "with a single optimizer step .* ppo.num_minibatches or ppo.num_"),
        ({"max_learning_rate": 1e-4}, "ppo.optimizer.learning_rate=0.0003 is where .*0.0001: sta"),
    ],
)
def test_options_that_work_against_it_are_refused(changes, message):
    plain = {"desired_kl": 0.01, "optimizer": {"learning_rate": 3e-4, "schedule": "constant"}}
    group = plain | changes | {"optimizer": plain["optimizer"] | changes.get("optimizer", {})}
    given = {f"ppo__{name}": x for name, x in group.items()}
    with pytest.raises(ValueError, match=message):
        problems.make(tiny.config("mlp_ppo", **tiny.FAST, **given))


@pytest.mark.parametrize("stage", ["ppo", "rnd"])
def test_without_them_the_optimizer_of_a_stage_follows_the_divergence(stage):
    config = tiny.config(
        "mlp_ppo",
        stages=(stage,),
        last__desired_kl=0.01,
        last__optimizer={"learning_rate": 3e-4, "schedule": "constant"},
        **tiny.FAST,
    )
    carry, _ = loop.start(problems.make(config).stage(stage))
    assert float(learning_rate.scale_of(carry.learner.opt_state)) == 1
