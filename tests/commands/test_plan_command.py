"""Tests of the command mmrl-plan, in processes of its own."""

import json
import pathlib
import shutil
import subprocess
import sys

from tests import processors

ROOT = pathlib.Path(__file__).parents[2]


def plan(*arguments):
    call = [sys.executable, "-m", "experiments.plan", *arguments]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def test_a_vision_language_model_is_planned_from_its_config_alone(tmp_path):
    processors.save_chat("smolvlm", tmp_path / "model")
    config = shutil.copyfile(tmp_path / "model" / "config.json", tmp_path / "smolvlm.json")
    done = plan(
        "--config=vlm_grpo", f"--model_config={config}", "--topology=v5e-8", "--json",
        "--config.mesh.fsdp=2", "--config.grpo.prompts_per_update=64",
        "--config.grpo.grad_accum_steps=2", "--config.dataset.completion_tokens=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] and found["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    stage = found["stages"]["grpo"]
    # Adapters are trained, and the model is frozen.
    assert 0 < stage["parameters"]["trained"] < stage["parameters"]["frozen"]
    assert stage["rollout"]["flops"] > 0 and stage["learning"]["flops"] > 0
    assert set(stage["update"]["exchanged"]) >= {"all-gather", "all-reduce"}


def test_an_unknown_topology_is_an_error_with_the_list():
    done = plan("--config=mlp_ppo", "--topology=v9-8")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --topology='v9-8' is unknown. Give a TPU slice (v4-N, v5")
