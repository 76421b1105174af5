"""Digests of what tiny runs of every kind learn, to compare two commits on one machine.

    python -m tests.digests before.json          # on the commit before a change
    python -m tests.digests after.json before.json   # after it: tells which runs have changed

A digest is of the values of all parameters after 3 updates, and of those of a run that was stopped
after 2 and resumed; names play no part in it, so that a rename leaves it as it is. Digests of other
machines, or of other versions of JAX, differ.
"""

import hashlib
import json
import pathlib
import sys
import tempfile
from typing import Any

import jax
import ml_collections
import numpy as np

import mmrl_jax
from mmrl_jax import problems
from tests import processors, tiny
from tests.tasks.test_folder import folder

RL = {"last__num_updates": 3, "last__eval_interval": 2}


def vlm(directory: pathlib.Path) -> ml_collections.ConfigDict:
    """Returns the config of a control policy with a pretrained vision-language model."""
    changes = {
        "stages": ("ppo",),
        "model": {
            "checkpoint": str(processors.save_model("smolvlm", directory / "vlm")),
            "prompt": "{image}{instruction}",
            "dtype": "float32",
            "lora": {"pattern": None},
        },
        "ppo": {
            "unroll_length": 17,
            "trainable": ".*",
            "num_updates": 3,
            "optimizer": {"schedule": "constant"},
        },
    }
    return problems.complete(tiny.config("reach_vlm"), changes)


def dataset(directory: pathlib.Path) -> ml_collections.ConfigDict:
    """Returns the config of prompts from files, with rewards from a module."""
    changes = {
        "dataset": {
            "directory": str(folder(directory / "folder", count=10)), "height": 16, "width": 16,
            "resize": "stretch", "prompt_tokens": 64, "completion_tokens": 4,
            "validation_size": 2, "test_size": 2,
        },
        "rewards": {
            "functions": ("tests.reward_functions:length",), "weights": (0.5,), "workers": 1,
        },
        "model": {
            "checkpoint": str(processors.save_decoder(directory / "llama")), "width": 16,
            "heads": 2, "patch_hidden": 16, "vision_layers": 0, "dtype": "float32", "remat": False,
        },
        "grpo": {
            "prompts_per_update": 4, "num_completions": 4, "num_minibatches": 1,
            "grad_accum_steps": 1, "optimizer": {"schedule": "constant"}, "num_updates": 3,
            "eval_interval": 2, "checkpoint_interval": 1,
        },
    }  # fmt: skip
    return mmrl_jax.get_config("folder_grpo", changes)


def configs(directory: pathlib.Path) -> dict[str, ml_collections.ConfigDict]:
    """Returns a tiny config of each kind of run, whose files are written to `directory`."""
    steady = {"ppo__optimizer__schedule": "constant"}
    return {
        "control_bc_ppo": tiny.config("reach_ppo", **steady, **RL),
        "control_ppo": tiny.config("reach_ppo_scratch", **steady, **RL),
        "control_bc": tiny.config("reach_bc"),
        "mlp": tiny.config("mlp_ppo", **tiny.FAST, **steady, **RL),
        "control_vlm": vlm(directory),
        "sft_grpo": tiny.token_config(**RL),
        "sft_token_ppo": tiny.token_config(stages=("sft", "ppo"), **RL),
        "sft_dpo": tiny.token_config(stages=("sft", "dpo"), **RL),
        "sft": tiny.token_config("count_sft"),
        "folder_grpo": dataset(directory),
        "text_agent": tiny.agent_config(**RL),
    }


def digest(tree: Any) -> str:
    """Returns a digest of the values of the leaves of a tree, independent of their order."""
    leaves = (np.asarray(x) for x in jax.tree.leaves(jax.device_get(tree)))
    each = (hashlib.sha256(f"{x.dtype}{x.shape}".encode() + x.tobytes()) for x in leaves)
    return hashlib.sha256("".join(sorted(x.hexdigest() for x in each)).encode()).hexdigest()[:16]


def learned(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> str:
    """Returns the digest of the parameters of the last stage of a run."""
    return digest(mmrl_jax.train(config, workdir).last.carry.learner.params)


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, str]:
    """Returns the digests of a run, and of the same run stopped after 2 updates and resumed."""
    whole, last = learned(config, workdir / "whole"), config.stages[-1]
    learned(problems.complete(config, {last: {"num_updates": 2}}), workdir / "parts")
    return {"whole": whole, "resumed": learned(config, workdir / "parts")}


def main(out: str, before: str | None = None) -> int:
    """Writes the digests to a file, and compares them with those of another."""
    known = {} if before is None else json.loads(pathlib.Path(before).read_text())
    digests: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        for name, config in configs(place).items():
            digests[name] = run(config, place / name)
            same = {None: "", True: "as before", False: "CHANGED"}[
                known.get(name) == digests[name] if name in known else None
            ]
            print(name, *digests[name].values(), same, flush=True)
    pathlib.Path(out).write_text(json.dumps(digests, indent=2) + "\n")
    return sum(known.get(name, found) != found for name, found in digests.items())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
