"""Tests of mmrl_jax.planning.plan, .parts, .remedies, .report and .start."""

import dataclasses
import json

import jax
import pytest

from mmrl_jax import problems
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.planning import chips, parts, plan, remedies, report, start
from mmrl_jax.training import loop
from mmrl_jax.training.dispatch import make_dispatch
from tests import tiny

CPU = chips.topology("cpu")
LARGER = {"model__width": 32, "model__layers": 3}


def planned(config, topology=CPU, **options):
    return plan.Planner(evaluations=False).plan(config, topology)


def on(devices, memory=1e9):
    """A topology of devices like a CPU with some memory."""
    chip = dataclasses.replace(CPU.chip, memory=memory, usable=1.0)
    return chips.Topology("test", chip, devices)


CONFIGS = {
    "control": lambda **changes: tiny.config("mlp_ppo", **tiny.FAST, **changes),
    "novelty": lambda **changes: tiny.config("deep_sea_rnd", **changes),
    "task": lambda **changes: tiny.token_config(ppo__prompts_per_update=16, **changes),
    "agent": lambda **changes: tiny.agent_config(**changes),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)], ids=["one", "eight"])
def test_what_is_held_has_the_bytes_of_the_real_carry(kind, mesh):
    sizes = dict(zip(mesh_lib.AXES, mesh, strict=True))
    name = "rnd" if kind == "novelty" else "ppo"
    config = CONFIGS[kind](mesh=sizes, stages=(name,))
    stage = problems.make(config).stage(name)
    carry, _ = loop.start(stage)

    def held(tree):  # On the first device.
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    (found,) = planned(config, on(8 if mesh != (1, 1, 1) else 1)).stages
    assert found.held["weights, trained"] == held(carry.learner.params)
    assert found.held["optimizer state"] == held(carry.learner.opt_state)
    assert found.held.get("reference", 0) == held(getattr(carry.learner, "reference", ()))
    assert found.held.get("extras", 0) == held(carry.learner.extras)
    assert found.held.get("environments", 0) == held(carry.env_state)
    assert found.parameters["trained"] == sum(x.size for x in jax.tree.leaves(carry.learner.params))


def test_all_samples_of_a_stage_are_shared_by_the_devices():
    config = tiny.config(stages=("dapg",), dapg__num_envs=64, dapg__demonstrations__batch_size=32)
    assert plan.samples_of(config.dapg) == {"num_envs": 64, "demonstrations.batch_size": 32}
    local = plan.local_config(config, {"data": 4, "fsdp": 2, "tensor": 1})
    assert (local.dapg.num_envs, local.dapg.demonstrations.batch_size) == (8, 4)


def compiled_bytes(config, name):
    with mesh_lib.described_devices(jax.devices()[:1]):
        stage = problems.make(config).stage(name)
        carry = jax.eval_shape(stage.init)
        shardings = stage.shardings(carry)
        placed = mesh_lib.placed_shapes(carry, shardings)
        dispatch = make_dispatch(stage.update, 1, shardings)
        memory = dispatch.lower(placed, stage.constants).compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (lambda: tiny.config(stages=("bc",)), "bc"),
        (lambda: tiny.config(stages=("bc",), bc__batch_size=64, model__width=32), "bc"),
        (lambda: tiny.token_config(stages=("sft",)), "sft"),
        (lambda: tiny.token_config(stages=("sft",), sft__batch_size=64, **LARGER), "sft"),
        pytest.param(
            lambda: tiny.token_config(stages=("grpo",)), "grpo", marks=pytest.mark.slow
        ),
        pytest.param(
            lambda: tiny.token_config(stages=("grpo",), grpo__prompts_per_update=32, **LARGER),
            "grpo",
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda: tiny.config(stages=("ppo",)), "ppo", marks=pytest.mark.slow),
        pytest.param(
            lambda: tiny.config(stages=("ppo",), ppo__num_envs=64, model__width=32),
            "ppo",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["bc", "bc_larger", "sft", "sft_larger", "grpo", "grpo_larger", "ppo", "ppo_larger"],
)  # fmt: skip
def test_the_peak_is_that_of_the_compiler(config, name):
    (stage,) = planned(config()).stages
    assert stage.peak == pytest.approx(compiled_bytes(config(), name), rel=0.15)


def test_keys_and_values_have_the_bytes_of_the_real_cache():
    problem = problems.make(tiny.token_config())
    model = problem.model.policy.model
    language = model.language
    variables = problem.shapes()["params"]["language"]
    tokens = jax.ShapeDtypeStruct((4, 10), "int32"), jax.ShapeDtypeStruct((4, 10), bool)
    _, cache = jax.eval_shape(
        lambda v, *x: language.apply({"params": v}, *x, mutable=["prefix"]), variables, *tokens
    )
    theirs = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache["prefix"]))
    assert parts.kv_bytes(language, 4 * 10) == theirs
    assert parts.kv_bytes(language, 4 * 10, tensor=2) == theirs / 2
    assert parts.kv_bytes(language, 4 * 10, tensor=3) == theirs  # Two heads are not split in three.


def test_a_device_has_its_share_of_the_work():
    config = tiny.token_config(grpo__prompts_per_update=32, mesh={"data": 0})
    one, eight = (planned(config, on(n)).stages[-1] for n in (1, 8))
    assert eight.update.flops == one.update.flops / 8
    # A ring of 8 devices sends 2 * 7 / 8 of the gradient in each of the optimizer steps.
    steps = config.grpo.num_epochs * config.grpo.num_minibatches
    sent = steps * 2 * one.held["weights, trained"] * 7 / 8
    assert eight.update.exchanged["all-reduce"] == sent and not one.update.exchanged


def test_the_parts_of_the_work_add_up():
    config = tiny.token_config()
    found = plan.Planner().plan(config, CPU)
    for stage in found.stages:
        work = sum(x.flops for name, x in stage.parts.items() if name != "evaluation")
        assert work == pytest.approx(stage.update.flops, rel=1e-6)
        assert stage.parts["evaluation"].flops > 0
        assert sum(report.breakdown(stage).values()) == pytest.approx(stage.needed)
    assert found.stages[-1].parts["rollout"].flops > 0


def test_frozen_parameters_have_neither_gradients_nor_optimizer_state():
    pattern = r"params/language/stack/block_0/.*"
    (full,) = planned(tiny.token_config(stages=("grpo",))).stages
    (part,) = planned(tiny.token_config(stages=("grpo",), grpo__trainable=pattern)).stages
    assert part.parameters["trained"] + part.parameters["frozen"] == full.parameters["trained"]
    assert part.held["optimizer state"] < 0.5 * full.held["optimizer state"]
    assert part.parts["learning"].flops < full.parts["learning"].flops


@pytest.mark.parametrize(
    ("changes", "devices", "fraction", "expected"),
    [
        ({}, 8, 0.8, "mesh.fsdp"),
        ({}, 1, 0.9, "grpo.grad_accum_steps"),
        ({"grpo__grad_accum_steps": 8}, 1, 0.97, "grpo."),
    ],
    ids=["mesh", "accumulation", "batch"],
)
def test_the_remedy_that_is_named_fits(changes, devices, fraction, expected):
    # A large vocabulary's worth of weights on many devices, or of samples on one.
    sizes = {"model__width": 64, "grpo__prompts_per_update": 64, "mesh": {"data": 0}}
    config = tiny.token_config(stages=("grpo",), **sizes, **changes)
    planner = plan.Planner(evaluations=False)
    needed = planner.plan(config, on(devices)).needed
    small = on(devices, memory=fraction * needed)
    whole = planner.plan(config, small)
    assert not whole.fits
    change, changed = remedies.remedy(planner, config, small, whole)
    assert any(key.startswith(expected) for key in change)
    assert changed.fits
    # The keys are those of the config, and the plan of the changed config is the one that fits.
    again = planned(remedies.changed_config(config, change), small)
    assert again.fits and again.needed == changed.needed
    assert all(f"--config.{key}={value}" in report.remedy((change, changed))
               for key, value in change.items())  # fmt: skip


def test_there_may_be_no_remedy():
    config = tiny.token_config(stages=("grpo",))
    small = on(1, memory=1000.0)
    planner = plan.Planner(evaluations=False)
    assert remedies.remedy(planner, config, small, planner.plan(config, small)) is None
    assert "No change" in report.remedy(None)


def test_a_mesh_that_does_not_fit_the_devices_is_an_error():
    config = tiny.token_config(mesh={"data": 1, "fsdp": 4})
    with pytest.raises(ValueError, match="mesh.fsdp=4.*the topology has 2 devices"):
        planned(config, on(2))
    with pytest.raises(ValueError, match="does not divide sft.batch_size = 8"):
        planned(tiny.token_config(mesh={"data": 0}), on(3))


def test_reports_are_text_and_json():
    found = plan.Planner().plan(tiny.token_config(), CPU)
    text = report.text(found)
    for word in ("Stage grpo", "KV cache", "optimizer state", "MFU", "fits cpu", "evaluation"):
        assert word in text
    written = json.loads(json.dumps(report.as_dict(found)))
    assert written["fits"] and written["stages"]["grpo"]["at_times"]["KV cache"] > 0
    assert written["stages"]["grpo"]["evaluation"]["flops"] > 0


def test_a_run_that_cannot_fit_is_refused_before_it_reads_weights(monkeypatch):
    problem = problems.make(tiny.token_config(stages=("grpo",), grpo__prompts_per_update=64))
    told = []
    start.check(problem, told.append)
    assert len(told) == 1 and "Plan of grpo" in told[0] and "trained" in told[0]
    monkeypatch.setattr(chips, "found", lambda devices: on(devices, memory=1000.0))
    monkeypatch.setattr(remedies, "remedy", lambda *arguments: None)  # Tested above.
    with pytest.raises(start.DoesNotFit, match="does not fit.*No change"):
        start.check(problem, told.append)


def test_a_program_that_cannot_fit_is_refused_before_it_compiles(monkeypatch, tmp_path):
    config = tiny.token_config(stages=("grpo",), grpo__prompts_per_update=64)
    problem = problems.make(config)
    needed = planned(config).needed
    monkeypatch.setattr(chips, "found", lambda devices: on(devices, memory=0.7 * needed))
    told = []
    stage = start.inspected(problem.stage("grpo"), problem, told.append)
    with pytest.raises(start.DoesNotFit, match=r"--config.grpo.grad_accum_steps=\d"):
        loop.run(stage, workdir=tmp_path, config=config)
    assert len(told) == 1 and "does not fit" in told[0]


def test_tensor_splits_the_products_of_the_blocks():
    config = tiny.token_config(stages=("grpo",), model__width=64, model__layers=4)
    one = planned(config, on(1)).stages[0]
    mesh = {"data": 1, "fsdp": 1, "tensor": 2}
    two = planned(remedies.changed_config(config, {f"mesh.{k}": n for k, n in mesh.items()}), on(2))
    (two,) = two.stages
    assert 0.5 * one.update.flops < two.update.flops < 0.7 * one.update.flops
    assert two.held["weights, trained"] < 0.7 * one.held["weights, trained"]
    assert two.update.exchanged["all-reduce"] > 0


def test_demonstrations_from_files_are_planned_without_the_files():
    recorded, read = (
        planned(tiny.config(stages=("bc",), **changes)).stages[0]
        for changes in ({}, {"bc__data__directory": "absent"})
    )
    assert read.update.flops == recorded.update.flops
    # A batch is in memory, and not the whole data set.
    assert read.held["data set"] < recorded.held["data set"]
