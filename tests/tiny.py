"""The public configs at a size that trains in seconds."""

import pathlib

import ml_collections

from mmrl_jax.training import config as config_lib

FILES = sorted(
    path.stem for path in pathlib.Path("configs").glob("*.py") if path.stem != "__init__"
)
TOKENS = tuple(name for name in FILES if name.startswith("count_"))  # That answer questions.
AGENTS = ("grid_agent_ppo",)  # That write their actions.
PRETRAINED = tuple(name for name in FILES if name.startswith("smollm2_"))  # Around a decoder.
FOLDERS = ("folder_grpo", "vlm_grpo")  # The same, of questions from files.
CONFIGS = tuple(name for name in FILES if name not in (*TOKENS, *AGENTS, *PRETRAINED, *FOLDERS))

# Brax's environment that compiles in no time.
FAST = {"env__name": "brax:fast", "env__options": {"episode_length": 10}}


def config(name: str = "reach_ppo", **overrides: object) -> ml_collections.ConfigDict:
    """configs/<name>.py, shrunk; overrides are given as group__field=value."""
    tiny = config_lib.load_config(f"configs/{name}.py")
    if tiny.model.kind != "mlp":
        tiny.env.height = tiny.env.width = 16
    if tiny.model.kind == "multimodal":
        tiny.model.width, tiny.model.layers, tiny.model.heads = 16, 1, 2
        tiny.model.patch_hidden = 16
    if "episode_length" in tiny.env.options:  # `recall` is of one length, and has no such option.
        tiny.env.options.episode_length = 10 if tiny.model.kind == "mlp" else 16
    warm = tiny.warm_start
    warm.updates = min(warm.updates, 4)
    warm.episodes, warm.batch_size = 8, 16
    warm.updates_per_dispatch = warm.eval_interval = warm.checkpoint_interval = 2
    ppo = tiny.ppo
    ppo.num_envs, ppo.unroll, ppo.epochs, ppo.minibatches = 8, 4, 1, 2
    run = tiny.run
    run.updates, run.updates_per_dispatch, run.eval_interval = 4, 1, 2
    run.eval_episodes, run.checkpoint_interval = 4, 1
    for key, value in overrides.items():
        group, _, field = key.partition("__")
        if field:
            tiny[group][field] = value
        else:
            tiny[group] = value
    return tiny


def agent_config(name: str = "grid_agent_ppo", **overrides: object) -> ml_collections.ConfigDict:
    """The same of agents that write."""
    tiny = config_lib.load_config(f"configs/{name}.py")
    tiny.model.update(width=16, layers=1, heads=2, patch_hidden=16, vision_layers=0)
    tiny.sft.update(
        updates=4, episodes=8, batch_size=8, updates_per_dispatch=2, eval_interval=2,
        checkpoint_interval=2,
    )  # fmt: skip
    tiny.rl.update(num_envs=8, unroll=4, minibatches=2, epochs=1, schedule="constant")
    tiny.run.update(
        updates=4, updates_per_dispatch=1, eval_interval=2, eval_episodes=4, checkpoint_interval=1
    )
    tiny.update_from_flattened_dict({k.replace("__", "."): x for k, x in overrides.items()})
    return tiny


def token_config(name: str = "count_grpo", **overrides: object) -> ml_collections.ConfigDict:
    """The same of token policies."""
    tiny = config_lib.load_config(f"configs/{name}.py")
    tiny.task.update(kinds=("count",), rows=2, height=16, width=16, counts=(0, 2), distractors=1)
    tiny.model.update(
        width=16, layers=1, heads=2, patch_hidden=16, vision_layers=0, dtype="float32"
    )
    tiny.sft.update(
        updates=4, examples=16, counts=(0, 1), batch_size=8, updates_per_dispatch=2,
        eval_interval=2, checkpoint_interval=2,
    )  # fmt: skip
    # A linear schedule depends on where the run ends, so that 2 updates are no half of 4.
    tiny.rl.update(
        questions=4, group=2, minibatches=2, accumulate=1, schedule="constant", kl_weight=0.1
    )
    tiny.run.update(
        updates=4, updates_per_dispatch=1, eval_interval=2, eval_episodes=4, checkpoint_interval=1
    )
    tiny.update_from_flattened_dict({k.replace("__", "."): x for k, x in overrides.items()})
    return tiny
