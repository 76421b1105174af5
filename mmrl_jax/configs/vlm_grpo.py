r"""A whole vision-language model learns from your own pictures, questions and reward functions.

The model is read from a local directory in the hub's format, weights, config, processor and
tokenizer: SmolVLM, Idefics3, LLaVA, LLaVA-OneVision, PaliGemma, Qwen2.5-VL or Qwen3-VL. Images are
first brought to dataset.height x dataset.width, for a compiled program takes one size: with their
aspect ratio kept, and black beside them (dataset.resize). From there on images, prompts and chat
template are those of the model's own processor. Its parameters are frozen; adapters of rank 16 on
all matrices of the decoder learn. For folder and reward functions see configs/folder_grpo.py.

A picture has 64 tokens for a SmolVLM that sees it as one tile, 576 for LLaVA 1.5 and 730 for
LLaVA-OneVision: raise dataset.prompt_tokens where it is too small, which is said before training.

Command:   python -m experiments.train --config=configs/vlm_grpo.py --workdir=runs/vlm \
               --config.model.checkpoint=DIRECTORY --config.dataset.directory=DIRECTORY \
               --config.rewards.functions="('my_rewards:length',)"
           then python -m experiments.export --workdir=runs/vlm --output=tuned for transformers, or
           with --adapter for PEFT
Hardware:  meant for one GPU; tiny random models of each family train on two CPU cores (make test).
Time:      not run
Result:    not run
"""

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import folder_grpo

MODEL = {
    "kind": "vlm",
    "lora": {"pattern": r"language/stack/.*", "rank": 16, "alpha": 32.0},
    "dtype": "bfloat16",
    "remat": True,
}


def get_config(stages: str = "grpo") -> ml_collections.ConfigDict:
    """Returns the config of `folder_grpo` with a whole model, and larger images.

    Args:
      stages: See `folder_grpo.get_config`.
    """
    sampled = {"prompts_per_update": 16, "grad_accum_steps": 4, "trainable": r"lora/.*"}
    base = {name: group for name, group in folder_grpo.CONFIG.items() if name != "model"}
    changes = {
        "stages": tuple(stages.split(",")),
        "model": MODEL,
        "dataset": {"height": 224, "width": 224, "prompt_tokens": 384},
        "sft": {
            "trainable": r"lora/.*",
            "batch_size": 16,
            "optimizer": {"learning_rate": 1e-4},
        },
        **dict.fromkeys(("grpo", "dpo", "ppo"), sampled),
    }
    return problems.complete(base, changes)
