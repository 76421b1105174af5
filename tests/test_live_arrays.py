"""What a run holds on its device: the carry and the constants of its stage, and no dead copies."""

import jax
import pytest

from experiments.train import train
from mmrl_jax.training import loop
from mmrl_jax.training.checkpoint import Checkpointer
from tests import memory, tiny


@pytest.fixture
def shares(monkeypatch):
    """(stage, live bytes over those of its carry and its data) after every update of a run."""
    found, stages = [], []
    run, save, live = loop.run, Checkpointer.save, memory.LiveArrays()

    def noted_run(stage, **kwargs):
        stages.append((stage.name, jax.tree.leaves(stage.data)))
        try:
            return run(stage, **kwargs)
        finally:
            stages.pop()

    def noted_save(self, step, carry, **kwargs):
        (name, constants), leaves = stages[-1], jax.tree.leaves(carry)
        found.append((name, live() / memory.array_bytes([*leaves, *constants])))
        saved = save(self, step, carry, **kwargs)
        self.wait()  # On CPU the files are written from a copy of the carry.
        return saved

    monkeypatch.setattr(loop, "run", noted_run)
    monkeypatch.setattr(Checkpointer, "save", noted_save)
    return found


# Adam's two moments and a reference are three copies of the parameters beside them.
TOKENS = {"rl__learning_rate": 1e-3, "sft__eval_interval": 4, "run__eval_interval": 4}


@pytest.mark.parametrize(
    "make",
    [
        lambda **changes: tiny.token_config(**TOKENS, **changes),
        pytest.param(lambda **changes: tiny.agent_config(**changes), marks=pytest.mark.slow),
        lambda **changes: tiny.config(ppo__schedule="constant", **changes),
    ],
    ids=["tokens", "agent", "control"],
)
def test_a_run_and_a_resumed_one_hold_their_carry_and_little_more(make, shares, tmp_path):
    train(make(run__updates=2), tmp_path)
    stages = list(dict.fromkeys(name for name, _ in shares))
    assert len(stages) == 2
    half = len(shares)
    train(make(run__updates=4), tmp_path)
    assert {name for name, _ in shares[half:]} == {stages[1]}  # The first has nothing left to do.
    assert max(share for _, share in shares) <= 1.1, shares
