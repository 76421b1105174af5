"""Tests that every benchmark suite runs and writes its rows, at a tiny and at its full size."""

import json
import sys

import pytest

from experiments import benchmark
from experiments.benchmarks import (
    compaction,
    dinov2_probe,
    generate,
    grpo,
    logprobs,
    model,
    one_step_off_policy,
    packing,
    ppo_vs_brax,
    render,
)
from mmrl_jax.configs import mlp_ppo, reach_ppo
from mmrl_jax.models.language import LanguageModel, Rope
from mmrl_jax.models.transformer import BlockSpec
from mmrl_jax.pretrained import bundled_weights
from tests import processors, tiny

TINY_LLAMA = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"--suite=generate needs torch.*'\.\[parity\]'"):
        benchmark.benchmark("generate", tmp_path, runs=1)


def of_render(patch, _):
    patch.setattr(render, "BATCH", 2)
    patch.setattr(render, "mujoco", lambda size: None)


def of_model(patch, _):
    patch.setattr(reach_ppo, "get_config", tiny.config)
    patch.setattr(model, "BATCH", 2)
    patch.setattr(model, "SIZES", {"ViT-S/16": (16, 1, 2, 1)})


def of_loop(patch, _):
    patch.setattr(reach_ppo, "get_config", tiny.config)


def of_generate(patch, tmp_path):
    small = grpo.random_llama(tmp_path / "model", **TINY_LLAMA)
    patch.setattr(bundled_weights, "smollm2", lambda: small)
    patch.setattr(generate, "BATCHES", (2,))
    patch.setattr(generate, "LENGTH", 2)
    patch.setattr(generate, "PEERS", {"growing cache": {}})


def of_logprobs(patch, _):
    patch.setattr(logprobs, "TOKENS", 8)
    patch.setattr(logprobs, "WIDTH", 8)
    patch.setattr(logprobs, "VOCABULARIES", (64,))


def of_grpo(patch, tmp_path):
    small = grpo.random_llama(tmp_path / "model", **TINY_LLAMA)
    job = grpo.Job("tiny", small, num_prompts=1, length=4)
    patch.setattr(grpo, "jobs", lambda directory: (job,))
    patch.setattr(grpo, "in_new_process", grpo.peak_memory)  # A new process starts slowly.


def of_packing(patch, _):
    block = BlockSpec(heads=2, hidden=16, norm="rms", activation="silu", gated=True, biases=())
    small = LanguageModel(64, 16, layers=1, block=block, ropes=(Rope(10_000.0, 8),))
    patch.setattr(packing, "MODEL", small)
    patch.setattr(packing, "VOCABULARY", 64)
    patch.setattr(packing, "NUM_PROMPTS", 1)


def of_compaction(patch, _):
    patch.setattr(compaction, "MEANS", (16,))
    patch.setattr(compaction, "TOKENS", 8)


def of_one_step_off_policy(patch, _):
    small = dict.fromkeys(("hidden_size", "intermediate_size"), 16) | {"num_hidden_layers": 1}
    patch.setattr(one_step_off_policy, "LLAMA", one_step_off_policy.LLAMA | small)
    for name, value in {"TOKENS": 4, "WORKERS": 1, "COMPLETIONS": 2}.items():
        patch.setattr(one_step_off_policy, name, value)


def of_ppo_vs_brax(patch, _):
    patch.setattr(mlp_ppo, "get_config", lambda _: tiny.config("mlp_ppo", **tiny.FAST))
    patch.setattr(ppo_vs_brax, "ENVIRONMENTS", {"fast": None})
    patch.setattr(ppo_vs_brax, "NUM_ENVS", 8)
    patch.setattr(ppo_vs_brax, "UPDATES", 1)


def of_dinov2_probe(patch, tmp_path):
    processors.save_dinov2(tmp_path / "dinov2")
    patch.setattr(bundled_weights, "dinov2", lambda: tmp_path / "dinov2")
    for name, value in {"EDGE": 24, "TRAIN": 8, "TEST": 4, "BATCH": 4}.items():
        patch.setattr(dinov2_probe, name, value)


SHRUNK = {
    "ppo_vs_brax": of_ppo_vs_brax,
    "render": of_render,
    "model": of_model,
    "loop": of_loop,
    "generate": of_generate,
    "logprobs": of_logprobs,
    "grpo": of_grpo,
    "packing": of_packing,
    "compaction": of_compaction,
    "one_step_off_policy": of_one_step_off_policy,
    "dinov2_probe": of_dinov2_probe,
}


def check(suite, directory, capsys):
    rows = benchmark.benchmark(suite, directory, runs=1)
    written = json.loads((directory / f"{suite}.json").read_text())
    names = {"name", "ours", "peer", "ratio", "unit", "runs", "hardware"}
    assert rows and all(set(row) == names for row in written)
    assert str(directory / f"{suite}.json") in capsys.readouterr().out


@pytest.mark.parametrize("suite", benchmark.SUITES)
def test_every_suite_runs_at_a_tiny_size(suite, tmp_path, monkeypatch, capsys):
    SHRUNK[suite](monkeypatch, tmp_path)
    check(suite, tmp_path, capsys)


@pytest.mark.parametrize("suite", benchmark.SUITES)
@pytest.mark.slow
def test_every_suite_runs_and_writes_its_rows(suite, tmp_path, capsys):
    check(suite, tmp_path, capsys)
