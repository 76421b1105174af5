"""Configs as JSON, and the differences of two."""

import json
from typing import Any

import ml_collections

from mmrl_jax.config.schema import ConfigLike, flatten


def to_json(config: ConfigLike) -> str:
    """Returns the config as sorted, indented JSON; tuples become lists.

    Raises:
        ValueError: A value that JSON cannot hold, with its key.
    """
    for key, value in flatten(config).items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f"Config key '{key}' holds {value!r}, which JSON cannot: use numbers, strings, "
                "booleans, None, tuples and groups."
            ) from error
    plain = ml_collections.ConfigDict(config).to_dict()
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
    """Returns the locked config of `to_json`; lists come back as tuples.

    Raises:
        ValueError: The text is not a JSON object.
    """
    try:
        plain = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"Not a config in JSON ({error}): restore it or delete it.") from error
    if not isinstance(plain, dict):
        raise ValueError(f"A config in JSON must be an object, not {type(plain).__name__}.")
    config = ml_collections.ConfigDict(_lists_to_tuples(plain))
    config.lock()
    return config


def diff_configs(first: ConfigLike, second: ConfigLike) -> dict[str, tuple[Any, Any]]:
    """Returns `{"ppo.clip": (0.2, 0.1)}` for each key that differs, sorted by key.

    A key that one side lacks has the string "(absent)" there. Values are compared as JSON gives
    them back, so a tuple equals the list that it became on disk, and NaN equals NaN.
    """
    flat_first = flatten(from_json(to_json(first)))
    flat_second = flatten(from_json(to_json(second)))
    differences = {}
    for key in sorted(flat_first.keys() | flat_second.keys()):
        one = flat_first.get(key, "(absent)")
        two = flat_second.get(key, "(absent)")
        # repr tells 1 from True and 1.0, and equates NaN with NaN.
        if repr(one) != repr(two):
            differences[key] = (one, two)
    return differences


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_lists_to_tuples(item) for item in value)
    return value
