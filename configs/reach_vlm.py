"""PPO fine-tunes a whole vision-language model on `language_reach`: adapters and heads alone.

The model is read from a local directory in the hub's format, weights, config, processor and
tokenizer: SmolVLM, Idefics3, PaliGemma, LLaVA or LLaVA-OneVision. Its parameters are frozen;
adapters of rank 8 on the decoder's queries and values learn, with the joints' token, the readouts
and the heads. The prompt is that of SmolVLM-Instruct; other models want `--config.model.prompt`.

Command:   python -m experiments.train --config=configs/reach_vlm.py --workdir=runs/reach_vlm
               --config.model.directory=DIRECTORY
Hardware:  meant for one GPU; a tiny random model trains on two CPU cores (make test-slow).
Time:      not run
Result:    not run
"""

import ml_collections

from configs import reach_ppo


def get_config() -> ml_collections.ConfigDict:
    """The config of the main job with another model, and fewer samples at a time."""
    config = reach_ppo.get_config()
    config.env.height = config.env.width = 64
    base = config.model
    config.model = ml_collections.ConfigDict({"kind": "vlm"})
    for name in ("auxiliary", "pointing", "lora"):
        config.model[name] = base[name]
    config.model.directory = ml_collections.config_dict.placeholder(str)
    config.model.prompt = (
        "<|im_start|>User:{image}Where does the arm have to go? {instruction}<end_of_utterance>\n"
        "Assistant:"
    )
    config.model.frozen = "vlm/.*"
    config.model.lora.pattern = r"vlm/language/.*/(query|value)"
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.warm_start.updates = 2000
    config.warm_start.batch_size = 64
    config.warm_start.learning_rate = 3e-4
    config.ppo.num_envs = 64
    config.ppo.learning_rate = 3e-4
    return config
