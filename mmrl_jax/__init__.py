"""Fine-tuning of large multimodal transformers with reinforcement learning in JAX.

import mmrl_jax

config = mmrl_jax.get_config("reach_ppo", {"ppo": {"num_updates": 20}})
trained = mmrl_jax.train(config, "runs/reach")
loaded = mmrl_jax.load("runs/reach")
loaded.evaluate("train")
"""

from typing import Any

__all__ = ["get_config", "load", "train"]


def __getattr__(name: str) -> Any:
    # The import is lazy, so that using a loss does not import environments, models and trainers.
    if name in __all__:
        from mmrl_jax import restoring, runs

        return getattr(restoring if name == "load" else runs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
