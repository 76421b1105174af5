r"""SmolLM2 learns from your own pictures, questions and reward functions.

A folder holds the pictures and metadata.jsonl, a line of JSON with file_name, prompt and answer for
each, and whatever else the reward functions want to know; see mmrl_jax/tasks/folder.py. A reward
function takes keywords and returns a number, e.g. in my_rewards.py in the current directory:

    def length(*, prompt, completion, answer, **columns):
        return -len(completion) / 100

At least 64 records choose the best checkpoint (folder.validation_size) and as many others are
reported (folder.test_size, or all of a folder of your own, folder.test_directory); all records of
an image are on one side, and the same images are held out whatever the seed of the run.

It is called in processes of its own, between the program that answers and the one that learns. An
answer whose reward fails, or takes too long, is left out and counted (completion/unscored), unless
its function declares what a failed call counts as, see mmrl_jax/tasks/rewards.py.

Command:   python -m experiments.train --config=configs/folder_grpo.py --workdir=runs/folder \
               --config.folder.directory=DIR --config.rewards.functions="('my_rewards:length',)"
           with --config.algorithm=dpo or token_ppo for other learners,
           with --config.model.pretrained=DIRECTORY for another decoder in the hub's format, or for
           a whole vision-language model, see configs/vlm_grpo.py
Hardware:  meant for one GPU
Time:      not run
Result:    not run
"""

import ml_collections

from configs import smollm2_vqa_grpo


def get_config() -> ml_collections.ConfigDict:
    """Every key that a run has; its meaning is in mmrl_jax/training/folder_factory.py, SCHEMA."""
    base = smollm2_vqa_grpo.get_config()
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.algorithm = "grpo"
    config.devices = 1

    config.folder = ml_collections.ConfigDict()
    config.folder.directory = ""
    config.folder.height = 64
    config.folder.width = 64
    config.folder.resize = "letterbox"
    config.folder.prompt_tokens = 192
    config.folder.answer_tokens = 64
    config.folder.max_rejected = 0.01
    config.folder.validation_size = 64
    config.folder.test_size = 64
    config.folder.test_directory = ml_collections.config_dict.placeholder(str)
    config.folder.split_seed = 0

    config.rewards = ml_collections.ConfigDict()
    config.rewards.functions = ("mmrl_jax.tasks.rewards:exact_match",)
    config.rewards.weights = (1.0,)
    config.rewards.workers = 4
    config.rewards.timeout_s = 10.0
    config.rewards.memory_mb = ml_collections.config_dict.placeholder(int)
    config.rewards.max_failed = 0.1

    config.model = base.model
    config.sft = base.sft
    for name in ("examples", "counts", "noise"):
        del config.sft[name]
    config.sft.updates = 0  # Above 0, the records' answers are learned from first.
    config.rl = base.rl
    for name in ("oversample", "swapped", "penalty"):
        del config.rl[name]
    # Nothing has aligned the vision encoder with the language model: it learns too.
    config.rl.trained = r"params/vision/.*|lora/.*"
    config.rl.temperature = 1.0
    config.rl.group = 8
    config.grpo = base.grpo
    config.dpo = base.dpo
    config.ppo = base.ppo

    config.run = base.run
    config.run.updates_per_dispatch = 1
    config.run.eval_interval = 50
    del config.run["eval_episodes"]  # folder.validation_size says what is evaluated.
    config.run.checkpoint_interval = 50
    return config
