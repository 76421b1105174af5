"""Rejects unsupported settings of JAX before anything is traced."""

from typing import Any

import jax


def check_settings() -> None:
    """Rejects settings of JAX under which runs would fail later or give other results.

    `jax_default_prng_impl='rbg'` and `jax_debug_nans` are supported. With 'rbg', the random numbers
    of a batch depend on its size, see `jax.random`, so that a different number of environments,
    prompts or devices gives different episodes.

    Raises:
      ValueError: If an unsupported setting is active. The message gives the setting and the remedy.
    """
    config: Any = jax.config  # The type of jax.config lacks settings with a context manager.
    if config.jax_enable_x64:
        raise ValueError(
            "jax_enable_x64=True is not supported: runs compute in float32 and bfloat16. Unset "
            "JAX_ENABLE_X64."
        )
    if config.jax_numpy_dtype_promotion != "standard":
        raise ValueError(
            f"jax_numpy_dtype_promotion={config.jax_numpy_dtype_promotion!r} is not "
            "supported: integers and floats are mixed throughout, in Brax too. Unset "
            "JAX_NUMPY_DTYPE_PROMOTION."
        )
