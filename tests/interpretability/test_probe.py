"""The probe `modality_shares` in a run of two updates."""

from mmrl_jax import probes, problems
from mmrl_jax.interpretability import control
from mmrl_jax.monitoring import metrics
from mmrl_jax.training.loop import run
from tests import tiny


def test_shares_are_logged_and_sum_to_one(tmp_path):
    # All episodes have one instruction, and the same proprioception (the time) at each step.
    config = tiny.config(
        "recall_ppo",
        run__probes=("modality_shares",),
        run__probe_interval=1,
        last__num_updates=2,
    )
    problem = problems.make(config)
    stage = probes.attach(problem, problem.stage("ppo"), tmp_path)
    run(stage, workdir=tmp_path, config=config)
    rows = metrics.read_jsonl(tmp_path / metrics.JSONL_NAME)
    for row in rows[-2:]:
        for target in ("behavior", "prediction"):
            shares = [row[f"modality_share/{target}/{name}"] for name in control.MODALITIES]
            assert abs(sum(shares) - 1) < 1e-5
            pixels, instruction, proprio = shares
            assert instruction < 1e-4 and proprio < 1e-4 and pixels > 0.99
    assert "alarm/modality_unused" not in rows[-2]
    assert rows[-1]["alarm/modality_unused"] == 1
