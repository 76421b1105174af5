r"""A whole vision-language model learns from your own pictures, questions and reward functions.

The model is read from a local directory in the hub's format, weights, config, processor and
tokenizer: SmolVLM, Idefics3, LLaVA, LLaVA-OneVision, PaliGemma, Qwen2.5-VL or Qwen3-VL. Images are
first brought to folder.height x folder.width, for a compiled program takes one size: with their
aspect ratio kept, and black beside them (folder.resize). From there on images, prompts and chat
template are those of the model's own processor. Its parameters are frozen; adapters of rank 16 on
all matrices of the decoder learn. For folder and reward functions see configs/folder_grpo.py.

A picture has 64 tokens for a SmolVLM that sees it as one tile, 576 for LLaVA 1.5 and 730 for
LLaVA-OneVision: raise folder.prompt_tokens where it is too small, which is said before training.

Command:   python -m experiments.train --config=configs/vlm_grpo.py --workdir=runs/vlm \
               --config.model.pretrained=DIRECTORY --config.folder.directory=DIRECTORY \
               --config.rewards.functions="('my_rewards:length',)"
           then python -m experiments.export --workdir=runs/vlm --output=tuned for transformers, or
           with --adapter for PEFT
Hardware:  meant for one GPU; tiny random models of each family train on two CPU cores (make test).
Time:      not run
Result:    not run
"""

import ml_collections

from configs import folder_grpo


def get_config() -> ml_collections.ConfigDict:
    """The config of `folder_grpo` with another model, and larger pictures."""
    config = folder_grpo.get_config()
    config.folder.height = config.folder.width = 224
    config.folder.prompt_tokens = 384
    config.model.pretrained = ml_collections.config_dict.placeholder(str)
    config.model.lora.pattern = r"language/stack/.*"
    config.sft.trained = config.rl.trained = r"lora/.*"
    config.sft.batch_size = 16
    config.sft.learning_rate = 1e-4
    config.rl.questions = 16
    config.rl.accumulate = 4
    return config
