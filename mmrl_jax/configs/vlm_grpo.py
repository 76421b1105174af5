r"""A pretrained vision-language model learns from your own images, prompts and reward functions.

The model is read from a local directory in the Hugging Face format with weights, config, processor
and tokenizer: SmolVLM, Idefics3, LLaVA, LLaVA-OneVision, PaliGemma, Qwen2.5-VL or Qwen3-VL. Images
are first resized to dataset.height x dataset.width, because a compiled program has one input size;
dataset.resize says whether the aspect ratio is kept. They are then processed as by the model's own
processor, and prompts use its chat template. The parameters of the model are frozen; adapters of
rank 16 on all matrices of the decoder are trained. For the folder and the reward functions see
configs/folder_grpo.py.

An image has 64 tokens for a SmolVLM that sees it as one tile, 576 for LLaVA 1.5 and 730 for
LLaVA-OneVision. If dataset.prompt_tokens is too small, an error before training says so; raise it.

Command:   python -m experiments.train --config=vlm_grpo --workdir=runs/vlm \
               --config.model.checkpoint=DIRECTORY --config.dataset.directory=DIRECTORY \
               --config.rewards.functions="('my_rewards:length',)"
           then python -m experiments.export --workdir=runs/vlm --output=tuned --trust_modules for
           transformers, or with --adapter for PEFT
Hardware:  intended for one GPU; tiny random models of each family train on two CPU cores (make
           test).
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
    """Returns the config of `folder_grpo` with a pretrained model and larger images.

    Args:
      stages: Names of stages separated by commas, see `folder_grpo.get_config`.
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
