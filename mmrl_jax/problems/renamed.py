"""Current names of config keys of earlier versions, and those of other libraries, for messages."""

_STAGE = {
    "updates": "num_updates",
    "learning_rate": "optimizer.learning_rate",
    "schedule": "optimizer.schedule",
    "max_grad_norm": "optimizer.max_grad_norm",
    "value_weight": "value_coef",
    "entropy_weight": "entropy_coef",
    "auxiliary_weight": "auxiliary_coef",
    "pointing_weight": "pointing_coef",
    "unroll": "unroll_length",
    "epochs": "num_epochs",
    "minibatches": "num_minibatches",
    "accumulate": "grad_accum_steps",
    "trained": "trainable",
    "questions": "prompts_per_update",
    "group": "num_completions",
    "penalty": "format_penalty",
    "kl": "kl_estimator",
    "kl_weight": "kl_coef",
    "reference_decay": "reference_ema_decay",
    "max_correction": "importance_weight_cap",
    "swapped": "shuffle_images",
    "noise": "label_noise",
}
_SAME = (
    "updates_per_dispatch eval_interval checkpoint_interval episodes batch_size expert.gain "
    "expert.undershoot expert.noise examples counts"
).split()
_RL = (
    "temperature pack_rows oversample mask_truncated_completions overlong_buffer num_envs"
).split()

# Description of the new key, as part of a message, by the old key. The old group 'rl' became the
# group of the stage: 'grpo', 'dpo' or 'ppo'.
KEYS = {
    "algorithm": "'stages', a tuple, e.g. ('bc', 'ppo') or ('sft', 'grpo')",
    "devices": "'mesh.data'",
    "model.frozen": "'<stage>.trainable', the pattern of what is trained, of each stage",
    "model.directory": "'model.checkpoint'",
    "model.pretrained": "'model.checkpoint'",
    "run.updates": "'<stage>.num_updates', of the last stage",
    "run.updates_per_dispatch": "'<stage>.updates_per_dispatch', of the last stage",
    "run.eval_interval": "'<stage>.eval_interval', of the last stage",
    "run.checkpoint_interval": "'<stage>.checkpoint_interval', of the last stage",
    "run.keep": "'run.max_to_keep'",
    **{f"warm_start.{old}": f"'bc.{_STAGE.get(old, old)}'" for old in (*_STAGE, *_SAME)},
    **{f"rl.{old}": f"'<stage>.{_STAGE.get(old, old)}', e.g. of 'grpo'" for old in (*_STAGE, *_RL)},
    **{
        f"{group}.{old}": f"'{group}.{new}'"
        for group in ("ppo", "sft")
        for old, new in _STAGE.items()
    },
    "folder.directory": "'dataset.directory'",
    **{
        f"folder.{key}": f"'dataset.{key}'"
        for key in (
            "height width resize prompt_tokens answer_tokens max_rejected validation_size "
            "test_size test_directory split_seed"
        ).split()
    },
    "folder.answer_tokens": "'dataset.completion_tokens'",
}

# Names of hyperparameters in TRL, Brax and transformers, with the keys that they have here.
FOREIGN = {
    "beta": "kl_coef",
    "num_generations": "num_completions",
    "loss_type": "preset",
    "max_completion_length": "dataset.completion_tokens",
    "max_prompt_length": "dataset.prompt_tokens",
    "gradient_accumulation_steps": "grad_accum_steps",
    "per_device_train_batch_size": "batch_size",
    "max_steps": "num_updates",
    "num_timesteps": "num_updates",
    "total_timesteps": "num_updates",
    "num_updates_per_batch": "num_epochs",
    "num_iterations": "num_epochs",
    "entropy_cost": "entropy_coef",
    "ent_coef": "entropy_coef",
    "vf_coef": "value_coef",
    "vf_loss_coefficient": "value_coef",
    "clipping_epsilon": "clip",
    "epsilon": "clip",
    "clip_range": "clip",
    "discounting": "discount",
    "gamma": "discount",
    "n_steps": "unroll_length",
    "top_entropy_quantile": "top_entropy_fraction",
    "kl_cov_ratio": "kl_cov_fraction",
    "ppo_kl_coef": "kl_cov_coef",
    "tau": "target_rate",
    "reward_funcs": "rewards.functions",
    "reward_weights": "rewards.weights",
    "vllm_importance_sampling_cap": "importance_weight_cap",
    "lr": "optimizer.learning_rate",
    "learning_rate": "optimizer.learning_rate",
    "learning_rate_schedule": "desired_kl",
    "learning_rate_schedule_min_lr": "min_learning_rate",
    "learning_rate_schedule_max_lr": "max_learning_rate",
    "lr_scheduler_type": "optimizer.schedule",
    "gradient_checkpointing": "model.remat",
    "hidden_size": "model.width",
    "num_attention_heads": "model.heads",
    "num_hidden_layers": "model.layers",
}
_STEPS = ", in updates of num_envs * unroll_length environment steps"
# What differs from the unit of the other library.
UNITS = {"num_timesteps": _STEPS, "total_timesteps": _STEPS}
