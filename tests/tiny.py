"""The public configs at a size that trains in seconds."""

import pathlib
from typing import Any

import ml_collections

import mmrl_jax
from mmrl_jax import problems
from mmrl_jax.configs import count_grpo, folder_grpo

FILES = sorted(
    path.stem for path in pathlib.Path("configs").glob("*.py") if path.stem != "__init__"
)
TOKENS = tuple(name for name in FILES if name.startswith("count_"))  # Of verifiable questions.
AGENTS = ("grid_agent_ppo",)  # That write their actions.
PRETRAINED = ("smollm2_vqa_grpo", "vlm_quickstart")  # Around a decoder.
FOLDERS = ("folder_grpo", "vlm_grpo")  # The same, of prompts from files.
CONFIGS = tuple(name for name in FILES if name not in (*TOKENS, *AGENTS, *PRETRAINED, *FOLDERS))

# Brax's environment that compiles in no time.
FAST = {"env__name": "brax:fast", "env__options": {"episode_length": 10}}

# A schedule depends on where the run ends, so that with another one 2 updates are no half of 4.
_STAGE = {
    "num_updates": 4,
    "eval_interval": 2,
    "checkpoint_interval": 1,
    "updates_per_dispatch": 1,
}
_ROLLOUT = {"num_envs": 8, "unroll_length": 4, "num_epochs": 1, "num_minibatches": 2}
_FIRST = _STAGE | {"updates_per_dispatch": 2, "checkpoint_interval": 2}
_SAMPLED = _STAGE | {
    "prompts_per_update": 4,
    "num_completions": 2,
    "num_minibatches": 2,
    "grad_accum_steps": 1,
    "optimizer": {"schedule": "constant"},
}
_SMALL = {"width": 16, "layers": 1, "heads": 2, "patch_hidden": 16, "vision_layers": 0}


def nested(overrides: dict[str, object], stages: tuple[str, ...]) -> dict[str, Any]:
    """Returns group__field=value as nested dictionaries; 'last' is the group of the last stage."""
    changes: dict[str, Any] = {}
    for key, value in overrides.items():
        *groups, field = key.split("__")
        table = changes
        for group in groups:
            table = table.setdefault(stages[-1] if group == "last" else group, {})
        if isinstance(value, dict) and field in table:
            table[field] |= value
        else:
            table[field] = value
    return changes


def _changed(
    base: ml_collections.ConfigDict, changes: dict[str, Any], overrides: dict[str, object]
) -> ml_collections.ConfigDict:
    stages = tuple(overrides.get("stages", base.stages))
    replaced = {"env": base.env.to_dict()} if "env" in base else {}
    if "env__options" in overrides:  # As a whole: options of one environment are none of another's.
        replaced["env"].pop("options")
    given = {name: x for name, x in base.to_dict().items() if name not in replaced} | replaced
    # Tests simulate eight devices.
    changes["mesh"] = {"data": 1}
    return problems.complete(given, changes, nested(overrides, stages))


def config(name: str = "reach_ppo", **overrides: object) -> ml_collections.ConfigDict:
    """Returns configs/<name>.py at a tiny size, with overrides as group__field=value."""
    base = mmrl_jax.get_config(name)
    changes: dict[str, Any] = {
        "run": {"eval_episodes": 4},
        "bc": _FIRST | {"episodes": 8, "batch_size": 16},
        "ppo": _STAGE | _ROLLOUT,
        "rnd": _STAGE | _ROLLOUT,
        "dapg": _STAGE | _ROLLOUT | {"demonstrations": {"episodes": 8, "batch_size": 16}},
        **dict.fromkeys(("awr", "iql"), _FIRST | {"episodes": 8, "batch_size": 16}),
    }
    if base.model.kind != "mlp":
        changes["env"] = {"height": 16, "width": 16}
    if base.model.kind == "multimodal":
        changes["model"] = {"width": 16, "layers": 1, "heads": 2, "patch_hidden": 16}
    if "episode_length" in base.env.options:  # `recall` is of one length, and has no such option.
        length = 10 if base.model.kind == "mlp" else 16
        changes.setdefault("env", {})["options"] = {"episode_length": length}
    return _changed(base, changes, overrides)


def agent_config(name: str = "grid_agent_ppo", **overrides: object) -> ml_collections.ConfigDict:
    """Returns the tiny config of a text agent, with overrides as group__field=value."""
    changes = {
        "run": {"eval_episodes": 4},
        "model": _SMALL,
        "sft": _FIRST | {"episodes": 8, "batch_size": 8},
        "ppo": _STAGE
        | {
            "num_envs": 8,
            "unroll_length": 4,
            "num_minibatches": 2,
            "num_epochs": 1,
            "optimizer": {"schedule": "constant"},
        },
    }
    return _changed(mmrl_jax.get_config(name), changes, overrides)


def token_config(name: str = "count_grpo", **overrides: object) -> ml_collections.ConfigDict:
    """Returns the tiny config of a token policy, with overrides as group__field=value."""
    base = mmrl_jax.get_config(name)
    changes = {
        "run": {"eval_episodes": 4},
        "task": {
            "kinds": ("count",), "rows": 2, "height": 16, "width": 16, "counts": (0, 2),
            "distractors": 1,
        },
        "model": _SMALL | {"dtype": "float32"},
        "sft": _FIRST | {"examples": 16, "counts": (0, 1), "batch_size": 8},
        "grpo": _SAMPLED | {"kl_coef": 0.1},
        "ppo": _SAMPLED | {"kl_coef": 0.1},
        "dpo": _SAMPLED,
    }  # fmt: skip
    if base.model.kind == "decoder":
        del changes["model"]["layers"]
    if name.startswith("count_"):  # Another last stage has its settings there.
        stages = tuple(overrides.get("stages", base.stages))
        base = problems.complete(count_grpo.CONFIG, {"stages": stages})
    return _changed(base, changes, overrides)


def folder_config(
    model: pathlib.Path,
    images: pathlib.Path,
    stages: tuple[str, ...] = ("grpo",),
    **overrides: object,
) -> ml_collections.ConfigDict:
    """Returns the tiny config of a folder of images, with overrides as group__field=value.

    Args:
      model: Directory of a decoder, see `processors.save_decoder`.
      images: Directory of the records.
      stages: Names of the stages.
      **overrides: Keys that differ.
    """
    every = {"num_updates": 4, "eval_interval": 2, "checkpoint_interval": 1}
    sampled = every | {
        "prompts_per_update": 4,
        "num_completions": 4,
        "num_minibatches": 1,
        "grad_accum_steps": 1,
        "optimizer": {"schedule": "constant", "learning_rate": 1e-2},
    }
    small = {
        "mesh": {"data": 1},
        "dataset": {
            "directory": str(images),
            "height": 16,
            "width": 16,
            "resize": "stretch",
            "prompt_tokens": 64,
            "completion_tokens": 4,
            "validation_size": 2,
            "test_size": 2,
        },
        "rewards": {
            "functions": ("tests.reward_functions:length",),
            "weights": (0.5,),
            "workers": 1,
            "timeout_s": 60.0,
        },
        "model": {
            "checkpoint": str(model),
            "width": 16,
            "heads": 2,
            "patch_hidden": 16,
            "vision_layers": 0,
            "dtype": "float32",
            "remat": False,
        },
        "sft": every,
        **dict.fromkeys(("grpo", "dpo", "ppo"), sampled),
    }
    return problems.complete(
        folder_grpo.CONFIG, small, {"stages": stages}, nested(overrides, stages)
    )
