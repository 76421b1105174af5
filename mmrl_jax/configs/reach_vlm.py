"""PPO fine-tunes adapters and heads of a pretrained vision-language model on `language_reach`.

The model is read from a local directory in the Hugging Face format with weights, config, processor
and tokenizer: SmolVLM, Idefics3, PaliGemma, LLaVA or LLaVA-OneVision. Its parameters are frozen.
Adapters of rank 8 on the queries and values of the decoder are trained, with the proprioception
token, the readouts and the heads. The prompt is that of SmolVLM-Instruct; other models need another
`--config.model.prompt`.

Command:   python -m experiments.train --config=reach_vlm --workdir=runs/reach_vlm
               --config.model.checkpoint=DIRECTORY
Hardware:  intended for one GPU; a tiny random model trains on two CPU cores (make test-slow).
Time:      not run
Result:    not run
"""

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import reach_ppo

PROMPT = (
    "<|im_start|>User:{image}Where does the arm have to go? {instruction}<end_of_utterance>\n"
    "Assistant:"
)
# The adapters, and all parameters outside of the pretrained model.
TRAINABLE = r"lora/.*|params/(?!vlm/).*"


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of `reach_ppo` with another model and smaller batches."""
    model = {
        "kind": "vlm",
        "prompt": PROMPT,
        "auxiliary": reach_ppo.CONFIG["model"]["auxiliary"],
        "pointing": reach_ppo.CONFIG["model"]["pointing"],
        "lora": {"pattern": r"vlm/language/.*/(query|value)"},
        "dtype": "bfloat16",
        "remat": True,
    }
    changes = {
        "env": {"height": 64, "width": 64},
        "bc": {
            "num_updates": 2000,
            "batch_size": 64,
            "optimizer": {"learning_rate": 3e-4},
            "trainable": TRAINABLE,
        },
        "ppo": {
            "num_envs": 64,
            "optimizer": {"learning_rate": 3e-4},
            "trainable": TRAINABLE,
        },
    }
    base = {name: group for name, group in reach_ppo.CONFIG.items() if name != "model"}
    return problems.complete(base, changes, {"model": model})
