"""Settings of JAX that runs do not support: refused before anything is traced."""

from typing import Any

import jax


def check_settings() -> None:
    """Refuses settings of JAX under which runs would fail, or would be other ones, far from here.

    `jax_default_prng_impl='rbg'` and `jax_debug_nans` are supported. With 'rbg' what a batch draws
    depends on its size, see `jax.random`, so that another number of environments, of questions or
    of devices draws other episodes.

    Raises:
      ValueError: names the setting and the remedy.
    """
    config: Any = jax.config  # Its type knows no settings that a context manager changes.
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
