"""An agent writes its steps: a small vision-language model walks on a grid by instruction.

It sees the grid and the instruction, and answers by a word: up, down, left, right or stay. First it
clones 4096 episodes of an expert, then PPO with a value for every token goes on with rewards alone.

Command:   python -m experiments.train --config=configs/grid_agent_ppo.py --workdir=runs/grid
           with --config.env.name=language_reach for an arm, whose words are two joints' torques
Hardware:  two CPU cores.
Time:      not run
Result:    not run
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Every key that a run has; its meaning is in mmrl_jax/training/agent_factory.py, SCHEMA."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.algorithm = "token_ppo"
    config.devices = 1

    config.env = ml_collections.ConfigDict()
    config.env.name = "language_grid"
    config.env.split = "train"
    config.env.height = 32
    config.env.width = 32
    config.env.history = 1
    config.env.options = ml_collections.ConfigDict()

    config.model = ml_collections.ConfigDict()
    config.model.pretrained = ml_collections.config_dict.placeholder(str)
    config.model.image_splitting = False
    config.model.width = 64
    config.model.layers = 2
    config.model.heads = 4
    config.model.mlp_ratio = 2
    config.model.patch = 8
    config.model.patch_margin = 0
    config.model.patch_hidden = 128
    config.model.vision_layers = 0
    config.model.lora = ml_collections.ConfigDict()
    config.model.lora.pattern = ml_collections.config_dict.placeholder(str)
    config.model.lora.rank = 8
    config.model.lora.alpha = 16.0
    config.model.dtype = "float32"
    config.model.remat = False

    config.sft = ml_collections.ConfigDict()
    config.sft.updates = 3000
    config.sft.episodes = 4096
    config.sft.batch_size = 128
    config.sft.trained = ".*"
    config.sft.learning_rate = 2e-3
    config.sft.max_grad_norm = 1.0
    config.sft.updates_per_dispatch = 50
    config.sft.eval_interval = 500
    config.sft.checkpoint_interval = 500

    config.rl = ml_collections.ConfigDict()
    config.rl.num_envs = 128
    config.rl.unroll = 16
    config.rl.temperature = 1.0
    config.rl.penalty = 0.1
    config.rl.trained = ".*"
    config.rl.kl = "k3"
    config.rl.kl_weight = 0.0
    config.rl.reference_decay = 1.0
    config.rl.entropy_weight = 0.01
    config.rl.max_correction = ml_collections.config_dict.placeholder(float)
    config.rl.learning_rate = 5e-4
    config.rl.schedule = "linear"
    config.rl.max_grad_norm = 1.0
    config.rl.epochs = 2
    config.rl.minibatches = 4
    config.rl.accumulate = 1

    config.ppo = ml_collections.ConfigDict()
    config.ppo.discount = 0.95
    config.ppo.gae_lambda = 0.95
    config.ppo.clip = 0.2
    config.ppo.value_clip = ml_collections.config_dict.placeholder(float)
    config.ppo.value_weight = 0.5

    config.run = ml_collections.ConfigDict()
    config.run.updates = 300
    config.run.updates_per_dispatch = 5
    config.run.eval_interval = 50
    config.run.eval_episodes = 512
    config.run.checkpoint_interval = 50
    config.run.keep = 2
    return config
