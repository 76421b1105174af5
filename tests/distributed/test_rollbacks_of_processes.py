"""A run of several processes that diverges: all of them go back to the same checkpoint."""

import mmrl_jax
from mmrl_jax import problems
from mmrl_jax.monitoring import metrics
from mmrl_jax.training import rollback
from tests.distributed.processes import assert_close, control_config, stored, train_in_processes


def test_processes_roll_back_together(tmp_path):
    # The first learning rate diverges in the first update, and the second one is 0.02.
    config = control_config(
        last__optimizer={"name": "sgd", "learning_rate": 1e29, "schedule": "constant"},
        last__rollback={"max_retries": 1, "learning_rate_factor": 2e-31},
    )
    one, two = tmp_path / "one", tmp_path / "two"
    outputs = train_in_processes(config, two, tmp_path / "outputs")
    trained = mmrl_jax.train(problems.complete(config, {"mesh": {"data": 4}}), one)
    loaded = stored(config, two)
    assert loaded.step == 2
    assert_close(loaded.variables.params, trained.variables.params)
    for workdir in (one, two):
        (incident,) = rollback.read(workdir)
        assert (incident.retry, incident.update, incident.restored_step) == (1, 1, 0)
        assert [row["step"] for row in metrics.read_jsonl(workdir / "metrics.jsonl")] == [0, 1, 2]
    assert ["Rollback 1 of at most 1 to update 0" in x for x in outputs] == [True, False]
